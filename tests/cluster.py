"""A namesrv and brokers in this process, on free ports, each restartable at its address."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from kitemq.proto.v1 import admin_pb2, admin_pb2_grpc
from kitemq.proto.v1.message_pb2 import GroupConfig, TopicConfig
from kitemq.rpc import CHANNEL_OPTIONS
from kitemq_server.broker.config import BrokerConfig
from kitemq_server.broker.server import run_broker
from kitemq_server.common.addresses import parse_listeners
from kitemq_server.namesrv.config import NamesrvConfig
from kitemq_server.namesrv.server import run_namesrv
from kitemq_server.store.disk import Disk


class Service:
    """One service in a task of its own: `start`, `stop`, `restart`. The port stays what it was the first time."""

    def __init__(self) -> None:
        self.address = "127.0.0.1:0"
        self.handle: Any = None
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()

    def _run(self) -> AbstractAsyncContextManager[Any]:
        raise NotImplementedError

    async def start(self) -> None:
        started = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()

        async def serve() -> None:
            try:
                async with self._run() as handle:
                    started.set_result(handle)
                    await self._stop.wait()
            except Exception as error:
                if started.done():
                    raise
                started.set_exception(error)

        self._task = asyncio.create_task(serve(), name=f"test {type(self).__name__}")
        self.handle = await started
        self.address = self.handle.address

    async def stop(self) -> None:
        """Cleanly. Nothing happens when it is not running."""
        task, self._task = self._task, None
        if task is not None:
            self._stop.set()
            await task

    async def restart(self) -> None:
        await self.stop()
        await self.start()


class Namesrv(Service):
    """`config`: keys of NamesrvConfig."""

    def __init__(self, folder: Path, **config: Any) -> None:
        super().__init__()
        self._config: dict[str, Any] = {"data_dir": folder, "metrics_listen": ""} | config

    def _run(self) -> AbstractAsyncContextManager[Any]:
        return run_namesrv(NamesrvConfig(listen=parse_listeners(self.address), **self._config))


class Broker(Service):
    """`config`: keys of BrokerConfig. disk: instead of the real one, also to be changed while it is stopped."""

    def __init__(
        self, name: str, folder: Path, namesrvs: list[str], *, disk: Disk | None = None, **config: Any
    ) -> None:
        super().__init__()
        self.name = name
        self.disk = disk
        self._config: dict[str, Any] = {
            "broker_name": name,
            "data_dir": folder,
            "namesrv": namesrvs,
            "metrics_listen": "",
            "segment_bytes": 64 * 1024 * 1024,
        } | config

    def _run(self) -> AbstractAsyncContextManager[Any]:
        return run_broker(BrokerConfig(listen=parse_listeners(self.address), **self._config), disk=self.disk)

    async def start(self) -> None:
        """Serving, and known to the namesrvs that are there."""
        await super().start()
        await self.handle.broker.registrar.synced()

    @property
    def store(self) -> Any:
        """The MessageStore of the running broker."""
        return self.handle.broker.store

    async def create_topic(self, topic: str, *, queues: int = 4, permission: int = 6) -> None:
        """Create the topic on this broker, or change it."""
        config = TopicConfig(name=topic, read_queue_count=queues, write_queue_count=queues, permission=permission)
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            await admin_pb2_grpc.BrokerAdminStub(channel).SetTopic(admin_pb2.SetTopicRequest(topic=config))

    async def delete_topic(self, topic: str) -> None:
        """Delete it from this broker."""
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            await admin_pb2_grpc.BrokerAdminStub(channel).DeleteTopic(admin_pb2.DeleteTopicRequest(topic=topic))

    async def set_group(self, group: str, **config: Any) -> None:
        """Create the group on this broker, or change it. `config`: fields of GroupConfig."""
        request = admin_pb2.SetGroupRequest(group=GroupConfig(name=group, **({"consume_enabled": True} | config)))
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            await admin_pb2_grpc.BrokerAdminStub(channel).SetGroup(request)

    async def reset_offsets(self, group: str, topic: str, **target: Any) -> None:
        """Move a group's offsets on this broker. `target`: fields of ResetOffsetsRequest."""
        request = admin_pb2.ResetOffsetsRequest(group=group, topic=topic, **target)
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            await admin_pb2_grpc.BrokerAdminStub(channel).ResetOffsets(request)


class Cluster:
    """`broker` is the first of `brokers`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.namesrv = Namesrv(folder / "namesrv")
        self.brokers: list[Broker] = []

    @property
    def namesrv_address(self) -> str:
        return self.namesrv.address

    @property
    def broker(self) -> Broker:
        return self.brokers[0]

    async def add_broker(self, name: str, **config: Any) -> Broker:
        """Start one more. `config`: as Broker's."""
        broker = Broker(name, self._folder / name, [self.namesrv_address], **config)
        await broker.start()
        self.brokers.append(broker)
        return broker


@asynccontextmanager
async def running_cluster(folder: Path, **config: Any) -> AsyncIterator[Cluster]:
    """A namesrv and one broker, `broker-a`. `config`: keys of its BrokerConfig."""
    cluster = Cluster(folder)
    async with AsyncExitStack() as stack:
        await cluster.namesrv.start()
        stack.push_async_callback(cluster.namesrv.stop)

        async def stop_brokers() -> None:
            for broker in cluster.brokers:
                await broker.stop()

        stack.push_async_callback(stop_brokers)
        await cluster.add_broker("broker-a", **config)
        yield cluster
