"""gRPC servers of one service: its listeners, health, reflection, TLS, and the order in which they stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from kitemq.errors import BrokerUnavailableError, NotFoundError
from kitemq.protocol.names import GRPC_BYTES_MAX
from kitemq_server.common.addresses import Listener, join_address
from kitemq_server.common.config import ListeningConfig
from kitemq_server.common.interceptor import ServiceInterceptor
from kitemq_server.common.metrics import RpcMetrics

logger = logging.getLogger(__name__)

HEALTH_SERVICE = "grpc.health.v1.Health"
HEALTH_WATCHERS_MAX = 1_000

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", GRPC_BYTES_MAX),
    ("grpc.max_send_message_length", GRPC_BYTES_MAX),
    # Bulk data in few frames: each costs a header and a wake-up.
    ("grpc.http2.max_frame_size", 16 * 1024 * 1024 - 1),
    # A taken port is an error, not a share of the other process's connections.
    ("grpc.so_reuseport", 0),
    # A client that vanished without a word is noticed within 40 s, and its streams end.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients may ping every 10 s, also between calls; without this they are sent away for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    # Streams and long polls of one connection; a bound, far above what a client has.
    ("grpc.max_concurrent_streams", 20_000),
    # All clients of a restarted service come back at once; over 1,000 waiting calls gRPC would cancel some at random.
    ("grpc.server.max_pending_requests", 100_000),
    ("grpc.server.max_pending_requests_hard_limit", 200_000),
)

# Adds one service to a server: `partial(add_XServicer_to_server, servicer)`, or a function for generic handlers too.
Register = Callable[[grpc.aio.Server], None]


class ServeError(Exception):
    """The service cannot listen as it is told to; the text says where, why and what to do."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files (PEM) of the TLS listeners; client_ca_file set: every client must have a certificate from it."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the library is untyped
    """grpc.health.v1 for every service of the process; "" is the process.

    The library's own asyncio servicer forgets the other watchers of a service when one of them leaves, and its watch
    streams outlive a stop.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self._serving = dict.fromkeys(("", *services), False)
        self._watchers: set[asyncio.Event] = set()
        self._stopped = False

    def set_serving(self, serving: bool) -> None:
        """Change what every service of the process answers."""
        for service in self._serving:
            self._serving[service] = serving
        for changed in self._watchers:
            changed.set()

    def stop(self) -> None:
        """NOT_SERVING from now on; watchers are told, and their streams end."""
        self._stopped = True
        self.set_serving(False)

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        """NOT_FOUND for a service that is not here."""
        if request.service not in self._serving:
            raise NotFoundError("no such service here")
        return self._answer(request.service)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Any) -> None:
        """The present status, then every change."""
        if len(self._watchers) >= HEALTH_WATCHERS_MAX:
            raise BrokerUnavailableError("too many health watchers")
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                stopped = self._stopped
                await context.write(self._answer(request.service))
                if stopped:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    def _answer(self, service: str) -> health_pb2.HealthCheckResponse:
        serving = self._serving.get(service)
        statuses = health_pb2.HealthCheckResponse
        if serving is None:
            return statuses(status=statuses.SERVICE_UNKNOWN)
        return statuses(status=statuses.SERVING if serving else statuses.NOT_SERVING)


@dataclass(frozen=True, slots=True)
class Serving:
    """A service that takes calls. ports: what was bound, by listener name."""

    ports: Mapping[str, int]
    health: HealthServicer


class _GenericOnly:
    """A server to register services with that drops gRPC's per-method registration.

    With it gRPC waits for every method separately and each call costs it the number of methods: 8 % of all unary calls
    at 26 methods. The generic handler, registered beside it, serves the same.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Passed on."""
        self._server.add_generic_rpc_handlers(tuple(handlers))

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, object]) -> None:
        """Dropped."""


@asynccontextmanager
async def serve(
    services: Mapping[str, Register],
    *,
    listeners: Sequence[Listener],
    metrics: RpcMetrics,
    tls: Tls | None = None,
    tls_listeners: Sequence[str] = (),
    before_stop: Callable[[], Awaitable[None]] | None = None,
    grace_s: float = 1.0,
) -> AsyncIterator[Serving]:
    """Serve `services` (by full name, as "kitemq.v1.Broker"), health and reflection on every listener.

    A server per listener, sharing the servicers: gRPC does not tell a handler which port a call came in by, and so
    `calls.current_call().listener` can. tls_listeners: empty = all, if `tls` is given.
    before_stop: runs after health says NOT_SERVING and before calls are refused: wake held calls, end streams. Calls
    that are still running `grace_s` later are cancelled.
    Raises ServeError.
    """
    for listener in listeners:
        # All before any is bound: gRPC lets go of a bound port only once its server has run.
        _check_bindable(listener)
    health = HealthServicer([*services])
    servers: list[grpc.aio.Server] = []
    ports: dict[str, int] = {}
    try:
        for listener in listeners:
            server = grpc.aio.server(interceptors=(ServiceInterceptor(listener.name, metrics),), options=SERVER_OPTIONS)
            servers.append(server)
            _register(server, services, health)
            encrypted = tls is not None and (not tls_listeners or listener.name in tls_listeners)
            ports[listener.name] = _listen(server, listener, tls if encrypted else None)
        for server in servers:
            await server.start()
        health.set_serving(True)
        yield Serving(ports, health)
    finally:
        health.stop()
        try:
            if before_stop is not None:
                await before_stop()
        finally:
            await asyncio.gather(*(server.stop(grace_s) for server in servers))


def tls_of(config: ListeningConfig) -> Tls | None:
    """The TLS files of a service's configuration; None = plaintext."""
    if config.tls_cert_file is None or config.tls_key_file is None:
        return None
    return Tls(config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file)


def _register(server: grpc.aio.Server, services: Mapping[str, Register], health: HealthServicer) -> None:
    registry: Any = _GenericOnly(server)
    for register in services.values():
        register(registry)
    health_pb2_grpc.add_HealthServicer_to_server(health, registry)
    names = (*services, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), registry)


def _listen(server: grpc.aio.Server, listener: Listener, tls: Tls | None) -> int:
    address = join_address(listener.host, listener.port)
    try:
        if tls is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _credentials(tls))
    except RuntimeError:
        raise ServeError(f"cannot listen on {address}: the address cannot be bound") from None


def _check_bindable(listener: Listener) -> None:
    """Bind once with a plain socket: it says why, where gRPC only says that it could not."""
    address = join_address(listener.host, listener.port)
    try:
        found = socket.getaddrinfo(listener.host, listener.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, place = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except socket.gaierror:
        raise ServeError(f"cannot listen on {address}: {listener.host} is not an address of this machine") from None
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "the port is taken: stop what uses it, or choose another",
            errno.EADDRNOTAVAIL: f"{listener.host} is not an address of this machine",
            errno.EACCES: "ports below 1024 need a privilege that this user does not have",
        }
        reason = reasons.get(error.errno or 0, (error.strerror or str(error)).lower())
        raise ServeError(f"cannot listen on {address}: {reason}") from None


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials that are read again when a file changes, so that a renewed certificate needs no restart."""
    files = [path for path in (tls.cert_file, tls.key_file, tls.client_ca_file) if path is not None]

    def changed() -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in files)

    seen = changed()

    def fetch() -> Any:
        nonlocal seen
        try:
            if (now := changed()) == seen:
                return None
            read = _read_certificates(tls)
        except (OSError, ServeError) as error:
            logger.error("certificate cannot be used, the old one stays error=%s", error)
            return None
        seen = now
        logger.info("certificate read again file=%s", tls.cert_file)
        return read

    return grpc.dynamic_ssl_server_credentials(
        _read_certificates(tls), fetch, require_client_authentication=tls.client_ca_file is not None
    )


def _read_certificates(tls: Tls) -> grpc.ServerCertificateConfiguration:
    """Raises ServeError for what is not a certificate with its key: gRPC would take it, and fail at every handshake."""
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        check.load_cert_chain(tls.cert_file, tls.key_file, password="")
        if tls.client_ca_file is not None:
            check.load_verify_locations(tls.client_ca_file)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        raise ServeError(
            f"tls_cert_file, tls_key_file and tls_client_ca_file must be PEM, the key without a password and the "
            f"certificate's own: {str(reason).lower().replace('_', ' ')}"
        ) from None
    return grpc.ssl_server_certificate_configuration(
        [(tls.key_file.read_bytes(), tls.cert_file.read_bytes())],
        root_certificates=tls.client_ca_file.read_bytes() if tls.client_ca_file else None,
    )
