"""Load on the receiving side: draining a backlog, and how long a message takes from born to handler."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from kitemq.admin import AdminClient
from kitemq.bench.histogram import Histogram
from kitemq.bench.process import BenchError
from kitemq.bench.producing import BORN
from kitemq.consumer import Position, PullConsumer, PushConsumer
from kitemq.message import ReceivedMessage

# Every so many messages one is read in full, so that a drain of things that are no messages fails.
_CHECK_EVERY = 1_000

# (group, messages wanted, what counts the received ones) -> seconds
Drain = Callable[[str, int, "Received"], Awaitable[float]]


def new_group(kind: str) -> str:
    """A consumer group that has no offsets yet."""
    return f"bench-{kind}-{secrets.token_hex(4)}"


def check_readable(message: ReceivedMessage) -> None:
    """Reads every field. Raises BenchError when it is not a stored message."""
    read = (
        message.body,
        message.message_id,
        message.topic,
        message.tag,
        message.keys,
        message.properties,
        message.queue_offset,
        message.born_timestamp_ms,
        message.store_timestamp_ms,
        message.physical_offset,
    )
    if not message.body or not message.message_id or not message.store_timestamp_ms:
        raise BenchError(f"a message without a body, an id or a store time was received: {read[1:]}")


class Received:
    """How far a drain has come."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class DrainLoad:
    """A worker's drain by a group of its own.

    Order: {"messages": n, "timeout_s": s}; the time is from the first message to the last.
    """

    def __init__(self, drain: Drain, kind: str) -> None:
        self.info: dict[str, Any] = {}
        self._drain = drain
        self._kind = kind

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        messages = order["messages"]
        received = Received()
        try:
            async with asyncio.timeout(order["timeout_s"]):
                seconds = await self._drain(new_group(self._kind), messages, received)
        except TimeoutError:
            raise BenchError(
                f"{received.count} of {messages} messages were received within {order['timeout_s']} s"
            ) from None
        return {"messages": messages, "seconds": seconds}


@asynccontextmanager
async def pull_job(*, namesrv: str, topic: str, read_bodies: bool = False) -> AsyncIterator[DrainLoad]:
    """`async for` over a PullConsumer. read_bodies: also decode each message and take its body."""

    async def drain(group: str, wanted: int, received: Received) -> float:
        clock = time.perf_counter
        started = clock()
        count = body_bytes = 0
        async with PullConsumer(namesrv, group=group, from_where=Position.FIRST) as consumer:
            await consumer.subscribe(topic)
            async for message in consumer:
                count += 1
                if read_bodies:
                    body_bytes += len(message.body)
                if count % _CHECK_EVERY == 1:
                    check_readable(message)
                    received.count = count
                    if count == 1:
                        started = clock()
                if count == wanted:
                    break
            return clock() - started

    yield DrainLoad(drain, "pull")


@asynccontextmanager
async def push_job(*, namesrv: str, topic: str) -> AsyncIterator[DrainLoad]:
    """A PushConsumer with an async handler that does nothing but count; what it committed is checked afterwards."""

    async def drain(group: str, wanted: int, received: Received) -> float:
        clock = time.perf_counter
        started = finished = 0.0
        count = 0
        all_received = asyncio.Event()

        async def handle(message: ReceivedMessage) -> None:
            nonlocal count, started, finished
            count += 1
            if count % _CHECK_EVERY == 1:
                check_readable(message)
                received.count = count
                if count == 1:
                    started = clock()
            if count == wanted:
                finished = clock()
                all_received.set()

        async with PushConsumer(namesrv, group=group, from_where=Position.FIRST) as consumer:
            await consumer.subscribe(topic, handle)
            running = asyncio.create_task(consumer.run())
            ended = asyncio.create_task(all_received.wait())
            await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                ended.cancel()
                await running  # raises what ended it
            running.cancel()
        await _check_committed(namesrv, group, wanted)
        return finished - started

    yield DrainLoad(drain, "push")


async def _check_committed(namesrv: str, group: str, wanted: int) -> None:
    async with AdminClient(namesrv) as admin:
        found = await admin.describe_group(group)
    committed = sum(queue.consumer_offset or 0 for queue in found.queues)
    if committed < wanted:
        raise BenchError(f"group {group} has handled {wanted} messages and committed {committed}")


class PushLatency:
    """A worker's time from born to handler.

    Orders: {"forget": true} counts anew what is born from now on; {"messages": n, "timeout_s": s} waits until so many
    of those have been handled.
    """

    def __init__(self) -> None:
        self.info: dict[str, Any] = {}
        self._histogram = Histogram()
        self._from_ns = 0
        self._wanted = 0
        self._count = 0
        self._reached = asyncio.Event()

    async def handle(self, message: ReceivedMessage) -> None:
        born_ns = BORN.unpack_from(message.body)[0]
        if born_ns < self._from_ns:
            return
        self._histogram.record(time.perf_counter_ns() - born_ns)
        self._count += 1
        if self._count == self._wanted:
            self._reached.set()

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        if order.get("forget"):
            self._from_ns = time.perf_counter_ns()
            self._histogram = Histogram()
            self._wanted = self._count = 0
            return {}
        self._wanted = order["messages"]
        self._reached.clear()
        if self._count < self._wanted:
            try:
                await asyncio.wait_for(self._reached.wait(), order["timeout_s"])
            except TimeoutError:
                raise BenchError(f"{self._count} of {self._wanted} messages came to the handler") from None
        return {"latency": self._histogram.to_json(), "messages": self._count}


@asynccontextmanager
async def push_latency_job(*, namesrv: str, topic: str) -> AsyncIterator[PushLatency]:
    """A PushConsumer whose handler reads when the message was born; running when this returns."""
    load = PushLatency()
    async with PushConsumer(namesrv, group=new_group("latency"), from_where=Position.FIRST) as consumer:
        await consumer.subscribe(topic, load.handle)
        running = asyncio.create_task(consumer.run())
        try:
            yield load
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
