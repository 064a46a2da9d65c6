"""README and docs/operations.md are true: their commands parse, their program runs, metrics and log lines are there."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

import kitemq_server
from kitemq.cli import main as client_command
from kitemq_server import cli as server_command
from tests.cluster import Broker, Namesrv, running_cluster

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs" / "operations.md"
COMMANDS: dict[str, Any] = {"kitemq": client_command, "kitemq-server": server_command}
TIMEOUT_S = 60.0


def blocks(path: Path, language: str = "") -> list[str]:
    """The code blocks of a page that are in one language; "": those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def section(heading: str) -> str:
    """The text of operations.md below a heading, up to the next of its level."""
    return OPERATIONS.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def documented_commands() -> Iterator[list[str]]:
    """The words of every call of our two commands in code blocks."""
    for path in (README, OPERATIONS, ROOT / "examples" / "README.md"):
        for block in blocks(path):
            for line in block.replace("\\\n", " ").splitlines():
                for call in re.split(r" (?:\||&&) ", line.partition(" #")[0]):
                    words = [
                        word for word in shlex.split(call.partition(" < ")[0]) if not re.match(r"KITEMQ_\w+=", word)
                    ]
                    if words and words[0] in COMMANDS:
                        yield words


def parse(words: list[str]) -> None:
    """Resolves the verb and parses its arguments; raises as the command would."""
    name, rest = words[0], words[1:]
    command, context = get_command(COMMANDS[name].app), None
    while True:
        context = command.make_context(name, rest, parent=context)
        if not hasattr(command, "resolve_command"):
            return
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])


@pytest.mark.parametrize("words", list(documented_commands()), ids=" ".join)
def test_commands_are_understood(words: list[str], tmp_path: Path) -> None:
    # Where a folder must be there, any will do.
    parse([str(tmp_path) if word.startswith("/var/lib/") else word for word in words])


def test_there_are_commands_to_check() -> None:
    assert len(list(documented_commands())) > 25


async def test_the_readmes_program(tmp_path: Path) -> None:
    (program,) = blocks(README, "python")
    async with running_cluster(tmp_path) as cluster:
        script = tmp_path / "program.py"
        script.write_text(program.replace("127.0.0.1:9876", cluster.namesrv_address))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-u", script, stdout=asyncio.subprocess.PIPE, env=os.environ | {"GRPC_VERBOSITY": "NONE"}
        )
        assert process.stdout
        try:
            async with asyncio.timeout(TIMEOUT_S):
                assert re.fullmatch(rb"orders@broker-a:\d 0\n", await process.stdout.readline())
                assert await process.stdout.readline() == b"paid b'book'\n"
        finally:
            process.kill()
            await process.communicate()


async def exported(port: int) -> set[str]:
    """Names of the metrics that an endpoint shows."""

    def fetch() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            return str(response.read(), "utf-8")

    return {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(await asyncio.to_thread(fetch))
    }


async def test_every_metric_is_documented_and_there(tmp_path: Path) -> None:
    namesrv = Namesrv(tmp_path / "namesrv", metrics_listen="127.0.0.1:0")
    await namesrv.start()
    broker = Broker("broker-a", tmp_path / "broker", [namesrv.address], metrics_listen="127.0.0.1:0")
    await broker.start()
    try:
        shown = await exported(namesrv.handle.metrics_port) | await exported(broker.handle.metrics_port)
    finally:
        await broker.stop()
        await namesrv.stop()
    named = set(re.findall(r"`((?:rocketmq|kitemq|process)_\w+)`", section("Metrics")))
    ours = re.compile(r"(rocketmq|kitemq)_")
    assert {name for name in named if ours.match(name)} == {name for name in shown if ours.match(name)}
    assert named <= shown


def test_every_log_line_is_written() -> None:
    (package,) = kitemq_server.__path__
    source = "\n".join(path.read_text() for path in Path(package).rglob("*.py"))
    rows = [line for line in section("Log lines").splitlines() if line.startswith("| `")]
    lines = [line for row in rows for line in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    assert len(lines) > 25
    for line in lines:
        words = re.sub(r"(broker|namesrv) serving", "%s serving", line)
        for part in re.split(r" (?=\w+=)", words):
            assert part.rstrip(":") in source, line
