"""Running the real command against a cluster in the test's process."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from tests.cluster import Cluster

TIMEOUT_S = 60.0
COMMAND = (sys.executable, "-c", "from kitemq.cli.main import main; main()")


@dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Of JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


class Running:
    """A command that runs on. `out` grows."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.out = b""
        self.err = b""
        self._changed = asyncio.Event()
        self._readers = [
            asyncio.create_task(self._read(process.stdout, "out")),
            asyncio.create_task(self._read(process.stderr, "err")),
        ]

    async def _read(self, stream: asyncio.StreamReader | None, name: str) -> None:
        assert stream is not None
        while chunk := await stream.read(65_536):
            setattr(self, name, getattr(self, name) + chunk)
            self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until what was printed fulfils the condition."""
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def write(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        await self.process.stdin.drain()

    async def end(self) -> Result:
        async with asyncio.timeout(TIMEOUT_S):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
        return Result(code, self.out.decode(), self.err.decode())

    async def interrupt(self) -> Result:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return await self.end()

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.end()


Start = Callable[..., Awaitable[Running]]
Run = Callable[..., Awaitable[Result]]


@pytest_asyncio.fixture
async def start(cluster: Cluster) -> AsyncIterator[Start]:
    """Start `kitemq WORDS` against the cluster: `running = await start("tail", "orders", "-f")`."""
    started: list[Running] = []

    async def start(*words: str, **environment: str) -> Running:
        process = await asyncio.create_subprocess_exec(
            *COMMAND,
            *words,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=os.environ | {"KITEMQ_NAMESRV": cluster.namesrv_address} | environment,
        )
        running = Running(process)
        started.append(running)
        return running

    yield start
    for running in started:
        await running.kill()


@pytest.fixture
def run(start: Start) -> Run:
    """Run `kitemq WORDS` to its end: `result = await run("topic", "list", stdin="")`."""

    async def run(*words: str, stdin: str | bytes = b"", **environment: str) -> Result:
        running = await start(*words, **environment)
        assert running.process.stdin is not None
        running.process.stdin.write(stdin.encode() if isinstance(stdin, str) else stdin)
        running.process.stdin.close()
        return await running.end()

    return run
