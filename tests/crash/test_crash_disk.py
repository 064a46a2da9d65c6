"""The crash model itself: it behaves as the real disk does, keeps what was synced, and loses the rest in every way."""

from __future__ import annotations

import errno
import random
import threading
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitemq_server.store.disk import Disk, RealDisk, read_file, replace_file, write_all
from tests.crash.crash_disk import CrashDisk
from tests.crash.fault_plan import PowerLossError

ROOT = Path("/crash-disk")

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.sampled_from("ab"), st.integers(0, 2000), st.binary(max_size=1200)),
        st.tuples(st.just("truncate"), st.sampled_from("ab"), st.integers(0, 2000)),
        st.tuples(st.just("allocate"), st.sampled_from("ab"), st.integers(0, 1000), st.integers(1, 1000)),
        st.tuples(st.just("rename"), st.sampled_from("ab"), st.sampled_from("ab")),
        st.tuples(st.just("remove"), st.sampled_from("ab")),
        st.tuples(st.just("sync"), st.sampled_from("ab")),
        st.tuples(st.just("sync directory")),
    ),
    max_size=20,
)


def run_step(disk: Disk, root: Path, step: tuple[object, ...]) -> object:
    directory = root / "d"
    match step:
        case ("write", str(name), int(position), bytes(data)):
            with closing(disk.open(directory / name, create=True)) as file:
                write_all(file, data, position)
        case ("truncate", str(name), int(size)):
            with closing(disk.open(directory / name, create=True)) as file:
                file.truncate(size)
        case ("allocate", str(name), int(position), int(count)):
            with closing(disk.open(directory / name, create=True)) as file:
                file.allocate(position, count)
        case ("rename", str(name), str(target)):
            try:
                disk.rename(directory / name, directory / target)
            except FileNotFoundError:
                return "missing"
        case ("remove", str(name)):
            try:
                disk.remove(directory / name)
            except FileNotFoundError:
                return "missing"
        case ("sync", str(name)):
            with suppress(FileNotFoundError):
                disk.sync_files([directory / name])
        case ("sync directory",):
            disk.fsync_dir(directory)
    return None


def visible(disk: Disk, root: Path) -> dict[str, bytes]:
    return {name: read_file(disk, root / "d" / name) for name in disk.listdir(root / "d")}


@given(steps=STEPS)
@settings(max_examples=60, deadline=None)
def test_behaves_as_the_real_disk(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[object, ...]]) -> None:
    real_root = tmp_path_factory.mktemp("real")
    real, model = RealDisk(), CrashDisk(ROOT)
    real.mkdir(real_root / "d")
    model.mkdir(ROOT / "d")
    for step in steps:
        assert run_step(model, ROOT, step) == run_step(real, real_root, step)
        assert visible(model, ROOT) == visible(real, real_root)
    assert visible(model.kill(random.Random(0)), ROOT) == visible(real, real_root)


@given(steps=STEPS, seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_what_was_synced_survives(steps: list[tuple[object, ...]], seed: int) -> None:
    disk = CrashDisk(ROOT)
    disk.mkdir(ROOT / "d")
    disk.fsync_dir(ROOT)
    for step in steps:
        run_step(disk, ROOT, step)
    for name in disk.listdir(ROOT / "d"):
        disk.sync_files([ROOT / "d" / name])
    disk.fsync_dir(ROOT / "d")
    before = visible(disk, ROOT)
    assert visible(disk.crash(random.Random(seed)), ROOT) == before


def outcomes(count: int, prepare: object) -> set[bytes | None]:
    assert callable(prepare)
    seen: set[bytes | None] = set()
    for seed in range(count):
        disk = CrashDisk(ROOT, rng=random.Random(seed))
        prepare(disk)
        after = disk.crash(random.Random(seed))
        seen.add(after.files().get(ROOT / "f"))
    return seen


def test_an_unsynced_write_may_do_anything_but_touch_its_neighbours() -> None:
    def prepare(disk: CrashDisk) -> None:
        file = disk.open(ROOT / "f", create=True)
        file.pwrite(b"A" * 2048, 0)
        file.fdatasync()
        disk.fsync_dir(ROOT)
        file.pwrite(b"B" * 1024, 512)

    seen = outcomes(600, prepare)
    assert b"A" * 2048 in seen
    assert b"A" * 512 + b"B" * 1024 + b"A" * 512 in seen
    assert b"A" * 512 + bytes(1024) + b"A" * 512 in seen
    assert b"A" * 1024 + b"B" * 512 + b"A" * 512 in seen  # the second sector alone
    assert any(data is not None and data.count(b"B") % 512 > 0 for data in seen)  # cut inside a sector
    assert all(data is not None and data[:512] == data[1536:] == b"A" * 512 and len(data) == 2048 for data in seen)


def test_bytes_that_do_not_change_are_safe() -> None:
    def prepare(disk: CrashDisk) -> None:
        file = disk.open(ROOT / "f", create=True)
        file.pwrite(b"A" * 1000, 0)
        file.fdatasync()
        disk.fsync_dir(ROOT)
        file.pwrite(b"A" * 1000, 0)

    assert outcomes(200, prepare) == {b"A" * 1000}


def test_writes_may_reach_the_disk_in_any_order() -> None:
    def prepare(disk: CrashDisk) -> None:
        file = disk.open(ROOT / "f", create=True)
        disk.fsync_dir(ROOT)
        file.pwrite(b"1" * 8, 0)
        file.pwrite(b"2" * 8, 8)

    seen = outcomes(300, prepare)
    assert {b"", b"1" * 8, b"1" * 8 + b"2" * 8, bytes(8) + b"2" * 8} <= seen


def test_entries_of_a_directory_are_forgotten_without_its_sync() -> None:
    def prepare(disk: CrashDisk) -> None:
        replace_file(disk, ROOT / "f", b"old")
        file = disk.open(ROOT / "new", create=True)
        file.pwrite(b"new", 0)
        file.fdatasync()
        disk.rename(ROOT / "new", ROOT / "f")

    assert outcomes(100, prepare) == {b"old", b"new"}

    def remove(disk: CrashDisk) -> None:
        replace_file(disk, ROOT / "f", b"old")
        disk.remove(ROOT / "f")

    assert outcomes(100, remove) == {b"old", None}


def test_a_failed_sync_is_never_made_good() -> None:
    """As on Linux: reads still show the bytes, the next fdatasync succeeds, a crash may lose them."""
    lost = 0
    for seed in range(60):
        disk = CrashDisk(ROOT, rng=random.Random(seed))
        file = disk.open(ROOT / "f", create=True)
        disk.fsync_dir(ROOT)
        file.pwrite(b"A" * 100, 0)
        disk.faults.fail("sync")
        with pytest.raises(OSError, match="Input/output error"):
            file.fdatasync()
        file.pwrite(b"B" * 100, 100)
        file.fdatasync()
        assert file.pread(200, 0) == b"A" * 100 + b"B" * 100
        after = disk.crash(random.Random(seed)).files()[ROOT / "f"]
        assert after[100:] == b"B" * 100
        lost += after[:100] != b"A" * 100
    assert lost > 20


def test_unsynced_bytes_outlive_a_kill_and_may_be_lost_by_a_later_crash() -> None:
    lost = 0
    for seed in range(60):
        disk = CrashDisk(ROOT)
        disk.open(ROOT / "f", create=True).pwrite(b"A", 0)
        disk = disk.kill(random.Random(seed))
        assert disk.files() == {ROOT / "f": b"A"}
        lost += disk.crash(random.Random(seed)).files() != {ROOT / "f": b"A"}
    assert lost > 10


def test_a_dead_disk_refuses_everything() -> None:
    disk = CrashDisk(ROOT)
    file = disk.open(ROOT / "f", create=True)
    lock = disk.lock(ROOT / "lock")
    stall = disk.faults.stall("sync")
    raised: list[BaseException] = []

    def sync() -> None:
        try:
            file.fdatasync()
        except PowerLossError as error:
            raised.append(error)

    thread = threading.Thread(target=sync)
    thread.start()
    assert stall.entered.wait(10)
    after = disk.kill(random.Random(0))
    thread.join(10)
    assert raised
    with pytest.raises(PowerLossError):
        file.pwrite(b"A", 0)
    with pytest.raises(PowerLossError):
        disk.open(ROOT / "f")
    lock.close()
    after.lock(ROOT / "lock").close()


def test_a_full_disk_takes_a_part_then_refuses_then_recovers() -> None:
    disk = CrashDisk(ROOT, capacity_bytes=1000)
    file = disk.open(ROOT / "f", create=True)
    file.allocate(0, 600)
    assert file.pwrite(b"A" * 800, 0) == 800
    assert file.pwrite(b"B" * 800, 800) == 200
    assert disk.free_bytes(ROOT) == 0
    with pytest.raises(OSError, match="No space left") as raised:
        file.pwrite(b"B", 1000)
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="No space left"):
        file.allocate(1000, 1)
    assert file.pwrite(b"C" * 1000, 0) == 1000
    file.truncate(500)
    assert disk.free_bytes(ROOT) == 500
    file.allocate(500, 500)


def test_power_off_after_a_number_of_changes() -> None:
    disk = CrashDisk(ROOT)
    disk.faults.power_off_after(3)
    file = disk.open(ROOT / "f", create=True)
    file.pwrite(b"A", 0)
    file.fdatasync()
    with pytest.raises(PowerLossError):
        file.pwrite(b"B", 1)
    with pytest.raises(PowerLossError):
        file.pread(1, 0)


def test_two_holders_of_a_lock() -> None:
    disk = CrashDisk(ROOT)
    lock = disk.lock(ROOT / "lock")
    with pytest.raises(BlockingIOError):
        disk.lock(ROOT / "lock")
    lock.close()
    disk.lock(ROOT / "lock").close()
