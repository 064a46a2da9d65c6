"""Queue choice and fault back-off, time passed in."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from kitemq import MessageQueue
from kitemq.producer.selector import BrokerFaults, RoundRobin, select_by_key, unavailable_ms

QUEUES = [MessageQueue("t", broker, queue_id) for broker in ("a", "b") for queue_id in range(4)]


def test_round_robin_takes_every_queue_once_and_alternates_brokers() -> None:
    turn = RoundRobin(QUEUES, start=3)
    taken = [turn.next(None) for _ in range(8)]
    assert sorted(taken) == sorted(QUEUES)
    assert all(first.broker_name != second.broker_name for first, second in pairwise(taken))


def test_a_broker_that_failed_is_passed_over_while_another_is_there() -> None:
    turn = RoundRobin(QUEUES, start=0)
    assert {turn.next(lambda name: name != "a").broker_name for _ in range(8)} == {"b"}
    assert {turn.next(None, avoid="b").broker_name for _ in range(8)} == {"a"}
    only = RoundRobin(QUEUES[:4], start=0)
    assert only.next(lambda name: False).broker_name == "a"
    assert only.next(None, avoid="a").broker_name == "a"


def test_a_key_has_one_queue_and_keys_spread() -> None:
    assert {select_by_key(QUEUES, "user-7") for _ in range(10)} == {select_by_key(QUEUES, "user-7")}
    spread = Counter(select_by_key(QUEUES, f"user-{number}") for number in range(8000))
    assert min(spread.values()) > 800


@pytest.mark.parametrize(
    ("latency_ms", "penalty_ms"),
    [
        (10, 0),
        (60, 0),
        (100, 0),
        (550, 2000),
        (1799, 2000),
        (1800, 5000),
        (3000, 6000),
        (5000, 10_000),
        (20_000, 30_000),
    ],
)
def test_the_latency_table_is_rocketmqs(latency_ms: float, penalty_ms: int) -> None:
    assert unavailable_ms(latency_ms) == penalty_ms


def test_a_later_shorter_penalty_does_not_shorten() -> None:
    faults = BrokerFaults(latency_enable=True)
    faults.failed("a", now_ms=0)
    faults.answered("a", latency_ms=600, now_ms=1000)
    assert not faults.usable("a", 9_999)
    assert faults.usable("a", 10_000)
    assert not faults


def test_slow_brokers_count_only_when_wanted() -> None:
    faults = BrokerFaults(latency_enable=False)
    faults.answered("a", latency_ms=20_000, now_ms=0)
    assert faults.usable("a", 1)
