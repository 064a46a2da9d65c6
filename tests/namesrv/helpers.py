"""A namesrv on a free port, brokers to tell it about, and a clock that a test moves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from kitemq.proto.v1 import namesrv_pb2, namesrv_pb2_grpc
from kitemq.proto.v1.message_pb2 import TopicConfig
from kitemq_server.common.addresses import parse_listeners
from kitemq_server.namesrv.config import NamesrvConfig


class FakeClock:
    """Stands until a test moves it."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000

    def monotonic_ms(self) -> int:
        return self.now_ms

    def wall_ms(self) -> int:
        return 1_700_000_000_000 + self.now_ms


def namesrv_config(folder: Path, *, listen: str = "127.0.0.1:0", **values: Any) -> NamesrvConfig:
    defaults: dict[str, Any] = {"metrics_listen": "", "expiry_scan_ms": 10, "data_dir": folder}
    return NamesrvConfig(listen=parse_listeners(listen), **(defaults | values))


def identity(name: str = "broker-a", *, broker_id: int = 0, **values: Any) -> namesrv_pb2.BrokerIdentity:
    defaults: dict[str, Any] = {
        "cluster_name": "DefaultCluster",
        "role": namesrv_pb2.SLAVE if broker_id else namesrv_pb2.ASYNC_MASTER,
        "epoch": 1,
        "boot_id": f"boot-{name}-{broker_id}",
        "boot_timestamp_ms": 1_000,
        "addresses": {"internal": f"{name}-{broker_id}:10911"},
    }
    return namesrv_pb2.BrokerIdentity(broker_name=name, broker_id=broker_id, **(defaults | values))


def registration(
    broker: namesrv_pb2.BrokerIdentity, *topics: str, version: int = 1, queues: int = 4, **values: Any
) -> namesrv_pb2.RegisterBrokerRequest:
    return namesrv_pb2.RegisterBrokerRequest(
        broker=broker,
        data_version=namesrv_pb2.DataVersion(timestamp_ms=1, counter=version),
        topics=[
            TopicConfig(name=topic, read_queue_count=queues, write_queue_count=queues, permission=6) for topic in topics
        ],
        **values,
    )


@asynccontextmanager
async def dialled(address: str) -> AsyncIterator[namesrv_pb2_grpc.NamesrvAsyncStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield namesrv_pb2_grpc.NamesrvStub(channel)


def addresses_of(route: namesrv_pb2.TopicRoute) -> dict[str, list[str]]:
    return {group.broker_name: [broker.address for broker in group.brokers] for group in route.brokers}
