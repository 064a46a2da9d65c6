"""A namesrv over real gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitemq.errors import ERROR_METADATA_KEY, ERRORS
from kitemq.proto.v1 import namesrv_pb2 as pb
from kitemq.proto.v1 import namesrv_pb2_grpc
from kitemq_server.namesrv.server import run_namesrv
from tests.namesrv.helpers import (
    FakeClock,
    addresses_of,
    dialled,
    identity,
    namesrv_config,
    registration,
)


def watch(stub: namesrv_pb2_grpc.NamesrvAsyncStub, *topics: str) -> Any:
    return stub.WatchRoutes(pb.WatchRoutesRequest(topics=topics))


async def refused(call: Any) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call
    metadata = dict(failure.value.trailing_metadata() or ())
    return failure.value.code(), str(metadata.get(ERROR_METADATA_KEY)), failure.value.details() or ""


async def test_register_then_route(tmp_path: Path) -> None:
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity("broker-b", epoch=7), "orders", queues=8))
        response = await stub.RegisterBroker(registration(identity("broker-a"), "orders"))
        assert response.master.broker_name == "broker-a"
        route = await stub.GetRoute(pb.GetRouteRequest(topic="orders"))
        assert [(q.broker_name, q.read_queue_count, q.permission) for q in route.queues] == [
            ("broker-a", 4, 6),
            ("broker-b", 8, 6),
        ]
        assert addresses_of(route) == {"broker-a": ["broker-a-0:10911"], "broker-b": ["broker-b-0:10911"]}
        assert route.brokers[1].brokers[0].epoch == 7
        assert route.brokers[1].brokers[0].boot_id == "boot-broker-b-0"
        code, name, text = await refused(stub.GetRoute(pb.GetRouteRequest(topic="nowhere")))
        assert (code, name) == (grpc.StatusCode.NOT_FOUND, "TopicNotFoundError")
        assert "nowhere" in text
        assert (await stub.ListTopics(pb.ListTopicsRequest())).topics == ["orders"]
        assert (await stub.ListTopics(pb.ListTopicsRequest(cluster_name="no"))).topics == []


async def test_heartbeats_ask_for_a_registration_only_when_something_is_new(tmp_path: Path) -> None:
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        broker = identity()

        async def wanted(counter: int) -> bool:
            version = pb.DataVersion(timestamp_ms=1, counter=counter)
            response = await stub.BrokerHeartbeat(pb.BrokerHeartbeatRequest(broker=broker, data_version=version))
            return response.register_wanted

        assert await wanted(1)
        await stub.RegisterBroker(registration(broker, "t"))
        assert not await wanted(1)
        assert await wanted(2)


async def test_an_old_master_is_told_so(tmp_path: Path) -> None:
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity(epoch=5), "t"))
        old = identity(epoch=4, boot_id="old", addresses={"internal": "old:1"})
        code, name, text = await refused(stub.RegisterBroker(registration(old, "t")))
        assert (code, name) == (grpc.StatusCode.ABORTED, "FencedEpochError")
        assert "epoch 4" in text
        assert "epoch 5" in text
        slave = await stub.RegisterBroker(registration(identity(broker_id=1), "t"))
        assert slave.master.epoch == 5


async def test_silent_brokers_expire_and_watchers_hear_of_it(tmp_path: Path) -> None:
    clock = FakeClock()
    config = namesrv_config(tmp_path)
    async with run_namesrv(config, clock=clock) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity("broker-a"), "t", expiry_ms=3_600_000))
        await stub.RegisterBroker(registration(identity("broker-b"), "t", "u"))
        stream = watch(stub, "t", "u", "later")
        first = [await stream.read() for _ in range(3)]
        assert [(route.topic, sorted(addresses_of(route))) for route in first] == [
            ("t", ["broker-a", "broker-b"]),
            ("u", ["broker-b"]),
            ("later", []),
        ]
        clock.now_ms += 120_001
        changes = {(route := await stream.read()).topic: route for _ in range(2)}
        assert sorted(addresses_of(changes["t"])) == ["broker-a"]
        assert not changes["u"].queues
        assert not changes["u"].brokers
        cluster = await stub.GetCluster(pb.GetClusterRequest())
        assert [member.broker.broker_name for member in cluster.brokers] == ["broker-a"]
        await stub.RegisterBroker(registration(identity("broker-b"), "later"))
        assert (await stream.read()).topic == "later"
        stream.cancel()


async def test_a_clean_goodbye_is_seen_at_once(tmp_path: Path) -> None:
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity(), "t"))
        stream = watch(stub, "t")
        assert (await stream.read()).queues
        await stub.UnregisterBroker(pb.UnregisterBrokerRequest(broker=identity()))
        assert not (await stream.read()).queues
        stream.cancel()


async def test_a_client_is_told_the_addresses_of_its_listener(tmp_path: Path) -> None:
    config = namesrv_config(tmp_path, listen="internal=127.0.0.1:0,external=127.0.0.1:0")
    async with (
        run_namesrv(config) as namesrv,
        dialled(f"127.0.0.1:{namesrv.ports['internal']}") as inside,
        dialled(f"127.0.0.1:{namesrv.ports['external']}") as outside,
    ):
        both = {"internal": "in:1", "external": "out:1"}
        await inside.RegisterBroker(registration(identity("both", addresses=both), "t"))
        await inside.RegisterBroker(registration(identity("one", addresses={"internal": "only:1"}), "t"))
        ask = pb.GetRouteRequest(topic="t")
        assert addresses_of(await inside.GetRoute(ask)) == {"both": ["in:1"], "one": ["only:1"]}
        assert addresses_of(await outside.GetRoute(ask)) == {"both": ["out:1"], "one": ["only:1"]}
        by_name = pb.GetRouteRequest(topic="t", listener="external")
        assert addresses_of(await inside.GetRoute(by_name)) == {"both": ["out:1"], "one": ["only:1"]}
        unknown = pb.GetRouteRequest(topic="t", listener="nobody-has-this")
        assert addresses_of(await outside.GetRoute(unknown)) == {"both": ["in:1"], "one": ["only:1"]}
        stream = watch(outside, "t")
        assert addresses_of(await stream.read()) == {"both": ["out:1"], "one": ["only:1"]}
        stream.cancel()
        cluster = await outside.GetCluster(pb.GetClusterRequest())
        assert [member.address for member in cluster.brokers] == ["out:1", "only:1"]


async def test_write_permission_is_taken_and_given_back(tmp_path: Path) -> None:
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity(), "t", "u"))
        stream = watch(stub, "t")
        assert (await stream.read()).queues[0].permission == 6
        ask = pb.SetWritePermissionRequest(broker_name="broker-a", writable=False)
        assert (await stub.SetWritePermission(ask)).topic_count == 2
        assert (await stream.read()).queues[0].permission == 4
        assert not (await stub.GetCluster(pb.GetClusterRequest())).brokers[0].writable
        ask.writable = True
        assert (await stub.SetWritePermission(ask)).topic_count == 2
        assert (await stream.read()).queues[0].permission == 6
        stream.cancel()
        code, name, _ = await refused(stub.SetWritePermission(pb.SetWritePermissionRequest(broker_name="?")))
        assert (code, name) == (grpc.StatusCode.NOT_FOUND, "NotFoundError")


async def test_key_values_survive_a_restart_and_reach_routes_and_brokers(tmp_path: Path) -> None:
    put = pb.PutKeyValueRequest(namespace="ORDER_TOPIC_CONFIG", key="t", value="broker-a:4;broker-b:4")
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity(), "t"))
        stream = watch(stub, "t")
        assert not (await stream.read()).order_config
        await stub.PutKeyValue(put)
        assert (await stream.read()).order_config == put.value
        stream.cancel()
        wrong = pb.PutKeyValueRequest(namespace=put.namespace, key="t", value="broker-a four")
        assert (await refused(stub.PutKeyValue(wrong)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, dialled(namesrv.address) as stub:
        get = pb.GetKeyValueRequest(namespace=put.namespace, key="t")
        assert (await stub.GetKeyValue(get)).value == put.value
        response = await stub.RegisterBroker(registration(identity(), "t"))
        assert dict(response.order_topics) == {"t": put.value}
        listed = await stub.ListKeyValues(pb.ListKeyValuesRequest(namespace=put.namespace))
        assert dict(listed.values) == {"t": put.value}
        await stub.DeleteKeyValue(pb.DeleteKeyValueRequest(namespace=put.namespace, key="t"))
        assert (await refused(stub.GetKeyValue(get)))[1] == "NotFoundError"
        assert not (await stub.GetRoute(pb.GetRouteRequest(topic="t"))).order_config


async def test_a_stop_ends_watches_with_a_word(tmp_path: Path) -> None:
    """Not by cancelling them after the grace time."""
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv:
        channel = grpc.aio.insecure_channel(namesrv.address)
        stub: Any = namesrv_pb2_grpc.NamesrvStub(channel)
        streams = [stub.WatchRoutes(pb.WatchRoutesRequest(topics=["t"])) for _ in range(20)]
        for stream in streams:
            await stream.read()
    for stream in streams:
        assert await stream.code() is grpc.StatusCode.UNAVAILABLE
        assert ("kitemq-error", "BrokerUnavailableError") in tuple(await stream.trailing_metadata())
    await channel.close()


async def test_metrics_tell_what_is_registered(tmp_path: Path) -> None:
    config = namesrv_config(tmp_path, metrics_listen="127.0.0.1:0")
    async with run_namesrv(config) as namesrv, dialled(namesrv.address) as stub:
        await stub.RegisterBroker(registration(identity(), "t", "u"))
        reader, writer = await asyncio.open_connection("127.0.0.1", namesrv.metrics_port)
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
    for line in (
        'kitemq_namesrv_brokers{cluster="DefaultCluster"} 1.0',
        "kitemq_namesrv_topics 2.0",
        "kitemq_namesrv_registrations_total 1.0",
        'request_code="Namesrv/RegisterBroker",response_code="OK"} 1.0',
    ):
        assert line in text


# ---- malformed input ----

METHODS = {
    method.name: GetMessageClass(method.input_type)
    for method in pb.DESCRIPTOR.services_by_name["Namesrv"].methods
    if not method.server_streaming
}
ALLOWED = {cls.code for cls in ERRORS.values()} - {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}

_texts = st.one_of(st.text(max_size=8), st.sampled_from(["t", "broker-a", "a:1", "ORDER_TOPIC_CONFIG", "x" * 5_000]))
_numbers = st.sampled_from([0, 1, 2, 15, 1_000, 2**31 - 1])
_identities = st.builds(
    pb.BrokerIdentity,
    cluster_name=_texts,
    broker_name=_texts,
    broker_id=_numbers,
    role=_numbers,
    epoch=_numbers,
    boot_id=_texts,
    boot_timestamp_ms=_numbers,
    addresses=st.dictionaries(_texts, _texts, max_size=3),
)


@st.composite
def _requests(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(METHODS)))
    if draw(st.booleans()):
        return name, draw(st.binary(max_size=200))
    message: Any = METHODS[name]()
    for field in message.DESCRIPTOR.fields:
        if field.is_repeated:
            continue
        if field.message_type is pb.BrokerIdentity.DESCRIPTOR:
            message.broker.CopyFrom(draw(st.one_of(_identities, st.just(identity()))))
        elif field.cpp_type == field.CPPTYPE_STRING:
            setattr(message, field.name, draw(_texts))
        elif field.cpp_type == field.CPPTYPE_UINT32:
            setattr(message, field.name, draw(_numbers))
    if name == "RegisterBroker":
        for topic in draw(st.lists(_texts, max_size=3)):
            message.topics.add(name=topic, read_queue_count=draw(_numbers), permission=draw(_numbers))
    return name, message.SerializeToString()


async def test_malformed_requests_get_a_status_of_the_table(tmp_path: Path) -> None:
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv:
        channel: Any = grpc.aio.insecure_channel(namesrv.address)
        loop = asyncio.get_running_loop()

        async def send(name: str, data: bytes) -> grpc.StatusCode:
            try:
                await channel.unary_unary(f"/kitemq.v1.Namesrv/{name}")(data, timeout=10)
            except grpc.aio.AioRpcError as error:
                if error.code() in ALLOWED:
                    assert dict(error.trailing_metadata() or ())[ERROR_METADATA_KEY] in ERRORS
                return error.code()
            return grpc.StatusCode.OK

        @given(_requests())
        @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
        def fuzz(request: tuple[str, bytes]) -> None:
            code = asyncio.run_coroutine_threadsafe(send(*request), loop).result()
            assert code is grpc.StatusCode.OK or code in ALLOWED

        await asyncio.to_thread(fuzz)
        for bad in (b"\xff\xff", b"", pb.WatchRoutesRequest(topics=["t"] * 5_000).SerializeToString()):
            stream = channel.unary_stream("/kitemq.v1.Namesrv/WatchRoutes")(bad)
            assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
        async with dialled(namesrv.address) as stub:
            await stub.ListTopics(pb.ListTopicsRequest())
        await channel.close()
