"""Reading the log record by record, and finding the next record behind damage."""

from __future__ import annotations

from collections.abc import Iterator

from kitemq.protocol.record import FRAME_BYTES, RECORD_BYTES_MIN
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.record import Record, check_framed, check_record, find_frames, record_bytes

CHUNK_BYTES = 4 * 1024 * 1024
_SIZES_MAX = 8192


def read_records(reader: LogReader, start: int, end: int) -> Iterator[Record]:
    """Checked records from `start` on, within one segment. Ends at `end`, or before the first that is none."""
    position = start
    sizes: dict[bytes, int] = {}
    while position < end:
        chunk = reader.pread(position, min(CHUNK_BYTES, end - position))
        chunk_bytes = len(chunk)
        at = 0
        while True:
            header = chunk[at : at + FRAME_BYTES]
            size = sizes.get(header)
            if size is None:
                size = record_bytes(header, 0)
                if len(sizes) < _SIZES_MAX:
                    sizes[header] = size
            record_end = at + size
            if size < 0 or record_end > chunk_bytes:
                break
            record = check_framed(chunk[at:record_end], position + at)
            if record is None:
                return
            yield record
            at = record_end
        position += at
        if size > CHUNK_BYTES and position + size <= end:
            record = check_record(reader.pread(position, size), position)
            if record is None:
                return
            yield record
            position += size
        elif at == 0:
            return


def read_range(reader: LogReader, start: int, end: int) -> Iterator[Record]:
    """Checked records from `start` up to `end`, over segments and damage, which are skipped."""
    position = start
    while position < end:
        segment = reader.log.segment_at(position)
        if segment is None:
            following = [segment.base for segment in reader.log.segments if segment.base > position]
            if not following:
                return
            position = following[0]
            continue
        segment_end = min(segment.end_offset, end)
        for record in read_records(reader, position, segment_end):
            yield record
            position = record.end_offset
        if position < segment_end:
            found = find_record(reader, position + 1, segment_end)
            position = found.physical_offset if found is not None else segment.end_offset


def find_record(reader: LogReader, start: int, end: int) -> Record | None:
    """The first record that begins at or after `start` and ends by `end`, within one segment."""
    position = start
    while position + RECORD_BYTES_MIN <= end:
        chunk = reader.pread(position, min(CHUNK_BYTES, end - position))
        for at, size in find_frames(chunk, 0, position):
            if position + at + size > end:
                continue
            data = chunk[at : at + size]
            if len(data) < size:
                data = reader.pread(position + at, size)
            record = check_record(data, position + at)
            if record is not None:
                return record
        if len(chunk) < RECORD_BYTES_MIN:
            return None
        position += len(chunk) - FRAME_BYTES + 1
    return None


def is_zero(reader: LogReader, start: int, end: int) -> bool:
    """Whether all bytes of one segment from `start` to `end` are zero."""
    position = start
    zeros = bytes(CHUNK_BYTES)
    while position < end:
        chunk = reader.pread(position, min(CHUNK_BYTES, end - position))
        if not chunk or chunk != zeros[: len(chunk)]:
            return False
        position += len(chunk)
    return True
