"""Reads of queues: from a queue offset, with a filter, by time. Loop only."""

from __future__ import annotations

import logging
import struct
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate

from kitemq.protocol.names import RECORD_BYTES_MAX
from kitemq.protocol.record import (
    EPOCH_FROM_END,
    FRAME_BYTES,
    QUEUE_ID_FROM_END,
    RECORD_BYTES_MIN,
    U32,
    tags_code,
)
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.consume_queue import ENTRY_BYTES, ConsumeQueue
from kitemq_server.store.queue_repair import find_record
from kitemq_server.store.record import Record, check_record

logger = logging.getLogger(__name__)

SCAN_ENTRIES_MAX = 16_000  # that one filtered read looks at
_SCAN_STEP = 2_000
_RECORD_SIZE_MAX = RECORD_BYTES_MAX + FRAME_BYTES
_PLACE_AND_TIME = struct.Struct("<IxxQxxQxxQ")  # a trailer's queue id, queue offset, physical offset, store timestamp


class ReadStatus(IntEnum):
    """How a read ended; numbers as PullStatus on the wire."""

    FOUND = 0
    NO_NEW_MSG = 1
    NO_MATCHED_MSG = 2
    OFFSET_ILLEGAL = 3


@dataclass(slots=True)
class ReadResult:
    """What a read gave. Offsets are queue offsets; max_offset is the confirmed end, exclusive.

    next_offset: where to read on. sizes: of each framed record, packed as little-endian u32. records: the log's bytes,
    framed, side by side, as they are. sparse: filtered or damaged records are missing between the first record and
    the last. last_epoch: of the last record, 0 = none.
    """

    status: ReadStatus
    next_offset: int
    min_offset: int
    max_offset: int
    first_queue_offset: int = 0
    count: int = 0
    sizes: bytes = b""
    records: bytes = b""
    sparse: bool = False
    last_epoch: int = 0


@lru_cache(maxsize=4096)
def _codes(tags: frozenset[str]) -> frozenset[int]:
    return frozenset(map(tags_code, tags))


@lru_cache(maxsize=1024)
def _entries_struct(count: int) -> struct.Struct:
    return struct.Struct(">" + "QIQ" * count)


class QueueReader:
    """Reads records of queues through one LogReader.

    write_entry: called with a queue, an offset and the entry's bytes when an entry in a file has to be put right.
    """

    def __init__(self, reader: LogReader, write_entry: Callable[[ConsumeQueue, int, bytes], None]) -> None:
        self._reader = reader
        self._write_entry = write_entry
        self.damaged_record_count = 0
        self.mended_entry_count = 0

    def read(
        self,
        queue: ConsumeQueue,
        queue_offset: int,
        *,
        count_max: int,
        bytes_max: int,
        tags: frozenset[str] | None = None,
    ) -> ReadResult:
        """See MessageStore.read."""
        min_offset, max_offset = queue.min_offset, queue.max_offset
        if queue_offset < min_offset:
            return ReadResult(ReadStatus.OFFSET_ILLEGAL, min_offset, min_offset, max_offset)
        if queue_offset >= max_offset:
            status = ReadStatus.NO_NEW_MSG if queue_offset == max_offset else ReadStatus.OFFSET_ILLEGAL
            return ReadResult(status, max_offset, min_offset, max_offset)
        if tags is None:
            return self._read_all(queue, queue_offset, count_max, bytes_max)
        return self._read_filtered(queue, queue_offset, count_max, bytes_max, tags)

    # ---- without a filter

    def _read_all(self, queue: ConsumeQueue, first: int, count_max: int, bytes_max: int) -> ReadResult:
        wanted = min(count_max, queue.max_offset - first, SCAN_ENTRIES_MAX, bytes_max // RECORD_BYTES_MIN + 1)
        data = queue.entries(first, wanted)
        count = len(data) // ENTRY_BYTES
        if count == wanted:
            fields = _entries_struct(count).unpack(data)
            positions, sizes = fields[0::3], fields[1::3]
            ends = list(accumulate(sizes))
            if ends[-1] > bytes_max:
                count = max(1, bisect_right(ends, bytes_max))
                positions, sizes = positions[:count], sizes[:count]
            records = self._pread_runs(positions, sizes)
            if (
                len(records) == ends[count - 1]
                and 0 not in sizes
                and self._trusted(queue, first, count, records, sizes, positions)
            ):
                return ReadResult(
                    ReadStatus.FOUND,
                    first + count,
                    queue.min_offset,
                    queue.max_offset,
                    first,
                    count,
                    struct.pack(f"<{count}I", *sizes),
                    records,
                    False,
                    U32.unpack_from(records, len(records) - EPOCH_FROM_END)[0],
                )
        return self._read_singly(queue, range(first, first + wanted), first + wanted, count_max, bytes_max, None)

    def _pread_runs(self, positions: Sequence[int], sizes: Sequence[int]) -> bytes:
        """Bytes of these records; one pread for all that lie side by side."""
        pread = self._reader.pread
        out = []
        start = end = positions[0]
        for position, size in zip(positions, sizes, strict=True):
            if position != end:
                out.append(pread(start, end - start))
                start = position
            end = position + size
        out.append(pread(start, end - start))
        return out[0] if len(out) == 1 else b"".join(out)

    def _trusted(
        self,
        queue: ConsumeQueue,
        first: int,
        count: int,
        records: bytes,
        sizes: Sequence[int],
        positions: Sequence[int],
    ) -> bool:
        """Whether all records are known to be good, or have just been found to be."""
        end = first + count
        if first >= queue.trusted_offset or (queue.verified_from <= first and end <= queue.verified_to):
            return True
        at = 0
        for queue_offset, size, position in zip(range(first, end), sizes, positions, strict=True):
            record = check_record(records[at : at + size], position)
            if record is None or not _belongs(record, queue, queue_offset):
                return False
            at += size
        if first <= queue.verified_to and end >= queue.verified_from:
            queue.verified_from = min(first, queue.verified_from)
            queue.verified_to = max(end, queue.verified_to)
        else:
            queue.verified_from, queue.verified_to = first, end
        return True

    # ---- record by record: with a filter, or where something is damaged

    def _read_filtered(
        self, queue: ConsumeQueue, first: int, count_max: int, bytes_max: int, tags: frozenset[str]
    ) -> ReadResult:
        codes = _codes(tags)
        scan_end = min(queue.max_offset, first + SCAN_ENTRIES_MAX)
        matches: list[int] = []
        offset = first
        while offset < scan_end and len(matches) < count_max:
            step = min(_SCAN_STEP, scan_end - offset)
            data = queue.entries(offset, step)
            count = len(data) // ENTRY_BYTES
            fields = _entries_struct(count).unpack(data[: count * ENTRY_BYTES])
            matches += [
                offset + index for index, code in enumerate(fields[2::3]) if code in codes or not fields[3 * index]
            ]
            if count < step:  # the files lost entries: look at the records themselves
                matches += range(offset + count, offset + step)
            offset += step
        return self._read_singly(queue, matches, offset, count_max, bytes_max, tags)

    def _read_singly(
        self,
        queue: ConsumeQueue,
        offsets: Sequence[int],
        scanned_to: int,
        count_max: int,
        bytes_max: int,
        tags: frozenset[str] | None,
    ) -> ReadResult:
        """Reads the records at `offsets` that are good and match. scanned_to: where to go on when all are used up."""
        taken: list[Record] = []
        byte_count = 0
        next_offset = scanned_to
        for queue_offset in offsets:
            record = self.record(queue, queue_offset)
            if record is None or (tags is not None and record.message().tag not in tags):
                continue
            if taken and byte_count + len(record.data) > bytes_max:
                next_offset = queue_offset
                break
            taken.append(record)
            byte_count += len(record.data)
            if len(taken) == count_max:
                next_offset = queue_offset + 1
                break
        bounds = (next_offset, queue.min_offset, queue.max_offset)
        if not taken:
            return ReadResult(ReadStatus.NO_MATCHED_MSG, *bounds)
        first = taken[0].queue_offset
        return ReadResult(
            ReadStatus.FOUND,
            *bounds,
            first,
            len(taken),
            struct.pack(f"<{len(taken)}I", *(len(record.data) for record in taken)),
            b"".join(record.data for record in taken),
            taken[-1].queue_offset - first + 1 != len(taken),
            taken[-1].epoch,
        )

    def record(self, queue: ConsumeQueue, queue_offset: int) -> Record | None:
        """One record of a queue; None when it is lost or damaged, which is reported once."""
        if queue_offset in queue.damaged:
            return None
        entry = queue.entry(queue_offset)
        if entry is not None and is_hole(entry):
            return None
        record = self._record_of(queue, queue_offset, entry)
        if record is None and (record := find_record(self._reader, queue, queue_offset)) is not None:
            code = tags_code(record.message().tag)
            self.mend(queue, queue_offset, (record.physical_offset, len(record.data), code))
        if record is not None:
            return record
        queue.damaged.add(queue_offset)
        self.damaged_record_count += 1
        logger.error(
            "damaged record skipped: topic=%s queue_id=%d queue_offset=%d physical_offset=%s",
            queue.topic,
            queue.queue_id,
            queue_offset,
            entry[0] if entry is not None else "unknown",
        )
        return None

    def _record_of(self, queue: ConsumeQueue, queue_offset: int, entry: tuple[int, int, int] | None) -> Record | None:
        """The record that an entry leads to, if it is good and of this place in this queue."""
        if entry is None or not RECORD_BYTES_MIN <= entry[1] <= _RECORD_SIZE_MAX:
            return None
        record = check_record(self._reader.pread(entry[0], entry[1]), entry[0])
        return record if record is not None and _belongs(record, queue, queue_offset) else None

    def is_sound(self, queue: ConsumeQueue, queue_offset: int, seen: tuple[int, int, int]) -> bool:
        """Whether the entry leads to a good record, another one than `seen`, which is then of a former life."""
        entry = queue.entry(queue_offset)
        record = self._record_of(queue, queue_offset, entry)
        return record is not None and record.physical_offset != seen[0]

    def mend(self, queue: ConsumeQueue, queue_offset: int, entry: tuple[int, int, int]) -> None:
        """Puts a wrong entry right."""
        self.mended_entry_count += 1
        logger.warning(
            "consume queue entry mended: topic=%s queue_id=%d queue_offset=%d",
            queue.topic,
            queue.queue_id,
            queue_offset,
        )
        self._write_entry(queue, queue_offset, queue.mend(queue_offset, entry))

    # ---- by time

    def store_timestamp(self, queue: ConsumeQueue, queue_offset: int) -> int:
        """Store timestamp in ms of the record at `queue_offset`; 0 when there is none."""
        if not queue.min_offset <= queue_offset < queue.max_offset:
            return 0
        entry = queue.entry(queue_offset)
        if entry is not None and entry[1] >= RECORD_BYTES_MIN:
            data = self._reader.pread(entry[0] + entry[1] - QUEUE_ID_FROM_END, _PLACE_AND_TIME.size)
            if len(data) == _PLACE_AND_TIME.size:
                *place, stored = _PLACE_AND_TIME.unpack(data)
                if place == [queue.queue_id, queue_offset, entry[0]]:
                    return int(stored)
        # The entry is of a former life, or damaged: it is put right, if its record is there.
        record = self.record(queue, queue_offset)
        return record.store_timestamp_ms if record is not None else 0

    def search_timestamp(self, queue: ConsumeQueue, timestamp_ms: int) -> int:
        """First queue offset stored at or after `timestamp_ms`; max_offset when nothing is that young."""
        low, high = queue.min_offset, queue.max_offset
        while low < high:
            middle = (low + high) // 2
            at = middle
            stored = 0
            while at < high and not (stored := self.store_timestamp(queue, at)):
                at += 1  # lost records have no time: the next one stands for them
            if at == high or stored >= timestamp_ms:
                high = middle
            else:
                low = at + 1
        return low


def is_hole(entry: tuple[int, int, int]) -> bool:
    """A lost record's entry: no size, but a place. All zeros are no entry at all."""
    return entry[1] == 0 and entry[0] != 0


def _belongs(record: Record, queue: ConsumeQueue, queue_offset: int) -> bool:
    return record.queue_offset == queue_offset and record.queue_id == queue.queue_id
