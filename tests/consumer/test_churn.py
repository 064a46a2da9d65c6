"""Members, connections, brokers and namesrv come and go at random under load: nothing is lost, offsets are exact."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

import kitemq
from kitemq.message import MessageQueue, ReceivedMessage
from tests.cluster import Broker, Cluster
from tests.consumer.helpers import committed
from tests.flaky_proxy import FlakyProxy, flaky_proxy
from tests.waiting import eventually

BROKERS = ("broker-a", "broker-far")
QUEUES = 3
ACTIONS = 30
MEMBERS_MAX = 4
PROGRESS = 60


class Churn:
    """A producer, a group of changing members, and what they have done so far."""

    def __init__(self, cluster: Cluster, far: Broker, proxy: FlakyProxy, rng: random.Random) -> None:
        self.cluster = cluster
        self.far = far
        self.proxy = proxy
        self.rng = rng
        self.sent: set[tuple[MessageQueue, int]] = set()
        self.handled: Counter[tuple[MessageQueue, int]] = Counter()
        self.members: list[tuple[kitemq.PushConsumer, asyncio.Task[None]]] = []
        self.stopping = False

    async def produce(self) -> None:
        async with kitemq.Producer(self.cluster.namesrv_address, group="tests", delivery_timeout_s=60) as producer:
            while not self.stopping:
                queues = [MessageQueue("orders", name, self.rng.randrange(QUEUES)) for name in BROKERS]
                batch = [kitemq.Message("orders", b"x")] * self.rng.randint(1, 8)
                for receipts in await asyncio.gather(*(producer.send_batch(batch, queue=queue) for queue in queues)):
                    self.sent.update((receipt.queue, receipt.queue_offset) for receipt in receipts)

    async def handle(self, message: ReceivedMessage) -> None:
        chance = self.rng.random()
        if chance < 0.01:
            raise ValueError("once in a while")
        if chance < 0.03:
            await asyncio.sleep(chance / 2)
        self.handled[(message.queue, message.queue_offset)] += 1

    def has_handled(self, count: int) -> bool:
        return len(self.handled) >= count

    def is_committed(self) -> bool:
        return all(
            committed(broker, "billing", "orders")
            == {queue_id: broker.store.queue("orders", queue_id).max_offset for queue_id in range(QUEUES)}
            for broker in self.cluster.brokers
        )

    async def join(self) -> None:
        rng = self.rng
        consumer = kitemq.PushConsumer(
            self.cluster.namesrv_address,
            group="billing",
            from_where=kitemq.Position.FIRST,
            concurrency=rng.choice([1, 5, 20]),
            prefetch_messages=rng.choice([10, 1000]),
            commit_interval_s=rng.choice([0.1, 1.0]),
            drain_timeout_s=rng.choice([0.0, 0.1, 5.0]),
            retry_backoff_s=(0.05, 0.2),
        )
        await consumer.__aenter__()
        await consumer.subscribe("orders", self.handle)
        self.members.append((consumer, asyncio.create_task(consumer.run())))

    async def leave(self, *, cancelled: bool) -> None:
        consumer, task = self.members.pop(self.rng.randrange(len(self.members)))
        if cancelled:
            task.cancel()
        else:
            consumer.stop()
        await asyncio.gather(task, return_exceptions=cancelled)
        await consumer.close()

    async def pull(self) -> None:
        """A pull consumer takes a share for a while."""
        async with kitemq.PullConsumer(
            self.cluster.namesrv_address, group="billing", from_where=kitemq.Position.FIRST, commit_interval_s=0.1
        ) as consumer:
            await consumer.subscribe("orders")
            for _ in range(self.rng.randrange(5)):
                for message in await consumer.poll(timeout_s=0.5):
                    self.handled[(message.queue, message.queue_offset)] += 1

    async def silence(self) -> None:
        self.proxy.drop_replies = True
        dropped = self.proxy.dropped_bytes
        await eventually(lambda: self.proxy.dropped_bytes > dropped)
        self.proxy.drop_replies = False
        self.proxy.cut()

    async def act(self) -> str:
        action = self.rng.choice(["join", "join", "leave", "cancel", "pull", "cut", "silence", "broker", "namesrv"])
        if action == "join" and len(self.members) < MEMBERS_MAX:
            await self.join()
        elif action in ("leave", "cancel") and len(self.members) > 1:
            await self.leave(cancelled=action == "cancel")
        elif action == "pull":
            await self.pull()
        elif action == "cut":
            self.proxy.cut()
        elif action == "silence":
            await self.silence()
        elif action == "broker":
            await self.rng.choice([self.cluster.broker, self.far]).restart()
        elif action == "namesrv":
            await self.cluster.namesrv.restart()
        return action


@asynccontextmanager
async def churning(cluster: Cluster, rng: random.Random) -> AsyncIterator[Churn]:
    async with flaky_proxy("") as proxy:
        # A namesrv that has restarted hears of the brokers with their next heartbeat.
        far = await cluster.add_broker("broker-far", advertise=proxy.address, heartbeat_interval_ms=100)
        proxy.target = far.address
        for broker in cluster.brokers:
            await broker.create_topic("orders", queues=QUEUES)
        churn = Churn(cluster, far, proxy, rng)
        producing = asyncio.create_task(churn.produce())
        try:
            await churn.join()
            yield churn
        finally:
            churn.stopping = True
            await producing
            for consumer, _ in churn.members:
                await consumer.close()
            await far.stop()


@pytest.mark.slow
async def test_nothing_is_lost_whatever_comes_and_goes(cluster: Cluster) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    async with churning(cluster, random.Random(seed)) as churn:
        for _ in range(ACTIONS):
            goal = len(churn.handled) + PROGRESS
            print(await churn.act(), end=" ")
            await eventually(partial(churn.has_handled, goal), timeout_s=60)
        churn.stopping = True
        await eventually(lambda: not churn.sent - churn.handled.keys(), timeout_s=60)
        # What has come twice or failed takes its time, and then every offset is at the end of its queue.
        await eventually(churn.is_committed, timeout_s=60)
    repeats = sum(times - 1 for times in churn.handled.values())
    print(f"\n{len(churn.sent)} messages, {repeats} repeats")
