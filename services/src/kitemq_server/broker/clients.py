"""Who is connected: producers and consumers by their heartbeats, and the members of each consumer group.

Pure state: every method is a function of what it is told and the time passed in (monotonic milliseconds), and returns
the consumer groups whose members or subscriptions have changed. No I/O, no clock, no gRPC.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

from kitemq.errors import BrokerBusyError
from kitemq.proto.v1 import broker_pb2

log = logging.getLogger(__name__)

EXPIRY_MS = 120_000
SCAN_INTERVAL_MS = 10_000


class Client:
    """One heartbeating client. Times are monotonic milliseconds, except last_heartbeat_timestamp_ms (Unix)."""

    __slots__ = (
        "address",
        "client_id",
        "consumers",
        "expires_ms",
        "language",
        "last_heartbeat_timestamp_ms",
        "producer_groups",
        "version",
    )

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.address = ""
        self.language = ""
        self.version = ""
        self.producer_groups: tuple[str, ...] = ()
        self.consumers: dict[str, broker_pb2.ConsumerInfo] = {}
        self.expires_ms = 0
        self.last_heartbeat_timestamp_ms = 0


class ClientRegistry:
    """The clients of one broker. Owned by the event loop."""

    def __init__(self, *, clients_max: int) -> None:
        self._clients_max = clients_max
        self._clients: dict[str, Client] = {}
        self._groups: dict[str, dict[str, Client]] = {}

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator[Client]:
        return iter(self._clients.values())

    @property
    def groups(self) -> Iterable[str]:
        """Consumer groups with at least one member."""
        return self._groups.keys()

    def members(self, group: str) -> Mapping[str, Client]:
        """The group's members by client id, in no order."""
        return self._groups.get(group, {})

    def subscribers(self, topic: str) -> set[str]:
        """Consumer groups of which a member subscribes to `topic`."""
        return {
            group
            for group, members in self._groups.items()
            if any(
                subscription.topic == topic
                for client in members.values()
                for subscription in client.consumers[group].subscriptions
            )
        }

    def heartbeat(
        self, request: broker_pb2.HeartbeatRequest, *, address: str, now_ms: int, timestamp_ms: int
    ) -> set[str]:
        """Take note of a (validated) heartbeat. Raises BrokerBusyError when there are too many clients already."""
        client = self._clients.get(request.client_id)
        if client is None:
            if len(self._clients) >= self._clients_max:
                raise BrokerBusyError(
                    f"the broker has {self._clients_max} clients already: try another broker", retry_after_ms=5000
                )
            client = self._clients[request.client_id] = Client(request.client_id)
            log.info("client connected client_id=%s address=%s", request.client_id, address)
        client.address = address
        client.language = request.language
        client.version = request.version
        client.producer_groups = tuple(request.producer_groups)
        client.expires_ms = now_ms + EXPIRY_MS
        client.last_heartbeat_timestamp_ms = timestamp_ms
        return self._set_consumers(client, {consumer.group: consumer for consumer in request.consumers})

    def unregister(self, client_id: str, consumer_group: str = "") -> set[str]:
        """Forget the client, or (with `consumer_group`) its membership in that group. Unknown ones are no error."""
        client = self._clients.get(client_id)
        if client is None:
            return set()
        if consumer_group:
            consumers = {group: info for group, info in client.consumers.items() if group != consumer_group}
            return self._set_consumers(client, consumers)
        del self._clients[client_id]
        log.info("client gone client_id=%s", client_id)
        return self._set_consumers(client, {})

    def connection_lost(self, client_id: str, *, expires_ms: int) -> bool:
        """The client's Notify stream broke: it expires then, unless it is heard of. True if it is known."""
        client = self._clients.get(client_id)
        if client is None:
            return False
        client.expires_ms = min(client.expires_ms, expires_ms)
        return True

    def connection_back(self, client_id: str, now_ms: int) -> None:
        """The client opened a Notify stream: a sign of life."""
        client = self._clients.get(client_id)
        if client is not None:
            client.expires_ms = max(client.expires_ms, now_ms + EXPIRY_MS)

    def postpone_expiry(self, by_ms: int) -> None:
        """Give every client this much longer."""
        for client in self._clients.values():
            client.expires_ms += by_ms

    def expire(self, now_ms: int) -> set[str]:
        """Forget every client that has not been heard of for too long."""
        changed: set[str] = set()
        for client in [client for client in self._clients.values() if client.expires_ms <= now_ms]:
            log.warning("client expired client_id=%s address=%s", client.client_id, client.address)
            changed |= self.unregister(client.client_id)
        return changed

    def _set_consumers(self, client: Client, consumers: dict[str, broker_pb2.ConsumerInfo]) -> set[str]:
        before = client.consumers
        if before == consumers:
            return set()
        for group in before.keys() - consumers.keys():
            members = self._groups[group]
            del members[client.client_id]
            if not members:
                del self._groups[group]
        for group in consumers.keys() - before.keys():
            self._groups.setdefault(group, {})[client.client_id] = client
        client.consumers = consumers
        return {group for group in before.keys() | consumers.keys() if before.get(group) != consumers.get(group)}
