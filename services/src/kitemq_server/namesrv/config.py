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
    # Why files at all: key values, and who was there, are the only things that brokers cannot tell again.
    data_dir: Path = Field(
        default=Path("kitemq-data/namesrv"), description="folder of its two small files; made when it is missing"
    )
    metrics_listen: MetricsAddress = Field(
        default="0.0.0.0:5559", description="host:port for Prometheus to scrape; empty = off"
    )
    # Why: brokers come back within a second or two, one after the other; half a cluster must not pass for all of it.
    warm_up_ms: int = Field(
        default=10_000,
        ge=0,
        le=120_000,
        description="after a restart answer no routes until the brokers known before are back, at most this long (ms)",
    )
    # Why 5 s: how late an expiry may be noticed; a scan costs microseconds.
    expiry_scan_ms: int = Field(
        default=5_000, ge=10, le=60_000, description="how often expired brokers are looked for (ms)"
    )
