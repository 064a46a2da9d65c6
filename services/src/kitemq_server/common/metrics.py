"""Prometheus: the endpoint that is scraped, and latency per RPC.

Collectors run in the endpoint's thread while the loop goes on: one that walks a table copies it with list() first.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import grpc
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from kitemq_server.common.addresses import join_address, split_address

# RocketMQ's bounds, in milliseconds, and two below: an RPC here is often under one.
RPC_BUCKETS_MS = (0.25, 0.5, 1.0, 3.0, 5.0, 7.0, 10.0, 100.0, 1_000.0, 2_000.0, 3_000.0)

SCRAPE_TIMEOUT_S = 10.0


def new_registry() -> CollectorRegistry:
    """An empty registry with what every process shows: CPU, memory, open files, garbage collection."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class _Latency:
    """A histogram of one (method, code). Plain numbers: the library's own costs several times as much per call."""

    __slots__ = ("counts", "sum_ms")

    def __init__(self) -> None:
        self.counts = [0] * (len(RPC_BUCKETS_MS) + 1)
        self.sum_ms = 0.0

    def observe(self, seconds: float) -> None:
        milliseconds = seconds * 1_000
        self.counts[bisect_left(RPC_BUCKETS_MS, milliseconds)] += 1
        self.sum_ms += milliseconds


class RpcMetrics(Collector):
    """Latency of unary calls and number of streams, per method and status code. Changed on the loop only."""

    def __init__(self) -> None:
        self._latencies: dict[tuple[str, grpc.StatusCode], _Latency] = {}
        self._open: dict[str, int] = {}
        self._closed: dict[tuple[str, grpc.StatusCode], int] = {}

    def observer(self, method: str, code: grpc.StatusCode) -> Callable[[float], None]:
        """Takes the seconds that one call of `method` with this outcome took. Worth keeping."""
        latency = self._latencies.get((method, code))
        if latency is None:
            latency = self._latencies[method, code] = _Latency()
        return latency.observe

    def stream_opened(self, method: str) -> None:
        """A stream of `method` begins."""
        self._open[method] = self._open.get(method, 0) + 1

    def stream_closed(self, method: str, code: grpc.StatusCode) -> None:
        """A stream of `method` has ended."""
        self._open[method] -= 1
        self._closed[method, code] = self._closed.get((method, code), 0) + 1

    def collect(self) -> Iterator[Metric]:
        """What Prometheus reads; names as RocketMQ's where it has one."""
        labels = ["protocol_type", "request_code", "response_code"]
        latency = HistogramMetricFamily(
            "rocketmq_rpc_latency_milliseconds", "Time from request to reply of a unary call.", labels=labels
        )
        for (method, code), histogram in list(self._latencies.items()):
            total, buckets = 0, []
            for bound, count in zip((*map(str, RPC_BUCKETS_MS), "+Inf"), list(histogram.counts), strict=True):
                total += count
                buckets.append((bound, total))
            if total:
                latency.add_metric(["grpc", _short(method), code.name], buckets, histogram.sum_ms)
        yield latency
        streams = GaugeMetricFamily("kitemq_rpc_streams", "Streams that are open.", labels=["request_code"])
        for method, count in list(self._open.items()):
            streams.add_metric([_short(method)], count)
        yield streams
        ended = CounterMetricFamily(
            "kitemq_rpc_streams_ended", "Streams that have ended.", labels=["request_code", "response_code"]
        )
        for (method, code), count in list(self._closed.items()):
            ended.add_metric([_short(method), code.name], count)
        yield ended


def _short(method: str) -> str:
    """ "/kitemq.v1.Broker/Send" as "Broker/Send"."""
    service, _, name = method.removeprefix("/").rpartition("/")
    return f"{service.rpartition('.')[2]}/{name}"


class _QuietHandler(WSGIRequestHandler):
    # A client that connects and says nothing must not hold its thread for ever.
    timeout = SCRAPE_TIMEOUT_S

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Scrapes are not logged."""


class _Server6(ThreadingWSGIServer):
    address_family = socket.AF_INET6


@asynccontextmanager
async def serve_metrics(listen: str, registry: CollectorRegistry) -> AsyncIterator[int | None]:
    """Serve `registry` over HTTP on "host:port" from a thread of its own; yields the bound port.

    listen: empty = off (yields None); port 0 = any free one. Raises OSError, naming the address, if it cannot be bound.
    """
    if not listen:
        yield None
        return
    host, port = split_address(listen)
    server_class: type[WSGIServer] = _Server6 if ":" in host else ThreadingWSGIServer
    try:
        server = make_server(host, port, make_wsgi_app(registry), server_class, _QuietHandler)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise OSError(
            error.errno,
            f"cannot serve metrics on {join_address(host, port)}: {reason}; choose another metrics_listen, or none",
        ) from None
    thread = threading.Thread(target=server.serve_forever, args=(0.2,), name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
