"""Members, what they are told, and their offsets."""

from __future__ import annotations

import asyncio

import grpc.aio

from kitemq.proto.v1.admin_pb2 import DeleteTopicRequest, ResetOffsetsRequest, SetTopicRequest
from kitemq.proto.v1.broker_pb2 import (
    CommitOffsetsRequest,
    ConsumerInfo,
    GetOffsetsRequest,
    GetQueueOffsetsRequest,
    HeartbeatRequest,
    ListGroupMembersRequest,
    Notification,
    NotifyRequest,
    Subscription,
    UnregisterRequest,
)
from kitemq.proto.v1.message_pb2 import GroupOffset, TopicConfig
from kitemq_server.broker.server import BrokerHandle
from tests.broker.conftest import Start
from tests.broker.wire import PATIENCE_S, Client, batch, numbered, refused, until


class Listener:
    """One client's Notify stream."""

    def __init__(self, client: Client, client_id: str) -> None:
        self.call = client.broker.Notify(NotifyRequest(client_id=client_id))

    async def next(self) -> Notification:
        async with asyncio.timeout(PATIENCE_S):
            event = await self.call.read()
        assert isinstance(event, Notification)
        return event

    async def ready(self) -> Listener:
        assert (await self.next()).ready
        return self


async def beat(client: Client, client_id: str, group: str = "g", topic: str = "orders") -> None:
    consumer = ConsumerInfo(group=group, subscriptions=[Subscription(topic=topic, filter="*")])
    response = await client.broker.Heartbeat(HeartbeatRequest(client_id=client_id, consumers=[consumer]))
    assert response.broker_timestamp_ms > 1_600_000_000_000


async def members(client: Client, group: str = "g") -> list[str]:
    return list((await client.broker.ListGroupMembers(ListGroupMembersRequest(group=group))).client_ids)


async def test_members_hear_of_each_other(client: Client) -> None:
    first = await Listener(client, "a").ready()
    await beat(client, "a")
    assert (await first.next()).group_changed == "g"
    second = await Listener(client, "b").ready()
    await beat(client, "b")
    assert (await first.next()).group_changed == "g"
    assert (await second.next()).group_changed == "g"
    assert await members(client) == ["a", "b"]
    await beat(client, "b")
    await client.broker.Unregister(UnregisterRequest(client_id="b"))
    assert (await first.next()).group_changed == "g"
    assert await members(client) == ["a"]
    await beat(client, "a", topic="other")
    assert (await first.next()).group_changed == "g"


async def test_a_client_that_vanishes_leaves_its_groups_after_the_grace(start: Start) -> None:
    async with start() as handle:
        handle.broker.membership.lost_grace_ms = 200
        staying, leaving = Client(handle.address), Client(handle.address)
        witness = await Listener(staying, "a").ready()
        await beat(staying, "a")
        assert (await witness.next()).group_changed == "g"
        await Listener(leaving, "b").ready()
        await beat(leaving, "b")
        assert (await witness.next()).group_changed == "g"
        await leaving.close()
        assert (await witness.next()).group_changed == "g"
        assert await members(staying) == ["a"]
        await staying.close()


async def test_a_client_that_comes_back_within_the_grace_never_left(start: Start) -> None:
    async with start() as handle:
        handle.broker.membership.lost_grace_ms = 200
        client = Client(handle.address)
        first = await Listener(client, "a").ready()
        await beat(client, "a")
        first.call.cancel()
        await until(lambda: len(handle.broker.membership.hub) == 0)
        await Listener(client, "a").ready()
        changed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.4, changed.set)
        await changed.wait()
        assert await members(client) == ["a"]
        await client.close()


async def test_a_newer_notify_stream_ends_the_older(client: Client, handle: BrokerHandle) -> None:
    first = await Listener(client, "a").ready()
    await beat(client, "a")
    assert (await first.next()).group_changed == "g"
    second = await Listener(client, "a").ready()
    assert await first.call.read() is grpc.aio.EOF
    await beat(client, "b")
    assert (await second.next()).group_changed == "g"
    assert len(handle.broker.membership.hub) == 1


async def test_offsets_go_forwards_only_and_last(start: Start) -> None:
    async with start() as handle:
        client = Client(handle.address)
        await client.send_stream().send(batch(numbered("orders", 1, 10)))

        async def commit(queue_offset: int, *, durable: bool = False, reset: bool = False) -> int:
            offset = GroupOffset(group="g", topic="orders", queue_id=0, queue_offset=queue_offset, reset=reset)
            await client.broker.CommitOffsets(CommitOffsetsRequest(client_id="c", offsets=[offset], durable=durable))
            (got,) = (await client.broker.GetOffsets(GetOffsetsRequest(group="g", topic="orders"))).offsets
            return int(got.queue_offset)

        assert not (await client.broker.GetOffsets(GetOffsetsRequest(group="g"))).offsets
        assert await commit(5) == 5
        assert await commit(3) == 5
        assert await commit(7, durable=True) == 7
        assert await commit(2, reset=True, durable=True) == 2
        assert await commit(4) == 4
        await client.close()
    async with start() as handle:
        client = Client(handle.address)
        (got,) = (await client.broker.GetOffsets(GetOffsetsRequest(group="g"))).offsets
        assert (got.topic, got.queue_id, got.queue_offset) == ("orders", 0, 4)
        await client.close()


async def test_queue_bounds_and_offsets_by_time(client: Client) -> None:
    (sent,) = await client.send_stream().send(batch(numbered("orders", 1, 3), queue_id=2))
    bounds = await client.broker.GetQueueOffsets(
        GetQueueOffsetsRequest(topic="orders", queue_ids=[2, 2], timestamp_ms=sent.store_timestamp_ms)
    )
    (queue,) = bounds.queues
    assert (queue.queue_id, queue.min_offset, queue.max_offset) == (2, 0, 3)
    assert (queue.last_store_timestamp_ms, queue.offset_at_timestamp) == (sent.store_timestamp_ms, 0)
    later = await client.broker.GetQueueOffsets(
        GetQueueOffsetsRequest(topic="orders", timestamp_ms=sent.store_timestamp_ms + 1)
    )
    assert [(item.queue_id, item.offset_at_timestamp) for item in later.queues] == [(0, 0), (1, 0), (2, 3), (3, 0)]
    with refused("InvalidRequestError"):
        await client.broker.GetQueueOffsets(GetQueueOffsetsRequest(topic="orders", queue_ids=[9]))


async def test_resetting_offsets(client: Client) -> None:
    (sent,) = await client.send_stream().send(batch(numbered("orders", 1, 5)))
    offset = GroupOffset(group="g", topic="orders", queue_id=0, queue_offset=4)
    await client.broker.CommitOffsets(CommitOffsetsRequest(client_id="c", offsets=[offset]))
    reset = ResetOffsetsRequest(group="g", topic="orders", queue_ids=[0], first=True, dry_run=True)
    (move,) = (await client.admin.ResetOffsets(reset)).moves
    assert (move.old_offset, move.new_offset) == (4, 0)
    assert (await client.broker.GetOffsets(GetOffsetsRequest(group="g"))).offsets[0].queue_offset == 4
    reset.dry_run = False
    await client.admin.ResetOffsets(reset)
    assert (await client.broker.GetOffsets(GetOffsetsRequest(group="g"))).offsets[0].queue_offset == 0
    for target, expected in (
        (ResetOffsetsRequest(last=True), [5, 0, 0, 0]),
        (ResetOffsetsRequest(queue_offset=2, queue_ids=[0]), [2]),
        (ResetOffsetsRequest(timestamp_ms=sent.store_timestamp_ms), [0, 0, 0, 0]),
        (ResetOffsetsRequest(timestamp_ms=sent.store_timestamp_ms + 1), [5, 0, 0, 0]),
    ):
        target.group, target.topic = "g", "orders"
        assert [item.new_offset for item in (await client.admin.ResetOffsets(target)).moves] == expected
    with refused("InvalidRequestError"):
        await client.admin.ResetOffsets(ResetOffsetsRequest(group="g", topic="orders", queue_offset=6))
    with refused("InvalidRequestError"):
        await client.admin.ResetOffsets(ResetOffsetsRequest(group="g", topic="orders"))
    with refused("GroupNotFoundError"):
        await client.admin.ResetOffsets(ResetOffsetsRequest(group="nobody", topic="orders", first=True))


async def test_resetting_under_active_members_needs_force_and_tells_them(client: Client) -> None:
    await client.admin.SetTopic(SetTopicRequest(topic=TopicConfig(name="orders")))
    listener = await Listener(client, "a").ready()
    await beat(client, "a")
    assert (await listener.next()).group_changed == "g"
    reset = ResetOffsetsRequest(group="g", topic="orders", first=True)
    with refused("NotAllowedError") as refusal:
        await client.admin.ResetOffsets(reset)
    assert "1 active members" in refusal.text
    reset.force = True
    await client.admin.ResetOffsets(reset)
    assert (await listener.next()).offsets_reset == "g"


async def test_a_deleted_topic_takes_offsets_and_held_pulls_along(client: Client, handle: BrokerHandle) -> None:
    await client.send_stream().send(batch(numbered("orders", 1, 2)))
    offset = GroupOffset(group="g", topic="orders", queue_id=0, queue_offset=1)
    await client.broker.CommitOffsets(CommitOffsetsRequest(client_id="c", offsets=[offset]))
    pull = client.pull_stream()
    await pull.open("orders", queue_offset=2)
    await until(lambda: len(handle.broker.holds) == 1)
    await client.admin.DeleteTopic(DeleteTopicRequest(topic="orders"))
    assert (await pull.read()).header.error.name == "TopicNotFoundError"
    assert not (await client.broker.GetOffsets(GetOffsetsRequest(group="g"))).offsets
    (again,) = await client.send_stream().send(batch(numbered("orders", 1, 1)))
    assert again.offsets[0].first_queue_offset == 0
    assert not again.offsets[0].repeated
