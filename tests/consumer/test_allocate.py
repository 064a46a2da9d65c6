"""The allocation strategies: RocketMQ's examples, and that every queue has exactly one owner."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitemq.consumer import allocate
from kitemq.consumer.allocate import Allocation
from kitemq.message import MessageQueue


def queues(count: int, broker_name: str = "broker-a") -> list[MessageQueue]:
    return [MessageQueue("orders", broker_name, i) for i in range(count)]


def clients(count: int) -> list[str]:
    return [f"client-{i:03}" for i in range(count)]


def ids(share: Sequence[MessageQueue]) -> list[int]:
    return [queue.queue_id for queue in share]


NEARBY = allocate.machine_room_nearby(
    allocate.average, room_of_queue=lambda queue: queue.broker_name.split("@")[0], room_of_client=lambda c: c[-1]
)
WHOLE = {
    "average": allocate.average,
    "average_by_circle": allocate.average_by_circle,
    "consistent_hash": allocate.consistent_hash,
    "machine_room": allocate.machine_room({"0", "1"}),
    "machine_room_nearby": NEARBY,
}


@pytest.mark.parametrize("name", WHOLE)
@given(
    queue_count=st.integers(0, 40),
    client_count=st.integers(1, 25),
    rooms=st.integers(1, 2),
)
def test_every_queue_has_one_owner(name: str, queue_count: int, client_count: int, rooms: int) -> None:
    all_queues = sorted(queue for room in range(rooms) for queue in queues(queue_count, f"{room}@broker"))
    members = clients(client_count)
    shares = [WHOLE[name](member, all_queues, members) for member in members]
    assert sorted(queue for share in shares for queue in share) == all_queues


@pytest.mark.parametrize("strategy", [allocate.average, allocate.average_by_circle])
@given(queue_count=st.integers(0, 200), client_count=st.integers(1, 50))
def test_shares_differ_by_one_at_most(strategy: Allocation, queue_count: int, client_count: int) -> None:
    members = clients(client_count)
    sizes = [len(strategy(member, queues(queue_count), members)) for member in members]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # the first ones get the rest


@pytest.mark.parametrize("name", WHOLE)
def test_who_is_no_member_gets_nothing(name: str) -> None:
    assert WHOLE[name]("stranger", queues(4), clients(2)) == []


@pytest.mark.parametrize(
    ("queue_count", "client_count", "shares"),
    [
        (8, 3, [[0, 1, 2], [3, 4, 5], [6, 7]]),
        (6, 4, [[0, 1], [2, 3], [4], [5]]),
        (2, 3, [[0], [1], []]),
    ],
)
def test_average_gives_blocks(queue_count: int, client_count: int, shares: list[list[int]]) -> None:
    members = clients(client_count)
    assert [ids(allocate.average(member, queues(queue_count), members)) for member in members] == shares


def test_average_by_circle_deals_them_out() -> None:
    members = clients(3)
    shares = [ids(allocate.average_by_circle(member, queues(8), members)) for member in members]
    assert shares == [[0, 3, 6], [1, 4, 7], [2, 5]]


def test_config_is_what_the_user_says() -> None:
    fixed = allocate.by_config([MessageQueue("orders", "broker-a", 1), MessageQueue("orders", "broker-a", 9)])
    assert ids(fixed("anybody", queues(4), ["somebody"])) == [1]


def test_machine_room_reads_its_rooms_only() -> None:
    here = [MessageQueue("orders", "room1@broker-a", i) for i in range(5)]
    there = [MessageQueue("orders", "room2@broker-b", i) for i in range(4)]
    nameless = [MessageQueue("orders", "broker-c", i) for i in range(4)]
    strategy = allocate.machine_room({"room1"})
    members = clients(2)
    shares = [strategy(member, sorted(here + there + nameless), members) for member in members]
    # Blocks of 5 // 2, the one left over to the first.
    assert [ids(share) for share in shares] == [[0, 1, 4], [2, 3]]
    assert {queue.broker_name for share in shares for queue in share} == {"room1@broker-a"}


def test_machine_room_nearby_keeps_queues_in_their_room() -> None:
    all_queues = sorted(queues(4, "a@1") + queues(4, "b@2") + queues(2, "c@3"))
    members = ["one-a", "two-a", "three-b"]
    strategy = allocate.machine_room_nearby(
        allocate.average,
        room_of_queue=lambda queue: queue.broker_name.split("@")[0],
        room_of_client=lambda client_id: client_id[-1],
    )
    shares = {member: strategy(member, all_queues, sorted(members)) for member in members}
    by_room = {member: {(q.broker_name, q.queue_id) for q in share} for member, share in shares.items()}
    assert {("a@1", 0), ("a@1", 1)} <= by_room["one-a"]
    assert {("a@1", 2), ("a@1", 3)} <= by_room["two-a"]
    assert {("b@2", i) for i in range(4)} <= by_room["three-b"]
    assert {queue for share in by_room.values() for queue in share if queue[0] == "c@3"} == {("c@3", 0), ("c@3", 1)}


def test_consistent_hash_moves_few_queues() -> None:
    members = clients(10)
    before = {m: set(allocate.consistent_hash(m, queues(200), members)) for m in members}
    after = {m: set(allocate.consistent_hash(m, queues(200), members[:-1])) for m in members[:-1]}
    assert all(before[member] <= after[member] for member in members[:-1])
