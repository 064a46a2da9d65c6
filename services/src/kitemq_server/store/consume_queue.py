"""Consume queues: where each message of a queue lies in the log. Drawn in docs/format.md.

New entries are in memory (the tail) and reach the files with the next snapshot. Files may hold more than the queue
says: bytes beyond its end are overwritten before they count.
"""

from __future__ import annotations

import errno
import logging
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kitemq_server.store.disk import Disk, File, syncing, write_all
from kitemq_server.store.file_cache import FileCache
from kitemq_server.store.filenames import Layout, offset_name, parse_offset_name

logger = logging.getLogger(__name__)

ENTRY = struct.Struct(">QIQ")
ENTRY_BYTES = ENTRY.size
_PATHS_MAX = 20_000
_POSITION = struct.Struct(">Q")


class QueueFiles:
    """The files of all consume queues."""

    __slots__ = ("_cache", "_new_directories", "_paths", "_unsynced", "disk", "entries_per_file", "layout")

    def __init__(self, disk: Disk, layout: Layout, *, entries_per_file: int, open_files_max: int) -> None:
        self.disk = disk
        self.layout = layout
        self.entries_per_file = entries_per_file
        self._cache = FileCache(open_files_max)
        self._unsynced: set[Path] = set()  # written since the last snapshot; the store's thread's
        self._new_directories: set[Path] = set()
        # Making a path costs more than writing the file: half of a snapshot with many queues.
        self._paths: dict[tuple[str, int, int], Path] = {}

    def path(self, topic: str, queue_id: int, file_number: int) -> Path:
        """The file with the entries from number file_number * entries_per_file on."""
        key = (topic, queue_id, file_number)
        path = self._paths.get(key)
        if path is None:
            if len(self._paths) >= _PATHS_MAX:
                self._paths.clear()
            name = offset_name(file_number * self.entries_per_file * ENTRY_BYTES)
            path = self._paths[key] = self.layout.queue(topic, queue_id) / name
        return path

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(file number, first entry within the file, count) of `count` entries from `first`."""
        while count > 0:
            number, within = divmod(first, self.entries_per_file)
            part = min(count, self.entries_per_file - within)
            yield number, within, part
            first += part
            count -= part

    def read(self, topic: str, queue_id: int, first: int, count: int) -> bytes:
        """Bytes of `count` entries from `first`; fewer when a file is missing, short or cannot be read."""
        out = []
        for number, within, part in self.pieces(first, count):

            def open_file(number: int = number) -> File:
                return self.disk.open(self.path(topic, queue_id, number))

            try:
                file = self._cache.get((topic, queue_id, number), open_file)
                data = file.pread(part * ENTRY_BYTES, within * ENTRY_BYTES)
            except FileNotFoundError:
                break
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                logger.error("consume queue cannot be read: topic=%s queue_id=%d file=%d", topic, queue_id, number)
                break
            out.append(data)
            if len(data) < part * ENTRY_BYTES:
                break
        return out[0] if len(out) == 1 else b"".join(out)

    def write(self, topic: str, queue_id: int, first: int, data: bytes) -> None:
        """Writes entries from `first` on. The store's thread's, as `sync`; uses no file that is open for reading."""
        done = 0
        for number, within, part in self.pieces(first, len(data) // ENTRY_BYTES):
            path = self.path(topic, queue_id, number)
            try:
                file = self.disk.open(path, create=True)
            except FileNotFoundError:
                self.disk.mkdir(path.parent)
                self._new_directories |= {path.parent.parent, self.layout.consume_queue}
                file = self.disk.open(path, create=True)
            try:
                write_all(file, data[done : done + part * ENTRY_BYTES], within * ENTRY_BYTES)
            finally:
                file.close()
            done += part * ENTRY_BYTES
            self._unsynced.add(path)

    def sync(self) -> None:
        """Everything written is on disk when this returns."""
        with syncing():
            self.disk.sync_files(self._unsynced)
            for directory in self._new_directories:
                with suppress(FileNotFoundError):  # deleted since, with its topic
                    self.disk.fsync_dir(directory)
        self._unsynced.clear()
        self._new_directories.clear()

    def first_kept(self, topic: str, queue_id: int, first: int, end: int) -> int:
        """`first`, or where the first file that is there begins, if all before it are gone."""
        while first < end:
            number = first // self.entries_per_file
            try:
                self.disk.file_bytes(self.path(topic, queue_id, number))
            except FileNotFoundError:
                first = min((number + 1) * self.entries_per_file, end)
            else:
                break
        return first

    def complete(self, topic: str, queue_id: int, first: int, end: int) -> bool:
        """Whether the files hold every entry from `first` up to `end`."""
        for number, within, part in self.pieces(first, end - first):
            try:
                size = self.disk.file_bytes(self.path(topic, queue_id, number))
            except FileNotFoundError:
                return False
            if size < (within + part) * ENTRY_BYTES:
                return False
        return True

    def remove_below(self, topic: str, queue_id: int, queue_offset: int) -> int:
        """Removes the files all of whose entries are below `queue_offset`; returns how many. `forget` them then."""
        count = 0
        directory = self.layout.queue(topic, queue_id)
        for name in self.disk.listdir(directory):
            start = parse_offset_name(name)
            if start is not None and start // ENTRY_BYTES + self.entries_per_file <= queue_offset:
                self._remove(directory / name)
                count += 1
        return count

    def _remove(self, path: Path) -> None:
        self.disk.remove(path)
        self._unsynced.discard(path)

    def remove_deleted(self, topic: str, ends: Mapping[int, int]) -> None:
        """Removes what a deleted topic left. ends: end offset by queue id of its next life, whose files stay."""
        directory = self.layout.topic(topic)
        for queue_name in self.disk.listdir(directory):
            end_offset = ends.get(int(queue_name), 0) if queue_name.isdigit() else 0
            queue_directory = directory / queue_name
            for name in self.disk.listdir(queue_directory):
                start = parse_offset_name(name)
                if start is None or start // ENTRY_BYTES >= end_offset:
                    self._remove(queue_directory / name)
            if not end_offset:
                self.disk.rmdir(queue_directory)
        if not any(ends.values()):
            with suppress(FileNotFoundError):
                self.disk.rmdir(directory)

    def forget(self, topic: str) -> None:
        """Closes what is open of a topic. On the loop, after files have been removed."""
        self._cache.drop_where(lambda key: isinstance(key, tuple) and key[0] == topic)

    def close(self) -> None:
        """Closes the files that are open for reading."""
        self._cache.close()


class ConsumeQueue:
    """One queue. Offsets are queue offsets; ends are exclusive. Loop only.

    min_offset: the first that can be read. max_offset: confirmed end. next_offset: end of what has been appended.
    trusted_offset: entries from here on were written by this process, so their records need no check on reading;
    of the others, those in [verified_from, verified_to) have passed theirs. damaged: offsets whose record did not.
    """

    __slots__ = (
        "_files",
        "damaged",
        "deleted",
        "max_offset",
        "min_offset",
        "next_offset",
        "queue_id",
        "tail",
        "tail_offset",
        "topic",
        "trusted_offset",
        "verified_from",
        "verified_to",
    )

    def __init__(
        self, files: QueueFiles, topic: str, queue_id: int, *, min_offset: int = 0, end_offset: int = 0
    ) -> None:
        self._files = files
        self.topic = topic
        self.queue_id = queue_id
        self.min_offset = min_offset
        self.max_offset = end_offset
        self.next_offset = end_offset
        self.trusted_offset = end_offset
        self.verified_from = self.verified_to = min_offset
        self.tail = bytearray()
        self.tail_offset = end_offset
        self.damaged: set[int] = set()
        self.deleted = False

    def entries(self, first: int, count: int) -> bytes:
        """Bytes of `count` entries from `first`, all below next_offset; fewer when the files lost some."""
        tail_offset = self.tail_offset
        if first >= tail_offset:
            start = (first - tail_offset) * ENTRY_BYTES
            return bytes(self.tail[start : start + count * ENTRY_BYTES])
        below = tail_offset - first
        if count <= below:
            return self._files.read(self.topic, self.queue_id, first, count)
        data = self._files.read(self.topic, self.queue_id, first, below)
        if len(data) < below * ENTRY_BYTES:
            return data
        return data + bytes(self.tail[: (count - below) * ENTRY_BYTES])

    def entry(self, queue_offset: int) -> tuple[int, int, int] | None:
        """(physical offset, record size, tags code) of one entry; None when its file lost it."""
        data = self.entries(queue_offset, 1)
        return ENTRY.unpack(data) if len(data) == ENTRY_BYTES else None

    def append(self, entries: bytes, count: int) -> None:
        """Adds entries at the end; they are not confirmed yet."""
        self.tail += entries
        self.next_offset += count

    def begin_at(self, queue_offset: int) -> None:
        """The queue, which is empty, begins here."""
        assert self.next_offset == self.min_offset
        self.min_offset = self.max_offset = self.next_offset = self.tail_offset = queue_offset

    def place(self, queue_offset: int, physical_offset: int, entries: bytes, count: int) -> None:
        """Appends entries of records that are read from the log again, the first at `physical_offset`.

        A gap before them is records that were lost; entries at or behind them are of a queue that has begun anew.
        """
        if queue_offset < self.next_offset:
            self.cut(queue_offset)
        elif queue_offset > self.next_offset:
            self.append_holes(queue_offset, physical_offset)
        self.append(entries, count)

    def append_holes(self, end_offset: int, physical_offset: int) -> None:
        """Fills up to `end_offset` with entries whose records are lost. They name where the next record lies."""
        count = end_offset - self.next_offset
        self.append(ENTRY.pack(physical_offset, 0, 0) * count, count)

    def cut(self, end_offset: int) -> None:
        """Forgets the entries from `end_offset` on. For recovery."""
        self.next_offset = self.max_offset = end_offset
        self.min_offset = min(self.min_offset, end_offset)
        del self.tail[max(0, end_offset - self.tail_offset) * ENTRY_BYTES :]
        self.tail_offset = min(self.tail_offset, end_offset)

    def drop_tail(self, end_offset: int) -> None:
        """Entries below `end_offset` are in the files: the tail need not hold them any more."""
        count = end_offset - self.tail_offset
        if count > 0:
            del self.tail[: count * ENTRY_BYTES]
            self.tail_offset = end_offset

    def mend(self, queue_offset: int, entry: tuple[int, int, int]) -> bytes:
        """Puts one entry right, as far as it is in memory; returns its bytes."""
        data = ENTRY.pack(*entry)
        start = (queue_offset - self.tail_offset) * ENTRY_BYTES
        if start >= 0:
            self.tail[start : start + ENTRY_BYTES] = data
        self.damaged.discard(queue_offset)
        return data

    def first_at_or_after(self, physical_offset: int) -> int:
        """Queue offset of the first entry whose record lies at or after `physical_offset`; next_offset when none."""
        low, high = self.min_offset, self.next_offset
        while low < high:
            middle = (low + high) // 2
            data = self.entries(middle, 1)
            if len(data) == ENTRY_BYTES and _POSITION.unpack_from(data)[0] >= physical_offset:
                high = middle
            else:
                low = middle + 1
        return low


class Tail(NamedTuple):
    """Entries that were only in memory when it was taken."""

    queue: ConsumeQueue
    first: int
    data: bytes


class QueueTable:
    """All consume queues of a store, by topic and queue id."""

    __slots__ = ("_by_topic", "_queues", "files")

    def __init__(self, files: QueueFiles) -> None:
        self.files = files
        self._queues: dict[tuple[str, int], ConsumeQueue] = {}
        self._by_topic: dict[str, dict[int, ConsumeQueue]] = {}

    def __len__(self) -> int:
        return len(self._queues)

    def __iter__(self) -> Iterator[ConsumeQueue]:
        return iter(self._queues.values())

    def get(self, topic: str, queue_id: int) -> ConsumeQueue | None:
        """The queue, if it has been written or read."""
        return self._queues.get((topic, queue_id))

    def obtain(self, topic: str, queue_id: int) -> ConsumeQueue:
        """The queue, made when it is not there."""
        queue = self._queues.get((topic, queue_id))
        return queue if queue is not None else self.add(ConsumeQueue(self.files, topic, queue_id))

    def add(self, queue: ConsumeQueue) -> ConsumeQueue:
        """Adds a queue that is not there."""
        self._queues[queue.topic, queue.queue_id] = queue
        self._by_topic.setdefault(queue.topic, {})[queue.queue_id] = queue
        return queue

    def of_topic(self, topic: str) -> Collection[ConsumeQueue]:
        """The queues of one topic that have been written or read."""
        return self._by_topic.get(topic, {}).values()

    def drop_topic(self, topic: str) -> list[ConsumeQueue]:
        """Takes the queues of a deleted topic out. Their files stay until the deletion is safe."""
        queues = list(self._by_topic.pop(topic, {}).values())
        for queue in queues:
            del self._queues[queue.topic, queue.queue_id]
            queue.deleted = True
            queue.min_offset = queue.max_offset = 0
        return queues

    def take_tails(self) -> list[Tail]:
        """Copies of all tails."""
        return [Tail(queue, queue.tail_offset, bytes(queue.tail)) for queue in self._queues.values() if queue.tail]

    def drop_tails(self, tails: Collection[Tail]) -> None:
        """These have been written to the files."""
        for tail in tails:
            tail.queue.drop_tail(tail.first + len(tail.data) // ENTRY_BYTES)
