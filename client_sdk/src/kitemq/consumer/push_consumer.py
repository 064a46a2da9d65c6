"""The consumer that calls handlers."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from kitemq.consumer.allocate import Allocation, average
from kitemq.consumer.client import ConsumerClient
from kitemq.consumer.dispatcher import AsyncHandler, Dispatcher
from kitemq.consumer.filter import ALL, normalized
from kitemq.consumer.held_queue import Chunk, HeldQueue
from kitemq.consumer.hooks import ConsumeHook
from kitemq.consumer.options import MIB, ConsumerOptions, MessageModel, Position, Start
from kitemq.errors import InvalidRequestError
from kitemq.message import ReceivedMessage
from kitemq.proto.v1 import broker_pb2
from kitemq.protocol.names import check_topic
from kitemq.rpc import TlsConfig

logger = logging.getLogger(__name__)

# RocketMQ's table as far as a message should wait in the memory of one process.
RETRY_BACKOFF_S = (10.0, 30.0, 60.0, 120.0, 180.0, 240.0, 300.0)

Handler = Callable[[ReceivedMessage], Any]


class PushConsumer(ConsumerClient):
    """Calls a handler for every message.

        async with kitemq.PushConsumer("127.0.0.1:9876", group="billing") as consumer:
            await consumer.subscribe("orders", handle, filter="paid || refunded")
            await consumer.run()

    At least once: a handler that returns has done its message, one that raises gets it again after a back-off, and what
    was under way when a process died or a queue moved comes again, here or at another member of the group. Offsets are
    committed every commit_interval_s, when a queue is handed over, and on stop; never past an unfinished message. Left
    without `async with` or `close()`, it keeps its share of the queues until the process ends.

    namesrv: "host:9876", several separated by ";". group: its members share the messages; with BROADCASTING each gets
    all of them, and keeps its offsets in offsets_dir (default ~/.kitemq/offsets) under client_id, or without a
    client_id only while it runs.
    from_where: where a group begins that has committed nothing yet; a datetime (with time zone) means the first message
    stored at or after it. Queues and topics that are made while the consumer runs are read from their first message.
    allocation: how the members share queues, a function of kitemq.consumer.allocate; the same for all members.
    concurrency: handlers at work at once, 1..1000.
    prefetch_messages, prefetch_bytes, span_max: per queue, what is read ahead, and how many queue offsets may lie
    between the oldest unfinished message and the newest. A slow handler stops the reading there.
    retry_backoff_s: how long a failed message waits, by attempt; the last one goes on for ever.
    drain_timeout_s: how long handlers may go on when the consumer stops, before they are cancelled (a plain function
    goes on in its thread), or when a queue moves, before the offset is handed over without what they do.
    handler_warn_s: a handler that runs longer is logged.
    """

    _drains = True

    def __init__(
        self,
        namesrv: str | Sequence[str],
        *,
        group: str,
        message_model: MessageModel = MessageModel.CLUSTERING,
        from_where: Start = Position.LAST,
        allocation: Allocation = average,
        concurrency: int = 20,
        prefetch_messages: int = 1000,
        prefetch_bytes: int = 100 * MIB,
        span_max: int = 2000,
        commit_interval_s: float = 5.0,
        retry_backoff_s: Sequence[float] = RETRY_BACKOFF_S,
        drain_timeout_s: float = 30.0,
        handler_warn_s: float = 60.0,
        hooks: Iterable[ConsumeHook] = (),
        offsets_dir: str | Path | None = None,
        tls: TlsConfig | None = None,
        client_id: str | None = None,
    ) -> None:
        super().__init__(
            ConsumerOptions(
                namesrv=namesrv,
                group=group,
                client_id=client_id,
                consume_type=broker_pb2.CONSUME_PASSIVELY,
                message_model=message_model,
                from_where=from_where,
                allocation=allocation,
                prefetch_messages=prefetch_messages,
                prefetch_bytes=prefetch_bytes,
                span_max=span_max,
                auto_commit=True,
                commit_interval_s=commit_interval_s,
                drain_timeout_s=drain_timeout_s,
                offsets_dir=offsets_dir,
                tls=tls,
            )
        )
        if not 1 <= concurrency <= 1000:
            raise InvalidRequestError(f"concurrency {concurrency} is not within 1..1000")
        if not retry_backoff_s or min(retry_backoff_s) <= 0:
            raise InvalidRequestError("retry_backoff_s must name at least one wait, each above 0 s")
        if handler_warn_s <= 0:
            raise InvalidRequestError(f"handler_warn_s {handler_warn_s} must be above 0")
        self._concurrency = concurrency
        self._hooks = tuple(hooks)
        self._dispatcher = Dispatcher(
            concurrency=concurrency,
            retry_backoff_s=retry_backoff_s,
            handler_warn_s=handler_warn_s,
            refill=lambda held: self._core.fetcher.refill(held),
        )
        self._threads: ThreadPoolExecutor | None = None
        self._running = False
        self._stop_wanted = asyncio.Event()
        self._stopped = asyncio.Event()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def subscribe(self, topic: str, handler: Handler, *, filter: str = ALL) -> None:  # noqa: A002
        """Call `handler` with the topic's messages, once `run()` runs.

        handler: an async function runs on the loop; a plain one in a thread, so it may block. filter: "*", or tags:
        "a || b".
        Raises InvalidRequestError for a name or filter that cannot be, or a topic that is subscribed already.
        """
        core = self._core
        check_topic(topic)
        wanted = normalized(filter)
        if not callable(handler):
            raise InvalidRequestError(f"handler {handler!r} cannot be called", topic=topic)
        if topic in self._dispatcher.handlers:
            raise InvalidRequestError("the topic is subscribed already: unsubscribe first", topic=topic)
        run = handler if _is_async(handler) else self._in_thread(handler)
        self._dispatcher.handlers[topic] = self._with_hooks(run) if self._hooks else run
        await core.subscribe(topic, wanted)

    async def unsubscribe(self, topic: str) -> None:
        """Read the topic no more. Returns once its handlers have come back and its queues are handed over."""
        await super().unsubscribe(topic)
        self._dispatcher.handlers.pop(topic, None)

    async def run(self) -> None:
        """Consume until `stop()` is called or this is cancelled; then drain the handlers, commit, leave the group.

        Raises GroupNotFoundError or PermissionDeniedError when the group does not take this consumer.
        """
        core = self._core
        if self._running:
            raise InvalidRequestError("run() is running already")
        self._running = True
        try:
            self._dispatcher.start(self._tasks)
            core.start()
            await self._stop_wanted.wait()
        finally:
            try:
                await core.stop()
            finally:
                await self._dispatcher.stop()
                self._stopped.set()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Let `run()` finish. Returns at once."""
        self._stop_wanted.set()

    async def close(self) -> None:
        """Stop, wait until `run()` has drained, and close. Nothing happens when it is closed already."""
        if self._open_core is None:
            return
        self.stop()
        try:
            if self._running:
                await self._stopped.wait()
        finally:
            if self._threads is not None:
                self._threads.shutdown(wait=False, cancel_futures=True)
            await self._close_stack()

    # ---- for the core ----

    def deliver(self, chunk: Chunk) -> None:
        """Messages have come."""
        self._dispatcher.deliver(chunk)

    def done_offset(self, held: HeldQueue) -> int:
        """The smallest queue offset whose handler has not returned."""
        return held.done_offset()

    def _wake(self) -> None:
        self.stop()

    # ---- handlers ----

    def _in_thread(self, handler: Handler) -> AsyncHandler:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix=f"kitemq {self.group}")
        threads = self._threads

        async def call(message: ReceivedMessage) -> None:
            run = partial(copy_context().run, handler, message)
            result = await asyncio.get_running_loop().run_in_executor(threads, run)
            if inspect.isawaitable(result):  # a plain function that wraps an async one
                await result

        return call

    def _with_hooks(self, handler: AsyncHandler) -> AsyncHandler:
        hooks = self._hooks

        def tell(method: str, *arguments: object) -> None:
            for hook in hooks:
                try:
                    getattr(hook, method)(*arguments)
                except Exception:
                    logger.exception("consumer: hook failed hook=%s method=%s", type(hook).__name__, method)

        async def call(message: ReceivedMessage) -> None:
            tell("before_consume", message)
            try:
                await handler(message)
            except Exception as error:
                tell("after_consume", message, error)
                raise
            tell("after_consume", message, None)

        return call


def _is_async(handler: Handler) -> bool:
    while isinstance(handler, partial):
        handler = handler.func
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004
