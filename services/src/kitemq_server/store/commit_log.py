"""The commit log: segments in order, and reading from them. Writing is log_writer.py's.

The loop owns the list of segments and replaces it whole, so that the store's thread may look at it at any time.
"""

from __future__ import annotations

import errno
import logging
from bisect import bisect_right
from operator import attrgetter

from kitemq_server.store.disk import Disk, File
from kitemq_server.store.file_cache import FileCache
from kitemq_server.store.filenames import Layout, parse_offset_name
from kitemq_server.store.record import Record, check_record, record_bytes

logger = logging.getLogger(__name__)

_BASE = attrgetter("base")
_BLOCK_BYTES = 4096
_HEAD_BYTES = 4096  # a guess that saves a second read for most records


class Segment:
    """One file of the log.

    base, end_offset and allocated are physical offsets: of the first byte, after the last record, and after the bytes
    that are sure to have space. file: open while it is written or not flushed yet; the writer's alone. sealed: its file
    ends with its last record.
    """

    __slots__ = ("allocated", "base", "end_offset", "file", "sealed")

    def __init__(self, base: int, end_offset: int, allocated: int, file: File | None = None) -> None:
        self.base = base
        self.end_offset = end_offset
        self.allocated = allocated
        self.file = file
        self.sealed = False


class CommitLog:
    """The segments, oldest first. The last one is being written."""

    __slots__ = ("disk", "layout", "segment_bytes", "segments")

    def __init__(self, disk: Disk, layout: Layout, segment_bytes: int) -> None:
        self.disk = disk
        self.layout = layout
        self.segment_bytes = segment_bytes
        self.segments: tuple[Segment, ...] = ()

    @property
    def start_offset(self) -> int:
        """Physical offset of the oldest byte kept."""
        return self.segments[0].base

    @property
    def end_offset(self) -> int:
        """Physical offset after the last record appended."""
        return self.segments[-1].end_offset

    @property
    def bytes_kept(self) -> int:
        """Bytes of records in all segments."""
        return sum(segment.end_offset - segment.base for segment in self.segments)

    def segment_at(self, physical_offset: int) -> Segment | None:
        """The segment that holds this offset."""
        segments = self.segments
        index = bisect_right(segments, physical_offset, key=_BASE) - 1
        if index < 0 or physical_offset >= segments[index].end_offset:
            return None
        return segments[index]

    def list_bases(self) -> list[int]:
        """Bases of the segment files that are there, oldest first."""
        names = self.disk.listdir(self.layout.commit_log)
        return sorted(base for name in names if (base := parse_offset_name(name)) is not None)


def _read_around(file: File, position: int, count: int) -> bytes:
    """Reads what the disk still gives; blocks that it does not read as 0xFF, which no checksum passes."""
    logger.error("disk does not give back part of the commit log: position=%d bytes=%d", position, count)
    blocks = []
    for start in range(position, position + count, _BLOCK_BYTES):
        wanted = min(_BLOCK_BYTES, position + count - start)
        try:
            blocks.append(file.pread(wanted, start))
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            blocks.append(b"\xff" * wanted)
    return b"".join(blocks)


class LogReader:
    """Reads of the log from one thread, through files of its own."""

    __slots__ = ("_cache", "log")

    def __init__(self, log: CommitLog, cache: FileCache) -> None:
        self.log = log
        self._cache = cache

    def pread(self, physical_offset: int, count: int) -> bytes:
        """Up to `count` bytes of one segment; fewer, or none, where the log or the segment ends."""
        segment = self.log.segment_at(physical_offset)
        if segment is None:
            return b""
        count = min(count, segment.end_offset - physical_offset)
        file = self.open(segment.base)
        position = physical_offset - segment.base
        try:
            return file.pread(count, position)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return _read_around(file, position, count)

    def open(self, base: int) -> File:
        """The segment's file."""
        log = self.log
        return self._cache.get(base, lambda: log.disk.open(log.layout.segment(base)))

    def record_at(self, physical_offset: int) -> Record | None:
        """The record that begins there; None when there is none or it is damaged."""
        head = self.pread(physical_offset, _HEAD_BYTES)
        size = record_bytes(head, 0)
        if size < 0:
            return None
        data = head[:size] if size <= len(head) else self.pread(physical_offset, size)
        return check_record(data, physical_offset)

    def forget(self, base: int) -> None:
        """The segment has been deleted."""
        self._cache.drop(base)

    def close(self) -> None:
        """Closes the reader's files."""
        self._cache.close()
