"""The demo's processes: a namesrv, a broker that is killed and started again, programs that report in JSON."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

STOP_S = 10.0
ROOT = Path(__file__).parent.parent.parent


class Process:
    """One process. Its stderr goes to a file; each JSON line of its stdout goes to `report`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self._process = process
        self._reader: asyncio.Task[None] | None = None

    @staticmethod
    async def start(
        name: str, arguments: Iterable[str], folder: Path, report: Callable[[dict[str, Any]], None] | None = None
    ) -> Process:
        """Start it with a log named after it in `folder`."""
        with (folder / f"{name}.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log if report is None else subprocess.PIPE,
                stderr=log,
                # Ctrl-C in the terminal is for the demo, which then stops its processes in order.
                start_new_session=True,
            )
        started = Process(name, process)
        if report is not None:
            started._reader = asyncio.create_task(started._read(report))
        return started

    async def _read(self, report: Callable[[dict[str, Any]], None]) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            report(json.loads(line))

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL: no chance to tidy up."""
        self._process.kill()

    async def wait(self) -> int:
        """Wait until it has ended and all its reports are read; its exit code."""
        code = await self._process.wait()
        if self._reader is not None:
            await self._reader
        return code

    async def stop(self) -> int:
        """SIGTERM, and SIGKILL when that does not help; its exit code."""
        if self.exit_code is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(STOP_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
        return await self.wait()


class Cluster:
    """A namesrv and a broker, on free ports of this machine, with their data in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.namesrv = f"127.0.0.1:{free_port()}"
        self._broker_address = f"127.0.0.1:{free_port()}"
        self._namesrv_process: Process | None = None
        self.broker: Process | None = None

    async def start(self) -> None:
        """Start both."""
        self._namesrv_process = await self._server(
            "namesrv", "--listen", self.namesrv, "--data-dir", str(self.folder / "namesrv")
        )
        await self.start_broker()

    async def start_broker(self) -> None:
        """Start the broker, with what it had stored before."""
        self.broker = await self._server(
            "broker",
            *("--listen", self._broker_address),
            *("--namesrv", self.namesrv),
            *("--broker-name", "demo"),
            *("--data-dir", str(self.folder / "broker")),
        )

    async def _server(self, role: str, *arguments: str) -> Process:
        command = Path(sys.executable).with_name("kitemq-server")
        return await Process.start(role, [str(command), role, *arguments, "--metrics-listen", ""], self.folder)

    async def stop(self) -> None:
        """Stop both, the broker first."""
        for process in (self.broker, self._namesrv_process):
            if process is not None:
                await process.stop()


def program(name: str, *arguments: str) -> list[str]:
    """The command line of one of the demo's own programs."""
    return [sys.executable, "-m", f"examples.demo.{name}", *arguments]


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
