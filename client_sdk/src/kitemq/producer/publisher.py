"""A topic as a producer sees it: its writable queues, whose turn it is, and what waits for a route."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from kitemq.errors import BrokerUnavailableError, KiteMQError, TopicNotFoundError
from kitemq.message import MessageQueue
from kitemq.producer.accumulator import Entry, QueueState
from kitemq.producer.selector import RoundRobin
from kitemq.protocol.names import DEFAULT_TOPIC
from kitemq.route import Route, RouteCache

logger = logging.getLogger(__name__)

ROUTE_RETRY_MIN_S = 0.1
ROUTE_RETRY_MAX_S = 1.0


class Publisher:
    """State of one topic in one producer. `queues` is empty until a route is known."""

    run_messages = RoundRobin.run_messages

    def __init__(self, topic: str, start: int) -> None:
        self.topic = topic
        self.route: Route | None = None
        self.queues: Sequence[MessageQueue] = ()
        self.ordered: Sequence[MessageQueue] = ()
        self.current: QueueState | None = None
        self.parked: deque[Entry] = deque()
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


class Publishers:
    """The topics of one producer. Finds their routes; what is sent before there is one waits in order."""

    def __init__(
        self,
        routes: RouteCache,
        *,
        place: Callable[[Entry], None],
        fail: Callable[[Entry, Exception], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], None],
        default_queue_count: int,
    ) -> None:
        self._routes = routes
        self._place = place
        self._fail = fail
        self._spawn = spawn
        self._default_queue_count = default_queue_count
        self._by_topic: dict[str, Publisher] = {}
        routes.add_listener(self._route_changed)

    def get(self, topic: str) -> Publisher:
        """The topic's publisher; a new one begins to look for its route."""
        publisher = self._by_topic.get(topic)
        if publisher is None:
            publisher = self._by_topic[topic] = Publisher(topic, random.randrange(1 << 16))
            self._spawn(self._find_route(publisher), f"route of {topic}")
        return publisher

    def parked(self) -> list[Entry]:
        """Everything that waits for a route."""
        return [entry for publisher in self._by_topic.values() for entry in publisher.parked]

    def master(self, broker_name: str) -> str | None:
        """Address of the group's master, None while no route names one."""
        for publisher in self._by_topic.values():
            route = publisher.route
            if route is not None and broker_name in route.brokers:
                return route.master(broker_name)
        return None

    async def refresh(self, broker_name: str) -> None:
        """Ask again for the routes that name this broker."""
        for publisher in list(self._by_topic.values()):
            if publisher.route is not None and broker_name in publisher.route.brokers:
                try:
                    await self._set_route(publisher)
                except KiteMQError as error:
                    logger.debug("producer: no new route topic=%s error=%s", publisher.topic, error)

    async def _find_route(self, publisher: Publisher) -> None:
        """Until the topic has writable queues, or waiting for them makes no sense."""
        loop = asyncio.get_running_loop()
        delay_s = ROUTE_RETRY_MIN_S
        warned = False
        while True:
            try:
                await self._set_route(publisher)
                if publisher.queues:
                    return
                error: KiteMQError = BrokerUnavailableError("no broker of the topic is writable", topic=publisher.topic)
            except TopicNotFoundError as refusal:
                self._give_up(publisher, refusal)
                return
            except KiteMQError as refusal:
                error = refusal
            if not warned:
                warned = True
                logger.warning("producer: no route yet topic=%s error=%s", publisher.topic, error)
            overdue = [entry for entry in publisher.parked if entry.deadline <= loop.time() + delay_s]
            for entry in overdue:
                publisher.parked.remove(entry)
                self._fail(entry, error)
            if not publisher.parked:
                self._give_up(publisher, error)
                return
            await asyncio.sleep(delay_s)
            delay_s = min(ROUTE_RETRY_MAX_S, delay_s * 2)

    async def _set_route(self, publisher: Publisher) -> None:
        try:
            route = await self._routes.get(publisher.topic, refresh=publisher.route is not None)
        except TopicNotFoundError as missing:
            publisher.use_default(await self._default_route(publisher.topic, missing), self._default_queue_count)
        else:
            publisher.use(route)
        if publisher.queues:
            self._unpark(publisher)

    async def _default_route(self, topic: str, missing: TopicNotFoundError) -> Route:
        try:
            route = await self._routes.get(DEFAULT_TOPIC)
            if route.inheritable:
                return route
        except TopicNotFoundError:
            pass  # no broker creates topics by itself
        raise TopicNotFoundError(
            f"topic {topic!r} does not exist: create it with 'kitemq topic create {topic}'",
            topic=topic,
            address=missing.address,
        )

    def _unpark(self, publisher: Publisher) -> None:
        parked, publisher.parked = publisher.parked, deque()
        for entry in parked:
            self._place(entry)
        publisher.set_ready()

    def _give_up(self, publisher: Publisher, error: KiteMQError) -> None:
        """Fail what waits; the next send of this topic asks again."""
        self._by_topic.pop(publisher.topic, None)
        parked, publisher.parked = publisher.parked, deque()
        for entry in parked:
            self._fail(entry, error)
        publisher.fail_ready(error)

    def _route_changed(self, route: Route) -> None:
        publisher = self._by_topic.get(route.topic)
        if publisher is not None and route.writable:
            publisher.use(route)
            self._unpark(publisher)
