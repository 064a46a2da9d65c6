"""A namesrv that restarts disturbs nobody: it says nothing of routes until the brokers it knew are back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import grpc
import grpc.aio
import pytest

import kitemq
from kitemq.proto.v1 import namesrv_pb2 as pb
from kitemq_server.namesrv.roster import Roster
from kitemq_server.namesrv.server import run_namesrv
from tests.cluster import running_cluster
from tests.namesrv.helpers import addresses_of, dialled, identity, namesrv_config, registration
from tests.waiting import eventually


async def test_routes_wait_for_the_brokers_known_before(tmp_path: Path) -> None:
    config = namesrv_config(tmp_path)
    async with run_namesrv(config) as namesrv, dialled(namesrv.address) as stub:
        for name in ("broker-a", "broker-b", "broker-gone"):
            await stub.RegisterBroker(registration(identity(name), "t"))
        await stub.UnregisterBroker(pb.UnregisterBrokerRequest(broker=identity("broker-gone")))
    assert json.loads((tmp_path / "brokers.json").read_text()) == ["broker-a/0", "broker-b/0"]
    async with run_namesrv(config) as namesrv, dialled(namesrv.address) as stub:
        stream = stub.WatchRoutes(pb.WatchRoutesRequest(topics=["t"]))
        await stub.RegisterBroker(registration(identity("broker-a"), "t"))
        with pytest.raises(grpc.aio.AioRpcError, match="waits for 1 brokers") as refusal:
            await stub.GetRoute(pb.GetRouteRequest(topic="t"))
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        await stub.RegisterBroker(registration(identity("broker-b"), "t"))
        whole = ["broker-a", "broker-b"]
        assert sorted(addresses_of(await stub.GetRoute(pb.GetRouteRequest(topic="t")))) == whole
        first = await stream.read()
        assert isinstance(first, pb.TopicRoute)
        assert sorted(addresses_of(first)) == whole
        stream.cancel()


async def test_a_broker_that_does_not_come_back_is_waited_for_only_so_long(tmp_path: Path) -> None:
    (tmp_path / "brokers.json").write_text('["broker-a/0", "broker-b/0"]')
    async with run_namesrv(namesrv_config(tmp_path, warm_up_ms=50)) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity("broker-a"), "t"))
        stream = stub.WatchRoutes(pb.WatchRoutesRequest(topics=["t"]))
        route = await stream.read()
        assert isinstance(route, pb.TopicRoute)
        assert sorted(addresses_of(route)) == ["broker-a"]
        stream.cancel()
    assert json.loads((tmp_path / "brokers.json").read_text()) == ["broker-a/0"]


async def test_a_broker_that_says_goodbye_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "brokers.json").write_text('["broker-a/0"]')
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        await stub.UnregisterBroker(pb.UnregisterBrokerRequest(broker=identity("broker-a")))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await stub.GetRoute(pb.GetRouteRequest(topic="t"))
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff"])
def test_a_damaged_roster_is_no_reason_not_to_serve(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "brokers.json"
    path.write_bytes(content)
    assert Roster(path).awaited == set()


async def test_producers_and_consumers_do_not_notice(tmp_path: Path) -> None:
    sent: list[bytes] = []
    seen: list[bytes] = []
    shares: list[int] = []
    async with running_cluster(tmp_path) as cluster:
        await cluster.add_broker("broker-b")
        for broker in cluster.brokers:
            await broker.create_topic("orders")
        running = asyncio.Event()
        running.set()

        async def produce(producer: kitemq.Producer) -> None:
            while running.is_set():
                body = b"%d" % len(sent)
                await producer.send(kitemq.Message("orders", body))
                sent.append(body)

        async def handle(message: kitemq.ReceivedMessage) -> None:
            seen.append(message.body)

        async with (
            kitemq.Producer(cluster.namesrv_address, group="shop") as producer,
            kitemq.PushConsumer(cluster.namesrv_address, group="billing", from_where=kitemq.Position.FIRST) as consumer,
        ):
            await consumer.subscribe("orders", handle)
            consuming = asyncio.create_task(consumer.run())
            producing = asyncio.create_task(produce(producer))
            await eventually(lambda: len(seen) > 50)
            for _ in range(3):
                before = len(seen)
                await cluster.namesrv.restart()
                shares.append(len(await routed(cluster.namesrv_address)))
                await eventually(lambda count=before: len(seen) > count + 50)  # type: ignore[misc]
            running.clear()
            await producing
            await eventually(lambda: len(set(seen)) == len(sent))
            consuming.cancel()
            await asyncio.gather(consuming, return_exceptions=True)
    assert shares == [2, 2, 2]
    assert sorted(seen) == sorted(sent), "nothing twice: no queue ever changed hands"


async def routed(namesrv: str) -> list[str]:
    """The broker names of the topic's route, as soon as the namesrv tells one."""
    async with dialled(namesrv) as stub:
        while True:
            try:
                return sorted(addresses_of(await stub.GetRoute(pb.GetRouteRequest(topic="orders"))))
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE
                await asyncio.sleep(0.01)
