"""A TCP proxy between a client and a server that loses, delays and cuts what passes: the network seam of the tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class FlakyProxy:
    """`address` leads to the target. Faults are switched by attributes while traffic flows.

    drop_replies: what the target says is swallowed (its connection lives on). delay_s: added to each piece, both ways.
    """

    def __init__(self, target: str = "") -> None:
        self.target = target
        self.address = ""
        self.drop_replies = False
        self.delay_s = 0.0
        self.dropped_bytes = 0
        self.connection_count = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen on a free port; on the same one after a stop."""
        port = int(self.address.rpartition(":")[2]) if self.address else 0
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Refuse new connections and cut the old ones."""
        if self._server is not None:
            self._server.close()
            self.cut()
            await self._server.wait_closed()
            self._server = None

    def cut(self) -> None:
        """Break every connection, as a crash of the other machine's kernel would."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_count += 1
        host, _, port = self.target.rpartition(":")
        try:
            target_reader, target_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        self._writers |= {writer, target_writer}
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(reader, target_writer, replies=False))
                tasks.create_task(self._pump(target_reader, writer, replies=True))
        finally:
            for each in (writer, target_writer):
                self._writers.discard(each)
                each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while data := await reader.read(65536):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if replies and self.drop_replies:
                    self.dropped_bytes += len(data)
                    continue
                writer.write(data)
                await writer.drain()
        writer.transport.abort()


@asynccontextmanager
async def flaky_proxy(target: str) -> AsyncIterator[FlakyProxy]:
    """A running proxy to `target` ("host:port")."""
    proxy = FlakyProxy(target)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
