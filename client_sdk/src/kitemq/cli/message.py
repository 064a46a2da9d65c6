"""`kitemq message …`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kitemq.cli.completion import complete_topic
from kitemq.cli.messages import MessageFormat, MessagePrinter, body_text, printable
from kitemq.cli.options import NamesrvOption, connection, parse_time_option
from kitemq.cli.output import emit, emit_facts, span_text, time_text
from kitemq.cli.queues import parse_position
from kitemq.cli.session import with_admin

if TYPE_CHECKING:
    from kitemq.admin import AdminClient
    from kitemq.message import ReceivedMessage

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Look up stored messages."""


@app.command(
    epilog="\b\nExamples:\n  kitemq message get 9F3A61C0B2D44E8800000000000004D2\n"
    "  kitemq message get --topic orders --key o-1\n"
    "  kitemq message get --offset orders@broker-a:3:1042"
)
def get(
    context: typer.Context,
    message_id: Annotated[str | None, typer.Argument(metavar="ID", help="Its message id.")] = None,
    key: Annotated[str | None, typer.Option(metavar="KEY", help="One of its keys; give --topic too.")] = None,
    topic: Annotated[
        str | None, typer.Option(metavar="TOPIC", autocompletion=complete_topic, help="The topic of --key.")
    ] = None,
    offset: Annotated[
        str | None, typer.Option(metavar="TOPIC@BROKER:ID:OFFSET", help="Where it lies: queue and queue offset.")
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME", help="With --key: stored at or after this.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="With --key: stored before this.")] = None,
    max_count: Annotated[
        int, typer.Option("--max", metavar="N", min=1, max=64, help="With --key: at most so many.")
    ] = 32,
    output: Annotated[MessageFormat, typer.Option("--output", "-o", help="How to print it.")] = MessageFormat.TEXT,
    namesrv: NamesrvOption = None,
) -> None:
    """Show a message, and when and where it was stored.

    Several with one key are shown newest first. -o json prints a line each, as tail does.
    """
    if [message_id, key, offset].count(None) != 2:
        raise typer.BadParameter("give exactly one of ID, --key and --offset")
    if (key is None) != (topic is None):
        raise typer.BadParameter("--key and --topic go together: keys are looked up within a topic")
    position = parse_position(offset) if offset else None
    begin_ms = parse_time_option("--since", since) or 0
    end_ms = parse_time_option("--until", until) or 0

    async def verb(admin: AdminClient) -> list[ReceivedMessage]:
        if message_id is not None:
            return await admin.find_by_id(message_id)
        if position is not None:
            return [await admin.find_at(*position)]
        assert topic is not None and key is not None
        return await admin.find_by_key(
            topic, key, begin_timestamp_ms=begin_ms, end_timestamp_ms=end_ms, max_count=max_count
        )

    found = with_admin(connection(context, namesrv), verb)
    printer = MessagePrinter(output)
    for number, message in enumerate(found):
        if output is MessageFormat.JSON:
            printer.print(message)
            continue
        if number:
            emit("")
        _show(message)
    printer.flush()


def _show(message: ReceivedMessage) -> None:
    waited_ms = message.store_timestamp_ms - message.born_timestamp_ms
    emit_facts(
        [
            ("message id", printable(message.message_id)),
            ("topic", message.topic),
            ("broker", message.queue.broker_name),
            ("queue", f"{message.queue.queue_id}, queue offset {message.queue_offset}"),
            ("log", f"physical offset {message.physical_offset}, epoch {message.epoch}"),
            ("born", f"{time_text(message.born_timestamp_ms)}, by {printable(message.producer_group) or '-'}"),
            ("stored", f"{time_text(message.store_timestamp_ms)} ({_later(waited_ms)})"),
            ("tag", printable(message.tag)),
            ("keys", printable(" ".join(message.keys))),
            ("sharding key", printable(message.sharding_key)),
            *((f"property {printable(name)}", printable(text)) for name, text in sorted(message.properties.items())),
            ("body", f"{len(message.body)} bytes"),
        ]
    )
    emit("")
    emit("\n".join(body_text(line) for line in message.body.split(b"\n")))


def _later(span_ms: int) -> str:
    return f"{span_text(span_ms)} later" if span_ms >= 0 else f"{span_text(-span_ms)} earlier: the clocks differ"
