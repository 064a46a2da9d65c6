"""Channels and unary calls.

One channel per address, shared by every client of the process on one event loop and closed with the last of them.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import weakref
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from kitemq.errors import InvalidRequestError, error_from_rpc
from kitemq.protocol.names import GRPC_BYTES_MAX

RequestT = TypeVar("RequestT", contravariant=True)
ResponseT = TypeVar("ResponseT", covariant=True)

CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", GRPC_BYTES_MAX),
    ("grpc.max_send_message_length", GRPC_BYTES_MAX),
    ("grpc.http2.max_frame_size", 16 * 1024 * 1024 - 1),
    # A peer whose machine died says nothing: ask every 15 s, give up after 5.
    ("grpc.keepalive_time_ms", 15_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A broker that restarts is back within seconds: don't wait for gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # In spite of its name: how long setting up a connection may take. TCP, TLS and settings are four round trips. Below
    # the 3 s of a request, so that it ends as "not reached" and not as "no answer".
    ("grpc.min_reconnect_backoff_ms", 2_000),
]

_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]")


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """Paths of PEM files. ca_file: None = the system's roots. cert_file and key_file: for mutual TLS.

    server_name: the name in the server's certificate, where it is not the address dialled.
    """

    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises InvalidRequestError for a file that cannot be read."""

        def read(path: str | None) -> bytes | None:
            if path is None:
                return None
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise InvalidRequestError(f"TLS file {path!r}: {error.strerror}") from None

        return grpc.ssl_channel_credentials(read(self.ca_file), read(self.key_file), read(self.cert_file))


class UnaryMethod(Protocol[RequestT, ResponseT]):
    """A unary method of a generated async stub."""

    def __call__(self, request: RequestT, *, timeout: float | None = None) -> Awaitable[ResponseT]: ...


class _Shared:
    __slots__ = ("channel", "users")

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.users = 0


_pools: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, TlsConfig | None], _Shared]] = (
    weakref.WeakKeyDictionary()
)


class Channels:
    """The channels that one client uses. Belongs to the loop it was made on; `close()` gives all of them back."""

    def __init__(self, *, tls: TlsConfig | None = None) -> None:
        self._tls = tls
        self._pool = _pools.setdefault(asyncio.get_running_loop(), {})
        self._held: set[str] = set()

    def get(self, address: str) -> grpc.aio.Channel:
        """The shared channel to `address` ("host:port"). Dials in the background."""
        key = (address, self._tls)
        shared = self._pool.get(key)
        if shared is None:
            shared = self._pool[key] = _Shared(self._open(address))
        if address not in self._held:
            self._held.add(address)
            shared.users += 1
        return shared.channel

    def _open(self, address: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        options = list(CHANNEL_OPTIONS)
        if self._tls.server_name:
            options.append(("grpc.ssl_target_name_override", self._tls.server_name))
        return grpc.aio.secure_channel(address, self._tls.credentials(), options=options)

    async def close(self) -> None:
        for address in list(self._held):
            self._held.discard(address)
            key = (address, self._tls)
            shared = self._pool[key]
            shared.users -= 1
            if not shared.users:
                del self._pool[key]
                await shared.channel.close()


async def call(
    method: UnaryMethod[RequestT, ResponseT],
    request: RequestT,
    *,
    timeout_s: float,
    address: str,
    topic: str | None = None,
) -> ResponseT:
    """One unary call. Raises the error table's class for a failed one."""
    try:
        return await method(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error, address=address, topic=topic) from None


def parse_addresses(addresses: str | list[str] | tuple[str, ...]) -> list[str]:
    """ "a:9876;b:9876" (or commas, or a list) as a list. Raises InvalidRequestError for one that is not host:port."""
    items = addresses.replace(",", ";").split(";") if isinstance(addresses, str) else list(addresses)
    result = [item.strip() for item in items if item.strip()]
    if not result:
        raise InvalidRequestError("no namesrv address given: pass 'host:9876', several separated by ';'")
    for item in result:
        host, _, port = item.rpartition(":")
        if not _HOST.fullmatch(host) or not port.isdecimal() or not 0 < int(port) < 65536:
            raise InvalidRequestError(f"address {item!r} is not host:port")
    return result


def new_client_id() -> str:
    """host@pid#random: says to an operator where a client runs."""
    return f"{socket.gethostname()}@{os.getpid()}#{secrets.token_hex(4)}"
