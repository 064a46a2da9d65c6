"""Names of topics, groups and brokers for the shell's TAB key; silent when the cluster does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import typer

from kitemq.cli.options import Connection

if TYPE_CHECKING:
    from kitemq.admin import AdminClient

COMPLETION_TIMEOUT_S = 1.0


def complete_topic(context: typer.Context, incomplete: str) -> list[str]:
    """Topics that begin so."""

    async def names(admin: AdminClient) -> list[str]:
        return [topic.topic for topic in await admin.list_topics()]

    return _complete(context, incomplete, names)


def complete_group(context: typer.Context, incomplete: str) -> list[str]:
    """Consumer groups that begin so."""

    async def names(admin: AdminClient) -> list[str]:
        return [group.group for group in await admin.list_groups()]

    return _complete(context, incomplete, names)


def complete_broker(context: typer.Context, incomplete: str) -> list[str]:
    """Brokers that begin so."""

    async def names(admin: AdminClient) -> list[str]:
        return sorted({broker.broker_name for broker in await admin.list_brokers()})

    return _complete(context, incomplete, names)


def _complete(
    context: typer.Context, incomplete: str, names: Callable[[AdminClient], Awaitable[list[str]]]
) -> list[str]:
    from kitemq.admin import AdminClient
    from kitemq.errors import KiteMQError

    root = context.find_root().params
    where = Connection(
        namesrv=context.params.get("namesrv") or root["namesrv"],
        tls=root["tls"],
        tls_ca=root["tls_ca"],
        tls_cert=root["tls_cert"],
        tls_key=root["tls_key"],
        tls_server_name=root["tls_server_name"],
    )

    async def ask() -> list[str]:
        async with (
            asyncio.timeout(COMPLETION_TIMEOUT_S),
            AdminClient(where.namesrv, tls=where.tls_config(), on_unanswered=lambda *_: None) as admin,
        ):
            return await names(admin)

    try:
        return [name for name in asyncio.run(ask()) if name.startswith(incomplete)]
    except (KiteMQError, TimeoutError):
        return []
