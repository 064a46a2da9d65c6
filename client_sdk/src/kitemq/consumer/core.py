"""The queues that a consumer holds: taken over, read, committed, handed over. Shared by both kinds of consumer.

One task decides which queues are ours; everything it does to a queue is begun by plain calls, so whoever is cancelled,
a queue is held as a whole or not at all.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Collection, Iterable
from typing import Protocol

from kitemq.consumer.filter import ALL
from kitemq.consumer.group import Membership
from kitemq.consumer.held_queue import Chunk, HeldQueue
from kitemq.consumer.offsets import BrokerOffsets, Brokers, LocalOffsets, OffsetStore, Saved, offset_at
from kitemq.consumer.options import ConsumerOptions, Position, Start, timestamp_ms
from kitemq.consumer.pull_stream import Fetcher, Prefetch
from kitemq.consumer.sharing import Sharing
from kitemq.consumer.tasks import BackgroundTasks
from kitemq.errors import KiteMQError
from kitemq.message import MessageQueue
from kitemq.route import Route, RouteCache
from kitemq.rpc import Channels

logger = logging.getLogger(__name__)

REBALANCE_S = 20.0
# When what could not be done (a broker does not answer, a queue is still being released) is tried again.
RETRY_S = 1.0
# How long the member that gives a queue up has to commit it, before the one that takes it over asks for the offset.
HAND_OVER_WAIT_S = 0.3
HAND_OVER_TRIES = 3
# Above SMALL_GROUP members, one looks who has come or gone after a random moment, and not again before a pause; both
# grow with the group.
SMALL_GROUP = 50
LOOK_DELAY_PER_MEMBER_S = 0.0005
LOOK_DELAY_MAX_S = 0.3
LOOK_PAUSE_PER_MEMBER_S = 0.005
LOOK_PAUSE_MAX_S = 2.0
NAMES_LOGGED_MAX = 16


class Owner(Protocol):
    """The consumer whose queues these are. Plain calls on the loop."""

    def deliver(self, chunk: Chunk) -> None:
        """Messages have come."""

    def done_offset(self, held: HeldQueue) -> int:
        """What may be committed of a queue."""

    def refused(self, error: KiteMQError) -> None:
        """The group does not take this consumer."""


class ConsumerCore:
    """Decides which queues are held and keeps their offsets.

    drains: the owner has handlers that may be at work on a queue that is given up.
    """

    def __init__(
        self,
        options: ConsumerOptions,
        client_id: str,
        owner: Owner,
        *,
        drains: bool,
        routes: RouteCache,
        channels: Channels,
        tasks: BackgroundTasks,
    ) -> None:
        self._options = options
        self._client_id = client_id
        self._owner = owner
        self._drains = drains
        self.routes = routes
        self._tasks = tasks
        self.brokers = Brokers(routes, channels)
        self.store: OffsetStore = (
            BrokerOffsets(options.group, client_id, self.brokers)
            if options.clustering
            else LocalOffsets(options.offsets_file)
        )
        self.fetcher = Fetcher(
            group=options.group,
            prefetch=Prefetch(options.prefetch_messages, options.prefetch_bytes, options.span_max),
            sink=self,
            routes=routes,
            channels=channels,
            tasks=tasks,
        )
        self.sharing = Sharing(options, client_id, routes)
        self.membership = Membership(
            client_id,
            options.group,
            brokers=self.brokers,
            tasks=tasks,
            info=self.sharing.info,
            changed=self._group_changed,
            refused=owner.refused,
            offsets_reset=self._offsets_reset,
        )
        self.held: dict[MessageQueue, HeldQueue] = {}
        # Queues that were assigned by hand; None = the group shares them out.
        self.assigned: frozenset[MessageQueue] | None = None
        self._assigned_filter = ALL
        self._releasing: dict[MessageQueue, asyncio.Task[None]] = {}
        # Queues that are ours, and when (loop time) the member that had them will have committed them.
        self._due: dict[MessageQueue, float] = {}
        self._rebalance_wanted = asyncio.Event()
        self._look: asyncio.TimerHandle | None = None
        self._loops: list[asyncio.Task[None]] = []
        self._resets = 0
        self._stopping = False
        self._looked_at = 0.0
        # Queues have been taken or given up. Whoever waits for it clears it first.
        self.changed = asyncio.Event()

    # ---- life ----

    def start(self) -> None:
        """Join the group and begin to take queues."""
        self.routes.add_listener(self._route_changed)
        self._loops = [
            self._tasks.start(self._rebalance_forever(), name="consumer rebalance"),
            self._tasks.start(self.membership.heartbeat_forever(), name="consumer heartbeat"),
        ]
        if self._options.auto_commit:
            self._loops.append(self._tasks.start(self._commit_forever(), name="consumer commit"))
        self.rebalance_soon()

    async def stop(self) -> None:
        """Give every queue up (handlers drained, offsets committed) and leave the group."""
        self._stopping = True
        self.routes.remove_listener(self._route_changed)
        for task in self._loops:
            task.cancel()
        if self._look is not None:
            self._look.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self._release(list(self.held.values()))
        await asyncio.gather(*self._releasing.values())
        await self.membership.leave()

    # ---- what the consumer wants ----

    async def subscribe(self, topic: str, filter: str) -> None:  # noqa: A002
        """Read the topic from now on. A topic that does not exist yet is read from its first message."""
        await self.sharing.subscribe(topic, filter)
        await self.membership.heartbeat()
        self.rebalance_soon()

    async def unsubscribe(self, topic: str) -> None:
        """Give the topic's queues up. Returns once they are."""
        self.sharing.unsubscribe(topic)
        self.rebalance_soon()
        await self.membership.heartbeat()
        self._release([held for held in self.held.values() if held.queue.topic == topic])
        await asyncio.gather(*(task for queue, task in self._releasing.items() if queue.topic == topic))

    def assign(self, queues: Collection[MessageQueue], filter: str) -> None:  # noqa: A002
        """Hold exactly these queues, whatever the group does."""
        self.assigned = frozenset(queues)
        self._assigned_filter = filter
        self.rebalance_soon()

    def move(self, held: HeldQueue, queue_offset: int, *, rewound: bool = True) -> None:
        """Read on somewhere else: what is cached is forgotten. rewound: the next commit may go backwards."""
        self._forget(held)
        moved = HeldQueue(held.queue, filter=held.filter, offset=queue_offset, committed=held.committed)
        moved.rewound = rewound
        moved.paused = held.paused
        self._hold(moved)

    def rebalance_soon(self) -> None:
        """At the loop's next turn."""
        self._rebalance_wanted.set()

    # ---- what the streams bring (PullSink) ----

    def deliver(self, chunk: Chunk) -> None:
        """See PullSink."""
        self._owner.deliver(chunk)

    def rewind(self, held: HeldQueue, queue_offset: int) -> None:
        """See PullSink."""
        self.move(held, queue_offset)
        if self._options.auto_commit:
            self._tasks.start(self.commit([self.held[held.queue]], durable=True), name="consumer rewind")

    def lost(self, held: HeldQueue) -> None:
        """See PullSink."""
        self._forget(held)
        self.sharing.is_new(held.queue.topic)
        self._tasks.start(self._refresh_route(held.queue.topic), name="consumer route")
        self._retry_soon()

    async def _refresh_route(self, topic: str) -> None:
        try:
            await self.routes.get(topic, refresh=True)
        except KiteMQError as error:
            logger.debug("consumer: no route topic=%s error=%s", topic, error)

    def _group_changed(self) -> None:
        """Small groups look at once. In a big one everybody would ask for a long list at every single arrival."""
        members = self.membership.size
        if members <= SMALL_GROUP:
            self.rebalance_soon()
            return
        pause_ends = self._looked_at + min(members * LOOK_PAUSE_PER_MEMBER_S, LOOK_PAUSE_MAX_S)
        delay_s = random.uniform(0.0, min(members * LOOK_DELAY_PER_MEMBER_S, LOOK_DELAY_MAX_S))
        self._rebalance_in(max(0.0, pause_ends - asyncio.get_running_loop().time()) + delay_s)

    def _offsets_reset(self, address: str) -> None:
        logger.info("consumer: offsets were reset group=%s broker=%s", self._options.group, address)
        self._resets += 1
        for held in list(self.held.values()):
            route = self.routes.peek(held.queue.topic)
            brokers = route.brokers.get(held.queue.broker_name, ()) if route else ()
            if any(broker.address == address for broker in brokers):
                self._forget(held)
        self.rebalance_soon()

    def _route_changed(self, route: Route) -> None:
        self.fetcher.route_changed(route)
        self.rebalance_soon()

    # ---- whose queues ----

    async def _rebalance_forever(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._next_look_in_s()):
                    await self._rebalance_wanted.wait()
            except TimeoutError:
                pass
            self._rebalance_wanted.clear()
            await self._rebalance()

    def _next_look_in_s(self) -> float:
        now = asyncio.get_running_loop().time()
        looks = [REBALANCE_S, *(due - now for due in self._due.values())]
        changes_in_s = self.membership.next_change_in_s()
        if changes_in_s is not None:
            looks.append(changes_in_s + 0.01)
        return max(0.0, min(looks))

    async def _rebalance(self) -> None:
        if self.assigned is not None:
            self._release([held for queue, held in self.held.items() if queue not in self.assigned])
            await self._acquire(self.assigned)
            return
        self._looked_at = asyncio.get_running_loop().time()
        share = await self.sharing.decide(self.membership, self.held)
        if share is None or not share.complete:
            self._retry_soon()
        if share is None:
            self._due.clear()
            return
        self._release([self.held[queue] for queue in share.give_up if queue in self.held])
        now = asyncio.get_running_loop().time()
        later = now + HAND_OVER_WAIT_S
        self._due = {
            queue: now if queue in share.free else self._due.get(queue, later)
            for queue in share.take - self.held.keys()
        }
        ready = [queue for queue, due in self._due.items() if due <= now]
        for queue in ready:
            del self._due[queue]
        await self._acquire(ready)

    # ---- taking over ----

    async def _acquire(self, queues: Iterable[MessageQueue]) -> None:
        wanted = [queue for queue in queues if queue not in self.held]
        free = [queue for queue in wanted if queue not in self._releasing]
        resets = self._resets
        found = await self.store.load(free) if free else {}
        offsets = {queue: offset for queue, offset in found.items() if offset is not None}
        starts = await self._starts([queue for queue, offset in found.items() if offset is None])
        decided = self.assigned is None or self._options.auto_commit
        if starts and decided:
            # Where a group begins is decided once: whoever takes the queue over next must not begin later.
            starts = (await self._save(starts, durable=True)).offsets
        if self._resets != resets:  # what was loaded may be out of date
            self.rebalance_soon()
            return
        for queue, offset in (offsets | starts).items():
            if self._wants(queue):
                committed = offset if queue in offsets or decided else None
                wanted_tags = self.sharing.subscriptions.get(queue.topic, self._assigned_filter)
                self._hold(HeldQueue(queue, filter=wanted_tags, offset=offset, committed=committed))
        if offsets or starts:
            logger.info("consumer: holds group=%s queues=%s", self._options.group, _names(self.held))
        if any(queue not in self.held for queue in wanted):
            self._retry_soon()

    def _wants(self, queue: MessageQueue) -> bool:
        """False when the user has changed his mind meanwhile."""
        return queue.topic in self.sharing.subscriptions if self.assigned is None else queue in self.assigned

    async def _starts(self, queues: list[MessageQueue]) -> dict[MessageQueue, int]:
        """Where to begin in queues of which nothing is committed."""
        by_topic: dict[tuple[str, str, Start], list[MessageQueue]] = {}
        for queue in queues:
            key = queue.broker_name, queue.topic, self.sharing.start_of(queue)
            by_topic.setdefault(key, []).append(queue)
        starts: dict[MessageQueue, int] = {}
        for (broker_name, topic, start), items in by_topic.items():
            at = None if isinstance(start, Position) else timestamp_ms(start)
            try:
                bounds = await self.brokers.bounds(
                    broker_name, topic, [queue.queue_id for queue in items], at_timestamp_ms=at
                )
            except KiteMQError as error:
                logger.info("consumer: no start yet topic=%s broker=%s error=%s", topic, broker_name, error)
                continue
            for queue in items:
                if queue.queue_id in bounds:
                    starts[queue] = offset_at(bounds[queue.queue_id], start)
        return starts

    def _hold(self, held: HeldQueue) -> None:
        self.held[held.queue] = held
        self.fetcher.add(held)
        self.changed.set()

    def _retry_soon(self) -> None:
        self._rebalance_in(RETRY_S)

    def _rebalance_in(self, delay_s: float) -> None:
        def look() -> None:
            self._look = None
            self.rebalance_soon()

        loop = asyncio.get_running_loop()
        if self._look is not None:
            if self._look.when() <= loop.time() + delay_s:
                return
            self._look.cancel()
        self._look = loop.call_later(delay_s, look)

    # ---- giving up ----

    def _forget(self, held: HeldQueue) -> None:
        """Stop reading and handing out, without a commit."""
        held.drop()
        self.fetcher.remove(held)
        if self.held.get(held.queue) is held:
            del self.held[held.queue]
        self.changed.set()

    def _release(self, given_up: list[HeldQueue]) -> None:
        """Hand queues over: no new message from here on, the rest in the background."""
        if not given_up:
            return
        for held in given_up:
            self._forget(held)
        logger.info("consumer: gives up group=%s queues=%s", self._options.group, _names(h.queue for h in given_up))
        task = self._tasks.start(self._hand_over(given_up), name="consumer hand-over")
        for held in given_up:
            self._releasing[held.queue] = task

        def done(_: asyncio.Task[None]) -> None:
            for held in given_up:
                if self._releasing.get(held.queue) is task:
                    del self._releasing[held.queue]

        task.add_done_callback(done)

    async def _hand_over(self, given_up: list[HeldQueue]) -> None:
        """Commit what is done; let handlers finish, and commit again."""
        await self._commit_last(given_up)
        busy = [held for held in given_up if self._drains and not held.settled.is_set()]
        if not busy:
            return
        try:
            async with asyncio.timeout(self._options.drain_timeout_s):
                for held in busy:
                    await held.settled.wait()
        except TimeoutError:
            logger.warning("consumer: handlers still run in queues given up queues=%s", _names(h.queue for h in busy))
        await self._commit_last(busy)

    async def _commit_last(self, given_up: list[HeldQueue]) -> None:
        """There is no next commit for these queues: try again for a while, unless we are going."""
        if not self._options.auto_commit:
            return
        for _ in range(HAND_OVER_TRIES):
            errors = await self.commit(given_up, durable=True)
            if self._stopping or not any(error.retriable for error in errors):
                return
            await asyncio.sleep(RETRY_S)

    # ---- offsets ----

    async def _commit_forever(self) -> None:
        while True:
            await asyncio.sleep(self._options.commit_interval_s)
            await self.commit(self.held.values(), durable=False)

    async def commit(self, queues: Iterable[HeldQueue], *, durable: bool) -> list[KiteMQError]:
        """Commit what is done in these queues. What fails is logged, returned, and tried again with the next commit."""
        forward: dict[HeldQueue, int] = {}
        anyhow: dict[HeldQueue, int] = {}
        for held in queues:
            offset = self._owner.done_offset(held)
            if offset != held.committed or (durable and not held.committed_durably):
                (anyhow if held.rewound else forward)[held] = offset
        errors: list[KiteMQError] = []
        for offsets, reset in ((forward, False), (anyhow, True)):
            if offsets:
                saved = await self._save(
                    {held.queue: offset for held, offset in offsets.items()},
                    durable=durable,
                    reset=reset,
                    last_epochs={held.queue: held.last_epoch for held in offsets},
                )
                errors += saved.errors
                for held, offset in offsets.items():
                    if held.queue in saved.offsets:
                        held.committed = offset
                        held.committed_durably = durable
                        held.rewound = False
        return errors

    async def _save(
        self,
        offsets: dict[MessageQueue, int],
        *,
        durable: bool,
        reset: bool = False,
        last_epochs: dict[MessageQueue, int] | None = None,
    ) -> Saved:
        saved = await self.store.save(offsets, durable=durable, reset=reset, last_epochs=last_epochs)
        for error in saved.errors:
            logger.warning("consumer: commit failed, will be repeated group=%s error=%s", self._options.group, error)
        return saved


def _names(queues: Iterable[MessageQueue]) -> str:
    names = sorted(map(str, queues))
    return ",".join(names[:NAMES_LOGGED_MAX]) + (f",… {len(names)} in all" if len(names) > NAMES_LOGGED_MAX else "")
