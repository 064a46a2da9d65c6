"""Who flushes the log: the loop itself while the disk is quick, the thread else; and what is fatal in both."""

from __future__ import annotations

import errno
import random
import threading
import time

import pytest

from kitemq.errors import BrokerUnavailableError
from kitemq_server.store import log_writer
from kitemq_server.store.config import FlushMode
from kitemq_server.store.confirm import Confirmation
from kitemq_server.store.message_store import MessageStore
from tests.store.helpers import batch, bodies, new_disk, opened, read_all, send, small
from tests.waiting import eventually


class Flushes:
    """Who flushes the log of a store: threads' names, newest last. sleep_s: how slow the disk is."""

    def __init__(self, store: MessageStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[str] = []
        self.sleep_s = 0.0
        self.inline = threading.current_thread().name
        self._sync = store._writer._sync
        monkeypatch.setattr(store._writer, "_sync", self._watched)
        monkeypatch.setattr(log_writer, "QUICK_FLUSH_S", 0.2)  # a busy machine is not a slow disk
        store._writer._flush_s = 0.0  # it has been quick all day

    def _watched(self, target: int) -> None:
        self.threads.append(threading.current_thread().name)
        time.sleep(self.sleep_s)
        self._sync(target)


async def test_a_quick_disk_is_flushed_by_the_loop_and_a_slow_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(new_disk(), small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        flushes = Flushes(store, monkeypatch)
        await send(store, batch(1))
        assert flushes.threads == [flushes.inline]
        flushes.sleep_s = 0.25
        await send(store, batch(1))
        flushes.sleep_s = 0.0
        await send(store, batch(1))
        assert flushes.threads == [flushes.inline, flushes.inline, "store"]
        for _ in range(50):
            await send(store, batch(1))
            if flushes.threads[-1] == flushes.inline:
                break
        assert flushes.threads[-1] == flushes.inline  # it is believed again
        assert len(read_all(store)) == len(flushes.threads)
        store._writer._slow = True  # writes have become slow
        await send(store, batch(1))
        assert flushes.threads[-1] == "store"


async def test_a_new_disk_has_to_show_that_it_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(new_disk(), small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        believed = store._writer._flush_s
        flushes = Flushes(store, monkeypatch)
        monkeypatch.undo()
        monkeypatch.setattr(store._writer, "_sync", flushes._watched)
        store._writer._flush_s = believed
        await send(store, batch(1))
        assert flushes.threads == ["store"]


async def test_a_failed_fsync_by_the_loop_is_fatal_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        flushes = Flushes(store, monkeypatch)
        confirmed = (await send(store, batch(1, body=b"safe"))).end_offset
        disk.faults.fail("sync", part="commitlog")
        receipt = store.append([batch(1, body=b"doomed")])
        with pytest.raises(BrokerUnavailableError):
            await store.wait_confirmed(receipt.end_offset, 20)
        assert flushes.threads == [flushes.inline] * 2
        assert isinstance(await store.failed, OSError)
        await eventually(lambda: not store._thread._thread.is_alive())
        with pytest.raises(BrokerUnavailableError):
            store.append([batch(1)])
        assert store.confirm_offset == confirmed
        assert disk.faults.failed_count == 1  # it is not tried again
        assert bodies(store) == [b"safe"]
    assert flushes.threads == [flushes.inline] * 2
    async with opened(disk.kill(random.Random(0))) as store:
        assert bodies(store)[0] == b"safe"


async def test_the_loop_finds_that_a_flush_of_the_thread_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        flushes = Flushes(store, monkeypatch)
        confirmed = (await send(store, batch(1))).end_offset
        store._writer._flush_s = 1.0
        disk.faults.fail("sync", part="commitlog")
        store.append([batch(1)])
        store._thread._thread.join(10)  # it has failed, and the loop does not know yet
        store._writer._flush_s = 0.0
        store._writer.flush_soon()
        assert isinstance(await store.failed, OSError)
        assert store.confirm_offset == confirmed
        assert flushes.threads == [flushes.inline, "store"]


async def test_what_is_appended_while_the_thread_flushes_is_flushed_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        flushes = Flushes(store, monkeypatch)
        store._writer._flush_s = 1.0
        stall = disk.faults.stall("sync", part="commitlog")
        first = store.append([batch(1)])
        await eventually(stall.entered.is_set)
        store._writer._flush_s = 0.0
        second = store.append([batch(1)])
        assert not await store.wait_confirmed(first.end_offset, 0.01)  # and the loop does not hang
        stall.release()
        assert await store.wait_confirmed(second.end_offset, 20)
        assert flushes.threads == ["store", "store"]


async def test_a_failure_behind_a_flush_that_succeeds_confirms_only_that_one(monkeypatch: pytest.MonkeyPatch) -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        Flushes(store, monkeypatch)
        store._writer._flush_s = 1.0
        stall = disk.faults.stall("sync", part="commitlog")
        first = store.append([batch(1)])
        await eventually(stall.entered.is_set)
        store._writer._flush_s = 0.0
        second = store.append([batch(1)])
        await eventually(lambda: store._thread._urgent)  # the loop leaves it to the thread
        disk.faults.fail("sync", part="commitlog")
        stall.release()
        with pytest.raises(BrokerUnavailableError):
            await store.wait_confirmed(second.end_offset, 20)
        assert store.confirm_offset == first.end_offset
        assert disk.faults.failed_count == 1


async def test_a_store_that_closes_with_a_flush_by_the_loop_to_come() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        store._writer._flush_s = 0.0
        store.append([batch(3)])
    async with opened(disk.crash(random.Random(0))) as store:
        assert len(bodies(store)) == 3
        assert not store.recovery.records


def test_the_thread_says_late_how_far_it_had_flushed() -> None:
    confirmation = Confirmation(FlushMode.SYNC_FLUSH, 0)
    confirmation.flushed(200)
    confirmation.flushed(100)
    assert (confirmation.flushed_offset, confirmation.confirm_offset) == (200, 200)


async def test_a_segment_is_flushed_while_the_next_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "FULL_RETRY_S", 0.05)
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH, flush_interval_ms=10)) as store:
        for _ in range(5):
            await send(store, batch(10, body=b"x" * 1000))
        disk.faults.fail("directory", part="commitlog", error=errno.ENOSPC, count=3)
        receipt = store.append([batch(12, body=b"x" * 1000)])
        assert await store.wait_confirmed(receipt.end_offset, 20)
        assert len(store._log.segments) == 2
        assert store._log.segments[0].file is None
        assert len(read_all(store)) == 62
