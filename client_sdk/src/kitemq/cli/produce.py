"""`kitemq produce`: lines of stdin as messages."""

from __future__ import annotations

from typing import Annotated

import typer

from kitemq.cli.completion import complete_topic
from kitemq.cli.options import NamesrvOption, connection, parse_pairs_option
from kitemq.cli.session import run

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="\b\nExamples:\n  kitemq produce logs < access.log\n"
    "  echo '{\"id\": 7}' | kitemq produce orders --key o-7 --tag paid --property source=shop\n"
    "  kitemq tail orders --since 1h -o json | kitemq produce orders-copy --json"
)
def produce(
    context: typer.Context,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", autocompletion=complete_topic)],
    key: Annotated[
        list[str] | None, typer.Option("--key", "-k", metavar="KEY", help="To look them up by; may be repeated.")
    ] = None,
    tag: Annotated[str, typer.Option("--tag", "-t", metavar="TAG", help="To filter them by.")] = "",
    properties: Annotated[
        list[str] | None, typer.Option("--property", "-p", metavar="NAME=VALUE", help="May be repeated.")
    ] = None,
    sharding_key: Annotated[str, typer.Option(metavar="KEY", help="All lines to one queue, in their order.")] = "",
    full: Annotated[
        bool, typer.Option("--json", help="Each line is a JSON object, as tail -o json prints it.")
    ] = False,
    receipts: Annotated[bool, typer.Option("--receipts", help="Print a JSON line for each stored message.")] = False,
    namesrv: NamesrvOption = None,
) -> None:
    """Send each line of stdin as a message.

    Empty lines are passed over. A line that is no valid message is reported and the rest is sent; when the cluster
    refuses or cannot be reached, no more is read. Ctrl-D ends what you type.

    With --json a line has body or body_base64, and may have tag, keys, properties and sharding_key; the other fields
    that tail prints are ignored: a copy is a new message. --key, --tag, --property and --sharding-key stand in for
    what a line has not.
    """
    from kitemq.cli.producing import LineProducer, LineTemplate

    template = LineTemplate(
        topic=topic,
        keys=tuple(key or ()),
        tag=tag,
        properties=parse_pairs_option("--property", properties),
        sharding_key=sharding_key,
        full=full,
    )
    where = connection(context, namesrv)
    code = run(LineProducer(where, template, receipts=receipts).run())
    raise typer.Exit(code)
