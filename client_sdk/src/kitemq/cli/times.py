"""Points in time as people write them: 'now', '10m' (ago), ISO dates and times, Unix milliseconds."""

from __future__ import annotations

import re
from datetime import datetime

_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 604_800_000}
_SPAN = re.compile(r"(?:[0-9]+(?:\.[0-9]+)?(?:ms|[smhdw]))+")
_SPAN_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhdw])")

# The year 9999, where dates end.
TIMESTAMP_MS_END = 253_370_764_800_000

TIME_HELP = "'now', '10m', '2h30m' or '3d' (ago), '2026-01-31', '2026-01-31T08:00' (local time unless it says), or ms"


def parse_time(text: str, *, now_ms: int) -> int:
    """Unix milliseconds, not negative. Raises ValueError, in words for people, for what is no time."""
    timestamp_ms = _timestamp_ms(text.strip(), now_ms)
    if not 0 <= timestamp_ms < TIMESTAMP_MS_END:
        raise ValueError(f"{text!r} is no time since 1970: write {TIME_HELP}")
    return timestamp_ms


def _timestamp_ms(text: str, now_ms: int) -> int:
    if text == "now":
        return now_ms
    if text.isascii() and text.isdigit() and len(text) > 8:  # shorter: a date without dashes, or a slip
        return int(text)
    if _SPAN.fullmatch(text):
        return now_ms - parse_span(text)
    try:
        return round(datetime.fromisoformat(text).timestamp() * 1000)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is no time: write {TIME_HELP}") from None


def parse_span(text: str) -> int:
    """Milliseconds of "90s", "10m", "1h30m", "250ms". Raises ValueError."""
    if not _SPAN.fullmatch(text):
        raise ValueError(f"{text!r} is no length of time: write 90s, 10m, 1h30m, 2d")
    return round(sum(float(number) * _UNIT_MS[unit] for number, unit in _SPAN_PART.findall(text)))
