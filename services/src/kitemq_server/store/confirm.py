"""What is written, flushed and confirmed, and who waits for it. Loop only."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from itertools import count

from kitemq.errors import BrokerUnavailableError
from kitemq_server.store.config import FlushMode
from kitemq_server.store.consume_queue import ConsumeQueue

Moves = Sequence[tuple[ConsumeQueue, int]]


def _nobody(_queues: Sequence[ConsumeQueue]) -> None:
    pass


class Confirmation:
    """Moves `confirm_offset` and the queues' confirmed ends, in the order of the appends.

    All offsets are physical and exclusive ends.
    """

    __slots__ = (
        "_order",
        "_sync",
        "_unconfirmed",
        "_waiters",
        "confirm_offset",
        "failure",
        "flushed_offset",
        "listener",
        "written_offset",
    )

    def __init__(self, mode: FlushMode, end_offset: int) -> None:
        self._sync = mode is FlushMode.SYNC_FLUSH
        self.written_offset = end_offset
        self.flushed_offset = end_offset
        self.confirm_offset = end_offset
        self.failure = ""
        self.listener: Callable[[Sequence[ConsumeQueue]], None] = _nobody
        self._unconfirmed: deque[tuple[int, Moves]] = deque()
        self._waiters: list[tuple[int, int, asyncio.Future[bool]]] = []
        self._order = count()

    @property
    def failed(self) -> bool:
        """Nothing more will be confirmed."""
        return bool(self.failure)

    def error(self) -> BrokerUnavailableError:
        """What whoever appends or waits is told after a failure."""
        return BrokerUnavailableError(self.failure)

    def appended(self, end_offset: int, queues: Sequence[ConsumeQueue]) -> None:
        """An append up to `end_offset` is under way; these queues have new entries."""
        self._unconfirmed.append((end_offset, [(queue, queue.next_offset) for queue in queues]))

    def written(self, end_offset: int) -> None:
        """The log is written up to here."""
        self.written_offset = end_offset
        if not self._sync:
            self._advance_confirm()

    def flushed(self, end_offset: int) -> None:
        """The log is on disk up to here."""
        self.flushed_offset = end_offset
        if self._sync:
            self._advance_confirm()

    def _advance_confirm(self) -> None:
        """The one place that decides what is confirmed."""
        confirm_offset = self.flushed_offset if self._sync else self.written_offset
        if confirm_offset <= self.confirm_offset or self.failure:
            return
        self.confirm_offset = confirm_offset
        unconfirmed = self._unconfirmed
        moved: dict[ConsumeQueue, None] = {}
        while unconfirmed and unconfirmed[0][0] <= confirm_offset:
            for queue, max_offset in unconfirmed.popleft()[1]:
                if not queue.deleted:
                    queue.max_offset = max_offset
                moved[queue] = None
        if moved:
            self.listener(list(moved))
        waiters = self._waiters
        while waiters and waiters[0][0] <= confirm_offset:
            _resolve(heappop(waiters)[2], True)

    async def wait(self, end_offset: int, timeout_s: float) -> bool:
        """True once everything below `end_offset` is confirmed, False after `timeout_s`.

        Raises BrokerUnavailableError as soon as the store has failed.
        """
        if self.failure:
            raise self.error()
        if end_offset <= self.confirm_offset:
            return True
        loop = asyncio.get_running_loop()
        future: asyncio.Future[bool] = loop.create_future()
        heappush(self._waiters, (end_offset, next(self._order), future))
        timer = loop.call_later(timeout_s, _resolve, future, False)
        try:
            return await future
        finally:
            timer.cancel()

    def fail(self, failure: str) -> None:
        """Nothing more will be confirmed: every waiter hears so. failure: why, in words for clients."""
        self.failure = failure
        while self._waiters:
            future = heappop(self._waiters)[2]
            if not future.done():
                future.set_exception(self.error())


def _resolve(future: asyncio.Future[bool], confirmed: bool) -> None:
    if not future.done():
        future.set_result(confirmed)
