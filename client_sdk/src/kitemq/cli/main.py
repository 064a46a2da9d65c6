"""The root of the `kitemq` command: verbs, global options, usage errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from kitemq.cli.options import NAMESRV, Connection
from kitemq.cli.output import note
from kitemq.cli.session import ExitCode

# Verb -> module whose `app` is its typer app. A module is imported when its verb is used, or all for the list of verbs.
VERBS = {
    "topic": "kitemq.cli.topic",
    "group": "kitemq.cli.group",
    "cluster": "kitemq.cli.cluster",
    "broker": "kitemq.cli.broker",
    "produce": "kitemq.cli.produce",
    "consume": "kitemq.cli.consume",
    "tail": "kitemq.cli.tail",
    "message": "kitemq.cli.message",
    "doctor": "kitemq.cli.doctor",
    "bench": "kitemq.cli.bench",
}


class Verbs(TyperGroup):
    """Loads a verb's module when it is needed."""

    def list_commands(self, _context: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, context: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            for name in VERBS:  # for the suggestion in the error
                self.get_command(context, name)
            return None
        if cmd_name not in self.commands:
            command = get_command(import_module(VERBS[cmd_name]).app)
            command.name = cmd_name
            self.commands[cmd_name] = command
        return self.commands[cmd_name]


app = typer.Typer(
    name="kitemq",
    cls=Verbs,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

EPILOG = """
\b
Try it:
  kitemq topic create orders
  echo hello | kitemq produce orders
  kitemq tail orders -f

\b
Exit codes:
  0    done
  1    refused by the cluster, or failed in part; doctor: something is broken
  2    wrong usage, or a value that can never be right
  3    no such topic, group, broker or message
  4    a namesrv or broker cannot be reached, or does not answer in time
  130  stopped by Ctrl-C (143: by SIGTERM)
"""


def _version(wanted: bool) -> None:
    if wanted:
        from kitemq.version import VERSION

        sys.stdout.write(f"kitemq {VERSION}\n")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def root(
    context: typer.Context,
    namesrv: Annotated[
        str, typer.Option(envvar="KITEMQ_NAMESRV", metavar="HOST:PORT[;…]", help="Namesrvs to ask.")
    ] = NAMESRV,
    tls: Annotated[bool, typer.Option("--tls", envvar="KITEMQ_TLS", help="Speak TLS.")] = False,
    tls_ca: Annotated[
        str | None,
        typer.Option(envvar="KITEMQ_TLS_CA", metavar="FILE", help="Trust this CA (PEM) instead of the system's."),
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(envvar="KITEMQ_TLS_CERT", metavar="FILE", help="Client certificate (PEM).")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(envvar="KITEMQ_TLS_KEY", metavar="FILE", help="Its key (PEM).")] = None,
    tls_server_name: Annotated[
        str | None,
        typer.Option(envvar="KITEMQ_TLS_SERVER_NAME", metavar="NAME", help="Name in the server's certificate."),
    ] = None,
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """KiteMQ: topics, messages, consumer groups and brokers from the command line."""
    context.obj = Connection(namesrv, tls, tls_ca, tls_cert, tls_key, tls_server_name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    # What gRPC says of a connection that fails is in our own errors.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        outcome = get_command(app).main(args=arguments, prog_name="kitemq", standalone_mode=False)
    except typer.TyperException as error:
        note(usage_text(error))
        sys.exit(error.exit_code)
    except typer.Abort:
        note("Stopped: nothing was done.")
        sys.exit(ExitCode.FAILED)
    sys.exit(outcome if isinstance(outcome, int) else ExitCode.OK)


def usage_text(error: typer.TyperException) -> str:
    """A usage error in two lines; the whole help where no verb was given."""
    text = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None or text.startswith("Usage:"):
        return text
    text = " ".join(text.split())  # the values to choose from come a line each
    return f"Error: {text[:1].lower()}{text[1:].rstrip('.')}\nTry:   {context.command_path} --help"
