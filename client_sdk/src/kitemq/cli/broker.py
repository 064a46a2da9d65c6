"""`kitemq broker …`."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from kitemq.cli.completion import complete_broker
from kitemq.cli.options import NamesrvOption, OutputOption, connection, parse_pairs_option
from kitemq.cli.output import (
    Format,
    bytes_text,
    count_text,
    emit_facts,
    emit_json,
    emit_table,
    note,
    span_text,
    time_text,
)
from kitemq.cli.session import with_admin

if TYPE_CHECKING:
    from kitemq.admin import AdminClient, BrokerDescription, ConfigItem

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

BrokerArgument = Annotated[str, typer.Argument(metavar="BROKER", autocompletion=complete_broker)]
IdOption = Annotated[int | None, typer.Option("--id", min=0, help="Which of the group; the master if not given.")]


@app.callback()
def group() -> None:
    """Describe brokers, change their settings, take them out of writing."""


@app.command(epilog="\b\nExample:\n  kitemq broker describe broker-a")
def describe(
    context: typer.Context,
    broker: BrokerArgument,
    broker_id: IdOption = None,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Show a broker's store, disk, clients and counters."""
    found = with_admin(connection(context, namesrv), lambda admin: admin.describe_broker(broker, broker_id))
    if output is Format.JSON:
        emit_json(asdict(found))
        return
    emit_facts(_facts(found))


def _facts(broker: BrokerDescription) -> list[tuple[str, object]]:
    free = broker.disk_free_bytes / broker.disk_total_bytes if broker.disk_total_bytes else 0.0
    behind = broker.written_offset - broker.flushed_offset
    return [
        ("broker", f"{broker.broker_name} (id {broker.broker_id}, {broker.role}) of {broker.cluster_name}"),
        ("version", broker.version),
        *((f"address {name}", address) for name, address in broker.addresses.items()),
        ("up", f"{span_text(broker.broker_timestamp_ms - broker.boot_timestamp_ms)}, epoch {broker.epoch}"),
        ("writable", "yes" if broker.writable else f"no: {broker.not_writable_reason}"),
        ("flush mode", broker.flush_mode),
        ("store", f"{bytes_text(broker.store_bytes)}, uuid {broker.store_uuid}"),
        ("disk", f"{bytes_text(broker.disk_free_bytes)} free of {bytes_text(broker.disk_total_bytes)} ({free:.0%})"),
        ("log", f"{broker.min_physical_offset} .. {broker.written_offset}, confirmed {broker.confirm_offset}"),
        ("not flushed", bytes_text(behind)),
        ("oldest message", time_text(broker.earliest_store_timestamp_ms)),
        ("topics", f"{broker.topic_count}, {broker.queue_count} queues"),
        ("groups", broker.group_count),
        ("clients", f"{broker.client_count}, {broker.held_pull_count} held pulls"),
        ("messages", f"{broker.messages_in_total} in, {broker.messages_out_total} out since start"),
        ("damaged records", broker.damaged_record_count),
        ("deleted unread", broker.deleted_unconsumed_count),
    ]


@app.command(
    epilog="\b\nExamples:\n  kitemq broker config broker-a\n"
    "  kitemq broker config broker-a --set auto_create_topic_enable=false"
)
def config(
    context: typer.Context,
    broker: BrokerArgument,
    change: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change it; may be repeated.")
    ] = None,
    broker_id: IdOption = None,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Show a broker's settings, or change them.

    Those marked changeable can be changed while it runs, until its next start.
    """
    values = parse_pairs_option("--set", change)

    async def verb(admin: AdminClient) -> list[ConfigItem]:
        if values:
            await admin.set_config(broker, values, broker_id)
        return await admin.get_config(broker, broker_id)

    items = with_admin(connection(context, namesrv), verb)
    if values:
        note(f"Changed {', '.join(values)} on {broker}.")
        items = [item for item in items if item.key in values]
    if output is Format.JSON:
        emit_json([asdict(item) for item in items])
        return
    emit_table(
        ["key", "value", "changeable", "what"],
        ((item.key, item.value, "yes" if item.changeable else "no", item.help) for item in items),
    )


class Switch(StrEnum):
    """What `broker writes` is told."""

    ON = "on"
    OFF = "off"


@app.command(epilog="\b\nExamples:\n  kitemq broker writes broker-a off\n  kitemq broker writes broker-a on")
def writes(
    context: typer.Context,
    broker: BrokerArgument,
    switch: Annotated[Switch, typer.Argument(metavar="on|off", help="What producers may do from now on.")],
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Take a broker out of writing before its maintenance, or put it back.

    Producers are told at once to send elsewhere, and the broker still takes what is on its way; consumers go on with
    what it has. Every namesrv given is told. It ends with `on`, or when the broker stops cleanly.
    """
    wanted = switch is Switch.ON

    async def verb(admin: AdminClient) -> tuple[int, bool]:
        count = await admin.set_write_permission(broker, writable=wanted)
        return count, any(one.writable for one in await admin.list_brokers())

    topic_count, any_writable = with_admin(connection(context, namesrv), verb)
    note(f"Writes to {broker} are {switch.value}: {count_text(topic_count, 'topic')} changed.")
    if not any_writable:
        note("Warning: no other broker is there to send to: sends fail until writes are on again.")
    if output is Format.JSON:
        emit_json({"broker_name": broker, "writable": wanted, "topic_count": topic_count})
