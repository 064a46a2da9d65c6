"""The demo: its comparison, and the whole of it with a small file."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from examples.demo.check import Handled, compare, read_events, read_journals

ROOT = Path(__file__).parent.parent.parent
EVENTS = [b"one\n", b"two\n", b"\n", b"f\xffur"]


def handled(line: int, *, at: int | None = None, queue: str = "b:0", offset: int | None = None) -> Handled:
    return Handled(line if at is None else at, line, queue, line if offset is None else offset, EVENTS[line - 1])


def test_everything_arrived() -> None:
    verdict = compare(EVENTS, 4, [handled(number) for number in (1, 2, 3, 4)])
    assert verdict.good
    assert verdict.sent_sum == hashlib.sha256(b"".join(EVENTS)).hexdigest()
    assert (verdict.handled, verdict.repeated, verdict.queues) == (4, 0, 1)


def test_what_comes_again_is_counted_and_does_not_disturb_the_order() -> None:
    deliveries = [handled(1), handled(2), handled(1, at=3), handled(2, at=4), handled(3, at=5), handled(4, at=6)]
    verdict = compare(EVENTS, 4, deliveries)
    assert verdict.good
    assert verdict.repeated == 2


def test_a_lost_event() -> None:
    verdict = compare(EVENTS, 4, [handled(1), handled(2), handled(4)])
    assert not verdict.good
    assert verdict.lost == [3]
    assert verdict.sent_sum != verdict.handled_sum


def test_an_altered_event() -> None:
    verdict = compare(EVENTS, 4, [handled(1), handled(2), handled(3), Handled(4, 4, "b:0", 4, b"five")])
    assert not verdict.good
    assert (verdict.lost, verdict.sent_sum == verdict.handled_sum) == ([], False)


def test_an_event_that_was_never_sent() -> None:
    stranger = Handled(9, 9, "b:0", 9, b"x")
    verdict = compare(EVENTS, 4, [handled(1), handled(2), handled(3), handled(4), stranger])
    assert not verdict.good
    assert (verdict.strangers, verdict.repeated) == (1, 0)


def test_an_event_that_was_not_acknowledged() -> None:
    assert not compare(EVENTS, 3, [handled(number) for number in (1, 2, 3, 4)]).good


def test_a_queue_out_of_order() -> None:
    verdict = compare(EVENTS, 4, [handled(1, offset=2), handled(2, offset=1), handled(3), handled(4)])
    assert not verdict.good
    assert verdict.disordered == ["b:0 offset 1"]
    other_queue = [handled(1, offset=2), handled(2, offset=1, queue="b:1"), handled(3), handled(4)]
    assert compare(EVENTS, 4, other_queue).good


def test_journals_of_several_consumers_are_read_in_the_order_of_time(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(handled(1).text() + handled(4).text())
    (tmp_path / "b").write_text(handled(2).text() + handled(3).text())
    assert [one.line for one in read_journals([tmp_path / "a", tmp_path / "b"])] == [1, 2, 3, 4]
    assert [one.body for one in read_journals([tmp_path / "a", tmp_path / "b"])] == EVENTS


def test_the_events_are_what_the_text_says() -> None:
    events = list(read_events(ROOT / "examples" / "demo" / "events.txt"))
    readme = (ROOT / "examples" / "demo" / "README.md").read_text()
    assert f"{len(events):,} real events" in readme
    assert events == sorted(events)
    line = re.compile(rb"\d{4}(-\d\d){2}T(\d\d:){2}\d\dZ [\w/+-]+( [+-]\d\d:\d\d(:\d\d)?){2} [\w+-]+\n")
    assert all(line.fullmatch(event) for event in events)
    for shown in re.findall(r"^\d{4}-.*$", readme, re.MULTILINE):
        assert f"{shown}\n".encode() in events


async def start_demo(tmp_path: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "examples.demo", *arguments),
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=2**20,
    )


def processes_of(path: Path) -> list[int]:
    """Ids of processes whose command line names the path."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(path).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # it has just ended
            continue
    return found


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def until_sending(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    while b"the producer sends" not in (line := await process.stdout.readline()):
        assert line, "the demo ended early"


@pytest.mark.processes
@pytest.mark.slow
async def test_the_demo_proves_that_nothing_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "my events.txt"
    file.write_bytes(b"".join(b"event %d\r\n" % number for number in range(600)) + b"\n\xff\x00 last")
    process = await start_demo(tmp_path, "--file", str(file), "--seconds", "5")
    out, err = (stream.decode() for stream in await process.communicate())
    assert process.returncode == 0, out + err
    assert err == ""
    for text in (
        "602 events of my events.txt",
        "consumers A and B have joined; 8 queues: A 4, B 4",
        "consumer C has joined; 8 queues: A 3, B 3, C 2",
        "the broker is killed with SIGKILL",
        "the broker serves again",
        "consumer C has left; 8 queues: A 4, B 4",
        "602 of 602 events acknowledged",
        "602 events, lost 0",
        hashlib.sha256(file.read_bytes()).hexdigest()[:32],
        "kept in each of 8 queues",
        "Nothing was lost",
    ):
        assert text in out, out
    assert names_in(tmp_path) == {file.name}
    assert processes_of(tmp_path) == []


@pytest.mark.processes
async def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    process = await start_demo(tmp_path)
    await until_sending(process)
    process.send_signal(signal.SIGINT)
    _, err = await process.communicate()
    assert (process.returncode, err) == (130, b"Stopped.\n")
    assert names_in(tmp_path) == set()
    assert processes_of(tmp_path) == []


@pytest.mark.processes
async def test_a_consumer_that_dies_fails_the_demo_and_leaves_the_logs(tmp_path: Path) -> None:
    process = await start_demo(tmp_path)
    await until_sending(process)
    folder = tmp_path / names_in(tmp_path).pop()
    (consumer,) = processes_of(folder / "journal-A")
    os.kill(consumer, signal.SIGKILL)
    _, err = (stream.decode() for stream in await process.communicate())
    assert process.returncode == 1
    assert err == f"The demo failed: consumer-A has died.\nLogs and journals are kept in {folder}\n"
    assert {"broker.log", "namesrv.log", "journal-A", "journal-B"} <= names_in(folder)
    assert processes_of(folder) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "has no lines"), (b"x" * (4 * 1024 * 1024 + 1), "line 1 of .* has 4194305 bytes: a message holds 4194304")],
)
async def test_a_file_that_cannot_be_sent(tmp_path: Path, content: bytes, problem: str) -> None:
    file = tmp_path / "events"
    file.write_bytes(content)
    process = await start_demo(tmp_path, "--file", str(file))
    _, err = await process.communicate()
    assert process.returncode == 2
    assert re.search(problem, err.decode())
