"""Logs, metrics endpoint, background tasks, and a process from signal to exit code."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from kitemq_server.common import logs
from kitemq_server.common.metrics import new_registry, serve_metrics
from kitemq_server.common.tasks import running


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_text_lines_cannot_be_forged(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="INFO", log_format="text")
    logging.getLogger("kitemq_server.x").info("client=%s", "a\n2026-01-01T00:00:00.000Z ERROR forged")
    logging.getLogger("kitemq_server.x").debug("not shown")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("Z ERROR forged")
    assert " INFO    kitemq_server.x client=a\\n2026" in lines[0]


def test_json_lines(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(level="INFO", log_format="json")
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("x").exception("failed key=%s", "é")
    line = json.loads(capsys.readouterr().err)
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", "x", "failed key=é")
    assert line["exception"].endswith("ValueError: broken")
    assert line["time"].endswith("Z")


async def scrape(port: int) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return text


async def test_metrics_are_served_and_stop() -> None:
    registry = new_registry()
    Counter("sails", "Sails seen.", registry=registry).inc()
    async with serve_metrics("127.0.0.1:0", registry) as port:
        assert port
        text = await scrape(port)
        assert "sails_total 1.0" in text
        assert "process_resident_memory_bytes" in text
    with pytest.raises(ConnectionRefusedError):
        await scrape(port)


async def test_metrics_over_ipv6_and_off() -> None:
    async with serve_metrics("[::1]:0", CollectorRegistry()) as port:
        reader, writer = await asyncio.open_connection("::1", port)
        writer.write(b"GET / HTTP/1.0\r\n\r\n")
        assert b"200 OK" in await reader.read()
        writer.close()
        await writer.wait_closed()
    async with serve_metrics("", CollectorRegistry()) as port:
        assert port is None


async def test_a_taken_metrics_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot serve metrics on {address}"):
            async with serve_metrics(address, CollectorRegistry()):
                pass


async def test_background_work_ends_with_its_body() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with running(work(), work()):
        await asyncio.sleep(0)
    assert ended.is_set()


async def test_a_failure_in_the_background_ends_the_body() -> None:
    async def fail() -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        async with running(fail()):
            await asyncio.Event().wait()


async def test_the_body_s_own_failure_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with running(asyncio.Event().wait()):  # type: ignore[arg-type]
            raise KeyError("body")


PROGRAM = """
import asyncio, sys
from kitemq_server.common import logs
from kitemq_server.common.config import ConfigError
from kitemq_server.common.lifecycle import run
from kitemq_server.common.serving import ServeError
from kitemq_server.common.tasks import running

async def service(stop):
    how = sys.argv[1]
    if how == "serve error":
        raise ServeError("cannot listen on here:1: the port is taken")
    if how == "config error":
        raise ConfigError("data_dir: in use")
    if how == "bug":
        raise ExceptionGroup("parts", [ValueError("a bug")])
    print("ready", flush=True)
    await stop.wait()
    print("stopping", flush=True)
    if how == "stuck":
        await asyncio.sleep(60)

logs.configure(level="INFO", log_format="text")
sys.exit(run(service))
"""


def start(how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.processes
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(signum: signal.Signals) -> None:
    with start("well") as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        output, log = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "stopping\n")
    assert f"stopping signal={signum.name}" in log.splitlines()[-2]
    assert log.splitlines()[-1].endswith(" stopped")


@pytest.mark.processes
def test_a_second_ctrl_c_ends_at_once() -> None:
    with start("stuck") as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "code", "words", "lines"),
    [
        ("serve error", 1, "cannot listen on here:1: the port is taken", 1),
        ("config error", 2, "data_dir: in use", 1),
        ("bug", 1, "ValueError: a bug", None),
    ],
)
def test_failures_and_their_exit_codes(how: str, code: int, words: str, lines: int | None) -> None:
    with start(how) as process:
        _, log = process.communicate(timeout=30)
    assert process.returncode == code
    assert words in log
    if lines is not None:
        assert len(log.splitlines()) == lines
