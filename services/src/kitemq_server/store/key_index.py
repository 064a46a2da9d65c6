"""Finds messages by id and by key. Derived from the log, applied only with what is confirmed, hours at a time.

The loop feeds it what was appended; the store's thread writes it. When it cannot keep up, the feed is dropped and it
catches up by reading the log, so its memory is bounded.
"""

from __future__ import annotations

import logging
import re
import struct
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple
from uuid import UUID

from kitemq.protocol.record import KIND_MESSAGE
from kitemq_server.store.appender import Appended
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.consume_queue import ENTRY
from kitemq_server.store.index_buckets import Applied, BucketError, Buckets, Item
from kitemq_server.store.record import Record
from kitemq_server.store.scan import read_range
from kitemq_server.store.tables import EpochStart

logger = logging.getLogger(__name__)

BUCKET_S = 3600
FOUND_MAX = 64
_FEED_MESSAGES_MAX = 250_000
_RUN_BYTES_MAX = 256 * 1024  # what a look-up reads for one entry
_RUNS_TRIED_MAX = 1024
_ITEMS_PER_TRANSACTION = 4_000
_CATCH_UP_BYTES = 1024 * 1024  # read per step of the thread
_APPLIED_SLACK_BYTES = 64 * 1024 * 1024  # how far a log without messages may run ahead of what is noted

_OFFSET = struct.Struct(">Q")
_RUN_VALUE = struct.Struct(">IQ")
_SDK_ID = re.compile(r"[0-9a-f]{32}")
_SDK_ID_CHARS = 32
_HALF_CHARS = 16


class Fed(NamedTuple):
    """One append, as the index needs it. Offsets are physical."""

    timestamp_ms: int
    start: int
    end: int
    appended: Sequence[Appended]


class Located(NamedTuple):
    """One message to be indexed."""

    message_id: str
    physical_offset: int
    size: int


def bucket_of(timestamp_ms: int) -> int:
    """The bucket of a store timestamp: Unix seconds of the beginning of its hour."""
    return timestamp_ms // 1000 // BUCKET_S * BUCKET_S


def key_prefix(topic: str, key: str) -> bytes:
    """What all index entries of a topic's key begin with."""
    return b"k" + blake2b(b"%b\0%b" % (topic.encode(), key.encode()), digest_size=8).digest()


def id_prefix(message_id: str) -> bytes:
    """What all index entries of a single message id begin with."""
    return b"i" + blake2b(message_id.encode(), digest_size=8).digest()


def id_items(messages: Sequence[Located]) -> Iterator[Item]:
    """Index entries for the ids of messages that lie one behind the other."""
    ids = [message.message_id for message in messages]
    lowest, highest = min(ids), max(ids)
    first, last = messages[0], messages[-1]
    length = last.physical_offset + last.size - first.physical_offset
    # Of equal length and between two that begin alike, all begin alike.
    alike = lowest[:_HALF_CHARS] == highest[:_HALF_CHARS] and set(map(len, ids)) == {_SDK_ID_CHARS}
    if alike and _SDK_ID.fullmatch(lowest) and _SDK_ID.fullmatch(highest):
        if length <= _RUN_BYTES_MAX or len(messages) == 1:
            key = b"r" + bytes.fromhex(lowest) + _OFFSET.pack(first.physical_offset)
            yield key, _RUN_VALUE.pack(length, int(highest[_HALF_CHARS:], 16))
        else:
            middle = len(messages) // 2
            yield from id_items(messages[:middle])
            yield from id_items(messages[middle:])
        return
    for message in messages:
        yield id_prefix(message.message_id) + _OFFSET.pack(message.physical_offset), b""


class KeyIndex:
    """The index of one store. Methods are the loop's unless they say thread."""

    def __init__(
        self, buckets: Buckets, *, store_uuid: str, reader: LogReader, thread_reader: LogReader, feed_from: int
    ) -> None:
        self._buckets = buckets
        self._store_uuid = UUID(store_uuid).bytes
        self._reader = reader
        self._thread_reader = thread_reader
        self._feed: deque[Fed] = deque()
        self._fed_messages = 0
        self._feed_from = feed_from  # all appends from here on are, or were, in the feed
        self._running = False
        self._taken: Sequence[Fed] = ()  # on the way into the buckets
        self._failed = False
        self.applied_offset = 0  # everything below is in the buckets; the thread's
        self._noted_offset = 0
        self._newest_bucket = 0
        self._epochs: Sequence[EpochStart] = ()

    def open(self, end_offset: int, epochs: Sequence[EpochStart]) -> None:
        """Thread: finds out how far the index has come. Buckets of another store, or behind a lost one, go."""
        self._epochs = epochs
        good: Applied | None = None
        for bucket in self._buckets.names():
            applied = self._buckets.applied(bucket)
            if applied is None or applied.store_uuid != self._store_uuid or not self._follows(applied, good):
                self._drop_from(bucket)
                break
            self._newest_bucket = bucket
            good = applied
        if good is not None:
            self.applied_offset = min(good.physical_offset, end_offset, self._epoch_end(good.epoch))
            self._noted_offset = self.applied_offset

    def _follows(self, applied: Applied, before: Applied | None) -> bool:
        if before is None:
            return True
        return applied.previous_bucket == self._newest_bucket and before.physical_offset >= applied.previous_offset

    def _drop_from(self, bucket: int) -> None:
        for name in self._buckets.names():
            if name >= bucket:
                self._buckets.drop(name)

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
        self._feed.append(Fed(timestamp_ms, start, end, appended))
        self._fed_messages += sum(len(batch.message_ids) for batch in appended)
        if self._fed_messages > _FEED_MESSAGES_MAX:
            self._feed.clear()
            self._fed_messages = 0
            self._feed_from = end

    def work(self, confirm_offset: int, run_steps: Callable[[Iterator[None]], None]) -> None:
        """Hands what is confirmed to the thread, unless it is still busy."""
        if self._running or confirm_offset <= self.applied_offset:
            return
        if self._failed and self._taken:
            self._feed_from = max(self._feed_from, self._taken[-1].end)
        taken: list[Fed] = []
        while self._feed and self._feed[0].end <= confirm_offset:
            fed = self._feed.popleft()
            self._fed_messages -= sum(len(batch.message_ids) for batch in fed.appended)
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
                items += _items_of_append(fed)
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
        for key in message.keys:
            yield key_prefix(message.topic, key) + _OFFSET.pack(record.physical_offset), b""

    def _write(self, bucket: int, items: Iterable[Item], applied_offset: int) -> None:
        before = self._buckets.applied(bucket) if bucket == self._newest_bucket else None
        previous = (self._newest_bucket, self._noted_offset) if before is None else before[3:]
        epoch = self._epoch_at(applied_offset - 1)
        self._buckets.write(bucket, items, Applied(self._store_uuid, applied_offset, epoch, *previous))
        self._newest_bucket = bucket
        self.applied_offset = self._noted_offset = applied_offset

    def drop_below(self, physical_offset: int) -> None:
        """Thread: buckets all of whose records have been deleted go; the newest stays."""
        for bucket in self._buckets.names()[:-1]:
            applied = self._buckets.applied(bucket)
            if applied is not None and applied.physical_offset > physical_offset:
                return
            self._buckets.drop(bucket)

    def close(self) -> None:
        """After the thread's end."""
        self._buckets.close()

    # ---- look-ups

    def find_by_id(self, message_id: str, confirm_offset: int) -> Record | None:
        """The newest record below `confirm_offset` with this message id."""
        for physical_offset in self._fed_with(lambda batch, index: batch.message_ids[index] == message_id):
            record = self._reader.record_at(physical_offset)
            if record is not None and record.end_offset <= confirm_offset:
                return record
        prefix = id_prefix(message_id)
        for bucket in reversed(self._buckets.names()):
            for key, _ in self._buckets.scan_back(bucket, prefix, prefix + b"\xff" * 9, FOUND_MAX):
                record = self._reader.record_at(_OFFSET.unpack(key[-8:])[0])
                if record is not None and _has_id(record, message_id):
                    return record
            if _SDK_ID.fullmatch(message_id) and (record := self._find_in_runs(bucket, message_id)) is not None:
                return record
        return None

    def _find_in_runs(self, bucket: int, message_id: str) -> Record | None:
        wanted = bytes.fromhex(message_id)
        counter = int(message_id[_HALF_CHARS:], 16)
        low, high = b"r" + wanted[:8], b"r" + wanted + b"\xff" * 9
        for key, value in self._buckets.scan_back(bucket, low, high, _RUNS_TRIED_MAX):
            length, highest = _RUN_VALUE.unpack(value)
            if counter <= highest:
                start = _OFFSET.unpack(key[-8:])[0]
                kept = max(start, self._reader.log.start_offset)  # the run's first messages may have been deleted
                for record in read_range(self._reader, kept, start + length):
                    if record.kind == KIND_MESSAGE and _has_id(record, message_id):
                        return record
        return None

    def find_by_key(
        self, topic: str, key: str, confirm_offset: int, *, begin_ms: int, end_ms: int, count_max: int
    ) -> list[Record]:
        """Records below `confirm_offset` with this key, stored in [begin_ms, end_ms), newest first."""
        found: dict[int, Record] = {}

        def take(physical_offset: int) -> bool:
            record = self._reader.record_at(physical_offset)
            if record is not None and record.end_offset <= confirm_offset and record.kind == KIND_MESSAGE:
                message = record.message()
                in_time = begin_ms <= record.store_timestamp_ms < end_ms
                if in_time and message.topic == topic and key in message.keys:
                    found[physical_offset] = record
            return len(found) >= count_max

        def has_key(batch: Appended, index: int) -> bool:
            return batch.topic == topic and bool(batch.keys) and key in batch.keys[index]

        if any(map(take, self._fed_with(has_key))):
            return list(found.values())
        prefix = key_prefix(topic, key)
        for bucket in reversed(self._buckets.names()):
            if bucket * 1000 >= end_ms:
                continue
            if begin_ms >= (bucket + BUCKET_S) * 1000:
                break
            if self._take_bucket(bucket, prefix, take):
                break
        return list(found.values())

    def _take_bucket(self, bucket: int, prefix: bytes, take: Callable[[int], bool]) -> bool:
        high = prefix + b"\xff" * 9
        while items := self._buckets.scan_back(bucket, prefix, high, FOUND_MAX):
            for item_key, _ in items:
                if take(_OFFSET.unpack(item_key[-8:])[0]):
                    return True
            high = items[-1][0]
        return False

    def _fed_with(self, matches: Callable[[Appended, int], bool]) -> Iterator[int]:
        """Physical offsets of messages in the feed that match, newest first."""
        for fed in chain(reversed(self._feed), reversed(self._taken)):
            for batch in reversed(fed.appended):
                for index in reversed(range(len(batch.message_ids))):
                    if matches(batch, index):
                        yield ENTRY.unpack_from(batch.entries, index * ENTRY.size)[0]


def _items_of_append(fed: Fed) -> Iterator[Item]:
    located: list[Located] = []
    for batch in fed.appended:
        entries = list(ENTRY.iter_unpack(batch.entries))
        located += [
            Located(message_id, entry[0], entry[1])
            for message_id, entry in zip(batch.message_ids, entries, strict=True)
        ]
        for keys, entry in zip(batch.keys, entries, strict=False):  # no keys at all: nothing to do
            for key in keys:
                yield key_prefix(batch.topic, key) + _OFFSET.pack(entry[0]), b""
    yield from id_items(located)


def _continues(run: Sequence[Located], located: Located) -> bool:
    """Whether a message may share the run's entry."""
    first = run[0]
    return (
        located.physical_offset + located.size - first.physical_offset <= _RUN_BYTES_MAX
        and located.message_id[:_HALF_CHARS] == first.message_id[:_HALF_CHARS]
    )


def _has_id(record: Record, message_id: str) -> bool:
    return message_id.encode() in record.data and record.message().message_id == message_id
