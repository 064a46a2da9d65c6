"""Processes of a measurement: servers and load generators, started here, watched, and always stopped by their id."""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import grpc

SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse{status: SERVING}
STOP_TIMEOUT_S = 20.0
POLL_S = 0.002

_worker_numbers = itertools.count(1)


class BenchError(Exception):
    """Something could not be measured; the text says what and why."""


class Process:
    """A process that `running` started. Its output goes to `log_path`, except that of a pipe."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log_path: Path, started: float) -> None:
        self.name = name
        self.popen = popen
        self.log_path = log_path
        self.started = started  # perf_counter
        self.pid = popen.pid

    def check(self) -> None:
        """Raises BenchError with the end of its log when it is not running any more."""
        code = self.popen.poll()
        if code is not None:
            raise BenchError(f"{self.name} ended with status {code}:\n{self.log_tail()}")

    def log_tail(self, lines: int = 15) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that does not end it within 20 s."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def running(name: str, argv: Sequence[str], *, log_dir: Path, pipes: bool = False) -> Iterator[Process]:
    """`argv` as a process that is stopped at the end, come what may.

    Its own session: Ctrl-C in a terminal reaches only this process, which then stops the others in order.
    """
    log_path = log_dir / f"{name}.log"
    with log_path.open("ab") as log:
        started = time.perf_counter()
        popen = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
            stdout=subprocess.PIPE if pipes else log,
            stderr=log,
            start_new_session=True,
        )
    process = Process(name, popen, log_path, started)
    try:
        yield process
    finally:
        process.stop()


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end this process the way Ctrl-C does: through every `finally`."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_serving(process: Process, address: str, *, timeout_s: float = 60.0) -> float:
    """Seconds from the start of `process` until the health service at `address` says SERVING.

    Raises BenchError when the process ends first or the time is over.
    """
    host, _, port = address.rpartition(":")
    deadline = process.started + timeout_s
    while True:
        process.check()
        if time.perf_counter() > deadline:
            raise BenchError(f"{process.name} does not serve at {address} after {timeout_s:g} s:\n{process.log_tail()}")
        try:
            # gRPC waits 100 ms before it dials again, so it dials only when somebody listens.
            socket.create_connection((host, int(port)), timeout=1.0).close()
        except OSError:
            time.sleep(POLL_S)
            continue
        with grpc.insecure_channel(address) as channel:
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
            try:
                while check(b"", timeout=1.0) != SERVING:
                    time.sleep(POLL_S)
                    if time.perf_counter() > deadline:
                        break
                else:
                    return time.perf_counter() - process.started
            except grpc.RpcError:
                time.sleep(POLL_S)


class Worker:
    """A load generator in a process of its own: orders go in, results come out, one JSON object a line."""

    def __init__(self, process: Process) -> None:
        assert process.popen.stdin is not None and process.popen.stdout is not None
        self.process = process
        self._orders: IO[bytes] = process.popen.stdin
        self._replies_fd = process.popen.stdout.fileno()
        self._buffer = b""
        self.info: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        return self.process.pid

    def begin(self, order: dict[str, Any]) -> None:
        """Give an order without waiting for its result."""
        self.process.check()
        self._orders.write(json.dumps(order).encode() + b"\n")
        self._orders.flush()

    def result(self, *, timeout_s: float = 120.0) -> dict[str, Any]:
        """The result of the oldest order that has none. Raises BenchError when it failed or takes too long."""
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._replies_fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BenchError(f"{self.process.name} has not answered for {timeout_s:g} s")
            piece = os.read(self._replies_fd, 1 << 20)
            if not piece:
                self.process.popen.wait(STOP_TIMEOUT_S)
                raise BenchError(f"{self.process.name} ended:\n{self.process.log_tail()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BenchError(f"{self.process.name}: {reply['error']}")
        return reply

    def run(self, order: dict[str, Any], *, timeout_s: float = 120.0) -> dict[str, Any]:
        self.begin(order)
        return self.result(timeout_s=timeout_s)


@contextmanager
def worker(job: str, options: dict[str, Any], *, log_dir: Path) -> Iterator[Worker]:
    """A worker process doing `job` (a name in kitemq.bench.worker.JOBS), ready for orders."""
    argv = [sys.executable, "-m", "kitemq.bench.worker"]
    with running(f"bench-{job}-{next(_worker_numbers)}", argv, log_dir=log_dir, pipes=True) as process:
        handle = Worker(process)
        handle.begin({"job": job, "options": options})
        handle.info = handle.result(timeout_s=60.0)
        yield handle
