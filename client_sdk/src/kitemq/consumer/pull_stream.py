"""Fetching: one Pull stream per broker group, a subscription per queue on it, credit as the prefetch is used up.

A stream that breaks is opened again for ever, and every queue goes on at its position.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import dataclass
from typing import Protocol

import grpc.aio
from google.protobuf.message import DecodeError

from kitemq.consumer.held_queue import Chunk, HeldQueue
from kitemq.consumer.tasks import BackgroundTasks
from kitemq.errors import (
    DivergedError,
    GroupNotFoundError,
    KiteMQError,
    TopicNotFoundError,
    error_from_rpc,
    error_from_stream,
)
from kitemq.message import MessageQueue
from kitemq.proto.v1 import broker_pb2
from kitemq.protocol.record import U32
from kitemq.route import Route, RouteCache
from kitemq.rpc import Channels

logger = logging.getLogger(__name__)

PULL_METHOD = "/kitemq.v1.Broker/Pull"
HOLD_MS = 0xFFFF_FFFF
REPLY_BYTES_MAX = 1024 * 1024
BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 2.0
# When a subscription that the broker ended is opened again: at a corrected offset; after something that passes; after a
# no that somebody has to change (a missing right).
RETRY_SOON_S = 0.02
RETRY_S = 0.5
REFUSED_RETRY_S = 3.0

# PullResponse.header_bytes: key of field 15 as fixed32, then its value.
_HEADER_BYTES_KEY = 0x7D
_HEADER_BYTES_SIZE = 5


def split_reply(reply: bytes) -> tuple[broker_pb2.PullResponse, int]:
    """What follows the records, parsed, and the length of the records.

    Raises ValueError for bytes that are not a pull reply.
    """
    if len(reply) < _HEADER_BYTES_SIZE or reply[-_HEADER_BYTES_SIZE] != _HEADER_BYTES_KEY:
        raise ValueError("does not end in header_bytes")
    records_bytes = len(reply) - U32.unpack_from(reply, len(reply) - 4)[0]
    if records_bytes < 0:
        raise ValueError("header_bytes is larger than the reply")
    try:
        header = broker_pb2.PullResponse.FromString(reply[records_bytes:])
    except DecodeError:
        raise ValueError("header_bytes does not point at a header") from None
    if sum(header.sizes) != records_bytes:
        raise ValueError("sizes do not add up to the records")
    return header, records_bytes


@dataclass(frozen=True, slots=True)
class Prefetch:
    """How far a queue may be read ahead. span_max: most queue offsets from the smallest unfinished one; None = any."""

    messages_max: int
    bytes_max: int
    span_max: int | None


class _StreamRefused(Exception):
    """The broker does not serve this queue (any more): another one may."""

    def __init__(self, error: KiteMQError) -> None:
        super().__init__(str(error))
        self.error = error


PullCall = grpc.aio.StreamStreamCall[broker_pb2.PullRequest, bytes]
PullMethod = grpc.aio.StreamStreamMultiCallable[broker_pb2.PullRequest, bytes]


def _serialize(request: broker_pb2.PullRequest) -> bytes:
    return request.SerializeToString()


class PullSink(Protocol):
    """Who gets what the streams bring. Plain calls on the loop."""

    def deliver(self, chunk: Chunk) -> None:
        """Messages have come; the chunk is already in its queue."""

    def rewind(self, held: HeldQueue, queue_offset: int) -> None:
        """What lay from `queue_offset` on when it was read is not what lies there now: begin again there."""

    def lost(self, held: HeldQueue) -> None:
        """The broker has no such topic or queue any more."""


class BrokerPull:
    """The stream to one broker group, and the queues that are read over it."""

    def __init__(
        self,
        broker_name: str,
        *,
        group: str,
        prefetch: Prefetch,
        sink: PullSink,
        routes: RouteCache,
        channels: Channels,
    ) -> None:
        self.broker_name = broker_name
        self._group = group
        self._prefetch = prefetch
        self._sink = sink
        self._routes = routes
        self._channels = channels
        self._queues: dict[MessageQueue, HeldQueue] = {}
        # Of the stream that is open now: subscriptions by number, requests that wait to be written.
        self._address: str | None = None
        self._open: dict[int, HeldQueue] = {}
        self._outbox: dict[int, broker_pb2.PullRequest] = {}
        self._outbox_filled = asyncio.Event()
        self._last_number = 0
        self._reopening: dict[HeldQueue, asyncio.TimerHandle] = {}
        # The route has changed: connect now, or to another address.
        self._route_changed = asyncio.Event()

    # ---- which queues ----

    @property
    def empty(self) -> bool:
        return not self._queues

    def add(self, held: HeldQueue) -> None:
        self._queues[held.queue] = held
        self._route_changed.set()
        self.refill(held)

    def remove(self, held: HeldQueue) -> None:
        """Read no further; what is on its way is ignored."""
        if self._queues.get(held.queue) is held:
            del self._queues[held.queue]
        timer = self._reopening.pop(held, None)
        if timer is not None:
            timer.cancel()
        if self._open.pop(held.number, None) is None:
            return
        waiting = self._outbox.pop(held.number, None)
        if waiting is None or not waiting.topic:  # the broker knows this number
            self._put(broker_pb2.PullRequest(number=held.number, close=True))
        held.number = 0

    def refill(self, held: HeldQueue) -> None:
        """Give the broker credit for what has been consumed; opens the subscription where there is none."""
        if self._address is None or held in self._reopening or self._queues.get(held.queue) is not held:
            return
        prefetch = self._prefetch
        messages, size = held.wanted(
            messages_max=prefetch.messages_max, bytes_max=prefetch.bytes_max, span_max=prefetch.span_max
        )
        if not messages and not size:
            return
        held.credit_messages += messages
        held.credit_bytes += size
        waiting = self._outbox.get(held.number)
        if waiting is not None:
            waiting.credit_messages += messages
            waiting.credit_bytes += size
        elif held.number:
            self._put(broker_pb2.PullRequest(number=held.number, credit_messages=messages, credit_bytes=size))
        else:
            self._put(self._opening(held))

    def _opening(self, held: HeldQueue) -> broker_pb2.PullRequest:
        self._last_number += 1
        held.number = self._last_number
        self._open[held.number] = held
        return broker_pb2.PullRequest(
            number=held.number,
            topic=held.queue.topic,
            queue_id=held.queue.queue_id,
            group=self._group,
            queue_offset=held.fetch_offset,
            filter=held.filter,
            credit_messages=held.credit_messages,
            credit_bytes=held.credit_bytes,
            reply_bytes_max=min(REPLY_BYTES_MAX, self._prefetch.bytes_max),
            suspend_ms=HOLD_MS,
            last_epoch=held.last_epoch,
        )

    def _put(self, request: broker_pb2.PullRequest) -> None:
        self._outbox[request.number] = request
        self._outbox_filled.set()

    def route_changed(self, route: Route) -> None:
        """To be called for every route that has changed."""
        if self.broker_name in route.brokers and route.any_broker(self.broker_name) != self._address:
            self._route_changed.set()

    # ---- the stream ----

    async def run(self) -> None:
        """Keeps the stream up. Ends by cancellation."""
        loop = asyncio.get_running_loop()
        backoff_s = BACKOFF_FIRST_S
        refresh = False
        try:
            while True:
                self._route_changed.clear()
                address = await self._locate(refresh=refresh)
                refresh = True
                if address is not None:
                    began = loop.time()
                    await self._serve_until_broken(address)
                    if loop.time() - began > BACKOFF_MAX_S:
                        backoff_s = BACKOFF_FIRST_S
                try:
                    async with asyncio.timeout(random.uniform(0.5, 1.0) * backoff_s):
                        await self._route_changed.wait()
                except TimeoutError:
                    pass
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
        finally:
            self._forget_stream()

    async def _locate(self, *, refresh: bool) -> str | None:
        for topic in {queue.topic for queue in self._queues}:
            try:
                route = await self._routes.get(topic, refresh=refresh)
            except KiteMQError as error:
                logger.debug("consumer: no route topic=%s error=%s", topic, error)
                continue
            address = route.any_broker(self.broker_name)
            if address is not None:
                return address
        return None

    async def _serve_until_broken(self, address: str) -> None:
        try:
            await self._serve(address)
            logger.debug("consumer: pull stream ended broker=%s address=%s", self.broker_name, address)
        except grpc.aio.AioRpcError as error:
            reason = error_from_rpc(error, address=address)
            logger.info("consumer: pull stream broke broker=%s error=%s", self.broker_name, reason)
            self._routes.unreachable(self.broker_name)
        except _StreamRefused as refused:
            logger.info("consumer: pull stream left broker=%s error=%s", self.broker_name, refused.error)
        except ValueError as error:
            logger.error(
                "consumer: pull reply cannot be read broker=%s address=%s error=%s", self.broker_name, address, error
            )
        finally:
            self._forget_stream()

    def _forget_stream(self) -> None:
        self._address = None
        self._outbox.clear()
        self._open.clear()
        for timer in self._reopening.values():
            timer.cancel()
        self._reopening.clear()
        for held in self._queues.values():
            held.number = 0
            held.credit_messages = held.credit_bytes = 0

    async def _serve(self, address: str) -> None:
        method: PullMethod = self._channels.get(address).stream_stream(
            PULL_METHOD, request_serializer=_serialize, response_deserializer=None
        )
        call = method()
        self._address = address
        for held in list(self._queues.values()):
            self.refill(held)
        reader = asyncio.create_task(self._read(call, address), name=f"pull reader {address}")
        writer = asyncio.create_task(self._write(call), name=f"pull writer {address}")
        moved = asyncio.create_task(self._moved(address), name=f"pull route {address}")
        tasks = {reader, writer, moved}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if writer.done() and not writer.result():  # the call is over: the reader says why
                await asyncio.wait({reader, moved}, return_when=asyncio.FIRST_COMPLETED)
            if reader.done():
                reader.result()
        finally:
            for task in tasks:
                task.cancel()
            call.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _moved(self, address: str) -> None:
        """Returns when the broker group is to be read at another address, or is no longer read at all."""
        while True:
            await self._route_changed.wait()
            self._route_changed.clear()
            for topic in {queue.topic for queue in self._queues}:
                route = self._routes.peek(topic)
                if route is not None and route.any_broker(self.broker_name) not in (None, address):
                    self._route_changed.set()
                    return

    async def _write(self, call: PullCall) -> bool:
        """Writes what waits in the outbox. Returns False when the call is over."""
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                request = self._outbox.pop(next(iter(self._outbox)))
                try:
                    await call.write(request)
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    return False

    async def _read(self, call: PullCall, address: str) -> None:
        while True:
            reply = await call.read()
            if not isinstance(reply, bytes):  # EOF
                return
            header, records_bytes = split_reply(reply)
            held = self._open.get(header.number)
            if held is None:
                continue
            if header.HasField("error"):
                self._refused(held, header, address)
            elif header.status in (broker_pb2.FOUND, broker_pb2.NO_MATCHED_MSG):
                self._found(held, header, reply, records_bytes)
            else:
                self._ended(held, header)

    # ---- replies ----

    def _found(self, held: HeldQueue, header: broker_pb2.PullResponse, reply: bytes, records_bytes: int) -> None:
        sizes = list(header.sizes)
        if not sizes:
            held.fetch_offset = header.next_offset
            self.refill(held)
            return
        held.credit_messages -= len(sizes)
        held.credit_bytes -= records_bytes
        chunk = Chunk(
            held,
            reply,
            sizes,
            records_bytes=records_bytes,
            first_offset=header.first_queue_offset,
            sparse=header.sparse,
        )
        held.add(chunk, next_offset=header.next_offset, last_epoch=header.last_epoch)
        self._sink.deliver(chunk)

    def _ended(self, held: HeldQueue, header: broker_pb2.PullResponse) -> None:
        """NO_NEW_MSG: the broker is stopping. OFFSET_ILLEGAL: what we asked for is not there."""
        self._close(held)
        if header.status == broker_pb2.OFFSET_ILLEGAL:
            moved = header.next_offset - held.fetch_offset
            logger.warning(
                "consumer: offset corrected queue=%s from=%d to=%d: %d messages %s",
                held.queue,
                held.fetch_offset,
                header.next_offset,
                abs(moved),
                "were deleted before they were read" if moved >= 0 else "that were read are no longer on the broker",
            )
            if moved < 0:
                self._sink.rewind(held, header.next_offset)
                return
        held.fetch_offset = header.next_offset
        self._reopen_later(held, RETRY_SOON_S if header.status == broker_pb2.OFFSET_ILLEGAL else RETRY_S)

    def _refused(self, held: HeldQueue, header: broker_pb2.PullResponse, address: str) -> None:
        error = error_from_stream(header.error, address=address, topic=held.queue.topic)
        self._close(held)
        if isinstance(error, DivergedError):
            logger.warning(
                "consumer: history was cut queue=%s from=%d to=%d", held.queue, held.fetch_offset, header.next_offset
            )
            self._sink.rewind(held, header.next_offset)
        elif isinstance(error, TopicNotFoundError):
            logger.warning("consumer: topic is gone queue=%s error=%s", held.queue, error)
            self._sink.lost(held)
        elif error.refresh_route and not isinstance(error, GroupNotFoundError):
            raise _StreamRefused(error)
        else:
            logger.warning("consumer: pull refused queue=%s error=%s", held.queue, error)
            delay_s = RETRY_S if error.retriable else REFUSED_RETRY_S
            self._reopen_later(held, max(delay_s, error.retry_after_ms / 1000))

    def _close(self, held: HeldQueue) -> None:
        self._open.pop(held.number, None)
        self._outbox.pop(held.number, None)
        held.number = 0
        held.credit_messages = held.credit_bytes = 0

    def _reopen_later(self, held: HeldQueue, delay_s: float) -> None:
        def reopen() -> None:
            del self._reopening[held]
            self.refill(held)

        self._reopening[held] = asyncio.get_running_loop().call_later(delay_s, reopen)


class Fetcher:
    """All queues that a consumer reads, over as many streams as they have brokers."""

    def __init__(
        self,
        *,
        group: str,
        prefetch: Prefetch,
        sink: PullSink,
        routes: RouteCache,
        channels: Channels,
        tasks: BackgroundTasks,
    ) -> None:
        self._group = group
        self._prefetch = prefetch
        self._sink = sink
        self._routes = routes
        self._channels = channels
        self._tasks = tasks
        self._streams: dict[str, tuple[BrokerPull, asyncio.Task[None]]] = {}

    def add(self, held: HeldQueue) -> None:
        """Read on at the queue's fetch_offset."""
        name = held.queue.broker_name
        if name not in self._streams:
            pull = BrokerPull(
                name,
                group=self._group,
                prefetch=self._prefetch,
                sink=self._sink,
                routes=self._routes,
                channels=self._channels,
            )
            self._streams[name] = pull, self._tasks.start(pull.run(), name=f"pull {name}")
        self._streams[name][0].add(held)

    def remove(self, held: HeldQueue) -> None:
        """Read no further. The last queue of a broker takes the stream with it."""
        name = held.queue.broker_name
        if name not in self._streams:
            return
        pull, _ = self._streams[name]
        pull.remove(held)
        if pull.empty:  # often the same queue comes back at once, at another offset
            asyncio.get_running_loop().call_soon(self._close_if_empty, name)

    def _close_if_empty(self, name: str) -> None:
        if name in self._streams and self._streams[name][0].empty:
            self._streams.pop(name)[1].cancel()

    def refill(self, held: HeldQueue) -> None:
        """To be called when messages of the queue have been begun or finished, or it is no longer paused."""
        if held.queue.broker_name in self._streams:
            self._streams[held.queue.broker_name][0].refill(held)

    def route_changed(self, route: Route) -> None:
        for pull, _ in self._streams.values():
            pull.route_changed(route)
