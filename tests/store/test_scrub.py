"""The scrub finds rot that nobody has read, and mends consume queue entries."""

from __future__ import annotations

from kitemq_server.store.consume_queue import ENTRY, ENTRY_BYTES
from kitemq_server.store.message_store import MessageStore
from kitemq_server.store.scrub import PASS_INTERVAL_S
from tests.store.helpers import (
    LAYOUT,
    TOPIC,
    batch,
    bodies,
    new_disk,
    opened,
    overwrite,
    queue_of,
    read_all,
    send,
    small,
    topic_deleted,
    topic_set,
)
from tests.waiting import eventually


async def one_pass(store: MessageStore) -> None:
    """The whole log is checked once."""
    scrub = store._scrub
    passes = scrub.pass_count
    await store._flush()
    now_s = scrub._next_pass_at

    def done() -> bool:
        scrub.work(now_s, 2000, store.flushed_offset)
        return scrub.pass_count > passes

    await eventually(done)


async def test_rot_is_found_and_reported_once() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        ends = [(await send(store, batch(1, body=b"r" * 500))).end_offset for _ in range(300)]
    disk.flip_bit(LAYOUT.segment(0), ends[10] + 50)
    disk.flip_bit(LAYOUT.segment(0), ends[20] + 50)
    disk.flip_bit(LAYOUT.segment(0), ends[21] + 50)
    async with opened(disk) as store:
        assert store.damaged_record_count == 0
        await one_pass(store)
        assert store.damaged_record_count == 2  # neighbours are one stretch
        await one_pass(store)
        assert store.damaged_record_count == 2


async def test_entries_are_mended() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(50, tags=["t"] * 50))
    path = LAYOUT.queue(TOPIC, 0) / f"{0:020d}"
    good = disk.files()[path]
    overwrite(disk, path, 7 * ENTRY_BYTES + 19, b"\xff")  # the tags code only
    overwrite(disk, path, 20 * ENTRY_BYTES, ENTRY.pack(1, 99, 9) * 3)
    async with opened(disk) as store:
        assert len(read_all(store, tags=frozenset({"t"}))) < 50
        await one_pass(store)
        await store._thread.call(lambda: None)
        assert len(read_all(store, tags=frozenset({"t"}))) == 50
        assert store.damaged_record_count == 0
    assert disk.files()[path] == good


async def test_messages_of_a_former_life_of_a_topic_are_left_alone() -> None:
    async with opened(new_disk()) as store:
        store.append_change(topic_set())
        await send(store, batch(20, body=b"old"))
        store.append_change(topic_deleted())
        store.append_change(topic_set())
        await send(store, batch(10, body=b"new"))
        await one_pass(store)
        assert bodies(store) == [b"new"] * 10
        assert store._reader.mended_entry_count == 0
        assert queue_of(store).max_offset == 10


async def test_a_pass_is_slow_and_rare() -> None:
    async with opened(new_disk()) as store:
        await send(store, batch(20, body=b"x" * 1000))
        await store._flush()
        scrub = store._scrub
        started = scrub._next_pass_at
        scrub.work(started - 1, 5000, store.flushed_offset)
        assert scrub._position == 0
        scrub.work(started, 5000, store.flushed_offset)
        await eventually(lambda: not scrub._running)
        assert 5000 <= scrub._position < 8000
        while not scrub.pass_count:
            scrub.work(started + 1, 5000, store.flushed_offset)
            await eventually(lambda: not scrub._running)
        scrub.work(started + 2, 5000, store.flushed_offset)
        assert not scrub._running
        assert scrub._next_pass_at == started + PASS_INTERVAL_S


async def test_a_busy_store_is_left_alone() -> None:
    async with opened(new_disk(), small(scrub_bytes_per_s=1000, flush_interval_ms=60_000)) as store:
        store._scrub._next_pass_at = 0.0
        await send(store, batch(100, body=b"x" * 10_000))
        store._housekeeping._scrub_some(1.0)
        assert not store._scrub._running
        store._housekeeping._scrub_some(2.0)
        assert store._scrub._running or store._scrub._end > 0


async def test_segments_that_are_deleted_meanwhile() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(200, body=b"x" * 1000))
        await store._flush()
        scrub = store._scrub
        scrub.work(scrub._next_pass_at, 1000, store.flushed_offset)
        await eventually(lambda: not scrub._running)
        for _ in range(2):
            store._housekeeping.snapshot()
            await store._thread.drain()
            await send(store, batch(1))
        await store._retention._delete_below(store._log.segments[2].base, "test")
        await one_pass(store)
        assert store.damaged_record_count == 0
