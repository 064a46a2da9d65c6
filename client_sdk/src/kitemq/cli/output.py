"""What verbs print: data to stdout, as a table or as JSON; everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any


class Format(StrEnum):
    """-o of every listing."""

    TABLE = "table"
    JSON = "json"


def note(text: str) -> None:
    """One line to stderr."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def emit(text: str) -> None:
    """One line of data to stdout."""
    sys.stdout.write(text + "\n")


def emit_json(value: Any) -> None:
    """One JSON document to stdout."""
    emit(json.dumps(value, indent=2, ensure_ascii=False))


def emit_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Rows under headings. Columns whose heading ends in '#' hold numbers: the '#' goes, the numbers stand right.

    On a terminal long cells fold, but those of the first column; in a pipe every row stays one line.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for position, column in enumerate(columns):
        number = column.endswith("#")
        table.add_column(
            column.removesuffix("#").upper(),
            justify="right" if number else "left",
            overflow="fold",
            no_wrap=number or position == 0 or not on_terminal,
        )
    for row in rows:
        table.add_row(*(Text("-" if cell is None or cell == "" else str(cell)) for cell in row))
    console = Console(file=sys.stdout, highlight=False, width=None if on_terminal else 10_000)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        emit(line.rstrip())


def emit_facts(facts: Iterable[tuple[str, object]]) -> None:
    """Names and values, a line each."""
    shown = [(name, "-" if value is None or value == "" else str(value)) for name, value in facts]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        emit(f"{name:<{width}}  {value}")


def time_text(timestamp_ms: int) -> str | None:
    """Local time to the millisecond, with the offset; None for 0 (never)."""
    if not timestamp_ms:
        return None
    return datetime.fromtimestamp(timestamp_ms / 1000).astimezone().isoformat(sep=" ", timespec="milliseconds")


def short_time_text(timestamp_ms: int) -> str | None:
    """Local time to the second, for columns; None for 0 (never)."""
    text = time_text(timestamp_ms)
    return text and text[:19]


def span_text(span_ms: float) -> str:
    """A length of time in its largest useful unit: "250 ms", "12.3 s", "5 min", "3.2 h", "4 d"."""
    for unit, unit_ms, below in (("ms", 1, 1_000), ("s", 1_000, 120_000), ("min", 60_000, 7_200_000)):
        if span_ms < below:
            return f"{_three(span_ms / unit_ms)} {unit}"
    hours = span_ms / 3_600_000
    return f"{_three(hours)} h" if hours < 72 else f"{_three(hours / 24)} d"


def count_text(count: int, noun: str) -> str:
    """ "1 message", "2 messages"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def bytes_text(count: int) -> str:
    """ "512 B", "1.2 KiB", "3.4 GiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{_three(size)} {unit}"
        size /= 1024
    return f"{_three(size)} TiB"


def _three(value: float) -> str:
    """Three digits that mean something, no trailing zeros."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")
