"""Finding messages by id and key: at once, after a restart, far behind, over buckets, in both kinds of store."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitemq_server.store import index_entries, key_index
from kitemq_server.store.config import FlushMode
from kitemq_server.store.index_buckets import Applied, BucketError, Buckets, LmdbBuckets, MemoryBuckets
from kitemq_server.store.index_entries import Run, parse_run, run_bounds, run_of
from kitemq_server.store.message_store import MessageStore
from tests.store.helpers import NOW_MS, Clock, batch, new_disk, opened, send, small, topic_set
from tests.waiting import eventually

HOUR_MS = 3_600_000
INSTANCE = 0xABCDEF


@pytest.fixture(params=["lmdb", "memory"])
def new_buckets(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Buckets]:
    """The same buckets again, as a restart finds them (LMDB), or empty ones."""
    return (lambda: LmdbBuckets(tmp_path / "index")) if request.param == "lmdb" else MemoryBuckets


def sdk_id(count: int) -> str:
    return f"{INSTANCE:016x}{count:016x}"


async def indexed(store: MessageStore) -> None:
    """Everything confirmed is in the buckets."""

    def done() -> bool:
        store._housekeeping.index()
        return store._index.applied_offset >= store.confirm_offset

    await eventually(done)


def found_body(store: MessageStore, message_id: str) -> bytes | None:
    record = store.find_by_id(message_id)
    return None if record is None else record.message().body


async def test_ids_are_found_at_once_and_when_written(new_buckets: Callable[[], Buckets]) -> None:
    async with opened(new_disk(), buckets=new_buckets()) as store:
        store.append_change(topic_set())
        await send(
            store,
            batch(5, instance=INSTANCE, sequence=1, body=b"one"),
            batch(5, instance=INSTANCE, sequence=6, body=b"two", queue_id=1),
        )
        await send(store, batch(2, ids=["mine", "yours"], body=b"three"))
        for _ in range(2):
            assert found_body(store, sdk_id(1)) == b"one"
            assert found_body(store, sdk_id(10)) == b"two"
            assert found_body(store, sdk_id(11)) is None
            assert found_body(store, "yours") == b"three"
            assert found_body(store, "nobody") is None
            assert found_body(store, "") is None
            await indexed(store)
        assert not list(store._index.waiting(store.confirm_offset))


async def test_keys_are_found_newest_first_within_times(new_buckets: Callable[[], Buckets]) -> None:
    clock = Clock()
    async with opened(new_disk(), clock=clock, buckets=new_buckets()) as store:
        store.append_change(topic_set())
        for index in range(6):
            clock.now_ms = NOW_MS + index * HOUR_MS
            await send(store, batch(2, body=b"%d" % index, keys=[["k", "even"], ["k"]], ids=[f"a{index}", f"b{index}"]))

        def bodies_of(key: str, **options: int) -> list[bytes]:
            return [record.message().body for record in store.find_by_key("orders", key, **options)]

        for _ in range(2):
            assert bodies_of("even") == [b"5", b"4", b"3", b"2", b"1", b"0"]
            assert bodies_of("k", count_max=3) == [b"5", b"5", b"4"]
            within = {"begin_ms": NOW_MS + HOUR_MS, "end_ms": NOW_MS + 3 * HOUR_MS}
            assert bodies_of("even", **within) == [b"2", b"1"]
            assert bodies_of("odd") == []
            assert store.find_by_key("audit", "k") == []
            await indexed(store)
        assert len(store._index.buckets.names()) == 6


async def test_only_what_is_confirmed_is_found(new_buckets: Callable[[], Buckets]) -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH), buckets=new_buckets()) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        receipt = store.append([batch(1, ids=["a"], keys=[["k"]])])
        assert store.find_by_id("a") is None
        assert store.find_by_key("orders", "k") == []
        stall.release()
        assert await store.wait_confirmed(receipt.end_offset, 10)
        assert store.find_by_id("a") is not None
        assert len(store.find_by_key("orders", "k")) == 1


@pytest.mark.parametrize("how", ["stop", "kill", "lost"])
async def test_a_restart_indexes_what_is_missing(tmp_path: Path, how: str) -> None:
    disk = new_disk()
    clock = Clock()
    survivor = disk
    async with opened(disk, clock=clock, buckets=LmdbBuckets(tmp_path / "index")) as store:
        store.append_change(topic_set())
        for index in range(5):
            clock.now_ms = NOW_MS + index * HOUR_MS
            await send(store, batch(3, instance=INSTANCE, sequence=1 + 3 * index, keys=[["k"]] * 3))
            if index == 2:
                await indexed(store)
        if how != "stop":
            survivor = disk.kill(random.Random(1))
    buckets = LmdbBuckets(tmp_path / "index")
    if how == "lost":
        buckets.drop(buckets.names()[1])
    async with opened(survivor, clock=clock, buckets=buckets) as store:
        if how == "lost":
            assert len(buckets.names()) == 1  # what came behind the lost one is made again
        await indexed(store)
        assert len(store.find_by_key("orders", "k")) == 15
        assert all(found_body(store, sdk_id(count)) is not None for count in range(1, 16))
        assert len(buckets.names()) == 5


async def test_buckets_of_another_store_are_not_believed(tmp_path: Path) -> None:
    for _ in range(2):
        async with opened(new_disk(), buckets=LmdbBuckets(tmp_path / "index")) as store:
            await send(store, batch(3, instance=INSTANCE, sequence=1))
            await indexed(store)
            assert found_body(store, sdk_id(2)) is not None


async def test_an_index_that_falls_behind_catches_up_by_reading_the_log(
    new_buckets: Callable[[], Buckets], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_index, "_FEED_ENTRIES_MAX", 10)
    monkeypatch.setattr(key_index, "_CATCH_UP_BYTES", 3000)
    async with opened(new_disk(), buckets=new_buckets()) as store:
        store.append_change(topic_set())
        for index in range(50):
            store.append([batch(4, instance=INSTANCE, sequence=1 + 4 * index, queue_id=index % 3)])
        store.append([batch(3, ids=["x", "y", "z"], keys=[["k"]] * 3)])
        assert found_body(store, sdk_id(5)) is None
        await indexed(store)
        assert all(found_body(store, sdk_id(count)) is not None for count in range(1, 201))
        assert found_body(store, "z") is not None
        assert len(store.find_by_key("orders", "k")) == 3


async def test_a_bucket_that_cannot_be_written_is_written_later() -> None:
    class Failing(MemoryBuckets):
        failures = 2

        def write(self, bucket: int, items: object, applied: Applied) -> None:
            if self.failures:
                self.failures -= 1
                raise BucketError("no space")
            super().write(bucket, items, applied)  # type: ignore[arg-type]

    async with opened(new_disk(), buckets=Failing()) as store:
        await send(store, batch(3, instance=INSTANCE, sequence=1))
        await indexed(store)
        assert found_body(store, sdk_id(3)) is not None
        assert not store.failed.done()


async def test_long_runs_are_cut_to_what_a_look_up_may_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_entries, "RUN_BYTES_MAX", 3000)
    async with opened(new_disk()) as store:
        await send(store, batch(40, instance=INSTANCE, sequence=1, body=b"x" * 500))
        await indexed(store)
        items = store._index.buckets.scan_back(store._index.buckets.names()[0], b"r", b"s", 1000)
        runs = [parse_run(item) for item in items]
        assert len(runs) > 5
        assert all(run is not None and run.end - run.start <= 3000 for run in runs)
        assert all(found_body(store, sdk_id(count)) is not None for count in range(1, 41))


def test_runs_are_only_made_of_ids_of_one_producer() -> None:
    assert run_of(0, 100, [sdk_id(3), sdk_id(9), sdk_id(4)]) == Run(0, 100, f"{INSTANCE:016x}", 3, 9)
    assert run_of(0, 100, [sdk_id(3), sdk_id(4)[:-1]]) is None
    assert run_of(0, 100, [sdk_id(3), f"{INSTANCE + 1:016x}{1:016x}"]) is None
    assert run_of(0, 100, [sdk_id(3).upper()]) is None
    assert run_of(0, 10**9, [sdk_id(3), sdk_id(4)]) is None
    assert run_of(0, 10**9, [sdk_id(3)]) is not None


counts = st.integers(0, 2**64 - 1)


@given(start=st.integers(0, 2**40), length=st.integers(0, 2**24), producer=counts, low=counts, high=counts)
def test_a_run_says_what_its_entry_says(start: int, length: int, producer: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    run = Run(start, start + length, f"{producer:016x}", low, high)
    item = run.item()
    assert parse_run(item) == run
    for count in (low, high):
        begin, end = run_bounds(f"{producer:016x}{count:016x}")
        assert begin <= item[0] < end


def test_buckets_give_back_what_was_written(new_buckets: Callable[[], Buckets]) -> None:
    buckets = new_buckets()
    applied = Applied(b"u" * 16, 100, 1, 0, 0)
    keys = [b"k%03d" % index for index in range(100)]
    random.Random(2).shuffle(keys)
    buckets.write(7200, [(key, key[1:]) for key in keys[:50]], applied)
    buckets.write(7200, [(key, key[1:]) for key in keys[50:]], applied._replace(physical_offset=200))
    assert buckets.names() == [7200]
    found = buckets.applied(7200)
    assert found is not None
    assert found.physical_offset == 200
    assert [key for key, _ in buckets.scan_back(7200, b"k010", b"k015", 10)] == [
        b"k%03d" % n for n in (14, 13, 12, 11, 10)
    ]
    assert buckets.scan_back(7200, b"k010", b"k015", 2) == [(b"k014", b"014"), (b"k013", b"013")]
    assert buckets.scan_back(7200, b"x", b"y", 10) == []
    assert buckets.scan_back(3600, b"k", b"l", 10) == []
    buckets.drop(7200)
    buckets.drop(7200)
    assert buckets.names() == []
    assert buckets.scan_back(7200, b"k", b"l", 10) == []
    buckets.close()


def test_an_lmdb_bucket_that_cannot_be_read_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "3600").mkdir()
    (tmp_path / "3600" / "data.mdb").write_bytes(b"not a database" * 1000)
    buckets = LmdbBuckets(tmp_path)
    assert buckets.names() == [3600]
    assert buckets.applied(3600) is None
    assert buckets.scan_back(3600, b"a", b"z", 10) == []
    with pytest.raises(BucketError):
        buckets.write(3600, [], Applied(b"u" * 16, 100, 1, 0, 0))
    buckets.drop(3600)
    buckets.write(3600, [(b"k", b"")], Applied(b"u" * 16, 100, 1, 0, 0))
    assert buckets.applied(3600) is not None
    buckets.close()


def test_no_more_environments_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitemq_server.store.index_buckets._ENVIRONMENTS_MAX", 3)
    buckets = LmdbBuckets(tmp_path)
    for index in range(1, 10):
        buckets.write(index * 3600, [(b"k%d" % index, b"")], Applied(b"u" * 16, index, 1, 0, 0))
    assert [bool(buckets.scan_back(bucket, b"k", b"l", 1)) for bucket in buckets.names()] == [True] * 9
    assert len(buckets._environments) == 3
    buckets.close()
