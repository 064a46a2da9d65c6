"""Both directions of a stream: a task that reads, beside the handler that writes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import grpc.aio

from kitemq.errors import BrokerBusyError

STOPPING = "the broker is stopping: try another one, or this one later"
# The clients of one process share a connection.
STREAMS_PER_CONNECTION_MAX = 1_024


class RawContext(Protocol):
    """What a handler without (de)serializers uses of its gRPC context."""

    async def read(self) -> Any:
        """The next request's bytes, or grpc.aio.EOF."""

    async def write(self, message: bytes) -> None:
        """Raises grpc.aio.BaseError when the client has gone."""

    def peer(self) -> str:
        """One text per connection."""


class StreamLimits:
    """How many streams of one method are open, in all and per connection."""

    def __init__(self, method: str, *, streams_max: int, per_connection_max: int = STREAMS_PER_CONNECTION_MAX) -> None:
        self._method = method
        self._streams_max = streams_max
        self._per_connection_max = per_connection_max
        self._count = 0
        self._by_peer: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def open(self, peer: str) -> Iterator[None]:
        """Count one stream while it is open. Raises BrokerBusyError over the limits."""
        if self._count >= self._streams_max:
            raise BrokerBusyError(
                f"the broker has {self._count} {self._method} streams already: try another broker", retry_after_ms=5000
            )
        by_peer = self._by_peer.get(peer, 0)
        if by_peer >= self._per_connection_max:
            raise BrokerBusyError(
                f"this connection has {by_peer} {self._method} streams already: share one", retry_after_ms=5000
            )
        self._count += 1
        self._by_peer[peer] = by_peer + 1
        try:
            yield
        finally:
            self._count -= 1
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]


class DuplexStream:
    """A stream that is read by a task of its own and written by its handler.

    A subclass reads in `_read`, and writes in `_write`, which returns once `_finishing` is set and all is answered.
    """

    def __init__(self, context: RawContext) -> None:
        self._context = context
        self._finishing = False
        self._stopping = False
        self._waiting_for_request = False
        self._wake = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._error: Exception | None = None

    async def run(self) -> None:
        """Serve the stream until it ends. Raises what reading raised, after the replies that were due."""
        self._reader = asyncio.create_task(self._read_all())
        try:
            await self._write()
            if self._error is not None:
                raise self._error
        finally:
            self._reader.cancel()
            await asyncio.wait({self._reader})

    def stop(self) -> None:
        """The broker is stopping: read no more, answer what was read, end."""
        self._stopping = True
        if self._reader is not None and self._waiting_for_request:
            self._reader.cancel()

    async def _read_all(self) -> None:
        try:
            while not self._stopping:
                self._waiting_for_request = True
                raw = await self._context.read()
                self._waiting_for_request = False
                if raw is grpc.aio.EOF:
                    break
                await self._read(raw)
        except grpc.aio.BaseError:
            pass  # the client has gone: gRPC cancels the handler
        except Exception as error:
            self._error = error
        finally:
            self._finishing = True
            self._wake.set()

    async def _read(self, raw: bytes) -> None:
        raise NotImplementedError

    async def _write(self) -> None:
        raise NotImplementedError
