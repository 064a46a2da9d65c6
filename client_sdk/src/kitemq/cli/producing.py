"""Behind `kitemq produce`: stdin in a thread, many sends in flight, failures by line."""

from __future__ import annotations

import asyncio
import json
import os
import re
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from kitemq.admin import AdminClient
from kitemq.admin.fanout import NO_BROKER
from kitemq.cli.messages import parse_message_line
from kitemq.cli.options import Connection
from kitemq.cli.output import bytes_text, count_text, note
from kitemq.cli.session import ExitCode, exit_code_of
from kitemq.errors import BrokerUnavailableError, InvalidRequestError, KiteMQError
from kitemq.message import Message, SendReceipt, SendStatus
from kitemq.producer import Producer
from kitemq.protocol.names import check_sendable, check_topic

PRODUCER_GROUP = "kitemq-cli"
IN_FLIGHT = 1024
READ_BYTES = 256 * 1024
REPORTED_LINES = 10
# After Ctrl-C: how long sends under way may take to be answered.
STOP_S = 1.0


@dataclass(frozen=True, slots=True)
class LineTemplate:
    """What all lines have in common. full: each line is a JSON object."""

    topic: str
    keys: tuple[str, ...] = ()
    tag: str = ""
    properties: Mapping[str, str] | None = None
    sharding_key: str = ""
    full: bool = False

    def message(self, line: bytes) -> tuple[Message, str]:
        """The message that a line stands for, and its sharding key. Raises ValueError for a line that is none."""
        if not self.full:
            properties = self.properties or {}
            return Message(self.topic, line, tag=self.tag, keys=self.keys, properties=properties), self.sharding_key
        message, sharding_key = parse_message_line(line, topic=self.topic)
        message.tag = message.tag or self.tag
        message.keys = message.keys or self.keys
        message.properties = {**(self.properties or {}), **message.properties}
        return message, sharding_key or self.sharding_key


class Refusals:
    """What the cluster refused: the same of many messages is one error. `first` and `came` tell of the first."""

    def __init__(self) -> None:
        self.first: KiteMQError | None = None
        self.came = asyncio.Event()
        self._lines: dict[tuple[str, ...], tuple[KiteMQError, list[int]]] = {}

    def add(self, number: int, error: KiteMQError) -> None:
        """The message of a line was refused. Only those under way at the first refusal come here."""
        self.first = self.first or error
        self.came.set()
        # Bytes that are free, or a request's number, make no other refusal.
        alike = (type(error).__name__, re.sub(r"\d+", "", error.message))
        self._lines.setdefault(alike, (error, []))[1].append(number)

    def report(self) -> None:
        """Say each refusal, and whose lines it struck."""
        for error, numbers in list(self._lines.values())[:REPORTED_LINES]:
            lines = f"line {numbers[0]}"
            if len(numbers) > 1:
                lines = f"{len(numbers)} messages, lines {min(numbers)} to {max(numbers)}"
            note(f"Error: {lines}: {error}")


class LineProducer:
    """One run of `kitemq produce`."""

    def __init__(self, connection: Connection, template: LineTemplate, *, receipts: bool) -> None:
        self._connection = connection
        self._template = template
        self._receipts = receipts
        self._lines: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue(maxsize=2 * IN_FLIGHT)
        self._refusals = Refusals()
        self.read_bytes = 0
        self.sent = 0
        self.empty = 0
        self.failed = 0
        self.under_way = 0
        self._bad_lines = 0
        self._unproven: Counter[SendStatus] = Counter()

    async def run(self) -> ExitCode:
        """Send everything; the exit code. Raises what the command fails with before it reads a line."""
        check_topic(self._template.topic)
        check_sendable(self._template.topic)
        await self._check_cluster()
        if sys.stdin.isatty():
            note(f"One message to {self._template.topic} a line; Ctrl-D ends.")
        began = time.monotonic()
        async with Producer(
            self._connection.namesrv, group=PRODUCER_GROUP, tls=self._connection.tls_config()
        ) as producer:
            with progress(self):
                await self._send_all(producer)
        self._summarize(time.monotonic() - began)
        if self._refusals.first is not None:
            return exit_code_of(self._refusals.first)
        return ExitCode.FAILED if self.failed else ExitCode.OK

    async def _check_cluster(self) -> None:
        # The producer waits for a cluster that is not there; whoever types wants to know.
        async with AdminClient(self._connection.namesrv, tls=self._connection.tls_config()) as admin:
            if not await admin.list_brokers():
                raise BrokerUnavailableError(NO_BROKER)

    async def _send_all(self, producer: Producer) -> None:
        workers = [asyncio.create_task(self._work(producer)) for _ in range(IN_FLIGHT)]
        feeder = asyncio.create_task(self._feed())
        refusal = asyncio.create_task(self._refusals.came.wait())
        try:
            await asyncio.wait({feeder, refusal, *workers}, return_when=asyncio.FIRST_COMPLETED)
            if refusal.done():  # stdin may say nothing for a long time: it is left alone
                feeder.cancel()
                self._end_workers()
            elif feeder.done():
                feeder.result()
            await asyncio.gather(*workers)
        except asyncio.CancelledError:
            feeder.cancel()
            await self._stop_soon(workers)
            raise
        finally:
            for task in (feeder, refusal, *workers):
                task.cancel()
            await asyncio.gather(feeder, refusal, *workers, return_exceptions=True)

    def _end_workers(self) -> None:
        """What is not under way yet is not sent."""
        while not self._lines.empty():
            self._lines.get_nowait()
        for _ in range(IN_FLIGHT):
            self._lines.put_nowait(None)

    async def _stop_soon(self, workers: list[asyncio.Task[None]]) -> None:
        self._end_workers()
        await asyncio.wait(workers, timeout=STOP_S)
        self._refusals.report()
        doubt = f", {self.under_way} may or may not be stored" if self.under_way else ""
        note(f"Stopped: {count_text(self.sent, 'message')} sent{doubt}.")

    async def _feed(self) -> None:
        number = 0
        async for lines in stdin_lines():
            for line in lines:
                number += 1
                self.read_bytes += len(line) + 1
                if not line:
                    self.empty += 1
                    continue
                await self._lines.put((number, line))
        for _ in range(IN_FLIGHT):
            await self._lines.put(None)

    async def _work(self, producer: Producer) -> None:
        # Lines are taken in order, and nothing is awaited between taking one and handing it to the producer.
        while (item := await self._lines.get()) is not None:
            if self._refusals.first is not None:
                continue
            number, line = item
            try:
                message, sharding_key = self._template.message(line)
                self.under_way += 1
                try:
                    receipt = await producer.send(message, sharding_key=sharding_key)
                finally:
                    self.under_way -= 1
            except (ValueError, InvalidRequestError) as error:
                self._report(number, str(error))
            except KiteMQError as error:
                self.failed += 1
                self._refusals.add(number, error)
            else:
                self._stored(number, receipt)

    def _report(self, number: int, problem: str) -> None:
        self.failed += 1
        self._bad_lines += 1
        if self._bad_lines <= REPORTED_LINES:
            note(f"Error: line {number}: {problem}")
        elif self._bad_lines == REPORTED_LINES + 1:
            note("Error: more lines failed; they are counted below")

    def _stored(self, number: int, receipt: SendReceipt) -> None:
        self.sent += 1
        if receipt.status is not SendStatus.SEND_OK:
            self._unproven[receipt.status] += 1
        if self._receipts:
            value = {
                "line": number,
                "status": receipt.status.name,
                "message_id": receipt.message_id,
                "topic": receipt.queue.topic,
                "broker_name": receipt.queue.broker_name,
                "queue_id": receipt.queue.queue_id,
                "queue_offset": receipt.queue_offset,
                "store_timestamp_ms": receipt.store_timestamp_ms,
            }
            sys.stdout.write(json.dumps(value) + "\n")

    def _summarize(self, took_s: float) -> None:
        self._refusals.report()
        parts = [f"Sent {count_text(self.sent, 'message')} to {self._template.topic} in {took_s:.1f} s"]
        if self.failed:
            parts.append(f"{count_text(self.failed, 'line')} failed")
        if self._refusals.first is not None:
            parts.append("stopped reading at the first refusal")
        if self.empty:
            parts.append(f"{count_text(self.empty, 'empty line')} passed over")
        parts += [f"{count} stored but not proven durable ({status.name})" for status, count in self._unproven.items()]
        note("; ".join(parts) + ".")


async def stdin_lines() -> AsyncIterator[list[bytes]]:
    """Lines of stdin without their newline, as they come. Reads in a thread, which a blocked read may outlive."""
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[bytes] = asyncio.Queue(maxsize=4)

    def read() -> None:
        while True:
            # Not sys.stdin: its lock would be held by this thread when the interpreter ends.
            chunk = os.read(sys.stdin.fileno(), READ_BYTES)
            try:
                asyncio.run_coroutine_threadsafe(chunks.put(chunk), loop).result()
            except RuntimeError:  # the loop has gone
                return
            if not chunk:
                return

    threading.Thread(target=read, name="stdin", daemon=True).start()
    rest: list[bytes] = []
    while chunk := await chunks.get():
        *lines, last = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join((*rest, lines[0]))
            rest.clear()
            yield lines
        rest.append(last)
    if any(rest):
        yield [b"".join(rest)]


@contextmanager
def progress(producer: LineProducer) -> Iterator[None]:
    """Shows on stderr how far it is, when that is a terminal and stdin is not."""
    if not sys.stderr.isatty() or sys.stdin.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    began = time.monotonic()
    status = os.fstat(sys.stdin.fileno())
    total = status.st_size if stat.S_ISREG(status.st_mode) else 0
    with Live(
        get_renderable=lambda: Text(_progress_text(producer, total, began)),
        console=Console(stderr=True),
        refresh_per_second=8,
        transient=True,
    ):
        yield


def _progress_text(producer: LineProducer, total_bytes: int, began: float) -> str:
    rate = producer.sent / max(time.monotonic() - began, 0.001)
    of = f" of {bytes_text(total_bytes)} ({producer.read_bytes / total_bytes:.0%})" if total_bytes else ""
    failed = f" · {producer.failed} failed" if producer.failed else ""
    return f"{producer.sent:,} sent · {rate:,.0f}/s · {bytes_text(producer.read_bytes)}{of} read{failed}"
