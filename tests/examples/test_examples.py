"""Every example runs to its end against a real cluster, and prints what its text promises."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from kitemq.rpc import parse_addresses
from tests.certificates import make_certificates
from tests.cluster import Broker, Cluster, Namesrv

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
TIMEOUT_S = 60.0

# Example -> what its output must hold, line by line, as regular expressions.
EXPECTED = {
    "send.py": [
        r"SEND_OK: [0-9a-f]{32} is at offset 0 of orders@broker-a:\d",
        r"a batch of 4 lies in orders@broker-a:\d",
        "what was sent without waiting has left",
    ],
    "send_in_order.py": [f"order-{number}: created paid packed sent" for number in (1, 2, 3)],
    "choose_queues.py": [
        "by name: parcels@broker-a:3",
        "FR: parcels@broker-a:0",
        "NL: parcels@broker-a:1",
    ],
    "send_errors.py": ["not a message: .*", "not a message: .*", "no cluster: (BrokerUnavailable|RequestTimeout)Error"],
    "many_sends.py": [r"10000 messages, [\d,]+ a second"],
    "compress.py": [r"100000 bytes, stored as \d{3}"],
    "push_consumer.py": ["(paid|refunded): order 7", "(paid|refunded): order 7", "offsets are committed, .*"],
    "failing_handler.py": [
        "bad: attempt 1 fails",
        "bad: attempt 2 fails",
        "bad: done at attempt 3",
    ],
    "blocking_handler.py": [r"20 messages in (10|\d) threads"],
    "share_work.py": [r"two members: \[3, 3\]", r"a third joins: \[2, 2, 2\]", r"it leaves: \[3, 3\]"],
    "broadcast.py": ["(left|right) screen: 101 102 103", "(left|right) screen: 101 102 103"],
    "pull_consumer.py": ["read 4 in a loop", r"polled 4, 5, 6, 7, 8, 9", r"committed: queue \d goes on at offset 10"],
    "replay.py": [
        "of the last ten minutes: 8",
        "from offset 5: 3",
        "from the first: 0, then 1 follows",
        "paused: 0",
        "resumed: 7",
    ],
    "hooks.py": ["sent with a trace: True, SEND_OK", "handled with a trace: True, young"],
    "without_await.py": ["100 sent from 8 threads", "100 read"],
    "administer.py": [
        "broker-a: 2 queues",
        "lag of printers: 2",
        "after a reset: 6, 2 queues moved",
        r"by id: 3 at offset 3 of invoices@broker-a:\d",
        "by key: 6 messages",
        "deleted on broker-a",
    ],
    "without_sdk.py": [r"sent    [0-9a-f]{32} to queue 0 at offset 0", r"pulled  [0-9a-f]{32} at offset 0: hello"],
}


async def run_example(name: str, *arguments: str) -> list[str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        str(EXAMPLES / name),
        *arguments,
        env=os.environ | {"HOME": "/nonexistent"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, err.decode()
    assert err == b"", err.decode()
    return out.decode().splitlines()


@pytest.mark.parametrize("name", EXPECTED)
async def test_example(name: str, cluster: Cluster) -> None:
    printed = await run_example(name, cluster.namesrv_address)
    wanted = list(EXPECTED[name])
    if name == "failing_handler.py":
        assert sorted(set(printed) - set(wanted)) == ["good too: done at attempt 1", "good: done at attempt 1"]
        printed = [line for line in printed if line.startswith("bad")]
    assert len(printed) == len(wanted), printed
    for line, pattern in zip(printed, wanted, strict=True):
        assert re.fullmatch(pattern, line), printed


async def test_over_tls(tmp_path: Path) -> None:
    certificates = make_certificates(tmp_path / "certificates")
    tls: dict[str, Any] = {"tls_cert_file": certificates.server_cert, "tls_key_file": certificates.server_key}
    namesrv = Namesrv(tmp_path / "namesrv", **tls)
    await namesrv.start()
    broker = Broker("broker-a", tmp_path / "broker", [namesrv.address], namesrv_tls_ca_file=certificates.ca, **tls)
    try:
        await broker.start()
        port = parse_addresses(namesrv.address)[0].rpartition(":")[2]
        printed = await run_example("over_tls.py", f"localhost:{port}", str(certificates.ca), "localhost")
        assert printed == ["SEND_OK over TLS", "hello"]
    finally:
        await broker.stop()
        await namesrv.stop()


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, list[str]]:
    """Every program that needs a server, and the README's: the words that start it with `NAMESRV`."""
    certificates = make_certificates(tmp_path / "certificates")
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    readme = tmp_path / "readme.py"
    readme.write_text("import sys as _sys\n" + block.replace('"127.0.0.1:9876"', "_sys.argv[1]"))
    words = {name: [str(EXAMPLES / name), "NAMESRV"] for name in EXPECTED if name != "send_errors.py"}
    words["over_tls.py"] = [str(EXAMPLES / "over_tls.py"), "NAMESRV", str(certificates.ca)]
    return words | {"README.md": [str(readme), "NAMESRV"]}


async def ended(words: list[str], namesrv: str, interrupt: asyncio.Event | None = None) -> tuple[int | None, str]:
    """Exit code and stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *(word.replace("NAMESRV", namesrv) for word in words)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            if interrupt is not None:
                await interrupt.wait()
                process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, err.decode()


@pytest.mark.slow
async def test_without_a_server_every_program_says_so_in_a_line(programs: dict[str, list[str]]) -> None:
    """All at once: a send is tried for 15 s."""
    results = await asyncio.gather(*(ended(words, "127.0.0.1:1") for words in programs.values()))
    for name, (code, err) in zip(programs, results, strict=True):
        assert code == 1, (name, err)
        assert re.fullmatch(
            r".*127\.0\.0\.1:1\b.*[Ss]tart .*(kitemq-server standalone|docs/operations\.md).*\n", err
        ), (
            name,
            err,
        )


async def test_ctrl_c_ends_every_program_at_once_and_without_a_word(programs: dict[str, list[str]]) -> None:
    """While each waits for a server that takes its connection and never answers."""

    async def interrupted(words: list[str]) -> tuple[float, tuple[int | None, str]]:
        came, interrupt = asyncio.Event(), asyncio.Event()

        async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.set()
            with suppress(ConnectionError):
                await reader.read()
            writer.close()

        server = await asyncio.start_server(swallow, "127.0.0.1", 0)
        running = asyncio.create_task(ended(words, f"127.0.0.1:{server.sockets[0].getsockname()[1]}", interrupt))
        await asyncio.wait({running, asyncio.ensure_future(came.wait())}, return_when=asyncio.FIRST_COMPLETED)
        interrupt.set()
        began = monotonic()
        result = await running
        server.close()
        return monotonic() - began, result

    for name, words in programs.items():
        took_s, result = await interrupted(words)
        assert result == (130, ""), (name, result)
        assert took_s < 5, name


def test_over_tls_says_what_it_wants() -> None:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / "over_tls.py")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "python examples/over_tls.py namesrv ca.pem" in result.stderr


def test_every_example_is_listed_and_tested() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")}
    assert programs == {*EXPECTED, "over_tls.py"}
    listed = set(re.findall(r"^\| \[(\w+\.py)\]\(\1\) \| .+ \|$", (EXAMPLES / "README.md").read_text(), re.MULTILINE))
    assert listed == programs
    for name in programs:
        assert f"python examples/{name}" in (EXAMPLES / name).read_text() or name == "without_sdk.py"
