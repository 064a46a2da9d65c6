"""Look-ups by id and key: in what the key index has not written yet, then in its buckets, newest first. Loop only.

What an entry leads to counts only if the record there is confirmed and has the id or the key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kitemq.protocol.record import KIND_MESSAGE
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.consume_queue import ENTRY
from kitemq_server.store.index_entries import (
    Run,
    bounds,
    id_prefix,
    is_sdk_id,
    key_prefix,
    offset_of,
    parse_run,
    run_bounds,
)
from kitemq_server.store.key_index import BUCKET_S, KeyIndex
from kitemq_server.store.record import Record
from kitemq_server.store.scan import read_range

FOUND_MAX = 64
_RUNS_TRIED_MAX = 1024


class IndexSearch:
    """Searches of one store's index."""

    def __init__(self, index: KeyIndex, reader: LogReader) -> None:
        self._index = index
        self._buckets = index.buckets
        self._reader = reader

    def by_id(self, message_id: str, confirm_offset: int) -> Record | None:
        """The newest record below `confirm_offset` with this message id."""
        for record in self._candidates_by_id(message_id, confirm_offset):
            if record.end_offset <= confirm_offset and _has_id(record, message_id):
                return record
        return None

    def _candidates_by_id(self, message_id: str, confirm_offset: int) -> Iterator[Record]:
        for fed in self._index.waiting(confirm_offset):
            if fed.run is not None and fed.run.may_hold(message_id):
                yield from self._read(fed.run)
            for batch in fed.unnamed:
                for index, other in enumerate(batch.message_ids):
                    if other == message_id:
                        yield from self._record_at(ENTRY.unpack_from(batch.entries, index * ENTRY.size)[0])
        low, high = bounds(id_prefix(message_id))
        for bucket in reversed(self._buckets.names()):
            for key, _ in self._buckets.scan_back(bucket, low, high, FOUND_MAX):
                yield from self._record_at(offset_of(key))
            if is_sdk_id(message_id):
                for item in self._buckets.scan_back(bucket, *run_bounds(message_id), _RUNS_TRIED_MAX):
                    run = parse_run(item)
                    if run is not None and run.may_hold(message_id):
                        yield from self._read(run)

    def _read(self, run: Run) -> Iterator[Record]:
        start = max(run.start, self._reader.log.start_offset)  # its first messages may have been deleted
        return read_range(self._reader, start, run.end)

    def _record_at(self, physical_offset: int) -> Iterator[Record]:
        record = self._reader.record_at(physical_offset)
        if record is not None:
            yield record

    def by_key(
        self, topic: str, key: str, confirm_offset: int, *, begin_ms: int, end_ms: int, count_max: int
    ) -> list[Record]:
        """Records below `confirm_offset` with this key, stored in [begin_ms, end_ms), newest first."""
        found: dict[int, Record] = {}

        def take(physical_offset: int) -> bool:
            """True when there are enough."""
            record = self._reader.record_at(physical_offset)
            if record is not None and record.end_offset <= confirm_offset and record.kind == KIND_MESSAGE:
                message = record.message()
                in_time = begin_ms <= record.store_timestamp_ms < end_ms
                if in_time and message.topic == topic and key in message.keys:
                    found[physical_offset] = record
            return len(found) >= count_max

        if not any(map(take, self._waiting_with_key(topic, key, confirm_offset))):
            prefix = key_prefix(topic, key)
            for bucket in reversed(self._buckets.names()):
                if begin_ms >= (bucket + BUCKET_S) * 1000:
                    break
                if bucket * 1000 < end_ms and self._take_bucket(bucket, prefix, take):
                    break
        return list(found.values())

    def _waiting_with_key(self, topic: str, key: str, confirm_offset: int) -> Iterator[int]:
        for fed in self._index.waiting(confirm_offset):
            for batch in reversed(fed.keyed):
                if batch.topic == topic:
                    for index in reversed(range(len(batch.keys))):
                        if key in batch.keys[index]:
                            yield ENTRY.unpack_from(batch.entries, index * ENTRY.size)[0]

    def _take_bucket(self, bucket: int, prefix: bytes, take: Callable[[int], bool]) -> bool:
        low, high = bounds(prefix)
        while items := self._buckets.scan_back(bucket, low, high, FOUND_MAX):
            for item_key, _ in items:
                if take(offset_of(item_key)):
                    return True
            high = items[-1][0]
        return False


def _has_id(record: Record, message_id: str) -> bool:
    return (
        record.kind == KIND_MESSAGE and message_id.encode() in record.data and record.message().message_id == message_id
    )
