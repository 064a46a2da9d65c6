"""The store against a list, over random histories of crashes; and the proof that these histories would see a bug.

More of them: make soak-store N=100000. A failing one prints the command that runs it again, made small.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kitemq_server.store import queue_repair
from kitemq_server.store.filenames import Layout
from kitemq_server.store.message_store import StoreConfig, open_store
from tests.crash import soak
from tests.crash.crash_buckets import CrashBuckets
from tests.crash.crash_disk import CrashDisk
from tests.crash.log_oracle import read_log
from tests.crash.planted_bugs import BUGS
from tests.crash.producers import Producer

PART_COUNT = 10
HISTORIES_PER_PART = 200
BUG_HISTORIES_MAX = 1000
ROOT = Path("/store")


@pytest.mark.parametrize("part", range(PART_COUNT))
def test_random_histories(part: int) -> None:
    """Nothing acknowledged is lost; nothing is invented, changed, reordered or back; all that is derived is right."""
    found = soak.failures(part * HISTORIES_PER_PART, HISTORIES_PER_PART)
    assert not found, "\n\n".join(map(str, found[:3]))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(bug: Callable[[], Any]) -> None:
    logging.disable(logging.CRITICAL)
    try:
        with bug():
            assert any(soak.run(seed) for seed in range(BUG_HISTORIES_MAX))
    finally:
        logging.disable(logging.NOTSET)


async def test_the_index_does_not_believe_a_history_that_was_cut() -> None:
    """The index outlives a power loss that takes the log's tail; other messages are stored in its place."""
    rng = random.Random(0)
    producer = Producer(0xA1)
    config = StoreConfig(segment_bytes=65536, allocate_bytes=4096, reserve_bytes=0, record_bytes_max=2048)
    disk = CrashDisk(ROOT)
    buckets = CrashBuckets(disk.faults)
    async with open_store(disk, ROOT, config, buckets=buckets) as store:
        end_offset = store.append([producer.batch(("orders", 0), 20, rng, equal=True).batch]).end_offset
        store._housekeeping.index()
        await store._thread.drain()
        assert store._index.applied_offset == end_offset > store.flushed_offset
        crashed = (disk.copy().crash(random.Random(seed)) for seed in range(100))
        disk = next(after for after in crashed if record_count(after) == 1)
    buckets = buckets.kill(disk.faults)
    sent = producer.batch(("orders", 1), 30, rng, equal=True)
    for _ in range(2):  # the second time, the log has grown beyond what the index had seen
        disk = disk.kill(rng)
        async with open_store(disk, ROOT, config, buckets=buckets.kill(disk.faults)) as store:
            store.append([sent.batch])
            store._housekeeping.index()
            await store._thread.drain()
            for message_id in sent.batch.message_ids:
                found = store.find_by_id(message_id)
                assert found is not None
                assert found.message().message_id == message_id


def record_count(disk: CrashDisk) -> int:
    return len(read_log(disk.files(), Layout(ROOT).commit_log).records)


async def test_rebuilt_queues_are_on_disk_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The snapshot says that they are complete, so nothing writes them once more after a power loss."""
    monkeypatch.setattr(queue_repair, "_MEMORY_ENTRIES_MAX", 5)
    rng = random.Random(0)
    producer = Producer(0xA1)
    config = StoreConfig(segment_bytes=65536, allocate_bytes=4096, reserve_bytes=0, record_bytes_max=2048)
    disk = CrashDisk(ROOT)
    async with open_store(disk, ROOT, config) as store:
        store.append([producer.batch(("orders", 0), 20, rng, equal=True).batch])
    for seed in range(200):
        after = disk.copy()
        after.erase(Layout(ROOT).queue("orders", 0))
        async with open_store(after, ROOT, config):
            after = after.crash(random.Random(seed))
        async with open_store(after, ROOT, config) as store:
            queue = store.queue("orders", 0)
            assert queue is not None
            assert store.read(queue, 0, count_max=32, bytes_max=1 << 20).count == 20
            assert store._reader.mended_entry_count == 0


async def test_a_deletion_that_a_crash_undid_is_finished() -> None:
    """Removed segments are back after a power loss, with a gap between them: that is no damage."""
    rng = random.Random(0)
    producer = Producer(0xA1)
    config = StoreConfig(
        segment_bytes=4096, allocate_bytes=1024, reserve_bytes=0, record_bytes_max=2048, disk_watermark_percent=0
    )
    disk = CrashDisk(ROOT)
    layout = Layout(ROOT)
    async with open_store(disk, ROOT, config) as store:
        for _ in range(3):
            for _ in range(40):
                store.append([producer.batch(("orders", 0), 2, rng, equal=True).batch])
            store._housekeeping.snapshot()
            await store._thread.drain()
        before = disk.files()
        await store._retention.run_once(replace(config, retention_bytes=1))
        await store._thread.drain()
        live_floor = store.min_physical_offset
        segments = {path: data for path, data in before.items() if path.parent == layout.commit_log}
        removed = sorted(path for path in segments if int(path.name) < live_floor)
        assert len(removed) > 2
        queue = store.queue("orders", 0)
        assert queue is not None
        min_offset = queue.min_offset
        assert min_offset > 0
        disk = disk.kill(rng)
    for path in (removed[0], removed[-1]):
        disk.overwrite(path, before[path])
    async with open_store(disk, ROOT, config) as store:
        assert not store.recovery.damages
        assert store.min_physical_offset == live_floor
        queue = store.queue("orders", 0)
        assert queue is not None
        assert queue.min_offset == min_offset
    assert not disk.files().keys() & set(removed)
