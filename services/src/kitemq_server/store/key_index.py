"""The key index: finds messages by id and by key. Derived from the log, applied only with what is confirmed.

The loop feeds it what was appended, one small entry for each request; the store's thread writes hours of it at a time.
When it cannot keep up, the feed is dropped and it catches up by reading the log, so its memory is bounded.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple
from uuid import UUID

from kitemq.protocol.record import KIND_MESSAGE
from kitemq_server.store.appender import Appended
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.index_buckets import Applied, BucketError, Buckets, Item
from kitemq_server.store.index_entries import (
    RUN_BYTES_MAX,
    Located,
    Run,
    id_items,
    id_items_of_batch,
    key_items,
    key_items_of_batch,
    run_of_append,
)
from kitemq_server.store.record import Record
from kitemq_server.store.scan import read_range
from kitemq_server.store.tables import EpochStart

logger = logging.getLogger(__name__)

BUCKET_S = 3600
_FEED_ENTRIES_MAX = 250_000
_ITEMS_PER_TRANSACTION = 4_000
_CATCH_UP_BYTES = 1024 * 1024  # read per step of the thread
_APPLIED_SLACK_BYTES = 64 * 1024 * 1024  # how far a log without messages may run ahead of what is noted


class Fed(NamedTuple):
    """One append, as the index needs it. Offsets are physical.

    run: the entry for all ids. unnamed: batches whose ids are not in it. keyed: batches with keys.
    """

    timestamp_ms: int
    start: int
    end: int
    run: Run | None
    unnamed: Sequence[Appended]
    keyed: Sequence[Appended]

    @property
    def entry_count(self) -> int:
        """How much it holds, about."""
        return 1 + sum(len(batch.message_ids) for batch in chain(self.unnamed, self.keyed))

    def items(self) -> Iterator[Item]:
        """Its index entries."""
        if self.run is not None:
            yield self.run.item()
        for batch in self.unnamed:
            yield from id_items_of_batch(batch)
        for batch in self.keyed:
            yield from key_items_of_batch(batch)


def bucket_of(timestamp_ms: int) -> int:
    """The bucket of a store timestamp: Unix seconds of the beginning of its hour."""
    return timestamp_ms // 1000 // BUCKET_S * BUCKET_S


class KeyIndex:
    """The index of one store. Methods are the loop's unless they say thread. feed_from: where appends begin."""

    def __init__(self, buckets: Buckets, *, store_uuid: str, thread_reader: LogReader, feed_from: int) -> None:
        self.buckets = buckets
        self._store_uuid = UUID(store_uuid).bytes
        self._thread_reader = thread_reader
        self._feed: deque[Fed] = deque()
        self._fed_entries = 0
        self._feed_from = feed_from  # all appends from here on are, or were, in the feed
        self._running = False
        self._taken: Sequence[Fed] = ()  # on the way into the buckets
        self._failed = False
        self._stopping = False
        self.applied_offset = 0  # everything below is in the buckets; the thread's
        self._noted_offset = 0
        self._newest_bucket = 0
        self._epochs: Sequence[EpochStart] = ()

    def open(self, end_offset: int, epochs: Sequence[EpochStart]) -> None:
        """Thread: finds out how far the index has come. Buckets of another store, or behind a lost one, go."""
        self._epochs = epochs
        good: Applied | None = None
        for bucket in self.buckets.names():
            applied = self.buckets.applied(bucket)
            if applied is None or applied.store_uuid != self._store_uuid or not self._follows(applied, good):
                self._drop_from(bucket)
                break
            self._newest_bucket = bucket
            good = applied
        if good is not None:
            self.applied_offset = min(self._reaches(good), end_offset)
            self._noted_offset = self.applied_offset

    def _follows(self, applied: Applied, before: Applied | None) -> bool:
        if before is None:  # the oldest: what came before it has been deleted with the log, or is lost
            return applied.previous_bucket == 0 or applied.previous_offset <= self._thread_reader.log.start_offset
        return applied.previous_bucket == self._newest_bucket and self._reaches(before) >= applied.previous_offset

    def _reaches(self, applied: Applied) -> int:
        """How far a bucket speaks of this log: behind the end of its epoch there may be another history now."""
        return min(applied.physical_offset, self._epoch_end(applied.epoch))

    def _drop_from(self, bucket: int) -> None:
        for name in self.buckets.names():
            if name >= bucket:
                self.buckets.drop(name)

    def _epoch_end(self, epoch: int) -> int:
        """Where an epoch's bytes end. The log may have been cut there, and another epoch begun."""
        starts = [start for start in self._epochs if start.epoch > epoch]
        return min((start.first_physical_offset for start in starts), default=1 << 63)

    def _epoch_at(self, physical_offset: int) -> int:
        index = bisect_right(self._epochs, physical_offset, key=lambda start: start.first_physical_offset) - 1
        return self._epochs[index].epoch if index >= 0 else 0

    # ---- the feed

    def add(self, timestamp_ms: int, start: int, end: int, appended: Sequence[Appended]) -> None:
        """An append with messages, from `start` up to `end`."""
        run = run_of_append(start, end, appended)
        unnamed = appended if run is None else ()
        fed = Fed(timestamp_ms, start, end, run, unnamed, [batch for batch in appended if batch.keys])
        self._feed.append(fed)
        self._fed_entries += fed.entry_count
        if self._fed_entries > _FEED_ENTRIES_MAX:
            self._feed.clear()
            self._fed_entries = 0
            self._feed_from = end

    def waiting(self, confirm_offset: int) -> Iterator[Fed]:
        """What is confirmed and not in the buckets yet, newest first."""
        return (fed for fed in chain(reversed(self._feed), reversed(self._taken)) if fed.end <= confirm_offset)

    def work(self, confirm_offset: int, run_steps: Callable[[Iterator[None]], None]) -> None:
        """Hands what is confirmed to the thread, unless it is still busy."""
        if self._running or confirm_offset <= self.applied_offset:
            return
        if self._failed and self._taken:
            self._feed_from = max(self._feed_from, self._taken[-1].end)
        taken: list[Fed] = []
        while self._feed and self._feed[0].end <= confirm_offset:
            fed = self._feed.popleft()
            self._fed_entries -= fed.entry_count
            taken.append(fed)
        target = min(confirm_offset, self._feed[0].start) if self._feed else confirm_offset
        self._running = True
        self._failed = False
        self._taken = taken
        run_steps(self._steps(taken, min(self._feed_from, target), target))

    def _steps(self, taken: list[Fed], catch_up_to: int, target: int) -> Iterator[None]:
        """Thread: indexes what the feed lost, then what it holds."""
        try:
            while self.applied_offset < catch_up_to:
                if self._stopping:
                    return
                self._catch_up(catch_up_to)
                yield
            index = 0
            while index < len(taken):
                index = self._apply(taken, index)
                yield
            self.applied_offset = max(self.applied_offset, target)
            if self.applied_offset - self._noted_offset > _APPLIED_SLACK_BYTES and self._newest_bucket:
                self._write(self._newest_bucket, (), self.applied_offset)
            self._taken = ()
        except BucketError as error:
            logger.warning("key index is behind, it catches up later: %s", error)
            self._failed = True
        finally:
            self._running = False

    def _apply(self, taken: list[Fed], index: int) -> int:
        """Thread: one transaction from the feed; returns the index of the first append that is not in it."""
        bucket = max(bucket_of(taken[index].timestamp_ms), self._newest_bucket)
        items: list[Item] = []
        while index < len(taken) and len(items) < _ITEMS_PER_TRANSACTION:
            fed = taken[index]
            if bucket_of(fed.timestamp_ms) > bucket:
                break
            if fed.end > self.applied_offset:  # again in part is no harm: the entries are the same
                items += fed.items()
            index += 1
        self._write(bucket, items, taken[index - 1].end)
        return index

    def _catch_up(self, end: int) -> None:
        """Thread: indexes some of the log from where the index has come to, by reading it."""
        position = max(self.applied_offset, self._thread_reader.log.start_offset)
        limit = min(end, position + _CATCH_UP_BYTES)
        items: list[Item] = []
        run: list[Located] = []
        bucket = 0
        for record in read_range(self._thread_reader, position, end):
            if bucket == 0:
                bucket = max(bucket_of(record.store_timestamp_ms), self._newest_bucket)
            if record.physical_offset >= limit or bucket_of(record.store_timestamp_ms) > bucket:
                position = record.physical_offset
                break
            position = record.end_offset
            if record.kind == KIND_MESSAGE:
                items += self._items_of_record(record, run)
        else:
            position = max(position, end)
        if run:
            items += id_items(run)
        if items:
            self._write(bucket, items, position)
        self.applied_offset = position

    def _items_of_record(self, record: Record, run: list[Located]) -> Iterator[Item]:
        message = record.message()
        located = Located(message.message_id, record.physical_offset, len(record.data))
        if run and not _continues(run, located):
            yield from id_items(run)
            run.clear()
        run.append(located)
        yield from key_items(message.topic, message.keys, record.physical_offset)

    def _write(self, bucket: int, items: Iterable[Item], applied_offset: int) -> None:
        before = self.buckets.applied(bucket) if bucket == self._newest_bucket else None
        previous = (self._newest_bucket, self._noted_offset) if before is None else before[3:]
        epoch = self._epoch_at(applied_offset - 1)
        self.buckets.write(bucket, items, Applied(self._store_uuid, applied_offset, epoch, *previous))
        self._newest_bucket = bucket
        self.applied_offset = self._noted_offset = applied_offset

    def drop_below(self, physical_offset: int) -> None:
        """Thread: buckets all of whose records have been deleted go; the newest stays."""
        for bucket in self.buckets.names()[:-1]:
            applied = self.buckets.applied(bucket)
            if applied is not None and applied.physical_offset > physical_offset:
                return
            self.buckets.drop(bucket)

    def stop(self) -> None:
        """What is far behind is left to the next start."""
        self._stopping = True

    def close(self) -> None:
        """After the thread's end."""
        self.buckets.close()


def _continues(run: Sequence[Located], located: Located) -> bool:
    """Whether a message may share the run's entry."""
    first = run[0]
    return (
        located.physical_offset + located.size - first.physical_offset <= RUN_BYTES_MAX
        and located.message_id[:16] == first.message_id[:16]
    )
