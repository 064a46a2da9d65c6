"""What a measurement says against its bar: the rows of the table, and of the JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from statistics import median
from typing import Any, NamedTuple


class Verdict(StrEnum):
    """Whether a bar was reached."""

    PASS = "pass"
    SHORT = "short"


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach. text: as people read it; limit: in the figure's unit; at_least: else at most."""

    text: str
    limit: float
    at_least: bool

    def judge(self, figure: float) -> Verdict:
        """A figure or a limit that was not measured (not a number, or a limit of 0) is short, whatever the bar."""
        if not math.isfinite(figure) or not math.isfinite(self.limit) or self.limit <= 0:
            return Verdict.SHORT
        reached = figure >= self.limit if self.at_least else 0 <= figure <= self.limit
        return Verdict.PASS if reached else Verdict.SHORT


class Cost(NamedTuple):
    """What one process spent on a case. Per million messages; memory: at the end of the case."""

    process: str
    cpu_s_per_million: float
    written_bytes_per_million: float
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of one case.

    runs: one value a round; the figure is their median, as the baseline is of `baseline_runs`. baseline: its name,
    empty where the bar is absolute. other_cores: how many cores worked for something else in the worst round.
    """

    case: str
    unit: str
    runs: Sequence[float]
    bar: Bar
    baseline: str = ""
    baseline_runs: Sequence[float] = ()
    costs: Sequence[Cost] = ()
    notes: Mapping[str, float] = field(default_factory=dict)
    other_cores: float = 0.0

    @property
    def figure(self) -> float:
        """Not a number when there are no runs, or when one of them could not be measured."""
        return median(self.runs) if self.runs and all(map(math.isfinite, self.runs)) else math.nan

    @property
    def measured(self) -> bool:
        return math.isfinite(self.figure)

    @property
    def baseline_figure(self) -> float | None:
        return median(self.baseline_runs) if self.baseline_runs else None

    @property
    def ratio(self) -> float | None:
        baseline = self.baseline_figure
        return self.figure / baseline if baseline else None

    @property
    def verdict(self) -> Verdict:
        return self.bar.judge(self.figure)

    def to_json(self) -> dict[str, Any]:
        return {
            "case": self.case,
            "figure": _number(self.figure),
            "unit": self.unit,
            "baseline": self.baseline,
            "baseline_figure": _number(self.baseline_figure),
            "ratio": _number(self.ratio),
            "bar": self.bar.text,
            "limit": _number(self.bar.limit),
            "verdict": self.verdict.value,
            "runs": [_number(run) for run in self.runs],
            "baseline_runs": [_number(run) for run in self.baseline_runs],
            "costs": [cost._asdict() for cost in self.costs],
            "notes": dict(self.notes),
            "other_cores": self.other_cores,
        }


def _number(value: float | None) -> float | None:
    """JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def spread_percent(runs: Sequence[float]) -> float:
    """How far apart the runs are: (highest - lowest) / median, in percent; 0 for fewer than two."""
    middle = median(runs) if runs else 0.0
    return (max(runs) - min(runs)) / middle * 100 if len(runs) > 1 and middle else 0.0


def all_pass(rows: Sequence[Row]) -> bool:
    """False also when there is nothing to judge."""
    return bool(rows) and all(row.verdict is Verdict.PASS for row in rows)
