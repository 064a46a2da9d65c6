"""`kitemq bench …`: load on a cluster, and the project's own measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kitemq.cli.completion import complete_topic
from kitemq.cli.options import NamesrvOption, OutputOption, connection, parse_span_option
from kitemq.cli.output import Format, emit, emit_json, emit_table, note
from kitemq.cli.session import ExitCode, run

if TYPE_CHECKING:
    from kitemq.bench.harness import Harness
    from kitemq.bench.histogram import Latency
    from kitemq.bench.live import Figures, Report, Target
    from kitemq.bench.rows import Row

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)

TopicArgument = Annotated[str, typer.Argument(metavar="TOPIC", autocompletion=complete_topic)]
DurationOption = Annotated[str, typer.Option("--duration", "-d", metavar="SPAN", help="How long, as 30s or 5m.")]
BodyOption = Annotated[int, typer.Option("--body-bytes", "-b", min=1, max=4 * 1024 * 1024, help="Size of a body.")]
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows to FILE.")]
DataOption = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="Where the brokers keep their data; removed afterwards.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Exit with 1 when a bar is short.")]
OnlyOption = Annotated[list[str] | None, typer.Option("--only", metavar="CASE", help="This case; may be repeated.")]


# Above this much work of other programs the figures are not the product's.
OTHER_CORES_MAX = 0.2


@app.callback()
def group() -> None:
    """Load a cluster and see what it does; measure KiteMQ itself."""


@app.command(epilog="\b\nExample:\n  kitemq bench produce orders --rate 5000 --duration 30s")
def produce(
    context: typer.Context,
    topic: TopicArgument,
    rate: Annotated[
        float, typer.Option("--rate", "-r", min=0, help="Messages per second; 0 = as fast as it goes.")
    ] = 0,
    in_flight: Annotated[
        int, typer.Option("--in-flight", min=1, max=10_000, help="Without --rate: sends that wait at a time.")
    ] = 64,
    batch: Annotated[int, typer.Option("--batch", min=1, max=1024, help="Messages per send.")] = 1,
    body_bytes: BodyOption = 1024,
    duration: DurationOption = "10s",
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Send random bodies to TOPIC and report rates and latencies.

    With --rate a latency counts from when the message was due, so a stall shows with all that it held up.
    """
    from kitemq.bench import live

    seconds = _seconds(duration)
    _report(
        context,
        namesrv,
        topic,
        output,
        lambda target, report: live.produce(
            target, report, seconds=seconds, rate=rate, in_flight=in_flight, batch=batch, body_bytes=body_bytes
        ),
        publishes=True,
        consumes=False,
    )


@app.command(epilog="\b\nExample:\n  kitemq bench consume orders --from-first --duration 1m")
def consume(
    context: typer.Context,
    topic: TopicArgument,
    consumer_group: Annotated[
        str | None, typer.Option("--group", "-g", metavar="GROUP", help="Consumer group to join; default: a new one.")
    ] = None,
    from_first: Annotated[
        bool, typer.Option("--from-first", help="A new group begins with the oldest message.")
    ] = False,
    duration: DurationOption = "10s",
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Handle what is in TOPIC; report the rate and the age.

    Joins the group, takes its messages and commits. The age is by the clocks of both machines, in whole milliseconds.
    """
    from kitemq.bench import consuming, live

    seconds = _seconds(duration)
    joined = consumer_group or consuming.new_group("consume")
    _report(
        context,
        namesrv,
        topic,
        output,
        lambda target, report: live.consume(target, report, group=joined, seconds=seconds, from_first=from_first),
        publishes=False,
        consumes=True,
    )


@app.command(epilog="\b\nExample:\n  kitemq bench latency orders --rate 1000 --duration 30s")
def latency(
    context: typer.Context,
    topic: TopicArgument,
    rate: Annotated[float, typer.Option("--rate", "-r", min=0.1, help="Messages per second.")] = 1000,
    body_bytes: Annotated[
        int, typer.Option("--body-bytes", "-b", min=16, max=4 * 1024 * 1024, help="Size of a body.")
    ] = 1024,
    duration: DurationOption = "10s",
    output: OutputOption = Format.TABLE,
    namesrv: NamesrvOption = None,
) -> None:
    """Send at a fixed rate, handle the same; report the times.

    How long until a message is stored, and until it is handled. Both count from when a message was due, so a stall
    shows with all that it held up.
    """
    from kitemq.bench import live

    seconds = _seconds(duration)
    _report(
        context,
        namesrv,
        topic,
        output,
        lambda target, report: live.latency(target, report, seconds=seconds, rate=rate, body_bytes=body_bytes),
        publishes=True,
        consumes=True,
    )


@app.command(epilog="\b\nExample:\n  kitemq bench suite --json rows.json --only send --only drain")
def suite(
    json_file: JsonOption = None,
    data: DataOption = Path(),
    strict: StrictOption = False,
    only: OnlyOption = None,
) -> None:
    """Measure KiteMQ on this machine against bare gRPC.

    Case by case, in some 7 minutes. Starts its own servers and load generators (needs kitemq-server, Linux and 12 GB
    of disk). Exits with 1 when a case could not be measured.
    """
    from kitemq.bench import suite as cases

    _measure(cases.CASES, cases.FREE_BYTES_WANTED, json_file, data, strict, only or ())


@app.command(epilog="\b\nExample:\n  kitemq bench growth --json growth.json")
def growth(
    json_file: JsonOption = None,
    data: DataOption = Path(),
    strict: StrictOption = False,
    only: OnlyOption = None,
) -> None:
    """Measure KiteMQ with a big log, many queues and many clients.

    As `suite`, and needs 30 GB of disk and some 15 minutes.
    """
    from kitemq.bench import growth as cases

    _measure(cases.CASES, cases.FREE_BYTES_WANTED, json_file, data, strict, only or ())


# ---- load on a cluster of the user's ----


def _seconds(duration: str) -> float:
    seconds = parse_span_option("--duration", duration)
    assert seconds is not None
    return seconds


def _report(
    context: typer.Context,
    namesrv: str | None,
    topic: str,
    output: Format,
    load: Callable[[Target, Report], Coroutine[Any, Any, None]],
    *,
    publishes: bool,
    consumes: bool,
) -> None:
    from kitemq.bench.live import Report, Target

    where = connection(context, namesrv)
    target = Target(where.namesrv, topic, where.tls_config())

    def line(figures: Figures, name: str) -> None:
        if publishes:
            _line(name, "pub", figures.publish_rate, figures, figures.publish, f"{figures.publish_errors} errors")
        if consumes:
            _line(name, "cons", figures.consume_rate, figures, figures.end_to_end, "")

    report = Report(lambda figures: line(figures, f"{figures.at_s:.0f} s") if output is Format.TABLE else None)
    try:
        run(load(target, report))
    finally:  # also of what Ctrl-C cut short
        if report.load.last_error:
            note(f"Last error: {report.load.last_error}")
        if output is Format.JSON:
            emit_json(report.to_json())
        elif report.seconds:
            line(report.total(), "total")


def _line(name: str, what: str, rate: float, figures: Figures, latency_: Latency, errors: str) -> None:
    megabytes = figures.body_bytes / figures.seconds / 1e6
    shown = "  ".join(
        f"{label} {value:.3g}"
        for label, value in zip(("avg", "50%", "75%", "95%", "99%", "99.9%", "max"), latency_, strict=True)
    )
    emit(f"{name:>7}  {what:<4} {rate:>11,.1f} msg/s {megabytes:>8.1f} MB/s  latency ms: {shown}  {errors}".rstrip())


# ---- the project's own measurements ----


def _measure(
    cases: dict[str, Callable[[Harness], list[Row]]],
    free_bytes_wanted: int,
    json_file: Path | None,
    data: Path,
    strict: bool,
    only: Sequence[str],
) -> None:
    from kitemq.bench.harness import Settings, open_harness, run_cases
    from kitemq.bench.process import BenchError, ended_by_signals
    from kitemq.bench.rows import all_pass

    try:
        with (
            ended_by_signals(),
            open_harness(Settings(), data=data, say=note, free_bytes_wanted=free_bytes_wanted) as harness,
        ):
            rows = run_cases(cases, harness, only=only)
    except KeyboardInterrupt:
        note("Stopped; every process has been ended and its data removed.")
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except BenchError as error:
        note(f"Error: {error}")
        raise typer.Exit(ExitCode.FAILED) from None
    _show(rows)
    if json_file is not None:
        json_file.write_text(json.dumps([row.to_json() for row in rows], indent=2, ensure_ascii=False) + "\n")
    if not all(row.measured for row in rows) or (strict and not all_pass(rows)):
        raise typer.Exit(ExitCode.FAILED)


def _show(rows: Sequence[Row]) -> None:
    from kitemq.bench.rows import spread_percent

    emit_table(
        ["case", "figure#", "", "spread#", "baseline#", "", "spread#", "ratio#", "bar", "verdict"],
        (
            (
                row.case,
                _number(row.figure),
                row.unit,
                _spread(spread_percent(row.runs)),
                _number(row.baseline_figure),
                row.baseline,
                _spread(spread_percent(row.baseline_runs)),
                _number(row.ratio),
                row.bar.text,
                row.verdict.value,
            )
            for row in rows
        ),
    )
    emit("")
    emit_table(
        ["costs of", "process", "CPU s per million#", "MB written per million#", "memory MB at the end#"],
        (
            (
                row.case,
                cost.process,
                _number(cost.cpu_s_per_million),
                _number(cost.written_bytes_per_million / 1e6),
                _number(cost.memory_bytes / 1e6),
            )
            for row in rows
            for cost in row.costs
        ),
    )
    for row in rows:
        if row.other_cores > OTHER_CORES_MAX:
            note(f"Warning: {row.case}: other programs took {row.other_cores:.1f} cores meanwhile, so this says little")
        if row.notes:
            emit(f"{row.case}: {', '.join(f'{name} {_number(value)}' for name, value in row.notes.items())}")


def _number(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spread(percent: float) -> str:
    return f"±{percent / 2:.0f}%" if percent else ""
