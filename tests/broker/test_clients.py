"""Who is registered, who is a member, and what counts as a change."""

from __future__ import annotations

import pytest

from kitemq.errors import BrokerBusyError
from kitemq.proto.v1.broker_pb2 import BROADCASTING, ConsumerInfo, HeartbeatRequest, Subscription
from kitemq_server.broker.clients import EXPIRY_MS, ClientRegistry


def consumer(group: str, *topics: str) -> ConsumerInfo:
    return ConsumerInfo(group=group, subscriptions=[Subscription(topic=topic, filter="*") for topic in topics])


def beat(registry: ClientRegistry, client_id: str, *consumers: ConsumerInfo, now_ms: int = 0) -> set[str]:
    request = HeartbeatRequest(client_id=client_id, consumers=consumers)
    return registry.heartbeat(request, address="ipv4:1.2.3.4:5", now_ms=now_ms, timestamp_ms=now_ms)


@pytest.fixture
def registry() -> ClientRegistry:
    return ClientRegistry(clients_max=3)


def test_joining_changing_and_leaving_are_changes_and_a_repeat_is_none(registry: ClientRegistry) -> None:
    assert beat(registry, "a", consumer("g", "t")) == {"g"}
    assert beat(registry, "a", consumer("g", "t")) == set()
    assert beat(registry, "b", consumer("g", "t"), consumer("h", "t")) == {"g", "h"}
    assert beat(registry, "b", consumer("g", "t", "u"), consumer("h", "t")) == {"g"}
    assert set(registry.members("g")) == {"a", "b"}
    assert registry.subscribers("u") == {"g"}
    assert beat(registry, "b", consumer("g", "t", "u")) == {"h"}
    assert not registry.members("h")
    assert registry.unregister("a") == {"g"}
    assert registry.unregister("a") == set()
    assert set(registry.members("g")) == {"b"}


def test_another_message_model_is_a_change(registry: ClientRegistry) -> None:
    beat(registry, "a", consumer("g", "t"))
    changed = consumer("g", "t")
    changed.message_model = BROADCASTING
    assert beat(registry, "a", changed) == {"g"}


def test_leaving_one_group_keeps_the_client(registry: ClientRegistry) -> None:
    beat(registry, "a", consumer("g"), consumer("h"))
    assert registry.unregister("a", "g") == {"g"}
    assert registry.unregister("a", "g") == set()
    assert set(registry.members("h")) == {"a"}
    assert len(registry) == 1


def test_silence_expires_and_a_heartbeat_does_not(registry: ClientRegistry) -> None:
    beat(registry, "a", consumer("g"))
    beat(registry, "b", consumer("g"), now_ms=1000)
    assert registry.expire(EXPIRY_MS - 1) == set()
    assert registry.expire(EXPIRY_MS) == {"g"}
    assert [client.client_id for client in registry] == ["b"]
    registry.postpone_expiry(5000)
    assert registry.expire(EXPIRY_MS + 1000) == set()


def test_a_broken_connection_expires_after_the_grace_unless_it_is_heard_of(registry: ClientRegistry) -> None:
    for name in ("a", "b", "c"):
        beat(registry, name, consumer("g"))
        assert registry.connection_lost(name, expires_ms=11_000)
    beat(registry, "b", consumer("g"), now_ms=2000)
    registry.connection_back("c", 2000)
    assert registry.expire(10_999) == set()
    assert registry.expire(11_000) == {"g"}
    assert set(registry.members("g")) == {"b", "c"}
    assert not registry.connection_lost("nobody", expires_ms=0)


def test_there_is_a_bound(registry: ClientRegistry) -> None:
    for name in ("a", "b", "c"):
        beat(registry, name)
    with pytest.raises(BrokerBusyError):
        beat(registry, "d")
    beat(registry, "a", now_ms=1)
