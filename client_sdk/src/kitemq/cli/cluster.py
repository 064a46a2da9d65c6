"""`kitemq cluster …`."""

from __future__ import annotations

import time
from dataclasses import asdict

import typer

from kitemq.cli.options import NamesrvOption, OutputOption, connection
from kitemq.cli.output import Format, emit_json, emit_table, span_text
from kitemq.cli.session import with_admin

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Show which brokers there are."""


@app.command("list", epilog="\b\nExample:\n  kitemq cluster list")
def list_brokers(context: typer.Context, output: OutputOption = Format.TABLE, namesrv: NamesrvOption = None) -> None:
    """List brokers, the addresses clients are told, and whether a producer could send to them now."""
    brokers = with_admin(connection(context, namesrv), lambda admin: admin.list_brokers(ask_brokers=True))
    if output is Format.JSON:
        emit_json([asdict(one) for one in brokers])
        return
    now_ms = time.time() * 1000
    emit_table(
        ["cluster", "broker", "id#", "role", "address", "heartbeat", "writable"],
        (
            (
                one.cluster_name,
                one.broker_name,
                one.broker_id,
                one.role,
                one.address,
                f"{span_text(max(0.0, now_ms - one.last_heartbeat_timestamp_ms))} ago",
                "yes" if one.writable else f"no: {one.not_writable_reason}",
            )
            for one in brokers
        ),
    )
