"""A broker, put together: store, services, metrics, registration; and how it stops."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from kitemq.proto.v1.namesrv_pb2 import ASYNC_MASTER, BrokerIdentity, DataVersion
from kitemq.rpc import TlsConfig
from kitemq_server.broker import admin, service
from kitemq_server.broker.admin import BrokerAdminService
from kitemq_server.broker.collector import BrokerCollector
from kitemq_server.broker.config import BrokerConfig
from kitemq_server.broker.groups import Groups
from kitemq_server.broker.holds import Holds
from kitemq_server.broker.lags import Lags
from kitemq_server.broker.membership import Membership
from kitemq_server.broker.metrics import MessageCounts
from kitemq_server.broker.offsets import Offsets
from kitemq_server.broker.pull import Pulls
from kitemq_server.broker.pull_stream import PullStreams
from kitemq_server.broker.queries import Queries
from kitemq_server.broker.registration import Registrar, registered
from kitemq_server.broker.send import Sends
from kitemq_server.broker.service import BrokerService
from kitemq_server.broker.settings import Settings
from kitemq_server.broker.topics import Topics
from kitemq_server.common.addresses import advertised_addresses, join_address
from kitemq_server.common.clock import Clock, SystemClock
from kitemq_server.common.metrics import RpcMetrics, new_registry, serve_metrics
from kitemq_server.common.serving import serve, tls_of
from kitemq_server.common.tasks import running
from kitemq_server.store.disk import Disk, RealDisk
from kitemq_server.store.message_store import FlushMode, MessageStore, StoreConfig, open_store

DRAIN_S = 1.0


class StoreFailedError(RuntimeError):
    """The store is broken: the process has to end, and recovers when it starts again."""


class Broker:
    """The parts of one broker, wired. Belongs to one loop."""

    def __init__(self, config: BrokerConfig, store: MessageStore, clock: Clock) -> None:
        self.config = config
        self.store = store
        self.clock = clock
        self.settings = Settings(config)
        live, name = self.settings.live, config.broker_name
        self.counts = MessageCounts()
        self.holds = Holds()
        self.topics = Topics(store, live, broker_name=name)
        self.groups = Groups(store, live, broker_name=name)
        self.membership = Membership(self.groups, clock)
        self.lags = Lags(store, self.membership)
        self.offsets = Offsets(store, self.topics, self.groups, self.membership)
        self.queries = Queries(store, self.topics)
        self.sends = Sends(store, self.topics, live, self.counts, name)
        self.pulls = Pulls(store, self.topics, self.groups, self.holds, live, self.counts)
        self.pull_streams = PullStreams(self.pulls)
        self.identity = BrokerIdentity(
            cluster_name=config.cluster_name,
            broker_name=name,
            broker_id=config.broker_id,
            role=ASYNC_MASTER,
            epoch=store.epoch,
            boot_id=secrets.token_hex(16),
            boot_timestamp_ms=clock.wall_ms(),
        )
        # A change of the whole broker's rights changes what namesrvs are told of its topics.
        self._permission_changes = 0
        self.registrar = Registrar(
            identity=lambda: self.identity,
            data_version=self.data_version,
            topics=self.topics.registered,
            heartbeat_interval_ms=config.heartbeat_interval_ms,
            expiry_ms=config.heartbeat_expiry_ms,
        )
        store.fsync_observer = self.counts.fsyncs.observe
        store.confirmed_listener = self.holds.wake
        self.topics.changed = self._topic_changed
        self.topics.deleted = self.counts.forget_topic
        self.settings.changed = self._settings_changed

    def data_version(self) -> DataVersion:
        """Orders what namesrvs are told of the topics."""
        timestamp_ms, counter = self.store.data_version
        return DataVersion(timestamp_ms=timestamp_ms, counter=counter + self._permission_changes)

    def stop(self) -> None:
        """Answer everything that waits, and end every stream, as if nothing had happened."""
        self.membership.hub.stop()
        self.pulls.stop()
        self.pull_streams.stop()
        self.sends.stop()

    def _topic_changed(self, topic: str) -> None:
        self.holds.wake_topic(topic)
        self.registrar.notify_topics_changed()

    def _settings_changed(self, keys: set[str]) -> None:
        if "permission" in keys:
            self._permission_changes += 1
            self.holds.wake_all()
            self.registrar.notify_topics_changed()
        live = self.settings.live
        self.store.reconfigure(
            replace(
                self.store.config,
                retention_hours=float(live.retention_hours),
                retention_bytes=live.retention_bytes,
                disk_watermark_percent=live.disk_watermark_percent,
            )
        )


@dataclass(frozen=True, slots=True)
class BrokerHandle:
    """A broker that serves. ports: bound, by listener name; metrics_port: None = off.

    address: of the first listener, from this machine.
    """

    ports: Mapping[str, int]
    metrics_port: int | None
    address: str
    broker: Broker


@asynccontextmanager
async def run_broker(
    config: BrokerConfig, *, disk: Disk | None = None, clock: Clock | None = None
) -> AsyncIterator[BrokerHandle]:
    """Serve while the context is open.

    At its end: withdrawn from the namesrvs, NOT_SERVING, held pulls and pending sends answered, the store closed.
    disk, clock: tests' own. Raises StoreOpenError, ServeError or OSError when it cannot start, and StoreFailedError out
    of the body when the store breaks.
    """
    clock = clock or SystemClock()
    async with open_store(disk or RealDisk(), config.data_dir, store_config(config), clock_ms=clock.wall_ms) as store:
        broker = Broker(config, store, clock)
        broker.topics.create_system_topics()
        rpc_metrics = RpcMetrics()
        registry = new_registry()
        registry.register(rpc_metrics)
        registry.register(BrokerCollector(broker))

        async def before_stop() -> None:
            broker.stop()

        async with (
            running(_until_failed(store)),
            broker.membership.running(),
            serve_metrics(config.metrics_listen, registry) as metrics_port,
            serve(
                {
                    service.SERVICE_NAME: BrokerService(broker).register,
                    admin.SERVICE_NAME: BrokerAdminService(broker).register,
                },
                listeners=config.listen,
                metrics=rpc_metrics,
                tls=tls_of(config),
                tls_listeners=config.tls_listeners,
                before_stop=before_stop,
                grace_s=DRAIN_S,
            ) as serving,
        ):
            for name, address in advertised_addresses(
                config.listen, ports=serving.ports, advertise=config.advertise
            ).items():
                broker.identity.addresses[name] = address
            first = config.listen[0]
            address = join_address(first.host, serving.ports[first.name])
            async with registered(broker.registrar, config.namesrv, tls=_namesrv_tls(config)):
                yield BrokerHandle(serving.ports, metrics_port, address, broker)


def store_config(config: BrokerConfig) -> StoreConfig:
    """What the store has to know of a broker's configuration."""
    return StoreConfig(
        broker_name=config.broker_name,
        flush_mode=FlushMode(config.flush_mode),
        segment_bytes=int(config.segment_bytes),
        retention_hours=float(config.retention_hours),
        retention_bytes=int(config.retention_bytes),
        disk_watermark_percent=config.disk_watermark_percent,
    )


def _namesrv_tls(config: BrokerConfig) -> TlsConfig | None:
    """To a namesrv that asks for a certificate the broker shows its own."""
    if config.namesrv_tls_ca_file is None:
        return None
    cert_file, key_file = config.tls_cert_file, config.tls_key_file
    return TlsConfig(
        ca_file=str(config.namesrv_tls_ca_file),
        cert_file=str(cert_file) if cert_file else None,
        key_file=str(key_file) if key_file else None,
    )


async def _until_failed(store: MessageStore) -> None:
    error = await asyncio.shield(store.failed)
    raise StoreFailedError(f"the store has failed: {error}") from error
