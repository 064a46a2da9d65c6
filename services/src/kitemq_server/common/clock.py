"""The time, as a seam: tests put their own in its place."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Milliseconds since some fixed moment (never backwards), and since 1970."""

    def monotonic_ms(self) -> int:
        """For durations and deadlines."""

    def wall_ms(self) -> int:
        """For people and for stored timestamps."""


class SystemClock:
    """The machine's clocks."""

    def monotonic_ms(self) -> int:
        """CLOCK_MONOTONIC."""
        return time.monotonic_ns() // 1_000_000

    def wall_ms(self) -> int:
        """Unix milliseconds."""
        return time.time_ns() // 1_000_000
