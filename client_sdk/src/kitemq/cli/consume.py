"""`kitemq consume`."""

from __future__ import annotations

from typing import Annotated

import typer

from kitemq.cli.completion import complete_group, complete_topic
from kitemq.cli.messages import MessageFormat, MessagePrinter
from kitemq.cli.options import NamesrvOption, connection, parse_span_option, parse_time_option
from kitemq.cli.session import run

# After Ctrl-C: how long the last commit and the goodbye may take.
TIDY_UP_S = 2.0

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    epilog="\b\nExamples:\n  kitemq consume orders --group billing\n"
    "  kitemq consume orders --group audit --from first --idle 5s -o json > orders.jsonl"
)
def consume(
    context: typer.Context,
    topic: Annotated[str, typer.Argument(metavar="TOPIC", autocompletion=complete_topic)],
    group: Annotated[
        str,
        typer.Option(
            "--group", "-g", metavar="GROUP", autocompletion=complete_group, help="The consumer group to join."
        ),
    ],
    from_: Annotated[
        str,
        typer.Option("--from", metavar="first|last|TIME", help="Where a queue begins that the group has not read yet."),
    ] = "last",
    filter_: Annotated[str, typer.Option("--filter", metavar="TAGS", help="Only these tags, as in 'a || b'.")] = "*",
    count: Annotated[int | None, typer.Option("--count", "-n", metavar="N", min=1, help="Stop after so many.")] = None,
    idle: Annotated[str | None, typer.Option(metavar="SPAN", help="Stop when nothing has come for so long.")] = None,
    output: Annotated[MessageFormat, typer.Option("--output", "-o", help="How to print them.")] = MessageFormat.TEXT,
    namesrv: NamesrvOption = None,
) -> None:
    """Join a consumer group and print its share of a topic.

    A message is committed once it is written to stdout, at the latest 5 seconds later and when the command ends; so
    after a crash some are printed again, and none is lost.
    """
    from kitemq.cli.consuming import consume_topic

    start = from_ if from_ in ("first", "last") else parse_time_option("--from", from_)
    idle_s = parse_span_option("--idle", idle)
    assert start is not None
    run(
        consume_topic(
            connection(context, namesrv),
            topic,
            group=group,
            start=start,
            filter_expression=filter_,
            count=count,
            idle_s=idle_s,
            printer=MessagePrinter(output),
        ),
        tidy_up_s=TIDY_UP_S,
    )
