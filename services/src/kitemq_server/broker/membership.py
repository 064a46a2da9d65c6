"""Who is a member of which consumer group, kept by heartbeats and told to the members when it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager

from kitemq.errors import InvalidRequestError, PermissionDeniedError
from kitemq.proto.v1 import broker_pb2
from kitemq.protocol.names import check_group, check_topic
from kitemq_server.broker.clients import SCAN_INTERVAL_MS, ClientRegistry
from kitemq_server.broker.filters import parse_filter
from kitemq_server.broker.groups import Groups
from kitemq_server.broker.notify import NotifyHub
from kitemq_server.common.clock import Clock
from kitemq_server.common.tasks import running

log = logging.getLogger(__name__)

# A client whose Notify stream broke has this long for a new stream or a heartbeat. Its TCP connection breaks at once
# when the process is killed, so its queues move on after 10 s and not after 120.
LOST_GRACE_MS = 10_000
CLIENTS_MAX = 50_000
CLIENT_ID_CHARS_MAX = 255
LABEL_CHARS_MAX = 64
GROUPS_PER_CLIENT_MAX = 1_000
SUBSCRIPTIONS_MAX = 1_000


class Membership:
    """Heartbeats, goodbyes and Notify streams."""

    def __init__(self, groups: Groups, clock: Clock) -> None:
        self._groups = groups
        self._clock = clock
        self.registry = ClientRegistry(clients_max=CLIENTS_MAX)
        self.hub = NotifyHub(streams_max=CLIENTS_MAX)
        self.lost_grace_ms = LOST_GRACE_MS
        self._changed_groups: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Forget silent clients for as long as the context lasts."""
        async with running(self._scan()):
            yield

    def heartbeat(self, request: broker_pb2.HeartbeatRequest, *, address: str) -> None:
        """Raises an error of the table for a heartbeat that is not valid; then nothing of it is taken."""
        check_client_id(request.client_id)
        _check_heartbeat(request)
        for consumer in request.consumers:
            config = self._groups.ensure(consumer.group)
            if consumer.message_model == broker_pb2.BROADCASTING and not config.consume_broadcast_enabled:
                raise PermissionDeniedError(f"group {consumer.group!r} may not consume by broadcast")
        self._tell(
            self.registry.heartbeat(
                request,
                address=address,
                now_ms=self._clock.monotonic_ms(),
                timestamp_ms=self._clock.wall_ms(),
            )
        )

    def unregister(self, request: broker_pb2.UnregisterRequest) -> None:
        check_client_id(request.client_id)
        self._tell(self.registry.unregister(request.client_id, request.consumer_group))

    async def notify(self, request: broker_pb2.NotifyRequest) -> AsyncGenerator[broker_pb2.Notification, None]:
        """The client's events until it leaves, opens another stream, or the broker stops."""
        client_id = request.client_id
        check_client_id(client_id)
        stream = self.hub.open(client_id)
        self.registry.connection_back(client_id, self._clock.monotonic_ms())
        try:
            async for event in stream.events():
                yield event
        finally:
            if self.hub.close(client_id, stream):
                self._connection_lost(client_id)

    def _connection_lost(self, client_id: str) -> None:
        expires_ms = self._clock.monotonic_ms() + self.lost_grace_ms
        if self.registry.connection_lost(client_id, expires_ms=expires_ms):
            asyncio.get_running_loop().call_later(self.lost_grace_ms / 1000 + 0.01, self.expire)

    def member_ids(self, group: str) -> list[str]:
        """Client ids of the group's members, sorted. Raises GroupNotFoundError for a group that nobody has named."""
        members = self.registry.members(group)
        if not members:
            self._groups.get(group)
        return sorted(members)

    def tell_offsets_reset(self, group: str) -> None:
        """Let the group's members drop what they hold and read the offsets again."""
        self.hub.offsets_reset(group, self.registry.members(group))

    def expire(self) -> None:
        """Forget every client whose time is up."""
        self._tell(self.registry.expire(self._clock.monotonic_ms()))

    async def _scan(self) -> None:
        while True:
            before_ms = self._clock.monotonic_ms()
            await asyncio.sleep(SCAN_INTERVAL_MS / 1000)
            # A process that was stopped for a while has heard nobody: that is not its clients' silence.
            late_ms = self._clock.monotonic_ms() - before_ms - SCAN_INTERVAL_MS
            if late_ms > SCAN_INTERVAL_MS:
                self.registry.postpone_expiry(late_ms)
            self.expire()

    def _tell(self, groups: Iterable[str]) -> None:
        # Members that join in the same turn of the loop are one change.
        if groups and not self._changed_groups:
            asyncio.get_running_loop().call_soon(self._tell_now)
        self._changed_groups.update(groups)

    def _tell_now(self) -> None:
        for group in self._changed_groups:
            self.hub.group_changed(group, self.registry.members(group))
        self._changed_groups.clear()


def check_client_id(client_id: str) -> None:
    """Raises InvalidRequestError unless it is 1..255 printable characters."""
    if not client_id:
        raise InvalidRequestError("client_id is empty: choose one that is unique, as host@pid#random")
    if len(client_id) > CLIENT_ID_CHARS_MAX or not client_id.isprintable():
        raise InvalidRequestError(
            f"client_id {client_id[:40]!r} must be at most {CLIENT_ID_CHARS_MAX} printable characters"
        )


def _check_heartbeat(request: broker_pb2.HeartbeatRequest) -> None:
    for name, text in (("language", request.language), ("version", request.version)):
        if len(text) > LABEL_CHARS_MAX or not text.isprintable():
            raise InvalidRequestError(f"{name} must be at most {LABEL_CHARS_MAX} printable characters")
    if len(request.producer_groups) > GROUPS_PER_CLIENT_MAX or len(request.consumers) > GROUPS_PER_CLIENT_MAX:
        raise InvalidRequestError(f"a client has at most {GROUPS_PER_CLIENT_MAX} producer and consumer groups")
    for group in request.producer_groups:
        check_group(group, kind="producer group")
    names = [consumer.group for consumer in request.consumers]
    if len(set(names)) < len(names):
        raise InvalidRequestError("a consumer group occurs twice in one heartbeat")
    for consumer in request.consumers:
        check_group(consumer.group, kind="consumer group")
        if len(consumer.subscriptions) > SUBSCRIPTIONS_MAX:
            raise InvalidRequestError(f"a consumer has at most {SUBSCRIPTIONS_MAX} subscriptions")
        for subscription in consumer.subscriptions:
            check_topic(subscription.topic)
            parse_filter(subscription.filter)
