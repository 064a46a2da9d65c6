"""`kitemq topic …`, `cluster …` and `broker …` on two brokers."""

from __future__ import annotations

import re

from kitemq.cli.session import ExitCode
from tests.cli.conftest import Run
from tests.cluster import Cluster


async def test_a_topic_from_its_creation_to_its_end(cluster: Cluster, run: Run) -> None:
    await cluster.add_broker("broker-b")
    created = await run("topic", "create", "orders", "--queues", "2", "-o", "json")
    assert created.code == ExitCode.OK, created.err
    assert created.json == [
        {
            "broker_name": name,
            "read_queue_count": 2,
            "write_queue_count": 2,
            "permission": "rw",
            "order": False,
            "attributes": {},
            "system": False,
            "topic": "orders",
            "created": True,
        }
        for name in ("broker-a", "broker-b")
    ]
    again = await run("topic", "create", "orders", "--queues", "2", "-o", "json")
    assert (again.code, [one["created"] for one in again.json]) == (ExitCode.OK, [False, False])
    other = await run("topic", "create", "orders", "--queues", "3")
    assert other.code == ExitCode.FAILED
    assert "is there already" in other.err and other.out == ""

    changed = await run(
        *("topic", "update", "orders", "--read-queues", "4", "--write-queues", "3", "--attribute", "message.type=FIFO"),
        *("--broker", "broker-b", "-o", "json"),
    )
    assert changed.code == ExitCode.OK, changed.err
    assert [(one["broker_name"], one["read_queue_count"], one["write_queue_count"]) for one in changed.json] == [
        ("broker-b", 4, 3)
    ]
    listed = await run("topic", "list", "-o", "json")
    assert [(one["topic"], one["read_queue_count"], one["write_queue_count"]) for one in listed.json] == [
        ("orders", 6, 5)
    ]
    assert [one["attributes"] for one in listed.json[0]["brokers"]] == [{}, {"message.type": "FIFO"}]
    system = await run("topic", "list", "--system", "-o", "json")
    assert {"orders", "TBW102"} <= {one["topic"] for one in system.json}
    removed = await run("topic", "update", "orders", "--attribute", "message.type=", "-o", "json")
    assert [one["attributes"] for one in removed.json] == [{}, {}]

    assert (await run("produce", "orders", stdin="a\nb\nc\n")).code == ExitCode.OK
    described = (await run("topic", "describe", "orders", "-o", "json")).json
    assert described["topic"] == "orders"
    assert described["groups"] == []
    assert [(queue["broker_name"], queue["queue_id"]) for queue in described["queues"]] == [
        *(("broker-a", number) for number in range(2)),
        *(("broker-b", number) for number in range(4)),
    ]
    assert sum(queue["max_offset"] - queue["min_offset"] for queue in described["queues"]) == 3
    assert all((queue["last_store_timestamp_ms"] > 0) == (queue["max_offset"] > 0) for queue in described["queues"])

    asked = await run("topic", "delete", "orders", stdin="n\n")
    assert asked.code == ExitCode.FAILED
    assert "Delete topic orders on broker-a, broker-b: 3 messages?" in asked.err
    assert "nothing was done" in asked.err
    agreed = await run("topic", "delete", "orders", stdin="y\n")
    assert agreed.code == ExitCode.OK, agreed.err
    assert "Deleted orders on broker-a, broker-b." in agreed.err
    assert (await run("topic", "list", "-o", "json")).json == []
    assert (await run("topic", "delete", "orders", "--yes")).code == ExitCode.NOT_FOUND


async def test_tables_for_people(cluster: Cluster, run: Run) -> None:
    await run("topic", "create", "orders")
    listed = (await run("topic", "list")).out.splitlines()
    assert listed[0].split() == ["TOPIC", "READ", "QUEUES", "WRITE", "QUEUES", "PERMISSION", "BROKERS"]
    assert listed[1].split() == ["orders", "8", "8", "rw", "broker-a"]
    described = (await run("topic", "describe", "orders")).out
    assert "on broker-a  8 read and 8 write queues, permission rw" in described


async def test_permissions(cluster: Cluster, run: Run) -> None:
    assert (await run("topic", "create", "archive", "--permission", "r")).code == ExitCode.OK
    assert (await run("topic", "list")).out.splitlines()[1].split() == ["archive", "8", "8", "r", "broker-a"]
    changed = await run("topic", "update", "archive", "--permission", "rw", "-o", "json")
    assert changed.json[0]["permission"] == "rw"


async def test_nothing_of_that_name(cluster: Cluster, run: Run) -> None:
    for words in (
        ("topic", "describe", "nothing"),
        ("topic", "update", "nothing", "--permission", "r"),
        ("topic", "delete", "nothing"),
        ("topic", "create", "new", "--broker", "nobody"),
        ("group", "describe", "nobody"),
        ("group", "reset-offset", "nobody", "nothing", "--to", "first"),
        ("broker", "describe", "nobody"),
        ("broker", "describe", "broker-a", "--id", "7"),
        ("broker", "config", "nobody"),
        ("broker", "writes", "nobody", "off"),
        ("consume", "nothing", "--group", "g"),
        ("tail", "nothing"),
        ("message", "get", "00000000000000000000000000000000"),
        ("message", "get", "--topic", "nothing", "--key", "k"),
        ("message", "get", "--offset", "nothing@broker-a:0:0"),
    ):
        result = await run(*words)
        assert (result.code, result.out) == (ExitCode.NOT_FOUND, ""), (words, result)
        assert result.err.startswith("Error: ") and len(result.err.splitlines()) == 1, (words, result)


async def test_cluster_list(cluster: Cluster, run: Run) -> None:
    await cluster.add_broker("broker-b")
    listed = await run("cluster", "list", "-o", "json")
    assert [one["broker_name"] for one in listed.json] == ["broker-a", "broker-b"]
    one = listed.json[0]
    assert set(one) == {
        "cluster_name",
        "broker_name",
        "broker_id",
        "role",
        "epoch",
        "address",
        "addresses",
        "writable",
        "topic_count",
        "boot_id",
        "boot_timestamp_ms",
        "last_heartbeat_timestamp_ms",
        "not_writable_reason",
    }
    assert (one["cluster_name"], one["broker_id"], one["role"], one["writable"]) == (
        "DefaultCluster",
        0,
        "ASYNC_MASTER",
        True,
    )
    assert one["address"] == cluster.broker.address == one["addresses"]["internal"]
    table = (await run("cluster", "list")).out.splitlines()
    assert table[0].split()[:3] == ["CLUSTER", "BROKER", "ID"]
    assert [line.split()[1] for line in table[1:]] == ["broker-a", "broker-b"]


async def test_cluster_list_shows_what_a_producer_would_find(cluster: Cluster, run: Run) -> None:
    await cluster.add_broker("broker-b")
    assert (await run("broker", "config", "broker-b", "--set", "permission=4")).code == ExitCode.OK
    listed = (await run("cluster", "list", "-o", "json")).json
    reason = "the broker's permission does not include write"
    assert [(one["writable"], one["not_writable_reason"]) for one in listed] == [(True, ""), (False, reason)]
    table = (await run("cluster", "list")).out.splitlines()
    assert table[0].split()[-1] == "WRITABLE"
    assert table[1].endswith("  yes") and table[2].endswith(f"  no: {reason}")


async def test_broker_writes(cluster: Cluster, run: Run) -> None:
    await cluster.add_broker("broker-b")
    await run("topic", "create", "orders", "--queues", "1")
    off = await run("broker", "writes", "broker-b", "off", "-o", "json")
    assert off.code == ExitCode.OK, off.err
    assert off.json == {"broker_name": "broker-b", "writable": False, "topic_count": off.json["topic_count"]}
    assert off.json["topic_count"] >= 1
    assert re.fullmatch(r"Writes to broker-b are off: \d+ topics changed\.\n", off.err)
    assert (
        (await run("cluster", "list"))
        .out.splitlines()[2]
        .endswith("  no: writes to it are switched off at the namesrv")
    )
    sent = await run("produce", "orders", "--receipts", stdin="a\nb\nc\nd\n")
    assert {one["broker_name"] for one in sent.lines} == {"broker-a"}
    again = await run("broker", "writes", "broker-b", "off")
    assert (again.code, again.out) == (ExitCode.OK, "")
    assert again.err == "Writes to broker-b are off: 0 topics changed.\n"
    last = await run("broker", "writes", "broker-a", "off")
    assert (last.code, len(last.err.splitlines())) == (ExitCode.OK, 2) and "no other broker" in last.err
    for name in ("broker-a", "broker-b"):
        assert (await run("broker", "writes", name, "on")).code == ExitCode.OK
    listed = (await run("cluster", "list", "-o", "json")).json
    assert [(one["writable"], one["not_writable_reason"]) for one in listed] == [(True, ""), (True, "")]


async def test_broker_describe(cluster: Cluster, run: Run) -> None:
    await run("produce", "orders", stdin="a\nb\n")
    described = (await run("broker", "describe", "broker-a", "-o", "json")).json
    assert described["broker_name"] == "broker-a"
    assert (described["role"], described["writable"], described["flush_mode"]) == ("ASYNC_MASTER", True, "ASYNC_FLUSH")
    assert described["messages_in_total"] == 2
    assert described["written_offset"] >= described["confirm_offset"] > 0
    assert described["disk_total_bytes"] > described["disk_free_bytes"] > 0
    text = (await run("broker", "describe", "broker-a")).out
    assert "broker-a (id 0, ASYNC_MASTER) of DefaultCluster" in text
    assert "2 in, 0 out since start" in text


async def test_broker_config(cluster: Cluster, run: Run) -> None:
    items = {item["key"]: item for item in (await run("broker", "config", "broker-a", "-o", "json")).json}
    assert items["auto_create_topic_enable"] == {
        "key": "auto_create_topic_enable",
        "value": "true",
        "changeable": True,
        "help": items["auto_create_topic_enable"]["help"],
    }
    assert items["data_dir"]["value"] == ""
    changed = await run("broker", "config", "broker-a", "--set", "auto_create_topic_enable=false", "-o", "json")
    assert changed.code == ExitCode.OK, changed.err
    assert [(item["key"], item["value"]) for item in changed.json] == [("auto_create_topic_enable", "false")]
    refused = await run("produce", "new-topic", stdin="a\n")
    assert refused.code == ExitCode.NOT_FOUND
    fixed = await run("broker", "config", "broker-a", "--set", "flush_mode=SYNC_FLUSH")
    assert fixed.code == ExitCode.USAGE and "restart" in fixed.err
    unknown = await run("broker", "config", "broker-a", "--set", "nonsense=1")
    assert unknown.code == ExitCode.USAGE and "nonsense" in unknown.err
