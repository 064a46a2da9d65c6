"""`kitemq bench …` as users run it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kitemq.bench import suite
from kitemq.bench.rows import Bar, Row
from kitemq.cli.main import main
from tests.cli.conftest import Run, Start, run, start
from tests.cluster import Cluster

__all__ = ["run", "start"]  # fixtures

PASSING = Row("fast", "messages/s", [20.0], Bar("≥ 10 x U", 10.0, at_least=True), "U", [1.0])
SHORT = Row("slow", "ms", [20.0], Bar("≤ 6 x U p50", 6.0, at_least=False), "U p50", [1.0])
UNMEASURED = Row("failed: not measured", "", (), Bar("measured", 1.0, at_least=True))

Measure = Callable[..., int]


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Measure:
    """Run `kitemq bench suite WORDS` whose only case has `rows`; its exit code."""

    def measure(rows: list[Row], *words: str) -> int:
        monkeypatch.setattr(suite, "CASES", {"only": lambda _: rows})
        monkeypatch.setattr(suite, "FREE_BYTES_WANTED", 0)
        with pytest.raises(SystemExit) as ended:
            main(["bench", "suite", "--data", str(tmp_path / "data"), *words])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    return measure


def test_the_table_has_every_row(measure: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure([PASSING, SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [word for word in lines[0].split() if word != "SPREAD"] == [
        "CASE",
        "FIGURE",
        "BASELINE",
        "RATIO",
        "BAR",
        "VERDICT",
    ]
    assert lines[1].split() == ["fast", "20", "messages/s", "-", "1", "U", "-", "20", "≥", "10", "x", "U", "pass"]
    assert lines[2].split()[-1] == "short"


def test_strict_fails_when_a_bar_is_short(measure: Measure) -> None:
    assert measure([PASSING], "--strict") == 0
    assert measure([PASSING, SHORT], "--strict") == 1
    assert measure([], "--strict") == 1


def test_what_could_not_be_measured_fails_always(measure: Measure) -> None:
    assert measure([PASSING, UNMEASURED]) == 1


def test_the_rows_are_written_as_json(measure: Measure, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    assert measure([PASSING, SHORT, UNMEASURED], "--json", str(file)) == 1
    assert [(row["case"], row["verdict"]) for row in json.loads(file.read_text())] == [
        ("fast", "pass"),
        ("slow", "short"),
        ("failed: not measured", "short"),
    ]


def test_a_case_that_does_not_exist_is_named(measure: Measure, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure([PASSING], "--only", "nothing") == 1
    assert capsys.readouterr().err == "Error: no case 'nothing': there are only\n"


# ---- load on a cluster ----


async def test_produce_in_a_closed_loop(cluster: Cluster, run: Run) -> None:
    result = await run("bench", "produce", "t", "--duration", "500ms", "--in-flight", "8", "-o", "json")
    assert (result.code, result.err) == (0, "")
    total = result.json
    assert total["aggregatedPublishRate"] > 0
    assert total["aggregatedPublishErrors"] == 0
    assert 0 < total["aggregatedPublishLatency50pct"] <= total["aggregatedPublishLatencyMax"]
    assert await stored(cluster, run) == pytest.approx(total["aggregatedPublishRate"] * 0.5, rel=0.2)


async def test_produce_at_a_rate_in_batches(cluster: Cluster, run: Run) -> None:
    words = ("bench", "produce", "t", "--rate", "200", "--batch", "10", "-b", "10", "--duration", "1500ms")
    result = await run(*words, "-o", "json")
    assert result.code == 0, result.err
    assert await stored(cluster, run) == 300
    assert len(result.json["publishRate"]) == 1  # whole seconds
    assert result.json["publishRate"][0] == pytest.approx(200, rel=0.3)


async def test_consume_reports_what_it_handled(cluster: Cluster, run: Run) -> None:
    await run("bench", "produce", "t", "--rate", "500", "--duration", "400ms", "-b", "10")
    result = await run("bench", "consume", "t", "--group", "g", "--from-first", "--duration", "3s", "-o", "json")
    assert result.code == 0, result.err
    total = result.json
    assert sum(total["consumeRate"]) == pytest.approx(200, rel=0.1)
    assert total["aggregatedEndToEndLatencyMax"] > 0
    offsets = (await run("group", "describe", "g", "-o", "json")).json
    assert sum(queue["consumer_offset"] or 0 for queue in offsets["queues"]) == 200


async def test_latency_finds_its_own_messages_among_others(cluster: Cluster, run: Run) -> None:
    await run("bench", "produce", "t", "--rate", "500", "--duration", "200ms")
    result = await run("bench", "latency", "t", "--rate", "100", "--duration", "1s", "-o", "json")
    assert result.code == 0, result.err
    total: dict[str, Any] = result.json
    seconds = total["aggregatedPublishRate"] and 100 / total["aggregatedPublishRate"]
    assert total["aggregatedConsumeRate"] * seconds == pytest.approx(100)
    assert total["aggregatedEndToEndLatency50pct"] > 0


async def test_a_line_a_second_and_the_whole(cluster: Cluster, run: Run) -> None:
    result = await run("bench", "produce", "t", "--rate", "100", "--duration", "2100ms")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", "total"]
    assert all("msg/s" in line and "99.9%" in line and line.endswith("0 errors") for line in lines)


async def test_ctrl_c_reports_what_was_done(cluster: Cluster, start: Start) -> None:
    running = await start("bench", "produce", "t", "--rate", "100", "--duration", "10m")
    await running.until(lambda: b"msg/s" in running.out)
    result = await running.interrupt()
    assert result.code == 130
    assert result.out.splitlines()[-1].split()[0] == "total"


async def test_a_topic_that_does_not_exist_is_an_error(cluster: Cluster, run: Run) -> None:
    result = await run("bench", "produce", "no such", "--duration", "100ms")
    assert (result.code, "no such" in result.err) == (2, True)


async def stored(cluster: Cluster, run: Run) -> int:
    found = (await run("topic", "describe", "t", "-o", "json")).json
    return sum(queue["max_offset"] - queue["min_offset"] for queue in found["queues"])
