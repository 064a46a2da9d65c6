"""Points in time as people write them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from kitemq.cli.times import parse_span, parse_time

NOW_MS = 1_800_000_000_000


def iso(text: str) -> int:
    return round(datetime.fromisoformat(text).timestamp() * 1000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("now", NOW_MS),
        ("10m", NOW_MS - 600_000),
        ("2h30m", NOW_MS - 9_000_000),
        ("1.5s", NOW_MS - 1_500),
        ("250ms", NOW_MS - 250),
        ("3d", NOW_MS - 3 * 86_400_000),
        ("1w", NOW_MS - 7 * 86_400_000),
        ("1700000000000", 1_700_000_000_000),
        ("2026-01-31", iso("2026-01-31")),
        ("20260131", iso("2026-01-31")),
        ("2026-01-31T08:00", iso("2026-01-31T08:00")),
        ("2026-01-31 08:00:01.250+02:00", iso("2026-01-31T08:00:01.250+02:00")),
        ("1970-01-01T00:00:00Z", 0),
        (" now ", NOW_MS),
    ],
)
def test_times(text: str, expected: int) -> None:
    assert parse_time(text, now_ms=NOW_MS) == expected


def test_a_time_with_zone_is_exact() -> None:
    moment = datetime(2026, 3, 1, 12, 30, 0, 123_000, UTC)
    assert parse_time(moment.isoformat(), now_ms=0) == int(moment.timestamp()) * 1000 + 123


@pytest.mark.parametrize(
    "text", ["", "soon", "10", "10x", "m10", "-5m", "2026-13-01", "99999999999999999999m", "\uff11\uff10m"]
)
def test_what_is_no_time_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="write") as caught:
        parse_time(text, now_ms=NOW_MS)
    assert repr(text) in str(caught.value)


def test_spans() -> None:
    assert parse_span("90s") == 90_000
    assert parse_span("1h30m") == 5_400_000
    for text in ("", "90", "s", "1h 30m", "-1s"):
        with pytest.raises(ValueError, match="no length of time"):
            parse_span(text)
