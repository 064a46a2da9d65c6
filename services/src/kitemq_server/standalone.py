"""Namesrv and broker in one process and one loop: the same code as the separate services, needing nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, ByteSize, Field, model_validator
from pydantic_settings import SettingsConfigDict

from kitemq_server.broker.config import BrokerConfig, FlushMode
from kitemq_server.broker.server import BrokerHandle, run_broker
from kitemq_server.common.addresses import DEFAULT_LISTENER, Listener
from kitemq_server.common.config import Listeners, MetricsAddress, ServiceConfig, load, set_in_environment
from kitemq_server.namesrv.config import NamesrvConfig
from kitemq_server.namesrv.server import NamesrvHandle, run_namesrv
from kitemq_server.store.memory_disk import MemoryDisk

# A host name may change with every container; the queues' names must not.
BROKER_NAME = "standalone"
EPHEMERAL_SEGMENT_BYTES = 64 * 1024 * 1024

# Keys of the parts that standalone decides, and those of its own that they follow from.
BROKER_KEYS = {
    "broker_name": "",
    "data_dir": "data",
    "listen": "listen",
    "namesrv": "",
    "metrics_listen": "metrics_listen",
    "flush_mode": "flush_mode",
}
NAMESRV_KEYS = {"listen": "namesrv_listen", "data_dir": "data", "metrics_listen": "metrics_listen"}


class StandaloneConfig(ServiceConfig):
    """Keys of `kitemq-server standalone`, of its TOML file, and after KITEMQ_STANDALONE_ of its environment.

    Every other key of the broker and the namesrv can be set in KITEMQ_BROKER_* and KITEMQ_NAMESRV_*.
    """

    model_config = SettingsConfigDict(env_prefix="KITEMQ_STANDALONE_")
    parts = (BrokerConfig, NamesrvConfig)

    data: Path = Field(default=Path("kitemq-data"), description="folder of all data; made when it is missing")
    ephemeral: bool = Field(default=False, description="keep everything in memory, and nothing after the stop")
    ephemeral_bytes: ByteSize = Field(
        default=ByteSize(1024**3), ge=256 * 1024**2, description="memory that an ephemeral store may take"
    )
    # Why loopback: it is not asked who calls, so nobody else may until an operator says so.
    listen: Listeners = Field(
        default=(Listener(DEFAULT_LISTENER, "127.0.0.1", 10911),), description="host:port of the broker"
    )
    namesrv_listen: Listeners = Field(
        default=(Listener(DEFAULT_LISTENER, "127.0.0.1", 9876),),
        description="host:port of the namesrv, which is what clients are given",
    )
    advertise: str = Field(
        default="", description="host or host:port of the broker that clients are told to dial, as in a container"
    )
    metrics_listen: MetricsAddress = Field(
        default="127.0.0.1:5557", description="host:port for Prometheus to scrape; empty = off"
    )
    flush_mode: Annotated[FlushMode, BeforeValidator(lambda v: v.upper() if isinstance(v, str) else v)] = Field(
        default="ASYNC_FLUSH", description="ASYNC_FLUSH: answer when written; SYNC_FLUSH: answer when on disk"
    )

    @model_validator(mode="after")
    def _data_or_ephemeral(self) -> Self:
        if self.ephemeral and "data" in self.model_fields_set:
            raise ValueError("data and ephemeral exclude each other: choose one")
        return self

    @model_validator(mode="after")
    def _nothing_is_lost(self) -> Self:
        # What standalone decides for its parts would override their own variables without a word.
        for model, decided in ((BrokerConfig, BROKER_KEYS), (NamesrvConfig, NAMESRV_KEYS)):
            for key, own in decided.items():
                if lost := set_in_environment(model, [key]):
                    use = f"set --{own.replace('_', '-')} or KITEMQ_STANDALONE_{own.upper()}" if own else "leave it out"
                    raise ValueError(f"{lost[0]} has no effect under standalone: {use}")
        return self


@dataclass(frozen=True, slots=True)
class StandaloneHandle:
    """Both services, serving and known to each other."""

    namesrv: NamesrvHandle
    broker: BrokerHandle


@asynccontextmanager
async def run_standalone(config: StandaloneConfig) -> AsyncIterator[StandaloneHandle]:
    """Serve while the context is open. Raises as `run_namesrv` and `run_broker`."""
    async with AsyncExitStack() as stack:
        disk, data = None, config.data
        if config.ephemeral:
            disk = MemoryDisk(int(config.ephemeral_bytes))
            # The namesrv's key values are a real file all the same.
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kitemq-")))
        namesrv = await stack.enter_async_context(run_namesrv(namesrv_config(config, data)))
        broker = await stack.enter_async_context(run_broker(broker_config(config, data, namesrv.address), disk=disk))
        await broker.broker.registrar.synced()
        yield StandaloneHandle(namesrv, broker)


def namesrv_config(config: StandaloneConfig, data: Path) -> NamesrvConfig:
    """What the namesrv is told. Its metrics are off: the endpoint is the broker's."""
    return load(
        NamesrvConfig, flags={"listen": config.namesrv_listen, "data_dir": data / "namesrv", "metrics_listen": ""}
    )


def broker_config(config: StandaloneConfig, data: Path, namesrv: str) -> BrokerConfig:
    """What the broker is told."""
    told: dict[str, object] = {
        "broker_name": BROKER_NAME,
        "data_dir": data / "broker",
        "listen": config.listen,
        "namesrv": namesrv,
        "metrics_listen": config.metrics_listen,
        "flush_mode": config.flush_mode,
    }
    if config.advertise:
        told["advertise"] = config.advertise
    if config.ephemeral:
        # Retention deletes whole segments: of a small disk only small ones.
        told["segment_bytes"] = EPHEMERAL_SEGMENT_BYTES
    return load(BrokerConfig, flags=told)
