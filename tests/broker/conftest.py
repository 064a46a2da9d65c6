"""A broker on a free port over a store in tmp_path, and raw clients of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kitemq_server.broker.config import BrokerConfig
from kitemq_server.broker.server import BrokerHandle, run_broker
from kitemq_server.common.addresses import parse_listeners
from kitemq_server.common.clock import Clock
from kitemq_server.store.disk import Disk
from tests.broker.wire import Client

Start = Callable[..., AbstractAsyncContextManager[BrokerHandle]]


def broker_config(folder: Path, **values: Any) -> BrokerConfig:
    defaults: dict[str, Any] = {
        "broker_name": "broker-a",
        "listen": parse_listeners("127.0.0.1:0"),
        "metrics_listen": "",
        "namesrv": (),
        "segment_bytes": 16 * 1024 * 1024,
        "data_dir": folder / "data",
    }
    return BrokerConfig(**(defaults | values))


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Starts a broker with these keys of its configuration; a second one finds the first one's data."""

    @asynccontextmanager
    async def start_broker(
        *, disk: Disk | None = None, clock: Clock | None = None, **values: Any
    ) -> AsyncIterator[BrokerHandle]:
        async with run_broker(broker_config(tmp_path, **values), disk=disk, clock=clock) as handle:
            yield handle

    return start_broker


@pytest.fixture
async def handle(start: Start) -> AsyncIterator[BrokerHandle]:
    async with start() as handle:
        yield handle


@pytest.fixture
async def client(handle: BrokerHandle) -> AsyncIterator[Client]:
    client = Client(handle.address)
    try:
        yield client
    finally:
        await client.close()
