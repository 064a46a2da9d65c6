"""Consumers when brokers die, connections break and history is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from kitemq.consumer import pull_stream
from kitemq.message import MessageQueue, ReceivedMessage
from kitemq.proto.v1 import broker_pb2, broker_pb2_grpc, message_pb2
from tests.cluster import Broker, Cluster
from tests.consumer.helpers import Journal, committed, consuming, numbers, send_to
from tests.crash.crash_disk import CrashDisk
from tests.flaky_proxy import FlakyProxy, flaky_proxy
from tests.waiting import eventually

QUEUE = MessageQueue("far", "broker-far", 0)


@asynccontextmanager
async def behind_proxy(cluster: Cluster, **config: Any) -> AsyncIterator[tuple[Broker, FlakyProxy]]:
    """A broker that clients reach through a proxy only, with a topic "far" of one queue."""
    async with flaky_proxy("") as proxy:
        broker = await cluster.add_broker("broker-far", advertise=proxy.address, **config)
        proxy.target = broker.address
        await broker.create_topic("far", queues=1)
        yield broker, proxy


async def send_past_proxy(broker: Broker, bodies: list[str]) -> None:
    async with grpc.aio.insecure_channel(broker.address) as channel:
        stub = broker_pb2_grpc.BrokerStub(channel)
        for body in bodies:
            message = message_pb2.Message(topic="far", body=body.encode())
            await stub.SendMessage(broker_pb2.SendMessageRequest(message=message))


async def commit_past_proxy(broker: Broker, queue_offset: int, *, last_epoch: int) -> None:
    async with grpc.aio.insecure_channel(broker.address) as channel:
        offset = message_pb2.GroupOffset(group="billing", topic="far", queue_id=0, queue_offset=queue_offset)
        request = broker_pb2.CommitOffsetsRequest(client_id="tests", offsets=[offset], last_epochs=[last_epoch])
        await broker_pb2_grpc.BrokerStub(channel).CommitOffsets(request)


async def test_cut_connections_lose_and_repeat_nothing(cluster: Cluster) -> None:
    journal = Journal()

    def handled(count: int) -> bool:
        return len(journal.messages) > count

    async with behind_proxy(cluster) as (_, proxy):
        async with consuming(cluster, journal, topic="far", prefetch_messages=20):
            for sent in range(0, 500, 100):
                await send_to(cluster, QUEUE, numbers(sent, sent + 100))
                await eventually(partial(handled, sent + 50))
                proxy.cut()
            await eventually(lambda: len(journal.messages) == 500)
            # A queue that was not given up goes on where it was.
            assert journal.bodies == numbers(0, 500)
        await cluster.brokers[1].stop()


async def test_a_broker_that_falls_silent_is_left_and_found_again(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal()
    async with behind_proxy(cluster) as (broker, proxy):
        async with consuming(cluster, journal, topic="far", commit_interval_s=0.05):
            await send_to(cluster, QUEUE, numbers(0, 10))
            await eventually(lambda: len(journal.messages) == 10)
            proxy.drop_replies = True
            await send_past_proxy(broker, numbers(10, 20))
            await eventually(lambda: proxy.dropped_bytes > 0)
            await proxy.stop()
            proxy.drop_replies = False
            await proxy.start()
            await eventually(lambda: len(journal.messages) == 20)
            assert journal.bodies == numbers(0, 20)
            await eventually(lambda: committed(broker, "billing", "far") == {0: 20})
        await broker.stop()


async def test_a_commit_that_fails_is_repeated(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    gate = asyncio.Event()
    begun: list[str] = []
    handled: list[str] = []

    async def handle(message: ReceivedMessage) -> None:
        begun.append(message.body.decode())
        await gate.wait()
        handled.append(message.body.decode())

    async with behind_proxy(cluster) as (broker, proxy):
        async with consuming(cluster, handle, topic="far", commit_interval_s=0.05):
            await send_to(cluster, QUEUE, numbers(0, 5))
            await eventually(lambda: len(begun) == 5)
            assert committed(broker, "billing", "far") == {0: 0}
            await proxy.stop()
            gate.set()
            await eventually(lambda: len(handled) == 5 and "commit failed, will be repeated" in caplog.text)
            await proxy.start()
            await eventually(lambda: committed(broker, "billing", "far") == {0: 5})
        await broker.stop()


async def test_stopping_without_a_broker_does_not_hang(cluster: Cluster) -> None:
    """What was handled and could not be committed comes again."""
    await cluster.broker.create_topic("orders", queues=1)
    queue = MessageQueue("orders", "broker-a", 0)
    await send_to(cluster, queue, numbers(0, 5))
    journal, again = Journal(), Journal()
    async with consuming(cluster, journal):
        await eventually(lambda: len(journal.messages) == 5)
        await cluster.broker.stop()
    await cluster.broker.start()
    async with consuming(cluster, again):
        await eventually(lambda: again.bodies == numbers(0, 5))


@pytest.mark.parametrize("rewritten", [False, True], ids=["cut off", "cut off and written anew"])
async def test_history_that_a_crash_took(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, rewritten: bool
) -> None:
    """ASYNC_FLUSH: three messages that were read were not on the disk. What is stored in their place is not skipped."""
    disk = CrashDisk(tmp_path / "broker-far")
    journal = Journal()
    async with behind_proxy(cluster, disk=disk) as (broker, proxy):
        async with consuming(cluster, journal, topic="far", commit_interval_s=0.05):
            await send_past_proxy(broker, numbers(0, 3))
            await eventually(lambda: committed(broker, "billing", "far") == {0: 3})
            await eventually(lambda: broker.store.flushed_offset == broker.store.written_offset)
            after_power_loss = disk.copy()
            await send_past_proxy(broker, numbers(3, 6))
            await eventually(lambda: len(journal.messages) == 6)
            await proxy.stop()
            await broker.stop()
            broker.disk = after_power_loss
            await broker.start()
            assert broker.store.queue("far", 0).max_offset == 3
            if rewritten:
                await send_past_proxy(broker, ["a", "b", "c", "d", "e"])
                # Had it connected, it would have committed six messages, three of which are other ones now.
                with pytest.raises(grpc.aio.AioRpcError, match="lost in a crash: begin again at offset 3"):
                    await commit_past_proxy(broker, 6, last_epoch=journal.messages[-1].epoch)
                assert committed(broker, "billing", "far")[0] <= 3
                await proxy.start()
            else:
                await proxy.start()
                await eventually(lambda: "from=6 to=3" in caplog.text)
                await send_past_proxy(broker, ["a", "b", "c", "d", "e"])
            await eventually(lambda: journal.bodies[6:] == ["a", "b", "c", "d", "e"])
            await eventually(lambda: committed(broker, "billing", "far") == {0: 8})
        assert not rewritten or "history was cut queue=far@broker-far:0 from=6 to=3" in caplog.text
        await broker.stop()


async def test_consumption_switched_off_and_on_again(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_stream, "REFUSED_RETRY_S", 0.05)
    await cluster.broker.create_topic("orders", queues=1)
    queue = MessageQueue("orders", "broker-a", 0)
    journal = Journal()
    async with consuming(cluster, journal):
        await send_to(cluster, queue, ["a"])
        await eventually(lambda: journal.bodies == ["a"])
        await cluster.broker.set_group("billing", consume_enabled=False)
        await send_to(cluster, queue, ["b"])
        await eventually(lambda: "pull refused queue=orders@broker-a:0" in caplog.text)
        assert journal.bodies == ["a"]
        await cluster.broker.set_group("billing", consume_enabled=True)
        await eventually(lambda: journal.bodies == ["a", "b"])


async def test_no_namesrv_yet(cluster: Cluster) -> None:
    """A consumer may start before everything else."""
    await cluster.broker.create_topic("orders", queues=1)
    queue = MessageQueue("orders", "broker-a", 0)
    await send_to(cluster, queue, ["a"])
    await cluster.namesrv.stop()
    journal = Journal()
    async with consuming(cluster, journal) as consumer:
        assert consumer.held_queues() == []
        await cluster.namesrv.start()
        await cluster.broker.restart()  # it registers at once
        await eventually(lambda: journal.bodies == ["a"])


def test_a_reply_that_is_none_is_seen() -> None:
    whole = broker_pb2.PullResponse(number=1, header_bytes=7).SerializeToString()
    header, records_bytes = pull_stream.split_reply(whole)
    assert (header.number, records_bytes) == (1, 0)
    for damaged in (b"", whole[:-1], whole[:-4] + b"\xff\xff\xff\x7f", b"xxxx" + whole, whole[:-4] + b"\x06\0\0\0"):
        with pytest.raises(ValueError):
            pull_stream.split_reply(damaged)
