"""The producer that users hold: validates, chooses queues, bounds memory, answers each send."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from time import monotonic
from typing import Any, Self

from kitemq.compression import Compression
from kitemq.errors import (
    BrokerBusyError,
    BrokerUnavailableError,
    ClientClosedError,
    InvalidMessageError,
    InvalidRequestError,
    KiteMQError,
    RequestTimeoutError,
)
from kitemq.message import SEND_STATUSES, Message, MessageQueue, SendReceipt
from kitemq.producer.accumulator import ANY_QUEUE, BATCH_MESSAGES_MAX, REQUEST_BYTES_MAX, Entry, QueueState, Wish
from kitemq.producer.encoding import MessageEncoder
from kitemq.producer.heartbeat import ProducerHeartbeat
from kitemq.producer.hooks import SendHook
from kitemq.producer.publisher import Publishers
from kitemq.producer.selector import BrokerFaults, QueueSelector, select_by_key
from kitemq.producer.sender import BrokerSender, SenderSettings, Sends
from kitemq.proto.v1 import broker_pb2
from kitemq.protocol.names import QUEUE_COUNT_MAX, check_group
from kitemq.route import RouteCache, open_route_cache
from kitemq.rpc import Channels, TlsConfig, new_client_id, parse_addresses

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 30.0


class Producer(Sends):
    """Sends messages. Use it as `async with Producer(...) as producer:`; it belongs to the loop it is opened on.

    Messages of one producer to one queue are stored in the order of the `send` calls, also across retries, and each is
    stored once however often it had to be tried.

    namesrv: "host:9876", several separated by ";". group: names the application.
    request_timeout_s: without an answer for this long the broker is asked again. delivery_timeout_s: a send fails after
    this long in all; keep it longer than a failover. retry_elsewhere: where the outcome of a try is unknown, try other
    brokers too: more available, but a message may then be stored twice.
    compression, compress_from_bytes: bodies from this size on are compressed, on the event loop.
    buffer_bytes_max: sends wait when this much is buffered. latency_isolation: pass over slow brokers (RocketMQ's
    sendLatencyFaultEnable). default_topic_queue_count: queues per broker of topics that a send creates.
    """

    def __init__(
        self,
        namesrv: str | Sequence[str],
        *,
        group: str,
        request_timeout_s: float = 3.0,
        delivery_timeout_s: float = 15.0,
        retry_elsewhere: bool = False,
        compression: Compression = Compression.ZLIB,
        compress_from_bytes: int = 4096,
        buffer_bytes_max: int = 64 * 1024 * 1024,
        latency_isolation: bool = False,
        default_topic_queue_count: int = 4,
        hooks: Iterable[SendHook] = (),
        tls: TlsConfig | None = None,
        client_id: str | None = None,
    ) -> None:
        check_group(group, kind="producer group")
        if not 0 < request_timeout_s <= delivery_timeout_s:
            raise InvalidRequestError(
                f"request_timeout_s {request_timeout_s} must be above 0 and at most delivery_timeout_s "
                f"{delivery_timeout_s}"
            )
        if not 0 < default_topic_queue_count <= QUEUE_COUNT_MAX:
            raise InvalidRequestError(
                f"default_topic_queue_count {default_topic_queue_count} is not 1..{QUEUE_COUNT_MAX}"
            )
        self._addresses = parse_addresses(list(namesrv) if not isinstance(namesrv, str) else namesrv)
        self.group = group
        self.client_id = client_id or new_client_id()
        self._delivery_timeout_s = delivery_timeout_s
        self._buffer_bytes_max = buffer_bytes_max
        self._hooks = tuple(hooks)
        self._tls = tls
        self._encoder = MessageEncoder(group=group, compression=compression, compress_from_bytes=compress_from_bytes)
        self._settings = SenderSettings(
            instance=self._encoder.instance,
            request_timeout_s=request_timeout_s,
            default_topic_queue_count=default_topic_queue_count,
            retry_elsewhere=retry_elsewhere,
        )
        self._faults = BrokerFaults(latency_enable=latency_isolation)
        self._senders: dict[str, BrokerSender] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._buffered_bytes = 0
        self._waiting: deque[Entry] = deque()
        self._open = False
        self._used = False
        self._stack = AsyncExitStack()
        self._routes: RouteCache
        self._publishers: Publishers
        self._channels: Channels
        self._loop: asyncio.AbstractEventLoop
        self._idle: asyncio.Event

    async def __aenter__(self) -> Self:
        if self._used:
            raise ClientClosedError("a producer is opened once: make a new one")
        self._used = True
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._idle.set()
        self._channels = Channels(tls=self._tls)
        self._stack.push_async_callback(self._channels.close)
        self._routes = await self._stack.enter_async_context(open_route_cache(self._addresses, self._channels))
        self._publishers = Publishers(
            self._routes,
            place=self._place,
            fail=self._fail,
            spawn=self._spawn,
            default_queue_count=self._settings.default_topic_queue_count,
        )
        heartbeat = ProducerHeartbeat(self.client_id, self.group, self._channels, self._masters)
        self._spawn(heartbeat.run(), "producer heartbeat")
        self._heartbeat = heartbeat
        self._open = True
        return self

    async def __aexit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        await self.close(timeout_s=CLOSE_TIMEOUT_S if exc_type is None else 0.0)

    async def close(self, *, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until everything buffered is stored or given up, at most timeout_s, then close.

        Sends that are still waiting then fail with ClientClosedError.
        """
        if not self._open:
            return
        self._open = False
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            logger.warning("producer: closed with sends under way group=%s bytes=%d", self.group, self._buffered_bytes)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for entry in self._outstanding():
                if entry.future is not None and not entry.future.done():
                    entry.future.set_exception(
                        ClientClosedError(
                            "the producer was closed before the broker answered: may or may not be stored"
                        )
                    )
            await self._heartbeat.leave()
            await self._stack.aclose()

    def _outstanding(self) -> list[Entry]:
        found = [entry for sender in self._senders.values() for entry in sender.entries()]
        found += self._waiting
        found += self._publishers.parked()
        return found

    # ---- what users call ----

    async def send(
        self,
        message: Message,
        *,
        sharding_key: str = "",
        queue: MessageQueue | None = None,
        selector: QueueSelector | None = None,
        timeout_s: float | None = None,
    ) -> SendReceipt:
        """Send one message and return its receipt once it is as durable as the broker's mode promises.

        sharding_key: messages of one key go to one queue, in order. queue: exactly this one. selector: chooses from the
        writable queues. timeout_s: instead of delivery_timeout_s.
        Raises InvalidMessageError, TopicNotFoundError, PermissionDeniedError at once; RequestTimeoutError when the time
        is over (the message may or may not be stored unless it says "not stored"); ClientClosedError.
        """
        future = self.start_send([message], sharding_key, queue, selector, timeout_s)
        return (await future)[0]

    async def send_batch(
        self,
        messages: Sequence[Message],
        *,
        sharding_key: str = "",
        queue: MessageQueue | None = None,
        selector: QueueSelector | None = None,
        timeout_s: float | None = None,
    ) -> list[SendReceipt]:
        """Send messages of one topic to one queue, in order, side by side; receipts in the same order.

        More than 1,024 messages or 1 MiB travel as several requests. Not atomic: when it raises, a first part of the
        batch may be stored. Raises as `send`.
        """
        if not messages:
            return []
        topic = messages[0].topic
        if any(message.topic != topic for message in messages):
            raise InvalidMessageError("all messages of a batch must have the same topic", topic=topic)
        slices = list(_slices(messages))
        if len(slices) > 1 and queue is None and not sharding_key:  # all parts to one queue
            publisher = self._publishers.get(topic)
            await publisher.ready()
            queue = selector(publisher.queues, messages[0]) if selector else publisher.next_queue(None)
        futures = [self.start_send(part, sharding_key, queue, selector, timeout_s) for part in slices]
        receipts: list[SendReceipt] = []
        try:
            for future in futures:
                receipts += await future
        finally:
            for future in futures:
                if future.done() and not future.cancelled():
                    future.exception()  # the first error is raised; the others are the same story
        return receipts

    def send_oneway(self, message: Message, *, sharding_key: str = "", queue: MessageQueue | None = None) -> None:
        """Send without waiting for an answer. Errors after this call are not reported.

        Raises InvalidMessageError; BrokerBusyError when the buffer is full; ClientClosedError.
        """
        if self._waiting or self._buffered_bytes > self._buffer_bytes_max:
            raise BrokerBusyError(
                f"{self._buffered_bytes} bytes wait to be sent: slow down, or use send(), which waits",
                topic=message.topic,
            )
        self.start_send([message], sharding_key, queue, None, None, answer=False)

    async def flush(self) -> None:
        """Wait until everything sent so far is stored or given up."""
        await self._idle.wait()

    # ---- from a message to its queue ----

    def start_send(
        self,
        messages: Sequence[Message],
        sharding_key: str,
        queue: MessageQueue | None,
        selector: QueueSelector | None,
        timeout_s: float | None,
        *,
        answer: bool = True,
    ) -> asyncio.Future[list[SendReceipt]]:
        """Begin to send messages of one topic, at most one request's worth. A plain function, for callers on the loop.

        The future is done with one receipt each. Without `answer` it never is, and errors are only logged.
        """
        if not self._open:
            raise ClientClosedError("the producer is not open: use it inside 'async with'")
        if queue is not None:
            _check_queue(queue)
        for hook in self._hooks:
            messages = [hook.before_send(message) for message in messages]
        publisher = self._publishers.get(messages[0].topic)
        encode = self._encoder.encode
        if len(messages) == 1:  # the hot path: no comprehensions
            part, message_id = encode(messages[0], sharding_key)
            parts, message_ids, size = [part], [message_id], len(part)
        else:
            encoded = [encode(message, sharding_key) for message in messages]
            parts = [part for part, _ in encoded]
            message_ids = [message_id for _, message_id in encoded]
            size = sum(map(len, parts))
        wish = ANY_QUEUE
        if queue is not None or sharding_key or selector is not None:
            wish = Wish(queue, sharding_key, selector, messages[0])
        future: asyncio.Future[list[SendReceipt]] = self._loop.create_future()
        entry = Entry(
            parts,
            message_ids,
            size,
            future if answer else None,
            monotonic() + (timeout_s or self._delivery_timeout_s),
            wish,
            publisher,
        )
        if self._hooks:
            future.add_done_callback(lambda done: self._after_send(messages, done))
        if self._waiting or (self._buffered_bytes and self._buffered_bytes + size > self._buffer_bytes_max):
            self._waiting.append(entry)
        else:
            self._admit(entry)
        return future

    def _admit(self, entry: Entry) -> None:
        if not self._buffered_bytes:
            self._idle.clear()
        self._buffered_bytes += entry.body_bytes
        if entry.publisher.queues or entry.wish.queue is not None:
            self._place(entry)
        else:
            entry.publisher.parked.append(entry)

    def _place(self, entry: Entry) -> None:
        """Put the entry into its queue's waiting room. The topic's queues are known."""
        publisher = entry.publisher
        wish = entry.wish
        if wish is ANY_QUEUE:
            state = publisher.current
            if state is None or not 0 < len(state.pending) < publisher.run_messages or self._faults:
                state = publisher.current = self._state(publisher.next_queue(self._usable if self._faults else None))
        elif wish.queue is not None:
            state = self._state(wish.queue)
        elif wish.selector is not None and wish.message is not None:
            try:
                chosen = wish.selector(publisher.queues, wish.message)
                _check_queue(chosen)
                state = self._state(chosen)
            except Exception as error:  # the user's code: its error is the send's
                self._fail(entry, error)
                return
        else:
            state = self._state(select_by_key(publisher.ordered or publisher.queues, wish.sharding_key))
        state.sender.submit(entry, state)

    def _usable(self, broker_name: str) -> bool:
        return self._faults.usable(broker_name, self._loop.time() * 1000)

    def _state(self, queue: MessageQueue) -> QueueState:
        sender = self._senders.get(queue.broker_name)
        if sender is None:
            sender = BrokerSender(
                queue.broker_name,
                address_of=self._publishers.master,
                channels=self._channels,
                settings=self._settings,
                sends=self,
            )
            self._senders[queue.broker_name] = sender
            self._spawn(sender.run(), f"send to {queue.broker_name}")
        return sender.state(queue)

    def _masters(self) -> set[str]:
        addresses = (self._publishers.master(name) for name in self._senders)
        return {address for address in addresses if address is not None}

    # ---- what senders report ----

    def delivered(
        self, state: QueueState, entries: list[Entry], result: broker_pb2.BatchResult, elapsed_s: float
    ) -> None:
        queue = state.queue
        status = SEND_STATUSES[result.status]
        stored_ms = result.store_timestamp_ms
        runs = result.offsets
        if len(runs) == 1 and not runs[0].unknown:
            offset, repeated, offsets = runs[0].first_queue_offset, runs[0].repeated, None
        else:
            offset, repeated, offsets = 0, False, iter(_offsets(runs))
        size = 0
        for entry in entries:
            size += entry.body_bytes
            future = entry.future
            if offsets is None:
                ids = entry.message_ids
                if future is None or future.done():
                    pass
                elif len(ids) == 1:
                    future.set_result([SendReceipt(status, ids[0], queue, offset, stored_ms, repeated)])
                else:
                    future.set_result(
                        [
                            SendReceipt(status, message_id, queue, number, stored_ms, repeated)
                            for number, message_id in enumerate(ids, offset)
                        ]
                    )
                offset += len(ids)
            else:
                receipts = [
                    SendReceipt(status, message_id, queue, number, stored_ms, again)
                    for message_id, (number, again) in zip(entry.message_ids, offsets, strict=False)
                ]
                if future is not None and not future.done():
                    future.set_result(receipts)
        if elapsed_s > 0.05:
            self._faults.answered(queue.broker_name, elapsed_s * 1000, self._loop.time() * 1000)
        self._release(size)

    def failed(self, entry: Entry, error: KiteMQError) -> None:
        self._fail(entry, error)

    def _fail(self, entry: Entry, error: Exception) -> None:
        if entry.future is not None and not entry.future.done():
            entry.future.set_exception(error)
        elif entry.future is None:
            logger.warning("producer: one-way message lost topic=%s error=%s", entry.publisher.topic, error)
        self._release(entry.body_bytes)

    def move(self, entry: Entry, state: QueueState) -> bool:
        publisher = entry.publisher
        queue = publisher.next_queue(self._usable, avoid=state.queue.broker_name)
        if queue.broker_name == state.queue.broker_name or not self._usable(queue.broker_name):
            return False
        entry.first_sequence = 0
        entry.sent = False
        target = self._state(queue)
        target.sender.submit(entry, target)
        return True

    def broker_failed(self, broker_name: str, error: KiteMQError) -> None:
        self._faults.failed(broker_name, self._loop.time() * 1000)
        if isinstance(error, (BrokerUnavailableError, RequestTimeoutError)):
            self._routes.unreachable(broker_name)
        if error.refresh_route:
            self._spawn(self._publishers.refresh(broker_name), f"routes after {type(error).__name__}")

    def _release(self, size: int) -> None:
        self._buffered_bytes -= size
        waiting = self._waiting
        while waiting and (
            self._buffered_bytes + waiting[0].body_bytes <= self._buffer_bytes_max or not self._buffered_bytes
        ):
            entry = waiting.popleft()
            if entry.future is None or not entry.future.done():  # else its caller has gone
                self._admit(entry)
        if not self._buffered_bytes and not waiting:
            self._idle.set()

    # ---- small things ----

    def _spawn(self, coroutine: Any, name: str) -> None:
        task: asyncio.Task[Any] = asyncio.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or task.exception() is None:
            return
        # A sender that dies must not leave sends waiting for their deadline.
        logger.error("producer: %s died", task.get_name(), exc_info=task.exception())
        for entry in self._outstanding():
            if entry.future is not None and not entry.future.done():
                entry.future.set_exception(
                    ClientClosedError(f"the producer's task {task.get_name()!r} died: see the log")
                )
        self._open = False

    def _after_send(self, messages: Sequence[Message], done: asyncio.Future[list[SendReceipt]]) -> None:
        error = asyncio.CancelledError() if done.cancelled() else done.exception()
        receipts: Sequence[SendReceipt | None] = [None] * len(messages) if error else done.result()
        for message, receipt in zip(messages, receipts, strict=True):
            for hook in self._hooks:
                try:
                    hook.after_send(message, receipt, error)
                except Exception:
                    logger.exception("producer: after_send hook failed")


def _offsets(runs: Iterable[broker_pb2.OffsetRun]) -> Iterable[tuple[int, bool]]:
    for run in runs:
        for index in range(run.count):
            yield (-1 if run.unknown else run.first_queue_offset + index), run.repeated


def _check_queue(queue: MessageQueue) -> None:
    if not 0 <= queue.queue_id < QUEUE_COUNT_MAX:
        raise InvalidRequestError(f"queue id {queue.queue_id} is not 0..{QUEUE_COUNT_MAX - 1}", topic=queue.topic)


def _slices(messages: Sequence[Message]) -> Iterable[list[Message]]:
    """Runs that fit one request."""
    part: list[Message] = []
    size = 0
    for message in messages:
        message_bytes = _bytes_at_most(message)
        if part and (size + message_bytes > REQUEST_BYTES_MAX or len(part) >= BATCH_MESSAGES_MAX):
            yield part
            part, size = [], 0
        part.append(message)
        size += message_bytes
    yield part


def _bytes_at_most(message: Message) -> int:
    """Body, tag, keys and properties of a message; UTF-8 is at most 4 bytes a character."""
    size = len(message.body)
    if message.tag or message.keys or message.properties:
        chars = len(message.tag) + sum(map(len, message.keys))
        chars += sum([len(name) + len(value) for name, value in message.properties.items()])
        size += 4 * chars
    return size
