"""The event loop in a thread that the sync faces share.

One loop per process: it starts with the first client that opens and ends with the last that closes. A call costs some
70 µs more than the async one; calls of several threads that come at the same time share one wake-up of the loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

START_TIMEOUT_S = 10.0


class _Wait:
    """One blocked caller: a lock that the loop's thread releases."""

    __slots__ = ("future", "lock", "start")

    def __init__(self, start: Callable[[], asyncio.Future[Any]]) -> None:
        self.start = start
        self.future: asyncio.Future[Any] | None = None
        self.lock = threading.Lock()
        self.lock.acquire()

    def done(self, future: asyncio.Future[Any]) -> None:
        self.future = future
        self.lock.release()


class Portal:
    """Runs calls on the shared loop. Any thread may call, except the loop's own."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[_Wait] = deque()
        self._woken = False

    def call(self, start: Callable[[], asyncio.Future[T]]) -> T:
        """Run `start` on the loop and block until the future it returns is done. An interrupt cancels the future."""
        if threading.current_thread() is _shared.thread:
            raise RuntimeError("a sync client was called on its own event loop: use the async client there")
        wait = _Wait(start)
        self._calls.append(wait)
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._run_calls)
        try:
            wait.lock.acquire()
        except BaseException:
            self.loop.call_soon_threadsafe(self._cancel, wait)
            raise
        future = wait.future
        assert future is not None
        return future.result()  # type: ignore[no-any-return]

    def run(self, coroutine: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run `coroutine()` as a task of the loop and block until it is done."""
        return self.call(lambda: self.loop.create_task(coroutine()))

    def _run_calls(self) -> None:
        self._woken = False
        calls = self._calls
        while calls:
            wait = calls.popleft()
            try:
                future = wait.start()
            except Exception as error:
                future = self.loop.create_future()
                future.set_exception(error)
            wait.future = future
            future.add_done_callback(wait.done)

    def _cancel(self, wait: _Wait) -> None:
        if wait.future is not None:
            wait.future.cancel()


class _Shared:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.thread: threading.Thread | None = None
        self.portal: Portal | None = None


_shared = _Shared()


def acquire_portal() -> Portal:
    """The process's portal, started if need be. Give it back with `release_portal`."""
    with _shared.lock:
        if _shared.portal is None:
            loop = asyncio.new_event_loop()
            started = threading.Event()
            thread = threading.Thread(target=_run_loop, args=(loop, started), name="kitemq", daemon=True)
            thread.start()
            if not started.wait(START_TIMEOUT_S):
                raise RuntimeError("the event loop's thread did not start")
            _shared.portal, _shared.thread = Portal(loop), thread
        _shared.users += 1
        return _shared.portal


def release_portal() -> None:
    """The last user's release stops the loop and waits for its thread."""
    with _shared.lock:
        _shared.users -= 1
        if _shared.users or _shared.portal is None or _shared.thread is None:
            return
        portal, thread = _shared.portal, _shared.thread
        _shared.portal = _shared.thread = None
    portal.loop.call_soon_threadsafe(portal.loop.stop)
    thread.join()


def _run_loop(loop: asyncio.AbstractEventLoop, started: threading.Event) -> None:
    asyncio.set_event_loop(loop)
    loop.call_soon(started.set)
    try:
        loop.run_forever()
    finally:
        pending = asyncio.all_tasks(loop)
        for task in pending:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
