"""Reads the whole log again, slowly, so that rot is found while a replica can still mend it.

The store's thread checks records a little at a time; the loop holds them against the consume queues and mends entries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

from kitemq.protocol.record import KIND_MESSAGE, tags_code
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.consume_queue import QueueTable
from kitemq_server.store.queue_reader import QueueReader
from kitemq_server.store.scan import find_record, read_records
from kitemq_server.store.store_thread import StoreThread

logger = logging.getLogger(__name__)

PASS_INTERVAL_S = 24 * 3600.0
FIRST_PASS_AFTER_S = 3600.0
_STEP_BYTES = 256 * 1024
_REPORTED_MAX = 10_000


class Seen(NamedTuple):
    """A good message record, as its consume queue entry should say."""

    topic: str
    queue_id: int
    queue_offset: int
    entry: tuple[int, int, int]


class Scrub:
    """One pass after another. Methods are the loop's, unless they say thread."""

    def __init__(
        self, reader: LogReader, queues: QueueTable, queue_reader: QueueReader, thread: StoreThread, now_s: float
    ) -> None:
        self._reader = reader
        self._queues = queues
        self._queue_reader = queue_reader
        self._thread = thread
        self._position = 0
        self._end = 0
        self._next_pass_at = now_s + FIRST_PASS_AFTER_S
        self._running = False
        self._reported: set[int] = set()
        self.pass_count = 0
        self.damaged_stretch_count = 0

    def work(self, now_s: float, byte_count: int, flushed_offset: int) -> None:
        """Checks up to `byte_count` more bytes of what is on disk, if a pass is due."""
        if self._running:
            return
        if self._position >= self._end:
            if now_s < self._next_pass_at:
                return
            self._next_pass_at = now_s + PASS_INTERVAL_S
            self._position = self._reader.log.start_offset
            self._end = flushed_offset
        self._running = True
        self._thread.run_steps(self._steps(max(byte_count, 1)))

    def _steps(self, byte_count: int) -> Iterator[None]:
        """Thread."""
        limit = min(self._position + byte_count, self._end)
        while self._position < limit:
            seen, self._position = self._check(self._position, min(limit, self._position + _STEP_BYTES))
            if seen:
                self._thread.post(self._compare, seen)
            yield
        self._thread.post(self._rest)

    def _check(self, position: int, limit: int) -> tuple[list[Seen], int]:
        """Thread: checks records that begin below `limit`; returns the messages and where to go on."""
        seen: list[Seen] = []
        segment = self._reader.log.segment_at(position)
        if segment is None:  # deleted meanwhile, or a missing range
            later = [segment.base for segment in self._reader.log.segments if segment.base > position]
            return seen, min(later, default=self._end)
        end = min(segment.end_offset, self._end)
        for record in read_records(self._reader, position, end):
            position = record.end_offset
            if record.kind == KIND_MESSAGE:
                message = record.message()
                entry = (record.physical_offset, len(record.data), tags_code(message.tag))
                seen.append(Seen(message.topic, record.queue_id, record.queue_offset, entry))
            if position >= limit:
                return seen, position
        if position < end:
            found = find_record(self._reader, position + 1, end)
            following = found.physical_offset if found is not None else end
            self._thread.post(self._damaged, position, following)
            return seen, following
        return seen, position

    def _damaged(self, start: int, end: int) -> None:
        if self._reader.log.start_offset <= start and start not in self._reported:
            if len(self._reported) < _REPORTED_MAX:
                self._reported.add(start)
            self.damaged_stretch_count += 1
            logger.error("commit log damaged: start=%d end=%d bytes=%d", start, end, end - start)

    def _compare(self, seen: list[Seen]) -> None:
        for topic, queue_id, queue_offset, entry in seen:
            queue = self._queues.get(topic, queue_id)
            if queue is None or not queue.min_offset <= queue_offset < queue.max_offset:
                continue
            if queue.entry(queue_offset) != entry and not self._queue_reader.is_sound(queue, queue_offset, entry):
                self._queue_reader.mend(queue, queue_offset, entry)

    def _rest(self) -> None:
        self._running = False
        if self._position >= self._end:
            self.pass_count += 1
