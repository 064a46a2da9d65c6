"""The consumer that is asked for messages."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from time import monotonic

from kitemq.consumer.allocate import Allocation, average
from kitemq.consumer.client import ConsumerClient
from kitemq.consumer.filter import ALL, normalized
from kitemq.consumer.held_queue import Chunk, HeldQueue
from kitemq.consumer.options import MIB, ConsumerOptions, MessageModel, Position, Start
from kitemq.errors import BrokerUnavailableError, ClientClosedError, InvalidRequestError
from kitemq.message import MessageQueue, ReceivedMessage
from kitemq.proto.v1 import broker_pb2
from kitemq.protocol.names import check_topic
from kitemq.rpc import TlsConfig

logger = logging.getLogger(__name__)

ASSIGN_TIMEOUT_S = 10.0
# How long the iterator goes on without letting the loop breathe.
TURN_S = 0.001


class PullConsumer(ConsumerClient):
    """Hands out messages when it is asked.

        async with kitemq.PullConsumer("127.0.0.1:9876", group="audit") as consumer:
            await consumer.subscribe("orders")
            async for message in consumer:
                ...

    Either subscribe to topics, whose queues the group shares out, or `assign` queues by hand. Loop over it or `poll`,
    one at a time and from one task. At least once: with auto_commit (the default) a message counts as done when the
    next one is asked for, or when `async with` is left without an exception; offsets are committed every
    commit_interval_s, when a queue is handed over, and at the end. Without auto_commit only `commit` commits, and where
    a group begins that has committed nothing yet.

    The other arguments are those of PushConsumer. client_id: also the name under which a BROADCASTING consumer keeps
    its offsets.
    """

    def __init__(
        self,
        namesrv: str | Sequence[str],
        *,
        group: str,
        message_model: MessageModel = MessageModel.CLUSTERING,
        from_where: Start = Position.LAST,
        allocation: Allocation = average,
        prefetch_messages: int = 1000,
        prefetch_bytes: int = 100 * MIB,
        auto_commit: bool = True,
        commit_interval_s: float = 5.0,
        offsets_dir: str | Path | None = None,
        tls: TlsConfig | None = None,
        client_id: str | None = None,
    ) -> None:
        super().__init__(
            ConsumerOptions(
                namesrv=namesrv,
                group=group,
                client_id=client_id,
                consume_type=broker_pb2.CONSUME_ACTIVELY,
                message_model=message_model,
                from_where=from_where,
                allocation=allocation,
                prefetch_messages=prefetch_messages,
                prefetch_bytes=prefetch_bytes,
                span_max=None,
                auto_commit=auto_commit,
                commit_interval_s=commit_interval_s,
                drain_timeout_s=0.0,
                offsets_dir=offsets_dir,
                tls=tls,
            )
        )
        self._ready: deque[Chunk] = deque()
        self._arrived = asyncio.Event()
        # What the user is working on: not done before more is asked for.
        self._current: ReceivedMessage | None = None
        self._current_held: HeldQueue | None = None
        self._polled: dict[HeldQueue, int] = {}

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if exc_type is None:
            self._all_done()
        await self.close()

    # ---- what to read ----

    async def subscribe(self, topic: str, *, filter: str = ALL) -> None:  # noqa: A002
        """Read this member's share of the topic. filter: "*", or tags: "a || b".

        Raises InvalidRequestError for a name or filter that cannot be, a topic that is subscribed already, or queues
        assigned by hand.
        """
        core = self._core
        check_topic(topic)
        wanted = normalized(filter)
        if core.assigned is not None:
            raise InvalidRequestError("queues are assigned by hand: use another consumer to subscribe", topic=topic)
        if topic in core.sharing.subscriptions:
            raise InvalidRequestError("the topic is subscribed already: unsubscribe first", topic=topic)
        await core.subscribe(topic, wanted)

    async def assign(self, queues: Iterable[MessageQueue], *, filter: str = ALL) -> None:  # noqa: A002
        """Read exactly these queues, without being a member of the group. Replaces what was assigned before.

        Returns once they are held. Raises BrokerUnavailableError when one is not within 10 s (it is still tried),
        InvalidRequestError when topics are subscribed.
        """
        core = self._core
        wanted = frozenset(MessageQueue(*queue) for queue in queues)
        for queue in wanted:
            check_topic(queue.topic)
        if core.sharing.subscriptions:
            raise InvalidRequestError("topics are subscribed: use another consumer to assign queues by hand")
        core.assign(wanted, normalized(filter))
        try:
            async with asyncio.timeout(ASSIGN_TIMEOUT_S):
                while core.held.keys() != wanted:
                    core.changed.clear()
                    await core.changed.wait()
        except TimeoutError:
            missing = ", ".join(sorted(str(queue) for queue in wanted - core.held.keys()))
            raise BrokerUnavailableError(
                f"not read within {ASSIGN_TIMEOUT_S:g} s: {missing}; is the broker up, does the queue exist?"
            ) from None

    async def queues(self, topic: str) -> list[MessageQueue]:
        """All queues of a topic that can be read, sorted. Raises TopicNotFoundError."""
        check_topic(topic)
        return list((await self._core.routes.get(topic)).readable)

    def pause(self, *queues: MessageQueue) -> None:
        """Hand out nothing of these queues, and read no further ahead, until `resume` or until they are given up."""
        for held in self._held(queues):
            held.paused = True
            for chunk in self._ready:
                if chunk.held is held:
                    chunk.rest()
                    held.parked.append(chunk)
        self._ready = deque(chunk for chunk in self._ready if not chunk.held.paused)

    def resume(self, *queues: MessageQueue) -> None:
        """Go on with queues that were paused."""
        for held in self._held(queues):
            held.paused = False
            self._ready.extend(held.parked)
            held.parked.clear()
            self._core.fetcher.refill(held)
        self._wake()

    async def seek(self, queue: MessageQueue, to: int | Position | datetime) -> None:
        """Go on at a queue offset, an end of the queue, or the first message stored at or after a time.

        An offset that is not there is corrected to the nearest that is. Also a later commit goes back there.
        """
        if isinstance(to, int):
            if to < 0:
                raise InvalidRequestError(f"queue offset {to} is negative")
            offset = to
        else:
            self._held([queue])
            offset = await self._core.brokers.start_offset(queue, to)
        self._core.move(self._held([queue])[0], offset)

    def position(self, queue: MessageQueue) -> int:
        """Queue offset of the next message that will be handed out of this queue."""
        return self._held([queue])[0].position()

    # ---- messages ----

    async def poll(self, max_count: int = 100, timeout_s: float = 5.0) -> list[ReceivedMessage]:
        """Up to max_count messages, those of one queue in order; an empty list when none has come within timeout_s.

        The messages handed out before count as done. Raises ClientClosedError when the consumer is closed meanwhile.
        """
        self._check_open()
        if max_count < 1:
            raise InvalidRequestError(f"max_count {max_count} must be at least 1")
        self._all_done()
        await asyncio.sleep(0)  # whoever polls and never awaits anything else must not stop the streams
        try:
            async with asyncio.timeout(timeout_s):
                while self._next_chunk() is None:
                    await self._wait()
        except TimeoutError:
            return []
        messages: list[ReceivedMessage] = []
        while len(messages) < max_count and (chunk := self._next_chunk()) is not None:
            self._polled.setdefault(chunk.held, chunk.held.position())
            messages += islice(chunk.messages, max_count - len(messages))
            self._leave(chunk)
        return messages

    async def __aiter__(self) -> AsyncIterator[ReceivedMessage]:
        """Every message, for ever; ends when the consumer is closed."""
        turn_ends = monotonic() + TURN_S
        while self._open_core is not None:
            self._all_done()
            chunk = self._next_chunk()
            if chunk is None:
                try:
                    await self._wait()
                except ClientClosedError:
                    return
                turn_ends = monotonic() + TURN_S
                continue
            self._current_held = chunk.held
            for message in chunk.messages:
                self._current = message
                yield message
                if monotonic() > turn_ends:  # whoever never awaits must not stop the streams
                    await asyncio.sleep(0)
                    turn_ends = monotonic() + TURN_S
            self._leave(chunk)

    def _next_chunk(self) -> Chunk | None:
        """The first chunk that has something to hand out."""
        ready = self._ready
        while ready:
            chunk = ready[0]
            held = chunk.held
            if chunk.taken < len(chunk.sizes) and not held.dropped:
                if not chunk.started:
                    held.start(chunk)
                    self._core.fetcher.refill(held)
                return chunk
            ready.popleft()
        return None

    def _leave(self, chunk: Chunk) -> None:
        """Done with `chunk` if nothing of it is left to hand out."""
        if chunk.left and chunk.taken == len(chunk.sizes) and not chunk.held.dropped:
            chunk.left = 0
            chunk.held.finish(chunk)
            self._core.fetcher.refill(chunk.held)

    async def _wait(self) -> None:
        """Until something has arrived, or the consumer is closed."""
        if self._failure is not None:
            raise self._failure
        self._arrived.clear()
        await self._arrived.wait()
        self._check_open()

    # ---- offsets ----

    async def commit(self, offsets: Mapping[MessageQueue, int] | None = None) -> None:
        """Commit, and return once it is confirmed.

        Without offsets: everything handed out so far, the present message included. With: these, each the queue offset
        to go on at; offsets only move forward, except after a `seek`. Raises the first error; the rest is committed.
        """
        if offsets is None:
            await self.commit_all_but(())
            return
        errors = (await self._core.store.save(offsets, durable=True)).errors
        if errors:
            raise errors[0]

    async def commit_all_but(self, untouched: Sequence[ReceivedMessage]) -> None:
        """As `commit`, for who takes messages on behalf of others: these were handed out, and nobody has seen them."""
        core = self._core
        self._set_aside(untouched)
        errors = await core.commit(list(core.held.values()), durable=True)
        if errors:
            raise errors[0]

    def give_back(self, untouched: Sequence[ReceivedMessage], current: ReceivedMessage | None) -> None:
        """As for `commit_all_but`: hand these out again. current: somebody is at it; what came before is done."""
        self._set_aside(untouched)
        returned, self._polled = self._polled, {}
        for held, offset in returned.items():
            self._core.move(held, offset, rewound=held.rewound)
        if current is not None and current.queue in self._core.held:
            self._polled[self._core.held[current.queue]] = current.queue_offset

    def _set_aside(self, untouched: Sequence[ReceivedMessage]) -> None:
        self._all_done()
        for message in reversed(untouched):
            held = self._core.held.get(message.queue)
            if held is not None:
                self._polled[held] = message.queue_offset

    async def committed(self, queue: MessageQueue) -> int | None:
        """What the group has committed in this queue: the queue offset to go on at; None = nothing yet."""
        found = await self._core.store.load([queue])
        if queue not in found:
            raise BrokerUnavailableError(f"offset of {queue} unknown: its broker does not answer", topic=queue.topic)
        return found[queue]

    def _all_done(self) -> None:
        """More is asked for: what was handed out counts as done."""
        self._current = self._current_held = None
        self._polled.clear()

    # ---- life ----

    async def close(self) -> None:
        """Commit (with auto_commit), hand the queues over, leave the group. Once closed, nothing happens."""
        core, self._open_core = self._open_core, None
        if core is None:
            return
        self._wake()
        try:
            await core.stop()
        finally:
            await self._close_stack()

    def _held(self, queues: Iterable[MessageQueue]) -> list[HeldQueue]:
        held = self._core.held
        for queue in queues:
            if queue not in held:
                raise InvalidRequestError(f"{queue} is not read by this consumer now", topic=queue.topic)
        return [held[queue] for queue in queues]

    # ---- for the core ----

    def deliver(self, chunk: Chunk) -> None:
        """Messages have come."""
        if chunk.held.paused:
            chunk.held.parked.append(chunk)
        else:
            self._ready.append(chunk)
            self._arrived.set()

    def done_offset(self, held: HeldQueue) -> int:
        """Everything before what the user holds."""
        if held in self._polled:
            return self._polled[held]
        if self._current is not None and held is self._current_held:
            return self._current.queue_offset
        return held.position()

    def _opened(self) -> None:
        self._core.start()

    def _wake(self) -> None:
        self._arrived.set()
