"""Tells every namesrv what this broker is and has: at once, on every change, and every 30 s that it is still there.

Namesrvs know nothing of each other, so each has a task of its own; one that is away delays none of the others. The full
tables travel only when they have changed, or when a namesrv asks for them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_random_exponential

from kitemq.errors import KiteMQError
from kitemq.proto.v1 import namesrv_pb2, namesrv_pb2_grpc
from kitemq.proto.v1.message_pb2 import TopicConfig
from kitemq.proto.v1.namesrv_pb2 import BrokerIdentity, DataVersion
from kitemq.rpc import CHANNEL_OPTIONS, TlsConfig, call
from kitemq_server.common.tasks import running

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 3.0
UNREGISTER_TIMEOUT_S = 1.0
RETRY_S_MIN = 0.1
RETRY_S_MAX = 5.0

# A name that did not resolve is asked for again this soon; gRPC's own 30 s would delay a cluster that starts together.
_DNS_PAUSE_MS = 2_000

_Told = tuple[bytes, int, int]


class _Link:
    """One namesrv."""

    def __init__(self, registrar: Registrar, address: str, tls: TlsConfig | None) -> None:
        self.address = address
        self.away = False
        self.progress = asyncio.Event()
        self._registrar = registrar
        options = [*CHANNEL_OPTIONS, ("grpc.dns_min_time_between_resolutions_ms", _DNS_PAUSE_MS)]
        if tls is not None and tls.server_name:
            options.append(("grpc.ssl_target_name_override", tls.server_name))
        self._channel = (
            grpc.aio.insecure_channel(address, options=options)
            if tls is None
            else grpc.aio.secure_channel(address, tls.credentials(), options=options)
        )
        self._stub: namesrv_pb2_grpc.NamesrvAsyncStub = namesrv_pb2_grpc.NamesrvStub(self._channel)
        self._told: _Told | None = None
        self._due = asyncio.Event()
        self._back = asyncio.Event()

    def has(self, told: _Told) -> bool:
        """True when this namesrv has what `told` says, or something newer."""
        return self._told is not None and self._told[1:] >= told[1:]

    def wake(self) -> None:
        """There is something to say, or somebody to say it to."""
        self._due.set()

    async def run(self, interval_s: float) -> None:
        """Keep this namesrv informed. Ends by cancellation."""
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, KiteMQError) and error.retriable),
            wait=wait_random_exponential(multiplier=RETRY_S_MIN, max=RETRY_S_MAX),
            before_sleep=self._failed,
            sleep=self._sleep,
        )
        while True:
            self._due.clear()
            try:
                await retrying(self._tell)
            except KiteMQError as error:
                # Waiting helps no more than asking again at the usual time: a person must act, or a newer master has.
                self._set_away(error)
                logger.error("namesrv refuses this broker namesrv=%s error=%s", self.address, error)
            try:
                async with asyncio.timeout(interval_s):
                    await self._due.wait()
            except TimeoutError:
                pass

    async def watch_connection(self) -> None:
        """Notice a namesrv that comes back at once, not at the next heartbeat. Ends by cancellation."""
        state = self._channel.get_state(try_to_connect=True)
        lost = False
        while True:
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state(try_to_connect=True)
            if state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.TRANSIENT_FAILURE):
                lost = True
            elif state is grpc.ChannelConnectivity.READY and lost:
                lost = False
                self._back.set()
                self.wake()

    async def unregister(self, identity: BrokerIdentity) -> None:
        """Say goodbye, if the namesrv is there."""
        if self.away:
            return
        try:
            request = namesrv_pb2.UnregisterBrokerRequest(broker=identity)
            await call(self._stub.UnregisterBroker, request, timeout_s=UNREGISTER_TIMEOUT_S, address=self.address)
        except KiteMQError as error:
            logger.warning("namesrv not told of the stop namesrv=%s error=%s", self.address, error)

    async def close(self) -> None:
        """Drop the connection."""
        await self._channel.close()

    async def _tell(self) -> None:
        identity, version = self._registrar.identity(), self._registrar.data_version()
        told = _told(identity, version)
        if told == self._told:
            request = namesrv_pb2.BrokerHeartbeatRequest(broker=identity, data_version=version)
            response = await self._call(self._stub.BrokerHeartbeat, request)
            if not response.register_wanted:
                return self._told_now(told)
        registration = namesrv_pb2.RegisterBrokerRequest(
            broker=identity,
            data_version=version,
            topics=self._registrar.topics(),
            expiry_ms=self._registrar.expiry_ms,
        )
        await self._call(self._stub.RegisterBroker, registration)
        logger.info("registered namesrv=%s topics=%d", self.address, len(registration.topics))
        return self._told_now(told)

    async def _call(self, method: Any, request: Any) -> Any:
        return await call(method, request, timeout_s=CALL_TIMEOUT_S, address=self.address)

    def _told_now(self, told: _Told) -> None:
        if self.away:
            logger.info("namesrv is back namesrv=%s", self.address)
        self._told = told
        self.away = False
        self._step()

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if not self.away:
            logger.warning("namesrv is away, trying again namesrv=%s error=%s", self.address, error)
        self._set_away(error)

    def _set_away(self, error: BaseException | None) -> None:
        assert error is not None
        self.away = True
        self._step()

    def _step(self) -> None:
        progress, self.progress = self.progress, asyncio.Event()
        progress.set()

    async def _sleep(self, seconds: float) -> None:
        self._back.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._back.wait()
        except TimeoutError:
            pass


class Registrar:
    """What this broker tells the namesrvs. Open it with `registered`; belongs to one loop.

    identity, data_version and topics are asked whenever something is told; the version rises with every change of the
    topics. Times in milliseconds.
    """

    def __init__(
        self,
        *,
        identity: Callable[[], BrokerIdentity],
        data_version: Callable[[], DataVersion],
        topics: Callable[[], Iterable[TopicConfig]],
        heartbeat_interval_ms: int,
        expiry_ms: int,
    ) -> None:
        self.identity = identity
        self.data_version = data_version
        self.topics = topics
        self.heartbeat_interval_ms = heartbeat_interval_ms
        self.expiry_ms = expiry_ms
        self.links: list[_Link] = []

    def notify_topics_changed(self) -> None:
        """Register again; changes of one turn of the loop, and those while a registration is on its way, together."""
        for link in self.links:
            link.wake()

    async def synced(self, *, timeout_s: float = CALL_TIMEOUT_S) -> bool:
        """Wait until every namesrv that can be reached has the topics as they are now; False after `timeout_s`."""
        told = _told(self.identity(), self.data_version())
        try:
            async with asyncio.timeout(timeout_s):
                for link in self.links:
                    while not link.away and not link.has(told):
                        await link.progress.wait()
        except TimeoutError:
            return False
        return True

    def reached(self) -> list[str]:
        """Addresses of the namesrvs that took the last thing they were told."""
        return [link.address for link in self.links if link.has((b"", 0, 0)) and not link.away]


@asynccontextmanager
async def registered(
    registrar: Registrar, namesrvs: Sequence[str], *, tls: TlsConfig | None = None
) -> AsyncIterator[None]:
    """Registered with every namesrv ("host:port") while the context is open; withdrawn within a second at its end.

    Does not wait for the first registration: `registrar.synced()` does.
    """
    registrar.links = [_Link(registrar, address, tls) for address in namesrvs]
    try:
        interval_s = registrar.heartbeat_interval_ms / 1_000
        parts = [part for link in registrar.links for part in (link.run(interval_s), link.watch_connection())]
        async with running(*parts):
            yield
    finally:
        identity = registrar.identity()
        await asyncio.gather(*(link.unregister(identity) for link in registrar.links))
        await asyncio.gather(*(link.close() for link in registrar.links))
        registrar.links = []


def _told(identity: BrokerIdentity, version: DataVersion) -> _Told:
    return identity.SerializeToString(deterministic=True), version.timestamp_ms, version.counter
