"""Which queues are ours: from routes, subscriptions and the group's members."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from kitemq.consumer.group import Members, Membership, shares
from kitemq.consumer.options import ConsumerOptions, Position, Start
from kitemq.errors import KiteMQError, TopicNotFoundError
from kitemq.message import MessageQueue
from kitemq.proto.v1 import broker_pb2
from kitemq.route import Route, RouteCache

logger = logging.getLogger(__name__)

_FROM_WHERE: dict[Start, broker_pb2.ConsumeFromWhere.ValueType] = {
    Position.FIRST: broker_pb2.CONSUME_FROM_FIRST_OFFSET,
    Position.LAST: broker_pb2.CONSUME_FROM_LAST_OFFSET,
}


@dataclass(frozen=True, slots=True)
class Share:
    """What is ours now: `take` is to be held, `give_up` not any more. Other queues stay as they are.

    free: those of `take` that no other member can still be at. complete: False when something could not be asked, and
    should be soon.
    """

    take: frozenset[MessageQueue]
    free: frozenset[MessageQueue]
    give_up: frozenset[MessageQueue]
    complete: bool


class Sharing:
    """Decides by the same rule as every other member of the group. Subscriptions: filter by topic."""

    def __init__(self, options: ConsumerOptions, client_id: str, routes: RouteCache) -> None:
        self._options = options
        self._client_id = client_id
        self._routes = routes
        self.subscriptions: dict[str, str] = {}
        self._first_seen: dict[str, frozenset[MessageQueue]] = {}
        # Who shared each topic when we last looked.
        self._last_ids: dict[str, list[str]] = {}
        self._warned_of: frozenset[str] = frozenset()

    # ---- what is subscribed ----

    async def subscribe(self, topic: str, filter: str) -> None:  # noqa: A002
        """Want the topic. One that does not exist yet, or cannot be found now, is no error."""
        try:
            await self._routes.get(topic)
        except TopicNotFoundError:
            self.is_new(topic)
            logger.info("consumer: waiting for the topic group=%s topic=%s", self._options.group, topic)
        except KiteMQError as error:
            logger.warning("consumer: no route yet group=%s topic=%s error=%s", self._options.group, topic, error)
        self.subscriptions[topic] = filter

    def unsubscribe(self, topic: str) -> None:
        """Want it no more."""
        self.subscriptions.pop(topic, None)
        self._first_seen.pop(topic, None)
        self._last_ids.pop(topic, None)

    def is_new(self, topic: str) -> None:
        """There is no such topic: should there be one, it will be read from its first message."""
        self._first_seen[topic] = frozenset()

    def start_of(self, queue: MessageQueue) -> Start:
        """Where to begin in a queue with nothing committed. In one that was made meanwhile: at its first message."""
        first_seen = self._first_seen.get(queue.topic)
        fresh = first_seen is not None and queue not in first_seen
        return Position.FIRST if fresh else self._options.from_where

    def info(self) -> broker_pb2.ConsumerInfo:
        """What brokers are told of this consumer."""
        return broker_pb2.ConsumerInfo(
            group=self._options.group,
            message_model=self._options.message_model.value,
            consume_type=self._options.consume_type,
            consume_from_where=_FROM_WHERE.get(self._options.from_where, broker_pb2.CONSUME_FROM_TIMESTAMP),
            subscriptions=[
                broker_pb2.Subscription(topic=topic, filter=wanted)
                for topic, wanted in sorted(self.subscriptions.items())
            ],
        )

    # ---- whose queues ----

    async def decide(self, membership: Membership, held: Iterable[MessageQueue]) -> Share | None:
        """Our share as things are now; None while it is not known."""
        routes, complete = await self._read_routes()
        self._follow(membership, routes)
        members: Members = {}
        if self._options.clustering:
            members = await membership.members()
            if self._client_id not in members:  # not joined yet, or taken for dead
                await membership.heartbeat()
                members = await membership.members()
                if self._client_id not in members:
                    return None
        try:
            take, free = self._share(routes, members)
        except Exception:
            logger.exception("consumer: the allocation strategy failed group=%s: queues stay", self._options.group)
            return None
        give_up = frozenset(queue for queue in held if queue not in take and self._is_given_up(queue, routes))
        return Share(take, free, give_up, complete)

    async def _read_routes(self) -> tuple[dict[str, Route], bool]:
        routes: dict[str, Route] = {}
        complete = True
        for topic in list(self.subscriptions):
            try:
                routes[topic] = await self._routes.get(topic)
                if topic not in self._first_seen:
                    self._first_seen[topic] = frozenset(routes[topic].readable)
            except TopicNotFoundError:
                self._first_seen.setdefault(topic, frozenset())
            except KiteMQError as error:
                logger.info("consumer: no route topic=%s error=%s", topic, error)
                complete = False
        return routes, complete

    def _follow(self, membership: Membership, routes: dict[str, Route]) -> None:
        """Be a member on every broker of the topics; while one has no route, also where it may be again."""
        addresses = {
            broker.address for route in routes.values() for brokers in route.brokers.values() for broker in brokers
        }
        if routes.keys() < self.subscriptions.keys():
            addresses |= membership.followed
        membership.follow(addresses)

    def _share(
        self, routes: dict[str, Route], members: Members
    ) -> tuple[frozenset[MessageQueue], frozenset[MessageQueue]]:
        """Ours, and of these the free ones."""
        if not self._options.clustering:
            everything = frozenset(queue for route in routes.values() for queue in route.readable)
            return everything, everything
        own = self.info()
        alike = [client_id for client_id, info in members.items() if info == own]
        others = {client_id: info for client_id, info in members.items() if info != own}
        if others.keys() - {self._client_id}:
            self._warn_of(others, own)
        allocate = self._options.allocation
        mine: set[MessageQueue] = set()
        free: set[MessageQueue] = set()
        for topic, route in routes.items():
            ids = sorted([*alike, *(client_id for client_id, info in others.items() if shares(info, topic))])
            share = allocate(self._client_id, route.readable, ids)
            mine.update(share)
            if ids == [self._client_id]:
                free.update(share)
            last_ids = self._last_ids.get(topic, [])
            for gone in set(last_ids).difference(ids):
                free.update(allocate(gone, route.readable, last_ids))
            self._last_ids[topic] = ids
        return frozenset(mine), frozenset(free & mine)

    def _is_given_up(self, queue: MessageQueue, routes: dict[str, Route]) -> bool:
        """False for a queue whose broker has vanished: it is kept, and read on when the broker is back."""
        route = routes.get(queue.topic)
        return queue.topic not in self.subscriptions or (route is not None and queue.broker_name in route.brokers)

    def _warn_of(self, others: Members, own: broker_pb2.ConsumerInfo) -> None:
        different = frozenset(
            client_id
            for client_id, info in others.items()
            if client_id != self._client_id and info.subscriptions and info.subscriptions != own.subscriptions
        )
        if different - self._warned_of:
            logger.warning(
                "consumer: members of one group subscribe differently: a topic is shared by those who read it, and "
                "a message passes the filter of whoever gets it group=%s here=%s others=%s",
                self._options.group,
                _filters(own),
                {client_id: _filters(others[client_id]) for client_id in sorted(different)},
            )
        self._warned_of = different


def _filters(info: broker_pb2.ConsumerInfo) -> dict[str, str]:
    return {subscription.topic: subscription.filter for subscription in info.subscriptions}
