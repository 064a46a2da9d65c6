"""What once went wrong in the sender."""

from __future__ import annotations

import asyncio

import pytest

import kitemq
from kitemq import BrokerBusyError, Message, MessageQueue, RequestTimeoutError
from tests.producer.scripted_broker import Fault, scripted_cluster


async def test_what_waits_for_room_is_sent_after_what_timed_out() -> None:
    """Giving up one send lets the next one in while the sender still looks through its queue."""
    async with scripted_cluster("a") as cluster:
        options = {"request_timeout_s": 0.3, "delivery_timeout_s": 0.6, "buffer_bytes_max": 3000}
        async with kitemq.Producer(cluster.address, group="tests", **options) as mq:  # type: ignore[arg-type]
            queue = MessageQueue("t", "a", 0)
            await mq.send(Message("t", b"warm"), queue=queue)
            cluster.brokers[0].script = lambda request: "deaf"
            sends = [asyncio.ensure_future(mq.send(Message("t", b"x" * 500), queue=queue)) for _ in range(30)]
            done, undone = await asyncio.wait(sends, timeout=5)
            assert not undone
            assert {type(send.exception()) for send in done} == {RequestTimeoutError}


async def test_giving_up_a_send_does_not_let_later_ones_overtake_a_refused_one() -> None:
    async with scripted_cluster("a") as cluster, kitemq.Producer(cluster.address, group="tests") as mq:
        broker = cluster.brokers[0]
        queue = MessageQueue("t", "a", 0)
        await mq.send(Message("t", b"0"), queue=queue)
        (sender,) = mq._senders.values()
        state = sender.state(queue)
        faults: list[Fault] = [BrokerBusyError("busy", retry_after_ms=50)]
        broker.script = lambda request: faults.pop(0) if faults else None
        sends = [asyncio.ensure_future(mq.send(Message("t", b"1"), queue=queue))]  # will be refused
        for _ in range(100):  # turn by turn: it is answered soon
            await asyncio.sleep(0)
            if state.in_flight:
                break
        assert state.in_flight
        short = asyncio.ensure_future(mq.send(Message("t", b"short"), queue=queue, timeout_s=0.000001))
        await asyncio.sleep(0)
        sender._tick()  # finds it overdue while "1" is under way
        sends += [asyncio.ensure_future(mq.send(Message("t", b"%d" % i), queue=queue)) for i in range(2, 6)]
        with pytest.raises(RequestTimeoutError):
            await short
        await asyncio.gather(*sends)
        assert [m.body for m in broker.stored[("t", 0)]] == [b"%d" % i for i in range(6)]


async def test_many_queues_with_small_messages_make_requests_that_a_broker_takes() -> None:
    async with scripted_cluster("a") as cluster, kitemq.Producer(cluster.address, group="g") as mq:
        broker = cluster.brokers[0]
        await mq.send(Message("t", b"w"))
        sends = [mq.send(Message("t", b"x"), queue=MessageQueue("t", "a", i)) for i in range(3000)]
        await asyncio.gather(*sends)
        assert max(len(request.batches) for request in broker.requests) <= 1024


async def test_a_queue_that_can_not_be_leaves_nothing_buffered() -> None:
    async with scripted_cluster("a") as cluster, kitemq.Producer(cluster.address, group="g") as mq:
        await mq.send(Message("t", b"w"))
        for queue_id in (-1, 2**32):
            with pytest.raises(kitemq.KiteMQError):
                await mq.send(Message("t", b"x"), queue=MessageQueue("t", "a", queue_id), timeout_s=1)
        await asyncio.wait_for(mq.flush(), 5)


async def test_a_batch_is_cut_by_all_that_its_messages_hold() -> None:
    async with scripted_cluster("a") as cluster, kitemq.Producer(cluster.address, group="g") as mq:
        properties = {"k": "v" * 30_000}
        receipts = await mq.send_batch([Message("t", b"x", properties=properties) for _ in range(600)])
        assert len(receipts) == 600
        assert max(request.ByteSize() for request in cluster.brokers[0].requests) < 2 * 1024 * 1024


def test_queues_of_new_topics_are_counted_within_reason() -> None:
    for count in (-1, 0, 16_385):
        with pytest.raises(kitemq.InvalidRequestError, match="default_topic_queue_count"):
            kitemq.Producer("127.0.0.1:9876", group="g", default_topic_queue_count=count)
