"""AdminClient against real brokers: what several of them say, added up."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

import kitemq
from kitemq.admin import AdminClient, permission_text
from kitemq.message import MessageQueue
from tests.cluster import Cluster


@pytest_asyncio.fixture
async def admin(cluster: Cluster) -> AsyncIterator[AdminClient]:
    await cluster.add_broker("broker-b")
    async with AdminClient(cluster.namesrv_address) as client:
        yield client


async def send(cluster: Cluster, topic: str, queue: MessageQueue, *bodies: bytes, key: str = "k") -> None:
    async with kitemq.Producer(cluster.namesrv_address, group="p") as producer:
        for body in bodies:
            await producer.send(kitemq.Message(topic, body, keys=[key]), queue=queue)


async def test_topics_of_two_brokers(admin: AdminClient) -> None:
    changes = await admin.create_topic("orders", queue_count=2, attributes={"message.type": "NORMAL"})
    assert [(one.settings.broker_name, one.created) for one in changes] == [("broker-a", True), ("broker-b", True)]
    await admin.create_topic("one-sided", queue_count=3, brokers=["broker-b"])
    summaries = {one.topic: one for one in await admin.list_topics()}
    assert sorted(summaries) == ["one-sided", "orders"]
    assert summaries["orders"].write_queue_count == 4
    assert [one.broker_name for one in summaries["one-sided"].settings] == ["broker-b"]
    described = await admin.describe_topic("one-sided")
    assert [one.queue for one in described.queues] == [MessageQueue("one-sided", "broker-b", n) for n in range(3)]
    changes = await admin.update_topic("orders", read_queue_count=5, permission=4, order=True)
    assert {(one.settings.read_queue_count, one.settings.permission, one.settings.order) for one in changes} == {
        (5, 4, True)
    }
    assert all(one.settings.attributes == {"message.type": "NORMAL"} for one in changes)
    assert await admin.delete_topic("one-sided") == ["broker-b"]
    with pytest.raises(kitemq.TopicNotFoundError, match="kitemq topic create one-sided"):
        await admin.describe_topic("one-sided")
    with pytest.raises(kitemq.NotFoundError, match="no master broker-c"):
        await admin.create_topic("more", brokers=["broker-a", "broker-c"])


async def test_messages_are_found_on_all_brokers(cluster: Cluster, admin: AdminClient) -> None:
    await admin.create_topic("orders", queue_count=1)
    queues = [state.queue for state in await admin.list_queues("orders")]
    assert [queue.broker_name for queue in queues] == ["broker-a", "broker-b"]
    for queue in queues:
        await send(cluster, "orders", queue, b"x" + queue.broker_name.encode(), b"y")
    found = await admin.find_by_key("orders", "k")
    assert len(found) == 4
    assert [one.store_timestamp_ms for one in found] == sorted((one.store_timestamp_ms for one in found), reverse=True)
    assert len(await admin.find_by_key("orders", "k", max_count=3)) == 3
    oldest = found[-1]
    (by_id,) = await admin.find_by_id(oldest.message_id)
    at = await admin.find_at(oldest.queue, oldest.queue_offset)
    assert by_id.body == at.body == oldest.body
    assert by_id.queue == at.queue == oldest.queue
    with pytest.raises(kitemq.MessageNotFoundError):
        await admin.find_by_key("orders", "other")
    with pytest.raises(kitemq.MessageNotFoundError):
        await admin.find_by_key("orders", "k", end_timestamp_ms=1)
    with pytest.raises(kitemq.NotFoundError, match="no broker broker-z"):
        await admin.find_at(MessageQueue("orders", "broker-z", 0), 0)
    later = await admin.list_queues("orders", timestamp_ms=found[0].store_timestamp_ms + 1)
    assert [state.offset_at_timestamp for state in later] == [2, 2]
    earlier = await admin.list_queues("orders", timestamp_ms=0)
    assert [state.offset_at_timestamp for state in earlier] == [0, 0]


async def test_a_group_over_two_brokers(cluster: Cluster, admin: AdminClient) -> None:
    await admin.create_topic("orders", queue_count=1)
    queues = [state.queue for state in await admin.list_queues("orders")]
    for queue in queues:
        await send(cluster, "orders", queue, b"1", b"2", b"3")
    async with kitemq.PullConsumer(
        cluster.namesrv_address, group="g", from_where=kitemq.Position.FIRST, auto_commit=False
    ) as consumer:
        await consumer.subscribe("orders", filter="*")
        count = 0
        while count < 6:
            count += len(await consumer.poll(max_count=6))
        described = await admin.describe_group("g")
        assert [member.client_id for member in described.members] == [consumer.client_id]
        assert described.members[0].subscriptions == {"orders": "*"}
        assert described.lag_messages == 6
        await consumer.commit()
        described = await admin.describe_group("g")
        assert [(one.queue, one.consumer_offset) for one in described.queues] == [(queue, 3) for queue in queues]
        (summary,) = await admin.list_groups()
        assert (summary.group, summary.member_count, summary.lag_messages) == ("g", 1, 0)
        with pytest.raises(kitemq.NotAllowedError):
            await admin.delete_group("g")
    moves = await admin.reset_offsets("g", "orders", queue_offset=1, queues=[queues[1]])
    assert [(move.queue, move.old_offset, move.new_offset) for move in moves] == [(queues[1], 3, 1)]
    moves = await admin.reset_offsets("g", "orders", first=True, dry_run=True)
    assert [(move.old_offset, move.new_offset) for move in moves] == [(3, 0), (1, 0)]
    assert (await admin.describe_group("g")).lag_messages == 2
    await admin.set_group("g", consume_enabled=False)
    assert not (await admin.describe_group("g")).consume_enabled
    await admin.delete_group("g")
    with pytest.raises(kitemq.GroupNotFoundError):
        await admin.delete_group("g")
    for arguments in ({}, {"first": True, "last": True}, {"first": True, "queue_offset": 0}):
        with pytest.raises(kitemq.InvalidRequestError, match="exactly one"):
            await admin.reset_offsets("g", "orders", **arguments)


async def test_write_permission_drains_a_broker(cluster: Cluster, admin: AdminClient) -> None:
    await admin.create_topic("orders", queue_count=1)
    assert await admin.set_write_permission("broker-b", writable=False) >= 1
    assert [one.writable for one in await admin.list_brokers()] == [True, False]
    async with kitemq.Producer(cluster.namesrv_address, group="p") as producer:
        receipts = [await producer.send(kitemq.Message("orders", b"x")) for _ in range(4)]
    assert {receipt.queue.broker_name for receipt in receipts} == {"broker-a"}
    assert await admin.set_write_permission("broker-b", writable=True) >= 1
    assert [one.writable for one in await admin.list_brokers()] == [True, True]


async def test_key_values(admin: AdminClient) -> None:
    await admin.put_key_value("space", "b", "2")
    await admin.put_key_value("space", "a", "1")
    assert await admin.get_key_value("space", "a") == "1"
    assert await admin.list_key_values("space") == {"a": "1", "b": "2"}
    await admin.delete_key_value("space", "a")
    with pytest.raises(kitemq.NotFoundError):
        await admin.get_key_value("space", "a")
    await admin.set_order_config("orders", {"broker-b": 2, "broker-a": 4})
    assert await admin.get_key_value("ORDER_TOPIC_CONFIG", "orders") == "broker-a:4;broker-b:2"
    await admin.set_order_config("orders", {})
    assert await admin.list_key_values("ORDER_TOPIC_CONFIG") == {}


async def test_brokers_and_their_settings(cluster: Cluster, admin: AdminClient) -> None:
    described = await admin.describe_broker("broker-a")
    assert (described.broker_name, described.broker_id, described.writable) == ("broker-a", 0, True)
    assert described.addresses == {"internal": cluster.broker.address}
    await admin.set_config("broker-a", {"flush_timeout_ms": "1000"})
    items = {item.key: item for item in await admin.get_config("broker-a")}
    assert items["flush_timeout_ms"].value == "1000"
    with pytest.raises(kitemq.InvalidRequestError, match="flush_timeout_ms"):
        await admin.set_config("broker-a", {"flush_timeout_ms": "soon"})
    with pytest.raises(kitemq.NotFoundError, match="broker-a with id 3; it knows broker-a, broker-b"):
        await admin.get_config("broker-a", 3)


async def test_writes_need_every_namesrv_and_say_which_have_it(cluster: Cluster) -> None:
    async with AdminClient([cluster.namesrv_address, "127.0.0.1:1"]) as admin:
        await admin.list_brokers()  # the first that answers
        with pytest.raises(kitemq.BrokerUnavailableError, match=f"done on {cluster.namesrv_address}"):
            await admin.put_key_value("space", "a", "1")
        assert await admin.list_key_values("space") == {"a": "1"}


async def test_a_client_that_is_not_open(cluster: Cluster) -> None:
    client = AdminClient(cluster.namesrv_address)
    with pytest.raises(kitemq.ClientClosedError, match="async with"):
        await client.list_brokers()
    async with client:
        assert len(await client.list_brokers()) == 1
    with pytest.raises(kitemq.ClientClosedError):
        await client.list_brokers()
    with pytest.raises(kitemq.InvalidRequestError, match="not host:port"):
        AdminClient("nowhere")


async def test_a_cluster_without_brokers(cluster: Cluster) -> None:
    await cluster.broker.stop()
    async with AdminClient(cluster.namesrv_address) as admin:
        assert await admin.list_brokers() == []
        with pytest.raises(kitemq.BrokerUnavailableError, match="no broker is registered"):
            await admin.list_topics()
        with pytest.raises(kitemq.BrokerUnavailableError, match="no broker is registered"):
            await admin.create_topic("orders")


def test_permissions_in_words() -> None:
    assert [permission_text(bits) for bits in (0, 2, 4, 6, 7)] == ["-", "w", "r", "rw", "rw+inherit"]
