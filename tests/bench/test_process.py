"""Processes that always end, and workers that answer or say why not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kitemq.bench import procfs
from kitemq.bench.process import BenchError, free_port, running, wait_serving, worker

SLEEPER = [sys.executable, "-c", "import time; time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)",
]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def wait_until(condition: object, *, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_process_ends_with_its_block(tmp_path: Path) -> None:
    with running("sleeper", SLEEPER, log_dir=tmp_path) as process:
        assert alive(process.pid)
    assert not alive(process.pid)


def test_a_process_ends_when_its_block_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), running("sleeper", SLEEPER, log_dir=tmp_path) as process:
        raise RuntimeError
    assert not alive(process.pid)


def test_a_process_that_ignores_sigterm_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kitemq.bench.process.STOP_TIMEOUT_S", 0.1)
    with running("stubborn", STUBBORN, log_dir=tmp_path) as process:
        wait_until(lambda: "up" in process.log_tail())
    assert not alive(process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_parent_ends_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    program = f"""
import pathlib, sys, time
from kitemq.bench.process import ended_by_signals, running
with ended_by_signals(), running("child", {SLEEPER!r}, log_dir=pathlib.Path({str(tmp_path)!r})) as child:
    print(child.pid, flush=True)
    time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert alive(child)
        os.kill(parent.pid, number)
        parent.wait(20)
    finally:
        parent.kill()
        parent.communicate()
    assert not alive(child)


def test_a_server_that_ends_instead_of_serving_says_why(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "raise SystemExit('no such disk')"]
    with (
        pytest.raises(BenchError, match="broker ended with status 1:\nno such disk"),
        running("broker", argv, log_dir=tmp_path) as process,
    ):
        wait_serving(process, f"127.0.0.1:{free_port()}")


def test_a_server_that_never_serves_is_given_up(tmp_path: Path) -> None:
    with (
        pytest.raises(BenchError, match=r"does not serve at 127\.0\.0\.1:\d+ after 0\.2 s"),
        running("broker", SLEEPER, log_dir=tmp_path) as process,
    ):
        wait_serving(process, f"127.0.0.1:{free_port()}", timeout_s=0.2)


def test_the_baselines_are_measured_between_two_processes(tmp_path: Path) -> None:
    with (
        worker("echo-server", {}, log_dir=tmp_path) as server,
        worker("echo-client", {"port": server.info["port"]}, log_dir=tmp_path) as client,
    ):
        before = procfs.usage(client.pid)
        unary = client.run({"measure": "unary", "in_flight": 64, "seconds": 0.2})
        stream = client.run({"measure": "stream", "seconds": 0.2})
        assert procfs.usage(client.pid).since(before).cpu_s > 0
    # In flight / latency is the rate (Little's law), so one of them wrong would show.
    assert unary["per_s"] * unary["p50_ms"] / 1000 == pytest.approx(64, rel=0.5)
    assert stream["bytes_per_s"] > 1e6
    assert not alive(server.pid)
    assert not alive(client.pid)


def test_a_worker_that_fails_says_so(tmp_path: Path) -> None:
    with (
        worker("echo-server", {}, log_dir=tmp_path) as server,
        pytest.raises(BenchError, match="ValueError: the echo server only serves"),
    ):
        server.run({"measure": "unary"})


def test_a_worker_that_dies_is_noticed(tmp_path: Path) -> None:
    with worker("echo-server", {}, log_dir=tmp_path) as server:
        server.process.kill()
        with pytest.raises(BenchError, match="ended with status -9"):
            server.run({})


def test_a_worker_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    with (
        worker("echo-server", {}, log_dir=tmp_path) as server,
        pytest.raises(BenchError, match=r"has not answered for 0\.05 s"),
    ):
        server.result(timeout_s=0.05)


def test_what_a_process_costs_is_seen(tmp_path: Path) -> None:
    program = f"""
import os, sys, time
block = bytearray(os.urandom(1 << 20)) * 64
with open({str(tmp_path / "file")!r}, "wb") as file:
    file.write(block)
    os.fsync(file.fileno())
end = time.process_time() + 0.3
while time.process_time() < end: pass
print("done", flush=True)
time.sleep(600)
"""
    with running("spender", [sys.executable, "-c", program], log_dir=tmp_path) as process:
        wait_until(lambda: "done" in process.log_tail())
        spent = procfs.usage(process.pid)
        assert spent.cpu_s >= 0.25
        assert spent.written_bytes >= 64 << 20
        assert procfs.memory_bytes(process.pid) >= 64 << 20


def test_a_process_that_has_gone_has_no_costs(tmp_path: Path) -> None:
    with running("sleeper", SLEEPER, log_dir=tmp_path) as process:
        pass
    with pytest.raises(OSError, match="No such file"):
        procfs.usage(process.pid)
