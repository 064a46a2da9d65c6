"""Five thousand connections that come and go without a goodbye: the broker is what it was before."""

from __future__ import annotations

import asyncio
import random
import signal
import socket
import struct
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.broker.wire import Client, batch, numbered
from tests.faults.processes import ServiceProcess, free_port
from tests.faults.visitors import BIG_TOPIC, TOPIC
from tests.waiting import eventually

RAW_CONNECTIONS = 3000
VISITORS = 2000
VISITORS_AT_ONCE = 250
GROWTH_BYTES_MAX = 12 * 1024 * 1024
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


class Broker:
    """A broker as a process, and what it uses."""

    def __init__(self, folder: Path) -> None:
        self._metrics_port = free_port()
        self.process = ServiceProcess(
            "broker", folder / "broker", "--namesrv", "", "--metrics-listen", f"127.0.0.1:{self._metrics_port}"
        )

    @property
    def address(self) -> str:
        return self.process.address

    def memory_bytes(self) -> int:
        """Its own memory, without pages of files."""
        status = self._proc("status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024

    def file_count(self) -> int:
        """Open files, sockets among them."""
        return len(list(self._proc("fd").iterdir()))

    def thread_count(self) -> int:
        """Threads."""
        return len(list(self._proc("task").iterdir()))

    def _proc(self, name: str) -> Path:
        assert self.process.process is not None
        return Path(f"/proc/{self.process.process.pid}/{name}")

    async def metrics(self) -> dict[str, float]:
        """Sums over all labels, by name."""

        def scrape() -> str:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._metrics_port}/metrics", timeout=20) as response:
                return str(response.read().decode())

        sums: dict[str, float] = {}
        for line in (await asyncio.to_thread(scrape)).splitlines():
            if not line.startswith("#"):
                name = line.split("{")[0].split(" ")[0]
                sums[name] = sums.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return sums

    async def holds_nothing(self) -> bool:
        """No client, stream, pull or waiting byte is left."""
        metrics = await self.metrics()
        names = (
            "kitemq_client_number",
            "kitemq_subscription_number",
            "kitemq_send_waiting_bytes",
            "kitemq_rpc_streams",
        )
        return not any(metrics.get(name) for name in names)


@asynccontextmanager
async def visited(
    address: str, count: int, first_number: int, *words: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Clients in a process of their own, all connected; they are killed at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults.visitors", address, str(count), str(first_number), *words),
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert (await process.stdout.readline()).decode() == "ready\n"
        yield process
    finally:
        process.kill()
        await process.wait()


def knock(address: str, rng: random.Random) -> None:
    """One connection that is dropped somewhere: at once, within the greeting, within a frame; with FIN or RST."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        words = PREFACE + SETTINGS + bytes((0, 0, 200, 1, 4, 0, 0, 0, 1)) + rng.randbytes(50)
        connection.sendall(words[: rng.randrange(len(words))])
        if rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def fill(address: str) -> None:
    """Topics for the visitors; the big one holds more than anybody should get who does not read."""
    client = Client(address)
    send = client.send_stream()
    await send.send(batch(numbered(TOPIC, 1, 1), queue_id=0, default_topic_queue_count=4))
    big = numbered(BIG_TOPIC, 1, 32)
    for message in big:
        message.body = bytes(256 * 1024)
        await send.send(batch([message], queue_id=0, default_topic_queue_count=4))
    await client.close()


@pytest.mark.processes
@pytest.mark.slow
async def test_five_thousand_connections_leave_nothing(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    broker = Broker(tmp_path)
    await broker.process.start()
    try:
        await fill(broker.address)
        # The first clients make what is kept for all that follow: pools, caches, groups.
        async with visited(broker.address, VISITORS_AT_ONCE, 0):
            assert (await broker.metrics())["kitemq_client_number"] == VISITORS_AT_ONCE
        await eventually(broker.holds_nothing, timeout_s=60)
        memory_bytes, files, threads = broker.memory_bytes(), broker.file_count(), broker.thread_count()
        for number in range(RAW_CONNECTIONS):
            knock(broker.address, rng)
            if number % 100 == 0:
                await asyncio.sleep(0)
        for first_number in range(VISITORS_AT_ONCE, VISITORS, VISITORS_AT_ONCE):
            async with visited(broker.address, VISITORS_AT_ONCE, first_number):
                pass
        await eventually(broker.holds_nothing, timeout_s=60)
        await eventually(lambda: broker.file_count() <= files)
        # gRPC's pool grows and shrinks by a few; a leak would be thousands.
        assert broker.thread_count() <= threads + 8
        grown = broker.memory_bytes() - memory_bytes
        assert grown < GROWTH_BYTES_MAX, f"{grown} bytes more than before"
        print(f"memory {memory_bytes} + {grown}, files {files}, threads {threads}")
    finally:
        assert await broker.process.stop() == 0


@pytest.mark.processes
async def test_clients_that_freeze_cost_little_and_stop_nobody(tmp_path: Path) -> None:
    """They neither read nor close; what they asked for stays in the log, and others are served as ever."""
    broker = Broker(tmp_path)
    await broker.process.start()
    try:
        await fill(broker.address)
        memory_bytes = broker.memory_bytes()
        async with visited(broker.address, 100, 0, "greedy") as frozen:
            frozen.send_signal(signal.SIGSTOP)
            client = Client(broker.address)
            send = client.send_stream()
            pull = client.pull_stream()
            await pull.open(TOPIC, 3)
            for number in range(200):
                await send.send(batch(numbered(TOPIC, number + 1, 1, instance=10**6), queue_id=3))
                assert len((await pull.read()).messages) == 1
            # 100 clients asked for 8 MiB each.
            assert broker.memory_bytes() - memory_bytes < 200 * 1024 * 1024
            await client.close()
        await eventually(broker.holds_nothing, timeout_s=60)
    finally:
        assert await broker.process.stop() == 0
