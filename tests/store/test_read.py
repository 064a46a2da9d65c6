"""Reading queues: statuses and next offsets as RocketMQ's, filters, damage, time."""

from __future__ import annotations

import struct

import pytest

from kitemq.protocol.record import tags_code
from kitemq_server.store import queue_reader
from kitemq_server.store.consume_queue import ENTRY, ENTRY_BYTES
from kitemq_server.store.message_store import ReadStatus
from kitemq_server.store.queue_reader import ReadResult
from tests.store.helpers import (
    LAYOUT,
    NOW_MS,
    TOPIC,
    Clock,
    batch,
    bodies,
    new_disk,
    opened,
    overwrite,
    queue_of,
    read_all,
    send,
    small,
    split,
    topic_set,
)


async def test_statuses_and_next_offsets() -> None:
    async with opened(new_disk()) as store:
        store.append_change(topic_set())
        queue = queue_of(store)

        def outcome(offset: int) -> tuple[ReadStatus, int]:
            result = store.read(queue, offset, count_max=10, bytes_max=1 << 20)
            assert (result.min_offset, result.max_offset) == (queue.min_offset, queue.max_offset)
            return result.status, result.next_offset

        assert outcome(0) == (ReadStatus.NO_NEW_MSG, 0)  # an empty queue
        assert outcome(7) == (ReadStatus.OFFSET_ILLEGAL, 0)
        await send(store, batch(5))
        assert outcome(0) == (ReadStatus.FOUND, 5)
        assert outcome(3) == (ReadStatus.FOUND, 5)
        assert outcome(5) == (ReadStatus.NO_NEW_MSG, 5)
        assert outcome(6) == (ReadStatus.OFFSET_ILLEGAL, 5)
        queue.min_offset = 2
        assert outcome(1) == (ReadStatus.OFFSET_ILLEGAL, 2)
        assert outcome(2) == (ReadStatus.FOUND, 5)
        queue.min_offset = 5  # everything has been deleted
        assert outcome(4) == (ReadStatus.OFFSET_ILLEGAL, 5)
        assert outcome(5) == (ReadStatus.NO_NEW_MSG, 5)


async def test_a_reply_is_the_log_as_it_is() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        start = store.written_offset
        await send(store, batch(3, body=b"a"), batch(2, body=b"b", queue_id=1))
        await send(store, batch(2, body=b"c"))
        result = store.read(queue_of(store), 0, count_max=100, bytes_max=1 << 20)
        assert result.status is ReadStatus.FOUND
        assert (result.first_queue_offset, result.count, result.next_offset) == (0, 5, 5)
        assert not result.sparse
        assert result.last_epoch == store.epoch
        sizes = struct.unpack("<5I", result.sizes)
        assert sum(sizes) == len(result.records)
        log = disk.files()[LAYOUT.segment(0)][start:]
        assert result.records[: sum(sizes[:3])] == log[: sum(sizes[:3])]
        assert [message.body for message in split(result.records)] == [b"a"] * 3 + [b"c"] * 2


async def test_limits_of_a_reply() -> None:
    async with opened(new_disk()) as store:
        await send(store, batch(20, body=b"x" * 1000))
        queue = queue_of(store)

        def count(count_max: int, bytes_max: int) -> int:
            return store.read(queue, 0, count_max=count_max, bytes_max=bytes_max).count

        assert count(count_max=7, bytes_max=1 << 20) == 7
        assert count(count_max=100, bytes_max=3500) == 3
        assert count(count_max=100, bytes_max=1) == 1  # at least one, however large
        assert store.read(queue, 0, count_max=100, bytes_max=3500).next_offset == 3


async def test_tags_are_matched_by_code_and_then_by_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(new_disk()) as store:
        tagged = batch(6, tags=["red", "", "blue", "red", "green", "blue"])
        tagged.tags_codes = [tags_code("red") if tag == tags_code("green") else tag for tag in tagged.tags_codes]
        await send(store, tagged)
        queue = queue_of(store)
        red = store.read(queue, 0, count_max=10, bytes_max=1 << 20, tags=frozenset({"red"}))
        assert [message.tag for message in split(red.records)] == ["red", "red"]  # green has the code of red
        assert red.sparse
        assert (red.first_queue_offset, red.next_offset) == (0, 6)
        two = store.read(queue, 0, count_max=2, bytes_max=1 << 20, tags=frozenset({"red", "blue"}))
        assert [message.tag for message in split(two.records)] == ["red", "blue"]
        assert two.next_offset == 3
        none = store.read(queue, 0, count_max=10, bytes_max=1 << 20, tags=frozenset({"black"}))
        assert (none.status, none.next_offset) == (ReadStatus.NO_MATCHED_MSG, 6)


async def test_a_filtered_read_looks_at_a_limited_number_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_reader, "SCAN_ENTRIES_MAX", 50)
    monkeypatch.setattr(queue_reader, "_SCAN_STEP", 20)
    async with opened(new_disk(), small(queue_file_entries=30)) as store:
        await send(store, batch(120, tags=["dull"] * 110 + ["rare"] + ["dull"] * 9))
        queue = queue_of(store)
        seen: list[ReadResult] = []
        offset = 0
        while offset < 120:
            seen.append(store.read(queue, offset, count_max=10, bytes_max=1 << 20, tags=frozenset({"rare"})))
            offset = seen[-1].next_offset
        assert [(result.status.name, result.next_offset) for result in seen] == [
            ("NO_MATCHED_MSG", 50),
            ("NO_MATCHED_MSG", 100),
            ("FOUND", 120),
        ]
        assert seen[-1].first_queue_offset == 110


@pytest.mark.parametrize("where", ["header", "body", "trailer", "crc"])
async def test_a_damaged_record_is_skipped_and_reported_once(where: str) -> None:
    disk = new_disk()
    async with opened(disk) as store:
        ends = [(await send(store, batch(1, body=b"%d" % index * 50))).end_offset for index in range(6)]
    start, end = ends[2], ends[3]
    disk.flip_bit(
        LAYOUT.segment(0), {"header": start + 1, "body": start + 40, "trailer": end - 30, "crc": end - 1}[where]
    )
    async with opened(disk) as store:
        for _ in range(2):
            assert [body[:1] for body in bodies(store)] == [b"0", b"1", b"2", b"4", b"5"]
        assert store.damaged_record_count == 1
        result = store.read(queue_of(store), 2, count_max=2, bytes_max=1 << 20)
        assert (result.count, result.first_queue_offset, result.next_offset) == (1, 2, 4)
        only_damage = store.read(queue_of(store), 3, count_max=1, bytes_max=1 << 20)
        assert (only_damage.status, only_damage.next_offset) == (ReadStatus.NO_MATCHED_MSG, 4)
        around = store.read(queue_of(store), 2, count_max=3, bytes_max=1 << 20)
        assert (around.count, around.sparse, around.next_offset) == (2, True, 5)


async def test_damage_at_the_end_of_a_queue_is_no_match() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        start = (await send(store, batch(1))).end_offset
        await send(store, batch(1))
    disk.flip_bit(LAYOUT.segment(0), start + 20)
    async with opened(disk) as store:
        result = store.read(queue_of(store), 1, count_max=10, bytes_max=1 << 20)
        assert (result.status, result.next_offset) == (ReadStatus.NO_MATCHED_MSG, 2)


async def test_records_are_checked_once_and_what_was_appended_since_not_at_all() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(10))
        assert queue_of(store).trusted_offset == 0
    async with opened(disk) as store:
        queue = queue_of(store)
        assert queue.trusted_offset == 10
        store.read(queue, 2, count_max=4, bytes_max=1 << 20)
        assert (queue.verified_from, queue.verified_to) == (2, 6)
        store.read(queue, 6, count_max=2, bytes_max=1 << 20)
        assert (queue.verified_from, queue.verified_to) == (2, 8)
        store.read(queue, 0, count_max=2, bytes_max=1 << 20)
        assert (queue.verified_from, queue.verified_to) == (0, 8)
        await send(store, batch(5))
        assert len(bodies(store)) == 15


async def test_a_wrong_entry_is_mended_from_its_neighbours() -> None:
    disk = new_disk()
    config = small(queue_file_entries=4)
    async with opened(disk, config) as store:
        await send(store, batch(10, tags=["t"] * 10))
    path = LAYOUT.queue(TOPIC, 0) / f"{4 * ENTRY_BYTES:020d}"
    good = disk.files()[path]
    overwrite(disk, path, ENTRY_BYTES, ENTRY.pack(3, 77, 5))
    overwrite(disk, path, 2 * ENTRY_BYTES, bytes(ENTRY_BYTES))
    async with opened(disk, config) as store:
        assert len(read_all(store, tags=frozenset({"t"}))) == 9  # an entry of zeros is looked into, a wrong tag is not
        assert len(bodies(store)) == 10
        await store._thread.call(lambda: None)  # behind the mended entries
        assert len(read_all(store, tags=frozenset({"t"}))) == 10
        assert store.damaged_record_count == 0
    assert disk.files()[path] == good


async def test_times_of_wrong_entries_are_those_of_their_records() -> None:
    disk = new_disk()
    clock = Clock()
    async with opened(disk, clock=clock) as store:
        for _ in range(10):
            clock.now_ms += 1000
            await send(store, batch(1))
    path = LAYOUT.queue(TOPIC, 0) / f"{0:020d}"
    for index in (0, 3, 5):  # of a former life: there are zeros now
        overwrite(disk, path, index * ENTRY_BYTES, ENTRY.pack(50_000, 200, 0))
    overwrite(disk, path, 7 * ENTRY_BYTES, bytes(ENTRY_BYTES))
    async with opened(disk) as store:
        queue = queue_of(store)
        assert store.search_timestamp(queue, NOW_MS + 5000) == 4
        assert [store.store_timestamp(queue, index) for index in range(10)] == [
            NOW_MS + 1000 * (index + 1) for index in range(10)
        ]


async def test_store_times() -> None:
    clock = Clock()
    async with opened(new_disk(), clock=clock) as store:
        store.append_change(topic_set())
        queue = queue_of(store)
        assert store.search_timestamp(queue, NOW_MS) == 0
        for index in range(10):
            clock.now_ms = NOW_MS + index * 100
            await send(store, batch(3))
        assert store.search_timestamp(queue, 0) == 0
        assert store.search_timestamp(queue, NOW_MS) == 0
        assert store.search_timestamp(queue, NOW_MS + 1) == 3
        assert store.search_timestamp(queue, NOW_MS + 500) == 15
        assert store.search_timestamp(queue, NOW_MS + 901) == 30
        assert store.store_timestamp(queue, 29) == NOW_MS + 900
        assert store.store_timestamp(queue, 30) == 0
        queue.min_offset = 5
        assert store.search_timestamp(queue, 0) == 5
        assert store.store_timestamp(queue, 4) == 0


async def test_a_queue_that_nobody_wrote_is_there_if_its_topic_has_it() -> None:
    async with opened(new_disk()) as store:
        assert store.queue(TOPIC, 0) is None
        store.append_change(topic_set(queues=2))
        assert queue_of(store, 1).max_offset == 0
        assert store.queue(TOPIC, 2) is None
        assert store.queue_count == 1


async def test_single_records_by_their_place() -> None:
    async with opened(new_disk()) as store:
        start = store.written_offset
        await send(store, batch(2, body=b"here"))
        record = store.read_record(start)
        assert record is not None
        assert record.message().body == b"here"
        assert store.read_record(start + 1) is None
        assert store.read_record(store.written_offset) is None
        assert store.read_record(1 << 40) is None
