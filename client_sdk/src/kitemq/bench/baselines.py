"""What bare gRPC and a bare disk do on this machine: the yardsticks.

`U`: a unary echo of 1 KiB. `S`: a stream of 64 KiB messages, each answered by a few bytes, as a send is. Both over
identity serializers and the product's channel options, so nothing slows them that does not slow the product too. `F`:
a 1 KiB append and fdatasync, in a file whose blocks are allocated, as the commit log's are.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import grpc.aio

from kitemq.bench.histogram import Histogram
from kitemq.rpc import CHANNEL_OPTIONS

ECHO = "/kitemq.bench.Baseline/Echo"
STREAM = "/kitemq.bench.Baseline/Stream"
UNARY_BYTES = 1024
STREAM_BYTES = 64 * 1024
STREAM_IN_FLIGHT = 4
ANSWER = bytes(16)
APPEND_BYTES = 1024
_APPEND_FILE_BYTES = 64 * 1024 * 1024


async def _echo(request: bytes, _: object) -> bytes:
    return request


async def _answer_each(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    async for _ in requests:
        await context.write(ANSWER)


class EchoServer:
    """The server side of U and S."""

    def __init__(self, port: int) -> None:
        self.info = {"port": port}

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        raise ValueError(f"the echo server only serves: {order}")


@asynccontextmanager
async def echo_server() -> AsyncIterator[EchoServer]:
    """Serves both baselines on a port of its own choice."""
    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        "Echo": grpc.unary_unary_rpc_method_handler(_echo),
        "Stream": grpc.stream_stream_rpc_method_handler(_answer_each),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("kitemq.bench.Baseline", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield EchoServer(port)
    finally:
        await server.stop(None)


class EchoClient:
    """The client side.

    Orders: {"measure": "unary", "in_flight": n, "seconds": s}, {"measure": "stream", "seconds": s}.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.info: dict[str, Any] = {}
        self._channel = channel

    async def run(self, order: dict[str, Any]) -> dict[str, Any]:
        if order["measure"] == "stream":
            return {"bytes_per_s": await self._stream(order["seconds"])}
        return await self._unary(order["in_flight"], order["seconds"])

    async def _unary(self, in_flight: int, seconds: float) -> dict[str, Any]:
        echo: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(ECHO)
        body = os.urandom(UNARY_BYTES)
        histogram = Histogram()
        clock = time.perf_counter_ns
        started = clock()
        deadline = started + int(seconds * 1e9)

        async def caller() -> None:
            before = clock()
            while before < deadline:
                await echo(body)
                after = clock()
                histogram.record(after - before)
                before = after

        await asyncio.gather(*(caller() for _ in range(in_flight)))
        elapsed_s = (clock() - started) / 1e9
        return {"per_s": histogram.count / elapsed_s, "p50_ms": histogram.percentile_ns(50) / 1e6}

    async def _stream(self, seconds: float) -> float:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = self._channel.stream_stream(STREAM)()
        body = os.urandom(STREAM_BYTES)
        free = asyncio.Semaphore(STREAM_IN_FLIGHT)

        async def read_answers() -> None:
            while await call.read() is not grpc.aio.EOF:
                free.release()

        reader = asyncio.create_task(read_answers())
        started = time.perf_counter()
        deadline = started + seconds
        sent = 0
        while time.perf_counter() < deadline:
            await free.acquire()
            await call.write(body)
            sent += 1
        await call.done_writing()
        await reader
        return sent * STREAM_BYTES / (time.perf_counter() - started)


@asynccontextmanager
async def echo_client(*, port: int) -> AsyncIterator[EchoClient]:
    """A client of the echo server at `port`, connected."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        await channel.channel_ready()
        yield EchoClient(channel)


class Fdatasync(NamedTuple):
    """One fdatasync after a 1 KiB append."""

    p50_ms: float
    per_s: float


def fdatasync(folder: Path, *, seconds: float) -> Fdatasync:
    """Appends and syncs for `seconds` in a file in `folder`, which is removed afterwards."""
    body = os.urandom(APPEND_BYTES)
    histogram = Histogram()
    clock = time.perf_counter_ns
    with tempfile.TemporaryFile(dir=folder) as file:
        fd = file.fileno()
        os.posix_fallocate(fd, 0, _APPEND_FILE_BYTES)
        os.fsync(fd)
        offset = 0
        started = before = clock()
        deadline = started + int(seconds * 1e9)
        while before < deadline:
            os.pwrite(fd, body, offset % _APPEND_FILE_BYTES)
            os.fdatasync(fd)
            offset += APPEND_BYTES
            after = clock()
            histogram.record(after - before)
            before = after
    return Fdatasync(histogram.percentile_ns(50) / 1e6, histogram.count / ((before - started) / 1e9))
