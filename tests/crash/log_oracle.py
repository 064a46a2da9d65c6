"""Reads a commit log from its files alone, by docs/format.md and protobuf, without a line of the store's code."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import google_crc32c

from kitemq.proto.v1 import message_pb2

_FRAME_BYTES = 6
_TRAILER_BYTES = 70
_CRC_FIELD = b"\xe5\x01"


class LogRecord(NamedTuple):
    """One record that is whole. `message` is all of it, trailer fields included."""

    physical_offset: int
    data: bytes
    message: message_pb2.Message

    @property
    def size(self) -> int:
        """Bytes, frame included."""
        return len(self.data)

    @property
    def end_offset(self) -> int:
        """Physical offset after it."""
        return self.physical_offset + len(self.data)

    @property
    def part(self) -> bytes:
        """The producer's part."""
        return self.data[_FRAME_BYTES:-_TRAILER_BYTES]


class Log(NamedTuple):
    """Records in order up to the first byte that is none, and where that is. clean: only zeros follow."""

    start_offset: int
    records: list[LogRecord]
    end_offset: int
    clean: bool


def parse_record(data: bytes | bytearray, at: int, physical_offset: int) -> LogRecord | None:
    """The record that begins at data[at]; None when none does."""
    head = data[at : at + _FRAME_BYTES]
    if len(head) < _FRAME_BYTES or head[0] != 0x0A or any(byte < 0x80 for byte in head[1:5]) or head[5] > 0x0F:
        return None
    length = sum((byte & 0x7F) << (7 * index) for index, byte in enumerate(head[1:]))
    end = at + _FRAME_BYTES + length
    if length < _TRAILER_BYTES or end > len(data):
        return None
    record = bytes(data[at:end])
    if record[-6:-4] != _CRC_FIELD or struct.unpack("<I", record[-4:])[0] != google_crc32c.value(record[:-6]):
        return None
    message = message_pb2.Message.FromString(record[_FRAME_BYTES:])
    if message.physical_offset != physical_offset or message.record_kind == 0:
        return None
    return LogRecord(physical_offset, record, message)


def read_log(files: Mapping[Path, bytes], commit_log: Path) -> Log:
    """The log in these files."""
    segments = {int(path.name): data for path, data in files.items() if path.parent == commit_log}
    bases = sorted(segments)
    if not bases:
        return Log(0, [], 0, True)
    records: list[LogRecord] = []
    position = bases[0]
    epoch = 0
    while position in segments:
        base, data = position, segments[position]
        rolled = False
        while not rolled and (record := parse_record(data, position - base, position)) is not None:
            if record.message.epoch < epoch:
                break
            epoch = record.message.epoch
            records.append(record)
            position = record.end_offset
            rolled = record.message.record_kind == message_pb2.ROLL
        if not rolled:
            clean = not any(data[position - base :]) and base == bases[-1]
            return Log(bases[0], records, position, clean)
    return Log(bases[0], records, position, position > bases[-1])


class Derived:
    """What a log says, worked out in the plainest way: queues as lists, tables as dicts."""

    def __init__(self, log: Log) -> None:
        self.queues: dict[tuple[str, int], dict[int, LogRecord]] = {}
        self.topics: dict[str, message_pb2.TopicConfig] = {}
        self.groups: dict[str, message_pb2.GroupConfig] = {}
        self.key_values: dict[str, str] = {}
        self.offsets: dict[tuple[str, str, int], int] = {}
        self.epochs: list[tuple[int, int]] = []
        for record in log.records:
            if record.message.record_kind == message_pb2.MESSAGE:
                queue = self.queues.setdefault((record.message.topic, record.message.queue_id), {})
                queue[record.message.queue_offset] = record
            elif record.message.HasField("system"):
                self._apply(record.message.system)

    def _apply(self, change: message_pb2.SystemRecord) -> None:
        match change.WhichOneof("change"):
            case "epoch_started":
                self.epochs.append((change.epoch_started.epoch, change.epoch_started.first_physical_offset))
            case "topic_set":
                self.topics[change.topic_set.name] = change.topic_set
            case "topic_deleted":
                topic = change.topic_deleted
                self.topics.pop(topic, None)
                self.queues = {key: queue for key, queue in self.queues.items() if key[0] != topic}
                self.offsets = {key: offset for key, offset in self.offsets.items() if key[1] != topic}
            case "group_set":
                self.groups[change.group_set.name] = change.group_set
            case "group_deleted":
                self.groups.pop(change.group_deleted, None)
                self.offsets = {key: offset for key, offset in self.offsets.items() if key[0] != change.group_deleted}
            case "key_value_set":
                self.key_values[change.key_value_set.key] = change.key_value_set.value
            case "key_value_deleted":
                self.key_values.pop(change.key_value_deleted, None)
            case "offsets_committed":
                for offset in change.offsets_committed.offsets:
                    self._commit(offset)

    def _commit(self, offset: message_pb2.GroupOffset) -> None:
        key = (offset.group, offset.topic, offset.queue_id)
        if offset.deleted:
            self.offsets.pop(key, None)
        elif offset.reset or offset.queue_offset > self.offsets.get(key, -1):
            self.offsets[key] = offset.queue_offset
