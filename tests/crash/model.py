"""What a store should hold: a plain list of everything that was appended, in order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from kitemq.proto.v1 import message_pb2

QueueName = tuple[str, int]
OffsetKey = tuple[str, str, int]  # group, topic, queue id


class StoredMessage(NamedTuple):
    """A message as it was handed to the store. identity: (producer instance, sequence), or the message id for those
    of no producer instance."""

    queue: QueueName
    identity: tuple[int, int] | str
    part: bytes


class Change(NamedTuple):
    """A change of topics, groups, key values or (durable) offsets."""

    change: message_pb2.SystemRecord


class Item(NamedTuple):
    """One record of the log that a client caused, and the physical offsets between which its append put it."""

    what: StoredMessage | Change
    start_offset: int
    end_offset: int


class Move(NamedTuple):
    """A group's offset in a queue becomes `value` (None: it is forgotten). The record that says so begins at or after
    start_offset and ends by end_offset; start_offset None: it is still to be written."""

    value: int | None
    start_offset: int | None
    end_offset: int


UNKNOWN = 10**15  # end of an append that failed: it may be there or not

# Lengths of the queues, topics, groups, key values.
Outline = tuple[dict[QueueName, int], dict[str, bytes], dict[str, bytes], dict[str, str]]


@dataclass(slots=True)
class Picture:
    """What can be seen of a store from outside, without what the store decides by itself."""

    queues: dict[QueueName, list[StoredMessage]] = field(default_factory=dict)
    topics: dict[str, bytes] = field(default_factory=dict)
    groups: dict[str, bytes] = field(default_factory=dict)
    key_values: dict[str, str] = field(default_factory=dict)

    def apply(self, what: StoredMessage | Change) -> None:
        """One record more."""
        if isinstance(what, StoredMessage):
            self.queues.setdefault(what.queue, []).append(what)
            return
        change = what.change
        match change.WhichOneof("change"):
            case "topic_set":
                self.topics[change.topic_set.name] = serialized(change.topic_set)
            case "topic_deleted":
                self.topics.pop(change.topic_deleted, None)
                for queue in [queue for queue in self.queues if queue[0] == change.topic_deleted]:
                    del self.queues[queue]
            case "group_set":
                self.groups[change.group_set.name] = serialized(change.group_set)
            case "group_deleted":
                self.groups.pop(change.group_deleted, None)
            case "key_value_set":
                self.key_values[change.key_value_set.key] = change.key_value_set.value
            case "key_value_deleted":
                self.key_values.pop(change.key_value_deleted, None)

    def outline(self) -> Outline:
        """Comparable, cheap: lengths stand for queues, whose contents are compared by themselves."""
        lengths = {queue: len(messages) for queue, messages in self.queues.items() if messages}
        return lengths, self.topics, self.groups, self.key_values


def serialized(message: message_pb2.TopicConfig | message_pb2.GroupConfig) -> bytes:
    """The same bytes for equal messages."""
    return message.SerializeToString(deterministic=True)


class Model:
    """The list, and what follows from it."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.now = Picture()
        self.stored: dict[tuple[QueueName, tuple[int, int] | str], int] = {}
        self.offsets: dict[OffsetKey, list[Move]] = {}

    def add(self, what: StoredMessage | Change, start_offset: int, end_offset: int) -> int:
        """Appends; returns the queue offset of a message."""
        queue_offset = 0
        if isinstance(what, StoredMessage):
            queue_offset = len(self.now.queues.get(what.queue, ()))
            self.stored[what.queue, what.identity] = queue_offset
        elif what.change.WhichOneof("change") == "topic_deleted":
            self._forget_topic(what.change.topic_deleted)
        self.items.append(Item(what, start_offset, end_offset))
        self.now.apply(what)
        return queue_offset

    def change(self, change: message_pb2.SystemRecord, start_offset: int, end_offset: int) -> None:
        """A change of the tables has been appended, with all that follows from it."""
        self.add(Change(change), start_offset, end_offset)
        match change.WhichOneof("change"):
            case "topic_deleted":
                self.forget_offsets(topic=change.topic_deleted)
            case "group_deleted":
                self.forget_offsets(group=change.group_deleted)

    def queue_offset(self, queue: QueueName, identity: tuple[int, int] | str) -> int | None:
        """Where the message is stored; None when it is not."""
        return self.stored.get((queue, identity))

    def find_prefix(self, seen: Outline, log_end: int) -> int | None:
        """How many items a store has whose log ends there, and which looks as seen; None when no number fits."""
        picture = Picture()
        found = None
        surely = sum(item.end_offset <= log_end for item in self.items)
        possibly = sum(item.start_offset < log_end for item in self.items)
        for count in range(possibly + 1):
            if count:
                picture.apply(self.items[count - 1].what)
            if count >= surely and picture.outline() == seen:
                found = count
        return found

    def cut(self, count: int) -> list[Item]:
        """A crash has left the first `count` items; returns the others."""
        lost = self.items[count:]
        kept = self.items[:count]
        self.items = []
        self.now = Picture()
        self.stored = {}
        for item in kept:
            self.add(*item)
        return lost

    def _forget_topic(self, topic: str) -> None:
        for key in [key for key in self.stored if key[0][0] == topic]:
            del self.stored[key]

    # ---- consumer offsets

    def commit(self, key: OffsetKey, queue_offset: int, *, reset: bool) -> None:
        """A group has committed; the record that says so is still to be written."""
        moves = self.offsets.setdefault(key, [])
        old = moves[-1].value if moves else None
        if old is None or queue_offset > old or reset:
            moves.append(Move(queue_offset, None, UNKNOWN))

    def forget_offsets(self, *, topic: str = "", group: str = "") -> None:
        """The topic or group is deleted by a record that is still to be written."""
        for key, moves in self.offsets.items():
            if topic in (key[1], "") and group in (key[0], ""):
                moves.append(Move(None, None, UNKNOWN))

    def offsets_recorded(self, start_offset: int, end_offset: int) -> None:
        """What was still to be written has been, in between."""
        for moves in self.offsets.values():
            moves[:] = [
                move if move.start_offset is not None else Move(move.value, start_offset, end_offset) for move in moves
            ]

    def offsets_lost(self, log_end: int) -> None:
        """The log ends there after a restart: every group stands where its last record says."""
        for key, moves in self.offsets.items():
            there = [Move(None, 0, 0)]
            for move in moves:
                if move.start_offset is not None and move.end_offset <= log_end:
                    there = [move]
                elif move.start_offset is not None and move.start_offset < log_end:
                    there.append(move)
            self.offsets[key] = there

    def offset_may_be(self, key: OffsetKey) -> list[int | None]:
        """Where the group may stand; None = nowhere."""
        return [move.value for move in self.offsets.get(key, [])] or [None]

    def offset_seen(self, key: OffsetKey, value: int | None) -> None:
        """After a restart the group stands there, which was allowed."""
        self.offsets[key] = [Move(value, 0, 0)]
