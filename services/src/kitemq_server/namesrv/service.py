"""The Namesrv service: checks what comes in, asks the table, tells the watchers."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

from kitemq.errors import BrokerUnavailableError, TopicNotFoundError
from kitemq.proto.v1 import namesrv_pb2, namesrv_pb2_grpc
from kitemq.protocol.names import check_topic
from kitemq_server.common.calls import current_call
from kitemq_server.common.clock import Clock
from kitemq_server.namesrv import wire
from kitemq_server.namesrv.kv_config import ORDER_TOPIC_CONFIG, KeyValues
from kitemq_server.namesrv.roster import Roster
from kitemq_server.namesrv.route_table import RouteTable
from kitemq_server.namesrv.watch import RouteFeed

logger = logging.getLogger(__name__)

WARM_UP_RETRY_MS = 500
SERVICE_NAME = namesrv_pb2.DESCRIPTOR.services_by_name["Namesrv"].full_name


class NamesrvService(namesrv_pb2_grpc.NamesrvServicer):
    """Handlers are plain code between two awaits, so each sees and leaves the table whole."""

    def __init__(self, table: RouteTable, key_values: KeyValues, roster: Roster, clock: Clock) -> None:
        self.table = table
        self.feed = RouteFeed(self._encode, held=bool(roster.awaited))
        self._key_values = key_values
        self._roster = roster
        self._clock = clock
        self._listeners: frozenset[str] = frozenset()
        self.registration_count = 0
        self.expired_count = 0

    def register(self, server: grpc.aio.Server) -> None:
        """Add this service to a server. Routes go out as the bytes that the feed keeps."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "GetRoute": grpc.unary_unary_rpc_method_handler(
                self.GetRoute, request_deserializer=namesrv_pb2.GetRouteRequest.FromString
            ),
            "WatchRoutes": grpc.unary_stream_rpc_method_handler(
                self.WatchRoutes, request_deserializer=namesrv_pb2.WatchRoutesRequest.FromString
            ),
        }
        # The first that has a method serves it.
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        namesrv_pb2_grpc.add_NamesrvServicer_to_server(self, server)

    async def RegisterBroker(
        self, request: namesrv_pb2.RegisterBrokerRequest, context: Any
    ) -> namesrv_pb2.RegisterBrokerResponse:
        """Everything that a broker has to say."""
        broker = wire.broker_from_wire(request.broker)
        topics = wire.topics_from_wire(request.topics, topic_count=len(request.topics))
        changed = self.table.register(
            broker,
            wire.data_version_from_wire(request.data_version),
            topics,
            expiry_ms=wire.expiry_from_wire(request.expiry_ms),
            now_ms=self._clock.monotonic_ms(),
        )
        self.registration_count += 1
        self._members_changed(changed)
        logger.info(
            "broker registered broker=%s epoch=%d topics=%d changed=%d", broker, broker.epoch, len(topics), len(changed)
        )
        master = self.table.master(broker.broker_name)
        return namesrv_pb2.RegisterBrokerResponse(
            master=wire.broker_to_wire(master) if master else None,
            order_topics=self._key_values.namespace(ORDER_TOPIC_CONFIG),
        )

    async def BrokerHeartbeat(
        self, request: namesrv_pb2.BrokerHeartbeatRequest, context: Any
    ) -> namesrv_pb2.BrokerHeartbeatResponse:
        """Refreshes the broker's time."""
        wanted = self.table.heartbeat(
            wire.broker_from_wire(request.broker),
            wire.data_version_from_wire(request.data_version),
            now_ms=self._clock.monotonic_ms(),
        )
        return namesrv_pb2.BrokerHeartbeatResponse(register_wanted=wanted)

    async def UnregisterBroker(
        self, request: namesrv_pb2.UnregisterBrokerRequest, context: Any
    ) -> namesrv_pb2.UnregisterBrokerResponse:
        """A clean goodbye."""
        broker = wire.broker_from_wire(request.broker)
        changed = self.table.unregister(broker)
        self._roster.dismiss(str(broker))
        self._members_changed(changed)
        logger.info("broker unregistered broker=%s changed=%d", broker, len(changed))
        return namesrv_pb2.UnregisterBrokerResponse()

    async def GetRoute(self, request: namesrv_pb2.GetRouteRequest, context: Any) -> Any:
        """The serialized TopicRoute."""
        topic = request.topic
        if self._roster.awaited:
            raise BrokerUnavailableError(
                f"this namesrv has just started and waits for {len(self._roster.awaited)} brokers that it knew before",
                topic=topic,
                retry_after_ms=WARM_UP_RETRY_MS,
            )
        if not self.table.has_topic(topic):
            check_topic(topic)
            raise TopicNotFoundError(f"no broker has topic {topic!r}", topic=topic)
        return self.feed.route(topic, self._listener(request.listener or current_call().listener))

    async def WatchRoutes(  # type: ignore[override]  # it writes, where the stub's type knows only generators
        self, request: namesrv_pb2.WatchRoutesRequest, context: Any
    ) -> None:
        """Writes serialized TopicRoutes."""
        wire.check_watched(request.topics, topic_count=len(request.topics))
        listener = request.listener or current_call().listener
        await self.feed.watch(list(request.topics), lambda: self._listener(listener), context.write)

    async def ListTopics(self, request: namesrv_pb2.ListTopicsRequest, context: Any) -> namesrv_pb2.ListTopicsResponse:
        """System topics among them."""
        return namesrv_pb2.ListTopicsResponse(topics=self.table.topics(request.cluster_name))

    async def GetCluster(self, request: namesrv_pb2.GetClusterRequest, context: Any) -> namesrv_pb2.GetClusterResponse:
        """Every broker of every cluster."""
        listener = request.listener or current_call().listener
        now_ms, wall_ms = self._clock.monotonic_ms(), self._clock.wall_ms()
        response = namesrv_pb2.GetClusterResponse()
        for member, writable in self.table.members():
            timestamp_ms, counter = member.data_version
            response.brokers.add(
                broker=wire.broker_to_wire(member.broker),
                address=member.broker.address(listener),
                data_version=namesrv_pb2.DataVersion(timestamp_ms=timestamp_ms, counter=counter),
                last_heartbeat_timestamp_ms=wall_ms - (now_ms - member.heard_ms),
                writable=writable,
                topic_count=len(member.topics),
            )
        return response

    async def PutKeyValue(
        self, request: namesrv_pb2.PutKeyValueRequest, context: Any
    ) -> namesrv_pb2.PutKeyValueResponse:
        """Answered once it is on disk."""
        if request.namespace == ORDER_TOPIC_CONFIG:
            wire.check_order_config(request.key, request.value)
        await self._key_values.put(request.namespace, request.key, request.value)
        self._key_value_changed(request.namespace, request.key)
        return namesrv_pb2.PutKeyValueResponse()

    async def GetKeyValue(
        self, request: namesrv_pb2.GetKeyValueRequest, context: Any
    ) -> namesrv_pb2.GetKeyValueResponse:
        """NOT_FOUND when it was never put."""
        return namesrv_pb2.GetKeyValueResponse(value=self._key_values.get(request.namespace, request.key))

    async def DeleteKeyValue(
        self, request: namesrv_pb2.DeleteKeyValueRequest, context: Any
    ) -> namesrv_pb2.DeleteKeyValueResponse:
        """Answered once it is on disk; what is not there is deleted already."""
        await self._key_values.delete(request.namespace, request.key)
        self._key_value_changed(request.namespace, request.key)
        return namesrv_pb2.DeleteKeyValueResponse()

    async def ListKeyValues(
        self, request: namesrv_pb2.ListKeyValuesRequest, context: Any
    ) -> namesrv_pb2.ListKeyValuesResponse:
        """All of one namespace."""
        return namesrv_pb2.ListKeyValuesResponse(values=self._key_values.namespace(request.namespace))

    async def SetWritePermission(
        self, request: namesrv_pb2.SetWritePermissionRequest, context: Any
    ) -> namesrv_pb2.SetWritePermissionResponse:
        """On this namesrv only; the operator's tool calls every one."""
        changed = self.table.set_writable(request.broker_name, writable=request.writable)
        self.feed.changed(changed)
        logger.info("write permission broker_name=%s writable=%s", request.broker_name, request.writable)
        return namesrv_pb2.SetWritePermissionResponse(topic_count=len(changed))

    def expire(self, *, asleep_ms: int) -> None:
        """Take out the brokers that have been silent for too long."""
        gone, changed = self.table.expire(now_ms=self._clock.monotonic_ms(), asleep_ms=asleep_ms)
        if gone:
            self.expired_count += len(gone)
            self._members_changed(changed)
            logger.warning("brokers expired brokers=%s changed=%d", ",".join(map(str, gone)), len(changed))

    def _listener(self, asked: str) -> str:
        """Listeners that no broker has all read the same route: keep it once, whatever clients ask for."""
        return asked if asked in self._listeners else ""

    def _encode(self, topic: str, listener: str) -> bytes:
        return wire.route_to_wire(
            topic,
            self.table.route(topic),
            listener=listener,
            order_config=self._key_values.namespace(ORDER_TOPIC_CONFIG).get(topic, ""),
        ).SerializeToString()

    def end_warm_up(self) -> None:
        """Answer with the brokers that are here; the others have had their time."""
        if self._roster.awaited:
            logger.warning("brokers have not come back brokers=%s", ",".join(sorted(self._roster.awaited)))
            self._roster.give_up(self._registered())
            self.feed.release()

    def _registered(self) -> frozenset[str]:
        return frozenset(str(member.broker) for member, _ in self.table.members())

    def _members_changed(self, topics: Iterable[str]) -> None:
        self._listeners = frozenset(name for member, _ in self.table.members() for name in member.broker.addresses)
        self._roster.note(self._registered())
        self.feed.changed(topics)
        if not self._roster.awaited:
            self.feed.release()

    def _key_value_changed(self, namespace: str, key: str) -> None:
        if namespace == ORDER_TOPIC_CONFIG:
            self.feed.changed([key])
