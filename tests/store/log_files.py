"""Logs written byte by byte, as a crash or a bad disk may leave them."""

from __future__ import annotations

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import FLAG_GROUP_CONTINUES, KIND_EPOCH, KIND_MESSAGE, KIND_METADATA
from kitemq_server.store.opening import identity_bytes
from kitemq_server.store.record import build_record, roll_record, system_payload
from tests.crash.crash_disk import CrashDisk
from tests.store.helpers import LAYOUT, NOW_MS, message, small

STORE_UUID = "6f1c1f5e-52a7-4f0e-9d5b-6a1b8f7f3c11"


class LogFiles:
    """Builds records one behind the other. bounds: (start, end) of each, by the name that the test gave it."""

    def __init__(self, *, epoch: int = 1, start: int = 0) -> None:
        self.epoch = epoch
        self.position = start
        self.flushed_offset = start
        self.segments: dict[int, bytearray] = {start: bytearray()}
        self.bounds: dict[str, tuple[int, int]] = {}
        self._next_offset = 0

    def _add(self, record: bytes, name: str = "") -> LogFiles:
        self.segments[max(self.segments)] += record
        self.bounds[name] = (self.position, self.position + len(record))
        self.position += len(record)
        return self

    def _record(self, kind: int, payload: bytes, **fields: int) -> bytes:
        return build_record(
            kind,
            payload,
            physical_offset=self.position,
            store_timestamp_ms=NOW_MS,
            epoch=self.epoch,
            flushed_offset=self.flushed_offset,
            **fields,
        )

    def begin_epoch(self) -> LogFiles:
        """An epoch's first record."""
        started = message_pb2.EpochStarted(epoch=self.epoch, first_physical_offset=self.position)
        change = message_pb2.SystemRecord(epoch_started=started)
        return self._add(self._record(KIND_EPOCH, system_payload(change)), "epoch")

    def message(self, body: str, *, body_bytes: int = 0) -> LogFiles:
        """The next message of queue 0, known by its body."""
        part = message(body.encode().ljust(body_bytes, b"."))
        record = self._record(KIND_MESSAGE, part, queue_offset=self._next_offset)
        self._next_offset += 1
        return self._add(record, body)

    def key_value(self, key: str, *, continues: bool = False) -> LogFiles:
        """A system record; `continues`: the group goes on behind it."""
        change = message_pb2.SystemRecord(key_value_set=message_pb2.KeyValue(key=key, value="1"))
        flags = FLAG_GROUP_CONTINUES if continues else 0
        return self._add(self._record(KIND_METADATA, system_payload(change), flags=flags), key)

    def flushed(self, offset: int | None = None) -> LogFiles:
        """From here on records state that the log is on disk up to `offset`; None = up to here."""
        self.flushed_offset = self.position if offset is None else offset
        return self

    def roll(self) -> LogFiles:
        """Ends the segment."""
        record = roll_record(
            physical_offset=self.position,
            store_timestamp_ms=NOW_MS,
            epoch=self.epoch,
            flushed_offset=self.flushed_offset,
        )
        self._add(record, f"roll{len(self.segments)}")
        self.segments[self.position] = bytearray()
        return self

    def raw(self, data: bytes) -> LogFiles:
        """Bytes that are no record."""
        return self._add(data, "raw")

    def disk(self, *, zeros: int = 5000) -> CrashDisk:
        """A disk with these files; the last segment has `zeros` of preallocated space."""
        disk = CrashDisk(LAYOUT.root)
        for directory in LAYOUT.directories():
            disk.mkdir(directory)
        disk.overwrite(LAYOUT.store_json, identity_bytes(STORE_UUID, small().segment_bytes))
        last = max(self.segments)
        for base, data in self.segments.items():
            disk.overwrite(LAYOUT.segment(base), bytes(data) + bytes(zeros if base == last else 0))
        return disk

    def flip(self, disk: CrashDisk, name: str, at: int = 30) -> None:
        """Rot in the record of this name."""
        start = self.bounds[name][0]
        base = max(base for base in self.segments if base <= start)
        disk.flip_bit(LAYOUT.segment(base), start - base + at)
