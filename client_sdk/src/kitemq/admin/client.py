"""AdminClient: what operators do, over all namesrvs and brokers of a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Self

from kitemq.admin import results
from kitemq.admin.fanout import ClusterCalls
from kitemq.admin.results import (
    BrokerDescription,
    BrokerInfo,
    ConfigItem,
    GroupDescription,
    GroupSummary,
    OffsetMove,
    QueueState,
    TopicChange,
    TopicDescription,
    TopicSettings,
    TopicSummary,
)
from kitemq.errors import (
    ClientClosedError,
    GroupNotFoundError,
    InvalidRequestError,
    KiteMQError,
    MessageNotFoundError,
    TopicNotFoundError,
)
from kitemq.message import MessageQueue, ReceivedMessage
from kitemq.proto.v1 import admin_pb2, broker_pb2, message_pb2, namesrv_pb2
from kitemq.protocol.names import PERMISSION_READ_WRITE, check_group, check_topic
from kitemq.rpc import Channels, TlsConfig, parse_addresses

ORDER_TOPIC_NAMESPACE = "ORDER_TOPIC_CONFIG"
QUEUE_COUNT = 8
TIMEOUT_S = 5.0


class AdminClient:
    """Topics, groups, offsets, messages, brokers and settings of a cluster.

    Use it as an async context manager, on one event loop. Every method may raise BrokerUnavailableError, when no
    namesrv answers or a broker that is needed does not, and RequestTimeoutError, when it takes longer than timeout_s.
    """

    def __init__(
        self,
        namesrv: str | list[str] = "127.0.0.1:9876",
        *,
        tls: TlsConfig | None = None,
        timeout_s: float = TIMEOUT_S,
        on_unanswered: Callable[[str, KiteMQError], None] | None = None,
    ) -> None:
        """namesrv: "host:port", several separated by ";". Raises InvalidRequestError for a bad address.

        on_unanswered: called as (broker name, error) when one broker does not answer a question that others did; their
        answers are then returned without it. None: such a question raises that error.
        """
        self.addresses = parse_addresses(namesrv)
        self._tls = tls
        self._timeout_s = timeout_s
        self._on_unanswered = on_unanswered
        self._channels: Channels | None = None
        self._open_calls: ClusterCalls | None = None

    async def __aenter__(self) -> Self:
        self._channels = Channels(tls=self._tls)
        self._open_calls = ClusterCalls(
            self.addresses, self._channels, timeout_s=self._timeout_s, on_unanswered=self._on_unanswered
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        channels, self._channels, self._open_calls = self._channels, None, None
        if channels is not None:
            await channels.close()

    @property
    def _calls(self) -> ClusterCalls:
        if self._open_calls is None:
            raise ClientClosedError("the admin client is not open: use it in `async with`")
        return self._open_calls

    # ---- The cluster ----

    async def list_brokers(self, *, ask_brokers: bool = False) -> list[BrokerInfo]:
        """Every broker that the namesrv knows, sorted by cluster, name and id.

        ask_brokers: each of them is asked, too, whether it takes messages. One that does not answer takes none.
        """
        brokers = await self._calls.brokers()
        return list(await asyncio.gather(*map(self._asked, brokers))) if ask_brokers else brokers

    async def _asked(self, broker: BrokerInfo) -> BrokerInfo:
        if not broker.writable:
            return broker
        request = admin_pb2.DescribeBrokerRequest()
        try:
            answer = await self._calls.call(broker, lambda stubs: stubs.admin.DescribeBroker, request)
        except KiteMQError as error:
            return replace(broker, writable=False, not_writable_reason=error.message)
        return replace(broker, writable=answer.writable, not_writable_reason=answer.not_writable_reason)

    async def describe_broker(self, broker_name: str, broker_id: int | None = None) -> BrokerDescription:
        """A broker's own account. broker_id: None = the master, or the slave with the lowest id while there is none.

        Raises NotFoundError for a broker that the namesrv does not know.
        """
        broker = await self._calls.broker(broker_name, broker_id)
        request = admin_pb2.DescribeBrokerRequest()
        answer = await self._calls.call(broker, lambda stubs: stubs.admin.DescribeBroker, request)
        return BrokerDescription.from_proto(answer)

    async def get_config(self, broker_name: str, broker_id: int | None = None) -> list[ConfigItem]:
        """A broker's settings, sorted by key."""
        broker = await self._calls.broker(broker_name, broker_id)
        answer = await self._calls.call(broker, lambda stubs: stubs.admin.GetConfig, admin_pb2.GetConfigRequest())
        items = [ConfigItem(one.key, one.value, one.changeable, one.help) for one in answer.items]
        return sorted(items, key=lambda item: item.key)

    async def set_config(self, broker_name: str, values: Mapping[str, str], broker_id: int | None = None) -> None:
        """Change settings of a running broker: all of `values`, or none.

        Raises InvalidRequestError for an unknown key or a bad value, NotAllowedError for one that needs a restart.
        """
        broker = await self._calls.broker(broker_name, broker_id)
        request = admin_pb2.SetConfigRequest(values=dict(values))
        await self._calls.call(broker, lambda stubs: stubs.admin.SetConfig, request)

    async def set_write_permission(self, broker_name: str, *, writable: bool) -> int:
        """Take a broker's queues out of every route for writing, or give them back: how a broker is drained.

        Told to every namesrv. Until it is given back, the broker unregisters (a clean stop), or the namesrv restarts.
        Returns the number of topics that changed on the namesrv that knew most of them. Raises NotFoundError.
        """
        request = namesrv_pb2.SetWritePermissionRequest(broker_name=broker_name, writable=writable)
        answers = await self._calls.tell_namesrvs("SetWritePermission", request)
        return max(int(answer.topic_count) for answer in answers)

    # ---- Key values of the namesrvs ----

    async def put_key_value(self, namespace: str, key: str, value: str) -> None:
        """Store a setting with every namesrv."""
        await self._calls.tell_namesrvs(
            "PutKeyValue", namesrv_pb2.PutKeyValueRequest(namespace=namespace, key=key, value=value)
        )

    async def get_key_value(self, namespace: str, key: str) -> str:
        """A setting, from the first namesrv that answers. Raises NotFoundError."""
        answer = await self._calls.namesrvs.call(
            "GetKeyValue", namesrv_pb2.GetKeyValueRequest(namespace=namespace, key=key)
        )
        return str(answer.value)

    async def delete_key_value(self, namespace: str, key: str) -> None:
        """Remove a setting from every namesrv."""
        await self._calls.tell_namesrvs(
            "DeleteKeyValue", namesrv_pb2.DeleteKeyValueRequest(namespace=namespace, key=key)
        )

    async def list_key_values(self, namespace: str) -> dict[str, str]:
        """All settings of a namespace, sorted by key, from the first namesrv that answers."""
        answer = await self._calls.namesrvs.call("ListKeyValues", namesrv_pb2.ListKeyValuesRequest(namespace=namespace))
        return dict(sorted(answer.values.items()))

    async def set_order_config(self, topic: str, queue_counts: Mapping[str, int]) -> None:
        """Fix a topic's queues (count by broker name) for ordered use; an empty mapping removes that."""
        check_topic(topic)
        if queue_counts:
            value = ";".join(f"{name}:{count}" for name, count in sorted(queue_counts.items()))
            await self.put_key_value(ORDER_TOPIC_NAMESPACE, topic, value)
        else:
            await self.delete_key_value(ORDER_TOPIC_NAMESPACE, topic)

    # ---- Topics ----

    async def create_topic(
        self,
        topic: str,
        *,
        queue_count: int = QUEUE_COUNT,
        permission: int = PERMISSION_READ_WRITE,
        order: bool = False,
        attributes: Mapping[str, str] | None = None,
        brokers: Collection[str] = (),
    ) -> list[TopicChange]:
        """Create a topic on every master, or on `brokers` (names) only. queue_count: 1..16384, on each of them.

        Does nothing on a broker that has it with this configuration already. Raises AlreadyExistsError where it is
        there with another one, InvalidRequestError for a bad name or count.
        """
        check_topic(topic)
        config = message_pb2.TopicConfig(
            name=topic,
            read_queue_count=queue_count,
            write_queue_count=queue_count,
            permission=permission,
            order=order,
            attributes=dict(attributes or {}),
        )
        request = admin_pb2.SetTopicRequest(topic=config, create_only=True)
        return await self._set_topic([(broker, request) for broker in await self._calls.masters(brokers)])

    async def update_topic(
        self,
        topic: str,
        *,
        read_queue_count: int | None = None,
        write_queue_count: int | None = None,
        permission: int | None = None,
        order: bool | None = None,
        attributes: Mapping[str, str] | None = None,
        brokers: Collection[str] = (),
    ) -> list[TopicChange]:
        """Change what is given, on every master that has the topic, or on `brokers` only.

        attributes: merged into those that are there; an empty value removes one. Raises TopicNotFoundError.
        """
        check_topic(topic)
        changes: list[tuple[BrokerInfo, admin_pb2.SetTopicRequest]] = []
        masters = await self._calls.masters(brokers)
        describe = admin_pb2.DescribeTopicRequest(topic=topic)
        for broker, answer in await self._calls.tell(
            [(broker, describe) for broker in masters], lambda stubs: stubs.admin.DescribeTopic, absent_ok=True
        ):
            config = answer.topic
            if read_queue_count is not None:
                config.read_queue_count = read_queue_count
            if write_queue_count is not None:
                config.write_queue_count = write_queue_count
            if permission is not None:
                config.permission = permission
            if order is not None:
                config.order = order
            config.attributes.update(attributes or {})
            changes.append((broker, admin_pb2.SetTopicRequest(topic=config)))
        if not changes:
            raise _topic_not_found(topic)
        return await self._set_topic(changes)

    async def _set_topic(self, requests: list[tuple[BrokerInfo, admin_pb2.SetTopicRequest]]) -> list[TopicChange]:
        answers = await self._calls.tell(requests, lambda stubs: stubs.admin.SetTopic)
        return [
            TopicChange(TopicSettings.from_proto(broker.broker_name, answer.topic), answer.created)
            for broker, answer in answers
        ]

    async def delete_topic(self, topic: str, *, brokers: Collection[str] = ()) -> list[str]:
        """Delete a topic, its messages and the groups' offsets in it. Returns the names of the brokers that had it.

        Raises TopicNotFoundError when none had, InvalidRequestError for a system topic.
        """
        check_topic(topic)
        request = admin_pb2.DeleteTopicRequest(topic=topic)
        answers = await self._calls.tell(
            [(broker, request) for broker in await self._calls.masters(brokers)],
            lambda stubs: stubs.admin.DeleteTopic,
            absent_ok=True,
        )
        if not answers:
            raise _topic_not_found(topic)
        return [broker.broker_name for broker, _ in answers]

    async def list_topics(self, *, include_system: bool = False) -> list[TopicSummary]:
        """Every topic of the cluster, sorted by name."""
        request = admin_pb2.ListBrokerTopicsRequest(include_system=include_system)
        topics: dict[str, list[TopicSettings]] = {}
        for broker, answer in await self._calls.ask(lambda stubs: stubs.admin.ListTopics, request):
            for config in answer.topics:
                topics.setdefault(config.name, []).append(TopicSettings.from_proto(broker.broker_name, config))
        return [TopicSummary(topic, tuple(settings)) for topic, settings in sorted(topics.items())]

    async def describe_topic(self, topic: str) -> TopicDescription:
        """A topic's settings, queues and groups. Raises TopicNotFoundError."""
        check_topic(topic)
        request = admin_pb2.DescribeTopicRequest(topic=topic)
        answers = await self._calls.ask(lambda stubs: stubs.admin.DescribeTopic, request)
        if not answers:
            raise _topic_not_found(topic)
        return TopicDescription(
            topic=topic,
            settings=tuple(TopicSettings.from_proto(broker.broker_name, one.topic) for broker, one in answers),
            queues=tuple(
                QueueState.from_proto(topic, broker.broker_name, queue)
                for broker, answer in answers
                for queue in sorted(answer.queues, key=lambda one: one.queue_id)
            ),
            groups=tuple(sorted({group for _, answer in answers for group in answer.groups})),
        )

    async def list_queues(self, topic: str, *, timestamp_ms: int | None = None) -> list[QueueState]:
        """Bounds of every queue of a topic; with `timestamp_ms` also the first offset stored at or after it.

        Raises TopicNotFoundError.
        """
        check_topic(topic)
        request = broker_pb2.GetQueueOffsetsRequest(topic=topic, timestamp_ms=timestamp_ms)
        answers = await self._calls.ask(lambda stubs: stubs.broker.GetQueueOffsets, request)
        if not answers:
            raise _topic_not_found(topic)
        return [
            QueueState.from_proto(topic, broker.broker_name, queue, timed=timestamp_ms is not None)
            for broker, answer in answers
            for queue in sorted(answer.queues, key=lambda one: one.queue_id)
        ]

    # ---- Groups ----

    async def list_groups(self) -> list[GroupSummary]:
        """Every consumer group of the cluster, sorted by name."""
        answers = await self._calls.ask(lambda stubs: stubs.admin.ListGroups, admin_pb2.ListGroupsRequest())
        return results.merge_groups(answer for _, answer in answers)

    async def describe_group(self, group: str) -> GroupDescription:
        """A group's members and its progress in every queue. Raises GroupNotFoundError."""
        check_group(group)
        request = admin_pb2.DescribeGroupRequest(group=group)
        answers = await self._calls.ask(lambda stubs: stubs.admin.DescribeGroup, request)
        if not answers:
            raise _group_not_found(group)
        return results.merge_group(group, {broker.broker_name: answer for broker, answer in answers})

    async def set_group(
        self,
        group: str,
        *,
        consume_enabled: bool = True,
        consume_broadcast_enabled: bool = True,
        orderly: bool = False,
        retry_max_times: int = 16,
        retry_queue_count: int = 1,
        consume_timeout_minutes: int = 15,
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        """Create or change a consumer group on every master."""
        check_group(group)
        config = message_pb2.GroupConfig(
            name=group,
            consume_enabled=consume_enabled,
            consume_broadcast_enabled=consume_broadcast_enabled,
            orderly=orderly,
            retry_max_times=retry_max_times,
            retry_queue_count=retry_queue_count,
            consume_timeout_minutes=consume_timeout_minutes,
            attributes=dict(attributes or {}),
        )
        request = admin_pb2.SetGroupRequest(group=config)
        masters = await self._calls.masters()
        await self._calls.tell([(broker, request) for broker in masters], lambda stubs: stubs.admin.SetGroup)

    async def delete_group(self, group: str) -> None:
        """Forget a consumer group and its offsets. Raises GroupNotFoundError, NotAllowedError while it has members."""
        check_group(group)
        request = admin_pb2.DeleteGroupRequest(group=group)
        masters = await self._calls.masters()
        if not await self._calls.tell(
            [(broker, request) for broker in masters], lambda stubs: stubs.admin.DeleteGroup, absent_ok=True
        ):
            raise _group_not_found(group)

    async def reset_offsets(
        self,
        group: str,
        topic: str,
        *,
        first: bool = False,
        last: bool = False,
        timestamp_ms: int | None = None,
        queue_offset: int | None = None,
        queues: Iterable[MessageQueue] = (),
        dry_run: bool = False,
        force: bool = False,
    ) -> list[OffsetMove]:
        """Move a group's offsets in a topic, backwards too, to one of: `first`, `last`, the first offset stored at or
        after `timestamp_ms`, `queue_offset`. Returns the moves, sorted by queue.

        queues: only these; empty = all. dry_run: change nothing, say what would. force: also while the group has
        members. Raises TopicNotFoundError, GroupNotFoundError, InvalidRequestError, and NotAllowedError for a group
        with members.
        """
        check_group(group)
        check_topic(topic)
        if [first, last, timestamp_ms is not None, queue_offset is not None].count(True) != 1:
            raise InvalidRequestError("give exactly one of first, last, timestamp_ms and queue_offset")
        request = admin_pb2.ResetOffsetsRequest(group=group, topic=topic, dry_run=dry_run, force=force)
        if first or last:
            setattr(request, "first" if first else "last", True)
        elif timestamp_ms is not None:
            request.timestamp_ms = timestamp_ms
        elif queue_offset is not None:
            request.queue_offset = queue_offset
        queue_ids: dict[str, list[int]] = {}
        for queue in queues:
            queue_ids.setdefault(queue.broker_name, []).append(queue.queue_id)
        requests: list[tuple[BrokerInfo, admin_pb2.ResetOffsetsRequest]] = []
        for broker in await self._calls.masters(queue_ids):
            one = admin_pb2.ResetOffsetsRequest()
            one.CopyFrom(request)
            one.queue_ids.extend(queue_ids.get(broker.broker_name, ()))
            requests.append((broker, one))
        answers = await self._calls.tell(requests, lambda stubs: stubs.admin.ResetOffsets, absent_ok=True)
        if not answers:
            await self.describe_topic(topic)  # which of the two is missing?
            raise _group_not_found(group)
        return results.offset_moves(topic, [(broker.broker_name, answer) for broker, answer in answers])

    # ---- Messages ----

    async def find_by_id(self, message_id: str) -> list[ReceivedMessage]:
        """Stored messages of that id, newest first: usually one. Raises MessageNotFoundError."""
        request = admin_pb2.QueryMessagesRequest(message_id=message_id)
        return await self._find(request, f"no stored message has the id {message_id!r}")

    async def find_by_key(
        self, topic: str, key: str, *, begin_timestamp_ms: int = 0, end_timestamp_ms: int = 0, max_count: int = 32
    ) -> list[ReceivedMessage]:
        """Messages of a topic with that key, newest first, stored within the times given (0 = open). max_count: 1..64.

        Raises MessageNotFoundError.
        """
        check_topic(topic)
        query = admin_pb2.KeyQuery(
            topic=topic, key=key, begin_timestamp_ms=begin_timestamp_ms, end_timestamp_ms=end_timestamp_ms
        )
        request = admin_pb2.QueryMessagesRequest(key=query, max_count=max_count)
        found = await self._find(request, f"no stored message of topic {topic!r} has the key {key!r}")
        return found[:max_count]

    async def find_at(self, queue: MessageQueue, queue_offset: int) -> ReceivedMessage:
        """The message at an offset of a queue. Raises MessageNotFoundError."""
        query = admin_pb2.QueueQuery(topic=queue.topic, queue_id=queue.queue_id, queue_offset=queue_offset)
        broker = await self._calls.broker(queue.broker_name, None)
        answer = await self._calls.call(
            broker, lambda stubs: stubs.admin.QueryMessages, admin_pb2.QueryMessagesRequest(queue=query)
        )
        if not answer.records:
            raise MessageNotFoundError(f"no message is stored at offset {queue_offset} of {queue}", topic=queue.topic)
        return results.received_from_proto(broker.broker_name, answer.records[0])

    async def _find(self, request: admin_pb2.QueryMessagesRequest, not_found: str) -> list[ReceivedMessage]:
        answers = await self._calls.ask(lambda stubs: stubs.admin.QueryMessages, request)
        found = [
            results.received_from_proto(broker.broker_name, record)
            for broker, answer in answers
            for record in answer.records
        ]
        if not found:
            raise MessageNotFoundError(not_found)
        return sorted(found, key=lambda message: message.store_timestamp_ms, reverse=True)


def _topic_not_found(topic: str) -> TopicNotFoundError:
    return TopicNotFoundError(f"no broker has the topic {topic!r}: create it with `kitemq topic create {topic}`")


def _group_not_found(group: str) -> GroupNotFoundError:
    return GroupNotFoundError(
        f"no broker knows the consumer group {group!r}: it is created when its first member joins"
    )
