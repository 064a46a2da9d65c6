"""Tables, facts, figures."""

from __future__ import annotations

import pytest

from kitemq.cli.output import bytes_text, emit_facts, emit_json, emit_table, span_text, time_text


def test_a_table_in_a_pipe_is_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    emit_table(["name", "count#"], [("a" * 150, 5), ("b [red]", 12_345), ("", None)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].split() == ["NAME", "COUNT"]
    assert lines[1].split() == ["a" * 150, "5"]
    assert lines[2].startswith("b [red] ") and lines[2].endswith("12345")
    assert lines[3].split() == ["-", "-"]
    assert len({len(line) for line in lines}) == 1  # numbers stand right


def test_facts_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    emit_facts([("topic", "orders"), ("stored at", 0), ("tag", "")])
    assert capsys.readouterr().out == "topic      orders\nstored at  0\ntag        -\n"


def test_json_keeps_letters(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json(["grün"])
    assert capsys.readouterr().out == '[\n  "grün"\n]\n'


@pytest.mark.parametrize(
    ("span_ms", "expected"),
    [
        (0, "0 ms"),
        (12.34, "12.3 ms"),
        (999, "999 ms"),
        (1500, "1.5 s"),
        (119_000, "119 s"),
        (600_000, "10 min"),
        (9_000_000, "2.5 h"),
        (260_000_000, "3 d"),
    ],
)
def test_spans(span_ms: float, expected: str) -> None:
    assert span_text(span_ms) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 1024**3, "5 GiB"), (2**50, "1024 TiB")],
)
def test_bytes(count: int, expected: str) -> None:
    assert bytes_text(count) == expected


def test_times() -> None:
    assert time_text(0) is None
    shown = time_text(1_700_000_000_123)
    assert shown is not None and shown[10] == " " and ".123" in shown
