"""What is sent is stored in order, and what is stored is read as it is."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest

from kitemq.proto.v1.broker_pb2 import (
    FOUND,
    NO_MATCHED_MSG,
    NO_NEW_MSG,
    OFFSET_ILLEGAL,
    SEND_OK,
    OffsetRun,
    PullMessageRequest,
    SendMessageRequest,
)
from kitemq.proto.v1.message_pb2 import Message
from kitemq_server.broker.server import BrokerHandle
from tests.broker.conftest import Start
from tests.broker.wire import Client, batch, message, numbered, refused, until
from tests.crash.crash_disk import CrashDisk


@pytest.mark.parametrize("flush_mode", ["ASYNC_FLUSH", "SYNC_FLUSH"])
async def test_a_batch_is_stored_and_pulled(start: Start, flush_mode: str) -> None:
    async with start(flush_mode=flush_mode) as handle:
        client = Client(handle.address)
        send, pull = client.send_stream(), client.pull_stream()
        (result,) = await send.send(batch(numbered("orders", 1, 3)))
        assert not result.HasField("error")
        assert result.status == SEND_OK
        assert list(result.offsets) == [OffsetRun(first_queue_offset=0, count=3)]
        assert result.store_timestamp_ms > 0
        number = await pull.open("orders", group="g")
        reply = await pull.read()
        assert (reply.header.number, reply.header.status) == (number, FOUND)
        assert reply.bodies == [b"1", b"2", b"3"]
        assert (reply.header.first_queue_offset, reply.header.next_offset, reply.header.max_offset) == (0, 3, 3)
        assert reply.header.last_epoch == reply.messages[-1].epoch == handle.broker.store.epoch
        assert not reply.header.sparse
        await client.close()


async def test_several_queues_and_requests_in_one_stream(client: Client) -> None:
    send = client.send_stream()
    numbers = []
    for index in range(20):
        numbers.append(
            await send.write(*(batch(numbered("orders", index * 5 + 1, 5), queue_id=queue) for queue in range(4)))
        )
    results = await send.results(20)
    for index, number in enumerate(numbers):
        assert [list(result.offsets) for result in results[number]] == [
            [OffsetRun(first_queue_offset=index * 5, count=5)]
        ] * 4


async def test_credit_bounds_what_is_sent(client: Client) -> None:
    send, pull = client.send_stream(), client.pull_stream()
    await send.send(batch(numbered("orders", 1, 100)))
    number = await pull.open("orders", credit_messages=10)
    assert (await pull.read()).bodies == [b"%d" % n for n in range(1, 11)]
    await pull.write(number=number, credit_messages=5)
    assert (await pull.read()).bodies == [b"%d" % n for n in range(11, 16)]
    # Bytes: at least one record, and the last may overrun what is left.
    await pull.write(number=number, close=True)
    number = await pull.open("orders", credit_bytes=1)
    assert (await pull.read()).bodies == [b"1"]
    await pull.write(number=number, credit_bytes=2000)
    reply = await pull.read()
    assert reply.bodies[0] == b"2"
    assert 1 <= len(reply.bodies) < 20


async def test_replies_are_bounded_and_fair(client: Client) -> None:
    send, pull = client.send_stream(), client.pull_stream()
    for queue in range(3):
        await send.send(batch([message("orders", b"x" * 1000, sequence=n) for n in range(1, 41)], queue_id=queue))
    for queue in range(3):
        await pull.open("orders", queue, reply_bytes_max=10_000)
    order = [(await pull.read()).header.number for _ in range(9)]
    assert sorted(order[-6:]) == [1, 1, 2, 2, 3, 3]


async def test_a_held_pull_is_woken_by_what_is_confirmed(client: Client, handle: BrokerHandle) -> None:
    send, pull = client.send_stream(), client.pull_stream()
    await send.send(batch(numbered("orders", 1, 1)))
    await pull.open("orders", queue_offset=1)
    await until(lambda: len(handle.broker.holds) == 1)
    await send.send(batch(numbered("orders", 2, 2)))
    assert (await pull.read()).bodies == [b"2", b"3"]
    await until(lambda: len(handle.broker.holds) == 1)


async def test_without_news_a_pull_ends_when_its_time_is_up(client: Client, handle: BrokerHandle) -> None:
    send, pull = client.send_stream(), client.pull_stream()
    await send.send(batch(numbered("orders", 1, 2)))
    number = await pull.open("orders", queue_offset=2, suspend_ms=50)
    reply = await pull.read()
    assert (reply.header.number, reply.header.status, reply.header.next_offset) == (number, NO_NEW_MSG, 2)
    assert handle.broker.pulls.subscription_count == 0
    # Its number is free, and credit for it comes too late to matter.
    await pull.write(number=number, credit_messages=1)
    await pull.write(number=number, topic="orders", credit_messages=1, credit_bytes=100)
    assert (await pull.read()).bodies == [b"1"]


@pytest.mark.parametrize(("offset", "corrected"), [(3, 2), (2**63, 2)])
async def test_an_offset_that_is_not_there_is_corrected(client: Client, offset: int, corrected: int) -> None:
    send, pull = client.send_stream(), client.pull_stream()
    await send.send(batch(numbered("orders", 1, 2)))
    await pull.open("orders", queue_offset=offset)
    reply = await pull.read()
    assert (reply.header.status, reply.header.next_offset) == (OFFSET_ILLEGAL, corrected)


async def test_a_filter_lets_its_tags_pass(client: Client) -> None:
    send, pull = client.send_stream(), client.pull_stream()
    tags = ["a", "b", "", "a", "c"]
    await send.send(
        batch([message("orders", tag.encode() or b"-", sequence=n, tag=tag) for n, tag in enumerate(tags, 1)])
    )
    await pull.open("orders", filter="a || c")
    reply = await pull.read()
    assert reply.bodies == [b"a", b"a", b"c"]
    assert reply.header.sparse
    assert [item.queue_offset for item in reply.messages] == [0, 3, 4]
    assert reply.header.next_offset == 5


async def test_a_filter_that_lets_nothing_pass_tells_how_far_it_came(client: Client, handle: BrokerHandle) -> None:
    send, pull = client.send_stream(), client.pull_stream()
    await send.send(batch(numbered("orders", 1, 3, tag="other")))
    number = await pull.open("orders", filter="mine")
    reply = await pull.read()
    assert (reply.header.number, reply.header.status, reply.header.next_offset) == (number, NO_MATCHED_MSG, 3)
    await until(lambda: len(handle.broker.holds) == 1)
    await send.send(batch([message("orders", b"4", sequence=4, tag="mine")]))
    assert (await pull.read()).bodies == [b"4"]


async def test_a_client_that_says_its_last_word_gets_what_it_asked_for(client: Client) -> None:
    """As a command line tool does: one request, then the end of the requests."""
    send, pull = client.send_stream(), client.pull_stream()
    await send.send(batch(numbered("orders", 1, 3)))
    await pull.open("orders", credit_messages=4, suspend_ms=50)
    await pull.call.done_writing()
    assert (await pull.read()).bodies == [b"1", b"2", b"3"]
    assert (await pull.read()).header.status == NO_NEW_MSG
    assert await pull.call.read() is grpc.aio.EOF
    await send.call.done_writing()
    assert await send.call.read() is grpc.aio.EOF


async def test_one_message_without_the_streams(client: Client) -> None:
    spoof = Message(topic="orders", body=b"hello", tag="t", queue_offset=99, physical_offset=99, record_kind=2)
    sent = await client.broker.SendMessage(SendMessageRequest(message=spoof, queue_id=2))
    assert (sent.status, sent.broker_name, sent.queue_id, sent.queue_offset) == (SEND_OK, "broker-a", 2, 0)
    assert len(sent.message_id) == 32
    reply = await client.broker.PullMessage(PullMessageRequest(topic="orders", queue_id=2))
    (got,) = reply.records
    assert (got.body, got.tag, got.message_id, got.queue_offset) == (b"hello", "t", sent.message_id, 0)
    assert (got.physical_offset, got.store_timestamp_ms) == (sent.physical_offset, sent.store_timestamp_ms)
    assert (reply.next_offset, reply.max_offset) == (1, 1)


async def test_the_broker_chooses_queues_in_turn(client: Client) -> None:
    request = SendMessageRequest(message=Message(topic="orders", body=b"x"), default_topic_queue_count=4)
    queues = [(await client.broker.SendMessage(request)).queue_id for _ in range(8)]
    assert sorted(queues) == [0, 0, 1, 1, 2, 2, 3, 3]


async def test_a_unary_pull_waits_for_news(client: Client) -> None:
    send = client.send_stream()
    await send.send(batch(numbered("orders", 1, 1)))
    empty = await client.broker.PullMessage(PullMessageRequest(topic="orders", queue_offset=1))
    assert (empty.status, empty.next_offset) == (NO_NEW_MSG, 1)
    short = await client.broker.PullMessage(PullMessageRequest(topic="orders", queue_offset=1, suspend_ms=30))
    assert short.status == NO_NEW_MSG
    waiting = asyncio.ensure_future(
        client.broker.PullMessage(PullMessageRequest(topic="orders", queue_offset=1, suspend_ms=10_000))
    )
    await asyncio.sleep(0)
    await send.send(batch(numbered("orders", 2, 1)))
    assert [item.body for item in (await waiting).records] == [b"2"]
    wrong = await client.broker.PullMessage(PullMessageRequest(topic="orders", queue_offset=7))
    assert (wrong.status, wrong.next_offset) == (OFFSET_ILLEGAL, 2)
    nothing = await client.broker.PullMessage(PullMessageRequest(topic="orders", filter="none"))
    assert (nothing.status, nothing.next_offset) == (NO_MATCHED_MSG, 2)


async def test_a_large_message_passes(client: Client) -> None:
    body = bytes(4 * 1024 * 1024)
    send, pull = client.send_stream(), client.pull_stream()
    (result,) = await send.send(batch([message("orders", body)]))
    assert not result.HasField("error")
    await pull.open("orders", credit_bytes=1)
    assert (await pull.read()).bodies == [body]
    with refused("InvalidMessageError"):
        await client.broker.SendMessage(SendMessageRequest(message=Message(topic="orders", body=body + b"x")))


async def test_a_reader_of_a_lost_tail_is_told_where_to_begin_again(tmp_path: Path, start: Start) -> None:
    """A crash takes messages that were not on disk; what is stored next has their offsets, and must not be skipped."""
    disk = CrashDisk(tmp_path)
    async with start(disk=disk) as handle:
        client = Client(handle.address)
        send, pull = client.send_stream(), client.pull_stream()
        await send.send(batch(numbered("orders", 1, 3)))
        await until(lambda: handle.broker.store.flushed_offset == handle.broker.store.written_offset)
        # The disk as a power loss leaves it: with what was flushed, and nothing behind.
        after = disk.copy()
        await send.send(batch(numbered("orders", 4, 3)))
        await pull.open("orders")
        read = 0
        while read < 6:
            reply = await pull.read()
            read += len(reply.messages)
        await client.close()
    async with start(disk=after) as handle:
        client = Client(handle.address)
        send, pull = client.send_stream(), client.pull_stream()
        # Nothing new yet: the offset is just not there.
        await pull.open("orders", queue_offset=6, last_epoch=reply.header.last_epoch)
        assert (await pull.read()).header.next_offset == 3
        await send.send(batch(numbered("orders", 1, 5, instance=8)))
        number = await pull.open("orders", queue_offset=6, last_epoch=reply.header.last_epoch)
        header = (await pull.read()).header
        assert (header.number, header.error.name, header.next_offset) == (number, "DivergedError", 3)
        with refused("DivergedError"):
            request = PullMessageRequest(topic="orders", queue_offset=6, last_epoch=reply.header.last_epoch)
            await client.broker.PullMessage(request)
        await pull.open("orders", queue_offset=3, last_epoch=reply.header.last_epoch)
        assert (await pull.read()).bodies == [b"1", b"2", b"3", b"4", b"5"]
        await client.close()
