"""Repeated sends: stored once, answered with the first copy's offsets, also after a restart."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitemq_server.store import dedupe
from kitemq_server.store.batch import OffsetRun
from kitemq_server.store.config import FlushMode
from kitemq_server.store.dedupe import NEW, UNKNOWN, Dedupe, Stretch, Window
from tests.crash.crash_disk import CrashDisk
from tests.store.helpers import NOW_MS, TOPIC, batch, new_disk, opened, read_all, send, small, topic_deleted, topic_set

KEY = (7, TOPIC, 0)


def run(first: int, count: int, *, repeated: bool = False, unknown: bool = False, queue_id: int = 0) -> OffsetRun:
    return OffsetRun(first, count, repeated, unknown, queue_id)


def test_a_window_splits_a_batch_into_what_is_known_and_what_is_new() -> None:
    window = Window()
    window.record(1, 10, 100)
    window.record(11, 5, 200)  # another producer's messages came between
    window.record(20, 5, 205)
    assert window.split(1, 3) == [Stretch(0, 3, 100)]
    assert window.split(8, 6) == [Stretch(0, 3, 107), Stretch(3, 3, 200)]
    assert window.split(14, 8) == [Stretch(0, 2, 203), Stretch(2, 4, NEW), Stretch(6, 2, 205)]
    assert window.split(23, 4) == [Stretch(0, 2, 208), Stretch(2, 2, NEW)]


def test_runs_that_touch_in_sequence_and_offset_are_one() -> None:
    window = Window()
    for index in range(1000):
        window.record(index * 3 + 1, 3, index * 3)
    assert window.firsts == [1]
    assert window.counts == [3000]


def test_what_is_forgotten_is_unknown_and_not_new() -> None:
    window = Window()
    for index in range(dedupe.WINDOW_RUNS_MAX + 10):
        window.record(index * 2 + 1, 1, index * 100)
    assert len(window.firsts) == dedupe.WINDOW_RUNS_MAX
    assert window.floor == 19
    assert window.split(18, 4) == [Stretch(0, 2, UNKNOWN), Stretch(2, 1, NEW), Stretch(3, 1, 1000)]


def test_a_gap_that_is_filled_late_is_found_afterwards() -> None:
    window = Window()
    window.record(1, 1, 0)
    window.record(5, 1, 1)
    window.record(3, 1, 2)
    assert window.split(1, 5) == [
        Stretch(0, 1, 0),
        Stretch(1, 1, NEW),
        Stretch(2, 1, 2),
        Stretch(3, 1, NEW),
        Stretch(4, 1, 1),
    ]
    assert window.last_sequence == 5


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 6)), max_size=30), st.integers(1, 45), st.integers(1, 20))
def test_a_window_agrees_with_a_plain_dict(sends: list[tuple[int, int]], first: int, count: int) -> None:
    window = Window()
    stored: dict[int, int] = {}
    queue_offset = 0
    for sequence, length in sends:
        for stretch in window.split(sequence, length):
            if stretch.queue_offset == NEW:
                window.record(sequence + stretch.first_index, stretch.length, queue_offset)
                for index in range(stretch.length):
                    stored[sequence + stretch.first_index + index] = queue_offset
                    queue_offset += 1
    answers = {
        first + stretch.first_index + index: stretch.queue_offset + index if stretch.queue_offset >= 0 else None
        for stretch in window.split(first, count)
        for index in range(stretch.length)
    }
    assert answers == {sequence: stored.get(sequence) for sequence in range(first, first + count)}


def test_idle_windows_and_too_many_windows_go(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Dedupe()
    table.record((1, TOPIC, 0), 1, 1, 0, NOW_MS)
    table.record((2, TOPIC, 0), 1, 1, 1, NOW_MS + dedupe.WINDOW_IDLE_MS)
    assert table.window((1, TOPIC, 0)) is not None
    table.record((3, TOPIC, 0), 1, 1, 2, NOW_MS + dedupe.WINDOW_IDLE_MS + 1)
    assert table.window((1, TOPIC, 0)) is None
    assert table.window((2, TOPIC, 0)) is not None
    monkeypatch.setattr(dedupe, "WINDOWS_MAX", 2)
    table.record((2, TOPIC, 0), 2, 1, 3, NOW_MS + dedupe.WINDOW_IDLE_MS + 1)
    table.record((4, TOPIC, 0), 1, 1, 4, NOW_MS + dedupe.WINDOW_IDLE_MS + 1)
    assert table.window((3, TOPIC, 0)) is None  # longest unused
    assert table.window((2, TOPIC, 0)) is not None


def test_recent_ids_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedupe, "RECENT_IDS_MAX", 3)
    table = Dedupe()
    table.record_ids(TOPIC, ["a", "", "b", "c", "d"], 1, 10)
    assert table.find_id(TOPIC, "a") is None
    assert table.find_id(TOPIC, "") is None
    assert table.find_id(TOPIC, "d") == (1, 14)
    assert table.find_id("other", "d") is None


def test_a_table_comes_back_as_it_was() -> None:
    table = Dedupe()
    window = Window()
    for index in range(100):
        table.record(KEY, index * 2 + 1, 1, index, NOW_MS + index)
    table.record((9, TOPIC, 3), 5, 4, 77, NOW_MS)
    table.record_ids(TOPIC, ["a", "b"], 1, 10)
    other = Dedupe()
    other.restore(*table.capture())
    assert other.capture() == table.capture()
    found = other.window(KEY)
    assert found is not None
    assert found.floor > window.floor
    assert found.last_sequence == 199


async def test_a_repeat_is_answered_with_the_first_copy() -> None:
    async with opened(new_disk()) as store:
        store.append_change(topic_set())
        first = await send(store, batch(5, instance=7, sequence=1))
        await send(store, batch(5, instance=8, sequence=1))
        again = await send(store, batch(5, instance=7, sequence=1))
        assert again.runs == [[run(0, 5, repeated=True)]]
        assert again.end_offset == first.end_offset
        assert len(read_all(store)) == 10


async def test_only_the_new_rest_of_a_batch_is_appended() -> None:
    async with opened(new_disk()) as store:
        await send(store, batch(3, instance=7, sequence=1))
        await send(store, batch(1))
        receipt = await send(store, batch(5, instance=7, sequence=2, tags=["b", "c", "d", "e", "f"]))
        assert receipt.runs == [[run(1, 2, repeated=True), run(4, 3)]]
        assert receipt.end_offset == store.written_offset
        assert [found.sequence for found in read_all(store)] == [1, 2, 3, 0, 4, 5, 6]
        assert [found.sequence for found in read_all(store, tags=frozenset({"e"}))] == [5]


async def test_a_sequence_that_is_forgotten_is_not_stored_again() -> None:
    async with opened(new_disk()) as store:
        for index in range(dedupe.WINDOW_RUNS_MAX + 2):
            store.append([batch(1, instance=7, sequence=index * 2 + 1)])
            store.append([batch(1, instance=8, sequence=index + 1)])
        count = len(read_all(store))
        receipt = await send(store, batch(1, instance=7, sequence=1))
        assert receipt.runs == [[run(0, 1, repeated=True, unknown=True)]]
        assert receipt.end_offset == 0
        assert len(read_all(store)) == count


async def test_a_repeat_waits_for_the_first_copy() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        first = store.append([batch(2, instance=7, sequence=1)])
        again = store.append([batch(2, instance=7, sequence=1)])
        assert again.end_offset == first.end_offset
        assert not await store.wait_confirmed(again.end_offset, 0.01)
        stall.release()
        assert await store.wait_confirmed(again.end_offset, 10)


async def test_a_message_id_without_a_producer_is_stored_once_per_topic() -> None:
    async with opened(new_disk()) as store:
        store.append_change(topic_set())
        first = await send(store, batch(2, ids=["one", "two"], queue_id=2))
        again = await send(store, batch(2, ids=["two", "three"], queue_id=0))
        assert again.runs == [[run(1, 1, repeated=True, queue_id=2), run(0, 1)]]
        assert again.end_offset > first.end_offset
        other = await send(store, batch(1, topic="audit", ids=["two"]))
        assert other.runs == [[run(0, 1)]]


async def restarted(disk: CrashDisk, how: str) -> CrashDisk:
    rng = random.Random(3)
    return disk if how == "stop" else disk.kill(rng) if how == "kill" else disk.crash(rng)


@pytest.mark.parametrize("how", ["stop", "kill", "crash"])
async def test_a_repeat_is_known_after_a_restart(how: str) -> None:
    disk = new_disk()
    config = small(flush_mode=FlushMode.SYNC_FLUSH)
    survivor = disk
    async with opened(disk, config) as store:
        await send(store, batch(3, instance=7, sequence=1), batch(2, ids=["a", "b"], queue_id=1))
        store._housekeeping.snapshot()
        await send(store, batch(3, instance=7, sequence=4))
        if how != "stop":
            survivor = await restarted(disk, how)
    async with opened(survivor, config) as store:
        again = await send(store, batch(6, instance=7, sequence=1), batch(1, ids=["b"], queue_id=1))
        assert again.runs == [[run(0, 6, repeated=True)], [run(1, 1, repeated=True, queue_id=1)]]
        assert len(read_all(store)) == 6


async def test_a_topic_that_begins_anew_knows_no_repeats() -> None:
    async with opened(new_disk()) as store:
        store.append_change(topic_set())
        await send(store, batch(3, instance=7, sequence=1), batch(1, ids=["a"], queue_id=1))
        store.append_change(topic_deleted())
        store.append_change(topic_set())
        receipt = await send(store, batch(3, instance=7, sequence=1), batch(1, ids=["a"], queue_id=1))
        assert receipt.runs == [[run(0, 3)], [run(0, 1, queue_id=1)]]
