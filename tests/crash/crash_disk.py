"""A disk in memory that can lose its power: the Disk seam of the store, with everything that a real one may do wrong.

    disk = CrashDisk(root)
    ... a store runs on it ...
    disk = disk.crash(rng)      # as the disk may look after a power loss
    disk = disk.kill(rng)       # as it looks after the process died: everything written is there

Both leave the old object dead: whatever still uses it gets PowerLossError. Directories forget creations, renames and
removals that were not followed by fsync_dir, files what was not followed by fdatasync (content.py). Thread-safe.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.crash.content import Content, Grow, Loss, Resize, Write
from tests.crash.fault_plan import FaultPlan, Operation

_PLENTY = 1 << 40


class _Entry(NamedTuple):
    """A change of a directory: `name` stands for `node` now (None: for nothing); `old_name` is gone (rename)."""

    time: int
    name: str
    node: Content | _Directory | None
    old_name: str | None = None


class _Directory:
    __slots__ = ("durable", "live", "unsynced")

    def __init__(self) -> None:
        self.live: dict[str, Content | _Directory] = {}
        self.durable: dict[str, Content | _Directory] = {}
        self.unsynced: list[_Entry] = []

    def change(self, entry: _Entry) -> None:
        _apply_entry(self.live, entry)
        self.unsynced.append(entry)

    def sync(self) -> None:
        for entry in self.unsynced:
            _apply_entry(self.durable, entry)
        self.unsynced.clear()


def _apply_entry(entries: dict[str, Content | _Directory], entry: _Entry) -> None:
    if entry.old_name is not None:
        entries.pop(entry.old_name, None)
    if entry.node is None:
        entries.pop(entry.name, None)
    else:
        entries[entry.name] = entry.node


class CrashFile:
    """An open file of a CrashDisk."""

    def __init__(self, disk: CrashDisk, path: Path, content: Content) -> None:
        self._disk = disk
        self._path = path
        self._content = content
        self._closed = False

    def pread(self, count: int, position: int) -> bytes:
        self._enter("read")
        assert count >= 0
        assert position >= 0
        with self._disk.mutex:
            return bytes(self._content.live[position : position + count])

    def pwrite(self, data: bytes, position: int) -> int:
        self._enter("write")
        disk = self._disk
        with disk.mutex:
            count = disk.faults.short_count(len(data))
            count = min(count, len(self._content.live) - position + disk.room()) if disk.capacity_bytes else count
            if data and count <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._content.change(Write(disk.tick(), position, bytes(data[:count])))
            return count

    def fdatasync(self) -> None:
        try:
            self._enter("sync")
        except OSError:
            with self._disk.mutex:
                if not self._disk.faults.dead:
                    self._content.fail_sync(self._disk.rng)
            raise
        with self._disk.mutex:
            self._content.sync()

    def truncate(self, size: int) -> None:
        self._enter("size")
        with self._disk.mutex:
            self._content.change(Resize(self._disk.tick(), size))

    def allocate(self, position: int, count: int) -> None:
        self._enter("size")
        with self._disk.mutex:
            size = position + count
            if self._disk.capacity_bytes and size - len(self._content.live) > self._disk.room():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
            self._content.change(Grow(self._disk.tick(), size))

    def size(self) -> int:
        self._enter("read")
        with self._disk.mutex:
            return len(self._content.live)

    def close(self) -> None:
        self._closed = True

    def _enter(self, operation: Operation) -> None:
        assert not self._closed, f"{self._path} is used after close()"
        self._disk.faults.enter(operation, self._path)


class _CrashLock:
    def __init__(self, disk: CrashDisk, path: Path) -> None:
        self._disk = disk
        self._path = path

    def close(self) -> None:
        self._disk.locked.discard(self._path)


class CrashDisk:
    """Directories and files below `root`, which exists and is durable from the start. Paths are absolute.

    capacity_bytes: 0 = no limit; may be set at any time. rng: decides what a failed sync leaves.
    """

    def __init__(self, root: Path, *, capacity_bytes: int = 0, rng: random.Random | None = None) -> None:
        self.root = root
        self.capacity_bytes = capacity_bytes
        self.rng = rng or random.Random(0)
        self.faults = FaultPlan()
        self.mutex = threading.RLock()
        self.locked: set[Path] = set()
        self._tree = _Directory()
        self._time = 0
        self._boot_time = 0

    # ---- The seam. ----

    def open(self, path: Path, *, create: bool = False) -> CrashFile:
        self.faults.enter("open", path)
        with self.mutex:
            node = self._find(path)
            if isinstance(node, _Directory):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if node is None:
                if not create:
                    raise _missing(path)
                self.faults.enter("directory", path)
                node = Content()
                self._directory(path.parent).change(_Entry(self.tick(), path.name, node))
            return CrashFile(self, path, node)

    def file_bytes(self, path: Path) -> int:
        self.faults.enter("read", path)
        with self.mutex:
            return len(self._content(path).live)

    def listdir(self, path: Path) -> list[str]:
        self.faults.enter("read", path)
        with self.mutex:
            node = self._find(path)
            return sorted(node.live) if isinstance(node, _Directory) else []

    def mkdir(self, path: Path) -> None:
        with self.mutex:
            directory = self._tree
            for part in path.relative_to(self.root).parts:
                node = directory.live.get(part)
                if node is None:
                    self.faults.enter("directory", path)
                    node = _Directory()
                    directory.change(_Entry(self.tick(), part, node))
                if not isinstance(node, _Directory):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
                directory = node

    def rename(self, source: Path, target: Path) -> None:
        self.faults.enter("directory", source)
        with self.mutex:
            content = self._content(source)
            if source.parent == target.parent:
                self._directory(source.parent).change(_Entry(self.tick(), target.name, content, source.name))
            else:
                self._directory(target.parent).change(_Entry(self.tick(), target.name, content))
                self._directory(source.parent).change(_Entry(self.tick(), source.name, None))

    def remove(self, path: Path) -> None:
        self.faults.enter("directory", path)
        with self.mutex:
            self._content(path)
            self._directory(path.parent).change(_Entry(self.tick(), path.name, None))

    def rmdir(self, path: Path) -> None:
        self.faults.enter("directory", path)
        with self.mutex:
            if self._directory(path).live:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            self._directory(path.parent).change(_Entry(self.tick(), path.name, None))

    def fsync_dir(self, path: Path) -> None:
        self.faults.enter("directory", path)
        with self.mutex:
            self._directory(path).sync()

    def sync_files(self, paths: Collection[Path]) -> None:
        for path in paths:
            file = self.open(path)
            file.fdatasync()
            file.close()
        for directory in {path.parent for path in paths}:
            self.fsync_dir(directory)

    def free_bytes(self, path: Path) -> int:
        self.faults.enter("read", path)
        return max(0, self.room())

    def total_bytes(self, path: Path) -> int:
        self.faults.enter("read", path)
        return self.capacity_bytes or _PLENTY

    def lock(self, path: Path) -> _CrashLock:
        self.open(path, create=True).close()
        with self.mutex:
            if path in self.locked:
                raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
            self.locked.add(path)
        return _CrashLock(self, path)

    # ---- What a test does to it. ----

    def crash(self, rng: random.Random) -> CrashDisk:
        """The power fails: the disk as it may look afterwards. This object is dead."""
        self.faults.kill()
        with self.mutex:
            other = CrashDisk(self.root, capacity_bytes=self.capacity_bytes, rng=rng)
            other._tree = _survive(self._tree, Loss(rng, self._time, self._boot_time), rng, {})
            return other

    def kill(self, rng: random.Random) -> CrashDisk:
        """The process dies: all that was written is there, synced or not. This object is dead.

        Half the time the page cache has dropped what it holds to be clean: then what a failed sync lost is gone.
        """
        self.faults.kill()
        other = self.copy()
        other.rng = rng
        if rng.random() < 0.5:
            for _path, content in other.contents():
                if content.lost:
                    content.evict()
        return other

    def copy(self, root: Path | None = None) -> CrashDisk:
        """A second disk with the same past, without faults and locks; its files lie below `root` instead."""
        with self.mutex:
            other = CrashDisk(root or self.root, capacity_bytes=self.capacity_bytes, rng=self.rng)
            other._tree = _copy(self._tree, {})
            other._time = self._time
            other._boot_time = self._time
            return other

    def files(self) -> dict[Path, bytes]:
        """Every file, as reads see it."""
        return {path: bytes(content.live) for path, content in self.contents()}

    def overwrite(self, path: Path, data: bytes) -> None:
        """Replaces or makes a file behind the store's back, durably."""
        with self.mutex:
            directory = self._directory(path.parent)
            directory.change(_Entry(self.tick(), path.name, Content(data)))
            directory.sync()

    def flip_bit(self, path: Path, position: int, bit: int = 0) -> None:
        """Rot: one bit of a file changes, on the disk and in what reads see."""
        with self.mutex:
            content = self._content(path)
            for data in (content.live, content.durable):
                if position < len(data):
                    data[position] ^= 1 << bit

    def erase(self, path: Path) -> None:
        """Removes a file or a whole directory behind the store's back, durably; it may be missing."""
        with self.mutex:
            parent = self._find(path.parent)
            if isinstance(parent, _Directory):
                parent.live.pop(path.name, None)
                parent.sync()
                parent.durable.pop(path.name, None)

    def contents(self) -> Iterator[tuple[Path, Content]]:
        """Every file with its past."""
        stack: list[tuple[Path, _Directory]] = [(self.root, self._tree)]
        while stack:
            path, directory = stack.pop()
            for name, node in directory.live.items():
                if isinstance(node, _Directory):
                    stack.append((path / name, node))
                else:
                    yield path / name, node

    # ---- Inside. ----

    def tick(self) -> int:
        """The time of the next change."""
        self._time += 1
        return self._time

    def room(self) -> int:
        """Bytes that files may still grow by."""
        if not self.capacity_bytes:
            return _PLENTY
        return self.capacity_bytes - self.used_bytes()

    def used_bytes(self) -> int:
        """What all files take."""
        with self.mutex:
            return sum(len(content.live) for _path, content in self.contents())

    def _find(self, path: Path) -> Content | _Directory | None:
        node: Content | _Directory | None = self._tree
        for part in path.relative_to(self.root).parts:
            if not isinstance(node, _Directory):
                return None
            node = node.live.get(part)
        return node

    def _directory(self, path: Path) -> _Directory:
        node = self._find(path)
        if not isinstance(node, _Directory):
            raise _missing(path)
        return node

    def _content(self, path: Path) -> Content:
        node = self._find(path)
        if not isinstance(node, Content):
            raise _missing(path)
        return node


def _missing(path: Path) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _survive(directory: _Directory, loss: Loss, rng: random.Random, done: dict[Content, Content]) -> _Directory:
    entries = dict(directory.durable)
    for entry in directory.unsynced:
        if loss.keeps(entry.time, rng):
            _apply_entry(entries, entry)
    survivor = _Directory()
    for name, node in entries.items():
        if isinstance(node, _Directory):
            survivor.live[name] = _survive(node, loss, rng, done)
        else:
            if node not in done:
                done[node] = node.survive(loss, rng)
            survivor.live[name] = done[node]
    survivor.durable = dict(survivor.live)
    return survivor


def _copy(directory: _Directory, done: dict[Content | _Directory, Content | _Directory]) -> _Directory:
    def twin(node: Content | _Directory) -> Content | _Directory:
        if node not in done:
            done[node] = _copy(node, done) if isinstance(node, _Directory) else node.copy()
        return done[node]

    other = _Directory()
    other.live = {name: twin(node) for name, node in directory.live.items()}
    other.durable = {name: twin(node) for name, node in directory.durable.items()}
    other.unsynced = [
        entry._replace(node=None if entry.node is None else twin(entry.node)) for entry in directory.unsynced
    ]
    return other
