"""Behind `kitemq tail`: reads queues as they are, as a reader that belongs to no group."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from dataclasses import dataclass

from kitemq.admin import AdminClient
from kitemq.admin.results import received_from_proto
from kitemq.cli.messages import MessagePrinter
from kitemq.cli.options import Connection
from kitemq.cli.output import note
from kitemq.cli.session import warn_unanswered
from kitemq.errors import BrokerUnavailableError, KiteMQError, TopicNotFoundError
from kitemq.message import MessageQueue, ReceivedMessage
from kitemq.proto.v1 import broker_pb2, broker_pb2_grpc
from kitemq.route import Route, RouteCache, open_route_cache
from kitemq.rpc import Channels, call, parse_addresses

PAGE_MESSAGES = 4096
PAGE_BYTES = 1024 * 1024
SUSPEND_MS = 15_000
ANSWER_S = 5.0
RETRY_S = 1.0
# A broker corrects an offset above a queue's end to the end.
BEYOND_THE_END = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Page:
    """What one pull brought. next_offset: where to read on."""

    messages: list[ReceivedMessage]
    next_offset: int


class TopicReader:
    """Pulls from the queues of one topic, with a tag filter."""

    def __init__(self, topic: str, filter_expression: str, routes: RouteCache, channels: Channels) -> None:
        self.topic = topic
        self._filter = filter_expression
        self._routes = routes
        self._channels = channels

    async def pull(self, queue: MessageQueue, offset: int, *, suspend_ms: int = 0) -> Page:
        """Messages of `queue` from `offset` on; none when nothing came within suspend_ms."""
        route = await self._routes.get(self.topic)
        address = route.any_broker(queue.broker_name)
        if address is None:
            raise BrokerUnavailableError(f"no broker serves {queue} at the moment", topic=self.topic)
        stub: broker_pb2_grpc.BrokerAsyncStub = broker_pb2_grpc.BrokerStub(self._channels.get(address))
        request = broker_pb2.PullMessageRequest(
            topic=self.topic,
            queue_id=queue.queue_id,
            queue_offset=offset,
            filter=self._filter,
            max_count=PAGE_MESSAGES,
            max_bytes=PAGE_BYTES,
            suspend_ms=suspend_ms,
        )
        timeout_s = ANSWER_S + suspend_ms / 1000
        try:
            answer = await call(stub.PullMessage, request, timeout_s=timeout_s, address=address, topic=self.topic)
        except KiteMQError as error:
            if error.refresh_route:
                await self._routes.get(self.topic, refresh=True)
            raise
        return Page([received_from_proto(queue.broker_name, one) for one in answer.records], answer.next_offset)

    async def between(self, queue: MessageQueue, start: int, end: int) -> AsyncIterator[ReceivedMessage]:
        """The messages of `queue` from `start` up to `end`, exclusive."""
        while start < end:
            page = await self.pull(queue, start)
            for message in page.messages:
                if message.queue_offset >= end:
                    return
                yield message
            if page.next_offset <= start:
                return
            start = page.next_offset


async def tail_topic(
    connection: Connection,
    topic: str,
    *,
    filter_expression: str,
    last: int | None,
    since_ms: int | None,
    follow: bool,
    printer: MessagePrinter,
) -> None:
    """Print the newest `last` messages, or all since `since_ms`; with `follow` go on for ever."""
    tls = connection.tls_config()
    async with AdminClient(connection.namesrv, tls=tls, on_unanswered=warn_unanswered) as admin:
        states = await admin.list_queues(topic, timestamp_ms=since_ms)
    ends = {state.queue: state.max_offset for state in states}
    channels = Channels(tls=tls)
    try:
        async with open_route_cache(parse_addresses(connection.namesrv), channels) as routes:
            reader = TopicReader(topic, filter_expression, routes, channels)
            if last is not None:
                bounds = {state.queue: (state.min_offset, state.max_offset) for state in states}
                for message in await newest(reader, bounds, last, exact=filter_expression.strip() in ("", "*")):
                    printer.print(message)
            else:
                starts = {state.queue: state.offset_at_timestamp or 0 for state in states}
                async for message in merged(reader, starts, ends):
                    printer.print(message)
            printer.flush()
            if follow:
                await Follower(reader, routes, printer).run(ends)
    finally:
        await channels.close()


def _stored(message: ReceivedMessage) -> tuple[int, str, MessageQueue, int]:
    """Order between queues. Within a millisecond ids tell what one producer sent first: they end in a count."""
    return message.store_timestamp_ms, message.message_id, message.queue, message.queue_offset


async def newest(
    reader: TopicReader, bounds: dict[MessageQueue, tuple[int, int]], count: int, *, exact: bool
) -> list[ReceivedMessage]:
    """The newest `count` messages that pass the filter, oldest first. exact: everything passes."""

    async def of_queue(queue: MessageQueue) -> list[ReceivedMessage]:
        first, end = bounds[queue]
        found: list[ReceivedMessage] = []
        window = count if exact else max(4 * count, PAGE_MESSAGES)
        while end > first and len(found) < count:
            start = max(first, end - window)
            found = [message async for message in reader.between(queue, start, end)] + found
            end = start
            window *= 4
        return found[-count:]

    if not count:
        return []
    found = await asyncio.gather(*(of_queue(queue) for queue in bounds))
    return list(heapq.merge(*found, key=_stored))[-count:]


async def merged(
    reader: TopicReader, starts: dict[MessageQueue, int], ends: dict[MessageQueue, int]
) -> AsyncIterator[ReceivedMessage]:
    """The messages of all queues between `starts` and `ends`, in the order of their storing."""
    sources = [reader.between(queue, starts[queue], end) for queue, end in ends.items()]
    firsts = await asyncio.gather(*(anext(source, None) for source in sources))
    heap = [(_stored(first), number, first) for number, first in enumerate(firsts) if first is not None]
    heapq.heapify(heap)
    while heap:
        _, number, message = heap[0]
        yield message
        following = await anext(sources[number], None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (_stored(following), number, following))


class Follower:
    """Prints what is stored from some offsets on, in queues that are added later too. Outlives brokers' restarts."""

    def __init__(self, reader: TopicReader, routes: RouteCache, printer: MessagePrinter) -> None:
        self._reader = reader
        self._routes = routes
        self._printer = printer
        self._pages: asyncio.Queue[list[ReceivedMessage]] = asyncio.Queue(maxsize=16)
        self._readers: dict[MessageQueue, asyncio.Task[None]] = {}
        self._silent: set[str] = set()

    async def run(self, offsets: dict[MessageQueue, int]) -> None:
        """Follow the queues from `offsets` until cancelled. Raises what cannot heal by itself."""
        route = await self._routes.get(self._reader.topic)
        for queue in {*offsets, *route.readable}:  # those of a broker that did not answer: from their end
            self._follow(queue, offsets.get(queue, BEYOND_THE_END))
        self._routes.add_listener(self._route_changed)
        try:
            while True:
                await self._print_next()
        finally:
            self._routes.remove_listener(self._route_changed)
            for task in self._readers.values():
                task.cancel()
            await asyncio.gather(*self._readers.values(), return_exceptions=True)

    async def _print_next(self) -> None:
        messages = await self._pages.get()
        if not messages:  # a reader has ended, and says why
            for task in self._readers.values():
                if task.done():
                    task.result()
        for message in messages:
            self._printer.print(message)
        if self._pages.empty():
            self._printer.flush()

    def _route_changed(self, route: Route) -> None:
        if route.topic == self._reader.topic:
            for queue in route.readable:
                self._follow(queue, 0)

    def _follow(self, queue: MessageQueue, offset: int) -> None:
        if queue not in self._readers:
            self._readers[queue] = asyncio.create_task(self._read(queue, offset), name=f"tail {queue}")

    async def _read(self, queue: MessageQueue, offset: int) -> None:
        try:
            while True:
                try:
                    page = await self._reader.pull(queue, offset, suspend_ms=SUSPEND_MS)
                except KiteMQError as error:
                    # A broker that stops takes its topics with it, and brings them back.
                    if not (error.retriable or isinstance(error, TopicNotFoundError)):
                        raise
                    self._complain(queue.broker_name, error)
                    await asyncio.sleep(max(RETRY_S, error.retry_after_ms / 1000))
                    continue
                self._answers(queue.broker_name)
                offset = page.next_offset
                if page.messages:
                    await self._pages.put(page.messages)
        except KiteMQError:
            await self._pages.put([])
            raise

    def _complain(self, broker_name: str, error: KiteMQError) -> None:
        if broker_name not in self._silent:
            self._silent.add(broker_name)
            note(f"Warning: broker {broker_name} cannot be read, trying again: {error}")

    def _answers(self, broker_name: str) -> None:
        if broker_name in self._silent:
            self._silent.discard(broker_name)
            note(f"Broker {broker_name} can be read again.")
