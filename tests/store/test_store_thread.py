"""The store's thread: order of its jobs, turns of its background jobs, and its end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from kitemq_server.store.store_thread import StoreThread


@asynccontextmanager
async def running(on_failure: Callable[[Exception], None] = lambda error: None) -> AsyncIterator[StoreThread]:
    thread = StoreThread(asyncio.get_running_loop(), on_failure)
    thread.start()
    try:
        yield thread
    finally:
        await thread.close()


async def test_calls_return_or_raise() -> None:
    async with running() as thread:
        assert await thread.call(lambda: threading.current_thread().name) == "store"

        def fail() -> None:
            raise ValueError("mine")

        with pytest.raises(ValueError, match="mine"):
            await thread.call(fail)
        assert await thread.call(lambda: 5) == 5


async def test_urgent_jobs_come_between_the_steps_of_background_jobs_which_take_turns() -> None:
    log: list[str] = []

    def steps(name: str) -> Iterator[None]:
        for index in range(3):
            log.append(f"{name}{index}")
            if name == "a" and index == 0:
                thread.run(lambda: log.append("urgent"))
            yield

    async with running() as thread:
        held = threading.Event()

        def wait() -> None:
            held.wait()  # until both are there

        thread.run(wait)
        thread.run_steps(steps("a"))
        thread.run_steps(steps("b"))
        held.set()
        await thread.drain()
    assert log == ["a0", "urgent", "b0", "a1", "b1", "a2", "b2"]


async def test_several_may_wait_for_the_background_jobs() -> None:
    def steps() -> Iterator[None]:
        for _ in range(10):
            yield

    async with running() as thread:
        thread.run_steps(steps())
        await asyncio.gather(thread.drain(), thread.drain(), thread.drain())


async def test_a_failed_job_ends_the_thread_and_all_who_wait_hear_of_it() -> None:
    failures: list[Exception] = []

    def steps() -> Iterator[None]:
        yield
        raise OSError(5, "broken")

    def endless() -> Iterator[None]:
        while True:
            yield

    async with running(failures.append) as thread:
        thread.run_steps(endless())
        waiting = asyncio.ensure_future(thread.drain())
        thread.run_steps(steps())
        with pytest.raises(OSError, match="broken"):
            await waiting
        assert len(failures) == 1
        with pytest.raises(OSError, match="broken"):
            await thread.call(lambda: None)
        with pytest.raises(OSError, match="broken"):
            await thread.drain()


async def test_closing_finishes_urgent_jobs_and_drops_the_rest() -> None:
    done: list[int] = []

    def endless() -> Iterator[None]:
        while True:
            yield

    async with running() as thread:
        thread.run_steps(endless())
        for index in range(5):
            thread.run(partial(done.append, index))
    assert done == [0, 1, 2, 3, 4]
