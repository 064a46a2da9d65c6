"""The Disk seam itself: the real one and the one in memory behave alike; a store on each."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from kitemq.errors import StoreFullError
from kitemq_server.store.disk import Disk, RealDisk, read_file, replace_file, write_all
from kitemq_server.store.file_cache import FileCache
from kitemq_server.store.memory_disk import MemoryDisk
from tests.store.helpers import batch, bodies, opened, queue_of, send, small, topic_set
from tests.waiting import eventually

MIB = 1 << 20


@pytest.fixture(params=["real", "memory"])
def disk(request: pytest.FixtureRequest) -> Disk:
    return RealDisk() if request.param == "real" else MemoryDisk(64 * MIB)


def test_files(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with pytest.raises(FileNotFoundError):
        disk.open(path)
    disk.mkdir(path.parent)
    disk.mkdir(path.parent)
    file = disk.open(path, create=True)
    write_all(file, b"hello", 0)
    write_all(file, b"far", 600_000)
    assert file.size() == disk.file_bytes(path) == 600_003
    assert file.pread(5, 0) == b"hello"
    assert file.pread(10, 3) == b"lo" + bytes(8)
    assert file.pread(100, 600_001) == b"ar"
    assert file.pread(5, 700_000) == b""
    file.truncate(3)
    assert file.pread(100, 0) == b"hel"
    file.truncate(6)
    assert file.pread(100, 0) == b"hel\0\0\0"
    file.allocate(2, 100)
    assert file.size() == 102
    file.allocate(0, 10)
    assert file.size() == 102
    assert file.pread(200, 0) == b"hel" + bytes(99)
    file.fdatasync()
    file.close()
    disk.sync_files([path])
    disk.fsync_dir(path.parent)
    assert disk.listdir(tmp_path / "a") == ["b"]
    assert disk.listdir(path.parent) == ["file"]
    assert disk.listdir(tmp_path / "none") == []
    disk.rename(path, path.with_name("renamed"))
    assert read_file(disk, path.with_name("renamed")).startswith(b"hel")
    disk.remove(path.with_name("renamed"))
    with pytest.raises(FileNotFoundError):
        disk.file_bytes(path)
    disk.rmdir(path.parent)
    assert disk.total_bytes(tmp_path) >= disk.free_bytes(tmp_path) > 0


def test_replacing_a_file(disk: Disk, tmp_path: Path) -> None:
    path = tmp_path / "file"
    disk.mkdir(tmp_path)
    replace_file(disk, path, b"a long first version")
    replace_file(disk, path, b"second")
    assert read_file(disk, path) == b"second"
    assert disk.listdir(tmp_path) == ["file"]


def test_a_lock_is_held_by_one(disk: Disk, tmp_path: Path) -> None:
    disk.mkdir(tmp_path)
    lock = disk.lock(tmp_path / "lock")
    with pytest.raises(BlockingIOError):
        disk.lock(tmp_path / "lock")
    lock.close()
    disk.lock(tmp_path / "lock").close()


def test_many_files_are_synced_at_once(tmp_path: Path) -> None:
    disk = RealDisk()
    paths = [tmp_path / str(index) for index in range(40)]
    for path in paths:
        disk.open(path, create=True).close()
    disk.sync_files(paths)
    lock = disk.lock(tmp_path / "lock")
    disk.sync_files(paths)  # now in one call
    disk.sync_files([])
    lock.close()
    disk.sync_files(paths)


def test_memory_is_bounded(tmp_path: Path) -> None:
    disk = MemoryDisk(100_000)
    file = disk.open(tmp_path / "a", create=True)
    file.allocate(0, 60_000)
    other = disk.open(tmp_path / "b", create=True)
    with pytest.raises(OSError, match="No space") as full:
        other.pwrite(bytes(50_000), 0)
    assert full.value.errno == errno.ENOSPC
    file.truncate(1000)
    other.pwrite(bytes(50_000), 0)
    assert disk.free_bytes(tmp_path) == 49_000
    disk.remove(tmp_path / "b")
    assert disk.free_bytes(tmp_path) == 99_000


async def test_an_ephemeral_store(tmp_path: Path) -> None:
    disk = MemoryDisk(3 * MIB)
    config = small(segment_bytes=256 * 1024, disk_watermark_percent=25, flush_interval_ms=5)
    root = Path("/ephemeral")
    async with opened(disk, config, root=root) as store:
        store.append_change(topic_set())
        for _ in range(20):
            await send(store, batch(50, body=b"x" * 1000))
        assert len(bodies(store)) == 1000
        for _ in range(2):
            store._housekeeping.snapshot()
            await store._thread.drain()
            await send(store, batch(1))
        await store._retention.run_once(store.config)
        assert queue_of(store).min_offset > 0
        with pytest.raises(StoreFullError):
            while True:
                store.append([batch(50, body=b"x" * 1000)])
        for _ in range(2):
            store._housekeeping.snapshot()
            await store._thread.drain()
            store.append_change(topic_set())
        await store._retention.run_once(store.config)
        await eventually(lambda: not store.full)
        await send(store, batch(1, body=b"goes on"))
        assert bodies(store)[-1] == b"goes on"
    async with opened(disk, config, root=root) as store:
        assert bodies(store)[-1] == b"goes on"


def test_the_least_used_file_is_closed_first(tmp_path: Path) -> None:
    disk = RealDisk()
    cache = FileCache(2)

    def opener(name: str) -> Callable[[], object]:
        return lambda: disk.open(tmp_path / name, create=True)

    first = cache.get("a", opener("a"))  # type: ignore[arg-type]
    cache.get("b", opener("b"))  # type: ignore[arg-type]
    assert cache.get("a", opener("a")) is first  # type: ignore[arg-type]
    cache.get("c", opener("c"))  # type: ignore[arg-type]
    assert len(cache) == 2
    assert cache.get("a", opener("a")) is first  # type: ignore[arg-type]
    cache.drop_where(lambda key: key == "a")
    assert cache.get("a", opener("a")) is not first  # type: ignore[arg-type]
    cache.close()
    assert len(cache) == 0
