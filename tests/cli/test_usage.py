"""What needs no cluster: help, usage errors, exit codes, completion scripts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from kitemq.cli import main as cli
from kitemq.cli.session import ExitCode

runner = CliRunner()


def kitemq(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from kitemq.cli.main import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def verbs() -> Iterator[tuple[str, ...]]:
    """Every verb there is, as its words."""
    root = get_command(cli.app)
    for name in cli.VERBS:
        command = root.get_command(None, name)  # type: ignore[attr-defined]
        subcommands = getattr(command, "commands", {})
        if name == "bench":
            continue
        yield from ((name, subcommand) for subcommand in subcommands) if subcommands else iter([(name,)])


@pytest.mark.parametrize("words", list(verbs()), ids=" ".join)
def test_every_verb_has_help_with_an_example(words: tuple[str, ...]) -> None:
    result = runner.invoke(cli.app, [*words, "--help"], prog_name="kitemq")
    assert result.exit_code == 0, result.output
    assert f"Usage: kitemq {' '.join(words)} " in result.output
    example = result.output.rpartition("Example")[2]
    assert f"kitemq {' '.join(words)}" in example or words == ("doctor",)
    for option in re.findall(r"^  (?:-\w, )?(--[\w-]+)(.*)", result.output, re.MULTILINE):
        assert option[1].strip(), f"{option[0]} is not explained"
    assert max(map(len, result.output.splitlines())) <= 100


def test_the_verbs_are_those_of_the_manual() -> None:
    assert [" ".join(words) for words in verbs()] == [
        "topic create",
        "topic update",
        "topic list",
        "topic describe",
        "topic delete",
        "group list",
        "group describe",
        "group reset-offset",
        "cluster list",
        "broker describe",
        "broker config",
        "broker writes",
        "produce",
        "consume",
        "tail",
        "message get",
        "doctor",
    ]


def test_help_names_every_exit_code() -> None:
    result = kitemq("--help")
    assert result.returncode == 0
    for code in ExitCode:
        assert re.search(rf"\b{code.value}\b", result.stdout), code
    assert "KITEMQ_NAMESRV" in result.stdout
    assert kitemq("-h").stdout == result.stdout


def test_the_command_is_light() -> None:
    """`kitemq --help` needs neither pydantic nor what only a verb needs."""
    code = "import sys; from kitemq.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in sys.modules if name in ('pydantic', 'rich', 'kitemq.admin', 'kitemq_server')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["topc"], "no such command 'topc'. Did you mean 'topic'?"),
        (["topic", "creat"], "no such command 'creat'. Did you mean 'create'?"),
        (["topic", "create"], "missing argument 'TOPIC'"),
        (["topic", "create", "orders", "--queues", "0"], "should be greater than or equal to 1"),
        (["topic", "create", "orders", "--queues", "many"], "should be a valid integer"),
        (["topic", "create", "orders", "--permission", "x"], "none of rw, r, w"),
        (["topic", "create", "orders", "--attribute", "x"], "'x' is not name=value"),
        (["topic", "update", "orders"], "nothing to change"),
        (["topic", "list", "-o", "yaml"], "'yaml' is not one of"),
        (["topic", "list", "--nonsense"], "no such option: --nonsense"),
        (["group", "reset-offset", "g", "t"], "give either --to or --offset"),
        (["group", "reset-offset", "g", "t", "--to", "sometime"], "'sometime' is no time"),
        (["group", "reset-offset", "g", "t", "--offset", "5"], "name it with --queue"),
        (["group", "reset-offset", "g", "t", "--to", "first", "--queue", "x"], "names no queue"),
        (["consume", "orders"], "missing option '--group'"),
        (["consume", "orders", "--group", "g", "--idle", "5"], "no length of time"),
        (["tail", "orders", "--last", "5", "--since", "5m"], "give either --last or --since"),
        (["message", "get"], "give exactly one of ID, --key and --offset"),
        (["message", "get", "--key", "k"], "--key and --topic go together"),
        (["message", "get", "--offset", "orders:1"], "is no position"),
        (["message", "get", "--offset", "orders@b:1"], "is no position"),
        (["broker", "config", "b", "--set", "x"], "'x' is not name=value"),
        (["broker", "writes", "b"], "missing argument 'on|off'"),
        (["broker", "writes", "b", "maybe"], "'maybe' is not one of"),
        (["--namesrv", "nowhere", "topic", "list"], "address 'nowhere' is not host:port"),
        (["topic", "list", "--namesrv", "a:99999"], "address 'a:99999' is not host:port"),
        (["topic", "list", "--namesrv", "http://a:9876"], "address 'http://a:9876' is not host:port"),
        (["produce", "bad topic!"], "topic name 'bad topic!' may hold"),
        (["--namesrv", "", "cluster", "list"], "no namesrv address given"),
        (["topic", "create", "no spaces"], "may hold letters, digits"),
        (["group", "describe", "x" * 121], "at most 120"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_two_lines_and_exit_code_2(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        cli.main(arguments)
    assert exited.value.code == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert problem.lower() in captured.err.lower()
    assert len(captured.err.splitlines()) <= 2
    assert "Traceback" not in captured.err


def test_no_verb_shows_the_help() -> None:
    result = kitemq()
    assert result.returncode == ExitCode.USAGE
    assert "Usage: kitemq [OPTIONS] COMMAND" in result.stderr + result.stdout


def test_without_its_extra_the_command_says_so() -> None:
    code = "import sys; sys.modules['typer'] = None; from kitemq.cli import script; script()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == "kitemq: the command is not installed as a whole: pip install 'kitemq[cli]'\n"


def test_version() -> None:
    assert re.fullmatch(r"kitemq \d+\.\d+\.\d+\n", kitemq("--version").stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    environment = {"_KITEMQ_COMPLETE": f"source_{shell}", "PATH": "/usr/bin:/bin"}
    result = kitemq(env=environment)
    assert result.returncode == 0, result.stderr
    assert "kitemq" in result.stdout and "_KITEMQ_COMPLETE" in result.stdout


def test_completion_of_verbs() -> None:
    environment = {
        "_KITEMQ_COMPLETE": "complete_bash",
        "COMP_WORDS": "kitemq topic de",
        "COMP_CWORD": "2",
        "PATH": "/usr/bin:/bin",
    }
    assert kitemq(env=environment).stdout.split() == ["describe", "delete"]


def test_nobody_at_the_address() -> None:
    result = kitemq("--namesrv", "127.0.0.1:1", "topic", "list")
    assert result.returncode == ExitCode.UNREACHABLE
    assert result.stdout == ""
    assert "no namesrv answers (127.0.0.1:1" in result.stderr
    assert len(result.stderr.splitlines()) == 1
