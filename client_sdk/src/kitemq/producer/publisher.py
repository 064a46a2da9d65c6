"""A topic as a producer sees it: its writable queues, whose turn it is, and what waits for a route."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from kitemq.errors import KiteMQError
from kitemq.message import Message, MessageQueue
from kitemq.producer.accumulator import Entry, QueueState
from kitemq.producer.selector import QueueSelector, RoundRobin
from kitemq.route import Route


class Publisher:
    """State of one topic in one producer. `queues` is empty until a route is known."""

    run_messages = RoundRobin.run_messages

    def __init__(self, topic: str, start: int) -> None:
        self.topic = topic
        self.route: Route | None = None
        self.queues: Sequence[MessageQueue] = ()
        self.ordered: Sequence[MessageQueue] = ()
        self.current: QueueState | None = None
        self.parked: deque[tuple[Entry, MessageQueue | None, str]] = deque()
        self.selectors: dict[str, tuple[QueueSelector, Message]] = {}
        self._start = start
        self._turn = RoundRobin((), 0)
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def use(self, route: Route) -> None:
        """Take the topic's own route."""
        self._set(route, route.writable)
        self.ordered = route.ordered

    def use_default(self, route: Route, queue_count: int) -> None:
        """The topic does not exist yet: the default topic's brokers will create it, with at most queue_count queues."""
        queues = [
            MessageQueue(self.topic, queue.broker_name, queue.queue_id)
            for queue in route.writable
            if queue.queue_id < queue_count
        ]
        self._set(route, queues)

    def _set(self, route: Route, queues: Sequence[MessageQueue]) -> None:
        self.route = route
        if list(queues) != list(self.queues):
            self.queues = tuple(queues)
            self._turn = RoundRobin(queues, self._start)
            self.current = None

    def next_queue(self, usable: Callable[[str], bool] | None, *, avoid: str | None = None) -> MessageQueue:
        """The queue whose turn it is. Only once there are queues."""
        return self._turn.next(usable, avoid=avoid)

    async def ready(self) -> None:
        """Wait for a route. Raises the error table's class when there will be none."""
        await asyncio.shield(self._ready)

    def set_ready(self) -> None:
        if not self._ready.done():
            self._ready.set_result(None)

    def fail_ready(self, error: KiteMQError) -> None:
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # not everybody waits
