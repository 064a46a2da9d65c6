"""Verdicts: that a bar can be missed, and that nothing unmeasured passes one."""

from __future__ import annotations

import json
import math

import pytest

from kitemq.bench.rows import Bar, Cost, Row, Verdict, all_pass, spread_percent

AT_LEAST = Bar("≥ 10 x U", 50_000.0, at_least=True)
AT_MOST = Bar("≤ 6 x U p50", 3.0, at_least=False)


@pytest.mark.parametrize(
    ("bar", "figure", "verdict"),
    [
        (AT_LEAST, 50_000.0, Verdict.PASS),
        (AT_LEAST, 49_999.9, Verdict.SHORT),
        (AT_LEAST, 0.0, Verdict.SHORT),
        (AT_MOST, 3.0, Verdict.PASS),
        (AT_MOST, 3.01, Verdict.SHORT),
        (AT_MOST, 0.0, Verdict.PASS),
        (AT_MOST, -1.0, Verdict.SHORT),
    ],
)
def test_a_figure_against_its_bar(bar: Bar, figure: float, verdict: Verdict) -> None:
    assert bar.judge(figure) is verdict


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bar", [AT_LEAST, AT_MOST])
def test_a_figure_that_was_not_measured_is_short(bar: Bar, figure: float) -> None:
    assert bar.judge(figure) is Verdict.SHORT


@pytest.mark.parametrize("limit", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("at_least", [True, False])
def test_a_bar_whose_baseline_was_not_measured_is_short(limit: float, at_least: bool) -> None:
    bar = Bar("", limit, at_least)
    assert bar.judge(1.0) is Verdict.SHORT
    assert bar.judge(0.0) is Verdict.SHORT


def test_figure_and_baseline_are_medians_and_the_ratio_is_theirs() -> None:
    row = Row("case", "messages/s", [10.0, 70.0, 60.0], AT_LEAST, "U", [5.0, 1.0, 6.0, 7.0])
    assert row.figure == 60.0
    assert row.baseline_figure == 5.5
    assert row.ratio == pytest.approx(60 / 5.5)


def test_one_run_without_a_figure_spoils_the_row() -> None:
    row = Row("case", "ms", [1.0, math.nan, 1.0], AT_MOST)
    assert not row.measured
    assert row.verdict is Verdict.SHORT


def test_a_row_as_json() -> None:
    row = Row(
        "case",
        "messages/s",
        [60_000.0],
        AT_LEAST,
        "U",
        [5_000.0],
        costs=[Cost("broker", 5.0, 1.2e9, 50_000_000)],
        notes={"extra": 1.0},
        other_cores=0.25,
    )
    value = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert value == {
        "case": "case",
        "figure": 60_000.0,
        "unit": "messages/s",
        "baseline": "U",
        "baseline_figure": 5_000.0,
        "ratio": 12.0,
        "bar": "≥ 10 x U",
        "limit": 50_000.0,
        "verdict": "pass",
        "runs": [60_000.0],
        "baseline_runs": [5_000.0],
        "costs": [
            {
                "process": "broker",
                "cpu_s_per_million": 5.0,
                "written_bytes_per_million": 1.2e9,
                "memory_bytes": 50_000_000,
            }
        ],
        "notes": {"extra": 1.0},
        "other_cores": 0.25,
    }


def test_a_row_that_was_not_measured_is_json_too() -> None:
    row = Row("case", "", (), Bar("measured", math.nan, at_least=True))
    value = json.loads(json.dumps(row.to_json(), allow_nan=False))
    assert (value["figure"], value["limit"], value["ratio"], value["verdict"]) == (None, None, None, "short")


def test_all_pass_needs_something_to_pass() -> None:
    passing = Row("a", "", [60_000.0], AT_LEAST)
    short = Row("b", "", [1.0], AT_LEAST)
    assert all_pass([passing])
    assert not all_pass([passing, short])
    assert not all_pass([])


def test_spread_is_of_the_middle() -> None:
    assert spread_percent([90.0, 100.0, 110.0]) == pytest.approx(20.0)
    assert spread_percent([5.0]) == 0.0
    assert spread_percent([]) == 0.0
