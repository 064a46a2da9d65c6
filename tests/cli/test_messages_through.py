"""`kitemq produce`, `consume`, `tail`, `message get` and `group …`: messages through a real cluster."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import time

import pytest

from kitemq.cli.producing import Refusals
from kitemq.cli.session import ExitCode
from kitemq.errors import StoreFullError, TopicNotFoundError
from tests.cli.conftest import COMMAND, Run, Start
from tests.cluster import Cluster


def numbers(count: int) -> str:
    return "".join(f"{number}\n" for number in range(count))


async def test_lines_in_lines_out(cluster: Cluster, run: Run) -> None:
    await run("topic", "create", "orders", "--queues", "3")
    sent = await run("produce", "orders", "--key", "k", "--tag", "paid", "--property", "a=b=c", stdin=numbers(5000))
    assert (sent.code, sent.out) == (ExitCode.OK, "")
    assert sent.err.startswith("Sent 5000 messages to orders in ")
    consumed = await run("consume", "orders", "--group", "g", "--from", "first", "--count", "5000")
    assert (consumed.code, consumed.err) == (ExitCode.OK, "")
    assert sorted(map(int, consumed.out.split())) == list(range(5000))
    one = (await run("tail", "orders", "--last", "1", "-o", "json")).lines[0]
    assert (one["keys"], one["tag"], one["properties"], one["body"]) == (["k"], "paid", {"a": "b=c"}, "4999")


async def test_one_sharding_key_keeps_the_order_of_the_lines(cluster: Cluster, run: Run) -> None:
    sent = await run("produce", "orders", "--sharding-key", "u-1", "--receipts", stdin=numbers(3000))
    assert sent.code == ExitCode.OK, sent.err
    receipts = sent.lines
    assert len({(one["broker_name"], one["queue_id"]) for one in receipts}) == 1
    by_line = sorted(receipts, key=lambda one: one["line"])
    assert [one["queue_offset"] for one in by_line] == list(range(3000))
    assert set(receipts[0]) == {
        "line",
        "status",
        "message_id",
        "topic",
        "broker_name",
        "queue_id",
        "queue_offset",
        "store_timestamp_ms",
    }
    tailed = await run("tail", "orders", "--since", "1h")
    assert tailed.out == numbers(3000)


async def test_bad_lines_are_named_and_the_rest_is_sent(cluster: Cluster, run: Run) -> None:
    lines = ['{"body": "1"}', "no", "", '{"body": ""}', '{"body": "2", "tag": "a|b"}', '{"body": "3"}']
    result = await run("produce", "orders", "--json", stdin="\n".join(lines))
    assert result.code == ExitCode.FAILED
    assert "Error: line 2: not JSON" in result.err
    assert "Error: line 4: " in result.err and "Error: line 5: " in result.err
    assert "Sent 2 messages to orders" in result.err
    assert "3 lines failed; 1 empty line passed over" in result.err
    assert (await run("tail", "orders")).out.split() == ["1", "3"]
    many = await run("produce", "orders", "--json", stdin="no\n" * 100)
    assert many.err.count("not JSON") == 10 and "100 lines failed" in many.err


async def test_the_cluster_refuses(cluster: Cluster, run: Run) -> None:
    result = await run("produce", "SCHEDULE_TOPIC_XXXX", stdin="a\nb\n")
    assert (result.code, result.out) == (ExitCode.USAGE, "")
    assert result.err.startswith("Error: topic 'SCHEDULE_TOPIC_XXXX' takes no messages") and result.err.count("\n") == 1


async def test_a_refusal_is_said_once_and_ends_the_reading(cluster: Cluster, run: Run, start: Start) -> None:
    await run("broker", "config", "broker-a", "--set", "auto_create_topic_enable=false")
    result = await run("produce", "archive", stdin=numbers(5000))
    assert (result.code, result.out) == (ExitCode.NOT_FOUND, "")
    refusal, summary = result.err.splitlines()
    match = re.match(r"Error: (\d+) messages, lines 1 to (\d+): .*archive", refusal)
    assert match and match[1] == match[2], refusal
    assert re.fullmatch(
        rf"Sent 0 messages to archive in .* s; {match[1]} lines failed; stopped reading at the first refusal\.", summary
    )
    running = await start("produce", "archive")  # stdin stays open
    await running.write("a\n")
    one = await running.end()
    assert (one.code, len(one.err.splitlines())) == (ExitCode.NOT_FOUND, 2)
    assert one.err.startswith("Error: line 1: ")


def test_refusals_that_differ_in_numbers_only_are_one(capsys: pytest.CaptureFixture[str]) -> None:
    refusals = Refusals()
    for number in (4, 2, 3):
        refusals.add(
            number, StoreFullError(f"broker a has no disk space left: {number} bytes are free", topic="orders")
        )
    refusals.add(7, TopicNotFoundError("no such topic"))
    assert isinstance(refusals.first, StoreFullError) and refusals.came.is_set()
    refusals.report()
    assert capsys.readouterr().err.splitlines() == [
        "Error: 3 messages, lines 2 to 4: broker a has no disk space left: 4 bytes are free [topic=orders]",
        "Error: line 7: no such topic",
    ]


async def test_any_bytes_go_through_json_and_back(cluster: Cluster, run: Run) -> None:
    bodies = [b"\xff\x00\n\r", "grün \u2028 \x1b[0m".encode(), b" ", os.urandom(3000)]
    lines = [json.dumps({"body_base64": base64.b64encode(body).decode(), "keys": ["k"]}) for body in bodies]
    assert (await run("produce", "one", "--json", stdin="\n".join(lines))).code == ExitCode.OK
    first = await run("tail", "one", "-o", "json")
    copied = await run("produce", "two", "--json", stdin=first.out)
    assert copied.code == ExitCode.OK, copied.err
    second = await run("tail", "two", "-o", "json")
    assert not {line["message_id"] for line in second.lines} & {line["message_id"] for line in first.lines}
    got = [line["body"].encode() if "body" in line else base64.b64decode(line["body_base64"]) for line in second.lines]
    assert sorted(got) == sorted(bodies)


async def test_a_group_remembers(cluster: Cluster, run: Run) -> None:
    await run("produce", "orders", stdin=numbers(10))
    none = await run("consume", "orders", "--group", "late", "--idle", "1s")
    assert (none.code, none.out) == (ExitCode.OK, "")  # --from last
    first = await run("consume", "orders", "--group", "g", "--from", "first", "--count", "4")
    rest = await run("consume", "orders", "--group", "g", "--from", "first", "--idle", "1s", "-o", "json")
    assert len(first.out.split()) == 4
    assert sorted(map(int, first.out.split() + [line["body"] for line in rest.lines])) == list(range(10))
    groups = {one["group"]: one for one in (await run("group", "list", "-o", "json")).json}
    assert groups["g"] == {
        "group": "g",
        "member_count": 0,
        "lag_messages": 0,
        "message_model": "CLUSTERING",
        "consume_type": "CONSUME_ACTIVELY",
    }
    since = await run("consume", "orders", "--group", "hour", "--from", "1h", "--idle", "1s")
    assert len(since.out.split()) == 10


async def test_consume_with_a_filter(cluster: Cluster, run: Run) -> None:
    for tag in ("paid", "refunded", "new"):
        await run("produce", "orders", "--tag", tag, stdin=f"{tag}\n")
    result = await run("consume", "orders", "-g", "g", "--from", "first", "--filter", "paid||refunded", "-n", "2")
    assert sorted(result.out.split()) == ["paid", "refunded"]
    tailed = await run("tail", "orders", "--filter", "new || paid")
    assert tailed.out.split() == ["paid", "new"]
    newest = await run("tail", "orders", "--filter", "paid", "--last", "1")
    assert newest.out == "paid\n"


async def test_ctrl_c_commits_what_was_printed(cluster: Cluster, start: Start, run: Run) -> None:
    await run("topic", "create", "orders")
    await run("produce", "orders", stdin=numbers(100))
    consuming = await start("consume", "orders", "--group", "g", "--from", "first")
    await consuming.until(lambda: consuming.out.count(b"\n") == 100)
    described = (await run("group", "describe", "g", "-o", "json")).json
    assert len(described["members"]) == 1
    assert described["members"][0]["subscriptions"] == {"orders": "*"}
    assert described["members"][0]["address"].startswith("127.0.0.1:")
    result = await consuming.interrupt()
    assert (result.code, result.err) == (ExitCode.INTERRUPTED, "")
    described = (await run("group", "describe", "g", "-o", "json")).json
    assert described["members"] == []
    assert described["lag_messages"] == 0
    assert sum(queue["consumer_offset"] for queue in described["queues"]) == 100
    assert set(described["queues"][0]) == {
        "topic",
        "broker_name",
        "queue_id",
        "min_offset",
        "max_offset",
        "consumer_offset",
        "lag_messages",
        "oldest_waiting_timestamp_ms",
    }


async def test_ctrl_c_while_producing(cluster: Cluster, start: Start, run: Run) -> None:
    await run("topic", "create", "orders")
    producing = await start("produce", "orders")
    await producing.write("one\ntwo\nthr")
    watching = await start("tail", "orders", "-f", "-n", "10")
    await watching.until(lambda: watching.out.count(b"\n") == 2 or watching.process.returncode is not None)
    result = await producing.interrupt()
    assert result.code == ExitCode.INTERRUPTED
    assert result.err == "Stopped: 2 messages sent.\n"


async def test_tail_follows(cluster: Cluster, start: Start, run: Run) -> None:
    await run("topic", "create", "orders", "--queues", "2")
    await run("produce", "orders", stdin=numbers(50))
    tailing = await start("tail", "orders", "-f", "--last", "3")
    await tailing.until(lambda: tailing.out.count(b"\n") == 3)
    quiet = await start("tail", "orders", "-f", "--last", "0", "-o", "json")
    # A new queue is followed from its first message; a broker that restarts is followed on.
    await run("topic", "update", "orders", "--read-queues", "4", "--write-queues", "4")
    await run("produce", "orders", stdin="x\n" * 40)
    await tailing.until(lambda: tailing.out.count(b"x\n") == 40)
    await cluster.broker.restart()
    await run("produce", "orders", stdin="y\n")
    await tailing.until(lambda: tailing.out.endswith(b"y\n"))
    result = await tailing.interrupt()
    assert result.code == ExitCode.INTERRUPTED
    assert "Traceback" not in result.err
    lines = (await quiet.interrupt()).lines
    assert {line["body"] for line in lines} <= {"x", "y"}
    assert "kitemq" not in {group["group"] for group in (await run("group", "list", "-o", "json")).json}


async def test_tail_since(cluster: Cluster, run: Run) -> None:
    await run("produce", "orders", stdin="old\n")
    stored = (await run("tail", "orders", "-o", "json")).lines[0]["store_timestamp_ms"]
    assert time.time() * 1000 > stored + 1  # starting the next command takes longer
    await run("produce", "orders", stdin="new\n")
    assert (await run("tail", "orders", "--since", str(stored + 1))).out == "new\n"
    assert (await run("tail", "orders", "--since", str(stored))).out == "old\nnew\n"
    assert (await run("tail", "orders", "--since", "now")).out == ""
    assert (await run("tail", "orders", "--last", "0")).out == ""


@pytest.mark.parametrize("verb", ["tail orders --since 1h", "consume orders --group g --from first"])
async def test_a_reader_that_has_enough(cluster: Cluster, run: Run, verb: str) -> None:
    await run("produce", "orders", stdin=numbers(50_000))
    command = " ".join(f"'{word}'" for word in COMMAND)
    process = await asyncio.create_subprocess_shell(
        f"{command} {verb} | head -n 2; echo codes ${{PIPESTATUS[@]}}",
        executable="/bin/bash",
        env=os.environ | {"KITEMQ_NAMESRV": cluster.namesrv_address},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert out.decode().splitlines()[2:] == ["codes 0 0"]
    assert err == b""


async def test_message_get(cluster: Cluster, run: Run) -> None:
    sent = await run("produce", "orders", "--key", "o-1", "--tag", "paid", "--receipts", stdin="hello\nagain\n")
    receipt = sent.lines[0]
    by_id = await run("message", "get", receipt["message_id"], "-o", "json")
    assert by_id.code == ExitCode.OK, by_id.err
    assert [line["body"] for line in by_id.lines] == ["hello"]
    by_key = await run("message", "get", "--topic", "orders", "--key", "o-1", "-o", "json")
    assert sorted(line["body"] for line in by_key.lines) == ["again", "hello"]
    where = f"orders@{receipt['broker_name']}:{receipt['queue_id']}:{receipt['queue_offset']}"
    by_offset = await run("message", "get", "--offset", where)
    assert by_offset.code == ExitCode.OK, by_offset.err
    facts = dict(line.split("  ", 1) for line in by_offset.out.splitlines() if "  " in line)
    assert facts["message id"].strip() == receipt["message_id"]
    assert facts["tag"].strip() == "paid"
    assert by_offset.out.endswith("\n\nhello\n")


async def test_reset_offset(cluster: Cluster, run: Run) -> None:
    await run("topic", "create", "orders", "--queues", "2")
    await run("produce", "orders", stdin=numbers(20))
    await run("consume", "orders", "--group", "g", "--from", "first", "--count", "20")
    reset = ("group", "reset-offset", "g", "orders")
    dry = await run(*reset, "--to", "first", "--dry-run", "-o", "json")
    assert dry.code == ExitCode.OK, dry.err
    assert (dry.json["group"], dry.json["topic"], dry.json["applied"]) == ("g", "orders", False)
    assert sum(move["old_offset"] - move["new_offset"] for move in dry.json["moves"]) == 20
    assert set(dry.json["moves"][0]) == {"broker_name", "queue_id", "old_offset", "new_offset"}
    assert (await run("consume", "orders", "--group", "g", "--idle", "1s")).out == ""

    asked = await run(*reset, "--to", "first", stdin="n\n")
    assert asked.code == ExitCode.FAILED
    assert asked.out.splitlines()[0].split() == ["BROKER", "QUEUE", "FROM", "TO", "CHANGE"]
    assert "Move the offsets of g in orders?" in asked.err
    agreed = await run(*reset, "--to", "first", stdin="y\n")
    assert agreed.code == ExitCode.OK, agreed.err
    assert len((await run("consume", "orders", "--group", "g", "--count", "20")).out.split()) == 20
    one = await run(*reset, "--offset", "3", "--queue", "broker-a:1", "--yes", "-o", "json")
    assert [(move["queue_id"], move["new_offset"]) for move in one.json["moves"]] == [(1, 3)]
    await run(*reset, "--to", "now", "--yes")
    assert (await run("consume", "orders", "--group", "g", "--idle", "1s")).out == ""
    await run(*reset, "--to", "1h", "--yes")
    await run(*reset, "--to", "last", "--yes")
    described = (await run("group", "describe", "g", "-o", "json")).json
    assert described["lag_messages"] == 0


async def test_reset_while_somebody_reads(cluster: Cluster, start: Start, run: Run) -> None:
    await run("produce", "orders", stdin=numbers(10))
    consuming = await start("consume", "orders", "--group", "g", "--from", "first")
    await consuming.until(lambda: consuming.out.count(b"\n") == 10)
    refused = await run("group", "reset-offset", "g", "orders", "--to", "first", "--yes")
    assert refused.code == ExitCode.FAILED
    assert refused.err.startswith("Error: ")
    forced = await run("group", "reset-offset", "g", "orders", "--to", "first", "--yes", "--force")
    assert forced.code == ExitCode.OK, forced.err
    await consuming.until(lambda: consuming.out.count(b"\n") == 20)


async def test_names_complete(cluster: Cluster, run: Run) -> None:
    await run("topic", "create", "orders")
    await run("topic", "create", "other")
    completed = await run(_KITEMQ_COMPLETE="complete_bash", COMP_WORDS="kitemq topic describe or", COMP_CWORD="3")
    assert completed.out.split() == ["orders"]
    completed = await run(_KITEMQ_COMPLETE="complete_bash", COMP_WORDS="kitemq broker writes br", COMP_CWORD="3")
    assert completed.out.split() == ["broker-a"]
    completed = await run(
        _KITEMQ_COMPLETE="complete_bash", COMP_WORDS="kitemq broker writes broker-a o", COMP_CWORD="4"
    )
    assert completed.out.split() == ["on", "off"]
    nobody = await run(
        _KITEMQ_COMPLETE="complete_bash",
        COMP_WORDS="kitemq topic describe or",
        COMP_CWORD="3",
        KITEMQ_NAMESRV="127.0.0.1:1",
    )
    assert (nobody.out.strip(), nobody.err) == ("", "")


async def test_on_a_terminal(cluster: Cluster) -> None:
    """Progress goes to stderr while it runs, and a message shows when and where it was stored."""
    screen, terminal = os.openpty()
    try:
        for words, stdin in ((("produce", "orders"), numbers(20_000)), (("tail", "orders", "-n", "1"), "")):
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                *words,
                stdin=asyncio.subprocess.PIPE,
                stdout=terminal,
                stderr=terminal,
                env=os.environ | {"KITEMQ_NAMESRV": cluster.namesrv_address, "TERM": "xterm", "COLUMNS": "80"},
            )
            reading = asyncio.create_task(asyncio.to_thread(read_until_end, screen))
            await process.communicate(stdin.encode())
            os.write(terminal, b"END")
            shown = await reading
            assert process.returncode == 0, shown
            if words[0] == "produce":
                assert re.search(r"[\d,]+ sent · [\d,]+/s · .* read", shown), shown
                assert "Sent 20000 messages to orders" in shown
            else:
                assert re.search(r"\x1b\[2m\d\d:\d\d:\d\d\.\d{3} broker-a:\d:\d+\x1b\[0m \d+\r\n", shown), shown
    finally:
        os.close(screen)
        os.close(terminal)


def read_until_end(screen: int) -> str:
    shown = b""
    while not shown.endswith(b"END"):
        shown += os.read(screen, 65_536)
    return shown.removesuffix(b"END").decode()
