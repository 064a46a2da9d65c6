"""`kitemq doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from kitemq.cli.options import Connection, NamesrvOption, OutputOption, connection
from kitemq.cli.output import Format, emit, emit_json
from kitemq.cli.session import ExitCode, run

if TYPE_CHECKING:
    from kitemq.cli.diagnosis import Diagnosis

app = typer.Typer(add_completion=False, rich_markup_mode=None)

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "broken": "red"}


@app.command(epilog="\b\nExample:\n  kitemq --namesrv 'ns-1:9876;ns-2:9876' doctor")
def doctor(context: typer.Context, output: OutputOption = Format.TABLE, namesrv: NamesrvOption = None) -> None:
    """Check everything that a client needs, from where you are.

    Resolves, dials and times every address that a client would be told: the namesrvs and each broker's addresses.
    Looks for names that do not resolve, addresses that cannot be reached, TLS mix-ups, missing masters, namesrvs that
    disagree, clocks more than a second apart, and full disks. Exits with 1 when something is broken.
    """
    diagnosis = run(_examine(connection(context, namesrv)))
    if output is Format.JSON:
        emit_json({"healthy": diagnosis.healthy, "findings": [asdict(one) for one in diagnosis.findings]})
    else:
        _show(diagnosis)
    raise typer.Exit(ExitCode.OK if diagnosis.healthy else ExitCode.FAILED)


async def _examine(where: Connection) -> Diagnosis:
    from kitemq.cli.diagnosis import diagnose
    from kitemq.rpc import Channels, parse_addresses

    tls = where.tls_config()
    channels = Channels(tls=tls)
    try:
        return await diagnose(parse_addresses(where.namesrv), channels, tls=tls is not None)
    finally:
        await channels.close()


def _show(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    on_terminal = sys.stdout.isatty()
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for one in diagnosis.findings:
        where = f"{one.subject} {one.address}".strip()
        took = f" ({one.took_ms:.1f} ms)" if one.took_ms is not None else ""
        table.add_row(Text(one.level, style=_STYLES[one.level]), Text(f"{where}: {one.text}{took}"))
        if one.advice:
            table.add_row("", Text(f"→ {one.advice}", style="dim"))
    console = Console(file=sys.stdout, highlight=False, width=None if on_terminal else 10_000)
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        emit(line.rstrip())
    emit("")
    levels = [str(one.level) for one in diagnosis.findings]
    broken, warnings = levels.count("broken"), levels.count("warning")
    emit(f"{broken} broken, {warnings} to look at." if broken or warnings else "All is well.")
