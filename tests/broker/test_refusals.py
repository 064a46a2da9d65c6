"""Each thing that is not allowed is refused with its own error, which says what, where and what to do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from kitemq.errors import BrokerBusyError
from kitemq.proto.v1.admin_pb2 import SetConfigRequest, SetGroupRequest, SetTopicRequest
from kitemq.proto.v1.broker_pb2 import (
    BROADCASTING,
    CommitOffsetsRequest,
    ConsumerInfo,
    GetOffsetsRequest,
    GetQueueOffsetsRequest,
    HeartbeatRequest,
    ListGroupMembersRequest,
    NotifyRequest,
    PullMessageRequest,
    SendMessageRequest,
    SendRequest,
    Subscription,
)
from kitemq.proto.v1.message_pb2 import EpochStarted, GroupConfig, GroupOffset, Message, SystemRecord, TopicConfig
from kitemq_server.broker.server import BrokerHandle
from kitemq_server.broker.streams import StreamLimits
from tests.broker.conftest import Start
from tests.broker.wire import HOLD, Client, batch, message, numbered, refused, until
from tests.crash.crash_disk import CrashDisk


async def set_topic(
    client: Client, name: str = "orders", *, read: int = 4, write: int = 4, permission: int = 6
) -> None:
    topic = TopicConfig(name=name, read_queue_count=read, write_queue_count=write, permission=permission)
    await client.admin.SetTopic(SetTopicRequest(topic=topic))


async def send_error(client: Client, *messages: Message, **fields: Any) -> tuple[str, str]:
    (result,) = await client.send_stream().send(batch(messages or [message("orders")], **fields))
    return result.error.name, result.error.message


async def pull_error(client: Client, topic: str = "orders", queue_id: int = 0, **fields: Any) -> tuple[str, str]:
    pull = client.pull_stream()
    number = await pull.open(topic, queue_id, **fields)
    header = (await pull.read()).header
    assert header.number == number
    return header.error.name, header.error.message


async def test_send_to_a_topic_that_is_not_there_and_not_created(start: Start) -> None:
    async with start(auto_create_topic_enable=False) as handle:
        client = Client(handle.address)
        name, text = await send_error(client)
        assert name == "TopicNotFoundError"
        assert "'broker-a' has no topic 'orders'" in text
        with refused("TopicNotFoundError"):
            await client.broker.SendMessage(SendMessageRequest(message=Message(topic="orders", body=b"x")))
        await client.close()


@pytest.mark.parametrize("topic", ["rmq_sys_mine", "SCHEDULE_TOPIC_XXXX", "a b", "", "x" * 128])
async def test_send_to_a_topic_that_cannot_be(client: Client, topic: str) -> None:
    name, _ = await send_error(client, message(topic))
    assert name in {"TopicNotFoundError", "InvalidMessageError", "InvalidRequestError"}


async def test_a_topic_made_by_a_send_has_the_smaller_number_of_queues(client: Client) -> None:
    send = client.send_stream()
    await send.send(batch([message("few")], default_topic_queue_count=2))
    await send.send(batch([message("many")], default_topic_queue_count=100))
    await send.send(batch([message("plain")]))
    counts = []
    for topic in ("few", "many", "plain"):
        bounds = await client.broker.GetQueueOffsets(GetQueueOffsetsRequest(topic=topic))
        counts.append(len(bounds.queues))
    assert counts == [2, 8, 4]


async def test_queue_ids_and_rights(client: Client, handle: BrokerHandle) -> None:
    await set_topic(client, read=2, write=4)
    name, text = await send_error(client, queue_id=4)
    assert (name, "4 write queues" in text, "no queue 4" in text) == ("InvalidRequestError", True, True)
    name, text = await pull_error(client, queue_id=2)
    assert (name, "2 read queues" in text) == ("InvalidRequestError", True)
    await set_topic(client, permission=4)
    name, text = await send_error(client)
    assert (name, "write permission is missing on topic 'orders'" in text) == ("PermissionDeniedError", True)
    await set_topic(client, permission=2)
    name, text = await pull_error(client)
    assert (name, "read permission is missing on topic 'orders'" in text) == ("PermissionDeniedError", True)
    await set_topic(client, permission=6)
    await client.admin.SetConfig(SetConfigRequest(values={"permission": "4"}))
    name, text = await send_error(client)
    assert (name, "the whole broker" in text, "'broker-a'" in text) == ("PermissionDeniedError", True, True)
    described = [topic.permission for topic in handle.broker.topics.registered() if topic.name == "orders"]
    assert described == [4]
    await client.admin.SetConfig(SetConfigRequest(values={"permission": "2"}))
    name, text = await pull_error(client)
    assert (name, "read permission is missing on the whole broker" in text) == ("PermissionDeniedError", True)


async def test_rights_that_are_taken_end_a_held_pull(client: Client, handle: BrokerHandle) -> None:
    await set_topic(client)
    pull = client.pull_stream()
    await pull.open("orders", suspend_ms=HOLD)
    await until(lambda: len(handle.broker.holds) == 1)
    await set_topic(client, permission=2)
    assert (await pull.read()).header.error.name == "PermissionDeniedError"
    assert handle.broker.pulls.subscription_count == 0


async def test_pulls_that_are_refused(client: Client) -> None:
    assert (await pull_error(client, "nothing"))[0] == "TopicNotFoundError"
    assert (await pull_error(client, "no such name"))[0] == "InvalidRequestError"
    await set_topic(client)
    assert (await pull_error(client, filter="a | b"))[0] == "InvalidRequestError"
    assert (await pull_error(client, group="bad group"))[0] == "InvalidRequestError"
    await client.admin.SetGroup(SetGroupRequest(group=GroupConfig(name="off", consume_enabled=False)))
    name, text = await pull_error(client, group="off")
    assert (name, "switched off for group 'off'" in text) == ("PermissionDeniedError", True)
    with refused("PermissionDeniedError"):
        await client.broker.PullMessage(PullMessageRequest(topic="orders", group="off"))


async def test_groups_that_may_not_come_up_by_themselves(start: Start) -> None:
    async with start(auto_create_group_enable=False) as handle:
        client = Client(handle.address)
        await set_topic(client)
        assert (await pull_error(client, group="g"))[0] == "GroupNotFoundError"
        beat = HeartbeatRequest(client_id="c", consumers=[ConsumerInfo(group="g")])
        with refused("GroupNotFoundError") as refusal:
            await client.broker.Heartbeat(beat)
        assert "'g'" in refusal.text
        assert len(handle.broker.membership.registry) == 0
        with refused("GroupNotFoundError"):
            await client.broker.GetOffsets(GetOffsetsRequest(group="g"))
        await client.admin.SetGroup(SetGroupRequest(group=GroupConfig(name="g", consume_enabled=True)))
        await client.broker.Heartbeat(beat)
        with refused("PermissionDeniedError"):
            beat.consumers[0].message_model = BROADCASTING
            await client.broker.Heartbeat(beat)
        await client.close()


@pytest.mark.parametrize(
    "beat",
    [
        HeartbeatRequest(),
        HeartbeatRequest(client_id="c" * 256),
        HeartbeatRequest(client_id="a\nb"),
        HeartbeatRequest(client_id="c", language="x" * 65),
        HeartbeatRequest(client_id="c", producer_groups=["bad group"]),
        HeartbeatRequest(client_id="c", producer_groups=["g"] * 1001),
        HeartbeatRequest(client_id="c", consumers=[ConsumerInfo(group="DEFAULT_CONSUMER")]),
        HeartbeatRequest(client_id="c", consumers=[ConsumerInfo(group="g"), ConsumerInfo(group="g")]),
        HeartbeatRequest(
            client_id="c", consumers=[ConsumerInfo(group="g", subscriptions=[Subscription(topic="bad topic")])]
        ),
        HeartbeatRequest(
            client_id="c", consumers=[ConsumerInfo(group="g", subscriptions=[Subscription(topic="t", filter="||")])]
        ),
    ],
    ids=lambda beat: str(beat)[:40].replace("\n", " "),
)
async def test_heartbeats_that_say_nonsense(client: Client, handle: BrokerHandle, beat: HeartbeatRequest) -> None:
    with refused("InvalidRequestError"):
        await client.broker.Heartbeat(beat)
    assert len(handle.broker.membership.registry) == 0
    assert not handle.broker.store.groups


async def test_names_in_other_calls(client: Client) -> None:
    with refused("InvalidRequestError"):
        await client.broker.Notify(NotifyRequest()).read()
    with refused("GroupNotFoundError"):
        await client.broker.ListGroupMembers(ListGroupMembersRequest(group="nobody"))
    with refused("TopicNotFoundError"):
        await client.broker.GetQueueOffsets(GetQueueOffsetsRequest(topic="nothing"))


@pytest.mark.parametrize(
    ("offset", "error"),
    [
        (GroupOffset(group="g", topic="orders", queue_id=0, queue_offset=3), "InvalidRequestError"),
        (GroupOffset(group="g", topic="orders", queue_id=4, queue_offset=0), "InvalidRequestError"),
        (GroupOffset(group="g", topic="nothing", queue_id=0, queue_offset=0), "TopicNotFoundError"),
        (GroupOffset(group="bad group", topic="orders", queue_id=0, queue_offset=0), "InvalidRequestError"),
        (GroupOffset(group="g", topic="orders", queue_id=0, deleted=True), "InvalidRequestError"),
    ],
    ids=["beyond the end", "no such queue", "no such topic", "no such name", "the broker's field"],
)
async def test_commits_that_cannot_be(client: Client, offset: GroupOffset, error: str) -> None:
    await set_topic(client)
    await client.send_stream().send(batch(numbered("orders", 1, 2)))
    good = GroupOffset(group="g", topic="orders", queue_id=1, queue_offset=0)
    with refused(error):
        await client.broker.CommitOffsets(CommitOffsetsRequest(client_id="c", offsets=[good, offset]))
    assert not (await client.broker.GetOffsets(GetOffsetsRequest(group="g"))).offsets


async def test_a_unary_send_of_the_brokers_fields(client: Client) -> None:
    item = Message(topic="orders", body=b"x")
    item.system.CopyFrom(SystemRecord(epoch_started=EpochStarted(epoch=5)))
    with refused("InvalidMessageError"):
        await client.broker.SendMessage(SendMessageRequest(message=item))
    with refused("InvalidMessageError"):
        await client.broker.SendMessage(SendMessageRequest(message=Message(topic="orders")))
    with refused("InvalidMessageError"):
        await client.broker.SendMessage(SendMessageRequest())
    with refused("InvalidRequestError"):
        await client.broker.SendMessage(SendMessageRequest(message=Message(topic="orders", body=b"x"), queue_id=99))


async def test_a_request_that_is_none_ends_the_stream(client: Client) -> None:
    for method in ("Send", "Pull"):
        call = client.channel.stream_stream(f"/kitemq.v1.Broker/{method}")()
        await call.write(b"\xff\xff\xff")
        with refused("InvalidRequestError"):
            await call.read()
    with refused("InvalidRequestError"):
        await client.channel.unary_unary("/kitemq.v1.Broker/PullMessage")(b"\xff")


async def test_a_request_with_too_much_in_it(client: Client) -> None:
    send = client.send_stream()
    await send.write(*(batch([message("orders")]) for _ in range(1025)))
    with refused("InvalidRequestError") as refusal:
        await send.read()
    assert "1025 batches" in refusal.text
    many = batch([message("orders")])
    many.sizes.extend([0] * 16_384)
    send = client.send_stream()
    await send.write(many)
    with refused("InvalidRequestError"):
        await send.read()


async def test_replies_that_were_due_come_before_the_error(client: Client) -> None:
    call = client.channel.stream_stream("/kitemq.v1.Broker/Send")()
    await call.write(SendRequest(number=1, batches=[batch([message("orders")])]).SerializeToString())
    await call.write(b"\xff")
    assert isinstance(await call.read(), bytes)
    with refused("InvalidRequestError"):
        await call.read()


async def test_open_pulls_have_a_bound(client: Client, handle: BrokerHandle) -> None:
    await set_topic(client)
    handle.broker.settings.live.held_pull_count_max = 2
    pull = client.pull_stream()
    await pull.open("orders", 0)
    await pull.open("orders", 1)
    await pull.open("orders", 2)
    header = (await pull.read()).header
    assert (header.number, header.error.name, header.error.retry_after_ms > 0) == (3, "BrokerBusyError", True)


async def test_streams_have_bounds_in_all_and_per_connection(client: Client, handle: BrokerHandle) -> None:
    limits = StreamLimits("Send", streams_max=3, per_connection_max=2)
    with limits.open("a"), limits.open("a"), limits.open("b"):
        assert len(limits) == 3
        with pytest.raises(BrokerBusyError, match="3 Send streams"), limits.open("c"):
            pass
    assert len(limits) == 0
    with limits.open("a"), limits.open("a"):
        with pytest.raises(BrokerBusyError, match="this connection has 2"), limits.open("a"):
            pass
        with limits.open("b"):
            pass
    with limits.open("a"), limits.open("a"):
        pass
    # And the broker counts: a stream that ends makes room.
    stream = client.send_stream()
    await stream.send(batch(numbered("orders", 1, 1)))
    assert handle.broker.sends.stream_count == 1
    stream.call.cancel()
    await until(lambda: handle.broker.sends.stream_count == 0)


async def test_a_full_disk_refuses_and_takes_again(tmp_path: Path, start: Start) -> None:
    disk = CrashDisk(tmp_path, capacity_bytes=300 * 1024 * 1024)
    async with start(disk=disk, segment_bytes=5 * 1024 * 1024) as handle:
        client = Client(handle.address)
        send = client.send_stream()
        (result,) = await send.send(batch(numbered("orders", 1, 1)))
        assert not result.HasField("error")
        disk.capacity_bytes -= disk.free_bytes(tmp_path)
        sequence = 2
        while not result.HasField("error"):
            (result,) = await send.send(batch([message("orders", bytes(1024 * 1024), sequence=sequence)]))
            sequence += 1
        assert result.error.name == "StoreFullError"
        assert "broker-a" in result.error.message
        assert str(tmp_path) not in result.error.message
        read = await client.broker.PullMessage(PullMessageRequest(topic="orders", max_count=1))
        assert [item.body for item in read.records] == [b"1"]
        disk.capacity_bytes = 0
        async with asyncio.timeout(20):
            while result.HasField("error"):
                (result,) = await send.send(batch(numbered("orders", sequence - 1, 1), resume=True))
                await asyncio.sleep(0.05)
        await client.close()


async def test_an_unknown_method_is_unimplemented(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await client.channel.unary_unary("/kitemq.v1.Broker/Nothing")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
