"""Configuration of a broker."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, model_validator
from pydantic_settings import SettingsConfigDict

from kitemq.protocol.names import BODY_BYTES_MAX, PERMISSION_READ_WRITE, QUEUE_COUNT_MAX
from kitemq_server.common.addresses import (
    DEFAULT_LISTENER,
    Listener,
    join_address,
    named_texts,
    split_address,
    text_list,
)
from kitemq_server.common.config import Listeners, ListeningConfig, MetricsAddress
from kitemq_server.common.names import check_broker_name, check_cluster_name

DEFAULT_PORT = 10911
NAMESRV_PORT = 9876

FlushMode = Literal["ASYNC_FLUSH", "SYNC_FLUSH"]


def _advertise(value: object) -> dict[str, str]:
    named = named_texts(value, default_name=DEFAULT_LISTENER)
    for text in named.values():
        split_address(text, default_port=0)
    return named


def _namesrv(value: object) -> tuple[str, ...]:
    return tuple(join_address(*split_address(text, default_port=NAMESRV_PORT)) for text in text_list(value))


def _checked(check: object) -> BeforeValidator:
    def validate(value: object) -> object:
        if isinstance(value, str):
            check(value)  # type: ignore[operator]
        return value

    return BeforeValidator(validate)


class BrokerConfig(ListeningConfig):
    """Keys of `kitemq-server broker`, of its TOML file, and after KITEMQ_BROKER_ of its environment."""

    model_config = SettingsConfigDict(env_prefix="KITEMQ_BROKER_")

    cluster_name: Annotated[str, _checked(check_cluster_name)] = Field(
        default="DefaultCluster", description="cluster that this broker belongs to"
    )
    # Why the host name: unique without being asked for, and stable over restarts.
    broker_name: Annotated[str, _checked(check_broker_name)] = Field(
        default_factory=socket.gethostname, description="name of this broker's group; host name by default"
    )
    broker_id: int = Field(default=0, ge=0, le=2**31 - 1, description="0 = master of its group")
    data_dir: Path = Field(
        default=Path("kitemq-data/broker"), description="folder of the store; made when it is missing"
    )

    # Why 10911: RocketMQ's.
    listen: Listeners = Field(
        default=(Listener(DEFAULT_LISTENER, "0.0.0.0", DEFAULT_PORT),),
        description="host:port to listen on, or several as name=host:port,name=host:port",
    )
    # Why: an address that the client cannot reach is the commonest way to fail. Behind NAT or in a container only the
    # operator knows what others can dial.
    advertise: Annotated[dict[str, str], BeforeValidator(_advertise)] = Field(
        default_factory=dict,
        description="host or host:port that clients are told to dial, or several as name=host:port by listener; "
        "default: the listener's own host, or this machine's primary address",
    )
    namesrv: Annotated[tuple[str, ...], BeforeValidator(_namesrv)] = Field(
        default=(f"127.0.0.1:{NAMESRV_PORT}",),
        description="every namesrv to register with, as host:port,host:port; empty = none",
    )
    namesrv_tls_ca_file: Path | None = Field(
        default=None,
        description="certificate authority (PEM) of the namesrvs, if they speak TLS",
    )
    # Why 30 s: RocketMQ's; a quarter of the 120 s after which a namesrv gives a broker up.
    heartbeat_interval_ms: int = Field(
        default=30_000, ge=100, le=60_000, description="how often every namesrv hears of this broker (ms)"
    )
    heartbeat_expiry_ms: int = Field(
        default=120_000, ge=1_000, le=3_600_000, description="unheard of for this long the broker is gone (ms)"
    )

    # Why ASYNC_FLUSH: RocketMQ's; docs/guarantees.md says what each survives.
    flush_mode: Annotated[FlushMode, BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v)] = Field(
        default="ASYNC_FLUSH", description="ASYNC_FLUSH: answer when written; SYNC_FLUSH: answer when on disk"
    )
    # Why 5 s: a disk that takes longer is in trouble; the message stays stored.
    flush_timeout_ms: int = Field(
        default=5_000, ge=100, le=60_000, description="SYNC_FLUSH: then answer FLUSH_DISK_TIMEOUT (ms)"
    )
    # Why 1 GiB: few files, and still a small step for retention.
    segment_bytes: ByteSize = Field(
        default=ByteSize(1024**3), ge=5 * 1024**2, le=16 * 1024**3, description="size of a log segment, as 1GiB"
    )
    retention_hours: int = Field(default=72, ge=0, le=24 * 3650, description="delete segments older; 0 = never")
    retention_bytes: ByteSize = Field(
        default=ByteSize(0), ge=0, description="delete the oldest segments when the log is bigger; 0 = no limit"
    )
    # Why 85: RocketMQ's level for deleting whatever its age, well before the disk is full.
    disk_watermark_percent: int = Field(
        default=85, ge=10, le=99, description="delete the oldest segments when the disk is fuller than this"
    )

    auto_create_topic_enable: bool = Field(default=True, description="a send to an unknown topic creates it")
    auto_create_group_enable: bool = Field(default=True, description="an unknown consumer group is created")
    default_topic_queue_count: int = Field(
        default=8, ge=1, le=QUEUE_COUNT_MAX, description="most queues of a topic that a send creates"
    )
    permission: int = Field(
        default=PERMISSION_READ_WRITE, ge=0, le=7, description="of the whole broker: 6 read and write, 4 read, 2 write"
    )

    body_bytes_max: ByteSize = Field(
        default=ByteSize(BODY_BYTES_MAX), ge=1, le=BODY_BYTES_MAX, description="largest message body"
    )
    # Why bounds: over them clients are told to come back, instead of the broker running out of memory.
    in_flight_bytes_max: ByteSize = Field(
        default=ByteSize(256 * 1024**2), ge=32 * 1024**2, description="sends that are stored but not answered yet"
    )
    held_pull_count_max: int = Field(default=200_000, ge=1, description="pulls that wait for messages")

    metrics_listen: MetricsAddress = Field(
        default="0.0.0.0:5557", description="host:port for Prometheus to scrape; empty = off"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = {listener.name for listener in self.listen}
        if unknown := sorted(set(self.advertise) - names):
            raise ValueError(f"advertise: there is no listener {unknown[0]!r} (listen has {', '.join(sorted(names))})")
        if self.heartbeat_expiry_ms < 2 * self.heartbeat_interval_ms:
            raise ValueError("heartbeat_expiry_ms must be at least twice heartbeat_interval_ms")
        return self
