"""What operators call."""

from __future__ import annotations

from typing import Any

import pytest

from kitemq.proto.v1 import admin_pb2
from kitemq.proto.v1.broker_pb2 import (
    CommitOffsetsRequest,
    ConsumerInfo,
    HeartbeatRequest,
    SendMessageRequest,
    Subscription,
    UnregisterRequest,
)
from kitemq.proto.v1.message_pb2 import GroupConfig, GroupOffset, Message, TopicConfig
from kitemq_server.broker.server import BrokerHandle
from tests.broker.conftest import Start
from tests.broker.wire import Client, batch, message, numbered, refused


def set_topic(**fields: Any) -> admin_pb2.SetTopicRequest:
    return admin_pb2.SetTopicRequest(topic=TopicConfig(**fields))


async def test_topics_are_created_changed_listed_and_deleted(client: Client) -> None:
    created = await client.admin.SetTopic(set_topic(name="orders", read_queue_count=2, write_queue_count=3))
    assert (created.created, created.topic.permission) == (True, 6)
    again = await client.admin.SetTopic(set_topic(name="orders", read_queue_count=2, write_queue_count=3))
    assert not again.created
    changed = await client.admin.SetTopic(set_topic(name="orders", write_queue_count=2))
    assert (changed.created, changed.topic.read_queue_count, changed.topic.write_queue_count) == (False, 2, 2)
    default = await client.admin.SetTopic(set_topic(name="plain", attributes={"message.type": "FIFO"}))
    assert (default.topic.read_queue_count, default.topic.attributes["message.type"]) == (8, "FIFO")
    kept = await client.admin.SetTopic(set_topic(name="plain", permission=4))
    assert (kept.topic.permission, kept.topic.attributes["message.type"]) == (4, "FIFO")
    same = TopicConfig(name="orders", read_queue_count=2)
    assert not (await client.admin.SetTopic(admin_pb2.SetTopicRequest(topic=same, create_only=True))).created
    same.read_queue_count = 7
    with refused("AlreadyExistsError"):
        await client.admin.SetTopic(admin_pb2.SetTopicRequest(topic=same, create_only=True))
    names = [topic.name for topic in (await client.admin.ListTopics(admin_pb2.ListBrokerTopicsRequest())).topics]
    assert names == ["orders", "plain"]
    everything = await client.admin.ListTopics(admin_pb2.ListBrokerTopicsRequest(include_system=True))
    assert {"TBW102", "BenchmarkTest", "orders", "plain"} == {topic.name for topic in everything.topics}
    await client.admin.DeleteTopic(admin_pb2.DeleteTopicRequest(topic="plain"))
    with refused("TopicNotFoundError"):
        await client.admin.DeleteTopic(admin_pb2.DeleteTopicRequest(topic="plain"))
    with refused("TopicNotFoundError"):
        await client.admin.DescribeTopic(admin_pb2.DescribeTopicRequest(topic="plain"))


@pytest.mark.parametrize(
    "topic",
    [
        {"name": ""},
        {"name": "a b"},
        {"name": "x" * 128},
        {"name": "TBW102"},
        {"name": "rmq_sys_mine"},
        {"name": "t", "system": True},
        {"name": "t", "read_queue_count": 16_385},
        {"name": "t", "write_queue_count": 2**32 - 1},
        {"name": "t", "permission": 8},
        {"name": "t", "permission": 1},
        {"name": "t", "attributes": {"unknown": "1"}},
        {"name": "t", "attributes": {"cleanup.policy": "COMPACTION"}},
    ],
    ids=str,
)
async def test_topics_that_cannot_be(client: Client, topic: dict[str, Any]) -> None:
    with refused("InvalidRequestError"):
        await client.admin.SetTopic(set_topic(**topic))
    assert not (await client.admin.ListTopics(admin_pb2.ListBrokerTopicsRequest())).topics


async def test_a_topic_and_a_group_in_full(client: Client) -> None:
    (sent,) = await client.send_stream().send(batch(numbered("orders", 1, 5)))
    consumer = ConsumerInfo(group="g", subscriptions=[Subscription(topic="orders", filter="*")])
    await client.broker.Heartbeat(
        HeartbeatRequest(client_id="c", language="python", version="1.0", consumers=[consumer])
    )
    offset = GroupOffset(group="h", topic="orders", queue_id=0, queue_offset=2)
    await client.broker.CommitOffsets(CommitOffsetsRequest(client_id="c", offsets=[offset], durable=True))
    topic = await client.admin.DescribeTopic(admin_pb2.DescribeTopicRequest(topic="orders"))
    assert list(topic.groups) == ["g", "h"]
    assert [(queue.queue_id, queue.max_offset) for queue in topic.queues] == [(0, 5), (1, 0), (2, 0), (3, 0)]
    groups = (await client.admin.ListGroups(admin_pb2.ListGroupsRequest())).groups
    assert [(group.group, group.member_count, group.lag_messages) for group in groups] == [("g", 1, 0), ("h", 0, 3)]
    group = await client.admin.DescribeGroup(admin_pb2.DescribeGroupRequest(group="g"))
    (member,) = group.members
    assert (member.client_id, member.language, member.version) == ("c", "python", "1.0")
    assert member.address.startswith("127.0.0.1:")
    assert member.consumer.subscriptions[0].topic == "orders"
    assert member.last_heartbeat_timestamp_ms > 1_600_000_000_000
    assert [queue.HasField("consumer_offset") for queue in group.queues] == [False] * 4
    other = await client.admin.DescribeGroup(admin_pb2.DescribeGroupRequest(group="h"))
    first = other.queues[0]
    assert (first.topic, first.consumer_offset, first.max_offset) == ("orders", 2, 5)
    assert first.oldest_waiting_timestamp_ms == sent.store_timestamp_ms
    assert other.group.retry_max_times == 16


async def test_groups_are_set_and_deleted(client: Client) -> None:
    await client.admin.SetGroup(admin_pb2.SetGroupRequest(group=GroupConfig(name="g", consume_enabled=True)))
    await client.broker.Heartbeat(HeartbeatRequest(client_id="c", consumers=[ConsumerInfo(group="g")]))
    with refused("NotAllowedError") as refusal:
        await client.admin.DeleteGroup(admin_pb2.DeleteGroupRequest(group="g"))
    assert "1 active members" in refusal.text
    await client.broker.Unregister(UnregisterRequest(client_id="c"))
    await client.admin.DeleteGroup(admin_pb2.DeleteGroupRequest(group="g"))
    with refused("GroupNotFoundError"):
        await client.admin.DescribeGroup(admin_pb2.DescribeGroupRequest(group="g"))
    for bad in (GroupConfig(), GroupConfig(name="a b"), GroupConfig(name="g", attributes={"k": "x" * 2000})):
        with refused("InvalidRequestError"):
            await client.admin.SetGroup(admin_pb2.SetGroupRequest(group=bad))


async def test_finding_messages(client: Client) -> None:
    send = client.send_stream()
    await send.send(
        batch([message("orders", b"%d" % n, sequence=n, keys=["all", f"k{n}"]) for n in range(1, 6)], queue_id=1)
    )

    async def query(**by: Any) -> list[bytes]:
        response = await client.admin.QueryMessages(admin_pb2.QueryMessagesRequest(**by))
        return [item.body for item in response.records]

    third = f"{7:016x}{3:016x}"
    assert await query(message_id=third) == [b"3"]
    assert await query(key=admin_pb2.KeyQuery(topic="orders", key="k2")) == [b"2"]
    assert await query(key=admin_pb2.KeyQuery(topic="orders", key="all")) == [b"5", b"4", b"3", b"2", b"1"]
    assert await query(key=admin_pb2.KeyQuery(topic="orders", key="all"), max_count=2) == [b"5", b"4"]
    assert await query(queue=admin_pb2.QueueQuery(topic="orders", queue_id=1, queue_offset=3)) == [b"4"]
    (record,) = (await client.admin.QueryMessages(admin_pb2.QueryMessagesRequest(message_id=third))).records
    assert await query(physical_offset=record.physical_offset) == [b"3"]
    unary = await client.broker.SendMessage(SendMessageRequest(message=Message(topic="orders", body=b"u")))
    assert await query(message_id=unary.message_id) == [b"u"]
    for nothing in (
        {"message_id": "none"},
        {"message_id": ""},
        {"physical_offset": record.physical_offset + 1},
        {"physical_offset": 0},  # a record of the broker's own
        {"physical_offset": 2**63},
        {"queue": admin_pb2.QueueQuery(topic="orders", queue_id=1, queue_offset=99)},
        {"key": admin_pb2.KeyQuery(topic="orders", key="all", end_timestamp_ms=1)},
        {"key": admin_pb2.KeyQuery(topic="orders", key="all", begin_timestamp_ms=2**63)},
    ):
        with refused("MessageNotFoundError"):
            await query(**nothing)
    for bad in (
        {},
        {"message_id": third, "max_count": 65},
        {"key": admin_pb2.KeyQuery(topic="orders")},
        {"key": admin_pb2.KeyQuery(topic="orders", key="k", begin_timestamp_ms=5, end_timestamp_ms=5)},
        {"queue": admin_pb2.QueueQuery(topic="orders", queue_id=99)},
    ):
        with refused("InvalidRequestError"):
            await query(**bad)


async def test_the_broker_about_itself(client: Client, handle: BrokerHandle) -> None:
    await client.send_stream().send(batch(numbered("orders", 1, 5)))
    broker = await client.admin.DescribeBroker(admin_pb2.DescribeBrokerRequest())
    assert (broker.broker.broker_name, broker.broker.cluster_name) == ("broker-a", "DefaultCluster")
    assert broker.broker.addresses["internal"] == handle.address
    assert broker.broker.epoch == 1
    assert (broker.messages_in_total, broker.messages_out_total) == (5, 0)
    assert (broker.writable, broker.not_writable_reason, broker.flush_mode) == (True, "", "ASYNC_FLUSH")
    assert 0 < broker.confirm_offset == broker.written_offset
    assert broker.disk_total_bytes > 0
    assert 0 < broker.earliest_store_timestamp_ms <= broker.broker_timestamp_ms
    assert broker.queue_count == 4
    await client.admin.SetConfig(admin_pb2.SetConfigRequest(values={"permission": "4"}))
    broker = await client.admin.DescribeBroker(admin_pb2.DescribeBrokerRequest())
    assert (broker.writable, "permission" in broker.not_writable_reason) == (False, True)


async def test_configuration_is_shown_without_paths_and_changed_in_part(client: Client, handle: BrokerHandle) -> None:
    items = {item.key: item for item in (await client.admin.GetConfig(admin_pb2.GetConfigRequest())).items}
    assert items["broker_name"].value == "broker-a"
    assert not items["broker_name"].changeable
    assert items["data_dir"].value == ""
    assert items["flush_timeout_ms"].changeable
    assert items["flush_timeout_ms"].help
    values = {"flush_timeout_ms": "700", "auto_create_topic_enable": "false", "in_flight_bytes_max": "64MiB"}
    await client.admin.SetConfig(admin_pb2.SetConfigRequest(values=values))
    items = {item.key: item for item in (await client.admin.GetConfig(admin_pb2.GetConfigRequest())).items}
    assert items["flush_timeout_ms"].value == "700"
    assert items["auto_create_topic_enable"].value == "false"
    assert items["in_flight_bytes_max"].value == str(64 * 1024 * 1024)
    await client.admin.SetConfig(admin_pb2.SetConfigRequest(values={"retention_hours": "5"}))
    assert handle.broker.store.config.retention_hours == 5
    for bad in (
        {"flush_timeout_ms": "x"},
        {"flush_timeout_ms": "1", "permission": "4"},
        {"broker_name": "other"},
        {"no_such_key": "1"},
        {"permission": "99"},
    ):
        with refused("InvalidRequestError") as refusal:
            await client.admin.SetConfig(admin_pb2.SetConfigRequest(values=bad))
        assert next(iter(bad)) in refusal.text
    items = {item.key: item for item in (await client.admin.GetConfig(admin_pb2.GetConfigRequest())).items}
    assert (items["flush_timeout_ms"].value, items["permission"].value) == ("700", "6")


async def test_topics_and_groups_are_there_after_a_restart(start: Start) -> None:
    async with start() as handle:
        client = Client(handle.address)
        await client.admin.SetTopic(set_topic(name="orders", read_queue_count=3, write_queue_count=3))
        await client.admin.SetGroup(admin_pb2.SetGroupRequest(group=GroupConfig(name="g", orderly=True)))
        await client.admin.SetTopic(set_topic(name="gone"))
        await client.admin.DeleteTopic(admin_pb2.DeleteTopicRequest(topic="gone"))
        version = handle.broker.data_version()
        await client.close()
    async with start() as handle:
        client = Client(handle.address)
        topics = (await client.admin.ListTopics(admin_pb2.ListBrokerTopicsRequest())).topics
        assert [(topic.name, topic.read_queue_count) for topic in topics] == [("orders", 3)]
        assert (await client.admin.DescribeGroup(admin_pb2.DescribeGroupRequest(group="g"))).group.orderly
        assert handle.broker.data_version() == version
        assert handle.broker.identity.epoch == 2
        await client.close()
