"""The same names without `await`, for programs without an event loop.

with kitemq.sync.Producer("127.0.0.1:9876", group="shop") as producer:
    receipt = producer.send(kitemq.Message("orders", b"..."))

Every object may be used from several threads at once. Arguments, results and errors are those of the async classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import partial
from time import monotonic
from typing import Any, Self, TypeVar

from kitemq import consumer as consumer_module
from kitemq import producer as producer_module
from kitemq._portal import Portal, acquire_portal, release_portal
from kitemq.consumer import Handler, Position
from kitemq.consumer.filter import ALL
from kitemq.errors import ClientClosedError
from kitemq.message import Message, MessageQueue, ReceivedMessage, SendReceipt
from kitemq.producer.selector import QueueSelector

T = TypeVar("T")

__all__ = ["Producer", "PullConsumer", "PushConsumer"]

# The iterator takes messages from the loop in batches, sized so that one is handled within a moment: a batch counts as
# done as a whole.
BATCH_MESSAGES_MAX = 512
BATCH_QUICK_S = 0.01
BATCH_SLOW_S = 0.05
BATCH_WAIT_S = 60.0


class _SyncClient:
    """Opens its async twin on the shared loop, and closes it there."""

    def __init__(self, twin: Any) -> None:
        self._twin = twin
        self._portal: Portal | None = None

    def __enter__(self) -> Self:
        if self._portal is None:
            self._portal = acquire_portal()
            try:
                self._portal.run(self._twin.__aenter__)
            except BaseException:
                self._portal = None
                release_portal()
                raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        if self._portal is not None:
            try:
                self._portal.run(lambda: self._twin.__aexit__(exc_type, exc, traceback))
            finally:
                self._portal = None
                release_portal()

    def _run(self, coroutine: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._opened().run(coroutine)

    def _call(self, start: Callable[[], asyncio.Future[T]]) -> T:
        return self._opened().call(start)

    def _do(self, call: Callable[[], T]) -> T:
        async def on_loop() -> T:
            return call()

        return self._run(on_loop)

    def _opened(self) -> Portal:
        if self._portal is None:
            raise ClientClosedError(f"the {type(self).__name__} is not open: use it inside 'with'")
        return self._portal


class Producer(_SyncClient):
    """`kitemq.Producer` without await. Takes the same arguments."""

    def __init__(self, namesrv: str | Sequence[str], *, group: str, **options: Any) -> None:
        self._producer = producer_module.Producer(namesrv, group=group, **options)
        super().__init__(self._producer)

    @property
    def group(self) -> str:
        return self._producer.group

    @property
    def client_id(self) -> str:
        return self._producer.client_id

    def send(
        self,
        message: Message,
        *,
        sharding_key: str = "",
        queue: MessageQueue | None = None,
        selector: QueueSelector | None = None,
        timeout_s: float | None = None,
    ) -> SendReceipt:
        """See `kitemq.Producer.send`."""
        # Without a task: the producer's own future is what the caller waits for.
        start = self._producer.start_send
        return self._call(lambda: start([message], sharding_key, queue, selector, timeout_s))[0]

    def send_batch(
        self,
        messages: Sequence[Message],
        *,
        sharding_key: str = "",
        queue: MessageQueue | None = None,
        selector: QueueSelector | None = None,
        timeout_s: float | None = None,
    ) -> list[SendReceipt]:
        """See `kitemq.Producer.send_batch`."""
        return self._run(
            lambda: self._producer.send_batch(
                messages, sharding_key=sharding_key, queue=queue, selector=selector, timeout_s=timeout_s
            )
        )

    def send_oneway(self, message: Message, *, sharding_key: str = "", queue: MessageQueue | None = None) -> None:
        """See `kitemq.Producer.send_oneway`."""

        async def send() -> None:
            self._producer.send_oneway(message, sharding_key=sharding_key, queue=queue)

        self._run(send)

    def flush(self) -> None:
        """See `kitemq.Producer.flush`."""
        self._run(self._producer.flush)

    def close(self, *, timeout_s: float = producer_module.CLOSE_TIMEOUT_S) -> None:
        """See `kitemq.Producer.close`."""
        if self._portal is not None:
            self._run(lambda: self._producer.close(timeout_s=timeout_s))
            self.__exit__(None, None, None)


class PullConsumer(_SyncClient):
    """`kitemq.PullConsumer` without await. Takes the same arguments. For one thread at a time."""

    def __init__(self, namesrv: str | Sequence[str], *, group: str, **options: Any) -> None:
        self._consumer = consumer_module.PullConsumer(namesrv, group=group, **options)
        # Of the iterator: what the program is at, and what is still to come of the batch, last first.
        self._current: ReceivedMessage | None = None
        self._untouched: list[ReceivedMessage] = []
        super().__init__(self._consumer)

    @property
    def group(self) -> str:
        return self._consumer.group

    @property
    def client_id(self) -> str:
        return self._consumer.client_id

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        self._give_back()
        super().__exit__(exc_type, exc, traceback)

    def subscribe(self, topic: str, *, filter: str = ALL) -> None:  # noqa: A002
        """See `kitemq.PullConsumer.subscribe`."""
        self._run(lambda: self._consumer.subscribe(topic, filter=filter))

    def unsubscribe(self, topic: str) -> None:
        """See `kitemq.PullConsumer.unsubscribe`."""
        self._give_back()
        self._run(lambda: self._consumer.unsubscribe(topic))

    def assign(self, queues: Iterable[MessageQueue], *, filter: str = ALL) -> None:  # noqa: A002
        """See `kitemq.PullConsumer.assign`."""
        self._give_back()
        self._run(lambda: self._consumer.assign(queues, filter=filter))

    def queues(self, topic: str) -> list[MessageQueue]:
        """See `kitemq.PullConsumer.queues`."""
        return self._run(lambda: self._consumer.queues(topic))

    def held_queues(self) -> list[MessageQueue]:
        """See `kitemq.PullConsumer.held_queues`."""
        return self._do(self._consumer.held_queues)

    def pause(self, *queues: MessageQueue) -> None:
        """See `kitemq.PullConsumer.pause`."""
        self._give_back()
        self._do(lambda: self._consumer.pause(*queues))

    def resume(self, *queues: MessageQueue) -> None:
        """See `kitemq.PullConsumer.resume`."""
        self._do(lambda: self._consumer.resume(*queues))

    def seek(self, queue: MessageQueue, to: int | Position | datetime) -> None:
        """See `kitemq.PullConsumer.seek`."""
        self._give_back()
        self._run(lambda: self._consumer.seek(queue, to))

    def position(self, queue: MessageQueue) -> int:
        """See `kitemq.PullConsumer.position`."""
        self._give_back()
        return self._do(lambda: self._consumer.position(queue))

    def commit(self, offsets: Mapping[MessageQueue, int] | None = None) -> None:
        """See `kitemq.PullConsumer.commit`."""
        if offsets is None:
            self._run(lambda: self._consumer.commit_all_but(self._untouched[::-1]))
        else:
            self._run(lambda: self._consumer.commit(offsets))

    def committed(self, queue: MessageQueue) -> int | None:
        """See `kitemq.PullConsumer.committed`."""
        return self._run(lambda: self._consumer.committed(queue))

    def poll(self, max_count: int = 100, timeout_s: float = 5.0) -> list[ReceivedMessage]:
        """See `kitemq.PullConsumer.poll`."""
        self._give_back()
        self._current = None
        return self._run(lambda: self._consumer.poll(max_count, timeout_s))

    def __iter__(self) -> Iterator[ReceivedMessage]:
        """Every message, for ever; ends when the consumer is closed."""
        count = 1
        while self._portal is not None:
            if not self._untouched:
                self._current = None
                try:
                    self._untouched = self._run(partial(self._consumer.poll, count, BATCH_WAIT_S))[::-1]
                except ClientClosedError:
                    return
            started = monotonic()
            while self._untouched:
                self._current = self._untouched.pop()
                yield self._current
            took_s = monotonic() - started
            if took_s < BATCH_QUICK_S:
                count = min(2 * count, BATCH_MESSAGES_MAX)
            elif took_s > BATCH_SLOW_S:
                count = max(count // 2, 1)

    def _give_back(self) -> None:
        """What the program has not seen goes back to the queues; without a batch there is nothing to do."""
        if self._portal is not None and self._current is not None:
            untouched, self._untouched = self._untouched[::-1], []
            self._do(lambda: self._consumer.give_back(untouched, self._current))

    def close(self) -> None:
        """See `kitemq.PullConsumer.close`."""
        self._give_back()
        if self._portal is not None:
            self._run(self._consumer.close)
            super().__exit__(None, None, None)


class PushConsumer(_SyncClient):
    """`kitemq.PushConsumer` without await. Takes the same arguments.

    Plain handlers run in threads, as many at once as `concurrency`; async ones on the shared event loop.
    """

    def __init__(self, namesrv: str | Sequence[str], *, group: str, **options: Any) -> None:
        self._consumer = consumer_module.PushConsumer(namesrv, group=group, **options)
        super().__init__(self._consumer)

    @property
    def group(self) -> str:
        return self._consumer.group

    @property
    def client_id(self) -> str:
        return self._consumer.client_id

    def subscribe(self, topic: str, handler: Handler, *, filter: str = ALL) -> None:  # noqa: A002
        """See `kitemq.PushConsumer.subscribe`."""
        self._run(lambda: self._consumer.subscribe(topic, handler, filter=filter))

    def unsubscribe(self, topic: str) -> None:
        """See `kitemq.PushConsumer.unsubscribe`."""
        self._run(lambda: self._consumer.unsubscribe(topic))

    def held_queues(self) -> list[MessageQueue]:
        """See `kitemq.PushConsumer.held_queues`."""
        return self._do(self._consumer.held_queues)

    def run(self) -> None:
        """See `kitemq.PushConsumer.run`. Another thread, a handler or a signal handler may call `stop`."""
        self._run(self._consumer.run)

    def stop(self) -> None:
        """See `kitemq.PushConsumer.stop`."""
        self._opened().loop.call_soon_threadsafe(self._consumer.stop)

    def close(self) -> None:
        """See `kitemq.PushConsumer.close`."""
        if self._portal is not None:
            self._run(self._consumer.close)
            self.__exit__(None, None, None)
