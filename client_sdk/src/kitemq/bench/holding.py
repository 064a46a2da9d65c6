"""Many clients at once: each with a connection of its own and pulls held on its own queues.

They speak the wire themselves, because the SDK shares one connection among all clients of a process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from kitemq.bench.histogram import Histogram
from kitemq.bench.process import BenchError
from kitemq.bench.producing import BORN
from kitemq.consumer.pull_stream import HOLD_MS, PULL_METHOD, split_reply
from kitemq.proto.v1 import broker_pb2, broker_pb2_grpc, message_pb2
from kitemq.rpc import CHANNEL_OPTIONS

QUEUES_PER_CONSUMER = 8
HEARTBEAT_S = 30.0
CREDIT_MESSAGES = 1_000
CREDIT_BYTES = 1 << 20
OPEN_TIMEOUT_S = 60.0
# Connections that are being opened at a time.
OPENING_MAX = 50

RawStream = grpc.aio.StreamStreamCall[bytes, bytes]


class HoldingConsumers:
    """A worker's consumers `first` .. `first + count - 1`; consumer i holds queues 8i .. 8i + 7 of the topic.

    Orders as PushLatency's: {"forget": true}, {"messages": n, "timeout_s": s}.
    """

    def __init__(self, address: str, topic: str) -> None:
        self.info: dict[str, Any] = {}
        self._address = address
        self._topic = topic
        self._histogram = Histogram()
        self._arrived = 0
        self._changed = asyncio.Event()
        self._opening = asyncio.Semaphore(OPENING_MAX)
        self._opened: asyncio.Queue[int] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    @asynccontextmanager
    async def consuming(self, first: int, count: int) -> AsyncIterator[None]:
        """All of them connected and pulling, while it is open."""
        self._tasks = [asyncio.create_task(self._consume(index)) for index in range(first, first + count)]
        try:
            await self._unless_failed(self._all_opened(count))
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _all_opened(self, count: int) -> None:
        for _ in range(count):
            await self._opened.get()

    async def _unless_failed(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`; raises what a consumer raised meanwhile."""
        task = asyncio.create_task(work)
        try:
            done, _ = await asyncio.wait({task, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
            for finished in done:
                await finished
        finally:
            task.cancel()

    async def _consume(self, index: int) -> None:
        # A local pool: without it gRPC gives all channels of the process to this address one connection.
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(self._address, options=options) as channel:
            async with self._opening:
                await channel.channel_ready()
                stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(channel)
                heartbeat = self._heartbeat(index)
                await stub.Heartbeat(heartbeat, timeout=OPEN_TIMEOUT_S)
                notifications = stub.Notify(broker_pb2.NotifyRequest(client_id=heartbeat.client_id))
                pulls: RawStream = channel.stream_stream(PULL_METHOD)()
                for number in range(QUEUES_PER_CONSUMER):
                    await pulls.write(self._pull(index, number).SerializeToString())
            self._opened.put_nowait(index)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._read(pulls))
                tasks.create_task(_drain(notifications))
                tasks.create_task(_beat(stub, heartbeat))

    def _heartbeat(self, index: int) -> broker_pb2.HeartbeatRequest:
        consumer = broker_pb2.ConsumerInfo(
            group=f"bench-holding-{index}",
            consume_type=broker_pb2.CONSUME_ACTIVELY,
            subscriptions=[broker_pb2.Subscription(topic=self._topic, filter="*")],
        )
        return broker_pb2.HeartbeatRequest(client_id=f"bench-holding@{index}", language="PYTHON", consumers=[consumer])

    def _pull(self, index: int, number: int) -> broker_pb2.PullRequest:
        return broker_pb2.PullRequest(
            number=number + 1,
            topic=self._topic,
            queue_id=index * QUEUES_PER_CONSUMER + number,
            group=f"bench-holding-{index}",
            credit_messages=CREDIT_MESSAGES,
            credit_bytes=CREDIT_BYTES,
            suspend_ms=HOLD_MS,
        )

    async def _read(self, pulls: RawStream) -> None:
        while (reply := await pulls.read()) is not grpc.aio.EOF:
            assert isinstance(reply, bytes)
            now = time.perf_counter_ns()
            header, records_bytes = split_reply(reply)
            if header.HasField("error"):
                raise BenchError(f"a held pull was refused: {header.error.name}: {header.error.message}")
            for record in message_pb2.Segment.FromString(reply[:records_bytes]).records:
                self._histogram.record(now - BORN.unpack_from(record.body)[0])
                self._arrived += 1
            self._changed.set()
        raise BenchError("the broker ended a stream of pulls")

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        if order.get("forget"):
            self._histogram = Histogram()
            self._arrived = 0
            return {}
        try:
            async with asyncio.timeout(order["timeout_s"]):
                await self._unless_failed(self._all_arrived(order["messages"]))
        except TimeoutError:
            raise BenchError(f"{self._arrived} of {order['messages']} messages came to their consumers") from None
        return {"messages": self._arrived, "latency": self._histogram.to_json()}

    async def _all_arrived(self, count: int) -> None:
        while self._arrived < count:
            self._changed.clear()
            await self._changed.wait()


async def _drain(notifications: grpc.aio.UnaryStreamCall[Any, Any]) -> None:
    async for _ in notifications:
        pass
    raise BenchError("the broker ended a stream of notifications")


async def _beat(stub: broker_pb2_grpc.BrokerAsyncStub, heartbeat: broker_pb2.HeartbeatRequest) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        await stub.Heartbeat(heartbeat, timeout=OPEN_TIMEOUT_S)


@asynccontextmanager
async def holding_job(*, address: str, topic: str, first: int, count: int) -> AsyncIterator[HoldingConsumers]:
    """`count` consumers of the broker at `address`, all connected."""
    load = HoldingConsumers(address, topic)
    async with load.consuming(first, count):
        yield load
