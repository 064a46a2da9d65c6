"""Tells brokers who produces to them: they list producers, and ask them about transactions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from kitemq.errors import KiteMQError
from kitemq.proto.v1 import broker_pb2, broker_pb2_grpc
from kitemq.rpc import Channels, call
from kitemq.version import VERSION

logger = logging.getLogger(__name__)

HEARTBEAT_S = 30.0
FIRST_HEARTBEAT_S = 1.0
HEARTBEAT_TIMEOUT_S = 3.0
LEAVE_TIMEOUT_S = 0.5


class ProducerHeartbeat:
    """Every 30 s to every broker that this producer sends to; within a second to a new one."""

    def __init__(self, client_id: str, group: str, channels: Channels, addresses: Callable[[], set[str]]) -> None:
        self._request = broker_pb2.HeartbeatRequest(
            client_id=client_id, language="PYTHON", version=VERSION, producer_groups=[group]
        )
        self._channels = channels
        self._addresses = addresses
        self._known: set[str] = set()

    async def run(self) -> None:
        """Ends by cancellation."""
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            addresses = self._addresses()
            if loop.time() >= due:
                self._known.clear()
                due = loop.time() + HEARTBEAT_S
            await asyncio.gather(*(self._beat(address) for address in addresses - self._known))
            self._known &= addresses
            await asyncio.sleep(FIRST_HEARTBEAT_S)

    async def _beat(self, address: str) -> None:
        try:
            stub = broker_pb2_grpc.BrokerStub(self._channels.get(address))
            await call(stub.Heartbeat, self._request, timeout_s=HEARTBEAT_TIMEOUT_S, address=address)
            self._known.add(address)
        except KiteMQError as error:
            logger.debug("producer: heartbeat failed broker=%s error=%s", address, error)

    async def leave(self) -> None:
        """Say goodbye to the brokers that know this producer."""
        request = broker_pb2.UnregisterRequest(client_id=self._request.client_id)

        async def one(address: str) -> None:
            try:
                stub = broker_pb2_grpc.BrokerStub(self._channels.get(address))
                await call(stub.Unregister, request, timeout_s=LEAVE_TIMEOUT_S, address=address)
            except KiteMQError as error:
                logger.debug("producer: goodbye failed broker=%s error=%s", address, error)

        await asyncio.gather(*(one(address) for address in self._known))
