"""The `kitemq-server` command: one verb per service, and what an operator needs on the machine itself."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

if TYPE_CHECKING:
    from kitemq_server.common.config import ServiceConfig

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

EPILOG = """
\b
Try it:
  kitemq-server standalone
  kitemq-server standalone --ephemeral
  kitemq-server broker --config broker.toml --namesrv 10.0.0.1:9876,10.0.0.2:9876

\b
A service's settings come from, the strongest first:
  --key value, KITEMQ_<SERVICE>_<KEY> in the environment, the file of --config, the defaults

\b
Exit codes:
  0    stopped cleanly; health: serving
  1    failed while starting or running; health: not serving; store dump: damage was found
  2    wrong usage or configuration
  130  stopped at once: a second Ctrl-C, or one before the service was up
"""

_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Verbs(TyperGroup):
    """Imports a service when its verb is used, so that the others cost nothing."""

    def list_commands(self, _context: Any) -> list[str]:
        """In the order of the help."""
        return [*SERVICES, *super().list_commands(_context)]

    def get_command(self, context: Any, cmd_name: str) -> Any:
        """A service's command is made from its configuration model."""
        if cmd_name not in SERVICES:
            return super().get_command(context, cmd_name)
        if cmd_name not in self.commands:
            self.commands[cmd_name] = _service_command(cmd_name)
        return self.commands[cmd_name]


class ServiceCommand(TyperCommand):
    """Every setting is `--key value`; one that is true or false may also stand alone, and is true then."""

    switches: frozenset[str] = frozenset()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Spell out the switches that stand alone."""
        spelled: list[str] = []
        for position, argument in enumerate(args):
            following = args[position + 1] if position + 1 < len(args) else "-"
            spelled.append(argument)
            if argument in self.switches and following.startswith("-"):
                spelled.append("true")
        return super().parse_args(ctx, spelled)


app = typer.Typer(
    name="kitemq-server", cls=Verbs, rich_markup_mode=None, no_args_is_help=True, context_settings=_SETTINGS
)
store_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, context_settings=_SETTINGS)
app.add_typer(store_app, name="store", help="Look at a broker's data.")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        _print(f"kitemq-server {version('kitemq-server')}")
        raise typer.Exit


@app.callback(epilog=EPILOG)
def root(
    _version_wanted: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """KiteMQ's services: namesrv, broker, or both in one process."""


@app.command(epilog="\b\nExample:\n  kitemq-server health --address 127.0.0.1:9876")
def health(
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="A namesrv or broker.")] = "127.0.0.1:10911",
    service: Annotated[
        str, typer.Option(metavar="NAME", help="One service of it, as kitemq.v1.Broker; empty = all.")
    ] = "",
    tls_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Speak TLS, and trust this authority (PEM).")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Client certificate (PEM).")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its key (PEM).")] = None,
    timeout_s: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=60.0, help="How long to wait for the answer.")
    ] = 3.0,
) -> None:
    """Ask a service whether it serves: exit code 0 or 1."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from kitemq.errors import unreached_reason

    if (tls_cert is None) != (tls_key is None) or (tls_cert is not None and tls_ca is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together, and with --tls-ca")
    if tls_ca is None:
        channel = grpc.insecure_channel(address)
    else:
        try:
            ca, key, certificate = (path.read_bytes() if path else None for path in (tls_ca, tls_key, tls_cert))
        except OSError as error:
            raise typer.BadParameter(f"cannot read {error.filename}: {error.strerror}") from None
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca, key, certificate))
    with channel:
        try:
            request = health_pb2.HealthCheckRequest(service=service)
            status = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s).status
        except grpc.RpcError as error:
            details = error.details() or error.code().name
            reason = unreached_reason(details) if error.code() is grpc.StatusCode.UNAVAILABLE else details
            _fail(f"{address}: {reason}")
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    if status != health_pb2.HealthCheckResponse.SERVING:
        _fail(f"{address}: {name}")
    _print(name)


@store_app.command(epilog="\b\nExample:\n  kitemq-server store dump kitemq-data/broker | head")
def dump(
    path: Annotated[
        Path, typer.Argument(metavar="FILE|DIR", exists=True, help="A segment, or a broker's data folder.")
    ],
) -> None:
    """Print every record of a log, one JSON object a line.

    Damage is among them. The broker need not run.
    """
    from kitemq_server.store.dump import dump_segment

    damaged = False
    try:
        for segment in _segments(path):
            for line in dump_segment(segment):
                damaged = damaged or "damaged" in line
                _print(json.dumps(line, ensure_ascii=False))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        _fail(f"cannot read {error.filename or path}: {(error.strerror or str(error)).lower()}")
    except ValueError as error:
        _fail(str(error))
    if damaged:
        raise typer.Exit(EXIT_FAILED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and exit with its code."""
    # gRPC's own lines are no log lines of ours, and what they say is in ours.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        outcome = get_command(app).main(args=arguments, prog_name="kitemq-server", standalone_mode=False)
    except typer.TyperException as error:
        _note(_usage_text(error))
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(EXIT_INTERRUPTED)
    sys.exit(outcome if isinstance(outcome, int) else EXIT_OK)


# ---- services ----


def _namesrv() -> tuple[type[ServiceConfig], Callable[[Any], int]]:
    from kitemq_server.namesrv.config import NamesrvConfig

    def serve(config: NamesrvConfig) -> int:
        from kitemq_server.common.lifecycle import run, settle
        from kitemq_server.namesrv.server import run_namesrv

        async def service(stop: Any) -> None:
            async with run_namesrv(config) as namesrv:
                _serving("namesrv", config.listen, namesrv)
                settle()
                await stop.wait()

        return run(service)

    return NamesrvConfig, serve


def _broker() -> tuple[type[ServiceConfig], Callable[[Any], int]]:
    from kitemq_server.broker.config import BrokerConfig

    def serve(config: BrokerConfig) -> int:
        from kitemq_server.broker.server import StoreFailedError, run_broker
        from kitemq_server.common.lifecycle import run, settle
        from kitemq_server.store.errors import StoreOpenError

        async def service(stop: Any) -> None:
            async with run_broker(config) as broker:
                _serving("broker", config.listen, broker)
                settle()
                await stop.wait()

        return run(service, mendable=(StoreOpenError, StoreFailedError))

    return BrokerConfig, serve


def _standalone() -> tuple[type[ServiceConfig], Callable[[Any], int]]:
    from kitemq_server.standalone import StandaloneConfig

    def serve(config: StandaloneConfig) -> int:
        from kitemq_server.broker.server import StoreFailedError
        from kitemq_server.common.lifecycle import run, settle
        from kitemq_server.standalone import run_standalone
        from kitemq_server.store.errors import StoreOpenError

        async def service(stop: Any) -> None:
            async with run_standalone(config) as both:
                _serving("namesrv", config.namesrv_listen, both.namesrv)
                _serving("broker", config.listen, both.broker)
                where = "in memory" if config.ephemeral else f"in {config.data}"
                _print(f"KiteMQ is serving on {both.namesrv.address}, data {where}. Ctrl-C stops it.")
                sys.stdout.flush()
                settle()
                await stop.wait()

        return run(service, mendable=(StoreOpenError, StoreFailedError))

    return StandaloneConfig, serve


# Verb -> (what makes it, help, example).
SERVICES: dict[str, tuple[Callable[[], tuple[type[ServiceConfig], Callable[[Any], int]]], str, str]] = {
    "standalone": (
        _standalone,
        "Run namesrv and broker in one process, for a laptop or a test.\n\n"
        "What else the two can be told is read from KITEMQ_BROKER_<KEY> and KITEMQ_NAMESRV_<KEY> in the environment.",
        "kitemq-server standalone --data /var/lib/kitemq --flush-mode SYNC_FLUSH",
    ),
    "namesrv": (
        _namesrv,
        "Run a namesrv, which tells clients where the brokers are.",
        "kitemq-server namesrv --listen 0.0.0.0:9876",
    ),
    "broker": (
        _broker,
        "Run a broker, which stores and hands out messages.",
        "kitemq-server broker --broker-name broker-a --namesrv 10.0.0.1:9876 --advertise 10.0.0.5",
    ),
}


def _service_command(verb: str) -> Any:
    make, help_text, example = SERVICES[verb]
    model, serve = make()

    def command(**values: Any) -> None:
        config_file = values.pop("config")
        sys_exit = _start(model, serve, config_file, {key: text for key, text in values.items() if text is not None})
        raise typer.Exit(sys_exit)

    parameters = list(_parameters(model))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    one = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=_SETTINGS)
    one.command(verb, cls=ServiceCommand, help=help_text, epilog=f"\b\nExample:\n  {example}")(command)
    made: Any = get_command(one)
    made.switches = frozenset(_flag(key) for key, field in model.model_fields.items() if field.annotation is bool)
    return made


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _parameters(model: type[ServiceConfig]) -> Iterator[inspect.Parameter]:
    """--config, and a flag per key. All are texts: the model reads them as it reads the file and the environment."""
    from pydantic_core import PydanticUndefined

    from kitemq_server.common.config import value_text

    def parameter(name: str, kind: Any, flag: str, metavar: str, help_text: str) -> inspect.Parameter:
        annotation = Annotated[kind, typer.Option(flag, metavar=metavar, help=help_text, show_default=False)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)

    yield parameter("config", Path | None, "--config", "FILE", "TOML file with these keys")
    for key, field in model.model_fields.items():
        default = "" if field.default is PydanticUndefined else value_text(field.default)
        shown = f" [{default}]" if default else ""
        yield parameter(key, str | None, _flag(key), _metavar(field.annotation), f"{field.description}{shown}")


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    names = {bool: "[true|false]", int: "NUMBER", Path: "PATH", Path | None: "PATH"}
    return names.get(kind, "BYTES" if getattr(kind, "__name__", "") == "ByteSize" else "TEXT")


def _start(
    model: type[ServiceConfig], serve: Callable[[Any], int], config_file: Path | None, flags: dict[str, str]
) -> int:
    import logging

    from kitemq_server.common import logs
    from kitemq_server.common.config import ConfigError, load, unknown_environment

    try:
        config = load(model, config_file=config_file, flags=flags)
    except ConfigError as error:
        for line in str(error).splitlines():
            _note(f"Error: {line}")
        return EXIT_USAGE
    logs.configure(level=config.log_level, log_format=config.log_format)
    for part in (model, *config.parts):
        for name in unknown_environment(part):
            logging.getLogger(__name__).warning("no setting is called so, ignored variable=%s", name)
    return serve(config)


def _serving(name: str, listen: Sequence[Any], handle: Any) -> None:
    import logging

    from kitemq_server.common.addresses import join_address

    addresses = ",".join(
        f"{listener.name}={join_address(listener.host, handle.ports[listener.name])}" for listener in listen
    )
    logging.getLogger(__name__).info("%s serving listen=%s metrics_port=%s", name, addresses, handle.metrics_port)


# ---- output ----


def _segments(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    folder = path / "commitlog" if (path / "commitlog").is_dir() else path
    segments = sorted(entry for entry in folder.iterdir() if entry.name.isdigit())
    if not segments:
        raise ValueError(f"{path} holds no segments: name a segment, or a broker's data folder")
    return segments


def _usage_text(error: typer.TyperException) -> str:
    text = error.format_message()
    context = getattr(error, "ctx", None)
    if context is None or text.startswith("Usage:"):
        return text
    return f"Error: {text[:1].lower()}{text[1:].rstrip('.')}\nTry:   {context.command_path} --help"


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")


def _fail(text: str) -> Any:
    _note(f"Error: {text}")
    raise typer.Exit(EXIT_FAILED)
