"""`kitemq topic …`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kitemq.cli.completion import complete_topic
from kitemq.cli.options import BrokerOption, NamesrvOption, OutputOption, YesOption, connection, parse_pairs_option
from kitemq.cli.output import Format, count_text, emit, emit_facts, emit_json, emit_table, note, short_time_text
from kitemq.cli.session import with_admin

if TYPE_CHECKING:
    from kitemq.admin import TopicChange, TopicDescription, TopicSummary

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

_PERMISSIONS = {"r": 4, "w": 2, "rw": 6}

TopicArgument = Annotated[str, typer.Argument(metavar="TOPIC", autocompletion=complete_topic)]
PermissionOption = Annotated[
    str | None, typer.Option("--permission", metavar="rw|r|w", help="What clients may do: read, write.")
]
AttributeOption = Annotated[
    list[str] | None,
    typer.Option("--attribute", metavar="NAME=VALUE", help="For example message.type=NORMAL; may be repeated."),
]


@app.callback()
def group() -> None:
    """Create, list, describe, change and delete topics."""


def _permission(text: str | None) -> int | None:
    if text is None:
        return None
    if text not in _PERMISSIONS:
        raise typer.BadParameter(f"{text!r} is none of rw, r, w", param_hint="--permission")
    return _PERMISSIONS[text]


@app.command(epilog="\b\nExample:\n  kitemq topic create orders --queues 8")
def create(
    context: typer.Context,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", help="Letters, digits, '_', '-', '%', '|'; at most 127.")],
    queues: Annotated[
        int, typer.Option("--queues", "-q", metavar="N", min=1, max=16_384, help="Queues on each broker.")
    ] = 8,
    permission: PermissionOption = "rw",
    order: Annotated[bool, typer.Option("--order", help="Mark it as an order topic.")] = False,
    attribute: AttributeOption = None,
    broker: BrokerOption = None,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Create a topic on every master of the cluster.

    Creating it once more with the same settings changes nothing.
    """
    attributes = parse_pairs_option("--attribute", attribute)
    bits = _permission(permission)
    assert bits is not None
    changes = with_admin(
        connection(context, namesrv),
        lambda admin: admin.create_topic(
            topic, queue_count=queues, permission=bits, order=order, attributes=attributes, brokers=broker or ()
        ),
    )
    _show_changes(topic, changes, output)


@app.command(epilog="\b\nExample:\n  kitemq topic update orders --write-queues 16 --read-queues 16")
def update(
    context: typer.Context,
    topic: TopicArgument,
    read_queues: Annotated[
        int | None, typer.Option(min=1, max=16_384, help="Queues that consumers read, on each broker.")
    ] = None,
    write_queues: Annotated[
        int | None, typer.Option(min=1, max=16_384, help="Queues that producers write, on each broker.")
    ] = None,
    permission: PermissionOption = None,
    order: Annotated[bool | None, typer.Option(help="Mark it as an order topic, or not.")] = None,
    attribute: AttributeOption = None,
    broker: BrokerOption = None,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Change a topic on every master that has it.

    To shrink a topic lower --write-queues first, and --read-queues once the queues above are consumed.
    """
    attributes = parse_pairs_option("--attribute", attribute)
    if (read_queues, write_queues, permission, order) == (None,) * 4 and not attributes:
        raise typer.BadParameter("nothing to change: give --read-queues, --write-queues, --permission, … (see --help)")
    bits = _permission(permission)
    changes = with_admin(
        connection(context, namesrv),
        lambda admin: admin.update_topic(
            topic,
            read_queue_count=read_queues,
            write_queue_count=write_queues,
            permission=bits,
            order=order,
            attributes=attributes,
            brokers=broker or (),
        ),
    )
    _show_changes(topic, changes, output)


@app.command("list", epilog="\b\nExample:\n  kitemq topic list -o json | jq -r '.[].topic'")
def list_topics(
    context: typer.Context,
    system: Annotated[bool, typer.Option("--system", help="Also the system's own topics.")] = False,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """List the topics of the cluster."""
    topics = with_admin(connection(context, namesrv), lambda admin: admin.list_topics(include_system=system))
    if output is Format.JSON:
        emit_json([_summary(topic) for topic in topics])
        return
    emit_table(
        ["topic", "read queues#", "write queues#", "permission", "brokers"],
        (
            (
                one.topic,
                one.read_queue_count,
                one.write_queue_count,
                "/".join(sorted({_permission_text(settings.permission) for settings in one.settings})),
                ", ".join(settings.broker_name for settings in one.settings),
            )
            for one in topics
        ),
    )


@app.command(epilog="\b\nExample:\n  kitemq topic describe orders")
def describe(
    context: typer.Context,
    topic: TopicArgument,
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Show a topic's settings, queues and groups."""
    found = with_admin(connection(context, namesrv), lambda admin: admin.describe_topic(topic))
    if output is Format.JSON:
        emit_json(_description(found))
        return
    stored = sum(one.max_offset - one.min_offset for one in found.queues)
    emit_facts(
        [
            ("topic", found.topic),
            ("messages", stored),
            ("groups", ", ".join(found.groups)),
            *((f"on {one.broker_name}", _settings_text(one)) for one in found.settings),
        ]
    )
    emit("")
    emit_table(
        ["broker", "queue#", "min offset#", "max offset#", "messages#", "last stored"],
        (
            (
                one.queue.broker_name,
                one.queue.queue_id,
                one.min_offset,
                one.max_offset,
                one.max_offset - one.min_offset,
                short_time_text(one.last_store_timestamp_ms),
            )
            for one in found.queues
        ),
    )


@app.command(epilog="\b\nExample:\n  kitemq topic delete orders --yes")
def delete(
    context: typer.Context,
    topic: TopicArgument,
    broker: BrokerOption = None,
    yes: YesOption = False,
    namesrv: NamesrvOption = None,
) -> None:
    """Delete a topic with its messages. Asks first.

    The offsets of groups in it go too.
    """
    where = connection(context, namesrv)
    if not yes:
        found = with_admin(where, lambda admin: admin.describe_topic(topic))
        kept = sum(
            one.max_offset - one.min_offset for one in found.queues if not broker or one.queue.broker_name in broker
        )
        on = ", ".join(one.broker_name for one in found.settings if not broker or one.broker_name in broker)
        readers = f", read by {', '.join(found.groups)}" if found.groups else ""
        typer.confirm(f"Delete topic {topic} on {on}: {count_text(kept, 'message')}{readers}?", abort=True, err=True)
    names = with_admin(where, lambda admin: admin.delete_topic(topic, brokers=broker or ()))
    note(f"Deleted {topic} on {', '.join(names)}.")


def _permission_text(permission: int) -> str:
    from kitemq.admin import permission_text

    return permission_text(permission)


def _settings_text(settings: Any) -> str:
    text = f"{settings.read_queue_count} read and {settings.write_queue_count} write queues"
    text += f", permission {_permission_text(settings.permission)}"
    if settings.order:
        text += ", order"
    return text + "".join(f", {name}={value}" for name, value in settings.attributes.items())


def _settings(settings: Any) -> dict[str, Any]:
    return {**asdict(settings), "permission": _permission_text(settings.permission)}


def _summary(topic: TopicSummary) -> dict[str, Any]:
    return {
        "topic": topic.topic,
        "read_queue_count": topic.read_queue_count,
        "write_queue_count": topic.write_queue_count,
        "system": topic.system,
        "brokers": [_settings(one) for one in topic.settings],
    }


def _description(topic: TopicDescription) -> dict[str, Any]:
    return {
        "topic": topic.topic,
        "brokers": [_settings(one) for one in topic.settings],
        "groups": list(topic.groups),
        "queues": [
            {
                "broker_name": one.queue.broker_name,
                "queue_id": one.queue.queue_id,
                "min_offset": one.min_offset,
                "max_offset": one.max_offset,
                "last_store_timestamp_ms": one.last_store_timestamp_ms,
            }
            for one in topic.queues
        ],
    }


def _show_changes(topic: str, changes: list[TopicChange], output: Format) -> None:
    if output is Format.JSON:
        emit_json([{**_settings(one.settings), "topic": topic, "created": one.created} for one in changes])
        return
    for one in changes:
        verb = "Created" if one.created else "Set"
        note(f"{verb} {topic} on {one.settings.broker_name}: {_settings_text(one.settings)}.")
