"""Snapshots: bounded restarts, damaged ones, queues rebuilt, when they are taken."""

from __future__ import annotations

import errno
import json
import random

import pytest

from kitemq_server.store.message_store import MessageStore
from kitemq_server.store.snapshot_file import SnapshotDamagedError, load_snapshot
from tests.crash.crash_disk import CrashDisk
from tests.store.helpers import (
    LAYOUT,
    TOPIC,
    batch,
    bodies,
    new_disk,
    opened,
    queue_of,
    send,
    small,
    topic_set,
)
from tests.waiting import eventually


async def snapshot(store: MessageStore) -> None:
    """A snapshot is taken and on disk."""
    store._housekeeping.snapshot()
    await store._thread.drain()


def newest(disk: CrashDisk) -> str:
    return disk.listdir(LAYOUT.snapshot)[-1]


async def test_a_restart_reads_only_what_came_after_the_snapshot() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(100))
        await snapshot(store)
        await send(store, batch(7))
        survivor = disk.kill(random.Random(0))
    async with opened(survivor) as store:
        assert store.recovery.records == 7
        assert len(bodies(store)) == 107


async def test_two_are_kept_and_the_older_one_serves_when_the_newer_is_damaged() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        for _ in range(4):
            await send(store, batch(5))
            await snapshot(store)
        assert len(disk.listdir(LAYOUT.snapshot)) == 2
        assert store._snapshotter.floor == int(disk.listdir(LAYOUT.snapshot)[0].removesuffix(".json"))
        survivor = disk.kill(random.Random(0))
    name = newest(survivor)
    survivor.flip_bit(LAYOUT.snapshot / name, 200)
    async with opened(survivor) as store:
        assert store.recovery.records == 5
        assert len(bodies(store)) == 20
        assert survivor.listdir(LAYOUT.damaged) == [name]


@pytest.mark.parametrize("harm", ["cut", "empty", "other version", "other store", "not json"])
async def test_a_snapshot_that_is_no_use_is_not_used(harm: str) -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(5))
    path = LAYOUT.snapshot / newest(disk)
    data = disk.files()[path]
    state = json.loads(data)["state"]
    harmed = {
        "cut": data[:-20],
        "empty": b"",
        "other version": data.replace(b'"format_version": 1', b'"format_version": 2'),
        "other store": data,
        "not json": b'{"crc32c": 0, "state": }\n',
    }[harm]
    disk.overwrite(path, harmed)
    with pytest.raises(SnapshotDamagedError):
        load_snapshot(disk, path, "another" if harm == "other store" else state["store_uuid"])
    if harm != "other store":
        async with opened(disk) as store:
            assert len(bodies(store)) == 5


@pytest.mark.parametrize("lost", ["all", "one file", "half a file", "a middle file"])
async def test_queues_whose_files_are_lost_are_made_again(lost: str) -> None:
    disk = new_disk()
    config = small(queue_file_entries=4)
    async with opened(disk, config) as store:
        store.append_change(topic_set())
        for index in range(10):
            await send(store, batch(2, body=b"%d" % index), batch(1, queue_id=1, body=b"%d" % index))
    names = disk.listdir(LAYOUT.queue(TOPIC, 0))
    path = LAYOUT.queue(TOPIC, 0) / names[-1 if lost != "a middle file" else 2]
    if lost == "all":
        disk.erase(LAYOUT.consume_queue)
    elif lost == "half a file":
        disk.overwrite(path, disk.files()[path][:30])
    else:
        disk.erase(path)
    async with opened(disk, config) as store:
        assert bodies(store) == [b"%d" % (index // 2) for index in range(20)]
        assert bodies(store, 1) == [b"%d" % index for index in range(10)]
        await send(store, batch(1, body=b"new"))
    async with opened(disk, config) as store:
        assert len(bodies(store)) == 21


async def test_they_are_taken_after_enough_records_or_bytes_or_time() -> None:
    disk = new_disk()
    for settings in ({"snapshot_records": 20}, {"snapshot_bytes": 2000}, {"snapshot_interval_ms": 1}):
        async with opened(disk, small(flush_interval_ms=5, **settings)) as store:
            await send(store, batch(30))
            await eventually(lambda: store._snapshotter.count > 0)
            assert store.snapshot_cost_s > 0


async def test_nothing_new_needs_no_snapshot() -> None:
    async with opened(new_disk()) as store:
        await snapshot(store)
        assert not store._snapshotter.due(store.written_offset, store._appender.record_count + 10**9)
        await send(store, batch())
        store._snapshotter._not_before = 0.0
        assert store._snapshotter.due(store.written_offset, store._appender.record_count + 10**9)
        store._snapshotter._not_before = float("inf")  # it has just cost too much
        assert not store._snapshotter.due(store.written_offset, store._appender.record_count + 10**9)


async def test_entries_leave_memory_with_the_snapshot_and_are_read_from_files() -> None:
    disk = new_disk()
    async with opened(disk, small(queue_file_entries=10)) as store:
        await send(store, batch(25))
        queue = queue_of(store)
        assert (queue.tail_offset, len(queue.tail)) == (0, 500)
        await snapshot(store)
        assert (queue.tail_offset, len(queue.tail)) == (25, 0)
        await send(store, batch(5))
        assert len(queue.tail) == 100
        assert len(bodies(store)) == 30
        assert [len(queue.entries(first, 4)) for first in (0, 8, 23, 26)] == [80] * 4


async def test_a_disk_that_is_full_puts_a_snapshot_off() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(3))
        disk.faults.fail("write", part="snapshot", error=errno.ENOSPC)
        await snapshot(store)
        assert store._snapshotter.count == 0
        assert disk.listdir(LAYOUT.snapshot) == [] or all(
            name.endswith(".tmp") for name in disk.listdir(LAYOUT.snapshot)
        )
        await snapshot(store)
        assert store._snapshotter.count == 1
        assert not store.failed.done()


@pytest.mark.parametrize("part", ["consumequeue", "snapshot"])
async def test_a_disk_that_fails_under_a_snapshot_is_fatal(part: str) -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(3))
        disk.faults.fail("sync", part=part)
        store._housekeeping.snapshot()
        await store.failed
    async with opened(disk.kill(random.Random(0))) as store:
        assert len(bodies(store)) == 3


async def test_a_snapshot_is_plain_json() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        store.append_change(topic_set())
        await send(store, batch(3, instance=7, sequence=1))
    document = json.loads(disk.files()[LAYOUT.snapshot / newest(disk)])
    state = document["state"]
    assert state["queues"] == {TOPIC: [[0, 0, 3]]}
    assert state["topics"][0]["name"] == TOPIC
    assert state["windows"] == [[7, TOPIC, 0, state["last_store_timestamp_ms"], 0, 1, 3, 0]]
    assert state["physical_offset"] <= state["flushed_offset"]
