"""Where a topic's queues are: asked of the namesrvs, kept for 30 s, pushed when it changes.

A namesrv that does not answer is left for the next one. Claims of a lower epoch than the one seen are ignored, unless
the broker that made the higher claim has stopped answering.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from kitemq.errors import BrokerUnavailableError, KiteMQError, RequestTimeoutError, TopicNotFoundError
from kitemq.message import MessageQueue
from kitemq.proto.v1 import namesrv_pb2, namesrv_pb2_grpc
from kitemq.protocol.names import PERMISSION_INHERIT, PERMISSION_READ, PERMISSION_WRITE
from kitemq.rpc import Channels, call

logger = logging.getLogger(__name__)

REFRESH_S = 30.0
NAMESRV_TIMEOUT_S = 3.0
MASTER_ID = 0


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """One broker of a group. broker_id 0 = master."""

    broker_id: int
    address: str
    epoch: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class Route:
    """A topic's queues, and where their brokers are.

    Queues are sorted. ordered: the queues of the topic's order configuration, there even while a broker is away; empty
    where the topic has none.
    """

    topic: str
    writable: tuple[MessageQueue, ...] = ()
    readable: tuple[MessageQueue, ...] = ()
    ordered: tuple[MessageQueue, ...] = ()
    inheritable: bool = False
    brokers: dict[str, tuple[BrokerAddress, ...]] = field(default_factory=dict)

    def master(self, broker_name: str) -> str | None:
        """Address of the group's master, None while it has none."""
        for broker in self.brokers.get(broker_name, ()):
            if broker.broker_id == MASTER_ID:
                return broker.address
        return None

    def any_broker(self, broker_name: str) -> str | None:
        """Address to read from: the master, else the slave with the lowest id."""
        brokers = self.brokers.get(broker_name, ())
        return self.master(broker_name) or (brokers[0].address if brokers else None)


def route_from_proto(message: namesrv_pb2.TopicRoute) -> Route:
    """A Route from what a namesrv says. Writable: permission and a master."""
    brokers = {
        group.broker_name: tuple(
            sorted(
                (BrokerAddress(b.broker_id, b.address, b.epoch, b.boot_id) for b in group.brokers),
                key=lambda b: b.broker_id,
            )
        )
        for group in message.brokers
    }
    writable: list[MessageQueue] = []
    readable: list[MessageQueue] = []
    inheritable = False
    for queues in message.queues:
        members = brokers.get(queues.broker_name, ())
        name = queues.broker_name
        if queues.permission & PERMISSION_WRITE and members and members[0].broker_id == MASTER_ID:
            writable += [MessageQueue(message.topic, name, i) for i in range(queues.write_queue_count)]
            inheritable = inheritable or bool(queues.permission & PERMISSION_INHERIT)
        if queues.permission & PERMISSION_READ and members:
            readable += [MessageQueue(message.topic, name, i) for i in range(queues.read_queue_count)]
    return Route(
        topic=message.topic,
        writable=tuple(sorted(writable)),
        readable=tuple(sorted(readable)),
        ordered=_ordered_queues(message.topic, message.order_config),
        inheritable=inheritable,
        brokers=brokers,
    )


def _ordered_queues(topic: str, order_config: str) -> tuple[MessageQueue, ...]:
    """ "brokerA:4;brokerB:2" as queues; what does not parse is left out."""
    queues: list[MessageQueue] = []
    for item in order_config.split(";"):
        broker_name, _, count = item.strip().rpartition(":")
        if broker_name and count.isdigit():
            queues += [MessageQueue(topic, broker_name, queue_id) for queue_id in range(int(count))]
    return tuple(queues)


class Namesrvs:
    """Unary calls to whichever namesrv answers."""

    def __init__(self, addresses: list[str], channels: Channels) -> None:
        self.addresses = list(addresses)
        self._channels = channels
        self._current = random.randrange(len(addresses))

    @property
    def current(self) -> str:
        return self.addresses[self._current]

    def stub(self, address: str) -> namesrv_pb2_grpc.NamesrvAsyncStub:
        return namesrv_pb2_grpc.NamesrvStub(self._channels.get(address))

    def move_on(self, failed: str) -> None:
        """Use the next namesrv, unless somebody has moved on already."""
        if self.current == failed:
            self._current = (self._current + 1) % len(self.addresses)

    async def call(self, method: str, request: Any, *, topic: str | None = None) -> Any:
        """Call `method` of the first namesrv that answers.

        Raises BrokerUnavailableError naming all of them when none does, else what the namesrv said.
        """
        reasons: list[str] = []
        for _ in self.addresses:
            address = self.current
            try:
                unary = getattr(self.stub(address), method)
                return await call(unary, request, timeout_s=NAMESRV_TIMEOUT_S, address=address, topic=topic)
            except (BrokerUnavailableError, RequestTimeoutError) as error:
                reasons.append(f"{address}: {error.message}")
                self.move_on(address)
        raise BrokerUnavailableError(
            "no namesrv answers ("
            + "; ".join(reasons)
            + "): is the address right? Start one with 'kitemq-server standalone'",
            topic=topic,
        )


class RouteCache:
    """Routes of the topics that a client uses.

    Make it with `open_route_cache`. Belongs to one loop.
    """

    def __init__(self, namesrvs: Namesrvs) -> None:
        self.namesrvs = namesrvs
        self._routes: dict[str, Route] = {}
        self._asked: dict[str, asyncio.Task[Route]] = {}
        self._epochs: dict[str, int] = {}
        self._watched: set[str] = set()
        self._watch_wanted = asyncio.Event()
        self._listeners: list[Callable[[Route], None]] = []

    def add_listener(self, listener: Callable[[Route], None]) -> None:
        """`listener(route)` is called on the loop whenever a cached route has changed."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Callable[[Route], None]) -> None:
        self._listeners.remove(listener)

    def peek(self, topic: str) -> Route | None:
        """What is cached; no I/O."""
        return self._routes.get(topic)

    async def get(self, topic: str, *, refresh: bool = False) -> Route:
        """The topic's route, from the cache unless `refresh`.

        Raises TopicNotFoundError when no broker has the topic, BrokerUnavailableError when no namesrv answers and
        nothing is cached.
        """
        route = self._routes.get(topic)
        if route is not None and not refresh:
            return route
        task = self._asked.get(topic)
        if task is None:  # many senders may miss at once: ask once
            task = asyncio.create_task(self._ask(topic), name=f"route {topic}")
            self._asked[topic] = task
            task.add_done_callback(lambda done: self._answered(topic, done))
        try:
            return await asyncio.shield(task)
        except BrokerUnavailableError:
            if route is not None:
                return route
            raise

    def _answered(self, topic: str, task: asyncio.Task[Route]) -> None:
        del self._asked[topic]
        if not task.cancelled():
            task.exception()  # every waiter has it; nobody may be left waiting

    async def _ask(self, topic: str) -> Route:
        try:
            message = await self.namesrvs.call("GetRoute", namesrv_pb2.GetRouteRequest(topic=topic), topic=topic)
        except TopicNotFoundError:
            self._routes.pop(topic, None)
            self._watch(topic)
            raise
        route = self._accept(message)
        self._watch(topic)
        return route

    def unreachable(self, broker_name: str) -> None:
        """The broker that made the highest claim does not answer: believe the next claim, whatever its epoch."""
        self._epochs.pop(broker_name, None)

    def _watch(self, topic: str) -> None:
        if topic not in self._watched:
            self._watched.add(topic)
            self._watch_wanted.set()

    def _accept(self, message: namesrv_pb2.TopicRoute) -> Route:
        route = route_from_proto(message)
        old = self._routes.get(route.topic)
        for name, members in route.brokers.items():
            if not members or members[0].broker_id != MASTER_ID:
                continue
            known = self._epochs.get(name, 0)
            if members[0].epoch < known and old is not None and name in old.brokers:
                logger.info("route: ignoring old claim broker=%s epoch=%d known=%d", name, members[0].epoch, known)
                route.brokers[name] = old.brokers[name]
            else:
                self._epochs[name] = members[0].epoch
        if not route.writable and not route.readable:
            self._routes.pop(route.topic, None)
        else:
            self._routes[route.topic] = route
        if route != old:
            for listener in list(self._listeners):
                listener(route)
        return route

    async def refresh_forever(self) -> None:
        """Asks for every cached route each 30 s: what the watch stream may have missed."""
        while True:
            await asyncio.sleep(REFRESH_S)
            for topic in list(self._routes):
                try:
                    await self.get(topic, refresh=True)
                except KiteMQError as error:
                    logger.debug("route: refresh failed topic=%s error=%s", topic, error)

    async def watch_forever(self) -> None:
        """Keeps one watch stream over all topics in use; begins again when a topic is added or a namesrv goes away."""
        while True:
            await self._watch_wanted.wait()
            self._watch_wanted.clear()
            reader = asyncio.create_task(self._read_watch(self.namesrvs.current, sorted(self._watched)))
            wanted = asyncio.create_task(self._watch_wanted.wait())
            try:
                await asyncio.wait({reader, wanted}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (reader, wanted):
                    task.cancel()
                await asyncio.gather(reader, wanted, return_exceptions=True)
            if not self._watch_wanted.is_set():  # the stream broke
                self._watch_wanted.set()
                await asyncio.sleep(random.uniform(0.2, 1.0))

    async def _read_watch(self, address: str, topics: list[str]) -> None:
        try:
            stream = self.namesrvs.stub(address).WatchRoutes(namesrv_pb2.WatchRoutesRequest(topics=topics))
            async for message in stream:
                self._accept(message)
        except grpc.aio.AioRpcError as error:
            logger.debug("route: watch ended namesrv=%s code=%s", address, error.code())
            self.namesrvs.move_on(address)


@asynccontextmanager
async def open_route_cache(addresses: list[str], channels: Channels) -> AsyncIterator[RouteCache]:
    """A route cache whose refresh and watch run while it is open."""
    cache = RouteCache(Namesrvs(addresses, channels))
    tasks = [
        asyncio.create_task(cache.refresh_forever(), name="route refresh"),
        asyncio.create_task(cache.watch_forever(), name="route watch"),
    ]
    try:
        yield cache
    finally:
        for task in (*tasks, *cache._asked.values()):
            task.cancel()
        await asyncio.gather(*tasks, *cache._asked.values(), return_exceptions=True)
