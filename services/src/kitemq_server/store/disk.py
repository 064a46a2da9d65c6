"""The Disk seam: every access of the store to files goes through it (LMDB excepted).

A crash model stands in here: it forgets what was not synced, cuts and zeroes writes, fails and stalls calls. Errors are
OSError as the system raises them; nothing is retried here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

# One call for the whole file system beats one per file from about here (3,000 files: 14 ms against 470 ms).
_SYNCFS_FILES_MIN = 32


class File(Protocol):
    """An open file. Reads and writes name their position; there is no cursor."""

    def pread(self, count: int, position: int) -> bytes:
        """Up to `count` bytes; fewer only at the end of the file."""

    def pwrite(self, data: bytes, position: int) -> int:
        """Writes and returns how many bytes were written: possibly fewer than there are."""

    def fdatasync(self) -> None:
        """Everything written so far, and the file's size, is on disk when this returns."""

    def truncate(self, size: int) -> None: ...

    def allocate(self, position: int, count: int) -> None:
        """Reserves space and makes the file at least position + count long; what was not there reads as zeros."""

    def size(self) -> int: ...

    def close(self) -> None: ...


class Lock(Protocol):
    """A lock that is held until close() or the end of the process."""

    def close(self) -> None: ...


class Disk(Protocol):
    """Directories and files of one file system."""

    def open(self, path: Path, *, create: bool = False) -> File:
        """For reading and writing. Raises FileNotFoundError when it is not there and not to be created."""

    def file_bytes(self, path: Path) -> int:
        """Size. Raises FileNotFoundError."""

    def listdir(self, path: Path) -> list[str]:
        """Names in a directory, sorted; none when it does not exist."""

    def mkdir(self, path: Path) -> None:
        """With its parents; it may be there already."""

    def rename(self, source: Path, target: Path) -> None:
        """Replaces the target."""

    def remove(self, path: Path) -> None: ...

    def rmdir(self, path: Path) -> None:
        """Removes an empty directory."""

    def fsync_dir(self, path: Path) -> None:
        """Creations, renames and removals in this directory are on disk when this returns."""

    def sync_files(self, paths: Collection[Path]) -> None:
        """These closed files, and the directories that hold them, are on disk when this returns."""

    def free_bytes(self, path: Path) -> int: ...

    def total_bytes(self, path: Path) -> int: ...

    def lock(self, path: Path) -> Lock:
        """Raises BlockingIOError when another holder has it."""


def write_all(file: File, data: bytes, position: int) -> None:
    """pwrite until all of `data` is written."""
    written = file.pwrite(data, position)
    while written < len(data):
        count = file.pwrite(data[written:], position + written)
        if count <= 0:
            raise OSError(errno.EIO, "a write made no progress")
        written += count


@contextmanager
def syncing() -> Iterator[None]:
    """Makes a failed sync EIO, whatever the system calls it: also with ENOSPC the bytes may be lost, and a second sync
    that succeeds says nothing about them."""
    try:
        yield
    except OSError as error:
        raise OSError(errno.EIO, f"a sync failed: {error}") from error


def read_file(disk: Disk, path: Path) -> bytes:
    """The whole file. Raises FileNotFoundError."""
    file = disk.open(path)
    try:
        return file.pread(file.size(), 0)
    finally:
        file.close()


def replace_file(disk: Disk, path: Path, data: bytes) -> None:
    """Writes `data` so that after a crash the file holds all of it or what it held before."""
    temporary = path.with_name(path.name + ".tmp")
    file = disk.open(temporary, create=True)
    try:
        file.truncate(0)
        write_all(file, data, 0)
        file.fdatasync()
    finally:
        file.close()
    disk.rename(temporary, path)
    disk.fsync_dir(path.parent)


class RealFile:
    """A file of the operating system."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, count: int, position: int) -> bytes:
        data = os.pread(self._fd, count, position)
        if len(data) == count or not data:
            return data
        # A signal or the kernel's limit of 2 GiB may cut a read short before the end of the file.
        pieces = [data]
        done = len(data)
        while done < count:
            data = os.pread(self._fd, count - done, position + done)
            if not data:
                break
            pieces.append(data)
            done += len(data)
        return b"".join(pieces)

    def pwrite(self, data: bytes, position: int) -> int:
        return os.pwrite(self._fd, data, position)

    def fdatasync(self) -> None:
        os.fdatasync(self._fd)

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def allocate(self, position: int, count: int) -> None:
        os.posix_fallocate(self._fd, position, count)

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _RealLock:
    """A lock that is held, and a descriptor of its directory."""

    def __init__(self, fd: int, directory_fd: int, locks: list[_RealLock]) -> None:
        self._fd = fd
        self.directory_fd = directory_fd
        self._locks = locks
        locks.append(self)

    def close(self) -> None:
        self._locks.remove(self)
        os.close(self.directory_fd)
        os.close(self._fd)


class RealDisk:
    """The file system of the operating system (Linux)."""

    def __init__(self) -> None:
        self._syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
        self._locks: list[_RealLock] = []

    def open(self, path: Path, *, create: bool = False) -> File:
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        return RealFile(os.open(path, flags, 0o640))

    def file_bytes(self, path: Path) -> int:
        return path.stat().st_size

    def listdir(self, path: Path) -> list[str]:
        try:
            return sorted(entry.name for entry in path.iterdir())
        except FileNotFoundError:
            return []

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def rename(self, source: Path, target: Path) -> None:
        source.replace(target)

    def remove(self, path: Path) -> None:
        path.unlink()

    def rmdir(self, path: Path) -> None:
        path.rmdir()

    def fsync_dir(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def sync_files(self, paths: Collection[Path]) -> None:
        if not paths:
            return
        if self._syncfs is not None and self._locks and len(paths) >= _SYNCFS_FILES_MIN:
            # The kernel reports failed writes since this descriptor was opened: when the store was locked.
            if self._syncfs(self._locks[-1].directory_fd) != 0:
                raise OSError(ctypes.get_errno(), "syncfs failed")
            return
        for path in paths:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)
        for directory in {path.parent for path in paths}:
            self.fsync_dir(directory)

    def free_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).free

    def total_bytes(self, path: Path) -> int:
        return shutil.disk_usage(path).total

    def lock(self, path: Path) -> Lock:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _RealLock(fd, os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), self._locks)
        except BaseException:
            os.close(fd)
            raise


def remove_tree(disk: Disk, directory: Path) -> None:
    """Removes a directory of plain files, as far as it is there."""
    for name in disk.listdir(directory):
        with suppress(FileNotFoundError):
            disk.remove(directory / name)
    with suppress(FileNotFoundError):
        disk.rmdir(directory)
