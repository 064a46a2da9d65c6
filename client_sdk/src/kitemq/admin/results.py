"""What AdminClient answers with: plain values, each made from the broker's or namesrv's message in one place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from urllib.parse import unquote

from kitemq.message import MessageQueue, ReceivedMessage
from kitemq.proto.v1 import admin_pb2, broker_pb2, message_pb2, namesrv_pb2
from kitemq.protocol.names import PERMISSION_INHERIT, PERMISSION_READ, PERMISSION_WRITE
from kitemq.protocol.record import (
    CRC,
    KEY_CRC,
    KEY_EPOCH,
    KEY_FLAGS,
    KEY_FLUSHED_OFFSET,
    KEY_PHYSICAL_OFFSET,
    KEY_QUEUE_ID,
    KEY_QUEUE_OFFSET,
    KEY_RECORD_KIND,
    KEY_STORE_TIMESTAMP,
    TRAILER,
    frame_header,
)


@dataclass(frozen=True, slots=True)
class BrokerInfo:
    """One broker as a namesrv knows it.

    address: what a client that asked this namesrv is told. addresses: all of them, by listener name.
    writable: the namesrv hands out its queues for writing, and, where the broker was asked, it takes messages.
    not_writable_reason: why not; empty when it is writable.
    """

    cluster_name: str
    broker_name: str
    broker_id: int
    role: str
    epoch: int
    address: str
    addresses: Mapping[str, str]
    writable: bool
    topic_count: int
    boot_id: str
    boot_timestamp_ms: int
    last_heartbeat_timestamp_ms: int
    not_writable_reason: str = ""

    @property
    def is_master(self) -> bool:
        return self.broker_id == 0

    @staticmethod
    def from_proto(message: namesrv_pb2.ClusterBroker) -> BrokerInfo:
        broker = message.broker
        return BrokerInfo(
            cluster_name=broker.cluster_name,
            broker_name=broker.broker_name,
            broker_id=broker.broker_id,
            role=namesrv_pb2.BrokerRole.Name(broker.role),
            epoch=broker.epoch,
            address=message.address,
            addresses=dict(sorted(broker.addresses.items())),
            writable=message.writable,
            topic_count=message.topic_count,
            boot_id=broker.boot_id,
            boot_timestamp_ms=broker.boot_timestamp_ms,
            last_heartbeat_timestamp_ms=message.last_heartbeat_timestamp_ms,
            not_writable_reason="" if message.writable else "writes to it are switched off at the namesrv",
        )


def permission_text(permission: int) -> str:
    """Permission bits as "rw", "r", "w" or "-", with "+inherit" for a template of auto-created topics."""
    text = ("r" if permission & PERMISSION_READ else "") + ("w" if permission & PERMISSION_WRITE else "")
    return (text or "-") + ("+inherit" if permission & PERMISSION_INHERIT else "")


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """A topic's configuration on one broker group. permission: bits, 4 read, 2 write, 1 inherit."""

    broker_name: str
    read_queue_count: int
    write_queue_count: int
    permission: int
    order: bool = False
    attributes: Mapping[str, str] = field(default_factory=dict)
    system: bool = False

    @staticmethod
    def from_proto(broker_name: str, message: message_pb2.TopicConfig) -> TopicSettings:
        return TopicSettings(
            broker_name=broker_name,
            read_queue_count=message.read_queue_count,
            write_queue_count=message.write_queue_count,
            permission=message.permission,
            order=message.order,
            attributes=dict(sorted(message.attributes.items())),
            system=message.system,
        )


@dataclass(frozen=True, slots=True)
class TopicChange:
    """What one broker made of a create or update. created: the topic was not there before."""

    settings: TopicSettings
    created: bool


@dataclass(frozen=True, slots=True)
class TopicSummary:
    """A topic and its settings on every broker group that has it, sorted by broker name."""

    topic: str
    settings: tuple[TopicSettings, ...]

    @property
    def read_queue_count(self) -> int:
        return sum(one.read_queue_count for one in self.settings)

    @property
    def write_queue_count(self) -> int:
        return sum(one.write_queue_count for one in self.settings)

    @property
    def system(self) -> bool:
        return any(one.system for one in self.settings)


@dataclass(frozen=True, slots=True)
class QueueState:
    """Bounds of one queue. max_offset: confirmed end, exclusive. last_store_timestamp_ms: 0 = the queue is empty.

    offset_at_timestamp: answer to the time asked for, None when none was.
    """

    queue: MessageQueue
    min_offset: int
    max_offset: int
    last_store_timestamp_ms: int
    offset_at_timestamp: int | None = None

    @staticmethod
    def from_proto(
        topic: str, broker_name: str, message: broker_pb2.QueueOffsets, *, timed: bool = False
    ) -> QueueState:
        return QueueState(
            queue=MessageQueue(topic, broker_name, message.queue_id),
            min_offset=message.min_offset,
            max_offset=message.max_offset,
            last_store_timestamp_ms=message.last_store_timestamp_ms,
            offset_at_timestamp=message.offset_at_timestamp if timed else None,
        )


@dataclass(frozen=True, slots=True)
class TopicDescription:
    """A topic over all broker groups. groups: consumer groups that have read it or subscribe to it."""

    topic: str
    settings: tuple[TopicSettings, ...]
    queues: tuple[QueueState, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """A consumer group over all brokers. lag_messages: stored but not committed, over all its queues."""

    group: str
    member_count: int
    lag_messages: int
    message_model: str
    consume_type: str


def _host_port(peer: str) -> str:
    """gRPC's "ipv4:10.0.0.1:5000" or "ipv6:%5B::1%5D:5000" as host:port."""
    return unquote(peer).removeprefix("ipv4:").removeprefix("ipv6:")


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One client of a consumer group. address: host:port it speaks from. subscriptions: filter by topic."""

    client_id: str
    address: str
    language: str
    version: str
    message_model: str
    consume_type: str
    consume_from_where: str
    subscriptions: Mapping[str, str]
    last_heartbeat_timestamp_ms: int

    @staticmethod
    def from_proto(message: admin_pb2.GroupMember) -> GroupMember:
        consumer = message.consumer
        return GroupMember(
            client_id=message.client_id,
            address=_host_port(message.address),
            language=message.language,
            version=message.version,
            message_model=broker_pb2.MessageModel.Name(consumer.message_model),
            consume_type=broker_pb2.ConsumeType.Name(consumer.consume_type),
            consume_from_where=broker_pb2.ConsumeFromWhere.Name(consumer.consume_from_where),
            subscriptions={one.topic: one.filter or "*" for one in consumer.subscriptions},
            last_heartbeat_timestamp_ms=message.last_heartbeat_timestamp_ms,
        )


@dataclass(frozen=True, slots=True)
class GroupQueue:
    """A group's progress in one queue. consumer_offset: None = nothing committed yet.

    oldest_waiting_timestamp_ms: store time of the first message not committed, 0 = none waits.
    """

    queue: MessageQueue
    min_offset: int
    max_offset: int
    consumer_offset: int | None
    oldest_waiting_timestamp_ms: int

    @property
    def lag_messages(self) -> int:
        """Messages that are still readable and not committed."""
        return max(0, self.max_offset - max(self.min_offset, self.consumer_offset or 0))

    @staticmethod
    def from_proto(broker_name: str, message: admin_pb2.GroupQueue) -> GroupQueue:
        return GroupQueue(
            queue=MessageQueue(message.topic, broker_name, message.queue_id),
            min_offset=message.min_offset,
            max_offset=message.max_offset,
            consumer_offset=message.consumer_offset if message.HasField("consumer_offset") else None,
            oldest_waiting_timestamp_ms=message.oldest_waiting_timestamp_ms,
        )


@dataclass(frozen=True, slots=True)
class GroupDescription:
    """A consumer group over all brokers: who is in it and how far it is."""

    group: str
    consume_enabled: bool
    members: tuple[GroupMember, ...]
    queues: tuple[GroupQueue, ...]

    @property
    def lag_messages(self) -> int:
        return sum(one.lag_messages for one in self.queues)


@dataclass(frozen=True, slots=True)
class OffsetMove:
    """One queue of an offset reset. old_offset: None = nothing was committed."""

    queue: MessageQueue
    old_offset: int | None
    new_offset: int


@dataclass(frozen=True, slots=True)
class ConfigItem:
    """One setting of a broker; secrets read "***". changeable: while the broker runs."""

    key: str
    value: str
    changeable: bool
    help: str


@dataclass(frozen=True, slots=True)
class BrokerDescription:
    """One broker's own account of itself. Offsets are physical: bytes of its log. Times are Unix milliseconds."""

    cluster_name: str
    broker_name: str
    broker_id: int
    role: str
    epoch: int
    addresses: Mapping[str, str]
    version: str
    broker_timestamp_ms: int
    boot_timestamp_ms: int
    store_uuid: str
    flush_mode: str
    writable: bool
    not_writable_reason: str
    min_physical_offset: int
    written_offset: int
    flushed_offset: int
    confirm_offset: int
    live_floor: int
    store_bytes: int
    disk_free_bytes: int
    disk_total_bytes: int
    earliest_store_timestamp_ms: int
    topic_count: int
    queue_count: int
    group_count: int
    client_count: int
    held_pull_count: int
    messages_in_total: int
    messages_out_total: int
    damaged_record_count: int
    deleted_unconsumed_count: int

    @staticmethod
    def from_proto(message: admin_pb2.DescribeBrokerResponse) -> BrokerDescription:
        broker = message.broker
        return BrokerDescription(
            cluster_name=broker.cluster_name,
            broker_name=broker.broker_name,
            broker_id=broker.broker_id,
            role=namesrv_pb2.BrokerRole.Name(broker.role),
            epoch=broker.epoch,
            addresses=dict(sorted(broker.addresses.items())),
            **{name: getattr(message, name) for name in _BROKER_FIELDS},
        )


_BROKER_FIELDS = [
    name
    for name in BrokerDescription.__annotations__
    if name in admin_pb2.DescribeBrokerResponse.DESCRIPTOR.fields_by_name
]


def merge_groups(answers: Iterable[admin_pb2.ListGroupsResponse]) -> list[GroupSummary]:
    """Groups of several brokers. Members speak to every broker, so they are counted once; lag is per broker."""
    groups: dict[str, GroupSummary] = {}
    for answer in answers:
        for one in answer.groups:
            known = groups.get(one.group)
            if known is not None and known.member_count >= one.member_count:
                groups[one.group] = replace(known, lag_messages=known.lag_messages + one.lag_messages)
                continue
            groups[one.group] = GroupSummary(
                group=one.group,
                member_count=one.member_count,
                lag_messages=one.lag_messages + (known.lag_messages if known else 0),
                message_model=broker_pb2.MessageModel.Name(one.message_model),
                consume_type=broker_pb2.ConsumeType.Name(one.consume_type),
            )
    return sorted(groups.values(), key=lambda group: group.group)


def merge_group(group: str, answers: Mapping[str, admin_pb2.DescribeGroupResponse]) -> GroupDescription:
    """What each broker (by name) says of a group. A member's freshest heartbeat counts."""
    members: dict[str, GroupMember] = {}
    queues: list[GroupQueue] = []
    for broker_name, answer in answers.items():
        for member in map(GroupMember.from_proto, answer.members):
            known = members.get(member.client_id)
            if known is None or known.last_heartbeat_timestamp_ms < member.last_heartbeat_timestamp_ms:
                members[member.client_id] = member
        queues += [GroupQueue.from_proto(broker_name, queue) for queue in answer.queues]
    return GroupDescription(
        group=group,
        consume_enabled=all(answer.group.consume_enabled for answer in answers.values()),
        members=tuple(sorted(members.values(), key=lambda member: member.client_id)),
        queues=tuple(sorted(queues, key=lambda one: one.queue)),
    )


def offset_moves(topic: str, answers: Iterable[tuple[str, admin_pb2.ResetOffsetsResponse]]) -> list[OffsetMove]:
    """The moves that each broker (by name) made, sorted by queue."""
    moves = [
        OffsetMove(
            MessageQueue(topic, broker_name, move.queue_id),
            move.old_offset if move.HasField("old_offset") else None,
            move.new_offset,
        )
        for broker_name, answer in answers
        for move in answer.moves
    ]
    return sorted(moves, key=lambda move: move.queue)


def received_from_proto(broker_name: str, message: message_pb2.Message) -> ReceivedMessage:
    """A parsed record as the view that consumers get: framed again, its trailer written out whole."""
    trailer = TRAILER.pack(
        *(KEY_RECORD_KIND, message.record_kind),
        *(KEY_QUEUE_ID, message.queue_id),
        *(KEY_QUEUE_OFFSET, message.queue_offset),
        *(KEY_PHYSICAL_OFFSET, message.physical_offset),
        *(KEY_STORE_TIMESTAMP, message.store_timestamp_ms),
        *(KEY_EPOCH, message.epoch),
        *(KEY_FLUSHED_OFFSET, message.flushed_offset),
        *(KEY_FLAGS, message.flags),
    )
    # The last value of a field wins, so the trailer may follow the fields that are set in `message` already.
    record = message.SerializeToString() + trailer + CRC.pack(KEY_CRC, message.crc32c)
    framed = frame_header(len(record)) + record
    return ReceivedMessage(framed, 0, len(framed), MessageQueue(message.topic, broker_name, message.queue_id))
