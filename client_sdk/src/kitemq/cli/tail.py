"""`kitemq tail`."""

from __future__ import annotations

from typing import Annotated

import typer

from kitemq.cli.completion import complete_topic
from kitemq.cli.messages import MessageFormat, MessagePrinter
from kitemq.cli.options import NamesrvOption, connection, parse_time_option
from kitemq.cli.session import run

app = typer.Typer(add_completion=False, rich_markup_mode=None)

LAST = 10


@app.command(
    epilog="\b\nExamples:\n  kitemq tail orders -f\n  kitemq tail orders --since 10m --filter 'paid || refunded'\n"
    "  kitemq tail orders --last 1000 -o json | jq .keys"
)
def tail(
    context: typer.Context,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", autocompletion=complete_topic)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is stored from now on.")] = False,
    last: Annotated[
        int | None,
        typer.Option(
            "--last", "-n", metavar="N", min=0, help=f"The newest so many, over all queues.  [default: {LAST}]"
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="All stored since: 10m (ago), 2026-01-31T08:00, ms.")
    ] = None,
    filter_: Annotated[str, typer.Option("--filter", metavar="TAGS", help="Only these tags, as in 'a || b'.")] = "*",
    output: Annotated[MessageFormat, typer.Option("--output", "-o", help="How to print them.")] = MessageFormat.TEXT,
    namesrv: NamesrvOption = None,
) -> None:
    """Print messages of a topic, without joining a group.

    They come in the order of their storing, over all queues. Text is the body, on a terminal with when and where it was
    stored; json is one object a line, which produce --json reads.
    """
    from kitemq.cli.tailing import tail_topic

    if last is not None and since is not None:
        raise typer.BadParameter("give either --last or --since")
    since_ms = parse_time_option("--since", since)
    count = LAST if last is None else last
    run(
        tail_topic(
            connection(context, namesrv),
            topic,
            filter_expression=filter_,
            last=None if since_ms is not None else count,
            since_ms=since_ms,
            follow=follow,
            printer=MessagePrinter(output),
        )
    )
