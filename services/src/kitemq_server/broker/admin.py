"""The BrokerAdmin service: what operators call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc.aio

from kitemq.errors import InvalidRequestError, NotAllowedError
from kitemq.proto.v1 import admin_pb2, admin_pb2_grpc, broker_pb2
from kitemq.protocol.names import PERMISSION_WRITE
from kitemq.version import VERSION
from kitemq_server.broker.offsets import confirmed

if TYPE_CHECKING:
    from kitemq_server.broker.server import Broker

SERVICE_NAME = admin_pb2.DESCRIPTOR.services_by_name["BrokerAdmin"].full_name
CONFIG_VALUES_MAX = 100


class BrokerAdminService(admin_pb2_grpc.BrokerAdminServicer):
    """Every change is confirmed, and the namesrvs that can be reached have it, before it is answered."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._store = broker.store

    def register(self, server: grpc.aio.Server) -> None:
        """Add this service to a server."""
        admin_pb2_grpc.add_BrokerAdminServicer_to_server(self, server)

    # ---- Topics ----

    async def SetTopic(self, request: admin_pb2.SetTopicRequest, context: Any) -> admin_pb2.SetTopicResponse:
        """Zero counts and permission: the present ones, or the defaults of a new topic."""
        config, created, end_offset = self._broker.topics.set(request.topic, create_only=request.create_only)
        await self._settled(end_offset)
        return admin_pb2.SetTopicResponse(topic=config, created=created)

    async def DeleteTopic(self, request: admin_pb2.DeleteTopicRequest, context: Any) -> admin_pb2.DeleteTopicResponse:
        """With its queues and all groups' offsets in it."""
        await self._settled(self._broker.topics.delete(request.topic))
        return admin_pb2.DeleteTopicResponse()

    async def ListTopics(
        self, request: admin_pb2.ListBrokerTopicsRequest, context: Any
    ) -> admin_pb2.ListBrokerTopicsResponse:
        """By name."""
        topics = [
            topic for _, topic in sorted(self._store.topics.items()) if request.include_system or not topic.system
        ]
        return admin_pb2.ListBrokerTopicsResponse(topics=topics)

    async def DescribeTopic(
        self, request: admin_pb2.DescribeTopicRequest, context: Any
    ) -> admin_pb2.DescribeTopicResponse:
        """Bounds of its queues, and who reads it."""
        config = self._broker.topics.get(request.topic)
        bounds = await self._broker.offsets.bounds(broker_pb2.GetQueueOffsetsRequest(topic=request.topic))
        groups = self._broker.membership.registry.subscribers(request.topic)
        groups.update(self._store.offsets.groups_of_topic(request.topic))
        return admin_pb2.DescribeTopicResponse(topic=config, queues=bounds.queues, groups=sorted(groups))

    # ---- Groups ----

    async def ListGroups(self, request: admin_pb2.ListGroupsRequest, context: Any) -> admin_pb2.ListGroupsResponse:
        """By name."""
        response = admin_pb2.ListGroupsResponse()
        for group in sorted(self._store.groups):
            members = self._broker.membership.registry.members(group)
            consumer = next((client.consumers[group] for client in members.values()), None)
            response.groups.add(
                group=group,
                member_count=len(members),
                lag_messages=sum(self._broker.lags.messages(group).values()),
                message_model=consumer.message_model if consumer else broker_pb2.CLUSTERING,
                consume_type=consumer.consume_type if consumer else broker_pb2.CONSUME_ACTIVELY,
            )
            await asyncio.sleep(0)
        return response

    async def DescribeGroup(
        self, request: admin_pb2.DescribeGroupRequest, context: Any
    ) -> admin_pb2.DescribeGroupResponse:
        """Its members, and every queue of the topics that it has offsets in or a member subscribed to."""
        group = request.group
        response = admin_pb2.DescribeGroupResponse(group=self._broker.groups.get(group))
        for client_id, client in sorted(self._broker.membership.registry.members(group).items()):
            response.members.add(
                client_id=client_id,
                address=client.address,
                language=client.language,
                version=client.version,
                consumer=client.consumers[group],
                last_heartbeat_timestamp_ms=client.last_heartbeat_timestamp_ms,
            )
        for topic in self._broker.lags.topics(group):
            config = self._store.topics.get(topic)
            for queue_id in range(config.read_queue_count if config else 0):
                queue = self._store.queue(topic, queue_id)
                if queue is None:
                    break  # deleted meanwhile
                queue_offset = self._store.offsets.get(group, topic, queue_id)
                waiting_from = max(queue_offset or 0, queue.min_offset)
                response.queues.add(
                    topic=topic,
                    queue_id=queue_id,
                    min_offset=queue.min_offset,
                    max_offset=queue.max_offset,
                    consumer_offset=queue_offset,
                    oldest_waiting_timestamp_ms=self._store.store_timestamp(queue, waiting_from),
                )
                await asyncio.sleep(0)
        return response

    async def SetGroup(self, request: admin_pb2.SetGroupRequest, context: Any) -> admin_pb2.SetGroupResponse:
        """Replaces the whole configuration."""
        end_offset = self._broker.groups.set(request.group)
        self._broker.holds.wake_all()
        await confirmed(self._store, end_offset)
        return admin_pb2.SetGroupResponse()

    async def DeleteGroup(self, request: admin_pb2.DeleteGroupRequest, context: Any) -> admin_pb2.DeleteGroupResponse:
        """With its offsets. Refused while it has members."""
        members = self._broker.membership.registry.members(request.group)
        if members:
            raise NotAllowedError(f"group {request.group!r} has {len(members)} active members: stop them first")
        await confirmed(self._store, self._broker.groups.delete(request.group))
        return admin_pb2.DeleteGroupResponse()

    async def ResetOffsets(
        self, request: admin_pb2.ResetOffsetsRequest, context: Any
    ) -> admin_pb2.ResetOffsetsResponse:
        """Answered once it is confirmed; members are told to read the offsets again."""
        return await self._broker.offsets.reset(request)

    # ---- Messages ----

    async def QueryMessages(
        self, request: admin_pb2.QueryMessagesRequest, context: Any
    ) -> admin_pb2.QueryMessagesResponse:
        """Newest first. Raises MessageNotFoundError when there is none."""
        return self._broker.queries.run(request)

    # ---- The broker ----

    async def DescribeBroker(
        self, request: admin_pb2.DescribeBrokerRequest, context: Any
    ) -> admin_pb2.DescribeBrokerResponse:
        """Where it stands."""
        broker, store = self._broker, self._store
        reason = self._not_writable_reason()
        oldest = store.read_record(store.min_physical_offset)
        return admin_pb2.DescribeBrokerResponse(
            broker=broker.identity,
            version=VERSION,
            broker_timestamp_ms=broker.clock.wall_ms(),
            boot_timestamp_ms=broker.identity.boot_timestamp_ms,
            min_physical_offset=store.min_physical_offset,
            written_offset=store.written_offset,
            flushed_offset=store.flushed_offset,
            confirm_offset=store.confirm_offset,
            live_floor=store.live_floor,
            store_bytes=store.store_bytes,
            disk_free_bytes=store.disk_free_bytes,
            disk_total_bytes=store.disk_total_bytes,
            topic_count=len(store.topics),
            queue_count=sum(config.write_queue_count for config in store.topics.values() if not config.system),
            group_count=len(store.groups),
            client_count=len(broker.membership.registry),
            held_pull_count=len(broker.holds),
            messages_in_total=broker.counts.messages_in,
            messages_out_total=broker.counts.messages_out,
            damaged_record_count=store.damaged_record_count,
            deleted_unconsumed_count=sum(store.deleted_unconsumed.values()),
            flush_mode=broker.config.flush_mode,
            writable=not reason,
            not_writable_reason=reason,
            store_uuid=store.store_uuid,
            earliest_store_timestamp_ms=oldest.store_timestamp_ms if oldest else 0,
        )

    def _not_writable_reason(self) -> str:
        if not self._broker.settings.live.permission & PERMISSION_WRITE:
            return "the broker's permission does not include write"
        if self._store.full:
            return f"the disk is full: {self._store.disk_free_bytes} bytes are free"
        return "the store has failed" if self._store.failed.done() else ""

    async def GetConfig(self, request: admin_pb2.GetConfigRequest, context: Any) -> admin_pb2.GetConfigResponse:
        """Every key, as it is now."""
        return admin_pb2.GetConfigResponse(items=self._broker.settings.items())

    async def SetConfig(self, request: admin_pb2.SetConfigRequest, context: Any) -> admin_pb2.SetConfigResponse:
        """All keys or none; until the next start."""
        if len(request.values) > CONFIG_VALUES_MAX:
            raise InvalidRequestError(f"at most {CONFIG_VALUES_MAX} keys in one request")
        self._broker.settings.change(request.values)
        await self._broker.registrar.synced()
        return admin_pb2.SetConfigResponse()

    async def _settled(self, end_offset: int) -> None:
        """The change is confirmed, and the namesrvs that can be reached know it."""
        await confirmed(self._store, end_offset)
        await self._broker.registrar.synced()
