"""Sending to a cluster, and consumers that note down what they get."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import kitemq
from kitemq.message import MessageQueue, ReceivedMessage
from tests.cluster import Broker, Cluster


async def send(cluster: Cluster, topic: str, bodies: Sequence[str], **message: Any) -> None:
    """One after the other; round robin over the queues."""
    async with kitemq.Producer(cluster.namesrv_address, group="tests", compression=kitemq.Compression.NONE) as producer:
        for body in bodies:
            await producer.send(kitemq.Message(topic, body.encode(), **message))


async def send_to(cluster: Cluster, queue: MessageQueue, bodies: Sequence[str], **message: Any) -> None:
    """As one batch to one queue."""
    async with kitemq.Producer(cluster.namesrv_address, group="tests", compression=kitemq.Compression.NONE) as producer:
        batch = [kitemq.Message(queue.topic, body.encode(), **message) for body in bodies]
        await producer.send_batch(batch, queue=queue)


def numbers(start: int, end: int) -> list[str]:
    return [str(i) for i in range(start, end)]


def committed(broker: Broker, group: str, topic: str) -> dict[int, int]:
    """What the broker holds for a group, by queue id."""
    return {queue_id: at for (name, queue_id), at in broker.store.offsets.of_group(group).items() if name == topic}


class Journal:
    """A handler that writes down what it is called with."""

    def __init__(self) -> None:
        self.messages: list[ReceivedMessage] = []

    async def __call__(self, message: ReceivedMessage) -> None:
        self.messages.append(message)

    @property
    def bodies(self) -> list[str]:
        return [message.body.decode() for message in self.messages]

    def offsets(self, queue_id: int) -> list[int]:
        return [message.queue_offset for message in self.messages if message.queue.queue_id == queue_id]


@asynccontextmanager
async def running(consumer: kitemq.PushConsumer) -> AsyncIterator[asyncio.Task[None]]:
    """`run()` in the background; at the end it is stopped and awaited."""
    task = asyncio.create_task(consumer.run())
    try:
        yield task
    finally:
        consumer.stop()
        await task


@asynccontextmanager
async def consuming(
    cluster: Cluster, handler: Any, *, topic: str = "orders", group: str = "billing", **options: Any
) -> AsyncIterator[kitemq.PushConsumer]:
    """A push consumer at work, from the first message on."""
    options.setdefault("from_where", kitemq.Position.FIRST)
    async with kitemq.PushConsumer(cluster.namesrv_address, group=group, **options) as consumer:
        await consumer.subscribe(topic, handler)
        async with running(consumer):
            yield consumer


def sdk_tasks() -> list[asyncio.Task[Any]]:
    """Tasks of clients; the cluster's share the loop with them."""
    return [
        task
        for task in asyncio.all_tasks()
        if (code := getattr(task.get_coro(), "cr_code", None)) is not None
        and ("/src/kitemq/" in code.co_filename or code.co_filename.endswith("grpc/aio/_call.py"))
    ]
