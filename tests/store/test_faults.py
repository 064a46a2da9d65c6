"""A disk that is full, broken, slow or partly written: what is refused, what goes on, what is fatal."""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from kitemq.errors import BrokerBusyError, BrokerUnavailableError, StoreFullError
from kitemq_server.store.commit_log import Segment
from kitemq_server.store.config import FlushMode
from kitemq_server.store.errors import StoreOpenError
from kitemq_server.store.message_store import MessageStore
from kitemq_server.store.space import Space
from tests.crash.crash_disk import CrashDisk, CrashFile
from tests.store.helpers import LAYOUT, batch, bodies, new_disk, opened, read_all, send, small, topic_set
from tests.waiting import eventually


def full_disk(free_bytes: int) -> CrashDisk:
    disk = new_disk()
    disk.capacity_bytes = free_bytes
    return disk


class BadBlockDisk(CrashDisk):
    """Shares another disk's files; reads that touch one byte of the first segment fail."""

    def __init__(self, disk: CrashDisk, bad_position: int) -> None:
        super().__init__(disk.root)
        self._tree = disk._tree
        self._bad_position = bad_position

    def open(self, path: Path, *, create: bool = False) -> CrashFile:
        file = super().open(path, create=create)
        if path == LAYOUT.segment(0):
            pread = file.pread

            def fail(count: int, position: int) -> bytes:
                if position <= self._bad_position < position + count:
                    raise OSError(errno.EIO, "bad block")
                return pread(count, position)

            file.pread = fail  # type: ignore[method-assign]
        return file


async def fill(store: MessageStore) -> int:
    """Sends until the disk is full; returns how many messages were taken."""
    count = 0
    while True:
        try:
            store.append([batch(1, body=b"%06d" % count + b"f" * 994)])
        except StoreFullError as error:
            assert "broker-a" in str(error)
            assert "bytes are free" in str(error)
            assert "/store" not in str(error)
            assert error.retry_after_ms > 0
            return count
        count += 1


async def test_a_full_disk_refuses_sends_and_serves_the_rest() -> None:
    disk = full_disk(60_000)
    config = small(broker_name="broker-a", reserve_bytes=16_384, flush_interval_ms=10)
    async with opened(disk, config) as store:
        store.append_change(topic_set())
        count = await fill(store)
        assert count > 20
        assert store.full
        assert len(read_all(store)) == count
        # System records live on the reserve: offsets, topics, and the snapshot at the end.
        for index in range(30):
            store.append_change(topic_set(f"other{index}"))
        with pytest.raises(StoreFullError):
            store.append([batch()])
        disk.capacity_bytes = 1_000_000
        await eventually(lambda: not store.full)
        await send(store, batch(1, body=b"after"))
        assert len(read_all(store)) == count + 1
    async with opened(disk, config) as store:
        assert len(read_all(store)) == count + 1
        assert len(store.topics) == 31


async def test_a_full_disk_is_served_again_after_a_restart() -> None:
    disk = full_disk(50_000)
    config = small(broker_name="broker-a", reserve_bytes=16_384, flush_interval_ms=10)
    async with opened(disk, config) as store:
        count = await fill(store)
    disk.capacity_bytes -= disk.free_bytes(LAYOUT.root) - 3000  # somebody else took nearly all the rest
    async with opened(disk, config) as store:
        assert len(read_all(store)) == count
        with pytest.raises(StoreFullError):
            store.append([batch(10, body=b"x" * 1000)])
        disk.capacity_bytes = 1_000_000
        await eventually(lambda: not store.full)
        await send(store, batch())


def test_a_full_disk_stays_full_until_the_largest_record_fits() -> None:
    disk = full_disk(16_000)
    for directory in LAYOUT.directories():
        disk.mkdir(directory)
    file = disk.open(LAYOUT.segment(0), create=True)
    file.allocate(0, 4096)
    space = Space(disk, LAYOUT, small())
    space.mark_full()
    segment = Segment(0, 100, 4096, file)
    assert not space.recover(segment, 100)  # 11 KiB are free: small messages would fit
    assert space.full
    disk.capacity_bytes = 30_000
    assert space.recover(segment, 100)
    assert not space.full
    assert segment.allocated > 100 + small().record_bytes_max


async def test_a_write_that_finds_the_disk_full_after_all_waits_for_space() -> None:
    """Copy-on-write file systems run out of space within preallocated files too."""
    disk = new_disk()
    async with opened(disk, small(flush_interval_ms=10)) as store:
        disk.faults.fail("write", part="commitlog", error=errno.ENOSPC, count=3)
        receipt = store.append([batch(3)])
        assert not await store.wait_confirmed(receipt.end_offset, 0.01)
        assert store.full
        assert read_all(store) == []
        with pytest.raises(StoreFullError):
            store.append([batch()])
        assert await store.wait_confirmed(receipt.end_offset, 20)
        assert len(read_all(store)) == 3


@pytest.mark.parametrize("mode", FlushMode)
async def test_a_failed_write_is_fatal(mode: FlushMode) -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=mode)) as store:
        first = await send(store, batch(2))
        disk.faults.fail("write", part="commitlog")
        with pytest.raises(BrokerUnavailableError, match="its store has failed"):
            store.append([batch(1)])
        assert isinstance(await store.failed, OSError)
        with pytest.raises(BrokerUnavailableError):
            store.append([batch(1)])
        with pytest.raises(BrokerUnavailableError):
            await store.wait_confirmed(first.end_offset, 1)
        assert store.confirm_offset == first.end_offset
    async with opened(disk.kill(random.Random(0))) as store:
        assert len(bodies(store)) == 2


async def test_a_failed_fsync_is_fatal_and_nothing_is_confirmed_on_it() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        await send(store, batch(1, body=b"safe"))
        confirmed = store.confirm_offset
        disk.faults.fail("sync", part="commitlog")
        receipt = store.append([batch(1, body=b"doomed")])
        with pytest.raises(BrokerUnavailableError):
            await store.wait_confirmed(receipt.end_offset, 20)
        await store.failed
        assert store.confirm_offset == confirmed
        assert disk.faults.failed_count == 1  # it is not tried again
        assert len(bodies(store)) == 1
    async with opened(disk.kill(random.Random(0))) as store:
        assert bodies(store)[0] == b"safe"


async def test_waiters_hear_of_a_failure_at_once() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        receipt = store.append([batch()])
        await eventually(stall.entered.is_set)
        store.fail(OSError(errno.EIO, "injected"))
        with pytest.raises(BrokerUnavailableError):
            await store.wait_confirmed(receipt.end_offset, 60)
        stall.release()


async def test_short_writes_are_finished() -> None:
    disk = new_disk()
    disk.faults.shorten_writes(random.Random(5))
    async with opened(disk) as store:
        for index in range(20):
            await send(store, batch(3, body=b"%d" % index))
    async with opened(disk.crash(random.Random(5))) as store:
        assert len(bodies(store)) == 60


async def test_a_slow_disk_takes_writes_by_the_thread_and_keeps_their_order() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH, slow_disk_ms=1)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        store.append([batch(1, body=b"first")])
        await eventually(stall.entered.is_set)
        await eventually(store._writer._deferred)
        receipt = store.append([batch(40, body=b"second" * 500)])  # over a segment's end
        receipt = store.append([batch(1, body=b"third")])
        assert store.written_offset < receipt.end_offset
        assert bodies(store) == []
        stall.release()
        assert await store.wait_confirmed(receipt.end_offset, 20)
        assert [body[:5] for body in bodies(store)] == [b"first", *[b"secon"] * 40, b"third"]
        assert store._writer.pending_bytes == 0
        await send(store, batch(1, body=b"fourth"))


async def test_a_disk_that_stays_slow_makes_sends_come_back_later() -> None:
    disk = new_disk()
    config = small(slow_disk_ms=1, pending_bytes_max=20_000, flush_interval_ms=1)
    async with opened(disk, config) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        store.append([batch(1)])
        await eventually(stall.entered.is_set)
        await eventually(store._writer._deferred)
        count = 1
        with pytest.raises(BrokerBusyError) as refused:
            while True:
                store.append([batch(1, body=b"x" * 1000)])
                count += 1
        assert refused.value.retry_after_ms > 0
        assert 10 < count < 25
        stall.release()
        await eventually(lambda: store._writer.pending_bytes == 0)
        await send(store, batch(1))
        assert len(read_all(store)) == count + 1


async def test_what_the_thread_writes_late_is_flushed_without_another_append() -> None:
    disk = new_disk()
    config = small(flush_mode=FlushMode.SYNC_FLUSH, slow_disk_ms=1)
    async with opened(disk, config) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        store.append([batch(1)])
        await eventually(stall.entered.is_set)
        store._writer.flush_soon()  # a flush already waits behind the one that hangs
        await eventually(store._writer._deferred)
        receipt = store.append([batch(1)])
        stall.release()
        assert await store.wait_confirmed(receipt.end_offset, 20)


async def test_a_sealed_segment_stays_as_long_as_its_records() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(70, body=b"x" * 1000))
        sealed = store._log.segments[0]
        store._space.allocate(sealed, sealed.end_offset + 5000)  # the thread comes too late with its next step
        await store._flush()
        assert sealed.file is None
        assert len(disk.files()[LAYOUT.segment(0)]) == sealed.end_offset


async def test_a_batch_that_makes_no_sense_changes_nothing() -> None:
    async with opened(new_disk()) as store:
        odd = batch(2)
        odd.tags_codes = [0]
        before = store.written_offset
        with pytest.raises(AssertionError):
            store.append([batch(1), odd])
        assert store.written_offset == before
        await send(store, batch(1, body=b"fine"))
        assert bodies(store) == [b"fine"]


async def test_a_bug_in_the_middle_of_an_append_stops_the_store() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(1, body=b"good"))
        odd = batch(2)
        odd.parts = [odd.parts[0], "text"]  # type: ignore[list-item]
        with pytest.raises(BrokerUnavailableError):
            store.append([batch(1), odd])
        assert isinstance(await store.failed, TypeError)
    async with opened(disk.kill(random.Random(0))) as store:
        assert bodies(store) == [b"good"]


async def test_a_failed_write_by_the_thread_is_fatal_too() -> None:
    disk = new_disk()
    async with opened(disk, small(slow_disk_ms=1, flush_interval_ms=1)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        store.append([batch(1)])
        await eventually(stall.entered.is_set)
        await eventually(store._writer._deferred)
        receipt = store.append([batch(1)])
        disk.faults.fail("write", part="commitlog")
        stall.release()
        with pytest.raises(BrokerUnavailableError):
            await store.wait_confirmed(receipt.end_offset, 20)
        assert isinstance(await store.failed, OSError)


async def test_blocks_that_cannot_be_read_cost_only_their_records() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        ends = [(await send(store, batch(1, body=b"%d" % index * 3000))).end_offset for index in range(5)]
    async with opened(BadBlockDisk(disk, ends[1] + 2000)) as store:
        assert [body[:1] for body in bodies(store)] == [b"0", b"1", b"3", b"4"]
        assert store.damaged_record_count == 1


async def test_consume_queues_and_snapshots_that_cannot_be_read_are_done_without() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(5))
    disk.faults.fail("read", part="snapshot/", nth=2)  # the first lists the directory
    async with opened(disk) as store:
        assert len(bodies(store)) == 5
        assert store.recovery.records > 5
    async with opened(disk) as store:
        disk.faults.fail("read", part="consumequeue", count=2)
        assert len(bodies(store)) == 5  # found in the log
        assert store.damaged_record_count == 0


async def test_one_store_per_directory() -> None:
    disk = new_disk()
    async with opened(disk):
        with pytest.raises(StoreOpenError, match="in use"):
            async with opened(disk):
                pass
    async with opened(disk):
        pass


async def test_a_start_that_fails_leaves_the_directory_unlocked() -> None:
    disk = new_disk()
    disk.faults.fail("sync", part="store.json")
    with pytest.raises(OSError, match="Input/output"):
        async with opened(disk):
            pass
    async with opened(disk):
        pass


async def test_the_size_of_segments_is_fixed() -> None:
    disk = new_disk()
    async with opened(disk):
        pass
    with pytest.raises(StoreOpenError, match="segment_bytes=65536"):
        async with opened(disk, small(segment_bytes=128 * 1024)):
            pass


async def test_a_store_of_another_version_or_without_identity_is_not_touched() -> None:
    disk = new_disk()
    async with opened(disk):
        pass
    identity = disk.files()[LAYOUT.store_json]
    disk.overwrite(LAYOUT.store_json, identity.replace(b'"format_version": 1', b'"format_version": 9'))
    with pytest.raises(StoreOpenError, match="format version 9"):
        async with opened(disk):
            pass
    disk.overwrite(LAYOUT.store_json, b"{")
    with pytest.raises(StoreOpenError, match="not valid JSON"):
        async with opened(disk):
            pass
    disk.erase(LAYOUT.store_json)
    with pytest.raises(StoreOpenError, match="is missing"):
        async with opened(disk):
            pass


async def test_every_start_has_a_higher_epoch_even_when_its_record_is_lost() -> None:
    disk = new_disk()
    seen = []
    for _ in range(3):
        async with opened(disk) as store:
            seen.append(store.epoch)
    assert seen == [1, 2, 3]
    disk.erase(LAYOUT.commit_log)
    disk.erase(LAYOUT.snapshot)
    async with opened(disk) as store:
        assert store.epoch == 4
    disk.overwrite(LAYOUT.promised_epoch, b"17\n")
    async with opened(disk) as store:
        assert store.epoch == 18
    disk.overwrite(LAYOUT.promised_epoch, b"many\n")
    with pytest.raises(StoreOpenError, match="promised_epoch"):
        async with opened(disk):
            pass
