"""The route table as scenarios: time and claims go in, routes and refusals come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, note
from hypothesis import strategies as st

from kitemq.errors import FencedEpochError, NotAllowedError, NotFoundError
from kitemq_server.namesrv import route_table
from kitemq_server.namesrv.route_table import Broker, RouteTable, TopicQueues

ASYNC_MASTER, SLAVE = 0, 2
EXPIRY_MS = 120_000


def broker(broker_id: int = 0, name: str = "a", **values: Any) -> Broker:
    defaults: dict[str, Any] = {
        "cluster_name": "c",
        "role": SLAVE if broker_id else ASYNC_MASTER,
        "epoch": 1,
        "boot_id": f"{name}{broker_id}",
        "boot_timestamp_ms": 100,
        "addresses": {"internal": f"{name}{broker_id}:1"},
    }
    return Broker(broker_name=name, broker_id=broker_id, **(defaults | values))


def queues(count: int, permission: int = 6) -> TopicQueues:
    return TopicQueues(count, count, permission)


def register(
    table: RouteTable, who: Broker, topics: dict[str, TopicQueues], *, version: int = 1, now_ms: int = 0
) -> set[str]:
    return table.register(who, (0, version), topics, expiry_ms=EXPIRY_MS, now_ms=now_ms)


def ids(table: RouteTable, topic: str = "t", name: str = "a") -> list[int]:
    route = table.route(topic)
    return [member.broker_id for member in route.brokers[name]] if route else []


MASTER = broker(0)
SLAVE_1 = broker(1)


@dataclass
class Claim:
    """One row: who is there, who claims, and what becomes of it. ids None: the claim is fenced."""

    name: str
    there: list[Broker]
    claim: Broker
    ids: list[int] | None


CLAIMS = [
    Claim("the first one", [], MASTER, [0]),
    Claim("the same again", [MASTER], MASTER, [0]),
    Claim("a slave joins", [MASTER], SLAVE_1, [0, 1]),
    Claim("a slave without its master", [], SLAVE_1, [1]),
    Claim("a restarted master has a higher epoch", [MASTER], broker(boot_id="n", epoch=2), [0]),
    Claim(
        "a restarted master whose clock was set back",
        [MASTER],
        broker(boot_id="n", epoch=2, boot_timestamp_ms=1),
        [0],
    ),
    Claim(
        "a restarted master with the same epoch at the same address",
        [MASTER],
        broker(boot_id="n", boot_timestamp_ms=1),
        [0],
    ),
    Claim(
        "another machine, same id and epoch, started later",
        [MASTER],
        broker(boot_id="n", boot_timestamp_ms=200, addresses={"internal": "z:1"}),
        [0],
    ),
    Claim(
        "another machine, same id and epoch, started earlier",
        [MASTER],
        broker(boot_id="n", boot_timestamp_ms=50, addresses={"internal": "z:1"}),
        None,
    ),
    Claim(
        "an old master comes back",
        [broker(epoch=5)],
        broker(boot_id="old", epoch=4, boot_timestamp_ms=900, addresses={"internal": "z:1"}),
        None,
    ),
    Claim("a master with an emptied store, same address", [broker(epoch=5)], broker(boot_id="n", epoch=1), None),
    Claim("a master that a slave has outlived", [broker(1, epoch=7)], broker(0, epoch=6), None),
    Claim(
        "a slave is promoted",
        [broker(0, epoch=3), SLAVE_1],
        replace(SLAVE_1, broker_id=0, role=ASYNC_MASTER, epoch=4),
        [0],
    ),
    Claim(
        "a promotion of an older epoch",
        [broker(0, epoch=5), SLAVE_1],
        replace(SLAVE_1, broker_id=0, role=ASYNC_MASTER, epoch=4),
        None,
    ),
    Claim(
        "a master steps down",
        [MASTER],
        replace(MASTER, broker_id=2, role=SLAVE, epoch=2),
        [2],
    ),
    Claim(
        "an overtaken message of a process that has switched",
        [replace(MASTER, broker_id=2, role=SLAVE, epoch=2)],
        replace(MASTER, epoch=1),
        None,
    ),
    Claim(
        "a slave restarts under another id at its address",
        [MASTER, SLAVE_1],
        broker(3, boot_id="n", boot_timestamp_ms=200, addresses=SLAVE_1.addresses),
        [0, 3],
    ),
    Claim(
        "a slave with an emptied store restarts at its address",
        [broker(0, epoch=9), broker(1, epoch=9)],
        broker(1, epoch=0, boot_id="n", boot_timestamp_ms=1),
        [0, 1],
    ),
    Claim("a process moves to another address", [MASTER], replace(MASTER, addresses={"internal": "z:2"}), [0]),
]


@pytest.mark.parametrize("row", CLAIMS, ids=lambda row: row.name)
def test_claims(row: Claim) -> None:
    table = RouteTable()
    for member in row.there:
        register(table, member, {"t": queues(4)})
    before = ids(table)
    if row.ids is None:
        with pytest.raises(FencedEpochError) as refusal:
            register(table, row.claim, {"t": queues(4)})
        assert "epoch" in str(refusal.value)
        assert ids(table) == before
    else:
        register(table, row.claim, {"t": queues(4)})
        assert ids(table) == row.ids
        route = table.route("t")
        assert route is not None
        assert row.claim in route.brokers["a"]


def test_topics_come_from_the_master_then_from_the_lowest_slave() -> None:
    table = RouteTable()
    register(table, broker(2), {"t": queues(2), "two": queues(2)})
    register(table, broker(1), {"t": queues(1)})
    assert table.topics() == ["t"]
    assert register(table, MASTER, {"t": queues(8), "new": queues(8)}) == {"t", "new"}
    route = table.route("t")
    assert route is not None
    assert route.queues["a"] == queues(8)
    assert table.unregister(MASTER) == {"t", "new"}
    route = table.route("t")
    assert route is not None
    assert route.queues["a"] == queues(1)
    assert table.route("new") is None


def test_a_full_registration_replaces_the_topics_and_names_what_changed() -> None:
    table = RouteTable()
    assert register(table, MASTER, {"keep": queues(4), "grow": queues(4), "gone": queues(4)}) == {
        "keep",
        "grow",
        "gone",
    }
    changed = register(table, MASTER, {"keep": queues(4), "grow": queues(8), "new": queues(4)}, version=2)
    assert changed == {"grow", "gone", "new"}
    assert table.topics() == ["grow", "keep", "new"]
    assert register(table, MASTER, {"keep": queues(4), "grow": queues(8), "new": queues(4)}, version=3) == set()


def test_a_registration_that_was_overtaken_changes_no_topics() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(8)}, version=2)
    register(table, MASTER, {"t": queues(4)}, version=1)
    route = table.route("t")
    assert route is not None
    assert route.queues["a"] == queues(8)
    assert not table.heartbeat(MASTER, (0, 2), now_ms=0)


def test_a_restarted_process_may_count_its_versions_from_the_start() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(8)}, version=9)
    register(table, broker(boot_id="n", epoch=2), {"t": queues(4)}, version=1)
    route = table.route("t")
    assert route is not None
    assert route.queues["a"] == queues(4)


HEARTBEATS = [
    ("nothing new", MASTER, 1, False),
    ("topics changed", MASTER, 2, True),
    ("another process", broker(boot_id="n"), 1, True),
    ("another address", replace(MASTER, addresses={"internal": "z:9"}), 1, True),
    ("a higher epoch", replace(MASTER, epoch=2), 1, True),
    ("an unknown broker", broker(7), 1, True),
    ("an unknown group", broker(name="b"), 1, True),
]


@pytest.mark.parametrize(("name", "who", "version", "wanted"), HEARTBEATS, ids=[row[0] for row in HEARTBEATS])
def test_heartbeats(name: str, who: Broker, version: int, wanted: bool) -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(4)})
    assert table.heartbeat(who, (0, version), now_ms=5) is wanted


def test_expiry_is_counted_from_the_last_word() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(4)}, now_ms=0)
    register(table, SLAVE_1, {"t": queues(4)}, now_ms=50_000)
    table.heartbeat(MASTER, (0, 1), now_ms=30_000)
    assert table.expire(now_ms=150_000) == ([], set())
    assert table.expire(now_ms=150_001) == ([MASTER], {"t"})
    assert ids(table) == [1]
    assert table.expire(now_ms=170_001) == ([SLAVE_1], {"t"})
    assert table.route("t") is None
    assert table.topics() == []
    assert list(table.members()) == []


def test_time_that_the_namesrv_slept_is_not_counted() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(4)}, now_ms=0)
    assert table.expire(now_ms=500_000, asleep_ms=490_000) == ([], set())
    assert table.expire(now_ms=490_000 + EXPIRY_MS + 1) == ([MASTER], {"t"})


def test_a_broker_that_named_its_own_expiry() -> None:
    table = RouteTable()
    table.register(MASTER, (0, 1), {}, expiry_ms=2_000, now_ms=0)
    assert table.expire(now_ms=2_001)[0] == [MASTER]


def test_a_goodbye_of_the_process_before_is_late() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(4)})
    register(table, broker(boot_id="n", epoch=2), {"t": queues(4)})
    assert table.unregister(MASTER) == set()
    assert ids(table) == [0]


def test_write_permission_goes_and_comes_back() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(4), "read-only": queues(4, 4), "template": queues(4, 7)})
    register(table, broker(name="b"), {"t": queues(4)})
    assert table.set_writable("a", writable=False) == {"t", "template"}
    assert table.set_writable("a", writable=False) == set()
    permissions = {
        topic: {name: of.permission for name, of in route.queues.items()}
        for topic in table.topics()
        if (route := table.route(topic))
    }
    assert permissions == {"t": {"a": 4, "b": 6}, "read-only": {"a": 4}, "template": {"a": 5}}
    register(table, MASTER, {"t": queues(4)}, version=2)
    route = table.route("t")
    assert route is not None
    assert route.queues["a"].permission == 4, "a registration does not give it back"
    assert table.set_writable("a", writable=True) == {"t"}
    with pytest.raises(NotFoundError):
        table.set_writable("nobody", writable=False)


def test_a_group_that_left_comes_back_writable() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(4)})
    table.set_writable("a", writable=False)
    table.unregister(MASTER)
    register(table, MASTER, {"t": queues(4)})
    route = table.route("t")
    assert route is not None
    assert route.queues["a"].permission == 6


def test_a_name_belongs_to_one_cluster() -> None:
    table = RouteTable()
    register(table, MASTER, {"t": queues(4)})
    with pytest.raises(NotAllowedError, match="belongs to cluster 'c'"):
        register(table, broker(1, cluster_name="other"), {})
    register(table, replace(MASTER, cluster_name="other"), {"t": queues(4)})
    assert table.topics("other") == ["t"]
    assert table.topics("c") == []


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(route_table, "MEMBERS_MAX", 2)
    table = RouteTable()
    register(table, MASTER, {})
    register(table, SLAVE_1, {})
    with pytest.raises(NotAllowedError, match="no room for a/2"):
        register(table, broker(2), {})
    register(table, broker(1, boot_id="n", boot_timestamp_ms=200), {})
    monkeypatch.setattr(route_table, "GROUPS_MAX", 1)
    with pytest.raises(NotAllowedError, match="no room for b/0"):
        register(table, broker(name="b"), {})
    monkeypatch.setattr(route_table, "MEMBERS_MAX", 3)
    register(table, broker(2), {})


def test_addresses_by_listener() -> None:
    one = broker(addresses={"internal": "in:1"})
    two = broker(addresses={"internal": "in:1", "external": "out:1"})
    odd = broker(addresses={"vpn": "v:1", "wan": "w:1"})
    assert [one.address(listener) for listener in ("internal", "external", "")] == ["in:1"] * 3
    assert [two.address(listener) for listener in ("internal", "external", "vpn", "")] == [
        "in:1",
        "out:1",
        "in:1",
        "in:1",
    ]
    assert [odd.address(listener) for listener in ("wan", "internal")] == ["w:1", "v:1"]


_brokers = st.builds(
    lambda broker_id, name, epoch, boot, host: broker(
        broker_id, name, epoch=epoch, boot_id=f"p{boot}", boot_timestamp_ms=boot, addresses={"internal": f"h{host}:1"}
    ),
    st.integers(0, 2),
    st.sampled_from(["a", "b"]),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(0, 3),
)
_topics = st.dictionaries(st.sampled_from(["t", "u", "v"]), st.builds(queues, st.integers(1, 2)), max_size=3)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("register"), _brokers, _topics, st.integers(0, 3)),
        st.tuples(st.just("unregister"), _brokers),
        st.tuples(st.just("heartbeat"), _brokers, st.integers(0, 3)),
        st.tuples(st.just("expire")),
        st.tuples(st.just("writable"), st.sampled_from(["a", "b"]), st.booleans()),
    ),
    max_size=30,
)


@given(_steps)
def test_any_history_leaves_the_table_whole(steps: list[tuple[Any, ...]]) -> None:
    """The reported changes are exactly the routes that differ, and the index by topic is that of the groups."""
    table = RouteTable()
    now_ms = 0
    for step in steps:
        note(str(step))
        now_ms += 50_000
        before = {topic: table.route(topic) for topic in ("t", "u", "v")}
        changed: set[str] = set()
        match step:
            case ("register", who, topics, version):
                try:
                    changed = register(table, who, topics, version=version, now_ms=now_ms)
                except (FencedEpochError, NotAllowedError):
                    changed = set()
            case ("unregister", who):
                changed = table.unregister(who)
            case ("heartbeat", who, version):
                table.heartbeat(who, (0, version), now_ms=now_ms)
            case ("expire",):
                _, changed = table.expire(now_ms=now_ms)
            case ("writable", name, writable):
                try:
                    changed = table.set_writable(name, writable=writable)
                except NotFoundError:
                    changed = set()
        after = {topic: table.route(topic) for topic in ("t", "u", "v")}
        assert {topic for topic in before if before[topic] != after[topic]} <= changed
        assert set(table.topics()) == {topic for topic, route in after.items() if route is not None}
        boots: dict[str, set[str]] = {}
        for member, _ in table.members():
            processes = boots.setdefault(member.broker.broker_name, set())
            assert member.broker.boot_id not in processes, "one process has one id"
            processes.add(member.broker.boot_id)
