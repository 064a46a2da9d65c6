"""Old segments go: for their age, for the log's size, for the disk; and never what is needed."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from kitemq.errors import StoreFullError
from kitemq.proto.v1 import message_pb2
from kitemq_server.store import housekeeping
from kitemq_server.store.config import StoreConfig
from kitemq_server.store.message_store import MessageStore
from kitemq_server.store.retention import CLOCK_JUMP_MS, Candidate, ClockGuard, Usage, choose
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
    segment_bases,
    send,
    small,
    topic_set,
)
from tests.waiting import eventually

HOUR_MS = 3_600_000


def candidates(*timestamps: int) -> list[Candidate]:
    return [Candidate((index + 1) * 100, 100, timestamp) for index, timestamp in enumerate(timestamps)]


@pytest.mark.parametrize(
    ("settings", "usage", "expected"),
    [
        ({}, Usage(log_bytes=1000, disk_used_bytes=10, disk_total_bytes=100, oldest_ms=25), (2, "age")),
        ({}, Usage(log_bytes=1000, disk_used_bytes=10, disk_total_bytes=100, oldest_ms=0), (0, "")),
        ({"retention_bytes": 750}, Usage(1000, 10, 100, 0), (3, "size of the log")),
        ({"retention_bytes": 1000}, Usage(1000, 10, 100, 0), (0, "")),
        ({"retention_bytes": 1}, Usage(1000, 10, 100, 0), (4, "size of the log")),
        ({"disk_watermark_percent": 85}, Usage(1000, 1000, 1000, 0), (2, "disk watermark")),
        ({"disk_watermark_percent": 85}, Usage(1000, 850, 1000, 0), (0, "")),
        ({"disk_watermark_percent": 0}, Usage(1000, 1000, 1000, 0), (0, "")),
        ({"retention_bytes": 750}, Usage(1000, 10, 100, 15), (3, "size of the log")),
    ],
)
def test_what_has_to_go(settings: dict[str, int], usage: Usage, expected: tuple[int, str]) -> None:
    assert choose(candidates(10, 20, 30, 40), usage, small(**settings)) == expected


def test_a_clock_that_jumps_is_not_believed_for_a_while() -> None:
    guard = ClockGuard(wall_ms=NOW_MS, monotonic_ms=0, last_store_timestamp_ms=NOW_MS - 1000)
    assert guard.trusts(wall_ms=NOW_MS + 10_000, monotonic_ms=10_000)
    ahead = NOW_MS + 2 * CLOCK_JUMP_MS
    assert not guard.trusts(wall_ms=ahead + 20_000, monotonic_ms=20_000)
    assert not guard.trusts(wall_ms=ahead + 30_000, monotonic_ms=30_000)
    assert guard.trusts(wall_ms=ahead + 20_000 + CLOCK_JUMP_MS, monotonic_ms=20_000 + CLOCK_JUMP_MS)


def test_a_start_long_after_the_last_record_may_be_a_wrong_clock() -> None:
    guard = ClockGuard(wall_ms=NOW_MS, monotonic_ms=5000, last_store_timestamp_ms=NOW_MS - 2 * CLOCK_JUMP_MS)
    assert not guard.trusts(wall_ms=NOW_MS + 1000, monotonic_ms=6000)
    assert guard.trusts(wall_ms=NOW_MS + CLOCK_JUMP_MS, monotonic_ms=5000 + CLOCK_JUMP_MS)
    assert ClockGuard(wall_ms=NOW_MS, monotonic_ms=5000, last_store_timestamp_ms=0).trusts(
        wall_ms=NOW_MS + 1000, monotonic_ms=6000
    )


async def fill(store: MessageStore, clock: Clock, segments: int) -> None:
    """Sends until that many segments are sealed, an hour each."""
    while len(store._log.segments) <= segments:
        await send(store, batch(10, body=b"x" * 1000), batch(1, queue_id=1))
        if len(store._log.segments) > 1:
            clock.now_ms = NOW_MS + (len(store._log.segments) - 1) * HOUR_MS


async def snapshots(store: MessageStore) -> None:
    """Two snapshots, so that nothing before them is needed for a restart."""
    for _ in range(2):
        store._housekeeping.snapshot()
        await store._thread.drain()
        store.append_change(topic_set())


async def collect(store: MessageStore, config: StoreConfig | None = None) -> None:
    """Retention has run to its end."""
    await store._retention.run_once(config or store.config)
    await store._thread.drain()


async def test_old_segments_go_with_their_entries_and_buckets() -> None:
    disk = new_disk()
    clock = Clock()
    config = small(queue_file_entries=16)
    async with opened(disk, config, clock=clock) as store:
        store.append_change(topic_set())
        await fill(store, clock, 5)
        await snapshots(store)
        store._housekeeping.index()
        await store._thread.drain()
        bases = segment_bases(disk)
        before = len(bodies(store))
        first_bucket = store._index.buckets.names()[0]
        await collect(store, replace(config, retention_bytes=store.store_bytes - bases[2]))
        assert segment_bases(disk) == bases[2:]
        assert store.min_physical_offset == bases[2]
        assert store.live_floor == bases[2]
        queue = queue_of(store)
        assert queue.min_offset > 0
        assert len(bodies(store)) == before - queue.min_offset
        oldest = store.read(queue, queue.min_offset, count_max=1, bytes_max=1)
        assert oldest.first_queue_offset == queue.min_offset
        first_file = int(disk.listdir(LAYOUT.queue(TOPIC, 0))[0]) // 20
        assert first_file <= queue.min_offset < first_file + 16
        assert store._index.buckets.names()[0] > first_bucket
        min_offset = queue.min_offset
        survivor = disk.copy()
    for again in (survivor, disk):
        async with opened(again, config, clock=clock) as store:
            assert queue_of(store).min_offset == min_offset
            assert len(bodies(store)) == before - min_offset
            assert not store.recovery.damages


async def test_the_older_snapshot_and_the_active_segment_are_never_deleted() -> None:
    disk = new_disk()
    clock = Clock()
    config = small(retention_bytes=1)
    async with opened(disk, config, clock=clock) as store:
        await fill(store, clock, 3)
        await collect(store)
        assert len(segment_bases(disk)) == 4  # no snapshot yet
        store._housekeeping.snapshot()
        await store._thread.drain()
        await collect(store)
        assert len(segment_bases(disk)) == 4  # one is not enough
        await snapshots(store)
        await collect(store)
        assert len(segment_bases(disk)) == 1
        await send(store, batch(1, body=b"still here"))
        assert bodies(store)[-1] == b"still here"


async def test_what_the_snapshots_hold_back_goes_although_nothing_is_appended() -> None:
    disk = new_disk()
    clock = Clock()
    config = small(retention_bytes=1)
    async with opened(disk, config, clock=clock) as store:
        await fill(store, clock, 3)
        await snapshots(store)
        await fill(store, clock, 5)
        store._housekeeping.snapshot()
        await store._thread.drain()
        end_offset = store._log.end_offset
        await collect(store)
        assert len(segment_bases(disk)) == 3  # the older snapshot needs them
        assert store._retention.held_back
        await eventually(store._snapshotter.may_start)  # it rests for a while after the one before
        live_floor = store._state.tables.live_floor
        store._housekeeping.raise_floor()
        assert store._log.end_offset > end_offset
        assert store._state.tables.live_floor == live_floor
        store._housekeeping.raise_floor()  # one is under way
        await store._thread.drain()
        before = disk.copy()
        await collect(store)
        assert len(segment_bases(disk)) == 1
        assert not store._retention.held_back
        count = len(bodies(store))
    for survivor in (before.crash(random.Random(0)), disk):
        async with opened(survivor, small(), clock=clock) as store:
            assert not store.recovery.damages
            assert len(bodies(store)) >= count


async def test_nothing_more_goes_before_the_last_has_gone() -> None:
    disk = new_disk()
    clock = Clock()
    async with opened(disk, clock=clock) as store:
        await fill(store, clock, 4)
        await snapshots(store)
        stall = disk.faults.stall("directory", part="commitlog")
        bases = segment_bases(disk)
        config = replace(store.config, retention_bytes=store.store_bytes - bases[1])
        await store._retention.run_once(config)
        await eventually(stall.entered.is_set)
        await store._retention.run_once(replace(config, retention_bytes=1))
        assert store.min_physical_offset == bases[1]
        stall.release()
        await store._thread.drain()
        await collect(store, replace(config, retention_bytes=1))
        assert store.min_physical_offset == bases[4]


@pytest.mark.parametrize("taken", [0, 2])
async def test_a_full_disk_is_relieved_of_what_it_has_to_lose(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    """Sends are refused, so nothing is appended, and no snapshot comes by itself."""
    monkeypatch.setattr(housekeeping, "_RETENTION_INTERVAL_S", 0.02)
    monkeypatch.setattr(housekeeping, "_HELD_BACK_INTERVAL_S", 0.02)
    disk = new_disk()
    disk.capacity_bytes = 600_000
    config = small(disk_watermark_percent=60, reserve_bytes=32_768, flush_interval_ms=10)
    async with opened(disk, config) as store:
        for _ in range(taken):
            store.append_change(topic_set())
            store._housekeeping.snapshot()
            await store._thread.drain()
        with pytest.raises(StoreFullError):
            while True:
                store.append([batch(10, body=b"x" * 1000)])
        await eventually(lambda: not store.full)
        assert store.min_physical_offset > 0
        assert store._retention.deleted_segment_count < 6
        await send(store, batch(1))


async def test_age_is_judged_by_the_last_record_of_a_segment() -> None:
    disk = new_disk()
    clock = Clock()
    config = small(retention_hours=10)
    async with opened(disk, config, clock=clock) as store:
        await fill(store, clock, 4)
        await snapshots(store)
        clock.now_ms = NOW_MS + 12 * HOUR_MS - 1000
        await collect(store)
        assert len(segment_bases(disk)) == 5  # the clock jumped: not now
        store._retention._guard._wait_until_ms = 0
        await collect(store)
        assert len(segment_bases(disk)) == 3
        await collect(store)
        assert len(segment_bases(disk)) == 3


async def test_the_disk_watermark() -> None:
    disk = new_disk()
    disk.capacity_bytes = 600_000
    clock = Clock()
    config = small(disk_watermark_percent=40)
    async with opened(disk, config, clock=clock) as store:
        await fill(store, clock, 5)
        await snapshots(store)
        await collect(store)
        used = disk.total_bytes(LAYOUT.root) - disk.free_bytes(LAYOUT.root)
        assert 100_000 < used <= 250_000


async def test_a_disk_that_others_fill_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """At the start, and when the watermark first deletes something; again only after it has been well below."""
    disk = new_disk()
    clock = Clock()
    config = small(disk_watermark_percent=50)

    def warnings() -> list[str]:
        lines = [one.message for one in caplog.records if one.levelname == "WARNING"]
        caplog.clear()
        return [line for line in lines if "watermark" in line]

    def others_use(percent: int) -> None:
        """The disk becomes that much fuller than the log alone makes it."""
        disk.capacity_bytes = disk.used_bytes() * 100 // percent

    async with opened(disk, config, clock=clock) as store:
        await fill(store, clock, 6)
        await snapshots(store)
        others_use(40)
        await collect(store)
        assert warnings() == []
        others_use(54)
        await collect(store)
        (line,) = warnings()
        assert "used_percent=54.0 watermark_percent=50" in line or "used_percent=53.9 watermark_percent=50" in line
        assert "deleted_segments=1 deleted_bytes=6" in line
        others_use(54)
        await collect(store)
        assert store._retention.deleted_segment_count == 2
        assert warnings() == []
        others_use(40)
        await collect(store)
        others_use(60)
        await collect(store)
        assert len(warnings()) == 1
        others_use(70)
    warnings()
    async with opened(disk, config, clock=clock):
        await eventually(lambda: "deleted_segments=0 deleted_bytes=0" in caplog.text)
        assert len(warnings()) == 1
    async with opened(disk, small(disk_watermark_percent=0), clock=clock):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert warnings() == []


async def test_messages_that_a_group_had_not_consumed_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    disk = new_disk()
    clock = Clock()
    config = small(retention_bytes=1)
    async with opened(disk, config, clock=clock) as store:
        store.append_change(topic_set())
        await fill(store, clock, 2)
        counts = {queue_id: queue_of(store, queue_id).max_offset for queue_id in (0, 1)}
        store.commit_offsets(
            [
                message_pb2.GroupOffset(group="slow", topic=TOPIC, queue_id=0, queue_offset=3),
                message_pb2.GroupOffset(group="slow", topic=TOPIC, queue_id=1, queue_offset=counts[1]),
                message_pb2.GroupOffset(group="done", topic=TOPIC, queue_id=0, queue_offset=counts[0]),
                message_pb2.GroupOffset(group="elsewhere", topic="audit", queue_id=0, queue_offset=1),
            ],
            durable=False,
        )
        await snapshots(store)
        await collect(store)
        deleted = queue_of(store).min_offset
        assert store.deleted_unconsumed == {"slow": deleted - 3}
        assert f"group=slow count={deleted - 3}" in caplog.text


async def test_settings_can_be_changed_while_it_runs() -> None:
    async with opened(new_disk()) as store:
        store.reconfigure(replace(store.config, retention_hours=5, disk_watermark_percent=0, segment_bytes=1 << 30))
        assert store.config.retention_hours == 5
        assert store.config.disk_watermark_percent == 0
        assert store.config.segment_bytes == small().segment_bytes
        assert store._housekeeping.config is store.config
    with pytest.raises(ValueError, match="disk_watermark_percent is 101"):
        replace(small(), disk_watermark_percent=101)
