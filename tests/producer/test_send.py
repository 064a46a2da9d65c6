"""Sends over real gRPC against brokers whose faults are scripted: order, once, where to retry."""

from __future__ import annotations

import asyncio
import logging

import pytest

import kitemq
from kitemq import (
    BrokerBusyError,
    BrokerUnavailableError,
    ClientClosedError,
    InvalidMessageError,
    Message,
    MessageQueue,
    NotMasterError,
    RequestTimeoutError,
    SendStatus,
    StoreFullError,
    TopicNotFoundError,
)
from kitemq.proto.v1 import broker_pb2
from tests.producer.scripted_broker import Fault, ScriptedCluster, scripted_cluster
from tests.waiting import eventually


def faults(*wanted: Fault) -> object:
    """A script that plays `wanted` once, then behaves."""
    left = list(wanted)

    def script(_: broker_pb2.SendRequest) -> Fault:
        return left.pop(0) if left else None

    return script


def producer(cluster: ScriptedCluster, **options: object) -> kitemq.Producer:
    return kitemq.Producer(cluster.address, group="tests", **options)  # type: ignore[arg-type]


def body(number: int) -> bytes:
    return b"%06d" % number


async def test_a_receipt_says_where_the_message_lies() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:
        receipts = [await mq.send(Message("t", body(i))) for i in range(4)]
        assert {receipt.status for receipt in receipts} == {SendStatus.SEND_OK}
        assert sorted((r.queue.queue_id, r.queue_offset) for r in receipts) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert len({receipt.message_id for receipt in receipts}) == 4


async def test_many_waiting_sends_share_requests_and_keep_their_order() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:
        await mq.send(Message("t", b"first"))
        await asyncio.gather(*(mq.send(Message("t", body(i))) for i in range(1000)))
        broker = cluster.brokers[0]
        assert len(broker.requests) < 100
        for queue in broker.stored.values():
            numbers = [int(m.body) for m in queue if m.body != b"first"]
            assert numbers == sorted(numbers)


@pytest.mark.parametrize("fault", ["silent", "cut", "deaf"])
async def test_a_lost_reply_is_retried_and_stored_once(fault: Fault) -> None:
    async with scripted_cluster("a") as cluster, producer(cluster, request_timeout_s=0.3) as mq:
        cluster.brokers[0].script = faults(None, fault)  # type: ignore[assignment]
        await mq.send(Message("t", b"warm"), queue=MessageQueue("t", "a", 0))
        sends = [mq.send(Message("t", body(i)), queue=MessageQueue("t", "a", 0)) for i in range(50)]
        receipts = await asyncio.gather(*sends)
        stored = cluster.brokers[0].stored[("t", 0)]
        assert [m.body for m in stored] == [b"warm", *(body(i) for i in range(50))]
        assert [r.queue_offset for r in receipts] == list(range(1, 51))


async def test_order_is_kept_with_requests_in_flight_behind_a_refused_one() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:
        queue = MessageQueue("t", "a", 1)
        refusals = [None, BrokerBusyError("busy", retry_after_ms=30), None, None, NotMasterError("not me"), None]
        cluster.brokers[0].script = faults(*refusals)  # type: ignore[assignment]
        pending = []
        for i in range(300):
            pending.append(asyncio.ensure_future(mq.send(Message("t", body(i)), queue=queue)))
            if i % 20 == 19:
                await asyncio.sleep(0)  # let a request go, so that several are in flight
        await asyncio.gather(*pending)
        assert [int(m.body) for m in cluster.brokers[0].stored[("t", 1)]] == list(range(300))


async def test_a_refused_message_goes_to_another_broker_at_once() -> None:
    async with scripted_cluster("a", "b") as cluster, producer(cluster) as mq:
        first, second = cluster.brokers
        first.script = lambda request: StoreFullError("disk full")
        receipts = await asyncio.gather(*(mq.send(Message("t", body(i))) for i in range(40)))
        assert {r.queue.broker_name for r in receipts} == {"b"}
        assert first.bodies == [] and sorted(second.bodies) == [body(i) for i in range(40)]


async def test_a_bound_message_waits_for_its_broker() -> None:
    async with scripted_cluster("a", "b") as cluster, producer(cluster) as mq:
        first, _ = cluster.brokers
        first.script = faults(StoreFullError("disk full"), StoreFullError("disk full"))  # type: ignore[assignment]
        receipt = await mq.send(Message("t", b"x"), queue=MessageQueue("t", "a", 0))
        assert receipt.queue.broker_name == "a"
        receipts = await asyncio.gather(*(mq.send(Message("t", body(i)), sharding_key="k") for i in range(20)))
        assert len({r.queue for r in receipts}) == 1
        assert [r.queue_offset for r in receipts] == sorted(r.queue_offset for r in receipts)


async def test_a_broker_that_is_down_is_worked_around() -> None:
    async with scripted_cluster("a", "b") as cluster, producer(cluster) as mq:
        await cluster.brokers[0].stop()
        receipts = await asyncio.gather(*(mq.send(Message("t", body(i))) for i in range(40)))
        assert {r.queue.broker_name for r in receipts} == {"b"}


async def test_a_broker_that_comes_back_gets_what_was_bound_to_it_once() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:
        queue = MessageQueue("t", "a", 0)
        await mq.send(Message("t", b"warm"), queue=queue)
        await cluster.brokers[0].stop()
        waiting = [asyncio.ensure_future(mq.send(Message("t", body(i)), queue=queue)) for i in range(30)]
        await asyncio.sleep(0.2)
        await cluster.brokers[0].start()
        await asyncio.gather(*waiting)
        assert [m.body for m in cluster.brokers[0].stored[("t", 0)]] == [b"warm", *(body(i) for i in range(30))]


async def test_delivery_timeout_says_whether_it_may_be_stored() -> None:
    async with (
        scripted_cluster("a") as cluster,
        producer(cluster, request_timeout_s=0.2, delivery_timeout_s=0.5) as mq,
    ):
        cluster.brokers[0].script = lambda request: "silent"
        with pytest.raises(RequestTimeoutError, match="may or may not be stored"):
            await mq.send(Message("t", b"x"))
        cluster.brokers[0].script = lambda request: BrokerBusyError("queue is full")
        with pytest.raises(RequestTimeoutError, match="not stored: queue is full"):
            await mq.send(Message("t", b"x"), queue=MessageQueue("t", "a", 1))


async def test_one_bad_message_does_not_take_its_neighbours_along() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:

        def refuse_bad(request: broker_pb2.SendRequest) -> Fault:
            return InvalidMessageError("bad one") if any(b"bad" in b.records for b in request.batches) else None

        cluster.brokers[0].script = refuse_bad
        queue = MessageQueue("t", "a", 0)
        outcomes = await asyncio.gather(
            *(mq.send(Message("t", b"bad" if i == 5 else body(i)), queue=queue) for i in range(10)),
            return_exceptions=True,
        )
        assert isinstance(outcomes[5], InvalidMessageError)
        assert [m.body for m in cluster.brokers[0].stored[("t", 0)]] == [body(i) for i in range(10) if i != 5]


async def test_a_batch_is_one_queue_in_order_and_splits_by_itself() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:
        messages = [Message("t", body(i) + b"x" * 4000) for i in range(1500)]
        receipts = await mq.send_batch(messages)
        assert len({r.queue for r in receipts}) == 1
        assert [r.queue_offset for r in receipts] == list(range(1500))
        assert len(cluster.brokers[0].requests) > 3


async def test_a_full_buffer_makes_sends_wait_in_order_and_oneway_fail() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster, buffer_bytes_max=10_000) as mq:
        queue = MessageQueue("t", "a", 0)
        sends = [asyncio.ensure_future(mq.send(Message("t", body(i) + b"x" * 1000), queue=queue)) for i in range(100)]
        await asyncio.sleep(0)
        with pytest.raises(BrokerBusyError, match="slow down"):
            mq.send_oneway(Message("t", b"x"))
        await asyncio.gather(*sends)
        assert [int(m.body[:6]) for m in cluster.brokers[0].stored[("t", 0)]] == list(range(100))


async def test_an_unknown_topic_uses_the_default_topics_route_or_says_how_to_create_it() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:
        cluster.missing.add("new")
        cluster.queue_count = 8
        queues = {(await mq.send(Message("new", body(i)))).queue.queue_id for i in range(8)}
        assert queues == {0, 1, 2, 3}
        assert cluster.brokers[0].requests[0].batches[0].default_topic_queue_count == 4
        cluster.missing |= {"other", "TBW102"}
        async with producer(cluster) as fresh:
            with pytest.raises(TopicNotFoundError, match="kitemq topic create other"):
                await fresh.send(Message("other", b"x"))


async def test_sharding_keys_follow_the_order_configuration_even_without_the_broker() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster, delivery_timeout_s=3.1) as mq:
        cluster.order_config = "a:1;gone:1"
        outcomes = await asyncio.gather(
            *(mq.send(Message("t", b"x"), sharding_key=f"k{i}", timeout_s=0.5) for i in range(8)),
            return_exceptions=True,
        )
        assert any(isinstance(outcome, RequestTimeoutError) for outcome in outcomes)
        assert {o.queue.broker_name for o in outcomes if isinstance(o, kitemq.SendReceipt)} == {"a"}


async def test_selectors_choose_and_their_errors_are_the_sends() -> None:
    async with scripted_cluster("a") as cluster, producer(cluster) as mq:
        receipt = await mq.send(Message("t", b"x"), selector=lambda queues, message: queues[-1])
        assert receipt.queue.queue_id == 1
        with pytest.raises(ZeroDivisionError):
            await mq.send(Message("t", b"x"), selector=lambda queues, message: queues[1 // 0])


async def test_closing_waits_for_what_was_sent() -> None:
    async with scripted_cluster("a") as cluster:
        async with producer(cluster) as mq:
            for i in range(100):
                mq.send_oneway(Message("t", body(i)))
        assert len(cluster.brokers[0].bodies) == 100
        with pytest.raises(ClientClosedError):
            await mq.send(Message("t", b"x"))
        with pytest.raises(ClientClosedError):
            await mq.__aenter__()


async def test_leaving_by_an_error_fails_what_waits_and_leaves_no_task() -> None:
    before = len(asyncio.all_tasks())
    async with scripted_cluster("a") as cluster:
        cluster.brokers[0].script = lambda request: "deaf"
        with pytest.raises(KeyError):
            async with producer(cluster) as mq:
                waiting = asyncio.ensure_future(mq.send(Message("t", b"x")))
                await asyncio.sleep(0.1)
                raise KeyError
        with pytest.raises(ClientClosedError, match="may or may not"):
            await waiting
    await eventually(lambda: len(asyncio.all_tasks()) == before)


async def test_no_namesrv_is_a_clear_error() -> None:
    async with kitemq.Producer("127.0.0.1:1", group="tests", delivery_timeout_s=3.0, request_timeout_s=1.0) as mq:
        with pytest.raises(BrokerUnavailableError, match="no namesrv answers"):
            await mq.send(Message("t", b"x"), timeout_s=0.5)


async def test_hooks_see_each_message_and_its_outcome(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[object] = []

    class Hook(kitemq.SendHook):
        def before_send(self, message: Message) -> Message:
            return Message(message.topic, message.body + b"!")

        def after_send(self, message: Message, receipt: object, error: object) -> None:
            seen.append((message.body, receipt is not None, error))
            raise RuntimeError("a hook's fault is not the sender's")

    async with scripted_cluster("a") as cluster, producer(cluster, hooks=[Hook()]) as mq:
        with caplog.at_level(logging.CRITICAL):
            await mq.send(Message("t", b"a"))
            await mq.send_batch([Message("t", b"b"), Message("t", b"c")])
        assert sorted(cluster.brokers[0].bodies) == [b"a!", b"b!", b"c!"]
    assert seen == [(b"a!", True, None), (b"b!", True, None), (b"c!", True, None)]
