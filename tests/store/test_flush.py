"""Flushes that meet appends, failures and a full disk."""

from __future__ import annotations

import errno

import pytest

from kitemq.errors import BrokerUnavailableError
from kitemq_server.store import log_writer
from kitemq_server.store.config import FlushMode
from tests.store.helpers import batch, new_disk, opened, read_all, send, small
from tests.waiting import eventually


async def test_what_is_appended_during_a_flush_is_covered_by_the_next() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        first = store.append([batch(1)])
        await eventually(stall.entered.is_set)
        second = store.append([batch(1)])
        assert not await store.wait_confirmed(first.end_offset, 0.01)  # and the loop does not hang
        stall.release()
        assert await store.wait_confirmed(second.end_offset, 20)


async def test_a_failure_behind_a_flush_that_succeeds_confirms_only_that_one() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        first = store.append([batch(1)])
        await eventually(stall.entered.is_set)
        second = store.append([batch(1)])
        await eventually(lambda: store._thread._urgent)
        disk.faults.fail("sync", part="commitlog")
        stall.release()
        with pytest.raises(BrokerUnavailableError):
            await store.wait_confirmed(second.end_offset, 20)
        assert store.confirm_offset == first.end_offset
        assert disk.faults.failed_count == 1  # it is not tried again


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
