"""A namesrv, put together: key values, table, server, expiry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from kitemq_server.common.addresses import local_address
from kitemq_server.common.clock import Clock, SystemClock
from kitemq_server.common.metrics import RpcMetrics, new_registry, serve_metrics
from kitemq_server.common.serving import serve, tls_of
from kitemq_server.common.tasks import running
from kitemq_server.namesrv.config import NamesrvConfig
from kitemq_server.namesrv.kv_config import open_key_values
from kitemq_server.namesrv.metrics import NamesrvCollector
from kitemq_server.namesrv.roster import FILE_NAME as ROSTER_FILE
from kitemq_server.namesrv.roster import Roster
from kitemq_server.namesrv.route_table import RouteTable
from kitemq_server.namesrv.service import SERVICE_NAME, NamesrvService


@dataclass(frozen=True, slots=True)
class NamesrvHandle:
    """A namesrv that serves.

    ports: bound, by listener name; metrics_port: None = off. address: of the first listener, from this machine.
    """

    ports: Mapping[str, int]
    metrics_port: int | None
    address: str


@asynccontextmanager
async def run_namesrv(config: NamesrvConfig, *, clock: Clock | None = None) -> AsyncIterator[NamesrvHandle]:
    """Serve while the context is open.

    clock: tests' own. Raises ConfigError, ServeError or OSError when it cannot start.
    """
    registry = new_registry()
    rpc_metrics = RpcMetrics()
    registry.register(rpc_metrics)
    async with open_key_values(config.data_dir) as key_values:
        roster = Roster(config.data_dir / ROSTER_FILE)
        service = NamesrvService(RouteTable(), key_values, roster, clock or SystemClock())
        registry.register(NamesrvCollector(service))

        async def before_stop() -> None:
            service.feed.stop()

        async with (
            running(
                key_values.write_forever(),
                roster.write_forever(),
                _expire_forever(service, config.expiry_scan_ms),
                _warm_up(service, config.warm_up_ms),
            ),
            serve_metrics(config.metrics_listen, registry) as metrics_port,
            serve(
                {SERVICE_NAME: service.register},
                listeners=config.listen,
                metrics=rpc_metrics,
                tls=tls_of(config),
                tls_listeners=config.tls_listeners,
                before_stop=before_stop,
            ) as serving,
        ):
            first = config.listen[0]
            yield NamesrvHandle(serving.ports, metrics_port, local_address(first, serving.ports[first.name]))


async def _expire_forever(service: NamesrvService, scan_ms: int) -> None:
    loop = asyncio.get_running_loop()
    while True:
        before = loop.time()
        await asyncio.sleep(scan_ms / 1_000)
        # A process that was stopped for a while has heard nobody; that is not the brokers' silence.
        late_ms = int((loop.time() - before) * 1_000) - scan_ms
        service.expire(asleep_ms=late_ms if late_ms > scan_ms else 0)


async def _warm_up(service: NamesrvService, warm_up_ms: int) -> None:
    await asyncio.sleep(warm_up_ms / 1_000)
    service.end_warm_up()
