"""Consume queues that their files do not give back whole are made again from the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from kitemq.protocol.record import KIND_MESSAGE, RECORD_BYTES_MIN, tags_code
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.consume_queue import ENTRY, ConsumeQueue, QueueTable
from kitemq_server.store.record import Record
from kitemq_server.store.scan import read_range

logger = logging.getLogger(__name__)

_MEMORY_ENTRIES_MAX = 500_000
_NEIGHBOURS_MAX = 64
_SEARCH_BYTES_MAX = 4 * 1024 * 1024  # what a read may look through for one record


def check_queues(queues: QueueTable, log_start: int) -> list[ConsumeQueue]:
    """Raises the min offsets that a snapshot states to what the log still holds; returns the queues to be rebuilt."""
    broken = []
    for queue in queues:
        if queue.min_offset == queue.next_offset:
            continue
        first = queues.files.first_kept(queue.topic, queue.queue_id, queue.min_offset, queue.next_offset)
        there = first < queue.next_offset
        if not there or not queues.files.complete(queue.topic, queue.queue_id, first, queue.next_offset):
            broken.append(queue)
            continue
        entry = queue.entry(first)
        if entry is None or (first > queue.min_offset and entry[0] > log_start):
            broken.append(queue)  # its first files are gone, and not because the log is
        elif entry[0] < log_start:
            queue.min_offset = first
            queue.min_offset = queue.first_at_or_after(log_start)
        else:
            queue.min_offset = first
    return broken


def rebuild_queues(reader: LogReader, queues: Collection[ConsumeQueue], end: int, flush: Callable[[], None]) -> None:
    """Makes the entries of these queues again from the log up to `end`. flush: takes the tails out of memory."""
    for queue in queues:
        logger.warning("consume queue is rebuilt: topic=%s queue_id=%d", queue.topic, queue.queue_id)
    wanted = {(queue.topic, queue.queue_id): (queue, queue.next_offset) for queue in queues}
    for queue in queues:
        queue.cut(queue.min_offset)
    in_memory = 0
    for record in read_range(reader, reader.log.start_offset, end):
        if record.kind != KIND_MESSAGE:
            continue
        message = record.message()
        found = wanted.get((message.topic, record.queue_id))
        if found is None:
            continue
        queue = found[0]
        if queue.next_offset == queue.min_offset:
            queue.begin_at(record.queue_offset)
        entry = ENTRY.pack(record.physical_offset, len(record.data), tags_code(message.tag))
        queue.place(record.queue_offset, record.physical_offset, entry, 1)
        in_memory += 1
        if in_memory >= _MEMORY_ENTRIES_MAX:
            in_memory = 0
            flush()
    for queue, end_offset in wanted.values():
        if queue.next_offset < end_offset:
            if queue.next_offset == queue.min_offset:
                queue.begin_at(end_offset)
            queue.append_holes(end_offset, end)
        else:
            queue.cut(end_offset)
    flush()


def find_record(reader: LogReader, queue: ConsumeQueue, queue_offset: int) -> Record | None:
    """A record whose entry is wrong, searched for between its neighbours'."""
    before = _first_sound(queue, range(queue_offset - 1, queue.min_offset - 1, -1))
    after = _first_sound(queue, range(queue_offset + 1, queue.max_offset))
    start = before[0] + before[1] if before is not None else reader.log.start_offset
    end = after[0] if after is not None else reader.log.end_offset
    if not start < end <= start + _SEARCH_BYTES_MAX:
        return None
    for record in read_range(reader, start, end):
        here = record.queue_id == queue.queue_id and record.queue_offset == queue_offset
        if here and record.kind == KIND_MESSAGE and record.message().topic == queue.topic:
            return record
    return None


def _first_sound(queue: ConsumeQueue, offsets: range) -> tuple[int, int, int] | None:
    """The first entry, of a few, that may be right."""
    for queue_offset in offsets[:_NEIGHBOURS_MAX]:
        entry = queue.entry(queue_offset)
        if entry is not None and entry[1] >= RECORD_BYTES_MIN:
            return entry
    return None
