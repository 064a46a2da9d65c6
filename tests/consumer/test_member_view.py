"""Who is in the group, when brokers know different things."""

from __future__ import annotations

from kitemq.consumer.group import RETURN_GRACE_S, MemberView, shares
from kitemq.proto.v1 import broker_pb2


def infos(*client_ids: str) -> dict[str, broker_pb2.ConsumerInfo]:
    return {client_id: broker_pb2.ConsumerInfo(group="g") for client_id in client_ids}


def test_members_are_the_union() -> None:
    view = MemberView()
    view.answered("a", infos("1", "2"))
    view.answered("b", infos("2", "3"))
    assert view.members(0.0).keys() == {"1", "2", "3"}
    view.keep_only(["b"])
    assert view.members(0.0).keys() == {"2", "3"}


def test_a_member_that_leaves_is_gone_at_once() -> None:
    view = MemberView()
    view.reconnected("a", 0.0)
    view.answered("a", infos("1", "2"))
    view.answered("a", infos("1"))
    assert view.members(0.1).keys() == {"1"}
    assert view.next_change_s() is None


def test_a_broker_that_restarted_takes_nobody_out_for_a_while() -> None:
    view = MemberView()
    view.answered("a", infos("1", "2", "3"))
    view.reconnected("a", 100.0)
    view.answered("a", infos("1"))
    assert view.members(100.1).keys() == {"1", "2", "3"}
    assert view.next_change_s() == 100.0 + RETURN_GRACE_S
    view.answered("a", infos("1", "2"))
    assert view.members(100.0 + RETURN_GRACE_S).keys() == {"1", "2"}
    assert view.next_change_s() is None


def test_a_broker_that_restarts_twice_still_takes_nobody_out() -> None:
    view = MemberView()
    view.answered("a", infos("1", "2"))
    view.reconnected("a", 100.0)
    view.answered("a", infos("1"))
    view.reconnected("a", 101.0)
    assert view.members(101.0 + RETURN_GRACE_S - 0.1).keys() == {"1", "2"}


def test_who_shares_a_topic() -> None:
    subscription = broker_pb2.Subscription(topic="orders", filter="*")
    assert shares(broker_pb2.ConsumerInfo(subscriptions=[subscription]), "orders")
    assert not shares(broker_pb2.ConsumerInfo(subscriptions=[subscription]), "bills")
    assert shares(broker_pb2.ConsumerInfo(), "bills")  # a broker that does not tell
    broadcasting = broker_pb2.ConsumerInfo(message_model=broker_pb2.BROADCASTING, subscriptions=[subscription])
    assert not shares(broadcasting, "orders")
