"""Runs many random histories of a store, on all processors, and makes the first failing one small.

python -m tests.crash.soak --count 100000            # make soak-store N=100000
python -m tests.crash.soak --seed 4711 --count 1     # one history again
python -m tests.crash.soak --seed 4711 --steps 0,3,17
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import random
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from tests.crash.history import History, plan

HISTORY_TIMEOUT_S = 30.0
SHRINK_S = 20.0
_CHUNK = 20


class Failure(NamedTuple):
    """A history that does not hold. steps: indexes into plan(seed) that are enough for it."""

    seed: int
    steps: tuple[int, ...]
    names: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        steps = ",".join(map(str, self.steps))
        return (
            f"history {self.seed}: {self.text}\nsteps: {' | '.join(self.names)}\n"
            f"again: python -m tests.crash.soak --seed {self.seed} --count 1 --steps {steps}"
        )


def run(seed: int, steps: Sequence[int] | None = None) -> str:
    """Runs one history, or some of its steps; returns what is wrong, empty if nothing is."""
    planned = plan(seed)
    chosen = planned if steps is None else [planned[index] for index in steps]

    async def bounded() -> None:
        async with asyncio.timeout(HISTORY_TIMEOUT_S):
            await History(seed).run(chosen)

    try:
        asyncio.run(bounded())
    except Exception as error:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        return "".join(traceback.format_exception(error)[-4:])
    return ""


def shrink(seed: int) -> Failure | None:
    """Leaves out steps as long as the history still fails; None when it does not fail again."""
    steps = list(range(len(plan(seed))))
    text = next(filter(None, (run(seed) for _ in range(5))), "")
    if not text:
        return None
    deadline = time.monotonic() + SHRINK_S
    size = max(1, len(steps) // 2)
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(steps) and time.monotonic() < deadline:
            fewer = steps[:at] + steps[at + size :]
            # The store's thread makes a history differ a little from run to run.
            found = run(seed, fewer) or run(seed, fewer)
            if found:
                steps, text = fewer, found
            else:
                at += size
        size //= 2
    return Failure(seed, tuple(steps), tuple(plan(seed)[index].name for index in steps), text)


def run_many(seeds: Sequence[int]) -> list[tuple[int, str]]:
    """Runs histories in this process; returns the failing ones."""
    logging.disable(logging.CRITICAL)
    try:
        return [(seed, text) for seed in seeds if (text := run(seed))]
    finally:
        logging.disable(logging.NOTSET)


def failures(first_seed: int, count: int, *, progress: bool = False) -> list[Failure]:
    """Runs `count` histories from `first_seed` on all processors; the failing ones, the first of them made small."""
    seeds = range(first_seed, first_seed + count)
    chunks = [seeds[start : start + _CHUNK] for start in range(0, count, _CHUNK)]
    failed: list[tuple[int, str]] = []
    started = time.monotonic()
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(chunks)), get_context("spawn")) as pool:
        for number, result in enumerate(pool.map(run_many, chunks), 1):
            failed += result
            if progress and number % 50 == 0:
                took_s = time.monotonic() - started
                sys.stderr.write(f"{number * _CHUNK} histories, {len(failed)} failed, {took_s:.0f} s\n")
    logging.disable(logging.CRITICAL)
    small = shrink(failed[0][0]) if failed else None
    logging.disable(logging.NOTSET)
    whole = [Failure(seed, tuple(range(len(plan(seed)))), (), text) for seed, text in failed]
    return [small, *whole[1:]] if small is not None else whole


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Random histories of a store on a disk that loses power.")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**32), help="of the first history")
    parser.add_argument("--steps", help="of one history: only these, by number")
    options = parser.parse_args()
    if options.steps is not None:
        text = run(options.seed, [int(step) for step in options.steps.split(",")])
        sys.stdout.write(text or "holds\n")
        return 1 if text else 0
    sys.stdout.write(f"seeds {options.seed} .. {options.seed + options.count - 1}\n")
    found = failures(options.seed, options.count, progress=True)
    for failure in found:
        sys.stdout.write(f"{failure}\n")
    sys.stdout.write(f"{options.count} histories, {len(found)} failed\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
