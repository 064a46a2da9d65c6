"""`kitemq group …`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kitemq.cli.completion import complete_group, complete_topic
from kitemq.cli.options import NamesrvOption, OutputOption, YesOption, connection, parse_time_option
from kitemq.cli.output import Format, count_text, emit, emit_facts, emit_json, emit_table, note, span_text
from kitemq.cli.queues import parse_queue
from kitemq.cli.session import with_admin

if TYPE_CHECKING:
    from kitemq.admin import AdminClient, GroupDescription, OffsetMove

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

GroupArgument = Annotated[str, typer.Argument(metavar="GROUP", autocompletion=complete_group)]


@app.callback()
def group() -> None:
    """List and describe consumer groups; move their offsets."""


@app.command("list", epilog="\b\nExample:\n  kitemq group list")
def list_groups(context: typer.Context, output: OutputOption = Format.TABLE, namesrv: NamesrvOption = None) -> None:
    """List the consumer groups of the cluster, with their lag."""
    groups = with_admin(connection(context, namesrv), lambda admin: admin.list_groups())
    if output is Format.JSON:
        emit_json([asdict(one) for one in groups])
        return
    emit_table(
        ["group", "members#", "lag#", "model", "type"],
        ((one.group, one.member_count, one.lag_messages, one.message_model, one.consume_type) for one in groups),
    )


@app.command(epilog="\b\nExample:\n  kitemq group describe billing")
def describe(
    context: typer.Context,
    group: GroupArgument,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Show a group's members and how far it is in every queue."""
    found = with_admin(connection(context, namesrv), lambda admin: admin.describe_group(group))
    if output is Format.JSON:
        emit_json(_description(found))
        return
    now_ms = time.time() * 1000
    emit_facts(
        [
            ("group", found.group),
            ("members", len(found.members)),
            ("lag", found.lag_messages),
            *([] if found.consume_enabled else [("consuming", "switched off")]),
        ]
    )
    if found.members:
        emit("")
        emit_table(
            ["client", "address", "sdk", "topics", "heartbeat"],
            (
                (
                    one.client_id,
                    one.address,
                    f"{one.language} {one.version}",
                    ", ".join(f"{topic} ({tags})" for topic, tags in sorted(one.subscriptions.items())),
                    f"{span_text(max(0.0, now_ms - one.last_heartbeat_timestamp_ms))} ago",
                )
                for one in found.members
            ),
        )
    emit("")
    emit_table(
        ["topic", "broker", "queue#", "committed#", "max offset#", "lag#", "oldest waiting#"],
        (
            (
                one.queue.topic,
                one.queue.broker_name,
                one.queue.queue_id,
                one.consumer_offset,
                one.max_offset,
                one.lag_messages,
                span_text(max(0.0, now_ms - one.oldest_waiting_timestamp_ms))
                if one.oldest_waiting_timestamp_ms
                else None,
            )
            for one in found.queues
        ),
    )


@app.command(
    "reset-offset",
    epilog="\b\nExamples:\n  kitemq group reset-offset billing orders --to 2h\n"
    "  kitemq group reset-offset billing orders --to first --dry-run",
)
def reset_offset(
    context: typer.Context,
    group: GroupArgument,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", autocompletion=complete_topic)],
    to: Annotated[
        str | None,
        typer.Option(metavar="first|last|TIME", help="Where to: TIME is 2h (ago), 2026-01-31T08:00, now, or ms."),
    ] = None,
    offset: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="To this queue offset; give --queue too.")
    ] = None,
    queue: Annotated[
        list[str] | None, typer.Option(metavar="BROKER:ID", help="Only this queue; may be repeated.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Also while the group has members.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and stop.")] = False,
    yes: YesOption = False,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Move a group's offsets in a topic. Shows the moves and asks first."""
    if (to is None) == (offset is None):
        raise typer.BadParameter("give either --to or --offset")
    if offset is not None and not queue:
        raise typer.BadParameter("--offset says where in one queue: name it with --queue BROKER:ID")
    timestamp_ms = None if to in ("first", "last") else parse_time_option("--to", to)
    where = connection(context, namesrv)

    def reset(only_show: bool) -> list[OffsetMove]:
        async def verb(admin: AdminClient) -> list[OffsetMove]:
            return await admin.reset_offsets(
                group,
                topic,
                first=to == "first",
                last=to == "last",
                timestamp_ms=timestamp_ms,
                queue_offset=offset,
                queues=[parse_queue(f"{topic}@{one}") for one in queue or ()],
                dry_run=only_show,
                force=force,
            )

        return with_admin(where, verb)

    moves = reset(only_show=True)
    if output is Format.TABLE:
        _show_moves(moves)
    if not dry_run:
        if not yes:
            typer.confirm(f"Move the offsets of {group} in {topic}?", abort=True, err=True)
        moves = reset(only_show=False)
        note(f"Moved the offsets of {group} in {topic}: {count_text(len(moves), 'queue')}.")
    if output is Format.JSON:
        emit_json({"group": group, "topic": topic, "applied": not dry_run, "moves": [_move(one) for one in moves]})


def _show_moves(moves: list[OffsetMove]) -> None:
    emit_table(
        ["broker", "queue#", "from#", "to#", "change#"],
        (
            (
                one.queue.broker_name,
                one.queue.queue_id,
                one.old_offset,
                one.new_offset,
                None if one.old_offset is None else f"{one.new_offset - one.old_offset:+d}",
            )
            for one in moves
        ),
    )


def _move(move: OffsetMove) -> dict[str, Any]:
    return {
        "broker_name": move.queue.broker_name,
        "queue_id": move.queue.queue_id,
        "old_offset": move.old_offset,
        "new_offset": move.new_offset,
    }


def _description(group: GroupDescription) -> dict[str, Any]:
    return {
        "group": group.group,
        "consume_enabled": group.consume_enabled,
        "lag_messages": group.lag_messages,
        "members": [asdict(one) for one in group.members],
        "queues": [
            {
                "topic": one.queue.topic,
                "broker_name": one.queue.broker_name,
                "queue_id": one.queue.queue_id,
                "min_offset": one.min_offset,
                "max_offset": one.max_offset,
                "consumer_offset": one.consumer_offset,
                "lag_messages": one.lag_messages,
                "oldest_waiting_timestamp_ms": one.oldest_waiting_timestamp_ms,
            }
            for one in group.queues
        ],
    }
