"""Pulling: what the stream and the unary call share, and PullMessage."""

from __future__ import annotations

import asyncio

from kitemq.errors import BrokerBusyError, DivergedError
from kitemq.proto.v1 import broker_pb2
from kitemq.proto.v1.broker_pb2 import FOUND, NO_MATCHED_MSG, NO_NEW_MSG, OFFSET_ILLEGAL
from kitemq_server.broker.filters import parse_filter
from kitemq_server.broker.groups import Groups
from kitemq_server.broker.holds import Holds
from kitemq_server.broker.metrics import MessageCounts
from kitemq_server.broker.settings import LiveSettings
from kitemq_server.broker.topics import Topics
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.message_store import MessageStore, ReadStatus

SUSPEND_MS_MAX = 600_000
REPLY_BYTES_MAX = 8 * 1024 * 1024
REPLY_MESSAGES_MAX = 16_384
# Record bytes in replies that are being written. The more there are, because clients do not read, the smaller the next.
WRITING_BYTES_MAX = 256 * 1024 * 1024
REPLY_BYTES_MIN = 16 * 1024
# Of the unary call, as in RocketMQ.
MESSAGES_DEFAULT = 32
BYTES_DEFAULT = 256 * 1024


class Pulls:
    """What all pulls of a broker share."""

    def __init__(
        self,
        store: MessageStore,
        topics: Topics,
        groups: Groups,
        holds: Holds,
        live: LiveSettings,
        counts: MessageCounts,
    ) -> None:
        self.store = store
        self.holds = holds
        self.counts = counts
        self._topics = topics
        self._groups = groups
        self._live = live
        self._waiters: set[_UnaryWaiter] = set()
        self.subscription_count = 0
        self.writing_bytes = 0
        self.stopping = False

    def stop(self) -> None:
        """Answer every unary pull that waits."""
        self.stopping = True
        for waiter in self._waiters:
            waiter.wake()

    def check(self, topic: str, queue_id: int, group: str) -> ConsumeQueue:
        """The queue, when the group may read it now. Raises an error of the table that says why not."""
        self._topics.for_pull(topic, queue_id)
        self._groups.for_pull(group)
        queue = self.store.queue(topic, queue_id)
        assert queue is not None
        return queue

    def check_room(self) -> None:
        """Raises BrokerBusyError when too many pulls are open."""
        if self.subscription_count + len(self._waiters) >= self._live.held_pull_count_max:
            raise BrokerBusyError(
                f"the broker has {self._live.held_pull_count_max} open pulls: try another broker", retry_after_ms=5000
            )

    def reply_bytes(self, wanted: int) -> int:
        """How many bytes of records the next reply may have, where `wanted` are asked for."""
        return min(wanted, max(REPLY_BYTES_MIN, (WRITING_BYTES_MAX - self.writing_bytes) // 8))

    async def pull_message(self, request: broker_pb2.PullMessageRequest) -> bytes:
        """One long poll; a serialized PullMessageResponse whose records are the log's bytes."""
        tags = parse_filter(request.filter)
        queue = self.check(request.topic, request.queue_id, request.group)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(request.suspend_ms, SUSPEND_MS_MAX) / 1000
        offset = request.queue_offset
        if (diverged := diverged_at(self.store, queue, offset, request.last_epoch)) is not None:
            raise diverged_error(diverged)
        while True:
            if offset != queue.max_offset:
                result = self.store.read(
                    queue,
                    offset,
                    count_max=min(request.max_count or MESSAGES_DEFAULT, REPLY_MESSAGES_MAX),
                    bytes_max=self.reply_bytes(min(request.max_bytes or BYTES_DEFAULT, REPLY_BYTES_MAX)),
                    tags=tags,
                )
                offset = result.next_offset
                if result.status is ReadStatus.OFFSET_ILLEGAL:
                    status = OFFSET_ILLEGAL
                    break
                if result.count:
                    self.counts.count_out(
                        self.counts.out(request.topic, request.group), result.count, len(result.records)
                    )
                    return result.records + _unary_header(FOUND, offset, queue)
                if loop.time() >= deadline:
                    status = NO_MATCHED_MSG
                    break
                await asyncio.sleep(0)
            elif self.stopping or loop.time() >= deadline:
                status = NO_NEW_MSG if offset == request.queue_offset else NO_MATCHED_MSG
                break
            else:
                await self._wait(queue, deadline)
                queue = self.check(request.topic, request.queue_id, request.group)
        return _unary_header(status, offset, queue)

    async def _wait(self, queue: ConsumeQueue, deadline: float) -> None:
        self.check_room()
        waiter = _UnaryWaiter()
        self._waiters.add(waiter)
        self.holds.add(queue, waiter)
        try:
            async with asyncio.timeout_at(deadline):
                await waiter.woken.wait()
        except TimeoutError:
            pass
        finally:
            self.holds.discard(queue, waiter)
            self._waiters.discard(waiter)


def _unary_header(status: broker_pb2.PullStatus.ValueType, next_offset: int, queue: ConsumeQueue) -> bytes:
    return broker_pb2.PullMessageResponse(
        status=status, next_offset=next_offset, min_offset=queue.min_offset, max_offset=queue.max_offset
    ).SerializeToString()


class _UnaryWaiter:
    __slots__ = ("woken",)

    def __init__(self) -> None:
        self.woken = asyncio.Event()

    def wake(self) -> None:
        self.woken.set()


def diverged_at(store: MessageStore, queue: ConsumeQueue, queue_offset: int, last_epoch: int) -> int | None:
    """Where a reader that saw `last_epoch` below `queue_offset` must begin again; None = nothing has changed.

    A crash may cut off messages that were not on disk yet; what is stored next takes their offsets, in a new epoch.
    """
    if last_epoch:
        for start in store.epochs:
            if start.epoch > last_epoch:
                first = queue.first_at_or_after(start.first_physical_offset)
                return first if first < queue_offset else None
    return None


def diverged_error(queue_offset: int) -> DivergedError:
    """What a reader is told who must begin again at `queue_offset`."""
    return DivergedError(f"what was read of the queue was lost in a crash: begin again at offset {queue_offset}")
