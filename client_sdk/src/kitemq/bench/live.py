"""Load on a cluster of the user's own: what `kitemq bench produce|consume|latency` run, and what they report.

Only the namesrvs that the user names are asked, and only brokers that those name are loaded. Figures and their names
are those of the OpenMessaging benchmark: rates, latencies avg/50/75/95/99/99.9/max, each second and in all.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from kitemq.bench.consuming import new_group
from kitemq.bench.histogram import Histogram, Latency
from kitemq.bench.producing import BORN, GROUP, closed_loop, paced, random_body
from kitemq.compression import Compression
from kitemq.consumer import Position, PushConsumer
from kitemq.errors import KiteMQError
from kitemq.message import Message, ReceivedMessage
from kitemq.producer import Producer
from kitemq.rpc import TlsConfig

INTERVAL_S = 1.0
# What is still on its way when sending ends may take this long to arrive.
ARRIVAL_TIMEOUT_S = 10.0
MARK_BYTES = 8
BODY_BYTES_MIN = BORN.size + MARK_BYTES


@dataclass(frozen=True, slots=True)
class Figures:
    """What happened in `seconds`. Rates are messages per second, megabytes are 10^6 bytes of bodies."""

    at_s: float
    seconds: float
    published: int
    publish_errors: int
    consumed: int
    body_bytes: int
    publish: Latency
    end_to_end: Latency

    @property
    def publish_rate(self) -> float:
        return self.published / self.seconds

    @property
    def consume_rate(self) -> float:
        return self.consumed / self.seconds


@dataclass(slots=True)
class Load:
    """What a running load counts; taken and cleared once a second."""

    publish: Histogram = field(default_factory=Histogram)
    end_to_end: Histogram = field(default_factory=Histogram)
    messages_per_send: int = 1
    publish_errors: int = 0
    body_bytes: int = 0
    last_error: str = ""

    def failed(self, error: KiteMQError) -> None:
        """Raises what can never succeed; the rest is counted."""
        if not error.retriable:
            raise error
        self.publish_errors += 1
        self.last_error = str(error)


class Report:
    """Seconds and their sum."""

    def __init__(self, each_second: Callable[[Figures], None]) -> None:
        self.load = Load()
        self.seconds: list[Figures] = []
        self._each_second = each_second
        self._publish = Histogram()
        self._end_to_end = Histogram()
        self._errors = 0
        self._body_bytes = 0
        self._started = self._last = time.perf_counter()

    @asynccontextmanager
    async def counting(self) -> AsyncIterator[None]:
        """While it is open, a second after the other; what is left of the last one is in the sum."""
        self._started = self._last = time.perf_counter()
        seconds = asyncio.create_task(self._every_second())
        try:
            yield
        finally:
            seconds.cancel()
            await asyncio.gather(seconds, return_exceptions=True)
            self._take()

    async def _every_second(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += INTERVAL_S
            await asyncio.sleep(max(0.0, due - loop.time()))
            figures = self._take()
            self.seconds.append(figures)
            self._each_second(figures)

    def total(self) -> Figures:
        return Figures(
            at_s=self._last - self._started,
            seconds=self._last - self._started,
            published=self._publish.count * self.load.messages_per_send,
            publish_errors=self._errors,
            consumed=self._end_to_end.count,
            body_bytes=self._body_bytes,
            publish=self._publish.latency(),
            end_to_end=self._end_to_end.latency(),
        )

    def _take(self) -> Figures:
        load = self.load
        publish, end_to_end = load.publish.taken(), load.end_to_end.taken()
        errors, load.publish_errors = load.publish_errors, 0
        body_bytes, load.body_bytes = load.body_bytes, 0
        now = time.perf_counter()
        figures = Figures(
            at_s=now - self._started,
            seconds=now - self._last,
            published=publish.count * load.messages_per_send,
            publish_errors=errors,
            consumed=end_to_end.count,
            body_bytes=body_bytes,
            publish=publish.latency(),
            end_to_end=end_to_end.latency(),
        )
        self._last = now
        self._publish.add(publish)
        self._end_to_end.add(end_to_end)
        self._errors += errors
        self._body_bytes += body_bytes
        return figures

    def to_json(self) -> dict[str, Any]:
        """Under the names of the OpenMessaging benchmark's result files; latencies in milliseconds."""
        total = self.total()
        result: dict[str, Any] = {
            "publishRate": [one.publish_rate for one in self.seconds],
            "publishErrorRate": [one.publish_errors / one.seconds for one in self.seconds],
            "consumeRate": [one.consume_rate for one in self.seconds],
            "aggregatedPublishRate": total.publish_rate,
            "aggregatedConsumeRate": total.consume_rate,
            "aggregatedPublishErrors": total.publish_errors,
        }
        for name, of in (("publish", _publish), ("endToEnd", _end_to_end)):
            for figure, key in _LATENCY_KEYS.items():
                result[f"{name}Latency{key}"] = [getattr(of(one), figure) for one in self.seconds]
                result[f"aggregated{name[0].upper()}{name[1:]}Latency{key}"] = getattr(of(total), figure)
        return result


_LATENCY_KEYS = {
    "avg_ms": "Avg",
    "p50_ms": "50pct",
    "p75_ms": "75pct",
    "p95_ms": "95pct",
    "p99_ms": "99pct",
    "p999_ms": "999pct",
    "max_ms": "Max",
}


def _publish(figures: Figures) -> Latency:
    return figures.publish


def _end_to_end(figures: Figures) -> Latency:
    return figures.end_to_end


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes."""

    namesrv: str
    topic: str
    tls: TlsConfig | None = None


async def produce(
    target: Target, report: Report, *, seconds: float, rate: float, in_flight: int, batch: int, body_bytes: int
) -> None:
    """Send for `seconds`. rate: messages per second; 0 = as fast as `in_flight` callers get their answers."""
    load = report.load
    load.messages_per_send = batch
    body = random_body(body_bytes)
    async with Producer(target.namesrv, group=GROUP, compression=Compression.NONE, tls=target.tls) as producer:

        async def send(_: int = 0) -> None:
            if batch == 1:
                await producer.send(Message(target.topic, body))
            else:
                await producer.send_batch([Message(target.topic, body) for _ in range(batch)])
            load.body_bytes += batch * body_bytes

        deadline_ns = time.perf_counter_ns() + int(seconds * 1e9)
        async with report.counting():
            if rate:
                await paced(send, load.publish, rate=rate / batch, deadline_ns=deadline_ns, failed=load.failed)
            else:
                await closed_loop(send, load.publish, in_flight=in_flight, deadline_ns=deadline_ns, failed=load.failed)


async def consume(target: Target, report: Report, *, group: str, seconds: float, from_first: bool) -> None:
    """Handle what comes for `seconds`; its age is told by the producer's clock, in whole milliseconds."""
    load = report.load

    async def handle(message: ReceivedMessage) -> None:
        load.end_to_end.record(int(time.time() * 1000 - message.born_timestamp_ms) * 1_000_000)
        load.body_bytes += len(message.body)

    start = Position.FIRST if from_first else Position.LAST
    async with PushConsumer(target.namesrv, group=group, from_where=start, tls=target.tls) as consumer:
        await consumer.subscribe(target.topic, handle)
        async with _consuming(consumer), report.counting():
            await asyncio.sleep(seconds)


async def latency(target: Target, report: Report, *, seconds: float, rate: float, body_bytes: int) -> None:
    """Send at `rate` and handle in this one process; both latencies count from when the schedule wanted the send.

    body_bytes: at least BODY_BYTES_MIN.
    """
    load = report.load
    mark = random_body(MARK_BYTES)  # messages of other runs in the topic are not ours to time
    rest = random_body(body_bytes - BODY_BYTES_MIN)
    # Not the end of the queues: what is sent before the consumer has found it would be missed.
    begin = datetime.now(UTC) - timedelta(minutes=1)
    arrived = asyncio.Event()
    sent = handled = wanted = 0

    async def handle(message: ReceivedMessage) -> None:
        nonlocal handled
        body = message.body
        if body[BORN.size : BODY_BYTES_MIN] == mark:
            load.end_to_end.record(time.perf_counter_ns() - BORN.unpack_from(body)[0])
            handled += 1
            if handled == wanted:
                arrived.set()

    async with (
        PushConsumer(target.namesrv, group=new_group("latency"), from_where=begin, tls=target.tls) as consumer,
        Producer(target.namesrv, group=GROUP, compression=Compression.NONE, tls=target.tls) as producer,
    ):
        await consumer.subscribe(target.topic, handle)

        async def send(due_ns: int) -> None:
            nonlocal sent
            await producer.send(Message(target.topic, BORN.pack(due_ns) + mark + rest))
            sent += 1
            load.body_bytes += body_bytes

        async with _consuming(consumer), report.counting():
            deadline_ns = time.perf_counter_ns() + int(seconds * 1e9)
            await paced(send, load.publish, rate=rate, deadline_ns=deadline_ns, failed=load.failed)
            wanted = sent
            if handled < wanted:
                with suppress(TimeoutError):
                    await asyncio.wait_for(arrived.wait(), ARRIVAL_TIMEOUT_S)


@asynccontextmanager
async def _consuming(consumer: PushConsumer) -> AsyncIterator[None]:
    running = asyncio.create_task(consumer.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
