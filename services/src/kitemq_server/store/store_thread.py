"""The store's one thread: everything that can block for long runs here, never on the loop.

Urgent jobs (writes, flushes, preallocation) run in the order in which they come. Background jobs (snapshots, index,
deletion) are generators: the thread runs one step of one, looks for urgent jobs, and goes on with the next. So a flush
never waits for more than one step, and a long job holds up no other.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class StoreThread:
    """Owned by the loop that starts it; all methods but `post` are the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_failure: Callable[[Exception], None]) -> None:
        self._loop = loop
        self._on_failure = on_failure
        self._urgent: deque[Callable[[], None]] = deque()
        self._background: deque[Iterator[None]] = deque()
        self._wake: SimpleQueue[bool] = SimpleQueue()
        self._drain_count = 0
        self._closing = False
        self._waiting: set[asyncio.Future[Any]] = set()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def run(self, job: Callable[[], None]) -> None:
        """Runs `job` soon. An exception out of it is a failure of the store."""
        self._urgent.append(job)
        self._wake.put(True)

    def run_later(self, delay_s: float, job: Callable[[], None]) -> None:
        """Runs `job` after a while."""
        self._loop.call_later(delay_s, self.run, job)

    def run_steps(self, steps: Iterator[None]) -> None:
        """Runs `steps` between urgent jobs, in turn with other background jobs."""
        self._background.append(steps)
        self._wake.put(True)

    async def call(self, job: Callable[[], T]) -> T:
        """Runs `job` and returns its result, or raises its exception. Not to be cancelled half-way: the job goes on."""
        done: asyncio.Future[T] = self._loop.create_future()
        self._expect(done)

        def report() -> None:
            try:
                result = job()
            except Exception as error:
                self.post(_set_exception, done, error)
            else:
                self.post(_set_result, done, result)

        self.run(report)
        return await asyncio.shield(done)

    async def drain(self) -> None:
        """Returns when all background jobs are done, later ones too. Raises what has ended the thread."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._expect(done)

        def last() -> Iterator[None]:
            while len(self._background) > self._drain_count:
                yield
            self._drain_count -= 1
            self.post(_set_result, done, None)

        self._drain_count += 1
        self.run_steps(last())
        await done

    def _expect(self, done: asyncio.Future[Any]) -> None:
        """Whoever waits for the thread hears of its end."""
        if self._error is not None:
            done.set_exception(self._error)
            return
        self._waiting.add(done)
        done.add_done_callback(self._waiting.discard)

    def _failed(self, error: Exception) -> None:
        self._error = error
        for done in list(self._waiting):
            _set_exception(done, error)
        self._on_failure(error)

    def post(self, callback: Callable[..., object], *arguments: object) -> None:
        """From the thread: calls back on the loop."""
        # A loop that is closed has nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback, *arguments)

    async def close(self) -> None:
        """Runs the urgent jobs that are left, drops background steps, ends the thread."""
        self._closing = True
        self._wake.put(True)
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while True:
                if self._urgent:
                    self._urgent.popleft()()
                elif self._closing:
                    return
                elif self._background:
                    self._step()
                else:
                    self._wake.get()
        except Exception as error:
            self.post(self._failed, error)

    def _step(self) -> None:
        steps = self._background[0]
        try:
            next(steps)
        except StopIteration:
            self._background.popleft()
        else:
            self._background.rotate(-1)


def _set_result(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[T], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
