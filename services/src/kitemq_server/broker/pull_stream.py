"""The Pull stream: the log's bytes as they are, to who has credit, as soon as they are confirmed."""

from __future__ import annotations

import asyncio
from collections import deque

from google.protobuf.message import DecodeError

from kitemq.errors import BrokerUnavailableError, InvalidRequestError, KiteMQError, error_to_stream
from kitemq.proto.v1 import broker_pb2
from kitemq.proto.v1.broker_pb2 import NO_MATCHED_MSG, NO_NEW_MSG, OFFSET_ILLEGAL, PullRequest, PullResponse
from kitemq.protocol.record import U32, length_delimited
from kitemq_server.broker.filters import parse_filter
from kitemq_server.broker.metrics import GroupCounts
from kitemq_server.broker.pull import (
    REPLY_BYTES_MAX,
    REPLY_MESSAGES_MAX,
    SUSPEND_MS_MAX,
    Pulls,
    diverged_at,
    diverged_error,
)
from kitemq_server.broker.streams import STOPPING, DuplexStream, RawContext, StreamLimits
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.message_store import ReadResult, ReadStatus

STREAMS_MAX = 20_000
SUBSCRIPTIONS_PER_STREAM_MAX = 16_384
HOLD_UNTIL_STREAM_ENDS = 0xFFFF_FFFF
SUSPEND_MS = 15_000
REPLY_BYTES = 1024 * 1024
CREDIT_MAX = 1 << 48
# Answers to bad requests, and subscriptions (closed ones among them), that wait for the pump: then no more is read.
NOTICES_MAX = 64
READY_MAX = 2 * SUBSCRIPTIONS_PER_STREAM_MAX
# Messages that a filter leaves out are skipped in silence up to here, or for this long; then the client is told how far
# it has come, so that it can commit.
SKIPPED_MESSAGES_MAX = 4096
SKIPPED_S = 1.0
# Subscriptions looked at without a reply before others get their turn of the loop.
SILENT_MAX = 32
# Keys of PullResponse.sizes (packed fixed32) and header_bytes (fixed32).
SIZES_KEY = 0x3A
HEADER_BYTES_KEY = b"\x7d"
HEADER_BYTES_BYTES = 5
FOREVER = float("inf")


class PullStreams:
    """All Pull streams of a broker."""

    def __init__(self, pulls: Pulls) -> None:
        self._pulls = pulls
        self._limits = StreamLimits("Pull", streams_max=STREAMS_MAX)
        self._streams: set[PullStream] = set()

    def __len__(self) -> int:
        return len(self._limits)

    async def serve(self, context: RawContext) -> None:
        """Handler of Broker.Pull, bytes in and out."""
        if self._pulls.stopping:
            raise BrokerUnavailableError(STOPPING)
        with self._limits.open(context.peer()):
            stream = PullStream(self._pulls, context)
            self._streams.add(stream)
            try:
                await stream.run()
            finally:
                self._streams.discard(stream)
                stream.release()

    def stop(self) -> None:
        """Answer every pull that waits, and end the streams."""
        for stream in self._streams:
            stream.stop()


class PullSubscription:
    """One queue that one stream reads. Open until the broker or the client ends it."""

    __slots__ = (
        "closed",
        "counts",
        "credit_bytes",
        "credit_messages",
        "diverged",
        "expires_at",
        "group",
        "number",
        "offset",
        "queue",
        "ready",
        "reply_bytes_max",
        "report_at",
        "reported_offset",
        "stream",
        "suspend_s",
        "tags",
        "timer",
    )

    def __init__(
        self,
        stream: PullStream,
        request: PullRequest,
        queue: ConsumeQueue,
        tags: frozenset[str] | None,
        counts: GroupCounts,
    ) -> None:
        self.stream = stream
        self.number = request.number
        self.group = request.group
        self.queue = queue
        self.tags = tags
        self.counts = counts
        self.offset = self.reported_offset = request.queue_offset
        self.credit_messages = 0
        self.credit_bytes = 0
        self.reply_bytes_max = min(request.reply_bytes_max or REPLY_BYTES, REPLY_BYTES_MAX)
        self.suspend_s = (
            FOREVER
            if request.suspend_ms == HOLD_UNTIL_STREAM_ENDS
            else min(request.suspend_ms or SUSPEND_MS, SUSPEND_MS_MAX) / 1000
        )
        self.expires_at = FOREVER
        self.report_at = FOREVER
        self.timer: asyncio.TimerHandle | None = None
        self.ready = False
        self.closed = False
        # Where it wants to begin is not what it read before: `offset` is where it must.
        self.diverged = False

    @property
    def has_credit(self) -> bool:
        return self.credit_messages > 0 and self.credit_bytes > 0

    def wake(self) -> None:
        """There may be something to do: the stream's pump looks at it in its turn."""
        if not self.ready and not self.closed:
            self.ready = True
            self.stream.is_ready(self)

    def due(self) -> None:
        """Its timer has gone off."""
        self.timer = None
        self.wake()


class PullStream(DuplexStream):
    """One consumer's stream: its subscriptions, and the pump that serves those which are ready, one after the other."""

    def __init__(self, pulls: Pulls, context: RawContext) -> None:
        super().__init__(context)
        self._pulls = pulls
        self._store = pulls.store
        self._loop = asyncio.get_running_loop()
        self._subscriptions: dict[int, PullSubscription] = {}
        self._ready: deque[PullSubscription] = deque()
        self._notices: deque[bytes] = deque()
        self._room = asyncio.Event()

    def stop(self) -> None:
        super().stop()
        for subscription in self._subscriptions.values():
            if subscription.suspend_s != FOREVER:
                subscription.wake()
        self._finishing = True
        self._wake.set()

    def release(self) -> None:
        """The stream is over: nothing of it waits any more."""
        for subscription in list(self._subscriptions.values()):
            self._close(subscription)

    def is_ready(self, subscription: PullSubscription) -> None:
        self._ready.append(subscription)
        self._wake.set()

    # ---- Requests ----

    async def _read(self, raw: bytes) -> None:
        try:
            request = PullRequest.FromString(raw)
        except DecodeError:
            raise InvalidRequestError("the request is not a valid PullRequest") from None
        subscription = self._subscriptions.get(request.number)
        if request.close:
            if subscription is not None:
                self._close(subscription)
            return
        if subscription is None:
            # Credit for a subscription that has just ended is no opening: it names no topic.
            if not request.topic:
                return
            try:
                subscription = self._subscribe(request)
            except KiteMQError as error:
                self._notices.append(_error_reply(request.number, error, next_offset=request.queue_offset))
                self._wake.set()
                await self._wait_for_room()
                return
        self._add_credit(subscription, request)
        await self._wait_for_room()

    async def _wait_for_room(self) -> None:
        """A client that asks and does not read is not read either."""
        while len(self._notices) >= NOTICES_MAX or len(self._ready) >= READY_MAX:
            self._room.clear()
            await self._room.wait()

    def _subscribe(self, request: PullRequest) -> PullSubscription:
        pulls = self._pulls
        tags = parse_filter(request.filter)
        queue = pulls.check(request.topic, request.queue_id, request.group)
        if len(self._subscriptions) >= SUBSCRIPTIONS_PER_STREAM_MAX:
            raise InvalidRequestError(
                f"this stream has {SUBSCRIPTIONS_PER_STREAM_MAX} subscriptions: open another one for more"
            )
        pulls.check_room()
        subscription = PullSubscription(self, request, queue, tags, pulls.counts.out(request.topic, request.group))
        if (diverged := diverged_at(self._store, queue, request.queue_offset, request.last_epoch)) is not None:
            subscription.offset = diverged
            subscription.diverged = True
        self._subscriptions[request.number] = subscription
        pulls.subscription_count += 1
        return subscription

    def _add_credit(self, subscription: PullSubscription, request: PullRequest) -> None:
        subscription.credit_messages = min(subscription.credit_messages + request.credit_messages, CREDIT_MAX)
        subscription.credit_bytes = min(subscription.credit_bytes + request.credit_bytes, CREDIT_MAX)
        if subscription.has_credit:
            subscription.expires_at = self._loop.time() + subscription.suspend_s
            subscription.wake()

    def _close(self, subscription: PullSubscription) -> None:
        del self._subscriptions[subscription.number]
        subscription.closed = True
        if subscription.timer is not None:
            subscription.timer.cancel()
        self._pulls.holds.discard(subscription.queue, subscription)
        self._pulls.subscription_count -= 1

    # ---- Replies ----

    async def _write(self) -> None:
        silent = 0
        while True:
            if len(self._notices) < NOTICES_MAX and len(self._ready) < READY_MAX:
                self._room.set()
            if self._notices:
                await self._context.write(self._notices.popleft())
            elif self._ready:
                subscription = self._ready.popleft()
                subscription.ready = False
                reply = None if subscription.closed else self._serve(subscription)
                if reply is not None:
                    await self._write_reply(reply)
                    silent = 0
                else:
                    silent += 1
                    if silent % SILENT_MAX == 0:
                        await asyncio.sleep(0)
            elif self._finishing and (self._stopping or not self._has_more()):
                return
            else:
                self._wake.clear()
                await self._wake.wait()

    async def _write_reply(self, reply: bytes) -> None:
        self._pulls.writing_bytes += len(reply)
        try:
            await self._context.write(reply)
        finally:
            self._pulls.writing_bytes -= len(reply)

    def _has_more(self) -> bool:
        """A client that has said its last word may still have credit."""
        return any(subscription.has_credit for subscription in self._subscriptions.values())

    def _serve(self, subscription: PullSubscription) -> bytes | None:
        """The next reply of a subscription; None when it has to wait."""
        if not subscription.has_credit and not self._stopping:
            return None
        try:
            queue = self._pulls.check(subscription.queue.topic, subscription.queue.queue_id, subscription.group)
            subscription.queue = queue
            if self._stopping:
                return self._end(subscription, NO_NEW_MSG)
            if subscription.diverged:
                raise diverged_error(subscription.offset)
            if subscription.offset != queue.max_offset:
                reply = self._read_queue(subscription, queue)
                if reply is not None:
                    return reply
        except KiteMQError as error:
            self._close(subscription)
            return _error_reply(subscription.number, error, next_offset=subscription.offset)
        return self._wait(subscription, queue)

    def _read_queue(self, subscription: PullSubscription, queue: ConsumeQueue) -> bytes | None:
        """What the queue has for the subscription; None when a filter lets nothing pass."""
        result = self._store.read(
            queue,
            subscription.offset,
            count_max=min(subscription.credit_messages, REPLY_MESSAGES_MAX),
            bytes_max=self._pulls.reply_bytes(min(subscription.credit_bytes, subscription.reply_bytes_max)),
            tags=subscription.tags,
        )
        subscription.offset = result.next_offset
        if result.status is ReadStatus.OFFSET_ILLEGAL:
            return self._end(subscription, OFFSET_ILLEGAL)
        count = result.count
        if count:
            byte_count = len(result.records)
            self._pulls.counts.count_out(subscription.counts, count, byte_count)
            subscription.credit_messages -= count
            subscription.credit_bytes -= byte_count
            subscription.expires_at = self._loop.time() + subscription.suspend_s
            self._told(subscription)
        if subscription.offset < queue.max_offset:
            subscription.wake()
        elif count and subscription.has_credit:
            self._hold(subscription)
        return _found(subscription, result) if count else None

    def _wait(self, subscription: PullSubscription, queue: ConsumeQueue) -> bytes | None:
        """Nothing to send: hold, unless its time is up or the client should hear how far the filter has skipped."""
        now = self._loop.time()
        at_end = subscription.offset == queue.max_offset
        if at_end and now >= subscription.expires_at:
            return self._end(subscription, NO_NEW_MSG)
        skipped = subscription.offset - subscription.reported_offset
        if skipped and subscription.report_at == FOREVER:
            subscription.report_at = now + SKIPPED_S
        if at_end:
            self._hold(subscription)
        if skipped >= SKIPPED_MESSAGES_MAX or now >= subscription.report_at:
            self._told(subscription)
            return _encode(_header(subscription, queue, NO_MATCHED_MSG))
        return None

    def _told(self, subscription: PullSubscription) -> None:
        """The client knows where the subscription stands."""
        subscription.reported_offset = subscription.offset
        subscription.report_at = FOREVER

    def _hold(self, subscription: PullSubscription) -> None:
        self._pulls.holds.add(subscription.queue, subscription)
        due_at = min(subscription.expires_at, subscription.report_at)
        timer = subscription.timer
        if timer is not None and timer.when() > due_at:
            timer.cancel()
            timer = None
        # A timer that goes off too early costs one look, and is cheaper than a new one for every reply.
        if timer is None and due_at != FOREVER:
            subscription.timer = self._loop.call_at(due_at, subscription.due)

    def _end(self, subscription: PullSubscription, status: broker_pb2.PullStatus.ValueType) -> bytes:
        self._close(subscription)
        return _encode(_header(subscription, subscription.queue, status))


def _found(subscription: PullSubscription, result: ReadResult) -> bytes:
    header = PullResponse(
        number=subscription.number,
        next_offset=result.next_offset,
        min_offset=result.min_offset,
        max_offset=result.max_offset,
        first_queue_offset=result.first_queue_offset,
        sparse=result.sparse,
        last_epoch=result.last_epoch,
    ).SerializeToString()
    sizes = length_delimited(SIZES_KEY, result.sizes)
    return b"".join((result.records, header, sizes, _header_bytes(len(header) + len(sizes))))


def _header(
    subscription: PullSubscription, queue: ConsumeQueue, status: broker_pb2.PullStatus.ValueType
) -> PullResponse:
    return PullResponse(
        number=subscription.number,
        status=status,
        next_offset=subscription.offset,
        min_offset=queue.min_offset,
        max_offset=queue.max_offset,
    )


def _error_reply(number: int, error: KiteMQError, *, next_offset: int) -> bytes:
    return _encode(PullResponse(number=number, error=error_to_stream(error), next_offset=next_offset))


def _encode(header: PullResponse) -> bytes:
    """A reply without records."""
    data = header.SerializeToString()
    return data + _header_bytes(len(data))


def _header_bytes(others: int) -> bytes:
    """The last field of every reply."""
    return HEADER_BYTES_KEY + U32.pack(others + HEADER_BYTES_BYTES)
