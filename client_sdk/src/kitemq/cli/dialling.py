"""One address, from its name to a connection: how far it goes, how long it takes, and what is spoken there."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from dataclasses import dataclass, field
from enum import Enum

RESOLVE_S = 3.0
CONNECT_S = 3.0
SPEAK_S = 2.0

# What an HTTP/2 client says first: the preface, and an empty SETTINGS frame (RFC 9113, 3.4).
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
_FRAME_HEADER_BYTES = 9
_FRAME_TYPE_SETTINGS = 4


class Protocol(Enum):
    """What answers at a port."""

    TLS = "TLS"
    PLAINTEXT_HTTP2 = "plaintext"
    OTHER = "something else"


@dataclass(slots=True)
class Dialled:
    """How far dialling came. resolved: IP addresses. problem: empty = connected; advice: how to mend the problem."""

    address: str
    host: str
    port: int
    resolved: list[str] = field(default_factory=list)
    connect_ms: float | None = None
    problem: str = ""
    advice: str = ""


async def dial(address: str) -> Dialled:
    """Resolve "host:port" and open a TCP connection to it."""
    host, _, port = address.rpartition(":")
    dialled = Dialled(address, host.strip("[]"), int(port) if port.isdigit() else 0)
    if not dialled.host or not 0 < dialled.port < 65536:
        dialled.problem = f"{address!r} is not host:port"
        dialled.advice = "correct the address"
        return dialled
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(RESOLVE_S):
            found = await loop.getaddrinfo(dialled.host, dialled.port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "no answer from the resolver"
        dialled.problem = f"the name {dialled.host} does not resolve from here ({reason})"
        dialled.advice = "add it to DNS or /etc/hosts, or use a name or address that this machine knows"
        return dialled
    dialled.resolved = list(dict.fromkeys(str(one[4][0]) for one in found))
    began = time.perf_counter()
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await asyncio.open_connection(dialled.host, dialled.port)
    except TimeoutError:
        dialled.problem = f"cannot be reached from here: no connection within {CONNECT_S:.0f} s"
        dialled.advice = "is there a firewall or a private network between? Use an address that leads there"
        return dialled
    except OSError as error:
        dialled.problem = f"cannot be reached from here ({_reason(error)})"
        dialled.advice = "is its process running, and is the port right?"
        return dialled
    dialled.connect_ms = (time.perf_counter() - began) * 1000
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return dialled


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return error.strerror.lower() if error.strerror else "no route"


async def spoken_protocol(address: str) -> Protocol:
    """What a port that takes connections speaks. Trusts any certificate: nothing is sent to it."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    unverified = ssl.create_default_context()
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    unverified.set_alpn_protocols(["h2"])
    try:
        async with asyncio.timeout(SPEAK_S):
            _, writer = await asyncio.open_connection(host, int(port), ssl=unverified)
            writer.close()
            return Protocol.TLS
    except (OSError, TimeoutError):
        pass
    try:
        async with asyncio.timeout(SPEAK_S):
            reader, writer = await asyncio.open_connection(host, int(port))
            try:
                writer.write(_HTTP2_HELLO)
                header = await reader.readexactly(_FRAME_HEADER_BYTES)
            finally:
                writer.close()
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return Protocol.OTHER
    return Protocol.PLAINTEXT_HTTP2 if header[3] == _FRAME_TYPE_SETTINGS else Protocol.OTHER
