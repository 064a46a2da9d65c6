"""From chunks to handlers: a fixed number of workers over one row of chunks.

A worker takes the next message without awaiting, so a handler that never waits costs no turn of the loop; after a
millisecond of that it lets the loop breathe. At most one idle worker is woken ahead, in case the busy one gets stuck in
its handler: so messages that are handled at once go through one worker, and slow handlers spread over all of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

from kitemq.consumer.held_queue import Chunk, HeldQueue
from kitemq.consumer.tasks import BackgroundTasks
from kitemq.message import ReceivedMessage

logger = logging.getLogger(__name__)

AsyncHandler = Callable[[ReceivedMessage], Awaitable[object]]

TURN_S = 0.001


class _Worker:
    """message: what its handler is at, or the last one it was at; None while it waits for work."""

    __slots__ = ("message", "task")

    def __init__(self) -> None:
        self.message: ReceivedMessage | None = None
        self.task: asyncio.Task[None] | None = None


class Dispatcher:
    """Runs handlers. `handlers` by topic; `refill` is called when a queue can take more."""

    def __init__(
        self,
        *,
        concurrency: int,
        retry_backoff_s: Sequence[float],
        handler_warn_s: float,
        refill: Callable[[HeldQueue], None],
    ) -> None:
        self.handlers: dict[str, AsyncHandler] = {}
        self._retry_backoff_s = tuple(retry_backoff_s)
        self._handler_warn_s = handler_warn_s
        self._refill = refill
        self._ready: deque[Chunk] = deque()
        self._workers = [_Worker() for _ in range(concurrency)]
        self._parked: list[asyncio.Future[None]] = []
        # The one that has been woken and has not run yet.
        self._standby: asyncio.Future[None] | None = None
        self._stopping = False

    def start(self, tasks: BackgroundTasks) -> None:
        for number, worker in enumerate(self._workers):
            worker.task = tasks.start(self._work(worker), name=f"consumer worker {number}")
        tasks.start(self._watch(), name="consumer watch")

    async def stop(self) -> None:
        """Cancel the workers, with any handler that still runs."""
        self._stopping = True
        running = [worker.task for worker in self._workers if worker.task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def deliver(self, chunk: Chunk) -> None:
        """Put a chunk at the end of the row."""
        self._ready.append(chunk)
        self._wake_one()

    # ---- workers ----

    async def _work(self, worker: _Worker) -> None:
        turn_ends = monotonic() + TURN_S
        while not self._stopping:  # a handler may swallow the cancellation
            chunk = self._next_chunk()
            if chunk is None:
                await self._park(worker)
                turn_ends = monotonic() + TURN_S
                continue
            if len(chunk.sizes) - chunk.taken > 1 or len(self._ready) > 1:
                self._wake_one()
            handler = self.handlers[chunk.held.queue.topic]
            done = chunk.done
            for message in chunk.messages:
                index = chunk.taken - 1
                worker.message = message
                try:
                    await handler(message)
                    done[index] = 1
                except Exception as error:
                    self._failed(chunk, index, error)
                except asyncio.CancelledError as error:
                    if asyncio.current_task().cancelling():  # type: ignore[union-attr]
                        raise
                    self._failed(chunk, index, error)  # something that the handler awaited was cancelled
                chunk.left = left = chunk.left - 1
                if not left:
                    self._finished(chunk)
                if monotonic() > turn_ends:
                    break
            if monotonic() > turn_ends:
                if self._standby is not None:  # it goes on in the loop's next turn
                    await self._park(worker)
                else:
                    await asyncio.sleep(0)
                turn_ends = monotonic() + TURN_S

    def _next_chunk(self) -> Chunk | None:
        """The first chunk that has something to hand out."""
        ready = self._ready
        while ready:
            chunk = ready[0]
            held = chunk.held
            if chunk.taken < len(chunk.sizes) and not held.dropped:
                if not chunk.started:
                    held.start(chunk)
                    self._refill(held)
                return chunk
            ready.popleft()
        return None

    async def _park(self, worker: _Worker) -> None:
        worker.message = None
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._parked.append(woken)
        try:
            await woken
        finally:
            if self._standby is woken:
                self._standby = None

    def _wake_one(self) -> None:
        if self._standby is None and self._parked:
            self._standby = self._parked.pop()
            self._standby.set_result(None)

    # ---- after the handler ----

    def _finished(self, chunk: Chunk) -> None:
        chunk.held.finish(chunk)
        self._refill(chunk.held)

    def _failed(self, chunk: Chunk, index: int, error: BaseException) -> None:
        """Move the message aside and hand it out again later. In a queue that was given up: somebody else will."""
        held = chunk.held
        delay_s = self._retry_backoff_s[min(chunk.attempt, len(self._retry_backoff_s)) - 1]
        logger.warning(
            "consumer: handler failed queue=%s queue_offset=%d attempt=%d again_in_s=%s",
            held.queue,
            chunk.offset(index),
            chunk.attempt,
            "never, the queue was given up" if held.dropped else delay_s,
            exc_info=error,
        )
        if held.dropped:
            return
        chunk.done[index] = 1
        again = held.retry(chunk, index)
        again.timer = asyncio.get_running_loop().call_later(delay_s, self._try_again, again)

    def _try_again(self, chunk: Chunk) -> None:
        chunk.timer = None
        self.deliver(chunk)

    async def _watch(self) -> None:
        """Warns of handlers that do not come back."""
        since: dict[_Worker, tuple[ReceivedMessage, float]] = {}
        warned: set[_Worker] = set()
        while True:
            await asyncio.sleep(self._handler_warn_s / 4)
            now = monotonic()
            for worker in self._workers:
                message = worker.message
                if message is None:
                    since.pop(worker, None)
                    warned.discard(worker)
                elif worker not in since or since[worker][0] is not message:
                    since[worker] = message, now
                    warned.discard(worker)
                elif now - since[worker][1] >= self._handler_warn_s and worker not in warned:
                    warned.add(worker)
                    logger.warning(
                        "consumer: handler has been running for over %g s queue=%s queue_offset=%d message_id=%s",
                        self._handler_warn_s,
                        message.queue,
                        message.queue_offset,
                        message.message_id,
                    )
