"""A namesrv and brokers of a few lines over real gRPC, whose answers a test scripts: what a real one does seldom.

It keeps the contract of broker.proto's Send: stores a repeat once, refuses what comes behind a refusal until `resume`.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from kitemq.errors import KiteMQError, OutOfOrderError, error_to_stream
from kitemq.proto.v1 import broker_pb2, message_pb2, namesrv_pb2
from kitemq.rpc import CHANNEL_OPTIONS

# What to do with a request: an error refuses its batches, "silent" stores but never answers, "cut" stores and breaks
# the stream, "deaf" neither stores nor answers from then on, None behaves.
Fault = KiteMQError | str | None
Script = Callable[[broker_pb2.SendRequest], Fault]


class ScriptedBroker:
    """One broker. `stored` has each queue's messages in order of storage."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stored: dict[tuple[str, int], list[message_pb2.Message]] = defaultdict(list)
        self.requests: list[broker_pb2.SendRequest] = []
        self.script: Script = lambda request: None
        self.port = 0
        self._known: dict[tuple[int, str, int, int], int] = {}
        self._server: grpc.aio.Server | None = None

    @property
    def bodies(self) -> list[bytes]:
        return [message.body for key in sorted(self.stored) for message in self.stored[key]]

    async def start(self) -> None:
        self._server = grpc.aio.server(options=[*CHANNEL_OPTIONS, ("grpc.so_reuseport", 0)])
        handlers: dict[str, Any] = {
            "Send": grpc.stream_stream_rpc_method_handler(self._send),
            "Heartbeat": grpc.unary_unary_rpc_method_handler(_heartbeat),
            "Unregister": grpc.unary_unary_rpc_method_handler(_unregister),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kitemq.v1.Broker", handlers),))
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def _send(self, _: Any, context: Any) -> None:
        refused: set[tuple[str, int]] = set()
        deaf = False
        while True:
            raw = await context.read()
            if raw is grpc.aio.EOF:
                return
            request = broker_pb2.SendRequest.FromString(raw)
            self.requests.append(request)
            fault = self.script(request)
            deaf = deaf or fault == "deaf"
            if deaf:
                continue
            results = [self._store(batch, refused, fault) for batch in request.batches]
            if fault == "cut":
                return
            if fault != "silent":
                result = broker_pb2.SendResult(number=request.number, batches=results)
                await context.write(broker_pb2.SendResponse(results=[result]).SerializeToString())

    def _store(
        self, batch: broker_pb2.QueueBatch, refused: set[tuple[str, int]], fault: Fault
    ) -> broker_pb2.BatchResult:
        key = (batch.topic, batch.queue_id)
        if batch.resume:
            refused.discard(key)
        if key in refused:
            return broker_pb2.BatchResult(error=error_to_stream(OutOfOrderError("resume first")))
        if isinstance(fault, KiteMQError):
            refused.add(key)
            return broker_pb2.BatchResult(error=error_to_stream(fault))
        messages = list(message_pb2.Segment.FromString(batch.records).records)
        sequences = [message.sequence for message in messages]
        assert sequences == list(range(sequences[0], sequences[0] + len(sequences))), (
            "a batch's sequences are consecutive"
        )
        queue = self.stored[key]
        runs = []
        for message in messages:
            identity = (message.producer_instance, *key, message.sequence)
            repeated = identity in self._known
            if not repeated:
                self._known[identity] = len(queue)
                queue.append(message)
            runs.append(broker_pb2.OffsetRun(first_queue_offset=self._known[identity], count=1, repeated=repeated))
        return broker_pb2.BatchResult(offsets=runs, store_timestamp_ms=1)


async def _heartbeat(_: bytes, context: Any) -> bytes:
    return b""


async def _unregister(_: bytes, context: Any) -> bytes:
    return b""


class ScriptedCluster:
    """A namesrv that knows `brokers`. `missing`: topics that do not exist. `queue_count` queues on each broker."""

    def __init__(self, brokers: list[ScriptedBroker]) -> None:
        self.brokers = brokers
        self.missing: set[str] = set()
        self.queue_count = 2
        self.order_config = ""
        self.address = ""
        self._changed: set[asyncio.Event] = set()

    def push(self) -> None:
        for event in self._changed:
            event.set()

    def route(self, topic: str) -> namesrv_pb2.TopicRoute:
        return namesrv_pb2.TopicRoute(
            topic=topic,
            queues=[
                namesrv_pb2.QueueGroup(
                    broker_name=broker.name,
                    read_queue_count=self.queue_count,
                    write_queue_count=self.queue_count,
                    permission=7,
                )
                for broker in self.brokers
            ],
            brokers=[
                namesrv_pb2.BrokerGroup(
                    broker_name=broker.name,
                    brokers=[namesrv_pb2.BrokerEndpoint(broker_id=0, address=f"127.0.0.1:{broker.port}", epoch=1)],
                )
                for broker in self.brokers
            ],
            order_config=self.order_config,
        )

    async def get_route(self, request: Any, context: Any) -> Any:
        if request.topic in self.missing:
            context.set_trailing_metadata((("kitemq-error", "TopicNotFoundError"),))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"topic {request.topic!r} does not exist")
        return self.route(request.topic)

    async def watch_routes(self, request: Any, context: Any) -> AsyncIterator[Any]:
        changed = asyncio.Event()
        self._changed.add(changed)
        try:
            while True:
                for topic in request.topics:
                    if topic not in self.missing:
                        yield self.route(topic)
                await changed.wait()
                changed.clear()
        finally:
            self._changed.discard(changed)


@asynccontextmanager
async def scripted_cluster(*names: str) -> AsyncIterator[ScriptedCluster]:
    """A running cluster of scripted brokers."""
    cluster = ScriptedCluster([ScriptedBroker(name) for name in names])
    for broker in cluster.brokers:
        await broker.start()
    server = grpc.aio.server()
    handlers: dict[str, Any] = {
        "GetRoute": grpc.unary_unary_rpc_method_handler(
            cluster.get_route, namesrv_pb2.GetRouteRequest.FromString, namesrv_pb2.TopicRoute.SerializeToString
        ),
        "WatchRoutes": grpc.unary_stream_rpc_method_handler(
            cluster.watch_routes, namesrv_pb2.WatchRoutesRequest.FromString, namesrv_pb2.TopicRoute.SerializeToString
        ),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kitemq.v1.Namesrv", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    cluster.address = f"127.0.0.1:{port}"
    await server.start()
    try:
        yield cluster
    finally:
        await server.stop(grace=None)
        for broker in cluster.brokers:
            await broker.stop()
