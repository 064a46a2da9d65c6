"""Records of the log: built, checked, and found again behind damage. Drawn in docs/format.md."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

import google_crc32c

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import (
    CRC,
    CRC_BYTES,
    FLAG_GROUP_CONTINUES,
    FRAME_BYTES,
    KEY_CRC,
    KEY_EPOCH,
    KEY_FLAGS,
    KEY_FLUSHED_OFFSET,
    KEY_PHYSICAL_OFFSET,
    KEY_QUEUE_ID,
    KEY_QUEUE_OFFSET,
    KEY_RECORD_KIND,
    KEY_STORE_TIMESTAMP,
    KIND_ROLL,
    PHYSICAL_OFFSET_FROM_END,
    RECORD_BYTES_MIN,
    TRAILER,
    TRAILER_BYTES,
    U64,
    frame_header,
    frame_length,
    length_delimited,
)

ROLL_BYTES = RECORD_BYTES_MIN

_TRAILER_KEYS = (
    KEY_RECORD_KIND,
    KEY_QUEUE_ID,
    KEY_QUEUE_OFFSET,
    KEY_PHYSICAL_OFFSET,
    KEY_STORE_TIMESTAMP,
    KEY_EPOCH,
    KEY_FLUSHED_OFFSET,
    KEY_FLAGS,
    KEY_CRC,
)
_WHOLE_TRAILER = struct.Struct(TRAILER.format + CRC.format.removeprefix("<"))
_SYSTEM_KEY = 0x7A  # Message.system (15), length-delimited

# The trailer of a batch's records differs in two fields only: prefix, offsets, suffix.
TRAILER_PREFIX = struct.Struct("<HIHI")
TRAILER_OFFSETS = struct.Struct("<HQHQ")
TRAILER_SUFFIX = struct.Struct("<HQHIHQHI")

# Wherever a frame may begin. `frame_length` and the CRC decide.
_FRAME_PATTERN = re.compile(rb"\x0a(?=[\x80-\xff]{4}[\x00-\x0f])", re.DOTALL)


class Record(NamedTuple):
    """A checked record. data: its bytes, frame included."""

    physical_offset: int
    data: bytes
    kind: int
    queue_id: int
    queue_offset: int
    store_timestamp_ms: int
    epoch: int
    flushed_offset: int
    flags: int

    @property
    def end_offset(self) -> int:
        """Physical offset of the byte after the record."""
        return self.physical_offset + len(self.data)

    @property
    def group_continues(self) -> bool:
        """The next record belongs to the same group."""
        return bool(self.flags & FLAG_GROUP_CONTINUES)

    def message(self) -> message_pb2.Message:
        """The record, parsed."""
        return message_pb2.Message.FromString(self.data[FRAME_BYTES:])


# Past the named tuple's own constructor, which takes twice as long.
_new_record: Callable[[type[Record], tuple[int | bytes, ...]], Record] = tuple.__new__


def build_record(
    kind: int,
    payload: bytes,
    *,
    physical_offset: int,
    store_timestamp_ms: int,
    epoch: int,
    flushed_offset: int,
    queue_id: int = 0,
    queue_offset: int = 0,
    flags: int = 0,
) -> bytes:
    """A framed record with its trailer. payload: the producer's part, or `system_payload`."""
    body = b"".join(
        (
            frame_header(len(payload) + TRAILER_BYTES),
            payload,
            TRAILER_PREFIX.pack(KEY_RECORD_KIND, kind, KEY_QUEUE_ID, queue_id),
            TRAILER_OFFSETS.pack(KEY_QUEUE_OFFSET, queue_offset, KEY_PHYSICAL_OFFSET, physical_offset),
            trailer_suffix(store_timestamp_ms, epoch, flushed_offset, flags),
        )
    )
    return body + CRC.pack(KEY_CRC, google_crc32c.value(body))


def trailer_suffix(store_timestamp_ms: int, epoch: int, flushed_offset: int, flags: int = 0) -> bytes:
    """The trailer's fields from the store timestamp to the flags: the same for all records of an append."""
    return TRAILER_SUFFIX.pack(
        KEY_STORE_TIMESTAMP, store_timestamp_ms, KEY_EPOCH, epoch, KEY_FLUSHED_OFFSET, flushed_offset, KEY_FLAGS, flags
    )


def roll_record(*, physical_offset: int, store_timestamp_ms: int, epoch: int, flushed_offset: int) -> bytes:
    """The last record of a segment."""
    return build_record(
        KIND_ROLL,
        b"",
        physical_offset=physical_offset,
        store_timestamp_ms=store_timestamp_ms,
        epoch=epoch,
        flushed_offset=flushed_offset,
    )


def system_payload(change: message_pb2.SystemRecord) -> bytes:
    """The broker's part of a record that is no message."""
    return length_delimited(_SYSTEM_KEY, change.SerializeToString())


def record_bytes(buffer: bytes, start: int) -> int:
    """Size of the record whose frame begins at `start`; -1 when no frame of a record begins there."""
    length = frame_length(buffer, start)
    return length + FRAME_BYTES if length >= TRAILER_BYTES else -1


def check_record(data: bytes, physical_offset: int) -> Record | None:
    """The record whose framed bytes are exactly `data`, if every check but that of its epoch passes."""
    if len(data) < RECORD_BYTES_MIN or record_bytes(data, 0) != len(data):
        return None
    return check_framed(data, physical_offset)


def check_framed(data: bytes, physical_offset: int) -> Record | None:
    """As check_record, for bytes whose frame has been checked. Called for every record of a recovery."""
    values = _WHOLE_TRAILER.unpack_from(data, len(data) - TRAILER_BYTES)
    if values[::2] != _TRAILER_KEYS or values[7] != physical_offset or values[1] == 0:
        return None
    if values[17] != google_crc32c.value(data[:-CRC_BYTES]):
        return None
    _, kind, _, queue_id, _, queue_offset, _, _, _, timestamp_ms, _, epoch, _, flushed_offset, _, flags, _, _ = values
    fields = (physical_offset, data, kind, queue_id, queue_offset, timestamp_ms, epoch, flushed_offset, flags)
    return _new_record(Record, fields)


def find_frames(buffer: bytes, start: int, physical_offset: int) -> Iterator[tuple[int, int]]:
    """(position in the buffer, size) wherever a record may begin at or after `start`: the frame fits, and where the
    trailer is inside the buffer it names the place. physical_offset: of buffer[0]. Only a CRC makes it a record."""
    for match in _FRAME_PATTERN.finditer(buffer, start):
        position = match.start()
        size = record_bytes(buffer, position)
        if size < 0:
            continue
        place = position + size - PHYSICAL_OFFSET_FROM_END
        if place + 8 <= len(buffer) and U64.unpack_from(buffer, place)[0] != physical_offset + position:
            continue
        yield position, size
