"""The producer against the real broker, with a network between them that loses replies."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

import kitemq
from kitemq import Message, MessageQueue, sync
from kitemq.proto.v1 import message_pb2
from tests.cluster import Cluster, running_cluster
from tests.flaky_proxy import FlakyProxy, flaky_proxy
from tests.waiting import eventually


@pytest_asyncio.fixture
async def proxied(tmp_path: Path) -> AsyncIterator[tuple[Cluster, FlakyProxy]]:
    """A cluster whose broker advertises the proxy's address."""
    async with flaky_proxy("") as proxy, running_cluster(tmp_path, advertise=f"internal={proxy.address}") as cluster:
        proxy.target = cluster.broker.address
        await cluster.broker.create_topic("t", queues=4)
        yield cluster, proxy


def stored(cluster: Cluster, queue_id: int) -> list[bytes]:
    store = cluster.broker.store
    queue = store.queue("t", queue_id)
    if queue is None:
        return []
    bodies: list[bytes] = []
    offset = queue.min_offset
    while offset < queue.max_offset:
        result = store.read(queue, offset, count_max=1000, bytes_max=1 << 24)
        bodies += [message.body for message in message_pb2.Segment.FromString(result.records).records]
        offset = result.next_offset
    return bodies


@pytest.mark.parametrize("restart", [False, True], ids=["same broker", "after a restart"])
async def test_a_send_whose_reply_is_lost_is_stored_once(proxied: tuple[Cluster, FlakyProxy], restart: bool) -> None:
    cluster, proxy = proxied
    queue = MessageQueue("t", "broker-a", 0)
    async with kitemq.Producer(cluster.namesrv_address, group="g", request_timeout_s=0.5) as mq:
        await mq.send(Message("t", b"warm"), queue=queue)
        proxy.drop_replies = True
        sends = []
        for i in range(200):
            sends.append(asyncio.ensure_future(mq.send(Message("t", b"%d" % i), queue=queue)))
            if i % 50 == 49:
                await asyncio.sleep(0.01)  # several requests in flight when the reply is lost
        await eventually(lambda: len(stored(cluster, 0)) == 201)
        assert proxy.dropped_bytes and not any(send.done() for send in sends)
        proxy.cut()
        if restart:
            await cluster.broker.restart()
            proxy.target = cluster.broker.address
        proxy.drop_replies = False
        receipts = await asyncio.gather(*sends)
    assert stored(cluster, 0) == [b"warm", *(b"%d" % i for i in range(200))]
    assert [receipt.queue_offset for receipt in receipts] == list(range(1, 201))
    assert any(receipt.repeated for receipt in receipts)


async def test_sends_go_on_through_cuts_and_restarts_in_order_and_once(proxied: tuple[Cluster, FlakyProxy]) -> None:
    cluster, proxy = proxied
    count = 3000
    async with kitemq.Producer(cluster.namesrv_address, group="g", request_timeout_s=1.0) as mq:

        async def stream(queue_id: int) -> None:
            window: list[asyncio.Future[object]] = []
            for i in range(count):
                message = Message("t", b"%d" % i)
                window.append(asyncio.ensure_future(mq.send(message, queue=MessageQueue("t", "broker-a", queue_id))))
                if len(window) >= 64:
                    await window.pop(0)
            await asyncio.gather(*window)

        async def disturb() -> None:
            for step in range(6):
                await asyncio.sleep(0.15)
                proxy.drop_replies = step % 2 == 0
                await asyncio.sleep(0.02)
                proxy.cut()
                proxy.drop_replies = False
                if step == 3:
                    await cluster.broker.restart()
                    proxy.target = cluster.broker.address

        disturbing = asyncio.create_task(disturb())
        await asyncio.gather(stream(0), stream(1))
        await disturbing
    for queue_id in (0, 1):
        assert stored(cluster, queue_id) == [b"%d" % i for i in range(count)]


async def test_one_of_two_brokers_goes_and_sends_go_on(cluster: Cluster) -> None:
    second = await cluster.add_broker("broker-b")
    for broker in cluster.brokers:
        await broker.create_topic("t")
    async with kitemq.Producer(cluster.namesrv_address, group="g") as mq:
        names = {(await mq.send(Message("t", b"x"))).queue.broker_name for _ in range(16)}
        assert names == {"broker-a", "broker-b"}
        await second.stop()
        receipts = await asyncio.gather(*(mq.send(Message("t", b"x")) for _ in range(200)))
        assert {receipt.queue.broker_name for receipt in receipts} == {"broker-a"}


async def test_a_namesrv_that_goes_does_not_disturb_and_one_of_two_is_enough(cluster: Cluster) -> None:
    namesrvs = f"127.0.0.1:1;{cluster.namesrv_address}"
    async with kitemq.Producer(namesrvs, group="g") as mq:
        await mq.send(Message("fresh", b"x"))
        await cluster.namesrv.stop()
        await asyncio.gather(*(mq.send(Message("fresh", b"x")) for _ in range(100)))
        await cluster.namesrv.start()
        await mq.send(Message("another", b"x"))


async def test_an_auto_created_topic_has_four_queues_and_its_own_route_soon(cluster: Cluster) -> None:
    async with kitemq.Producer(cluster.namesrv_address, group="g") as mq:
        queues = {(await mq.send(Message("auto", b"x"))).queue.queue_id for _ in range(12)}
        assert queues == {0, 1, 2, 3}
        config = cluster.broker.store.topics.get("auto")
        assert (config.read_queue_count, config.write_queue_count) == (4, 4)


async def test_a_body_that_compresses_is_stored_small_and_read_whole(cluster: Cluster) -> None:
    await cluster.broker.create_topic("t")
    text = b"a line of text\n" * 1000
    async with kitemq.Producer(cluster.namesrv_address, group="g") as mq:
        await mq.send(Message("t", text), queue=MessageQueue("t", "broker-a", 0))
    assert len(stored(cluster, 0)[0]) < len(text) // 10


def test_the_sync_producer_sends_from_many_threads(tmp_path: Path) -> None:
    ready, done = threading.Event(), threading.Event()
    address: list[str] = []

    async def serve() -> None:
        async with running_cluster(tmp_path) as cluster:
            address.append(cluster.namesrv_address)
            ready.set()
            await asyncio.to_thread(done.wait)

    server = threading.Thread(target=lambda: asyncio.run(serve()))
    server.start()
    try:
        assert ready.wait(20)
        with sync.Producer(address[0], group="g") as mq:
            offsets: list[tuple[int, int]] = []

            def work() -> None:
                for i in range(50):
                    receipt = mq.send(Message("t", b"%d" % i))
                    offsets.append((receipt.queue.queue_id, receipt.queue_offset))

            threads = [threading.Thread(target=work) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(set(offsets)) == 400
            assert len(mq.send_batch([Message("t", b"x")] * 3)) == 3
            mq.send_oneway(Message("t", b"x"))
            mq.flush()
            with pytest.raises(kitemq.InvalidMessageError):
                mq.send(Message("t", b""))
        with pytest.raises(kitemq.ClientClosedError):
            mq.send(Message("t", b"x"))
        assert not any(thread.name == "kitemq" for thread in threading.enumerate())
    finally:
        done.set()
        server.join()


def test_the_sync_producer_has_the_same_names_and_arguments() -> None:
    inner = {"broker_failed", "delivered", "failed", "move", "start_send"}  # between the producer and its senders

    def methods(cls: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(method).replace(return_annotation=inspect.Signature.empty))
            for name, method in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") and name not in inner
        }

    assert methods(kitemq.Producer) == methods(sync.Producer)
