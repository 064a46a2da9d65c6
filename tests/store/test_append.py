"""Appending: offsets, order, rolls, limits, and what can be seen when."""

from __future__ import annotations

import pytest

from kitemq.errors import InvalidMessageError
from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import KIND_ROLL, RECORD_BYTES_MIN
from kitemq_server.store.batch import OffsetRun
from kitemq_server.store.config import FlushMode
from kitemq_server.store.disk import RealDisk
from kitemq_server.store.record import ROLL_BYTES
from tests.store.helpers import (
    LAYOUT,
    ROOT,
    TOPIC,
    Clock,
    batch,
    bodies,
    message,
    new_disk,
    opened,
    queue_of,
    read_all,
    segment_bases,
    send,
    small,
    topic_set,
)


async def test_messages_get_consecutive_offsets_in_their_queues() -> None:
    async with opened(new_disk()) as store:
        store.append_change(topic_set())
        receipt = await send(store, batch(3, queue_id=0), batch(2, queue_id=1))
        assert receipt.runs == [[OffsetRun(0, 3, False, False, 0)], [OffsetRun(0, 2, False, False, 1)]]
        receipt = await send(store, batch(2, queue_id=1), batch(1, queue_id=0))
        assert receipt.runs == [[OffsetRun(2, 2, False, False, 1)], [OffsetRun(3, 1, False, False, 0)]]
        assert receipt.end_offset == store.written_offset == store.confirm_offset
        assert (queue_of(store, 0).max_offset, queue_of(store, 1).max_offset) == (4, 4)


async def test_two_batches_of_one_call_may_be_for_one_queue() -> None:
    async with opened(new_disk()) as store:
        receipt = await send(store, batch(2, body=b"a"), batch(2, body=b"b"))
        assert [run.first_queue_offset for runs in receipt.runs for run in runs] == [0, 2]
        assert bodies(store) == [b"a", b"a", b"b", b"b"]


async def test_the_trailer_tells_where_and_when() -> None:
    clock = Clock()
    async with opened(new_disk(), clock=clock) as store:
        start = store.written_offset
        await send(store, batch(1, queue_id=3, body=b"first"))
        clock.now_ms -= 5000  # the clock turns back, the log's time does not
        receipt = await send(store, batch(1, queue_id=3, body=b"second"))
        first, second = read_all(store, 3)
        assert first.body == b"first"
        assert first.physical_offset == start
        assert (first.queue_id, second.queue_id) == (3, 3)
        assert (first.queue_offset, second.queue_offset) == (0, 1)
        assert first.store_timestamp_ms == second.store_timestamp_ms == receipt.store_timestamp_ms
        assert first.epoch == second.epoch == store.epoch == 1
        assert first.record_kind == message_pb2.MESSAGE
        assert first.flushed_offset <= first.physical_offset


async def test_a_producer_cannot_pretend_to_be_the_trailer() -> None:
    async with opened(new_disk()) as store:
        forged = batch()
        forged.parts = [
            message(
                b"forged", record_kind=message_pb2.METADATA, queue_id=9, queue_offset=77, physical_offset=1, crc32c=5
            )
        ]
        await send(store, forged)
        (stored,) = read_all(store)
        assert stored.record_kind == message_pb2.MESSAGE
        assert (stored.queue_id, stored.queue_offset) == (0, 0)


async def test_parts_may_be_views() -> None:
    async with opened(new_disk()) as store:
        views = batch(2)
        views.parts = [memoryview(part) for part in views.parts]
        await send(store, views)
        assert len(read_all(store)) == 2


async def test_a_full_segment_rolls_at_the_exact_byte() -> None:
    """A record that ends where the ROLL record must begin still fits; one byte more does not."""
    config = small(segment_bytes=32 * 1024)
    for excess in (0, 1):
        disk = new_disk()
        async with opened(disk, config) as store:
            empty = len(batch(1, body=b"").parts[0]) + 3 + RECORD_BYTES_MIN  # 3: the body's key and length
            await send(store, batch(2, body=b"f" * 10_000))
            left = config.segment_bytes - ROLL_BYTES - store.written_offset
            await send(store, batch(1, body=b"g" * (left - empty + excess)))
            assert segment_bases(disk) == ([0] if excess == 0 else [0, store.written_offset - left - excess])
            await send(store, batch(1, body=b"h"))
            bases = segment_bases(disk)
            assert len(bases) == 2
            assert len(disk.files()[LAYOUT.segment(0)]) == bases[1]  # truncated to its last record
            if excess == 0:
                assert bases[1] == config.segment_bytes
            assert [body[:1] for body in bodies(store)] == [b"f", b"f", b"g", b"h"]
            roll = store.read_record(bases[1] - ROLL_BYTES)
            assert roll is not None
            assert roll.kind == KIND_ROLL


async def test_one_append_may_need_several_segments() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        receipt = await send(store, batch(100, body=b"x" * 3000), batch(3, queue_id=1))
        assert receipt.runs[0] == [OffsetRun(0, 100, False, False, 0)]
        assert len(segment_bases(disk)) == 5
        assert len(read_all(store)) == 100
    async with opened(disk) as store:
        assert len(read_all(store)) == 100
        assert len(read_all(store, 1)) == 3


async def test_every_sealed_segment_is_one_protobuf_message() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        store.append_change(topic_set())
        await send(store, batch(60, body=b"y" * 2000))
        *sealed, _active = segment_bases(disk)
        assert sealed
        messages = []
        for base in sealed:
            segment = message_pb2.Segment.FromString(disk.files()[LAYOUT.segment(base)])
            assert segment.records[-1].record_kind == message_pb2.ROLL
            messages += [record for record in segment.records if record.record_kind == message_pb2.MESSAGE]
        assert [record.queue_offset for record in messages] == list(range(len(messages)))


async def test_the_largest_record_fits_and_a_larger_one_is_refused() -> None:
    config = small()
    async with opened(new_disk(), config) as store:
        exact = batch(1, body=b"")
        overhead = len(message(b"z" * 15_000)) - 15_000 + RECORD_BYTES_MIN - 6
        exact.parts = [message(b"z" * (config.record_bytes_max - overhead))]
        before = store.written_offset
        receipt = await send(store, exact)
        assert receipt.end_offset - before == config.record_bytes_max + 6
        too_large = batch(2)
        too_large.parts = [message(b"fits"), message(b"z" * (config.record_bytes_max - overhead + 1))]
        with pytest.raises(InvalidMessageError, match="at most"):
            store.append([batch(1), too_large])
        assert store.written_offset == receipt.end_offset  # nothing of the call was appended
        assert len(read_all(store)) == 1


async def test_sync_flush_shows_nothing_that_is_not_on_disk() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        stall = disk.faults.stall("sync", part="commitlog")
        receipt = store.append([batch(2)])
        assert not await store.wait_confirmed(receipt.end_offset, 0.05)
        assert store.written_offset == receipt.end_offset
        assert queue_of_or_none(store) == 0
        stall.release()
        assert await store.wait_confirmed(receipt.end_offset, 10)
        assert store.flushed_offset >= receipt.end_offset
        assert queue_of_or_none(store) == 2


def queue_of_or_none(store: object) -> int:
    queue = store.queue(TOPIC, 0)  # type: ignore[attr-defined]
    return queue.max_offset if queue is not None else 0


async def test_one_flush_covers_everything_appended_while_the_one_before_ran() -> None:
    disk = new_disk()
    async with opened(disk, small(flush_mode=FlushMode.SYNC_FLUSH)) as store:
        flushes: list[float] = []
        store.fsync_observer = flushes.append
        stall = disk.faults.stall("sync", part="commitlog")
        ends = [store.append([batch(1)]).end_offset for _ in range(50)]
        stall.release()
        assert await store.wait_confirmed(ends[-1], 10)
        assert len(flushes) <= 3


async def test_the_listener_hears_of_every_queue_that_moved() -> None:
    async with opened(new_disk()) as store:
        heard: list[tuple[int, int]] = []
        store.confirmed_listener = lambda queues: heard.extend((queue.queue_id, queue.max_offset) for queue in queues)
        store.append([batch(2, queue_id=0), batch(1, queue_id=2)])
        assert heard == [(0, 2), (2, 1)]  # ASYNC_FLUSH: within the append
        store.append([batch(1, queue_id=2)])
        assert heard[2:] == [(2, 2)]


async def test_a_wait_for_something_old_or_for_too_long_ends() -> None:
    async with opened(new_disk()) as store:
        receipt = store.append([batch()])
        assert await store.wait_confirmed(receipt.end_offset, 0)
        assert not await store.wait_confirmed(receipt.end_offset + 1, 0.01)


async def test_a_store_on_a_real_disk(tmp_path: object) -> None:
    disk = RealDisk()
    config = small()
    async with opened(disk, config, root=tmp_path) as store:  # type: ignore[arg-type]
        store.append_change(topic_set())
        await send(store, batch(200, body=b"r" * 1000))
    async with opened(disk, config, root=tmp_path) as store:  # type: ignore[arg-type]
        assert len(read_all(store)) == 200
        assert store.recovery.records == 0  # a clean stop leaves nothing to read again
    assert tmp_path != ROOT
