"""Load on the sending side: closed loops, which find the most that goes through, and a fixed rate, which finds how long
a message takes when somebody else sets the pace.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from kitemq import sync
from kitemq.bench.histogram import Histogram
from kitemq.compression import Compression
from kitemq.errors import KiteMQError
from kitemq.message import Message, MessageQueue
from kitemq.producer import Producer

GROUP = "bench-producer"
# Born time of a message, in its body: nanoseconds of the clock that all processes of one machine share.
BORN = struct.Struct("<Q")
# A fixed rate that is not kept up with: no more than this many wait for their answer, the others for their turn.
PACED_IN_FLIGHT_MAX = 10_000
# Sends of a late schedule that start before the loop gets its turn.
_CATCH_UP = 64

OnError = Callable[[KiteMQError], None]


def random_body(size: int) -> bytes:
    """Bytes that no compression makes smaller."""
    return os.urandom(size)


@asynccontextmanager
async def _callers() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first error itself: hundreds of callers fail of one cause."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except ExceptionGroup as group:
        raise group.exceptions[0] from None


async def closed_loop(
    send: Callable[[], Awaitable[object]],
    histogram: Histogram,
    *,
    in_flight: int,
    deadline_ns: int,
    failed: OnError | None = None,
) -> None:
    """`in_flight` callers, each of which waits for its answer before it sends again, until the deadline.

    failed: is told of a send's error, which is not counted in the histogram; None: the first error ends it all.
    """
    clock = time.perf_counter_ns

    async def caller() -> None:
        before = clock()
        while before < deadline_ns:
            try:
                await send()
            except KiteMQError as error:
                if failed is None:
                    raise
                failed(error)
                before = clock()
                continue
            after = clock()
            histogram.record(after - before)
            before = after

    async with _callers() as callers:
        for _ in range(in_flight):
            callers.create_task(caller())


async def paced(
    send: Callable[[int], Awaitable[object]],
    histogram: Histogram,
    *,
    rate: float,
    deadline_ns: int,
    lateness: Histogram | None = None,
    failed: OnError | None = None,
) -> int:
    """`send(due_ns)` at `rate` per second until the deadline, answered or not; the number of sends.

    A latency begins when the schedule wanted the send, not when it was made: a stall is counted with all the messages
    that it held up. lateness: how late each send was started, which is this process's own share. failed: as in
    `closed_loop`.
    """
    clock = time.perf_counter_ns
    free = asyncio.Semaphore(PACED_IN_FLIGHT_MAX)
    started = clock()
    count = 0

    async def one(due_ns: int) -> None:
        try:
            await send(due_ns)
            histogram.record(clock() - due_ns)
        except KiteMQError as error:
            if failed is None:
                raise
            failed(error)
        finally:
            free.release()

    async with _callers() as sends:
        while (due_ns := started + int(count * 1e9 / rate)) < deadline_ns:
            wait_ns = due_ns - clock()
            if wait_ns > 0 or count % _CATCH_UP == 0:
                await asyncio.sleep(max(0, wait_ns) / 1e9)
            await free.acquire()
            if lateness is not None:
                lateness.record(clock() - due_ns)
            sends.create_task(one(due_ns))
            count += 1
    return count


@asynccontextmanager
async def open_producer(namesrv: str) -> AsyncIterator[Producer]:
    """The producer of every measurement: compression off, everything else as users have it."""
    async with Producer(namesrv, group=GROUP, compression=Compression.NONE) as producer:
        yield producer


class SendLoad:
    """A worker's closed loop. Order: {"seconds": s}, or {"messages": n} for as long as that many (whole sends) take."""

    def __init__(self, send: Callable[[], Awaitable[object]], *, in_flight: int, messages_per_send: int) -> None:
        self.info: dict[str, Any] = {}
        self._send = send
        self._in_flight = in_flight
        self._messages_per_send = messages_per_send

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        histogram = Histogram()
        started = time.perf_counter_ns()
        if "messages" in order:
            sends = -(-order["messages"] // self._messages_per_send)
            await self._send_count(sends)
            messages = sends * self._messages_per_send
        else:
            deadline_ns = started + int(order["seconds"] * 1e9)
            await closed_loop(self._send, histogram, in_flight=self._in_flight, deadline_ns=deadline_ns)
            messages = histogram.count * self._messages_per_send
        seconds = (time.perf_counter_ns() - started) / 1e9
        return {"messages": messages, "seconds": seconds, "latency": histogram.to_json()}

    async def _send_count(self, count: int) -> None:
        turns = iter(range(count))

        async def caller() -> None:
            for _ in turns:  # shared: each turn is taken once
                await self._send()

        async with _callers() as callers:
            for _ in range(self._in_flight):
                callers.create_task(caller())


@asynccontextmanager
async def send_job(*, namesrv: str, topic: str, body_bytes: int, in_flight: int) -> AsyncIterator[SendLoad]:
    """`send()` awaited per message, a new Message each."""
    body = random_body(body_bytes)
    async with open_producer(namesrv) as producer:
        yield SendLoad(lambda: producer.send(Message(topic, body)), in_flight=in_flight, messages_per_send=1)


@asynccontextmanager
async def send_batch_job(
    *, namesrv: str, topic: str, body_bytes: int, in_flight: int, batch: int
) -> AsyncIterator[SendLoad]:
    """`send_batch` of `batch` new Messages."""
    body = random_body(body_bytes)
    async with open_producer(namesrv) as producer:
        yield SendLoad(
            lambda: producer.send_batch([Message(topic, body) for _ in range(batch)]),
            in_flight=in_flight,
            messages_per_send=batch,
        )


class PacedLoad:
    """A worker's fixed rate. Order: {"seconds": s}."""

    def __init__(self, send: Callable[[int], Awaitable[object]], *, rate: float) -> None:
        self.info: dict[str, Any] = {}
        self._send = send
        self._rate = rate

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        histogram = Histogram()
        lateness = Histogram()
        started = time.perf_counter_ns()
        messages = await paced(
            self._send,
            histogram,
            rate=self._rate,
            deadline_ns=started + int(order["seconds"] * 1e9),
            lateness=lateness,
        )
        return {
            "messages": messages,
            "seconds": (time.perf_counter_ns() - started) / 1e9,
            "latency": histogram.to_json(),
            "lateness": lateness.to_json(),
        }


@asynccontextmanager
async def send_paced_job(*, namesrv: str, topic: str, body_bytes: int, rate: float) -> AsyncIterator[PacedLoad]:
    """`send()` at a fixed rate; each body begins with the time it was due."""
    rest = random_body(body_bytes - BORN.size)
    async with open_producer(namesrv) as producer:
        yield PacedLoad(lambda due_ns: producer.send(Message(topic, BORN.pack(due_ns) + rest)), rate=rate)


@asynccontextmanager
async def send_to_queues_job(
    *, namesrv: str, topic: str, body_bytes: int, rate: float, broker_name: str, queue_ids: list[int]
) -> AsyncIterator[PacedLoad]:
    """As `send_paced_job`, to these queues in turn."""
    rest = random_body(body_bytes - BORN.size)
    turns = itertools.cycle(MessageQueue(topic, broker_name, queue_id) for queue_id in queue_ids)
    async with open_producer(namesrv) as producer:
        yield PacedLoad(
            lambda due_ns: producer.send(Message(topic, BORN.pack(due_ns) + rest), queue=next(turns)), rate=rate
        )


class SyncLoad:
    """A worker's threads on one `kitemq.sync` producer. Order: {"seconds": s}."""

    def __init__(self, send: Callable[[], object], *, threads: int) -> None:
        self.info: dict[str, Any] = {}
        self._send = send
        self._threads = threads

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        clock = time.perf_counter_ns
        started = clock()
        deadline_ns = started + int(order["seconds"] * 1e9)

        def caller() -> Histogram:
            histogram = Histogram()  # its own: two threads may not count in one
            before = clock()
            while before < deadline_ns:
                self._send()
                after = clock()
                histogram.record(after - before)
                before = after
            return histogram

        loop = asyncio.get_running_loop()
        total = Histogram()
        with ThreadPoolExecutor(self._threads) as pool:
            for histogram in await asyncio.gather(*(loop.run_in_executor(pool, caller) for _ in range(self._threads))):
                total.add(histogram)
        return {"messages": total.count, "seconds": (clock() - started) / 1e9, "latency": total.to_json()}


@asynccontextmanager
async def send_sync_job(*, namesrv: str, topic: str, body_bytes: int, threads: int) -> AsyncIterator[SyncLoad]:
    """`kitemq.sync` sends from `threads` threads that share a producer."""
    body = random_body(body_bytes)
    with sync.Producer(namesrv, group=GROUP, compression=Compression.NONE) as producer:
        yield SyncLoad(lambda: producer.send(Message(topic, body)), threads=threads)
