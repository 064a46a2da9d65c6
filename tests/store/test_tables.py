"""Topics, groups, offsets, key values and locks: changes of them, and what survives."""

from __future__ import annotations

import random

import pytest

from kitemq.proto.v1 import message_pb2
from kitemq_server.store.config import FlushMode
from kitemq_server.store.message_store import MessageStore
from kitemq_server.store.tables import OffsetTable
from tests.store.helpers import (
    LAYOUT,
    NOW_MS,
    TOPIC,
    Clock,
    batch,
    bodies,
    new_disk,
    opened,
    queue_of,
    send,
    small,
    topic_deleted,
    topic_set,
)
from tests.waiting import eventually


def offset(value: int, *, group: str = "g", queue_id: int = 0, **flags: bool) -> message_pb2.GroupOffset:
    return message_pb2.GroupOffset(group=group, topic=TOPIC, queue_id=queue_id, queue_offset=value, **flags)


def committed(store: MessageStore, group: str = "g", queue_id: int = 0) -> int | None:
    return store.offsets.get(group, TOPIC, queue_id)


def test_offsets_move_forwards_unless_reset() -> None:
    table = OffsetTable()
    for change, expected in [
        (offset(5), 5),
        (offset(3), 5),
        (offset(3, reset=True), 3),
        (offset(9), 9),
        (offset(0, deleted=True), None),
        (offset(1), 1),
    ]:
        assert table.moves(change) == (expected != table.get("g", TOPIC, 0))
        table.commit(change)
        assert table.get("g", TOPIC, 0) == expected


async def snapshot(store: MessageStore) -> None:
    """A snapshot is taken and on disk."""
    store._housekeeping.snapshot()
    await store._thread.drain()


async def test_everything_survives_a_restart_by_log_and_by_snapshot() -> None:
    disk = new_disk()
    clock = Clock()
    changes = [
        topic_set(),
        topic_set("audit", 1),
        topic_set("gone"),
        topic_deleted("gone"),
        message_pb2.SystemRecord(group_set=message_pb2.GroupConfig(name="g", retry_max_times=3, attributes={"a": "b"})),
        message_pb2.SystemRecord(group_set=message_pb2.GroupConfig(name="old")),
        message_pb2.SystemRecord(group_deleted="old"),
        message_pb2.SystemRecord(key_value_set=message_pb2.KeyValue(key="k", value="ü")),
        message_pb2.SystemRecord(key_value_set=message_pb2.KeyValue(key="old", value="v")),
        message_pb2.SystemRecord(key_value_deleted="old"),
        message_pb2.SystemRecord(
            queue_locked=message_pb2.QueueLocked(
                group="g", topic=TOPIC, queue_id=1, client_id="c", token=2**63, expires_timestamp_ms=NOW_MS
            )
        ),
        message_pb2.SystemRecord(
            queue_locked=message_pb2.QueueLocked(group="g", topic=TOPIC, queue_id=2, client_id="c", token=1)
        ),
        message_pb2.SystemRecord(queue_locked=message_pb2.QueueLocked(group="g", topic=TOPIC, queue_id=2)),
    ]

    def check(store: MessageStore) -> None:
        assert set(store.topics) == {TOPIC, "audit"}
        assert store.topics[TOPIC] == changes[0].topic_set
        assert set(store.groups) == {"g"}
        assert store.groups["g"].attributes == {"a": "b"}
        assert dict(store.key_values) == {"k": "ü"}
        assert set(store.queue_locks) == {("g", TOPIC, 1)}
        assert store.queue_locks["g", TOPIC, 1].token == 2**63
        assert store.data_version == (NOW_MS, 4)
        assert committed(store) == 7

    async with opened(disk, clock=clock) as store:
        for change in changes:
            assert store.append_change(change) == store.written_offset
        store.commit_offsets([offset(7)], durable=True)
        check(store)
        survivor = disk.kill(random.Random(0))
    async with opened(survivor, clock=clock) as store:
        check(store)
        await snapshot(store)
        survivor = survivor.kill(random.Random(0))
    clock.now_ms += 5000
    async with opened(survivor, clock=clock) as store:
        assert store.recovery.records == 0
        check(store)


async def test_periodic_commits_are_visible_at_once_and_recorded_together() -> None:
    disk = new_disk()
    config = small(offsets_interval_ms=50, flush_interval_ms=10)
    async with opened(disk, config) as store:
        before = store.written_offset
        for value in range(1, 40):
            assert store.commit_offsets([offset(value), offset(value * 2, queue_id=1)], durable=False) == 0
            assert committed(store) == value
        assert store.written_offset == before
        await eventually(lambda: store.written_offset > before)
        after = store.written_offset
        record = store.read_record(before)
        assert record is not None
        recorded = record.message().system.offsets_committed.offsets
        assert {(entry.queue_id, entry.queue_offset) for entry in recorded} == {(0, 39), (1, 78)}
        store.commit_offsets([offset(39)], durable=False)  # nothing moves, nothing is written
        assert store.commit_offsets([offset(39)], durable=True) == after


async def test_a_stop_records_what_waits() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        store.commit_offsets([offset(5)], durable=False)
    async with opened(disk) as store:
        assert committed(store) == 5


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_offsets_that_were_moved_back_stay_back(how: str) -> None:
    disk = new_disk()
    async with opened(disk) as store:
        store.commit_offsets([offset(100)], durable=True)
        store.commit_offsets([offset(5, reset=True)], durable=False)
        store.commit_offsets([offset(9)], durable=False)
        assert committed(store) == 9
        store.commit_offsets([offset(3, queue_id=1)], durable=True)  # records what waits, first
        survivor = disk.kill(random.Random(0)) if how == "kill" else disk
    async with opened(survivor) as store:
        assert committed(store) == 9
        assert committed(store, queue_id=1) == 3


async def test_a_durable_commit_is_not_undone_by_an_older_one_that_waits() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        store.commit_offsets([offset(5, reset=True)], durable=False)
        store.commit_offsets([offset(50)], durable=True)
    async with opened(disk) as store:
        assert committed(store) == 50


async def test_a_durable_commit_that_moves_nothing_still_names_an_end_to_wait_for() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        store.commit_offsets([offset(5)], durable=True)
        end_offset = store.commit_offsets([offset(5)], durable=True)
        assert not await store.wait_confirmed(end_offset, 0.01)
        stall.release()
        assert await store.wait_confirmed(end_offset, 10)


async def test_many_offsets_are_one_group_of_records() -> None:
    disk = new_disk()
    async with opened(disk, small(segment_bytes=4 << 20, record_bytes_max=1 << 20)) as store:
        before = store.written_offset
        store.commit_offsets([offset(index, queue_id=index) for index in range(1, 12_001)], durable=True)
        flags = []
        while before < store.written_offset:
            record = store.read_record(before)
            assert record is not None
            flags.append(record.group_continues)
            before = record.end_offset
        assert flags == [True, True, False]
        assert len(store.offsets.of_group("g")) == 12_000


async def test_a_deleted_topic_is_gone_with_queues_offsets_and_files() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        heard: list[tuple[str, int, bool]] = []
        store.append_change(topic_set())
        store.append_change(topic_set("audit"))
        await send(store, batch(3), batch(3, topic="audit"))
        store.commit_offsets([offset(2)], durable=False)
        await snapshot(store)
        assert disk.listdir(LAYOUT.topic(TOPIC)) == ["0"]
        queue = queue_of(store)
        store.confirmed_listener = lambda queues: heard.extend((q.topic, q.queue_id, q.deleted) for q in queues)
        store.append_change(topic_deleted())
        assert heard == [(TOPIC, 0, True)]
        assert queue.deleted
        assert store.read(queue, 0, count_max=1, bytes_max=100).records == b""
        assert store.queue(TOPIC, 0) is None
        assert committed(store) is None
        assert disk.listdir(LAYOUT.topic(TOPIC)) == ["0"]  # a crash may still bring the topic back
        await snapshot(store)
        assert disk.listdir(LAYOUT.consume_queue) == ["audit"]
        assert len(bodies(store, topic="audit")) == 3
        survivor = disk.kill(random.Random(0))
    async with opened(survivor) as store:
        assert set(store.topics) == {"audit"}
        assert committed(store) is None
        assert store.queue(TOPIC, 0) is None


@pytest.mark.parametrize("snapshots", range(4))
async def test_a_topic_that_is_made_again_begins_at_zero(snapshots: int) -> None:
    """Wherever snapshots come in, the new queue never shows entries of the old one."""
    disk = new_disk()
    config = small(queue_file_entries=4)
    async with opened(disk, config) as store:
        store.append_change(topic_set())
        await send(store, batch(20, body=b"old"), batch(5, body=b"old", queue_id=1))
        if snapshots & 1:
            await snapshot(store)
        assert len(bodies(store)) == 20
        store.append_change(topic_deleted())
        store.append_change(topic_set())
        receipt = await send(store, batch(6, body=b"new"))
        assert receipt.runs[0][0].first_queue_offset == 0
        if snapshots & 2:
            await snapshot(store)
            assert disk.listdir(LAYOUT.topic(TOPIC)) == ["0"]
            assert len(disk.listdir(LAYOUT.queue(TOPIC, 0))) == 2
        assert bodies(store) == [b"new"] * 6
        assert bodies(store, 1) == []
        survivor = disk.copy()
    for disk_again in (disk, survivor):
        async with opened(disk_again, config) as store:
            assert bodies(store) == [b"new"] * 6
            assert bodies(store, 1) == []
            await send(store, batch(10, body=b"more"))
            assert bodies(store) == [b"new"] * 6 + [b"more"] * 10


async def test_files_of_a_topic_whose_deletion_was_cut_short_go_later() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        store.append_change(topic_set("a|b%c"))
        await send(store, batch(3, topic="a|b%c"))
        await snapshot(store)
        assert disk.listdir(LAYOUT.consume_queue) == ["a%7Cb%25c"]
        store.append_change(topic_deleted("a|b%c"))
        survivor = disk.kill(random.Random(0))
    async with opened(survivor) as store:
        await snapshot(store)
        assert survivor.listdir(LAYOUT.consume_queue) == []


async def test_offset_listings() -> None:
    async with opened(new_disk()) as store:
        store.commit_offsets([offset(1), offset(2, group="h", queue_id=3)], durable=False)
        assert set(store.offsets.groups()) == {"g", "h"}
        assert store.offsets.of_group("h") == {(TOPIC, 3): 2}
        assert store.offsets.of_group("nobody") == {}
        assert sorted(store.offsets.groups_of_topic(TOPIC)) == ["g", "h"]
        store.append_change(message_pb2.SystemRecord(group_deleted="g"))
        assert store.offsets.groups_of_topic(TOPIC) == ["h"]
