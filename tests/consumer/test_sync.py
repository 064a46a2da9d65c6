"""The consumers without await."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from typing import Any

import pytest

import kitemq
import kitemq.sync
from kitemq.message import MessageQueue, ReceivedMessage
from tests.cluster import Cluster
from tests.consumer.helpers import committed, numbers, send_to
from tests.waiting import eventually

QUEUE = MessageQueue("orders", "broker-a", 0)

# Of the async classes: for their sync twins.
INTERNAL = {"deliver", "done_offset", "refused", "commit_all_but", "give_back"}


@pytest.mark.parametrize("name", ["PullConsumer", "PushConsumer"])
def test_parity(name: str) -> None:
    """Same names, same arguments, same defaults."""
    twins = getattr(kitemq, name), getattr(kitemq.sync, name)

    def methods(cls: type) -> dict[str, Any]:
        return {
            key: inspect.signature(value).replace(return_annotation=inspect.Signature.empty)
            for key, value in inspect.getmembers(cls, inspect.isfunction)
            if not key.startswith("_") and key not in INTERNAL
        }

    assert methods(twins[0]) == methods(twins[1])
    instance = twins[0]("127.0.0.1:1", group="g")
    for attribute in ("group", "client_id"):
        assert hasattr(instance, attribute)
        assert isinstance(getattr(twins[1], attribute), property)


def pulling(cluster: Cluster, **options: Any) -> kitemq.sync.PullConsumer:
    defaults: dict[str, Any] = {"group": "audit", "from_where": kitemq.Position.FIRST}
    return kitemq.sync.PullConsumer(cluster.namesrv_address, **(defaults | options))


async def in_thread(program: Callable[[], None]) -> None:
    """The cluster lives on the test's loop: a blocking program needs a thread."""
    await asyncio.to_thread(program)


async def test_loop_and_break(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 1000))

    def program() -> None:
        with pulling(cluster) as consumer:
            consumer.subscribe("orders")
            got = []
            for message in consumer:
                got.append(message.body.decode())
                if len(got) == 700:
                    break
            assert got == numbers(0, 700)
            assert consumer.position(QUEUE) == 700
            assert consumer.held_queues() == [QUEUE]
            for message in consumer:  # what the first loop had fetched ahead is not lost
                assert message.body == b"700"
                break

    await in_thread(program)
    assert committed(cluster.broker, "audit", "orders") == {0: 701}


async def test_an_exception_leaves_its_message_undone(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 100))

    def program() -> None:
        with pytest.raises(ZeroDivisionError), pulling(cluster) as consumer:
            consumer.subscribe("orders")
            for message in consumer:
                if message.body == b"57":
                    _ = 1 / 0

    await in_thread(program)
    assert committed(cluster.broker, "audit", "orders") == {0: 57}


async def test_commit_poll_seek_pause(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 1000))

    def program() -> None:
        with pulling(cluster, auto_commit=False) as consumer:
            assert consumer.queues("orders") == [QUEUE]
            consumer.assign([QUEUE])
            for message in consumer:
                if message.body == b"400":
                    consumer.commit()
                    assert consumer.committed(QUEUE) == 401
                    consumer.seek(QUEUE, 900)
                elif message.body == b"950":
                    break
                assert message.queue_offset <= 400 or message.queue_offset >= 900
            assert [message.body for message in consumer.poll(2)] == [b"951", b"952"]
            consumer.pause(QUEUE)
            assert consumer.poll(timeout_s=0.01) == []
            consumer.resume(QUEUE)
            assert consumer.poll(1)[0].body == b"953"
            consumer.commit({QUEUE: 500})
            assert consumer.committed(QUEUE) == 500
            consumer.close()
            assert list(consumer) == []
            with pytest.raises(kitemq.ClientClosedError):
                consumer.poll()

    await in_thread(program)


async def test_push_with_plain_handlers(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 50))
    got: list[str] = []
    threads: set[str] = set()

    def program() -> None:
        with kitemq.sync.PushConsumer(
            cluster.namesrv_address, group="billing", from_where=kitemq.Position.FIRST
        ) as consumer:

            def handle(message: ReceivedMessage) -> None:
                threads.add(threading.current_thread().name)
                got.append(message.body.decode())
                if len(got) == 50:
                    consumer.stop()

            consumer.subscribe("orders", handle)
            consumer.run()
            with pytest.raises(kitemq.InvalidRequestError):
                consumer.run()

    await in_thread(program)
    assert sorted(got, key=int) == numbers(0, 50)
    assert all(name.startswith("kitemq billing") for name in threads)
    assert committed(cluster.broker, "billing", "orders") == {0: 50}
    await eventually(lambda: "kitemq" not in {thread.name for thread in threading.enumerate()})
