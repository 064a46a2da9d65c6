"""Members of one group: sharing, handing over, losing and finding brokers again."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from functools import partial

import pytest

import kitemq
from kitemq.consumer import allocate
from kitemq.message import MessageQueue, ReceivedMessage
from tests.cluster import Cluster
from tests.consumer.helpers import Journal, committed, consuming, numbers, send, send_to
from tests.waiting import eventually

QUEUE = MessageQueue("orders", "broker-a", 0)

# Far below the 20 s after which every member looks by itself: what happens within it was told by the broker.
NOTICED_S = 8.0


def shares(*consumers: kitemq.PushConsumer) -> list[int]:
    return [len(consumer.held_queues()) for consumer in consumers]


def shares_are(wanted: list[int], *consumers: kitemq.PushConsumer) -> bool:
    return shares(*consumers) == wanted


async def test_members_share_the_queues_and_take_over_from_each_other(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=8)
    journal = Journal()
    async with consuming(cluster, journal) as first:
        await eventually(lambda: shares(first) == [8])
        async with consuming(cluster, journal) as second:
            await eventually(lambda: shares(first, second) == [4, 4], timeout_s=NOTICED_S)
            assert not set(first.held_queues()) & set(second.held_queues())
            async with consuming(cluster, journal) as third:
                await eventually(lambda: sorted(shares(first, second, third)) == [2, 3, 3], timeout_s=NOTICED_S)
            await eventually(lambda: shares(first, second) == [4, 4], timeout_s=NOTICED_S)
        await eventually(lambda: shares(first) == [8], timeout_s=NOTICED_S)


async def test_two_kinds_of_consumer_in_one_group(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=4)
    async with (
        consuming(cluster, Journal()) as pushed,
        kitemq.PullConsumer(cluster.namesrv_address, group="billing") as pulled,
    ):
        await pulled.subscribe("orders")
        await eventually(lambda: [len(c.held_queues()) for c in (pushed, pulled)] == [2, 2], timeout_s=NOTICED_S)


async def test_nothing_is_lost_or_skipped_while_members_come_and_go(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=6)
    journal = Journal()
    sending = True

    async def produce() -> int:
        count = 0
        async with kitemq.Producer(cluster.namesrv_address, group="tests") as producer:
            while sending:
                batch = [kitemq.Message("orders", str(count + i).encode()) for i in range(6)]
                await asyncio.gather(
                    *(producer.send(m, queue=MessageQueue("orders", "broker-a", i)) for i, m in enumerate(batch))
                )
                count += 6
                await asyncio.sleep(0.001)
        return count

    async with consuming(cluster, journal, commit_interval_s=0.1) as first:
        producing = asyncio.create_task(produce())
        for _ in range(3):
            async with consuming(cluster, journal, commit_interval_s=0.1) as second:
                await eventually(partial(shares_are, [3, 3], first, second), timeout_s=NOTICED_S)
            await eventually(lambda: shares(first) == [6], timeout_s=NOTICED_S)
        sending = False
        count = await producing
        await eventually(lambda: len(set(journal.bodies)) == count)
    for queue_id in range(6):
        offsets = journal.offsets(queue_id)
        first_deliveries = list(dict.fromkeys(offsets))
        assert first_deliveries == list(range(count // 6))
    # A hand-over commits what is done before the other member asks: repeats are the exception.
    repeats = sum(times - 1 for times in Counter(journal.bodies).values())
    assert repeats <= count // 10
    assert committed(cluster.broker, "billing", "orders") == dict.fromkeys(range(6), count // 6)


async def test_a_queue_given_up_is_committed_with_what_its_handlers_finish(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=2)
    moving = MessageQueue("orders", "broker-a", 1)
    await send_to(cluster, moving, numbers(0, 10))
    gate = asyncio.Event()
    begun: list[str] = []

    async def handle(message: ReceivedMessage) -> None:
        begun.append(message.body.decode())
        if len(begun) > 3:
            await gate.wait()

    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(consuming(cluster, handle, concurrency=2, client_id="a"))
        await eventually(lambda: len(begun) == 5)
        second = await stack.enter_async_context(consuming(cluster, Journal(), topic="orders", client_id="b"))
        await eventually(lambda: shares(first, second) == [1, 1], timeout_s=NOTICED_S)
        assert committed(cluster.broker, "billing", "orders")[1] == 3
        gate.set()
        await eventually(lambda: committed(cluster.broker, "billing", "orders")[1] >= 5)
        assert len(begun) == 5


async def test_broadcasting_members_get_everything(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=3)
    await send(cluster, "orders", numbers(0, 30))
    one, two = Journal(), Journal()
    model = kitemq.MessageModel.BROADCASTING
    async with consuming(cluster, one, message_model=model), consuming(cluster, two, message_model=model):
        await eventually(lambda: len(one.messages) == len(two.messages) == 30)
    assert sorted(one.bodies) == sorted(two.bodies) == sorted(numbers(0, 30))


async def test_another_strategy(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=4)
    strategy = allocate.average_by_circle
    async with (
        consuming(cluster, Journal(), allocation=strategy, client_id="a") as first,
        consuming(cluster, Journal(), allocation=strategy, client_id="b") as second,
    ):
        await eventually(lambda: shares(first, second) == [2, 2], timeout_s=NOTICED_S)
        assert [queue.queue_id for queue in first.held_queues()] == [0, 2]
        assert [queue.queue_id for queue in second.held_queues()] == [1, 3]


async def test_a_strategy_that_raises_changes_nothing(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    await cluster.broker.create_topic("orders", queues=4)
    broken = False

    def strategy(client_id: str, queues: object, client_ids: object) -> list[MessageQueue]:
        if broken:
            raise RuntimeError("no idea")
        return [QUEUE]

    async with consuming(cluster, Journal(), allocation=strategy) as consumer:
        await eventually(lambda: consumer.held_queues() == [QUEUE])
        broken = True
        async with consuming(cluster, Journal()):
            await eventually(lambda: "no idea" in caplog.text)
            assert consumer.held_queues() == [QUEUE]


async def test_a_topic_is_shared_by_those_who_read_it(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    await cluster.broker.create_topic("orders", queues=4)
    await cluster.broker.create_topic("bills", queues=4)
    async with consuming(cluster, Journal()) as first, consuming(cluster, Journal(), topic="bills") as second:
        await eventually(lambda: "subscribe differently" in caplog.text)
        await eventually(lambda: shares(first, second) == [4, 4])
        assert {queue.topic for queue in first.held_queues()} == {"orders"}


async def test_several_brokers_and_one_of_them_away(cluster: Cluster) -> None:
    second_broker = await cluster.add_broker("broker-b")
    for broker in cluster.brokers:
        await broker.create_topic("orders", queues=2)
    journal = Journal()
    async with consuming(cluster, journal) as consumer:
        await eventually(lambda: shares(consumer) == [4])
        elsewhere = MessageQueue("orders", "broker-b", 0)
        await send_to(cluster, elsewhere, numbers(0, 5))
        await send_to(cluster, QUEUE, numbers(5, 10))
        await eventually(lambda: len(journal.messages) == 10)
        await second_broker.stop()
        await send_to(cluster, QUEUE, numbers(10, 15))
        await eventually(lambda: len(journal.messages) == 15)
        assert shares(consumer) == [4]  # they are kept until the broker is back
        await second_broker.start()
        await send_to(cluster, elsewhere, numbers(15, 20))
        await eventually(lambda: len(journal.messages) == 20)
    assert sorted(journal.bodies, key=int) == numbers(0, 20)
    assert committed(second_broker, "billing", "orders") == {0: 10, 1: 0}


async def test_a_restarted_broker_finds_everybody_where_they_were(cluster: Cluster) -> None:
    """Its member list is empty at first; nobody takes the others' queues for that, and nothing is handled twice."""
    await cluster.broker.create_topic("orders", queues=4)
    journal = Journal()
    moves: list[list[int]] = []
    async with consuming(cluster, journal) as first, consuming(cluster, journal) as second:
        await eventually(lambda: shares(first, second) == [2, 2])
        before = [first.held_queues(), second.held_queues()]
        await send(cluster, "orders", numbers(0, 20))
        await eventually(lambda: len(journal.messages) == 20)
        await cluster.broker.restart()
        await send(cluster, "orders", numbers(20, 40))

        def all_there() -> bool:
            moves.append(shares(first, second))
            return len(set(journal.bodies)) == 40

        await eventually(all_there)
        await eventually(lambda: len(cluster.broker.handle.broker.membership.member_ids("billing")) == 2)
        assert moves == [[2, 2]] * len(moves)
        assert [first.held_queues(), second.held_queues()] == before
    assert sorted(journal.bodies, key=int) == numbers(0, 40)
    assert sum(committed(cluster.broker, "billing", "orders").values()) == 40


async def test_a_namesrv_that_restarts_disturbs_nobody(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=2)
    journal = Journal()
    async with consuming(cluster, journal) as consumer:
        await eventually(lambda: shares(consumer) == [2])
        async with kitemq.Producer(cluster.namesrv_address, group="tests") as producer:
            await producer.send(kitemq.Message("orders", b"0"))
            await cluster.namesrv.stop()
            await producer.send(kitemq.Message("orders", b"1"))
            await eventually(lambda: sorted(journal.bodies) == ["0", "1"])
            await cluster.namesrv.start()
            await producer.send(kitemq.Message("orders", b"2"))
        await eventually(lambda: sorted(journal.bodies) == ["0", "1", "2"])
        assert shares(consumer) == [2]


async def test_offsets_that_an_operator_moves(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    journal = Journal()
    async with consuming(cluster, journal, commit_interval_s=0.05):
        await eventually(lambda: len(journal.messages) == 10)
        await eventually(lambda: committed(cluster.broker, "billing", "orders") == {0: 10})
        await cluster.broker.reset_offsets("billing", "orders", queue_offset=6, force=True)
        await eventually(lambda: len(journal.messages) == 14)
        assert journal.bodies[10:] == numbers(6, 10)
        await eventually(lambda: committed(cluster.broker, "billing", "orders") == {0: 10})


async def test_a_second_client_of_the_same_id_is_pointed_out(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    async with consuming(cluster, Journal(), client_id="twin") as first:
        await eventually(lambda: shares(first) == [1])
        async with consuming(cluster, Journal(), client_id="twin"):
            await eventually(lambda: "has another client the same id? client_id=twin" in caplog.text)
