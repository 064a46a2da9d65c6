"""Order per (topic, queue, producer instance) across refusals, and sends that are stored once."""

from __future__ import annotations

from pathlib import Path

from kitemq.proto.v1.broker_pb2 import FLUSH_DISK_TIMEOUT, SEND_OK, OffsetRun, SendMessageRequest
from kitemq.proto.v1.message_pb2 import Message
from kitemq_server.broker.send import REQUESTS_IN_FLIGHT_MAX
from kitemq_server.broker.server import BrokerHandle
from tests.broker.conftest import Start
from tests.broker.wire import Client, batch, message, numbered, until
from tests.crash.crash_disk import CrashDisk

INSTANCE = 11


async def bodies(client: Client, topic: str, queue_id: int = 0) -> list[bytes]:
    pull = client.pull_stream()
    await pull.open(topic, queue_id, suspend_ms=1)
    found: list[bytes] = []
    while True:
        reply = await pull.read()
        found += reply.bodies
        if not reply.bodies:
            return found


async def test_after_a_refusal_everything_behind_it_is_refused_until_it_is_sent_again(client: Client) -> None:
    send = client.send_stream()
    await send.send(batch(numbered("orders", 1, 1, instance=INSTANCE)))
    bad = numbered("orders", 2, 1, instance=INSTANCE)
    bad[0].body = b""
    # All of these are under way before the first is answered.
    first = await send.write(batch(bad))
    behind = [await send.write(batch(numbered("orders", n, 1, instance=INSTANCE))) for n in (3, 4)]
    other_queue = await send.write(batch(numbered("orders", 1, 1, instance=INSTANCE), queue_id=1))
    other_instance = await send.write(batch(numbered("orders", 1, 1, instance=12)))
    results = await send.results(5)
    assert results[first][0].error.name == "InvalidMessageError"
    assert [results[number][0].error.name for number in behind] == ["OutOfOrderError"] * 2
    assert not results[other_queue][0].HasField("error")
    # The batch could not be read, so whose it was is not known: nobody passes before the queue is resumed.
    assert results[other_instance][0].error.name == "OutOfOrderError"
    again = [await send.write(batch(numbered("orders", n, 1, instance=INSTANCE), resume=n == 2)) for n in (2, 3, 4)]
    results = await send.results(3)
    assert [results[number][0].offsets[0].first_queue_offset for number in again] == [1, 2, 3]
    assert await bodies(client, "orders") == [b"1", b"2", b"3", b"4"]
    assert await bodies(client, "orders", 1) == [b"1"]


async def test_a_refusal_of_one_producer_is_not_anothers(client: Client, handle: BrokerHandle) -> None:
    send = client.send_stream()
    await send.send(batch(numbered("orders", 1, 1, instance=1)), batch(numbered("orders", 1, 1, instance=2)))
    handle.broker.settings.live.in_flight_bytes_max = 0
    (refusal,) = await send.send(batch(numbered("orders", 2, 1, instance=1)))
    assert refusal.error.name == "BrokerBusyError"
    assert refusal.error.retry_after_ms > 0
    handle.broker.settings.live.in_flight_bytes_max = 1 << 30
    (behind,) = await send.send(batch(numbered("orders", 3, 1, instance=1)))
    assert behind.error.name == "OutOfOrderError"
    (other,) = await send.send(batch(numbered("orders", 2, 1, instance=2)))
    assert not other.HasField("error")
    (resumed,) = await send.send(batch(numbered("orders", 2, 2, instance=1), resume=True))
    assert resumed.offsets == [OffsetRun(first_queue_offset=3, count=2)]


async def test_a_refused_batch_does_not_stop_the_others_of_its_request(client: Client) -> None:
    send = client.send_stream()
    await send.send(batch(numbered("orders", 1, 1)))
    bad = message("orders", b"")
    results = await send.send(
        batch(numbered("orders", 2, 1)),
        batch([bad], queue_id=1),
        batch(numbered("orders", 1, 2), queue_id=2),
    )
    assert [result.error.name for result in results] == ["", "InvalidMessageError", ""]
    assert "message 0" in results[1].error.message
    assert await bodies(client, "orders", 1) == []
    assert await bodies(client, "orders", 2) == [b"1", b"2"]


async def test_a_send_whose_reply_was_lost_is_stored_once(start: Start) -> None:
    messages = numbered("orders", 1, 5, instance=INSTANCE)
    async with start() as handle:
        lost = Client(handle.address)
        await lost.send_stream().write(batch(messages))
        await until(lambda: handle.broker.counts.messages_in == 5)
        await lost.close()
        client = Client(handle.address)
        (again,) = await client.send_stream().send(batch(messages, resume=True))
        assert again.offsets == [OffsetRun(first_queue_offset=0, count=5, repeated=True)]
        await client.close()
    async with start() as handle:
        client = Client(handle.address)
        (again,) = await client.send_stream().send(batch(numbered("orders", 4, 4, instance=INSTANCE), resume=True))
        assert again.offsets == [
            OffsetRun(first_queue_offset=3, count=2, repeated=True),
            OffsetRun(first_queue_offset=5, count=2),
        ]
        assert await bodies(client, "orders") == [b"%d" % n for n in range(1, 8)]
        assert handle.broker.counts.messages_in == 2
        await client.close()


async def test_a_unary_send_is_stored_once_by_its_id(start: Start) -> None:
    request = SendMessageRequest(message=Message(topic="orders", body=b"x", message_id="my-id"))
    async with start() as handle:
        client = Client(handle.address)
        first = await client.broker.SendMessage(request)
        again = await client.broker.SendMessage(request)
        assert not first.repeated
        assert again.repeated
        assert (again.queue_id, again.queue_offset) == (first.queue_id, first.queue_offset)
        await client.close()
    async with start() as handle:
        client = Client(handle.address)
        third = await client.broker.SendMessage(request)
        assert (third.repeated, third.queue_id, third.queue_offset) == (True, first.queue_id, first.queue_offset)
        await client.close()


async def test_pending_replies_come_in_order_and_together(tmp_path: Path, start: Start) -> None:
    disk = CrashDisk(tmp_path)
    async with start(disk=disk, flush_mode="SYNC_FLUSH") as handle:
        client = Client(handle.address)
        send = client.send_stream()
        await send.send(batch(numbered("orders", 1, 1)))
        stall = disk.faults.stall("sync", part="commitlog")
        numbers = [await send.write(batch(numbered("orders", n, 1))) for n in range(2, 12)]
        await until(lambda: handle.broker.sends.waiting_count == 10)
        assert handle.broker.sends.waiting_bytes > 0
        # Nothing of it can be read yet.
        queue = handle.broker.store.queue("orders", 0)
        assert queue is not None
        assert queue.max_offset == 1
        stall.release()
        seen: list[int] = []
        while len(seen) < 10:
            seen += [result.number for result in await send.read()]
        assert seen == numbers
        assert handle.broker.sends.waiting_bytes == 0
        await client.close()


async def test_a_disk_that_is_too_slow_gives_a_status_and_not_an_error(tmp_path: Path, start: Start) -> None:
    disk = CrashDisk(tmp_path)
    async with start(disk=disk, flush_mode="SYNC_FLUSH", flush_timeout_ms=100) as handle:
        client = Client(handle.address)
        send = client.send_stream()
        (result,) = await send.send(batch(numbered("orders", 1, 1)))
        assert result.status == SEND_OK
        stall = disk.faults.stall("sync", part="commitlog")
        (result,) = await send.send(batch(numbered("orders", 2, 1)))
        assert (result.status, result.offsets[0].first_queue_offset) == (FLUSH_DISK_TIMEOUT, 1)
        single = await client.broker.SendMessage(
            SendMessageRequest(message=Message(topic="orders", body=b"y"), queue_id=0)
        )
        assert (single.status, single.queue_offset) == (FLUSH_DISK_TIMEOUT, 2)
        stall.release()
        (result,) = await send.send(batch(numbered("orders", 3, 1)))
        assert result.status == SEND_OK
        assert await bodies(client, "orders") == [b"1", b"2", b"y", b"3"]
        await client.close()


async def test_what_waits_for_the_disk_is_bounded(tmp_path: Path, start: Start) -> None:
    disk = CrashDisk(tmp_path)
    async with start(disk=disk, flush_mode="SYNC_FLUSH") as handle:
        client = Client(handle.address)
        send, other = client.send_stream(), client.send_stream()
        await send.send(batch(numbered("orders", 1, 1)))
        stall = disk.faults.stall("sync", part="commitlog")
        # One stream: so many requests are read, the rest stays with the client.
        for n in range(2, REQUESTS_IN_FLIGHT_MAX + 20):
            await send.write(batch(numbered("orders", n, 1)))
        await until(lambda: handle.broker.sends.waiting_count == REQUESTS_IN_FLIGHT_MAX)
        # All streams: over the bound the broker is busy, and says when to come back.
        handle.broker.settings.live.in_flight_bytes_max = handle.broker.sends.waiting_bytes
        (refusal,) = await other.send(batch(numbered("orders", 1, 1), queue_id=1))
        assert (refusal.error.name, refusal.error.retry_after_ms > 0) == ("BrokerBusyError", True)
        stall.release()
        assert len(await send.results(REQUESTS_IN_FLIGHT_MAX + 18)) == REQUESTS_IN_FLIGHT_MAX + 18
        await client.close()


async def test_a_client_that_leaves_takes_its_waiting_bytes_along(tmp_path: Path, start: Start) -> None:
    disk = CrashDisk(tmp_path)
    async with start(disk=disk, flush_mode="SYNC_FLUSH") as handle:
        client = Client(handle.address)
        send = client.send_stream()
        await send.send(batch(numbered("orders", 1, 1)))
        stall = disk.faults.stall("sync", part="commitlog")
        await send.write(batch(numbered("orders", 2, 1)))
        await until(lambda: handle.broker.sends.waiting_bytes > 0)
        await client.close()
        await until(lambda: handle.broker.sends.waiting_bytes == 0 and handle.broker.sends.stream_count == 0)
        stall.release()
