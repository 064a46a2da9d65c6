"""A broker's registration with real namesrvs that come, go and forget."""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from kitemq.proto.v1 import namesrv_pb2 as pb
from kitemq.proto.v1.message_pb2 import TopicConfig
from kitemq.rpc import TlsConfig
from kitemq_server.broker.registration import Registrar, registered
from kitemq_server.namesrv.server import NamesrvHandle, run_namesrv
from tests.certificates import make_certificates
from tests.namesrv.helpers import dialled, identity, namesrv_config
from tests.waiting import eventually


class Topics:
    """What a broker would have."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.version = 1

    def add(self, name: str) -> None:
        self.names.append(name)
        self.version += 1

    def registrar(self, *, broker: pb.BrokerIdentity | None = None, heartbeat_interval_ms: int = 30_000) -> Registrar:
        return Registrar(
            identity=lambda: broker or identity(),
            data_version=lambda: pb.DataVersion(timestamp_ms=1, counter=self.version),
            topics=lambda: [
                TopicConfig(name=name, read_queue_count=4, write_queue_count=4, permission=6) for name in self.names
            ],
            heartbeat_interval_ms=heartbeat_interval_ms,
            expiry_ms=120_000,
        )


async def topics_of(namesrv: NamesrvHandle) -> list[str]:
    async with dialled(namesrv.address) as stub:
        return list((await stub.ListTopics(pb.ListTopicsRequest())).topics)


async def members_of(address: str) -> Any:
    async with dialled(address) as stub:
        return (await stub.GetCluster(pb.GetClusterRequest())).brokers


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_every_namesrv_hears_of_start_change_and_stop(tmp_path: Path) -> None:
    topics = Topics("t")
    registrar = topics.registrar()
    async with AsyncExitStack() as stack:
        namesrvs = [await stack.enter_async_context(run_namesrv(namesrv_config(tmp_path / n))) for n in "ab"]
        async with registered(registrar, [namesrv.address for namesrv in namesrvs]):
            assert await registrar.synced()
            assert [await topics_of(namesrv) for namesrv in namesrvs] == [["t"], ["t"]]
            assert len(registrar.reached()) == 2
            topics.add("u")
            registrar.notify_topics_changed()
            assert await registrar.synced()
            assert [await topics_of(namesrv) for namesrv in namesrvs] == [["t", "u"], ["t", "u"]]
        assert [await topics_of(namesrv) for namesrv in namesrvs] == [[], []]


async def test_changes_of_one_turn_travel_together(tmp_path: Path) -> None:
    topics = Topics()
    registrar = topics.registrar()
    config = namesrv_config(tmp_path, metrics_listen="127.0.0.1:0")
    async with run_namesrv(config) as namesrv, registered(registrar, [namesrv.address]):
        await registrar.synced()
        asked = 0
        ask = registrar.topics

        def counted() -> Any:
            nonlocal asked
            asked += 1
            return ask()

        registrar.topics = counted
        for number in range(100):
            topics.add(f"t{number}")
            registrar.notify_topics_changed()
        assert await registrar.synced()
        assert len(await topics_of(namesrv)) == 100
        assert asked == 1


async def test_a_namesrv_that_is_away_delays_nothing(tmp_path: Path) -> None:
    topics = Topics("t")
    registrar = topics.registrar()
    port = free_port()
    async with (
        run_namesrv(namesrv_config(tmp_path / "a")) as here,
        registered(registrar, [f"127.0.0.1:{port}", here.address]),
    ):
        assert await registrar.synced()
        assert await topics_of(here) == ["t"]
        assert registrar.reached() == [here.address]
        topics.add("u")
        registrar.notify_topics_changed()
        assert await registrar.synced()
        async with run_namesrv(namesrv_config(tmp_path / "b", listen=f"127.0.0.1:{port}")) as late:
            await eventually(lambda: late.address in registrar.reached())
            assert await topics_of(late) == ["t", "u"]


async def test_a_restarted_namesrv_is_told_at_once(tmp_path: Path) -> None:
    """The next heartbeat is 30 s away: it is the connection that says that the namesrv is back."""
    topics = Topics("t")
    registrar = topics.registrar()
    port = free_port()
    config = namesrv_config(tmp_path, listen=f"127.0.0.1:{port}")
    async with AsyncExitStack() as broker:
        for _ in range(3):
            async with run_namesrv(config) as namesrv:
                if not registrar.links:
                    await broker.enter_async_context(registered(registrar, [namesrv.address]))
                await eventually(lambda: topics_of(namesrv))


async def test_heartbeats_keep_a_broker_and_bring_a_forgotten_one_back(tmp_path: Path) -> None:
    registrar = Topics("t").registrar(heartbeat_interval_ms=20)
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, registered(registrar, [namesrv.address]):
        assert await registrar.synced()

        async def heard_ms() -> int:
            return int((await members_of(namesrv.address))[0].last_heartbeat_timestamp_ms)

        first = await heard_ms()

        async def heard_again() -> bool:
            return await heard_ms() > first

        await eventually(heard_again)
        async with dialled(namesrv.address) as stub:
            await stub.UnregisterBroker(pb.UnregisterBrokerRequest(broker=identity()))
        await eventually(lambda: topics_of(namesrv))


async def test_a_fenced_broker_keeps_running_and_takes_nothing_over(tmp_path: Path) -> None:
    new = Topics("t").registrar(broker=identity(epoch=5, boot_id="new", addresses={"internal": "new:1"}))
    old = Topics("t").registrar(broker=identity(epoch=4, boot_id="old", addresses={"internal": "old:1"}))
    async with run_namesrv(namesrv_config(tmp_path)) as namesrv, registered(new, [namesrv.address]):
        assert await new.synced()
        async with registered(old, [namesrv.address]):
            assert await old.synced()
            assert old.reached() == []
        assert [member.broker.boot_id for member in await members_of(namesrv.address)] == ["new"]


async def test_a_namesrv_that_hangs_does_not_hold_up_the_stop(tmp_path: Path) -> None:
    """It takes connections and never answers."""
    registrar = Topics("t").registrar()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with asyncio.timeout(20), registered(registrar, [f"127.0.0.1:{silent.getsockname()[1]}"]):
            assert not await registrar.synced(timeout_s=0.05)


async def test_registration_over_tls(tmp_path: Path) -> None:
    pem = make_certificates(tmp_path / "pem")
    config = namesrv_config(
        tmp_path / "data", tls_cert_file=pem.server_cert, tls_key_file=pem.server_key, tls_client_ca_file=pem.ca
    )
    tls = TlsConfig(ca_file=str(pem.ca), cert_file=str(pem.client_cert), key_file=str(pem.client_key))
    anonymous = TlsConfig(ca_file=str(pem.ca))
    async with run_namesrv(config) as namesrv:
        registrar = Topics("t").registrar()
        async with registered(registrar, [namesrv.address], tls=tls):
            assert await registrar.synced()
            assert registrar.reached() == [namesrv.address]
        for refused in (anonymous, None):
            registrar = Topics("t").registrar()
            async with registered(registrar, [namesrv.address], tls=refused):
                assert await registrar.synced()
                assert registrar.reached() == []
