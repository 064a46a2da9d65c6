"""Configuration of a namesrv."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from kitemq_server.common.addresses import Listener
from kitemq_server.common.config import Listeners, ListeningConfig, MetricsAddress

DEFAULT_PORT = 9876


class NamesrvConfig(ListeningConfig):
    """Keys of `kitemq-server namesrv`, of its TOML file, and after KITEMQ_NAMESRV_ of its environment."""

    model_config = SettingsConfigDict(env_prefix="KITEMQ_NAMESRV_")

    # Why 9876: RocketMQ's.
    listen: Listeners = Field(
        default=(Listener("internal", "0.0.0.0", DEFAULT_PORT),),
        description="host:port to listen on, or several as name=host:port,name=host:port; a client is told the "
        "brokers' addresses of the listener that it came in by",
    )
    # Why a file at all: key values and order configurations are the only thing that brokers cannot tell again.
    data_dir: Path = Field(
        default=Path("kitemq-data/namesrv"), description="folder of the key-value file; made when it is missing"
    )
    metrics_listen: MetricsAddress = Field(
        default="0.0.0.0:5559", description="host:port for Prometheus to scrape; empty = off"
    )
    # Why 120 s: four missed heartbeats of 30 s.
    broker_expiry_ms: int = Field(
        default=120_000,
        ge=1_000,
        le=3_600_000,
        description="a broker that names no expiry itself is gone this long after its last heartbeat (ms)",
    )
    # Why 5 s: how late an expiry may be noticed; a scan costs microseconds.
    expiry_scan_ms: int = Field(
        default=5_000, ge=10, le=60_000, description="how often expired brokers are looked for (ms)"
    )
