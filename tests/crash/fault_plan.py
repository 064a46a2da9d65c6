"""What goes wrong on a CrashDisk, and when: failing, stalled and short calls, a power cut in the middle of one."""

from __future__ import annotations

import errno
import os
import random
import threading
from pathlib import Path
from typing import Literal

Operation = Literal["read", "write", "sync", "size", "directory", "open"]
"""size: truncate and allocate. directory: creations, renames, removals and their sync."""

CHANGING: frozenset[Operation] = frozenset({"write", "sync", "size", "directory"})


class PowerLossError(OSError):
    """The machine is off, or the process that used this disk is dead."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the power is off")


class Stall:
    """Calls of one kind that hang until release()."""

    def __init__(self, operation: Operation, part: str) -> None:
        self.operation = operation
        self.part = part
        self.entered = threading.Event()
        self._released = threading.Event()

    def release(self) -> None:
        """Lets the hanging calls, and all later ones, go on."""
        self._released.set()

    def hang(self) -> None:
        """Hangs the calling thread."""
        self.entered.set()
        self._released.wait()


class _Failure:
    def __init__(self, operation: Operation, part: str, nth: int, error: int, count: int | None) -> None:
        self.operation = operation
        self.part = part
        self.calls_before = nth - 1
        self.error = error
        self.left = count


class FaultPlan:
    """Faults of one disk. A `part` names the calls meant: those whose path contains it ("" = all)."""

    def __init__(self) -> None:
        self._failures: list[_Failure] = []
        self._stalls: list[Stall] = []
        self._lock = threading.Lock()
        self._power_off_at: int | None = None
        self._short_rng: random.Random | None = None
        self.change_count = 0
        self.dead = False
        self.failed_count = 0

    def fail(
        self, operation: Operation, *, part: str = "", nth: int = 1, error: int = errno.EIO, count: int | None = 1
    ) -> None:
        """The nth such call from now fails, and count - 1 after it (None: all)."""
        self._failures.append(_Failure(operation, part, nth, error, count))

    def stall(self, operation: Operation, *, part: str = "") -> Stall:
        """All such calls hang from now until the stall is released."""
        stall = Stall(operation, part)
        self._stalls.append(stall)
        return stall

    def shorten_writes(self, rng: random.Random) -> None:
        """Half of the writes from now on write a part only, as POSIX allows."""
        self._short_rng = rng

    def power_off_after(self, changes: int) -> None:
        """The call after that many more changing calls, and every later one, raises PowerLossError."""
        self._power_off_at = self.change_count + changes

    def clear(self) -> None:
        """No more faults."""
        self._failures.clear()
        self._power_off_at = None
        self._short_rng = None

    def enter(self, operation: Operation, path: Path) -> None:
        """Called first by every operation of the disk."""
        with self._lock:
            if operation in CHANGING:
                if self._power_off_at is not None and self.change_count >= self._power_off_at:
                    self.dead = True
                self.change_count += 1
            if self.dead:
                raise PowerLossError
            for failure in self._failures:
                self._maybe_fail(failure, operation, path)
            stalls = [stall for stall in self._stalls if stall.operation == operation and stall.part in str(path)]
        for stall in stalls:
            stall.hang()
        if self.dead:
            raise PowerLossError

    def short_count(self, count: int) -> int:
        """How many of `count` bytes a write takes."""
        rng = self._short_rng
        return rng.randint(1, count) if rng is not None and count > 1 and rng.random() < 0.5 else count

    def kill(self) -> None:
        """Every call from now on raises PowerLossError; hanging ones end so."""
        self.dead = True
        for stall in self._stalls:
            stall.release()

    def _maybe_fail(self, failure: _Failure, operation: Operation, path: Path) -> None:
        if failure.operation != operation or failure.part not in str(path) or failure.left == 0:
            return
        if failure.calls_before > 0:
            failure.calls_before -= 1
            return
        if failure.left is not None:
            failure.left -= 1
        self.failed_count += 1
        raise OSError(failure.error, os.strerror(failure.error), str(path))
