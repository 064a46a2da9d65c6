"""Routes on the wire: each encoded once per (topic, listener), however many clients ask for it or watch it.

A watcher holds the set of its topics that have changed since it last wrote: a slow one skips to the newest route of
each, and never holds more than its topics.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from kitemq.errors import BrokerBusyError, BrokerUnavailableError

WATCHERS_MAX = 50_000
BUSY_RETRY_MS = 5_000


class _Watcher:
    __slots__ = ("changed", "waiting")

    def __init__(self, topics: Iterable[str]) -> None:
        self.changed = dict.fromkeys(topics)
        self.waiting: asyncio.Future[None] | None = None

    def wake(self) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(None)


class RouteFeed:
    """Encoded routes and those who watch them. Belongs to the loop.

    encode: the serialized TopicRoute of (topic, listener); one without queues for a topic that no broker has.
    held: nothing is written to watchers before `release`.
    """

    def __init__(self, encode: Callable[[str, str], bytes], *, held: bool = False) -> None:
        self._encode = encode
        self._encoded: dict[str, dict[str, bytes]] = {}
        self._watchers: dict[str, set[_Watcher]] = {}
        self._watcher_count = 0
        self._held = held
        self._stopping = False

    @property
    def watcher_count(self) -> int:
        """Watch streams that are open."""
        return self._watcher_count

    def route(self, topic: str, listener: str) -> bytes:
        """The serialized TopicRoute of a topic that some broker has, or that is watched: others would stay for ever."""
        routes = self._encoded.setdefault(topic, {})
        data = routes.get(listener)
        if data is None:
            data = routes[listener] = self._encode(topic, listener)
        return data

    def changed(self, topics: Iterable[str]) -> None:
        """The routes of `topics` have changed: forget what was encoded, and wake who watches them."""
        woken: set[_Watcher] = set()
        for topic in topics:
            self._encoded.pop(topic, None)
            for watcher in self._watchers.get(topic, ()):
                watcher.changed[topic] = None
                woken.add(watcher)
        for watcher in woken:
            watcher.wake()

    async def watch(
        self, topics: Sequence[str], listener: Callable[[], str], write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Write the route of each topic, then every change, until `stop`.

        listener: asked at each write, because the one asked for may come and go. Raises BrokerUnavailableError when the
        namesrv stops, BrokerBusyError when too many watch.
        """
        if self._watcher_count >= WATCHERS_MAX:
            raise BrokerBusyError(f"{WATCHERS_MAX} clients watch routes here already", retry_after_ms=BUSY_RETRY_MS)
        watcher = _Watcher(topics)
        for topic in watcher.changed:
            self._watchers.setdefault(topic, set()).add(watcher)
        self._watcher_count += 1
        loop = asyncio.get_running_loop()
        try:
            while not self._stopping:
                while watcher.changed and not self._held:
                    topic = next(iter(watcher.changed))
                    del watcher.changed[topic]
                    await write(self.route(topic, listener()))
                if self._stopping:
                    break
                watcher.waiting = loop.create_future()
                await watcher.waiting
            raise BrokerUnavailableError("the namesrv is stopping")
        finally:
            self._watcher_count -= 1
            self._leave(watcher, topics)

    def release(self) -> None:
        """Begin to write, if nothing was written yet."""
        if self._held:
            self._held = False
            self._wake_all()

    def stop(self) -> None:
        """End every watch."""
        self._stopping = True
        self._wake_all()

    def _wake_all(self) -> None:
        for watcher in {watcher for watchers in self._watchers.values() for watcher in watchers}:
            watcher.wake()

    def _leave(self, watcher: _Watcher, topics: Sequence[str]) -> None:
        for topic in set(topics):
            watchers = self._watchers[topic]
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[topic]
                self._encoded.pop(topic, None)
