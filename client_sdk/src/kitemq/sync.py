"""The same names without `await`, for programs without an event loop.

with kitemq.sync.Producer("127.0.0.1:9876", group="shop") as producer:
    receipt = producer.send(kitemq.Message("orders", b"..."))

Every object may be used from several threads at once. Arguments, results and errors are those of the async classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Self, TypeVar

from kitemq import producer as producer_module
from kitemq._portal import Portal, acquire_portal, release_portal
from kitemq.errors import ClientClosedError
from kitemq.message import Message, MessageQueue, SendReceipt
from kitemq.producer.selector import QueueSelector

T = TypeVar("T")

__all__ = ["Producer"]


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
