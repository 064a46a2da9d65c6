"""Opening and closing, the same for both kinds of consumer."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from typing import Self

from kitemq.consumer.core import ConsumerCore
from kitemq.consumer.held_queue import Chunk, HeldQueue
from kitemq.consumer.options import ConsumerOptions
from kitemq.consumer.tasks import BackgroundTasks
from kitemq.errors import ClientClosedError, KiteMQError
from kitemq.message import MessageQueue
from kitemq.protocol.names import check_topic
from kitemq.route import open_route_cache
from kitemq.rpc import Channels, new_client_id

logger = logging.getLogger(__name__)


class ConsumerClient:
    """What a PullConsumer and a PushConsumer have in common. Belongs to the loop it is opened on."""

    _drains = False

    def __init__(self, options: ConsumerOptions) -> None:
        self._options = options
        self.group = options.group
        self.client_id = options.client_id or new_client_id()
        self._stack = AsyncExitStack()
        self._used = False
        self._open_core: ConsumerCore | None = None
        self._failure: BaseException | None = None
        self._tasks = BackgroundTasks(self._task_failed)

    async def __aenter__(self) -> Self:
        if self._used:
            raise ClientClosedError("a consumer is opened once: make a new one")
        self._used = True
        async with AsyncExitStack() as stack:
            channels = Channels(tls=self._options.tls)
            stack.push_async_callback(channels.close)
            routes = await stack.enter_async_context(open_route_cache(self._options.addresses(), channels))
            stack.push_async_callback(self._tasks.stop)
            self._open_core = ConsumerCore(
                self._options,
                self.client_id,
                self,
                drains=self._drains,
                routes=routes,
                channels=channels,
                tasks=self._tasks,
            )
            self._opened()
            self._stack = stack.pop_all()
        return self

    @property
    def _core(self) -> ConsumerCore:
        if self._open_core is None:
            reason = "closed" if self._used else "not open: use it as `async with ...`"
            raise ClientClosedError(f"the {type(self).__name__} of group {self.group!r} is {reason}")
        return self._open_core

    def _check_open(self) -> None:
        """Raises ClientClosedError."""
        assert self._core

    def held_queues(self) -> list[MessageQueue]:
        """The queues that this consumer reads now, sorted."""
        return sorted(self._core.held)

    async def unsubscribe(self, topic: str) -> None:
        """Read the topic no more. Returns once its queues are handed over."""
        check_topic(topic)
        await self._core.unsubscribe(topic)

    # ---- for the core ----

    def deliver(self, chunk: Chunk) -> None:
        """Messages have come."""
        raise NotImplementedError

    def done_offset(self, held: HeldQueue) -> int:
        """What may be committed of a queue."""
        raise NotImplementedError

    def _opened(self) -> None:
        """The core is there."""

    def refused(self, error: KiteMQError) -> None:
        """The group does not take this consumer."""
        self._task_failed(error)

    def _task_failed(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._wake()

    def _wake(self) -> None:
        """Something has happened that whoever waits must see."""
        raise NotImplementedError

    async def _close_stack(self) -> None:
        """Ends tasks, streams and channels; nothing is committed here."""
        self._open_core = None
        closing = asyncio.ensure_future(self._stack.aclose())
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await closing  # quick: everything in there is being cancelled
            raise
