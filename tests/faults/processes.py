"""Services as processes of their own, at addresses that outlive them, for tests that kill them."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

START_TIMEOUT_S = 60.0


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServiceProcess:
    """`kitemq-server VERB …` with its output in a log file. Start, SIGKILL and start again at the same address."""

    def __init__(
        self, verb: str, folder: Path, *arguments: str, module: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.log_path = folder.parent / f"{folder.name}.log"
        command = ("-m", module) if module else ("-c", "from kitemq_server.cli import main; main()")
        self._arguments = (
            *(sys.executable, *command, verb),
            *("--listen", self.address, "--metrics-listen", "", "--data-dir", str(folder), *arguments),
        )
        self._environment = {**os.environ, **(environment or {})}
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it and wait until it accepts connections."""
        with self.log_path.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *self._arguments, stdout=log, stderr=log, env=self._environment
            )
        host, _, port = self.address.rpartition(":")
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, int(port))
                except OSError:
                    assert self.process.returncode is None, self.log_path.read_text()[-3000:]
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    return

    async def kill(self) -> None:
        """SIGKILL: as a crash of the process."""
        assert self.process is not None and self.process.returncode is None, self.log_path.read_text()[-3000:]
        self.process.kill()
        await self.process.wait()

    async def exited(self) -> int:
        """Waits for the process to end by itself; its exit code."""
        assert self.process is not None
        return await self.process.wait()

    async def stop(self) -> int:
        """SIGTERM. Returns the exit code."""
        if self.process is None or self.process.returncode is not None:
            return 0 if self.process is None else int(self.process.returncode or 0)
        self.process.send_signal(signal.SIGTERM)
        return await self.process.wait()
