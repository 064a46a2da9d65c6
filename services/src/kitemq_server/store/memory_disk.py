"""A disk in memory, for ephemeral stores: nothing touches the file system, and nothing outlives the process."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection
from pathlib import Path

_BLOCK_BYTES = 256 * 1024


class _Content:
    """Bytes of one file, in blocks as long as what was written into them: preallocated space costs no memory."""

    __slots__ = ("blocks", "size")

    def __init__(self) -> None:
        self.blocks: dict[int, bytearray] = {}
        self.size = 0


class MemoryFile:
    """An open file of a MemoryDisk."""

    __slots__ = ("_content", "_disk")

    def __init__(self, disk: MemoryDisk, content: _Content) -> None:
        self._disk = disk
        self._content = content

    def pread(self, count: int, position: int) -> bytes:
        content = self._content
        end = min(position + count, content.size)
        pieces = []
        while position < end:
            number, within = divmod(position, _BLOCK_BYTES)
            length = min(end - position, _BLOCK_BYTES - within)
            block = content.blocks.get(number, b"")[within : within + length]
            pieces.append(bytes(block) + bytes(length - len(block)))
            position += length
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pwrite(self, data: bytes, position: int) -> int:
        content = self._content
        self._disk.grow(content, position + len(data))
        view = memoryview(data)
        done = 0
        while done < len(data):
            number, within = divmod(position + done, _BLOCK_BYTES)
            length = min(len(data) - done, _BLOCK_BYTES - within)
            block = content.blocks.setdefault(number, bytearray())
            if len(block) < within + length:
                block.extend(bytes(within + length - len(block)))
            block[within : within + length] = view[done : done + length]
            done += length
        return len(data)

    def fdatasync(self) -> None:
        """There is nothing to wait for."""

    def truncate(self, size: int) -> None:
        content = self._content
        if size > content.size:
            self._disk.grow(content, size)
            return
        self._disk.shrink(content, size)
        last, within = divmod(size, _BLOCK_BYTES)
        for number in [number for number in content.blocks if number > last or (number == last and within == 0)]:
            del content.blocks[number]
        if last in content.blocks:
            del content.blocks[last][within:]

    def allocate(self, position: int, count: int) -> None:
        self._disk.grow(self._content, position + count)

    def size(self) -> int:
        return self._content.size

    def close(self) -> None:
        """The content lives as long as its name does."""


class _MemoryLock:
    __slots__ = ("_disk", "_path")

    def __init__(self, disk: MemoryDisk, path: Path) -> None:
        self._disk = disk
        self._path = path

    def close(self) -> None:
        self._disk.locked.discard(self._path)


class MemoryDisk:
    """Files and directories in memory, `capacity_bytes` at most: then writes fail as on a full disk."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.locked: set[Path] = set()
        self._files: dict[Path, _Content] = {}
        self._used_bytes = 0
        self._mutex = threading.Lock()

    def open(self, path: Path, *, create: bool = False) -> MemoryFile:
        content = self._files.get(path)
        if content is None:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            content = self._files[path] = _Content()
        return MemoryFile(self, content)

    def file_bytes(self, path: Path) -> int:
        return self.open(path).size()

    def listdir(self, path: Path) -> list[str]:
        depth = len(path.parts)
        return sorted({file.parts[depth] for file in list(self._files) if path in file.parents})

    def mkdir(self, path: Path) -> None:
        """Directories are where files are."""

    def rename(self, source: Path, target: Path) -> None:
        self._files[target] = self._files.pop(source)

    def remove(self, path: Path) -> None:
        MemoryFile(self, self._files.pop(path)).truncate(0)

    def rmdir(self, path: Path) -> None:
        """Directories are where files are."""

    def fsync_dir(self, path: Path) -> None:
        """There is nothing to wait for."""

    def sync_files(self, paths: Collection[Path]) -> None:
        """There is nothing to wait for."""

    def free_bytes(self, path: Path) -> int:
        return max(0, self.capacity_bytes - self._used_bytes)

    def total_bytes(self, path: Path) -> int:
        return self.capacity_bytes

    def lock(self, path: Path) -> _MemoryLock:
        if path in self.locked:
            raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), str(path))
        self.locked.add(path)
        return _MemoryLock(self, path)

    def grow(self, content: _Content, size: int) -> None:
        """Makes a file at least `size` long, within the capacity."""
        with self._mutex:
            more = size - content.size
            if more <= 0:
                return
            if self._used_bytes + more > self.capacity_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._used_bytes += more
            content.size = size

    def shrink(self, content: _Content, size: int) -> None:
        """Makes a file `size` long."""
        with self._mutex:
            self._used_bytes -= content.size - size
            content.size = size
