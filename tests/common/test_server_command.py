"""The `kitemq-server` command, as processes."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import kitemq
from kitemq_server.cli import main
from kitemq_server.standalone import StandaloneConfig, broker_config, namesrv_config
from tests.certificates import make_certificates

COMMAND = (sys.executable, "-c", "from kitemq_server.cli import main; main()")
ANY_PORT = ("--listen", "127.0.0.1:0", "--metrics-listen", "")


@dataclass(frozen=True)
class Result:
    """What the command did in this process."""

    returncode: int
    stdout: str
    stderr: str


Here = Callable[..., Result]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs the command in this process, in the test's folder: for what starts no service."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")

    def call(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, arguments)])
        output = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, output.out, output.err)

    return call


def run(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=cwd)


@contextmanager
def started(*arguments: str | Path, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A service that serves, and its first listener's address as it logs it. Killed at the end if it still runs."""
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True, cwd=cwd)
    assert process.stderr
    try:
        seen = []
        for line in process.stderr:
            seen.append(line)
            if serving := re.search(rf"{arguments[0]} serving listen=internal=(\S+?)(,| )", line):
                yield process, serving[1]
                return
        raise AssertionError(f"it does not serve: {''.join(seen)}")
    finally:
        process.kill()
        process.communicate()


@contextmanager
def standalone(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A standalone server and the address that it tells to people."""
    command = [*COMMAND, "standalone", *ANY_PORT, "--namesrv-listen", "127.0.0.1:0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)
    assert process.stdout
    try:
        line = process.stdout.readline()
        serving = re.match(r"KiteMQ is serving on (\S+),", line)
        assert serving, line + process.communicate(timeout=30)[1]
        yield process, serving[1]
    finally:
        process.kill()
        process.communicate()


def stopped(process: subprocess.Popen[str], signum: signal.Signals = signal.SIGTERM) -> int:
    process.send_signal(signum)
    process.communicate(timeout=30)
    return process.returncode


async def send(namesrv: str, *bodies: bytes) -> None:
    async with kitemq.Producer(namesrv, group="shop") as producer:
        for body in bodies:
            await producer.send(kitemq.Message("orders", body))


async def receive(namesrv: str, count: int) -> set[bytes]:
    bodies: set[bytes] = set()
    async with kitemq.PullConsumer(namesrv, group="audit", from_where=kitemq.Position.FIRST) as consumer:
        await consumer.subscribe("orders")
        async for message in consumer:
            bodies.add(message.body)
            if len(bodies) == count:
                break
    return bodies


@pytest.mark.processes
async def test_standalone_keeps_its_data(tmp_path: Path) -> None:
    with standalone(cwd=tmp_path) as (process, namesrv):
        await send(namesrv, b"1", b"2")
        assert stopped(process) == 0
    with standalone("--data", "kitemq-data", cwd=tmp_path) as (process, namesrv):
        await send(namesrv, b"3")
        assert await receive(namesrv, 3) == {b"1", b"2", b"3"}
        assert stopped(process, signal.SIGINT) == 0
    dumped = run("store", "dump", "kitemq-data/broker", cwd=tmp_path)
    assert dumped.returncode == 0
    records = [json.loads(line) for line in dumped.stdout.splitlines()]
    assert [record["topic"] for record in records if record["kind"] == "MESSAGE"] == ["orders"] * 3
    segment = next((tmp_path / "kitemq-data/broker/commitlog").iterdir())
    assert run("store", "dump", segment).stdout == dumped.stdout


@pytest.mark.processes
async def test_an_ephemeral_standalone_leaves_nothing(tmp_path: Path) -> None:
    with standalone("--ephemeral", cwd=tmp_path) as (process, namesrv):
        await send(namesrv, b"1")
        assert await receive(namesrv, 1) == {b"1"}
        assert stopped(process) == 0
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240 - nothing else runs


@pytest.mark.processes
async def test_separate_services_find_each_other(tmp_path: Path) -> None:
    with (
        started("namesrv", *ANY_PORT, cwd=tmp_path) as (first, first_address),
        started("namesrv", *ANY_PORT, "--data-dir", "other", cwd=tmp_path) as (second, second_address),
        started("broker", *ANY_PORT, "--namesrv", f"{first_address},{second_address}", cwd=tmp_path) as (
            broker,
            broker_address,
        ),
    ):
        for one in (first_address, second_address, broker_address):
            healthy = run("health", "--address", one)
            assert (healthy.returncode, healthy.stdout) == (0, "SERVING\n")
        assert run("health", "--address", broker_address, "--service", "kitemq.v1.Broker").returncode == 0
        unknown = run("health", "--address", broker_address, "--service", "kitemq.v1.Namesrv")
        assert unknown.returncode == 1
        await send(f"{first_address};{second_address}", b"1")
        assert stopped(first) == 0
        assert await receive(f"{first_address};{second_address}", 1) == {b"1"}
        assert stopped(broker) == 0
        gone = run("health", "--address", broker_address)
        assert gone.returncode == 1
        assert gone.stderr == f"Error: {broker_address}: connection refused\n"
        assert stopped(second) == 0


@pytest.mark.processes
def test_health_over_tls(tmp_path: Path) -> None:
    pem = make_certificates(tmp_path / "pem")
    tls = ("--tls-cert-file", pem.server_cert, "--tls-key-file", pem.server_key)
    with started("namesrv", *ANY_PORT, *tls, cwd=tmp_path) as (_, address):
        assert run("health", "--address", address, "--tls-ca", pem.ca).returncode == 0
        assert run("health", "--address", address).returncode == 1
        missing = run("health", "--address", address, "--tls-ca", "no.pem")
        assert (missing.returncode, "cannot read no.pem" in missing.stderr) == (2, True)


@pytest.mark.processes
def test_a_taken_port_ends_the_start_with_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for service in ("namesrv", "broker"):
            result = run(service, "--listen", address, "--metrics-listen", "", cwd=tmp_path)
            assert result.returncode == 1
            assert result.stderr.splitlines()[-1].endswith(
                f"cannot listen on {address}: the port is taken: stop what uses it, or choose another"
            )
            assert "Traceback" not in result.stderr


@pytest.mark.processes
def test_data_in_use_is_said_in_one_line(tmp_path: Path) -> None:
    with standalone("--data", "d", cwd=tmp_path):
        for service in ("namesrv", "broker"):
            result = run(service, *ANY_PORT, "--data-dir", f"d/{service}", cwd=tmp_path)
            assert result.returncode in (1, 2)
            assert "Traceback" not in result.stderr
            assert "in use" in result.stderr or "lock" in result.stderr


USAGE = [
    (("broker", "--brokr-name", "x"), "no such option: --brokr-name"),
    (("broker", "--broker-id", "x"), "broker_id: must be a whole number, not 'x' [--broker-id]"),
    (("namesrv", "--listen", "here"), "listen: 'here' has no port: write host:port [--listen]"),
    (("broker", "--config", "none.toml"), "--config: cannot read none.toml: no such file or directory"),
    (("standalone", "--ephemeral", "--data", "d"), "data and ephemeral exclude each other: choose one"),
    (("standalone", "--ephemeral", "perhaps"), "ephemeral: must be true or false, not 'perhaps' [--ephemeral]"),
    (("proxy",), "no such command 'proxy'"),
    (("health", "--tls-ca", "ca.pem", "--tls-cert", "cert.pem"), "--tls-cert and --tls-key go together"),
    (("store", "dump"), "missing argument"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE, ids=[" ".join(row[0]) for row in USAGE])
def test_wrong_usage_is_told_without_a_traceback(arguments: tuple[str, ...], words: str, here: Here) -> None:
    result = here(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("KITEMQ_BROKER_FLUSH_MODE", "set --flush-mode or KITEMQ_STANDALONE_FLUSH_MODE"),
        ("KITEMQ_NAMESRV_LISTEN", "set --namesrv-listen or KITEMQ_STANDALONE_NAMESRV_LISTEN"),
        ("KITEMQ_BROKER_BROKER_NAME", "leave it out"),
    ],
)
def test_standalone_loses_no_variable_of_its_parts(
    variable: str, words: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "x")
    result = here("standalone", "--ephemeral")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"Error: {variable} has no effect under standalone: {words}\n"


@pytest.mark.processes
def test_a_file_configures_and_unknown_variables_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "namesrv.toml").write_text('listen = "127.0.0.1:0"\nmetrics_listen = ""\nlog_format = "json"\n')
    monkeypatch.setenv("KITEMQ_NAMESRV_LISTN", "x")
    process = subprocess.Popen(
        [*COMMAND, "namesrv", "--config", "namesrv.toml"], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stderr
    try:
        warning = json.loads(process.stderr.readline())
        assert "KITEMQ_NAMESRV_LISTN" in warning["message"]
        serving = json.loads(process.stderr.readline())
        assert serving["message"].startswith("namesrv serving listen=internal=127.0.0.1:")
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_dump_of_damage_and_of_nothing(tmp_path: Path, here: Here) -> None:
    segment = tmp_path / "commitlog" / f"{0:020d}"
    segment.parent.mkdir()
    segment.write_bytes(b"\x0a" + b"not a record" * 20)
    result = here("store", "dump", segment)
    assert (result.returncode, json.loads(result.stdout)["damaged"]) == (1, True)
    missing = here("store", "dump", "none")
    assert (missing.returncode, "'none' does not exist" in missing.stderr) == (2, True)
    other = tmp_path / "other"
    other.mkdir()
    assert "holds no segments" in here("store", "dump", other).stderr
    (other / "a.log").write_bytes(b"")
    assert "not the name of a segment" in here("store", "dump", other / "a.log").stderr


def test_every_command_has_help_with_an_example(here: Here) -> None:
    assert "standalone" in here("--help").stdout
    for command in (["standalone"], ["namesrv"], ["broker"], ["health"], ["store", "dump"]):
        result = here(*command, "--help")
        assert result.returncode == 0
        assert f"kitemq-server {' '.join(command)}" in result.stdout.split("Example:")[1]
    assert re.match(r"kitemq-server \d+\.\d+", here("--version").stdout)


def test_what_standalone_tells_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITEMQ_BROKER_RETENTION_HOURS", "5")
    config = StandaloneConfig(advertise="queue.example.com", flush_mode="SYNC_FLUSH")
    broker = broker_config(config, tmp_path, "127.0.0.1:1")
    assert (broker.retention_hours, broker.broker_name, broker.flush_mode) == (5, "standalone", "SYNC_FLUSH")
    assert broker.advertise == {"internal": "queue.example.com"}
    assert broker.namesrv == ("127.0.0.1:1",)
    assert broker.data_dir == tmp_path / "broker"
    assert namesrv_config(config, tmp_path).data_dir == tmp_path / "namesrv"
    assert namesrv_config(config, tmp_path).metrics_listen == ""


@pytest.mark.processes
async def test_a_cluster_that_speaks_tls_only(tmp_path: Path) -> None:
    pem = make_certificates(tmp_path / "pem")
    server = ("--tls-cert-file", pem.server_cert, "--tls-key-file", pem.server_key, "--tls-client-ca-file", pem.ca)
    with (
        started("namesrv", *ANY_PORT, *server, cwd=tmp_path) as (_, namesrv),
        started("broker", *ANY_PORT, *server, "--namesrv", namesrv, "--namesrv-tls-ca-file", pem.ca, cwd=tmp_path) as (
            broker,
            _,
        ),
    ):
        certificate = ("--tls-cert", pem.client_cert, "--tls-key", pem.client_key)
        assert run("health", "--address", namesrv, "--tls-ca", pem.ca, *certificate).returncode == 0
        assert run("health", "--address", namesrv, "--tls-ca", pem.ca).returncode == 1
        tls = kitemq.TlsConfig(ca_file=str(pem.ca), cert_file=str(pem.client_cert), key_file=str(pem.client_key))
        async with kitemq.Producer(namesrv, group="shop", tls=tls) as producer:
            receipt = await producer.send(kitemq.Message("orders", b"secret"))
            assert receipt.queue_offset == 0
        assert stopped(broker) == 0
