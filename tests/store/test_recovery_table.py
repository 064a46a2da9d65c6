"""Every row of the decision table in docs/format.md, each by the smallest log that shows it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import KIND_METADATA, RECORD_BYTES_MIN
from kitemq_server.store.record import build_record, system_payload
from kitemq_server.store.snapshot_file import load_snapshot, snapshot_bytes
from tests.crash.crash_disk import CrashDisk
from tests.store.helpers import (
    LAYOUT,
    NOW_MS,
    batch,
    bodies,
    new_disk,
    opened,
    queue_of,
    segment_bases,
    send,
)
from tests.store.log_files import LogFiles


@dataclass
class Row:
    """A log, what happens to it, and what is left: bodies of the queue's messages, the end, how much is damaged."""

    name: str
    log: LogFiles
    bodies: list[str]
    end: str | int
    damage: list[tuple[str | int, str | int]] = field(default_factory=list)
    cut: bool = False
    harm: Callable[[LogFiles, CrashDisk], None] | None = None
    zeros: int = 5000
    keys: set[str] = field(default_factory=set)


def log() -> LogFiles:
    return LogFiles().begin_epoch()


def flip(name: str, at: int = 30) -> Callable[[LogFiles, CrashDisk], None]:
    return lambda files, disk: files.flip(disk, name, at)


def lose(index: int) -> Callable[[LogFiles, CrashDisk], None]:
    """One of the segments is gone."""
    return lambda files, disk: disk.erase(LAYOUT.segment(sorted(files.segments)[index]))


def torn(name: str, keep: int) -> Callable[[LogFiles, CrashDisk], None]:
    """Only the first bytes of the last record reached the disk."""

    def harm(files: LogFiles, disk: CrashDisk) -> None:
        start, end = files.bounds[name]
        base = max(base for base in files.segments if base <= start)
        data = bytearray(disk.files()[LAYOUT.segment(base)])
        data[start - base + keep : end - base] = bytes(end - start - keep)
        disk.overwrite(LAYOUT.segment(base), bytes(data))

    return harm


def garbage_behind_zeros(files: LogFiles, disk: CrashDisk) -> None:
    disk.overwrite(LAYOUT.segment(0), disk.files()[LAYOUT.segment(0)] + b"garbage")


ROWS = [
    Row("empty", LogFiles(), [], 0),
    Row("A: goes on in the next segment", log().message("a").roll().message("b"), ["a", "b"], "b"),
    Row(
        "A: the truncation of the sealed segment was lost",
        log().message("a").roll().message("b"),
        ["a", "b"],
        "b",
        harm=lambda files, disk: disk.overwrite(LAYOUT.segment(0), bytes(files.segments[0]) + bytes(3000)),
    ),
    Row("B: no next segment", log().message("a").roll(), ["a"], "roll1", harm=lose(-1)),
    Row("B: the next segment is empty", log().message("a").roll(), ["a"], "roll1", zeros=0),
    Row("C: zeros behind the last record", log().message("a"), ["a"], "a"),
    Row("C: nothing behind the last record", log().message("a"), ["a"], "a", zeros=0),
    *(
        Row(
            f"D: {keep} bytes of the last record",
            log().message("a").message("b"),
            ["a"],
            "a",
            cut=True,
            harm=torn("b", keep),
        )
        for keep in (1, 5, 6, 40, 75)
    ),
    Row(
        "D: all but the last byte",
        log().message("a").message("b"),
        ["a"],
        "a",
        cut=True,
        harm=torn("b", len(LogFiles().message("b").segments[0]) - 1),
    ),
    Row(
        "D: a flipped bit in what nobody proved", log().message("a").message("b"), ["a"], "a", cut=True, harm=flip("b")
    ),
    Row(
        "D: valid records behind it prove nothing",
        log().message("a").message("b").message("c"),
        ["a"],
        "a",
        cut=True,
        harm=flip("b"),
    ),
    Row(
        "D: later segments go too",
        log().message("a").message("b").roll().message("c").roll().message("d"),
        ["a"],
        "a",
        cut=True,
        harm=flip("b"),
    ),
    Row("D: garbage behind zeros", log().message("a"), ["a"], "a", cut=True, harm=garbage_behind_zeros),
    Row(
        "D: a missing segment that nobody proved",
        log().message("a").roll().message("b").roll().message("c"),
        ["a"],
        "roll1",
        cut=True,
        harm=lose(1),
    ),
    Row(
        "D: a group that is not closed",
        log().message("a").key_value("k1", continues=True).key_value("k2", continues=True),
        ["a"],
        "a",
        cut=True,
    ),
    Row(
        "D: a group that is not closed, at the end of the file",
        log().message("a").key_value("k1", continues=True),
        ["a"],
        "a",
        cut=True,
        zeros=0,
    ),
    Row(
        "D: a group whose last record is torn",
        log().message("a").key_value("k1", continues=True).key_value("k2"),
        ["a"],
        "a",
        cut=True,
        harm=torn("k2", 50),
    ),
    Row("a group that is closed", log().key_value("k1", continues=True).key_value("k2"), [], "k2", keys={"k1", "k2"}),
    Row(
        "E: rot below what is proven",
        log().message("a").message("b").message("c").flushed().message("d"),
        ["a", "c", "d"],
        "d",
        [("b", "c")],
        harm=flip("b"),
    ),
    *(
        Row(
            f"E: rot in byte {at}",
            log().message("a").message("b").message("c").flushed().message("d"),
            ["a", "c", "d"],
            "d",
            [("b", "c")],
            harm=flip("b", at),
        )
        for at in (0, 1, 2, 5, 6, 8, RECORD_BYTES_MIN - 1)
    ),
    Row(
        "E: the proof lies in a later segment",
        log().message("a").message("b").roll().flushed().message("c"),
        ["a", "c"],
        "c",
        [("b", "roll1")],
        harm=flip("b"),
    ),
    Row(
        "E: rot in the last record of a segment",
        log().message("a").roll().flushed().message("b"),
        ["a", "b"],
        "b",
        [("roll1", "b")],
        harm=flip("roll1"),
    ),
    Row(
        "E: rot within a group takes all of it",
        log().message("a").key_value("k1", continues=True).key_value("k2").flushed().message("b"),
        ["a", "b"],
        "b",
        [("k2", "b")],
        harm=flip("k2"),
    ),
    Row(
        "G: a missing segment that is proven",
        log().message("a").roll().message("b").roll().flushed().message("c"),
        ["a", "c"],
        "c",
        [("b", "c")],
        harm=lose(1),
    ),
    Row("the oldest segment is missing", log().message("a").roll().message("b"), ["b"], "b", harm=lose(0)),
]


def place(files: LogFiles, name: str | int, *, end: bool) -> int:
    return name if isinstance(name, int) else files.bounds[name][end]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
async def test_row(row: Row) -> None:
    files = row.log
    disk = files.disk(zeros=row.zeros)
    if row.harm:
        row.harm(files, disk)
    end = place(files, row.end, end=True)
    async with opened(disk) as store:
        report = store.recovery
        assert [body.decode() for body in bodies(store)] == row.bodies
        assert set(store.key_values) == row.keys
        assert [(damage.start, damage.end) for damage in report.damages] == [
            (place(files, start, end=False), place(files, until, end=False)) for start, until in row.damage
        ]
        assert report.cut_from == (end if row.cut else -1)
        assert store.epochs[-1].first_physical_offset == end
        assert store.epoch > files.epoch or not store.epochs[:-1]
        for start, until in row.damage:
            check_set_aside(disk, files, place(files, start, end=False), place(files, until, end=False))
        # It goes on as if nothing had been.
        await send(store, batch(1, body=b"new"))
        assert [body.decode() for body in bodies(store)] == [*row.bodies, "new"]
    await check_second_start(disk, [*row.bodies, "new"])


def check_set_aside(disk: CrashDisk, files: LogFiles, start: int, end: int) -> None:
    """What could be read of a damaged stretch has been kept."""
    base = max((base for base in segment_bases(disk) if base <= start), default=0)
    kept = disk.files().get(LAYOUT.damaged_file(start, end - start))
    if kept is not None:
        original = disk.files()[LAYOUT.segment(base)][start - base : end - base]
        assert kept == original


async def check_second_start(disk: CrashDisk, expected: list[str]) -> None:
    async with opened(disk) as store:
        assert [body.decode() for body in bodies(store)] == expected
        assert all(damage.reason == "missing" for damage in store.recovery.damages)
    # And from nothing but the log: the same, but for damage that is found again.
    for name in disk.listdir(LAYOUT.snapshot):
        disk.erase(LAYOUT.snapshot / name)
    disk.erase(LAYOUT.consume_queue)
    async with opened(disk) as store:
        assert [body.decode() for body in bodies(store)] == expected
        assert store.recovery.cut_from == -1


async def with_snapshot(disk: CrashDisk, **changes: object) -> dict[str, object]:
    """The newest snapshot of a store, changed."""
    name = disk.listdir(LAYOUT.snapshot)[-1]
    state = load_snapshot(disk, LAYOUT.snapshot / name, store_uuid(disk))
    state |= changes
    disk.overwrite(LAYOUT.snapshot / name, snapshot_bytes(json.dumps(state).encode()))
    return state


def store_uuid(disk: CrashDisk) -> str:
    return str(json.loads(disk.files()[LAYOUT.store_json])["store_uuid"])


async def test_row_f_rot_to_the_end() -> None:
    """Only a snapshot can prove what no later record does: that the log was on disk beyond the snapshot's own place."""
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(1, body=b"a"))
    async with opened(disk) as store:
        await send(store, batch(1, body=b"b"))
        start = store.written_offset
        await send(store, batch(1, body=b"c"))
        end = store.written_offset
        survivor = disk.copy()
    await with_snapshot(survivor, flushed_offset=end)
    survivor.flip_bit(LAYOUT.segment(0), start + 30)
    async with opened(survivor) as store:
        assert bodies(store) == [b"a", b"b"]
        assert [(damage.start, damage.end) for damage in store.recovery.damages] == [(start, end)]
        assert store.recovery.cut_from == start
        assert len(survivor.files()[LAYOUT.damaged_file(start, end - start)]) == end - start
        await send(store, batch(1, body=b"d"))
    await check_second_start(survivor, ["a", "b", "d"])


async def test_row_h_the_log_ends_below_the_snapshot() -> None:
    disk = new_disk()
    async with opened(disk) as store:
        await send(store, batch(1, body=b"a"))
        cut_at = store.written_offset
        await send(store, batch(2, body=b"lost"))
    end = store.written_offset
    disk.overwrite(LAYOUT.segment(0), disk.files()[LAYOUT.segment(0)][:cut_at])
    async with opened(disk) as store:
        assert [(damage.start, damage.end) for damage in store.recovery.damages] == [(cut_at, end)]
        assert segment_bases(disk) == [0, end]
        assert bodies(store) == [b"a"]  # the lost ones are skipped
        assert queue_of(store).max_offset == 3  # and no offset is given twice
        await send(store, batch(1, body=b"new"))
        assert bodies(store) == [b"a", b"new"]
    async with opened(disk) as store:
        assert bodies(store) == [b"a", b"new"]
        assert [damage.reason for damage in store.recovery.damages] == ["missing"]


async def test_stale_records_of_equal_size_never_come_back() -> None:
    """A log is cut, new records of exactly the old size are appended, and power fails: the old ones stay gone."""
    for kept in range(4):
        files = log()
        for index in range(6):
            files.message(f"old{index}")
        disk = files.disk()
        files.flip(disk, "old2")
        async with opened(disk) as store:
            assert len(bodies(store)) == 2
            for index in range(kept):
                await send(store, batch(1, body=b"new%d" % index))
            survivor = disk.kill(random.Random(1))
        async with opened(survivor) as store:
            assert bodies(store) == [b"old0", b"old1", *(b"new%d" % index for index in range(kept))]


async def test_what_is_not_proven_is_written_again_before_it_is_confirmed() -> None:
    files = log().message("a").flushed().message("b").message("c")
    async with opened(files.disk()) as store:
        proven = files.bounds["a"][1]
        assert store.recovery.rewritten_bytes == files.bounds["c"][1] - proven
        assert bodies(store) == [b"a", b"b", b"c"]


async def test_a_message_that_looks_like_records_proves_nothing() -> None:
    """A torn message whose body holds a well-made record of its very place must not bring that record to life."""
    files = log().message("a")
    start = files.position
    inner_at = start + 200
    change = message_pb2.SystemRecord(key_value_set=message_pb2.KeyValue(key="forged", value="1"))
    forged = build_record(
        KIND_METADATA,
        system_payload(change),
        physical_offset=inner_at,
        store_timestamp_ms=NOW_MS,
        epoch=1,
        flushed_offset=inner_at,
    )
    outer = LogFiles(start=start).message("b", body_bytes=5000)
    data = bytearray(outer.segments[start])
    data[200 : 200 + len(forged)] = forged
    data[4096 - start % 4096 :] = bytes(len(data) - (4096 - start % 4096))  # the last blocks are lost
    files.raw(bytes(data))
    async with opened(files.disk()) as store:
        assert bodies(store) == [b"a"]
        assert not store.key_values
        assert store.recovery.cut_from == start
