"""Notify streams: what the broker tells its clients unasked.

Events are kept as sets, so a stream that is slow to read holds each thing at most once, however often it happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable

from kitemq.errors import BrokerBusyError
from kitemq.proto.v1.broker_pb2 import Notification


class NotifyStream:
    """What waits to be told to one client."""

    __slots__ = ("_closed", "_groups_changed", "_offsets_reset", "_stopping", "_wake")

    def __init__(self) -> None:
        self._groups_changed: dict[str, None] = {}
        self._offsets_reset: dict[str, None] = {}
        self._stopping = False
        self._closed = False
        self._wake = asyncio.Event()

    def group_changed(self, group: str) -> None:
        self._groups_changed[group] = None
        self._wake.set()

    def offsets_reset(self, group: str) -> None:
        self._offsets_reset[group] = None
        self._wake.set()

    def stop(self) -> None:
        """Tell the client that the broker is about to stop, then end the stream."""
        self._stopping = True
        self._wake.set()

    def close(self) -> None:
        """End the stream: the client has opened a newer one."""
        self._closed = True
        self._wake.set()

    async def events(self) -> AsyncIterator[Notification]:
        """Every event once, `ready` first; ends after `stop` or `close`."""
        yield Notification(ready=True)
        while not self._closed:
            await self._wake.wait()
            self._wake.clear()
            while self._offsets_reset:
                yield Notification(offsets_reset=self._offsets_reset.popitem()[0])
            while self._groups_changed:
                yield Notification(group_changed=self._groups_changed.popitem()[0])
            if self._stopping:
                yield Notification(stopping=True)
                return


class NotifyHub:
    """The Notify streams of a broker, one per client. Owned by the event loop."""

    def __init__(self, *, streams_max: int) -> None:
        self._streams_max = streams_max
        self._streams: dict[str, NotifyStream] = {}
        self._stopping = False

    def __len__(self) -> int:
        return len(self._streams)

    def open(self, client_id: str) -> NotifyStream:
        """The client's stream; an older one of the same client ends. Raises BrokerBusyError when there are too many."""
        older = self._streams.get(client_id)
        if older is not None:
            older.close()
        elif len(self._streams) >= self._streams_max:
            raise BrokerBusyError(
                f"the broker has {self._streams_max} Notify streams already: try another broker", retry_after_ms=5000
            )
        stream = self._streams[client_id] = NotifyStream()
        if self._stopping:
            stream.stop()
        return stream

    def close(self, client_id: str, stream: NotifyStream) -> bool:
        """The handler of `stream` has ended. False when the client has a newer one."""
        if self._streams.get(client_id) is not stream:
            return False
        del self._streams[client_id]
        return True

    def group_changed(self, group: str, client_ids: Iterable[str]) -> None:
        for client_id in client_ids:
            if stream := self._streams.get(client_id):
                stream.group_changed(group)

    def offsets_reset(self, group: str, client_ids: Iterable[str]) -> None:
        for client_id in client_ids:
            if stream := self._streams.get(client_id):
                stream.offsets_reset(group)

    def stop(self) -> None:
        self._stopping = True
        for stream in self._streams.values():
            stream.stop()
