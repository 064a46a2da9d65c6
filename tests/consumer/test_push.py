"""PushConsumer against a real namesrv and broker."""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

import kitemq
from kitemq.message import MessageQueue, ReceivedMessage
from tests.cluster import Cluster
from tests.consumer.helpers import Journal, committed, consuming, numbers, running, sdk_tasks, send, send_to
from tests.waiting import eventually

QUEUE = MessageQueue("orders", "broker-a", 0)


class Gate:
    """A handler that waits until it is opened. `inside`: bodies it is at; `peak`: most at a time."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.inside: list[str] = []
        self.finished: list[str] = []
        self.cancelled: list[str] = []
        self.peak = 0

    async def __call__(self, message: ReceivedMessage) -> None:
        body = message.body.decode()
        self.inside.append(body)
        self.peak = max(self.peak, len(self.inside))
        try:
            await self.open.wait()
            self.finished.append(body)
        except asyncio.CancelledError:
            self.cancelled.append(body)
            raise
        finally:
            self.inside.remove(body)


async def test_every_message_is_handled_and_committed(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=3)
    await send(cluster, "orders", numbers(0, 60))
    journal = Journal()
    async with consuming(cluster, journal) as consumer:
        await eventually(lambda: len(journal.messages) == 60)
        assert consumer.held_queues() == [MessageQueue("orders", "broker-a", i) for i in range(3)]
    assert sorted(journal.bodies, key=int) == numbers(0, 60)
    for queue_id in range(3):
        assert journal.offsets(queue_id) == list(range(20))
    assert committed(cluster.broker, "billing", "orders") == {0: 20, 1: 20, 2: 20}


@pytest.mark.parametrize("kind", ["plain", "partial", "lambda around async", "async method", "callable object"])
async def test_what_can_be_a_handler(cluster: Cluster, kind: str) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    got: list[str] = []
    threads: set[int] = set()

    def plain(message: ReceivedMessage) -> None:
        threads.add(threading.get_ident())
        got.append(message.body.decode())

    async def coroutine(prefix: str, message: ReceivedMessage) -> None:
        threads.add(threading.get_ident())
        got.append(message.body.decode())

    class Methods:
        async def method(self, message: ReceivedMessage) -> None:
            await coroutine("", message)

        async def __call__(self, message: ReceivedMessage) -> None:
            await coroutine("", message)

    handlers: dict[str, Any] = {
        "plain": plain,
        "partial": partial(coroutine, ""),
        "lambda around async": lambda message: coroutine("", message),
        "async method": Methods().method,
        "callable object": Methods(),
    }
    async with consuming(cluster, handlers[kind]):
        await eventually(lambda: len(got) == 10)
    assert sorted(got) == numbers(0, 10)
    assert (threading.get_ident() in threads) == (kind != "plain")
    assert committed(cluster.broker, "billing", "orders") == {0: 10}


async def test_a_handler_that_raises_gets_its_message_again(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 20))
    attempts: list[int] = []
    healed = asyncio.Event()
    journal = Journal()

    async def handle(message: ReceivedMessage) -> None:
        if message.body == b"7":
            attempts.append(message.delivery_attempt)
            if not healed.is_set():
                raise ValueError("not today")
        await journal(message)

    async with consuming(cluster, handle, retry_backoff_s=(0.02, 0.01), commit_interval_s=0.05) as consumer:
        await eventually(lambda: len(attempts) >= 4)
        assert len(journal.messages) == 19  # the others have gone on
        await eventually(lambda: committed(cluster.broker, "billing", "orders") == {0: 7})
        await send_to(cluster, QUEUE, numbers(20, 25))
        await eventually(lambda: len(journal.messages) == 24)
        assert committed(cluster.broker, "billing", "orders") == {0: 7}
        healed.set()
        await eventually(lambda: len(journal.messages) == 25)
        await eventually(lambda: committed(cluster.broker, "billing", "orders") == {0: 25})
        assert not consumer._core.held[QUEUE].retries
    assert attempts == list(range(1, len(attempts) + 1))
    assert "handler failed queue=orders@broker-a:0 queue_offset=7 attempt=1" in caplog.text
    assert "not today" in caplog.text


async def test_what_failed_comes_again_after_a_restart(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 20))
    handled: list[str] = []

    async def fails(message: ReceivedMessage) -> None:
        handled.append(message.body.decode())
        if message.body == b"7":
            raise ValueError

    async with consuming(cluster, fails):
        await eventually(lambda: len(handled) == 20)
    assert committed(cluster.broker, "billing", "orders") == {0: 7}
    journal = Journal()
    async with consuming(cluster, journal):
        await eventually(lambda: len(journal.messages) == 13)
    assert journal.bodies == numbers(7, 20)


async def test_a_handler_whose_own_task_was_cancelled_has_failed(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, ["one"])
    attempts: list[int] = []

    async def handle(message: ReceivedMessage) -> None:
        attempts.append(message.delivery_attempt)
        if message.delivery_attempt == 1:
            inner = asyncio.create_task(asyncio.sleep(60))
            inner.cancel()
            await inner

    async with consuming(cluster, handle, retry_backoff_s=(0.01,)):
        await eventually(lambda: attempts == [1, 2])


async def test_as_many_handlers_at_once_as_wanted(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 50))
    gate = Gate()
    async with consuming(cluster, gate, concurrency=7):
        await eventually(lambda: len(gate.inside) == 7)
        gate.open.set()
        await eventually(lambda: len(gate.finished) == 50)
    assert gate.peak == 7


async def test_stopping_waits_for_handlers_and_commits(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 50))
    gate = Gate()
    async with kitemq.PushConsumer(
        cluster.namesrv_address, group="billing", from_where=kitemq.Position.FIRST, concurrency=5
    ) as consumer:
        await consumer.subscribe("orders", gate)
        task = asyncio.create_task(consumer.run())
        await eventually(lambda: len(gate.inside) == 5)
        consumer.stop()
        await eventually(lambda: not consumer.held_queues())
        assert not task.done()
        gate.open.set()
        await task
    assert gate.finished == numbers(0, 5)  # and no other was begun
    assert committed(cluster.broker, "billing", "orders") == {0: 5}


async def test_handlers_that_outlive_the_drain_are_cancelled(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    gate = Gate()
    async with consuming(cluster, gate, concurrency=3, drain_timeout_s=0.05) as consumer:
        await eventually(lambda: len(gate.inside) == 3)
        consumer.stop()
    assert sorted(gate.cancelled) == numbers(0, 3)
    assert committed(cluster.broker, "billing", "orders") == {0: 0}
    await eventually(lambda: not sdk_tasks())


async def test_a_handler_that_swallows_its_cancellation_does_not_hang_the_stop(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    begun: list[str] = []

    async def handle(message: ReceivedMessage) -> None:
        begun.append(message.body.decode())
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    async with consuming(cluster, handle, concurrency=2, drain_timeout_s=0):
        await eventually(lambda: len(begun) == 2)
    await eventually(lambda: not sdk_tasks())
    assert len(begun) == 2


async def test_cancelling_run_drains_too(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    gate = Gate()
    async with kitemq.PushConsumer(
        cluster.namesrv_address, group="billing", from_where=kitemq.Position.FIRST, concurrency=3
    ) as consumer:
        await consumer.subscribe("orders", gate)
        task = asyncio.create_task(consumer.run())
        await eventually(lambda: len(gate.inside) == 3)
        task.cancel()
        await eventually(lambda: not consumer.held_queues())
        gate.open.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(kitemq.InvalidRequestError, match="already"):
            await consumer.run()
    assert committed(cluster.broker, "billing", "orders") == {0: 3}
    with pytest.raises(kitemq.ClientClosedError):
        await consumer.run()
    await eventually(lambda: not sdk_tasks())


async def test_leaving_the_block_stops_a_run_that_nobody_awaits(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    journal = Journal()
    async with kitemq.PushConsumer(
        cluster.namesrv_address, group="billing", from_where=kitemq.Position.FIRST
    ) as consumer:
        await consumer.subscribe("orders", journal)
        task = asyncio.create_task(consumer.run())
        await eventually(lambda: len(journal.messages) == 10)
        task.cancel()
    assert committed(cluster.broker, "billing", "orders") == {0: 10}
    await eventually(lambda: task.done() and not sdk_tasks())


@pytest.mark.parametrize("turns", range(0, 150, 15))
async def test_cancelled_at_any_moment_leaves_nothing_behind(cluster: Cluster, turns: int) -> None:
    await cluster.broker.create_topic("orders", queues=2)
    await send(cluster, "orders", numbers(0, 20))

    async def program() -> None:
        async with kitemq.PushConsumer(cluster.namesrv_address, group="billing") as consumer:
            await consumer.subscribe("orders", Journal())
            await consumer.run()

    task = asyncio.create_task(program())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not sdk_tasks())


async def test_a_slow_handler_stops_the_pulling(cluster: Cluster) -> None:
    """Messages: what is read ahead, and what has been begun. Span: from the oldest unfinished one."""
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 1000))
    gate = Gate()
    async with consuming(cluster, gate, concurrency=1, prefetch_messages=40, drain_timeout_s=0) as consumer:
        await eventually(lambda: len(gate.inside) == 1)
        held = await eventually(lambda: consumer._core.held.get(QUEUE))
        await eventually(lambda: held.credit_messages == 0)
        assert 40 <= held.fetch_offset <= 80


async def test_one_stuck_message_stops_the_pulling_at_the_span(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 1000))
    release = asyncio.Event()
    journal = Journal()

    async def handle(message: ReceivedMessage) -> None:
        if message.body == b"10":
            await release.wait()
        await journal(message)

    async with consuming(cluster, handle, prefetch_messages=50, span_max=200) as consumer:
        held = await eventually(lambda: consumer._core.held.get(QUEUE))
        await eventually(lambda: len(journal.messages) == 209 and not held.credit_messages)
        assert held.fetch_offset == 210
        assert held.done_offset() == 10
        release.set()
        await eventually(lambda: len(journal.messages) == 1000)
    assert committed(cluster.broker, "billing", "orders") == {0: 1000}


async def test_big_messages_are_held_back_by_bytes(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, ["x" * 50_000] * 40, properties={})
    gate = Gate()
    async with consuming(cluster, gate, concurrency=1, prefetch_bytes=64 * 1024, drain_timeout_s=0) as consumer:
        held = await eventually(lambda: consumer._core.held.get(QUEUE))
        await eventually(lambda: len(gate.inside) == 1 and held.credit_bytes <= 0)
        assert held.cached_bytes <= 64 * 1024 + 50_200
        gate.open.set()
        await eventually(lambda: len(gate.finished) == 40)


async def test_hooks_are_called_around_each_handler(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, ["good", "bad"])
    calls: list[tuple[str, str, str]] = []

    class Recorder(kitemq.ConsumeHook):
        def before_consume(self, message: ReceivedMessage) -> None:
            calls.append(("before", message.body.decode(), ""))

        def after_consume(self, message: ReceivedMessage, error: Exception | None) -> None:
            calls.append(("after", message.body.decode(), repr(error)))

    class Broken(kitemq.ConsumeHook):
        def before_consume(self, message: ReceivedMessage) -> None:
            raise RuntimeError("hook is broken")

    async def handle(message: ReceivedMessage) -> None:
        if message.body == b"bad":
            raise ValueError("bad")

    async with consuming(cluster, handle, hooks=[Broken(), Recorder()]):
        await eventually(lambda: len(calls) == 4)
    assert calls == [
        ("before", "good", ""),
        ("after", "good", "None"),
        ("before", "bad", ""),
        ("after", "bad", "ValueError('bad')"),
    ]
    assert "hook is broken" in caplog.text


async def test_a_handler_that_hangs_is_reported_once(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, ["stuck"])
    gate = Gate()
    async with consuming(cluster, gate, handler_warn_s=0.04, drain_timeout_s=0):
        await eventually(lambda: "has been running for over 0.04 s queue=orders@broker-a:0" in caplog.text)
    assert caplog.text.count("has been running") == 1


async def test_several_topics_and_unsubscribe(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await cluster.broker.create_topic("bills", queues=1)
    bills = MessageQueue("bills", "broker-a", 0)
    orders_journal, bills_journal = Journal(), Journal()
    async with kitemq.PushConsumer(
        cluster.namesrv_address, group="billing", from_where=kitemq.Position.FIRST
    ) as consumer:
        await consumer.subscribe("orders", orders_journal)
        async with running(consumer):
            await consumer.subscribe("bills", bills_journal, filter="due")
            await send_to(cluster, QUEUE, ["o1"])
            await send_to(cluster, bills, ["b1"], tag="due")
            await send_to(cluster, bills, ["b2"], tag="paid")
            await eventually(lambda: orders_journal.bodies == ["o1"] and bills_journal.bodies == ["b1"])
            with pytest.raises(kitemq.InvalidRequestError, match="already"):
                await consumer.subscribe("bills", bills_journal)
            await consumer.unsubscribe("bills")
            assert consumer.held_queues() == [QUEUE]
            await send_to(cluster, bills, ["b3"], tag="due")
            await consumer.subscribe("bills", bills_journal)
            await eventually(lambda: bills_journal.bodies[-1] == "b3")


async def test_a_group_that_may_not_consume_is_told(cluster: Cluster) -> None:
    """The first refusal ends `run()`; it does not try for ever in silence."""
    await cluster.broker.create_topic("orders", queues=1)
    await cluster.broker.set_group("billing", consume_broadcast_enabled=False)
    async with kitemq.PushConsumer(
        cluster.namesrv_address, group="billing", message_model=kitemq.MessageModel.BROADCASTING
    ) as consumer:
        await consumer.subscribe("orders", Journal())
        with pytest.raises(kitemq.PermissionDeniedError, match="broadcast"):
            await consumer.run()


async def test_bad_input(cluster: Cluster) -> None:
    options: dict[str, Any]
    for options in (
        {"concurrency": 0},
        {"concurrency": 1001},
        {"retry_backoff_s": ()},
        {"retry_backoff_s": (0,)},
        {"handler_warn_s": 0},
        {"span_max": 0},
        {"drain_timeout_s": -1},
    ):
        with pytest.raises(kitemq.InvalidRequestError):
            kitemq.PushConsumer(cluster.namesrv_address, group="billing", **options)
    consumer = kitemq.PushConsumer(cluster.namesrv_address, group="billing")
    with pytest.raises(kitemq.ClientClosedError, match="not open"):
        await consumer.run()
    async with consumer:
        with pytest.raises(kitemq.InvalidRequestError, match="cannot be called"):
            await consumer.subscribe("orders", None)  # type: ignore[arg-type]


async def test_nothing_is_logged_above_info_in_a_quiet_life(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="kitemq")
    await cluster.broker.create_topic("orders", queues=2)
    journal = Journal()
    async with consuming(cluster, journal):
        await send(cluster, "orders", numbers(0, 10))
        await eventually(lambda: len(journal.messages) == 10)
    await eventually(lambda: len(cluster.broker.handle.broker.membership.registry) == 0)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("kitemq.")] == []
