"""host:port texts, listeners, and the address by which a service tells others to reach it."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DEFAULT_LISTENER = "internal"
LISTENERS_MAX = 8

_LISTENER_NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}")
_IPV6 = re.compile(r"[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9._-]{1,16})?")
_WILDCARDS = frozenset({"0.0.0.0", "::"})


@dataclass(frozen=True, slots=True)
class Listener:
    """One address a service accepts connections on. Port 0 = any free one."""

    name: str
    host: str
    port: int

    def __str__(self) -> str:
        address = join_address(self.host, self.port)
        return address if self.name == DEFAULT_LISTENER else f"{self.name}={address}"


def join_address(host: str, port: int) -> str:
    """host:port, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def split_address(text: str, *, default_port: int | None = None) -> tuple[str, int]:
    """Host and port of "host:port" or "[ipv6]:port".

    default_port: for a text without a port; None = the port is required. Raises ValueError, in words for people.
    """
    host, separator, port_text = text.rpartition(":")
    if not separator or (text.startswith("[") and text.endswith("]")):
        if default_port is None:
            raise ValueError(f"{text!r} has no port: write host:port")
        host, port_text = text, str(default_port)
    if host.startswith("[") and host.endswith("]") and _IPV6.fullmatch(host[1:-1]):
        host = host[1:-1]
    elif not _HOST.fullmatch(host):
        hint = ": write an IPv6 host in brackets, as [::1]:9876" if ":" in host else ""
        raise ValueError(f"{text!r} has no valid host{hint}")
    if not (port_text.isascii() and port_text.isdigit() and int(port_text) <= 65_535):
        raise ValueError(f"{text!r} has no valid port: 0 to 65535")
    return host, int(port_text)


def check_listener_name(name: str) -> None:
    """Raises ValueError unless `name` is a legal listener name: 1..32 of a-z, 0-9, '_', '-', a letter first."""
    if not _LISTENER_NAME.fullmatch(name):
        raise ValueError(f"listener name {name[:40]!r} must be lower-case letters, digits, '_' or '-', a letter first")


def parse_listeners(value: object) -> tuple[Listener, ...]:
    """Listeners from "host:port", "name=host:port,name=host:port", or a table of names and addresses.

    Raises ValueError.
    """
    if isinstance(value, Sequence) and value and all(isinstance(item, Listener) for item in value):
        return tuple(value)
    listeners = []
    for name, address in named_texts(value, default_name=DEFAULT_LISTENER).items():
        check_listener_name(name)
        host, port = split_address(address)
        listeners.append(Listener(name, host, port))
    if not 1 <= len(listeners) <= LISTENERS_MAX:
        raise ValueError(f"needs 1 to {LISTENERS_MAX} addresses, has {len(listeners)}")
    return tuple(listeners)


def named_texts(value: object, *, default_name: str) -> dict[str, str]:
    """A table of texts, or one from "name=text,name=text"; a text without a name gets `default_name`.

    Raises ValueError for another type and for a name that occurs twice.
    """
    if isinstance(value, Mapping):
        return {str(name): str(text) for name, text in value.items()}
    if not isinstance(value, str):
        raise ValueError("must be text or a table of names and addresses")
    named: dict[str, str] = {}
    for part in text_list(value):
        name, separator, text = part.partition("=")
        if not separator:
            name, text = default_name, part
        if name in named:
            raise ValueError(f"{name!r} occurs twice: give each address a name, as name=host:port")
        named[name.strip()] = text.strip()
    return named


def text_list(value: object) -> list[str]:
    """A list of texts, or one from "a,b" or "a;b". Raises ValueError for another type."""
    if isinstance(value, str):
        return [part.strip() for part in re.split("[,;]", value) if part.strip()]
    if isinstance(value, Sequence) and all(isinstance(item, str) for item in value):
        return list(value)
    raise ValueError("must be text or a list of texts")


def advertised_addresses(
    listeners: Sequence[Listener], *, ports: Mapping[str, int], advertise: Mapping[str, str]
) -> dict[str, str]:
    """What others are told to dial, by listener name.

    ports: bound port by listener name. advertise: "host" or "host:port" by listener name, where the operator set one.
    Without one it is the listener's own host, or this machine's primary address when it listens on all.
    """
    addresses = {}
    for listener in listeners:
        port = ports[listener.name]
        if listener.name in advertise:
            addresses[listener.name] = join_address(*split_address(advertise[listener.name], default_port=port))
        else:
            host = primary_host() if listener.host in _WILDCARDS else listener.host
            addresses[listener.name] = join_address(host, port)
    return addresses


def local_address(listener: Listener, port: int) -> str:
    """host:port by which this machine itself reaches a listener that has bound `port`."""
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    return join_address(loopback.get(listener.host, listener.host), port)


def primary_host() -> str:
    """The IPv4 address this machine has towards its default route; 127.0.0.1 without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket picks a route and sends nothing.
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
