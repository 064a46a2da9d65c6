"""A broker and the namesrv: its topics are routed while it serves, and at once no more when it stops."""

from __future__ import annotations

from pathlib import Path

from kitemq.proto.v1 import admin_pb2
from kitemq.proto.v1.message_pb2 import TopicConfig
from kitemq.proto.v1.namesrv_pb2 import GetRouteRequest, ListTopicsRequest
from kitemq_server.namesrv.server import run_namesrv
from tests.broker.conftest import Start
from tests.broker.wire import Client, batch, numbered, refused, until
from tests.namesrv.helpers import dialled, namesrv_config


async def test_topics_are_routed_from_creation_to_the_end(tmp_path: Path, start: Start) -> None:
    async with run_namesrv(namesrv_config(tmp_path / "namesrv")) as namesrv, dialled(namesrv.address) as routes:
        async with start(namesrv=(namesrv.address,)) as handle:
            client = Client(handle.address)
            await client.admin.SetTopic(
                admin_pb2.SetTopicRequest(topic=TopicConfig(name="orders", read_queue_count=3, write_queue_count=2))
            )
            # Known to the namesrv as soon as it is answered.
            route = await routes.GetRoute(GetRouteRequest(topic="orders"))
            (queues,) = route.queues
            assert (queues.broker_name, queues.read_queue_count, queues.write_queue_count) == ("broker-a", 3, 2)
            assert [broker.address for broker in route.brokers[0].brokers] == [handle.address]
            await client.send_stream().send(batch(numbered("made", 1, 1)))
            known: set[str] = set()

            async def look() -> bool:
                known.update((await routes.ListTopics(ListTopicsRequest())).topics)
                return "made" in known

            while not await look():
                pass
            await client.admin.SetConfig(admin_pb2.SetConfigRequest(values={"permission": "4"}))
            route = await routes.GetRoute(GetRouteRequest(topic="orders"))
            assert route.queues[0].permission == 4
            await client.admin.DeleteTopic(admin_pb2.DeleteTopicRequest(topic="orders"))
            with refused("TopicNotFoundError"):
                await routes.GetRoute(GetRouteRequest(topic="orders"))
            await client.close()
        with refused("TopicNotFoundError"):
            await routes.GetRoute(GetRouteRequest(topic="made"))


async def test_a_broker_serves_without_a_namesrv(start: Start) -> None:
    async with start(namesrv=("127.0.0.1:1",)) as handle:
        client = Client(handle.address)
        (result,) = await client.send_stream().send(batch(numbered("orders", 1, 1)))
        assert not result.HasField("error")
        await client.admin.SetTopic(admin_pb2.SetTopicRequest(topic=TopicConfig(name="mine")))
        await until(lambda: "mine" in handle.broker.store.topics)
        await client.close()
