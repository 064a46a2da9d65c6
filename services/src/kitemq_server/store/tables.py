"""Topics, groups, consumer offsets, key values, queue locks, epochs: what system records say.

Only `apply` changes them; the live path and a replay of the log go the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from google.protobuf.json_format import MessageToDict, ParseDict

from kitemq.proto.v1 import message_pb2

QueueKey = tuple[str, int]  # topic, queue id
LockKey = tuple[str, str, int]  # group, topic, queue id


class EpochStart(NamedTuple):
    """Where the bytes of an epoch begin."""

    epoch: int
    first_physical_offset: int


class OffsetTable:
    """Committed consumer offsets: by group, then by (topic, queue id)."""

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        self._groups: dict[str, dict[QueueKey, int]] = {}

    def get(self, group: str, topic: str, queue_id: int) -> int | None:
        """What the group has committed in the queue; None = nothing yet."""
        queues = self._groups.get(group)
        return None if queues is None else queues.get((topic, queue_id))

    def groups(self) -> Iterable[str]:
        """Groups that have committed anything."""
        return self._groups.keys()

    def of_group(self, group: str) -> Mapping[QueueKey, int]:
        """All offsets of a group by (topic, queue id)."""
        return self._groups.get(group, {})

    def groups_of_topic(self, topic: str) -> list[str]:
        """Groups with an offset in the topic."""
        return [group for group, queues in self._groups.items() if any(key[0] == topic for key in queues)]

    def moves(self, offset: message_pb2.GroupOffset) -> bool:
        """Whether `commit` would change anything."""
        old = self.get(offset.group, offset.topic, offset.queue_id)
        if offset.deleted:
            return old is not None
        return old is None or offset.queue_offset > old or (offset.reset and offset.queue_offset != old)

    def commit(self, offset: message_pb2.GroupOffset) -> None:
        """Forwards only, unless it is a reset."""
        if not self.moves(offset):
            return
        key = (offset.topic, offset.queue_id)
        if offset.deleted:
            self._groups[offset.group].pop(key, None)
        else:
            self._groups.setdefault(offset.group, {})[key] = offset.queue_offset

    def drop_group(self, group: str) -> None:
        """The group has been deleted."""
        self._groups.pop(group, None)

    def drop_topic(self, topic: str) -> None:
        """The topic has been deleted."""
        for queues in self._groups.values():
            for key in [key for key in queues if key[0] == topic]:
                del queues[key]

    def capture(self) -> dict[str, dict[QueueKey, int]]:
        """A copy."""
        return {group: dict(queues) for group, queues in self._groups.items()}

    def restore(self, groups: Mapping[str, Mapping[QueueKey, int]]) -> None:
        """Replaces everything."""
        self._groups = {group: dict(queues) for group, queues in groups.items()}


class Tables:
    """The tables of one store. Messages in them are never changed, only replaced."""

    __slots__ = (
        "data_version",
        "data_version_timestamp_ms",
        "epochs",
        "groups",
        "key_values",
        "live_floor",
        "offsets",
        "queue_locks",
        "topics",
    )

    def __init__(self) -> None:
        self.topics: dict[str, message_pb2.TopicConfig] = {}
        self.groups: dict[str, message_pb2.GroupConfig] = {}
        self.offsets = OffsetTable()
        self.key_values: dict[str, str] = {}
        self.queue_locks: dict[LockKey, message_pb2.QueueLocked] = {}
        self.epochs: list[EpochStart] = []
        self.live_floor = 0
        # Counts the changes of topics, for namesrvs.
        self.data_version = 0
        self.data_version_timestamp_ms = 0

    def apply(self, change: message_pb2.SystemRecord, timestamp_ms: int) -> None:
        """One system record takes effect. Queues of a deleted topic are the caller's."""
        match change.WhichOneof("change"):
            case "topic_set":
                self.topics[change.topic_set.name] = change.topic_set
                self._topics_changed(timestamp_ms)
            case "topic_deleted":
                self._delete_topic(change.topic_deleted)
                self._topics_changed(timestamp_ms)
            case "group_set":
                self.groups[change.group_set.name] = change.group_set
            case "group_deleted":
                self._delete_group(change.group_deleted)
            case "offsets_committed":
                for offset in change.offsets_committed.offsets:
                    self.offsets.commit(offset)
            case "key_value_set":
                self.key_values[change.key_value_set.key] = change.key_value_set.value
            case "key_value_deleted":
                self.key_values.pop(change.key_value_deleted, None)
            case "queue_locked":
                self._lock(change.queue_locked)
            case "epoch_started":
                started = change.epoch_started
                self.epochs.append(EpochStart(started.epoch, started.first_physical_offset))
            case "live_floor_raised":
                self.live_floor = max(self.live_floor, change.live_floor_raised.physical_offset)

    def _topics_changed(self, timestamp_ms: int) -> None:
        self.data_version += 1
        self.data_version_timestamp_ms = timestamp_ms

    def _delete_topic(self, topic: str) -> None:
        self.topics.pop(topic, None)
        self.offsets.drop_topic(topic)
        for key in [key for key in self.queue_locks if key[1] == topic]:
            del self.queue_locks[key]

    def _delete_group(self, group: str) -> None:
        self.groups.pop(group, None)
        self.offsets.drop_group(group)
        for key in [key for key in self.queue_locks if key[0] == group]:
            del self.queue_locks[key]

    def _lock(self, lock: message_pb2.QueueLocked) -> None:
        key = (lock.group, lock.topic, lock.queue_id)
        if lock.client_id:
            self.queue_locks[key] = lock
        else:
            self.queue_locks.pop(key, None)

    def capture(self) -> dict[str, Any]:
        """Everything, copied as far as it can change; `encode_tables` makes JSON of it on any thread."""
        return {
            "topics": list(self.topics.values()),
            "groups": list(self.groups.values()),
            "offsets": self.offsets.capture(),
            "key_values": dict(self.key_values),
            "queue_locks": list(self.queue_locks.values()),
            "epochs": list(self.epochs),
            "live_floor": self.live_floor,
            "data_version": [self.data_version_timestamp_ms, self.data_version],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Replaces everything by what a snapshot holds."""
        for item in state["topics"]:
            topic = ParseDict(item, message_pb2.TopicConfig())
            self.topics[topic.name] = topic
        for item in state["groups"]:
            group = ParseDict(item, message_pb2.GroupConfig())
            self.groups[group.name] = group
        self.offsets.restore(
            {
                group: {(topic, queue_id): offset for topic, queue_id, offset in queues}
                for group, queues in state["offsets"].items()
            }
        )
        self.key_values = dict(state["key_values"])
        for item in state["queue_locks"]:
            self._lock(ParseDict(item, message_pb2.QueueLocked()))
        self.epochs = [EpochStart(*item) for item in state["epochs"]]
        self.live_floor = state["live_floor"]
        self.data_version_timestamp_ms, self.data_version = state["data_version"]


def encode_messages(messages: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Protobuf messages as the JSON objects of a snapshot."""
    return (MessageToDict(message, preserving_proto_field_name=True) for message in messages)
