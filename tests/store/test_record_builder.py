"""Records built side by side are those that one at a time would be, wherever a segment ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kitemq.protocol.record import FLAG_GROUP_CONTINUES, KIND_MESSAGE, KIND_METADATA, RECORD_BYTES_MIN
from kitemq_server.store.consume_queue import ENTRY
from kitemq_server.store.record import ROLL_BYTES, build_record, roll_record
from kitemq_server.store.record_builder import RecordBuilder

TIMES: dict[str, int] = {"epoch": 3, "flushed_offset": 77}


class Log:
    """A log in memory, and its writer: the bytes of each segment."""

    def __init__(self, base: int, filled: int, segment_bytes: int) -> None:
        self.segment_bytes = segment_bytes
        self.segments = [SimpleNamespace(base=base, end_offset=base + filled)]
        self.data = [b"\x00" * filled]

    def write(self, data: bytes) -> None:
        self.data[-1] += data
        self.segments[-1].end_offset += len(data)
        assert len(self.data[-1]) <= self.segment_bytes

    def roll(self) -> None:
        end_offset = self.segments[-1].end_offset
        self.segments.append(SimpleNamespace(base=end_offset, end_offset=end_offset))
        self.data.append(b"")


class Queue:
    """What the builder asks of a consume queue."""

    def __init__(self, queue_id: int, next_offset: int) -> None:
        self.queue_id = queue_id
        self.next_offset = next_offset
        self.entries = b""

    def append(self, entries: bytes, count: int) -> None:
        self.entries += entries
        self.next_offset += count


class OneAtATime:
    """The plain way to say the same."""

    def __init__(self, log: Log) -> None:
        self.log = log

    @property
    def left(self) -> int:
        """Bytes before the place where the segment's last record must begin."""
        return self.log.segment_bytes - ROLL_BYTES - len(self.log.data[-1])

    def roll_unless_fits(self, size: int) -> None:
        if size > self.left:
            self.log.write(roll_record(physical_offset=self.position, store_timestamp_ms=5, **TIMES))
            self.log.roll()
            assert size <= self.left

    @property
    def position(self) -> int:
        return int(self.log.segments[-1].end_offset)

    def add(self, kind: int, part: bytes, **fields: int) -> None:
        self.log.write(build_record(kind, part, physical_offset=self.position, store_timestamp_ms=5, **TIMES, **fields))

    def add_messages(self, queue: Queue, parts: list[bytes], tags_codes: list[int]) -> None:
        for part, tags_code in zip(parts, tags_codes, strict=True):
            size = len(part) + RECORD_BYTES_MIN
            self.roll_unless_fits(size)
            position = self.position
            self.add(KIND_MESSAGE, part, queue_id=queue.queue_id, queue_offset=queue.next_offset)
            queue.append(ENTRY.pack(position, size, tags_code), 1)

    def add_group(self, payloads: list[bytes]) -> None:
        self.roll_unless_fits(sum(map(len, payloads)) + RECORD_BYTES_MIN * len(payloads))
        for index, payload in enumerate(payloads, 1):
            self.add(KIND_METADATA, payload, flags=FLAG_GROUP_CONTINUES if index < len(payloads) else 0)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_records_are_those_of_one_at_a_time(data: st.DataObject) -> None:
    segment_bytes = data.draw(st.integers(3 * RECORD_BYTES_MIN, 1500))
    part_max = segment_bytes - ROLL_BYTES - RECORD_BYTES_MIN  # fills a segment of its own
    base = data.draw(st.sampled_from([0, 1000, 2**40]))
    filled = data.draw(st.integers(0, segment_bytes - ROLL_BYTES))
    log, plain_log = Log(base, filled, segment_bytes), Log(base, filled, segment_bytes)
    queues = [(Queue(queue_id, offset), Queue(queue_id, offset)) for queue_id, offset in ((0, 0), (2**32 - 1, 2**40))]
    plain = OneAtATime(plain_log)
    builder = RecordBuilder(log, log, timestamp_ms=5, **TIMES)  # type: ignore[arg-type]
    assert builder.position == plain.position
    for _ in range(data.draw(st.integers(1, 4))):
        if data.draw(st.integers(0, 4)) == 0:
            payloads = [data.draw(st.binary(max_size=20)) for _ in range(data.draw(st.integers(1, 2)))]
            payloads = payloads if segment_bytes > 4 * RECORD_BYTES_MIN + 40 else [b""]
            plain.add_group(payloads)
            builder.add_group(KIND_METADATA, payloads)
            continue
        queue, plain_queue = data.draw(st.sampled_from(queues))
        parts: list[bytes] = []
        left = plain.left
        for _ in range(data.draw(st.integers(1, 12))):
            size = data.draw(st.integers(0, part_max))
            how = data.draw(st.sampled_from(["any", "short", "exact", "one over"]))
            if how == "short":
                size = min(size, 9)
            elif how != "any" and left >= RECORD_BYTES_MIN:
                size = min(part_max, left - RECORD_BYTES_MIN + (how == "one over"))
            parts.append(bytes([len(parts)]) * size)
            taken = size + RECORD_BYTES_MIN
            left = (left if taken <= left else segment_bytes - ROLL_BYTES) - taken
        tags_codes = [data.draw(st.integers(0, 2**32 - 1)) for _ in parts]
        before = len(queue.entries)
        plain.add_messages(plain_queue, parts, tags_codes)
        given_parts: list[Any] = [memoryview(part) for part in parts] if data.draw(st.booleans()) else parts
        made = builder.add_messages(queue, given_parts, tags_codes)  # type: ignore[arg-type]
        assert made == queue.entries[before:]
        assert builder.position == plain.position
        if data.draw(st.booleans()):
            builder.write()
    builder.write()
    assert log.data == plain_log.data
    assert log.segments == plain_log.segments
    for queue, plain_queue in queues:
        assert (queue.entries, queue.next_offset) == (plain_queue.entries, plain_queue.next_offset)
