"""PullConsumer against a real namesrv and broker."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import kitemq
from kitemq.message import MessageQueue, ReceivedMessage
from tests.certificates import make_certificates
from tests.cluster import Broker, Cluster, Namesrv, running_cluster
from tests.consumer.helpers import committed, numbers, sdk_tasks, send, send_to
from tests.waiting import eventually

QUEUE = MessageQueue("orders", "broker-a", 0)


def puller(cluster: Cluster, **options: Any) -> kitemq.PullConsumer:
    defaults: dict[str, Any] = {"group": "audit", "from_where": kitemq.Position.FIRST}
    return kitemq.PullConsumer(cluster.namesrv_address, **(defaults | options))


async def take(consumer: kitemq.PullConsumer, count: int) -> list[ReceivedMessage]:
    messages: list[ReceivedMessage] = []
    async for message in consumer:
        messages.append(message)
        if len(messages) == count:
            break
    return messages


def bodies(messages: list[ReceivedMessage]) -> list[str]:
    return [message.body.decode() for message in messages]


async def test_every_message_once_in_order_per_queue(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=3)
    await send(cluster, "orders", numbers(0, 60), tag="paid", keys=["k1", "k2"], properties={"a": "b"})
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders")
        messages = await take(consumer, 60)
        assert consumer.held_queues() == [MessageQueue("orders", "broker-a", i) for i in range(3)]
    assert sorted(bodies(messages), key=int) == numbers(0, 60)
    for queue_id in range(3):
        mine = [message for message in messages if message.queue.queue_id == queue_id]
        assert [message.queue_offset for message in mine] == list(range(20))
    message = messages[0]
    assert (message.topic, message.tag, message.keys) == ("orders", "paid", ("k1", "k2"))
    assert message.properties == {"a": "b"}
    assert message.delivery_attempt == 1
    assert message.producer_group == "tests"
    assert message.store_timestamp_ms >= message.born_timestamp_ms > 0


async def test_goes_on_where_the_group_stopped(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders")
        assert bodies(await take(consumer, 4)) == numbers(0, 4)
    assert committed(cluster.broker, "audit", "orders") == {0: 4}
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders")
        assert bodies(await take(consumer, 6)) == numbers(4, 10)


async def test_the_message_at_which_a_program_fails_comes_again(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    with pytest.raises(ZeroDivisionError):
        async with puller(cluster) as consumer:
            await consumer.subscribe("orders")
            async for message in consumer:
                if message.body == b"3":
                    _ = 1 / 0
    assert committed(cluster.broker, "audit", "orders") == {0: 3}


async def test_commits_by_itself_up_to_what_the_program_is_at(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    async with puller(cluster, commit_interval_s=0.05) as consumer:
        await consumer.subscribe("orders")
        async for message in consumer:
            if message.body == b"5":
                await eventually(lambda: committed(cluster.broker, "audit", "orders") == {0: 5})
                break
        assert bodies(await consumer.poll(2)) == ["6", "7"]
        await eventually(lambda: committed(cluster.broker, "audit", "orders") == {0: 6})
        assert bodies(await consumer.poll(1)) == ["8"]
        await eventually(lambda: committed(cluster.broker, "audit", "orders") == {0: 8})


async def test_commits_only_when_told_without_auto_commit(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    async with puller(cluster, auto_commit=False) as consumer:
        await consumer.subscribe("orders")
        await take(consumer, 3)
        await consumer.commit()
        assert await consumer.committed(QUEUE) == 3
        await take(consumer, 3)
        await consumer.commit({QUEUE: 4})
        await take(consumer, 1)
    assert committed(cluster.broker, "audit", "orders") == {0: 4}
    async with puller(cluster, auto_commit=False) as consumer:
        with pytest.raises(kitemq.InvalidRequestError, match="ends at 10"):
            await consumer.commit({QUEUE: 11})


async def test_poll_takes_from_several_queues_and_waits_no_longer_than_told(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=2)
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders")
        assert await consumer.poll(10, timeout_s=0.01) == []
        polling = asyncio.create_task(consumer.poll(10, timeout_s=20))
        await send(cluster, "orders", numbers(0, 1))
        assert bodies(await polling) == ["0"]
        await send(cluster, "orders", numbers(1, 9))
        got: list[str] = []
        while len(got) < 8:
            got += bodies(await consumer.poll(5))
        assert sorted(got) == numbers(1, 9)
        with pytest.raises(kitemq.InvalidRequestError, match="max_count"):
            await consumer.poll(0)


async def test_where_a_new_group_begins(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 3))
    middle = await _clock_has_moved(cluster)
    await send_to(cluster, QUEUE, numbers(3, 6))

    async def begins(start: kitemq.Position | datetime, wanted: list[str]) -> None:
        async with puller(cluster, group=f"begins-{wanted[0]}", from_where=start) as consumer:
            await consumer.subscribe("orders")
            await eventually(lambda: consumer.held_queues())
            if start is kitemq.Position.LAST:
                await send_to(cluster, QUEUE, numbers(6, 7))
            assert bodies(await take(consumer, len(wanted))) == wanted

    await begins(kitemq.Position.FIRST, numbers(0, 6))
    await begins(middle, numbers(3, 6))
    await begins(kitemq.Position.LAST, numbers(6, 7))


async def _clock_has_moved(cluster: Cluster) -> datetime:
    """A time after everything stored so far, and before what comes next."""
    before = datetime.now(UTC)
    await eventually(lambda: datetime.now(UTC) - before > timedelta(milliseconds=2))
    now = datetime.now(UTC)
    await eventually(lambda: datetime.now(UTC) - now > timedelta(milliseconds=2))
    return now


async def test_a_group_begins_once_even_if_nothing_came(cluster: Cluster) -> None:
    """Messages sent while the group is away are not skipped, though it had read none."""
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 5))
    async with puller(cluster, from_where=kitemq.Position.LAST) as consumer:
        await consumer.subscribe("orders")
        await eventually(lambda: consumer.held_queues())
    await send_to(cluster, QUEUE, numbers(5, 8))
    async with puller(cluster, from_where=kitemq.Position.LAST) as consumer:
        await consumer.subscribe("orders")
        assert bodies(await take(consumer, 3)) == numbers(5, 8)


async def test_a_topic_and_a_queue_made_later_are_read_from_the_first_message(cluster: Cluster) -> None:
    async with puller(cluster, from_where=kitemq.Position.LAST) as consumer:
        await consumer.subscribe("later")
        await cluster.broker.create_topic("later", queues=1)
        await send_to(cluster, MessageQueue("later", "broker-a", 0), ["a"])
        assert bodies(await take(consumer, 1)) == ["a"]
        await cluster.broker.create_topic("later", queues=2)
        await send_to(cluster, MessageQueue("later", "broker-a", 1), ["b"])
        assert bodies(await take(consumer, 1)) == ["b"]


async def test_filter(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    async with kitemq.Producer(cluster.namesrv_address, group="tests") as producer:
        for i in range(30):
            await producer.send(kitemq.Message("orders", str(i).encode(), tag=("paid", "open", "refunded")[i % 3]))
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders", filter="paid || refunded")
        messages = await take(consumer, 20)
        assert bodies(messages) == [str(i) for i in range(30) if i % 3 != 1]
        assert [message.queue_offset for message in messages] == [i for i in range(30) if i % 3 != 1]
        await eventually(lambda: consumer.position(QUEUE) == 30)
    assert committed(cluster.broker, "audit", "orders") == {0: 30}


async def test_what_a_filter_leaves_out_is_committed_too(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 50), tag="open")
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders", filter="paid")
        await eventually(lambda: consumer.held_queues() and consumer.position(QUEUE) == 50)
    assert committed(cluster.broker, "audit", "orders") == {0: 50}


async def test_assign_seek_pause(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=2)
    other = MessageQueue("orders", "broker-a", 1)
    await send_to(cluster, QUEUE, [f"a{i}" for i in range(10)])
    await send_to(cluster, other, [f"b{i}" for i in range(10)])
    async with puller(cluster, auto_commit=False) as consumer:
        assert await consumer.queues("orders") == [QUEUE, other]
        await consumer.assign([QUEUE])
        assert bodies(await take(consumer, 3)) == ["a0", "a1", "a2"]
        assert consumer.position(QUEUE) == 3
        await consumer.seek(QUEUE, 7)
        assert bodies(await take(consumer, 3)) == ["a7", "a8", "a9"]
        await consumer.seek(QUEUE, kitemq.Position.FIRST)
        assert bodies(await take(consumer, 1)) == ["a0"]
        consumer.pause(QUEUE)
        assert await consumer.poll(timeout_s=0.05) == []
        await consumer.assign([QUEUE, other])
        assert bodies(await take(consumer, 10)) == [f"b{i}" for i in range(10)]
        consumer.resume(QUEUE)
        assert bodies(await take(consumer, 9)) == [f"a{i}" for i in range(1, 10)]
        await consumer.seek(QUEUE, datetime.now(UTC) - timedelta(hours=1))
        assert consumer.position(QUEUE) == 0
        await consumer.seek(other, kitemq.Position.LAST)
        assert consumer.position(other) == 10
        assert committed(cluster.broker, "audit", "orders") == {}
        await consumer.commit()
        assert committed(cluster.broker, "audit", "orders") == {0: 0, 1: 10}
        await consumer.assign([other])
        assert consumer.held_queues() == [other]
        with pytest.raises(kitemq.InvalidRequestError, match="not read by this consumer"):
            consumer.pause(QUEUE)


async def test_a_seek_back_is_committed(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders")
        await take(consumer, 10)
        await consumer.commit()
        assert await consumer.committed(QUEUE) == 10
        await consumer.seek(QUEUE, 2)
        await take(consumer, 1)
    assert committed(cluster.broker, "audit", "orders") == {0: 3}


async def test_an_offset_beyond_the_end_is_corrected(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    async with puller(cluster, auto_commit=False) as consumer:
        await consumer.assign([QUEUE])
        await consumer.seek(QUEUE, 1000)
        await eventually(lambda: consumer.position(QUEUE) == 10)
        assert "offset corrected queue=orders@broker-a:0 from=1000 to=10" in caplog.text
        await send_to(cluster, QUEUE, ["next"])
        assert bodies(await take(consumer, 1)) == ["next"]


async def test_a_reader_that_retention_overtakes_goes_on_at_the_oldest_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = "x" * 1_000_000
    async with running_cluster(tmp_path, segment_bytes=8 * 1024 * 1024) as cluster:
        store = cluster.broker.store
        await cluster.broker.create_topic("orders", queues=1)
        await send_to(cluster, QUEUE, [f"{i}{body}" for i in range(30)])
        for i in range(2):  # a restart must not need what goes
            store._housekeeping.snapshot()
            await store._thread.drain()
            await cluster.broker.create_topic(f"other-{i}", queues=1)
        await store._retention.run_once(replace(store.config, retention_bytes=1))
        await store._thread.drain()
        oldest = store.queue("orders", 0).min_offset
        assert oldest > 10
        async with puller(cluster) as consumer:
            await consumer.assign([QUEUE])
            await consumer.seek(QUEUE, 1)
            rest = await take(consumer, 30 - oldest)
    assert [message.queue_offset for message in rest] == list(range(oldest, 30))
    assert f"to={oldest}: " in caplog.text
    assert "messages were deleted before they were read" in caplog.text


async def test_all_of_it_over_tls(tmp_path: Path) -> None:
    pem = make_certificates(tmp_path)
    served: dict[str, Any] = {
        "tls_cert_file": pem.server_cert,
        "tls_key_file": pem.server_key,
        "tls_client_ca_file": pem.ca,
    }
    tls = kitemq.TlsConfig(str(pem.ca), str(pem.client_cert), str(pem.client_key))
    namesrv = Namesrv(tmp_path / "namesrv", **served)
    await namesrv.start()
    broker = Broker("broker-a", tmp_path / "broker", [namesrv.address], namesrv_tls_ca_file=pem.ca, **served)
    await broker.start()
    try:
        async with kitemq.Producer(namesrv.address, group="tests", tls=tls) as producer:
            for body in numbers(0, 20):
                await producer.send(kitemq.Message("orders", body.encode()))
        async with kitemq.PullConsumer(
            namesrv.address, group="audit", from_where=kitemq.Position.FIRST, tls=tls
        ) as consumer:
            await consumer.subscribe("orders")
            assert sorted(bodies(await take(consumer, 20)), key=int) == numbers(0, 20)
        assert sum(committed(broker, "audit", "orders").values()) == 20
        async with kitemq.PullConsumer(namesrv.address, group="audit") as stranger:
            with pytest.raises(kitemq.KiteMQError):
                await stranger.queues("orders")
    finally:
        await broker.stop()
        await namesrv.stop()


async def test_a_slow_reader_stops_the_reading_ahead(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 500))
    async with puller(cluster, prefetch_messages=50) as consumer:
        await consumer.subscribe("orders")
        seen = 0
        async for _ in consumer:
            held = consumer._core.held[QUEUE]
            assert held.fetch_offset - seen <= 50 + 50  # read ahead, and the reply it is at
            seen += 1
            if seen == 500:
                break


async def test_broadcasting_keeps_offsets_in_a_file(cluster: Cluster, tmp_path: Path) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    options: dict[str, Any] = {
        "message_model": kitemq.MessageModel.BROADCASTING,
        "client_id": "host/1",
        "offsets_dir": tmp_path / "offsets",
    }
    async with puller(cluster, **options) as consumer, puller(cluster, **(options | {"client_id": "host/2"})) as second:
        await consumer.subscribe("orders")
        await second.subscribe("orders")
        assert bodies(await take(consumer, 4)) == numbers(0, 4)
        assert bodies(await take(second, 10)) == numbers(0, 10)
    async with puller(cluster, **options) as consumer:
        await consumer.subscribe("orders")
        assert bodies(await take(consumer, 6)) == numbers(4, 10)
    assert committed(cluster.broker, "audit", "orders") == {}


async def test_a_topic_that_is_deleted_and_made_again_is_read_from_its_first_message(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 5))
    async with puller(cluster, from_where=kitemq.Position.LAST) as consumer:
        await consumer.subscribe("orders")
        await eventually(lambda: consumer.held_queues())
        await cluster.broker.delete_topic("orders")
        await eventually(lambda: not consumer.held_queues())
        await cluster.broker.create_topic("orders", queues=1)
        await send_to(cluster, QUEUE, ["new"])
        assert bodies(await take(consumer, 1)) == ["new"]


async def test_unsubscribe_hands_the_queues_over(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await cluster.broker.create_topic("bills", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 5))
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders")
        await consumer.subscribe("bills")
        await eventually(lambda: len(consumer.held_queues()) == 2)
        assert len(await take(consumer, 5)) == 5
        await consumer.poll(timeout_s=0.01)
        await consumer.unsubscribe("orders")
        assert [queue.topic for queue in consumer.held_queues()] == ["bills"]
        assert committed(cluster.broker, "audit", "orders") == {0: 5}


async def test_closing_inside_the_loop(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=1)
    await send_to(cluster, QUEUE, numbers(0, 10))
    seen = 0
    async with puller(cluster) as consumer:
        await consumer.subscribe("orders")
        async for _ in consumer:
            seen += 1
            if seen == 10:
                await consumer.close()
    assert seen == 10
    assert committed(cluster.broker, "audit", "orders") == {0: 9}  # the program was still at the last one


async def test_closing_ends_the_loop_and_leaves_nothing_behind(cluster: Cluster) -> None:
    await cluster.broker.create_topic("orders", queues=2)
    consumer = puller(cluster)
    with pytest.raises(kitemq.ClientClosedError, match="not open"):
        await consumer.subscribe("orders")
    async with consumer:
        await consumer.subscribe("orders")
        looping = asyncio.create_task(take(consumer, 1))
        polling = asyncio.create_task(asyncio.sleep(0))
        await eventually(lambda: consumer.held_queues())
        await consumer.close()
        assert await looping == []
        await polling
    with pytest.raises(kitemq.ClientClosedError, match="closed"):
        await consumer.poll()
    with pytest.raises(kitemq.ClientClosedError, match="opened once"):
        await consumer.__aenter__()
    await eventually(lambda: not sdk_tasks())


@pytest.mark.parametrize("turns", range(0, 150, 15))
async def test_cancelled_at_any_moment_leaves_nothing_behind(cluster: Cluster, turns: int) -> None:
    await cluster.broker.create_topic("orders", queues=2)
    await send(cluster, "orders", numbers(0, 20))

    async def program() -> None:
        async with puller(cluster) as consumer:
            await consumer.subscribe("orders")
            async for _ in consumer:
                pass

    task = asyncio.create_task(program())
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: not sdk_tasks())


async def test_bad_input(cluster: Cluster) -> None:
    namesrv = cluster.namesrv_address
    options: dict[str, Any]
    for options in (
        {"group": "no spaces"},
        {"group": "DEFAULT_CONSUMER"},
        {"prefetch_messages": 0},
        {"prefetch_bytes": 1},
        {"commit_interval_s": 0},
        {"from_where": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"from_where": "first"},
    ):
        with pytest.raises(kitemq.InvalidRequestError):
            kitemq.PullConsumer(namesrv, **({"group": "audit"} | options))
    with pytest.raises(kitemq.InvalidRequestError, match="host:port"):
        kitemq.PullConsumer("nowhere", group="audit")
    async with puller(cluster) as consumer:
        with pytest.raises(kitemq.InvalidRequestError):
            await consumer.subscribe("no spaces")
        with pytest.raises(kitemq.InvalidRequestError, match="no tag"):
            await consumer.subscribe("orders", filter="a | b")
        await consumer.subscribe("orders")
        with pytest.raises(kitemq.InvalidRequestError, match="already"):
            await consumer.subscribe("orders")
        with pytest.raises(kitemq.InvalidRequestError, match="subscribed"):
            await consumer.assign([QUEUE])
        with pytest.raises(kitemq.InvalidRequestError, match="negative"):
            await consumer.seek(QUEUE, -1)
