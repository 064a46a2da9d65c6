"""The Broker service: which handler answers which method."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc
import grpc.aio

from kitemq.proto.v1 import broker_pb2, broker_pb2_grpc

if TYPE_CHECKING:
    from kitemq_server.broker.server import Broker

SERVICE_NAME = broker_pb2.DESCRIPTOR.services_by_name["Broker"].full_name


class BrokerService(broker_pb2_grpc.BrokerServicer):
    """Thin: every method is one call into the part that knows."""

    def __init__(self, broker: Broker) -> None:
        self._sends = broker.sends
        self._pull_streams = broker.pull_streams
        self._pulls = broker.pulls
        self._membership = broker.membership
        self._offsets = broker.offsets
        self._clock = broker.clock

    def register(self, server: grpc.aio.Server) -> None:
        """Add this service to a server. Messages pass in and out as bytes."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Send": grpc.stream_stream_rpc_method_handler(self.Send),
            "Pull": grpc.stream_stream_rpc_method_handler(self.Pull),
            "PullMessage": grpc.unary_unary_rpc_method_handler(
                self.PullMessage, request_deserializer=broker_pb2.PullMessageRequest.FromString
            ),
        }
        # The first that has a method serves it.
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))
        broker_pb2_grpc.add_BrokerServicer_to_server(self, server)

    async def Send(self, _requests: Any, context: Any) -> None:  # type: ignore[override]  # reads and writes bytes
        """Serialized SendRequests in, SendResponses out."""
        await self._sends.serve(context)

    async def Pull(self, _requests: Any, context: Any) -> None:  # type: ignore[override]  # reads and writes bytes
        """Serialized PullRequests in, PullResponses out."""
        await self._pull_streams.serve(context)

    async def SendMessage(self, request: broker_pb2.SendMessageRequest, context: Any) -> broker_pb2.SendMessageResponse:
        """Answered once the message is confirmed."""
        return await self._sends.send_message(request)

    async def PullMessage(  # type: ignore[override]  # bytes, where the stub's type knows only the message
        self, request: broker_pb2.PullMessageRequest, context: Any
    ) -> bytes:
        """A serialized PullMessageResponse."""
        return await self._pulls.pull_message(request)

    async def Heartbeat(self, request: broker_pb2.HeartbeatRequest, context: Any) -> broker_pb2.HeartbeatResponse:
        """Also creates the groups it names, where that is allowed."""
        self._membership.heartbeat(request, address=_address(context.peer()))
        return broker_pb2.HeartbeatResponse(broker_timestamp_ms=self._clock.wall_ms())

    async def Unregister(self, request: broker_pb2.UnregisterRequest, context: Any) -> broker_pb2.UnregisterResponse:
        """A client that is not known is gone already."""
        self._membership.unregister(request)
        return broker_pb2.UnregisterResponse()

    async def Notify(self, request: broker_pb2.NotifyRequest, context: Any) -> AsyncIterator[broker_pb2.Notification]:
        """Until the client leaves or the broker stops."""
        async with aclosing(self._membership.notify(request)) as events:
            async for event in events:
                yield event

    async def ListGroupMembers(
        self, request: broker_pb2.ListGroupMembersRequest, context: Any
    ) -> broker_pb2.ListGroupMembersResponse:
        """Sorted, and what each of them subscribes to."""
        client_ids = self._membership.member_ids(request.group)
        members = self._membership.registry.members(request.group)
        consumers = [members[client_id].consumers[request.group] for client_id in client_ids]
        return broker_pb2.ListGroupMembersResponse(client_ids=client_ids, consumers=consumers)

    async def CommitOffsets(
        self, request: broker_pb2.CommitOffsetsRequest, context: Any
    ) -> broker_pb2.CommitOffsetsResponse:
        """With `durable` answered once it is confirmed."""
        await self._offsets.commit(request)
        return broker_pb2.CommitOffsetsResponse()

    async def GetOffsets(self, request: broker_pb2.GetOffsetsRequest, context: Any) -> broker_pb2.GetOffsetsResponse:
        """Queues without an offset are left out."""
        return self._offsets.get(request)

    async def GetQueueOffsets(
        self, request: broker_pb2.GetQueueOffsetsRequest, context: Any
    ) -> broker_pb2.GetQueueOffsetsResponse:
        """Bounds are the confirmed ones."""
        return await self._offsets.bounds(request)


def _address(peer: str) -> str:
    """host:port of gRPC's "ipv4:host:port" or "ipv6:%5Bhost%5D:port"; what is neither stays."""
    scheme, _, rest = peer.partition(":")
    return unquote(rest) if scheme in ("ipv4", "ipv6") else peer
