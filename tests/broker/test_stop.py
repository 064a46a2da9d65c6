"""How a broker stops, and what it leaves behind of clients that left."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kitemq.proto.v1.broker_pb2 import (
    NO_NEW_MSG,
    HeartbeatRequest,
    NotifyRequest,
    PullMessageRequest,
    SendMessageRequest,
)
from kitemq.proto.v1.message_pb2 import Message
from kitemq_server.broker.pull import WRITING_BYTES_MAX
from kitemq_server.broker.server import BrokerHandle, StoreFailedError
from tests.broker.conftest import Start
from tests.broker.wire import Client, batch, numbered, refused, until
from tests.crash.crash_disk import CrashDisk


async def test_everything_that_waits_is_answered_before_the_broker_is_gone(start: Start) -> None:
    async with start() as handle:
        client = Client(handle.address)
        send, pull = client.send_stream(), client.pull_stream()
        await send.send(batch(numbered("orders", 1, 3)))
        await pull.open("orders", queue_offset=3, suspend_ms=60_000)
        held = client.pull_stream()
        await held.open("orders", 1)
        notify = client.broker.Notify(NotifyRequest(client_id="c"))
        assert (await notify.read()).ready
        unary = asyncio.ensure_future(
            client.broker.PullMessage(PullMessageRequest(topic="orders", queue_id=2, suspend_ms=60_000))
        )
        await until(lambda: len(handle.broker.holds) == 3)
        health = health_pb2_grpc.HealthStub(client.channel)
        check = health_pb2.HealthCheckRequest(service="kitemq.v1.Broker")
        assert (await health.Check(check)).status == health_pb2.HealthCheckResponse.SERVING
        watch = health.Watch(check)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    reply = await pull.read()
    assert (reply.header.status, reply.header.next_offset) == (NO_NEW_MSG, 3)
    assert await pull.call.read() is grpc.aio.EOF
    assert await pull.call.code() is grpc.StatusCode.OK
    assert await held.call.read() is grpc.aio.EOF
    assert await held.call.code() is grpc.StatusCode.OK
    assert (await unary).status == NO_NEW_MSG
    assert (await notify.read()).stopping
    assert await notify.read() is grpc.aio.EOF
    assert await send.call.read() is grpc.aio.EOF
    assert await send.call.code() is grpc.StatusCode.OK
    await client.close()


async def test_a_stream_that_comes_too_late_is_told_so(client: Client, handle: BrokerHandle) -> None:
    handle.broker.stop()
    with refused("BrokerUnavailableError"):
        await client.send_stream().read()
    with refused("BrokerUnavailableError"):
        await client.pull_stream().read()
    notify = client.broker.Notify(NotifyRequest(client_id="c"))
    assert (await notify.read()).ready
    assert (await notify.read()).stopping


async def test_sends_that_wait_for_the_disk_are_answered_on_a_stop(tmp_path: Path, start: Start) -> None:
    disk = CrashDisk(tmp_path)
    async with start(disk=disk, flush_mode="SYNC_FLUSH") as handle:
        client = Client(handle.address)
        send = client.send_stream()
        await send.send(batch(numbered("orders", 1, 1)))
        stall = disk.faults.stall("sync", part="commitlog")
        await send.write(batch(numbered("orders", 2, 1)))
        await until(lambda: handle.broker.sends.waiting_count == 1)
        handle.broker.stop()
        stall.release()
        ((result,),) = (await send.results(1)).values()
        assert result.offsets[0].first_queue_offset == 1
        assert await send.call.read() is grpc.aio.EOF
        await client.close()


async def test_a_broken_disk_ends_the_broker_and_acknowledges_nothing(tmp_path: Path, start: Start) -> None:
    disk = CrashDisk(tmp_path)
    client = None
    with pytest.raises(StoreFailedError):
        async with start(disk=disk, flush_mode="SYNC_FLUSH") as handle:
            client = Client(handle.address)
            send = client.send_stream()
            await send.send(batch(numbered("orders", 1, 1)))
            disk.faults.fail("sync", part="commitlog", error=errno.EIO, count=None)
            await send.write(batch(numbered("orders", 2, 1)))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await send.call.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            await asyncio.Event().wait()
    assert client is not None
    await client.close()


async def test_clients_that_vanish_leave_nothing(client: Client, handle: BrokerHandle) -> None:
    broker = handle.broker
    await client.broker.SendMessage(SendMessageRequest(message=Message(topic="orders", body=b"x"), queue_id=0))
    for round_ in range(3):
        visitors = [Client(handle.address) for _ in range(10)]
        for index, visitor in enumerate(visitors):
            send, pull = visitor.send_stream(), visitor.pull_stream()
            await send.send(batch(numbered("orders", 1, 2, instance=100 + round_ * 10 + index), queue_id=1))
            for queue in range(4):
                await pull.open("orders", queue, filter="none", suspend_ms=60_000)
            assert (await visitor.broker.Notify(NotifyRequest(client_id=f"v{index}")).read()).ready
            await visitor.broker.Heartbeat(HeartbeatRequest(client_id=f"v{index}"))
            asyncio.ensure_future(
                visitor.broker.PullMessage(PullMessageRequest(topic="orders", queue_offset=1, suspend_ms=60_000))
            ).add_done_callback(lambda task: task.cancelled() or task.exception())
        await until(lambda: len(broker.holds) == 50 and broker.pulls.subscription_count == 40)
        for visitor in visitors:
            await visitor.close()
        await until(
            lambda: (
                len(broker.holds) == broker.pulls.subscription_count == broker.sends.stream_count == 0
                and len(broker.pull_streams) == len(broker.membership.hub) == 0
            ),
            what="everything at zero",
        )
    assert broker.sends.waiting_bytes == 0


async def test_a_client_that_does_not_read_stalls_only_itself(client: Client, handle: BrokerHandle) -> None:
    send = client.send_stream()
    body = bytes(1024 * 1024)
    for queue in range(4):
        for n in range(1, 9):
            item = numbered("orders", n, 1)[0]
            item.body = body
            await send.send(batch([item], queue_id=queue, default_topic_queue_count=4))
    lazy = Client(handle.address)
    asleep = lazy.pull_stream()
    for queue in range(4):
        await asleep.open("orders", queue)
    await until(lambda: handle.broker.counts.messages_out > 0)
    pull = client.pull_stream()
    await pull.open("orders", 0, credit_messages=8)
    got = 0
    while got < 8:
        got += len((await pull.read()).messages)
    # What it did not read stays in the log, not in the broker's memory.
    assert handle.broker.counts.messages_out - 8 < 32
    assert handle.broker.pulls.writing_bytes > 0
    # The more of it there is, the smaller are replies.
    handle.broker.pulls.writing_bytes += WRITING_BYTES_MAX
    await pull.open("orders", 1, credit_messages=8)
    assert len((await pull.read()).messages) == 1
    handle.broker.pulls.writing_bytes -= WRITING_BYTES_MAX
    pull.call.cancel()
    await lazy.close()
    await until(lambda: len(handle.broker.pull_streams) == 0)
    assert handle.broker.pulls.writing_bytes == 0
