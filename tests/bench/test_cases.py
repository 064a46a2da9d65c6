"""A tiny run of every case against real processes: figures come out, and nothing stays behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from kitemq.bench import growth, suite
from kitemq.bench.harness import Growth, Harness, Settings, open_harness, run_cases
from kitemq.bench.process import BenchError
from kitemq.bench.rows import Bar, Row

pytestmark = pytest.mark.processes

TINY = Settings(
    seconds=0.1,
    warm_up_s=0.1,
    baseline_s=0.05,
    rounds=1,
    drain_messages=6_400,
    rate=500.0,
    growth=Growth(
        backlog_messages=1_280,
        topics=2,
        queues_per_topic=10,
        consumers=20,
        idle_s=0.1,
        restart_log_bytes=2_000_000,
    ),
)
CASES = {**suite.CASES, **growth.CASES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def harness(data: Path) -> Iterator[Harness]:
    with open_harness(TINY, data=data, say=lambda text: None, free_bytes_wanted=0) as harness:
        yield harness
    assert list(data.iterdir()) == []
    assert processes_of(data) == []


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that name the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue  # it has just ended
        if str(folder) in words:
            found.append(words)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_measured(harness: Harness, name: str) -> None:
    rows = CASES[name](harness)
    assert rows
    for row in rows:
        assert row.measured, row
        assert math.isfinite(row.bar.limit), row
        assert row.bar.limit > 0, row
        assert len(row.runs) == 1
        assert (row.baseline != "") == (row.ratio is not None)
        for cost in row.costs:
            assert cost.memory_bytes > 5_000_000, cost  # a Python process with gRPC in it
            assert cost.cpu_s_per_million >= 0
            assert cost.written_bytes_per_million >= 0
        json.dumps(row.to_json(), allow_nan=False)
    assert [path.name for path in harness.folder.iterdir() if path.is_dir()] == []


def test_a_case_that_fails_has_a_row_that_says_so(harness: Harness) -> None:
    def failing(_: Harness) -> list[Row]:
        raise BenchError("no such disk")

    def good(_: Harness) -> list[Row]:
        return [Row("good", "", [2.0], Bar("≥ 1", 1.0, at_least=True))]

    rows = run_cases({"failing": failing, "good": good}, harness)
    assert [(row.case, row.measured) for row in rows] == [("failing: not measured", False), ("good", True)]


def test_only_the_cases_that_are_named_run(harness: Harness) -> None:
    def unwanted(_: Harness) -> list[Row]:
        raise AssertionError

    assert run_cases({"unwanted": unwanted, "wanted": lambda _: []}, harness, only=["wanted"]) == []
    with pytest.raises(BenchError, match="no case 'other': there are unwanted, wanted"):
        run_cases({"unwanted": unwanted, "wanted": lambda _: []}, harness, only=["other"])


def test_a_disk_that_is_too_small_is_refused_at_once(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match="GB free of the 1000000000 GB that this needs"),
        open_harness(TINY, data=tmp_path, say=lambda text: None, free_bytes_wanted=10**18),
    ):
        pass
