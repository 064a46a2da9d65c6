"""Options that many verbs share, and how they reach the SDK."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import typer

from kitemq.cli.output import Format
from kitemq.cli.times import parse_span, parse_time

if TYPE_CHECKING:
    from kitemq.rpc import TlsConfig

NAMESRV = "127.0.0.1:9876"


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the cluster is. The root command fills it from its options and the environment."""

    namesrv: str = NAMESRV
    tls: bool = False
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_server_name: str | None = None

    def tls_config(self) -> TlsConfig | None:
        """None = plaintext."""
        from kitemq.rpc import TlsConfig

        if not (self.tls or self.tls_ca or self.tls_cert or self.tls_server_name):
            return None
        return TlsConfig(self.tls_ca, self.tls_cert, self.tls_key, self.tls_server_name)


def connection(context: typer.Context, namesrv: str | None) -> Connection:
    """What the verb's own --namesrv says, and the root command's options for the rest."""
    root = context.find_object(Connection) or Connection()
    return replace(root, namesrv=namesrv) if namesrv else root


NamesrvOption = Annotated[
    str | None,
    typer.Option("--namesrv", metavar="HOST:PORT[;…]", help="Namesrvs, in place of $KITEMQ_NAMESRV."),
]
OutputOption = Annotated[Format, typer.Option("--output", "-o", help="How to print it.")]
BrokerOption = Annotated[
    list[str] | None, typer.Option("--broker", metavar="NAME", help="Only on this broker; may be repeated.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def parse_time_option(option: str, text: str | None) -> int | None:
    """Unix milliseconds of a point in time given as `option`; None for none. A usage error for what is no time."""
    try:
        return None if text is None else parse_time(text, now_ms=int(time.time() * 1000))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def parse_span_option(option: str, text: str | None) -> float | None:
    """Seconds of a length of time given as `option`; None for none. A usage error for what is none."""
    try:
        return None if text is None else parse_span(text) / 1000
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def parse_pairs_option(option: str, texts: list[str] | None) -> dict[str, str]:
    """Names and values given as `option` a=b. A usage error for what is no pair."""
    pairs: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"{text!r} is not name=value", param_hint=option)
        pairs[name] = value
    return pairs
