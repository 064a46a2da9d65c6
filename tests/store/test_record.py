"""The bytes of a record: built, checked, and found among others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import FLAG_GROUP_CONTINUES, FRAME_BYTES, KIND_MESSAGE, RECORD_BYTES_MIN, TRAILER_BYTES
from kitemq_server.store.record import (
    build_record,
    check_record,
    find_frames,
    record_bytes,
    roll_record,
    system_payload,
)
from tests.store.helpers import NOW_MS, message

U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)


def a_record(body: bytes = b"hello", place: int = 12345) -> bytes:
    return build_record(
        KIND_MESSAGE,
        message(body),
        physical_offset=place,
        store_timestamp_ms=NOW_MS,
        epoch=3,
        flushed_offset=100,
        queue_id=2,
        queue_offset=77,
    )


@given(
    kind=st.integers(1, 2**32 - 1),
    payload=st.binary(max_size=300),
    place=U64,
    timestamp=U64,
    epoch=U32,
    flushed=U64,
    queue_id=U32,
    queue_offset=U64,
    flags=U32,
)
def test_a_record_is_read_back_as_it_was_built(
    kind: int,
    payload: bytes,
    place: int,
    timestamp: int,
    epoch: int,
    flushed: int,
    queue_id: int,
    queue_offset: int,
    flags: int,
) -> None:
    data = build_record(
        kind,
        payload,
        physical_offset=place,
        store_timestamp_ms=timestamp,
        epoch=epoch,
        flushed_offset=flushed,
        queue_id=queue_id,
        queue_offset=queue_offset,
        flags=flags,
    )
    assert len(data) == len(payload) + RECORD_BYTES_MIN == record_bytes(data, 0)
    record = check_record(data, place)
    assert record == (place, data, kind, queue_id, queue_offset, timestamp, epoch, flushed, flags)
    assert record is not None
    assert record.end_offset == place + len(data)
    assert record.group_continues == bool(flags & FLAG_GROUP_CONTINUES)


def test_protobuf_sees_the_same() -> None:
    (parsed,) = message_pb2.Segment.FromString(a_record()).records
    assert parsed.body == b"hello"
    assert (parsed.queue_id, parsed.queue_offset, parsed.physical_offset) == (2, 77, 12345)
    assert (parsed.store_timestamp_ms, parsed.epoch, parsed.flushed_offset) == (NOW_MS, 3, 100)


def test_every_flipped_bit_is_noticed() -> None:
    data = a_record()
    for position in range(len(data)):
        for bit in range(8):
            harmed = bytearray(data)
            harmed[position] ^= 1 << bit
            assert check_record(bytes(harmed), 12345) is None, f"byte {position}, bit {bit}"


def test_a_record_is_good_only_whole_and_in_its_place() -> None:
    data = a_record()
    assert check_record(data, 12345) is not None
    assert check_record(data, 12346) is None
    assert check_record(data[:-1], 12345) is None
    assert check_record(data + b"\0", 12345) is None
    assert check_record(b"", 0) is None
    assert check_record(bytes(RECORD_BYTES_MIN), 0) is None
    unspecified = build_record(0, b"", physical_offset=0, store_timestamp_ms=0, epoch=0, flushed_offset=0)
    assert check_record(unspecified, 0) is None


def test_the_smallest_records() -> None:
    roll = roll_record(physical_offset=5, store_timestamp_ms=1, epoch=1, flushed_offset=0)
    assert len(roll) == RECORD_BYTES_MIN
    record = check_record(roll, 5)
    assert record is not None
    assert not record.message().HasField("system")
    change = message_pb2.SystemRecord(topic_deleted="x")
    parsed = message_pb2.Message.FromString(system_payload(change))
    assert parsed.system == change


@pytest.mark.parametrize("header", [b"", b"\x0a\x80\x80", b"\x0b\xc6\x80\x80\x80\x00", b"\x0a\xc6\x80\x80\x00\x00"])
def test_what_is_no_frame(header: bytes) -> None:
    assert record_bytes(header, 0) == -1


def test_a_frame_too_short_for_a_trailer_is_no_record() -> None:
    assert record_bytes(bytes((0x0A, 0x80 | TRAILER_BYTES - 1, 0x80, 0x80, 0x80, 0)), 0) == -1
    assert record_bytes(bytes((0x0A, 0x80 | TRAILER_BYTES, 0x80, 0x80, 0x80, 0)), 0) == TRAILER_BYTES + FRAME_BYTES


@given(st.binary(max_size=400), st.binary(max_size=400), st.integers(0, 1 << 40))
def test_a_record_is_found_among_anything(before: bytes, after: bytes, place: int) -> None:
    data = a_record(place=place + len(before))
    found = [
        position
        for position, size in find_frames(before + data + after, 0, place)
        if check_record((before + data + after)[position : position + size], place + position) is not None
    ]
    assert found == [len(before)]
