"""From a verb to its exit code: the event loop, Ctrl-C, errors in words, a reader of stdout that has gone."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Coroutine
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from kitemq.cli.options import Connection
from kitemq.cli.output import note

if TYPE_CHECKING:
    from kitemq.admin import AdminClient
    from kitemq.errors import KiteMQError

T = TypeVar("T")


class ExitCode(IntEnum):
    """What the command exits with; stable. Documented in `kitemq --help`."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    INTERRUPTED = 130
    TERMINATED = 143


class Stopped(Exception):
    """A signal asked the verb to stop, and it has."""

    def __init__(self, exit_code: int) -> None:
        self.exit_code = exit_code


def run(verb: Coroutine[Any, Any, T], *, tidy_up_s: float | None = None) -> T:
    """The verb's result. Ends the command with the fitting exit code when it fails or is stopped.

    The first Ctrl-C (or SIGTERM) cancels the verb, which tidies up, for tidy_up_s at most; a second one leaves at once.
    """
    from kitemq.errors import KiteMQError

    logging.getLogger("kitemq").addHandler(_WarningsToStderr(logging.WARNING))
    try:
        result = asyncio.run(_stoppable(verb, tidy_up_s))
        sys.stdout.flush()
    except Stopped as stopped:
        raise typer.Exit(stopped.exit_code) from None
    except KiteMQError as error:
        note(f"Error: {error}")
        raise typer.Exit(exit_code_of(error)) from None
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). The interpreter must not try to flush the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.OK) from None
    return result


class _WarningsToStderr(logging.Handler):
    """What the SDK heals by itself or cannot heal, while it goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"Warning: {record.getMessage()}")


def exit_code_of(error: KiteMQError) -> ExitCode:
    """The exit code of a failed verb."""
    from kitemq import errors

    if isinstance(error, errors.BrokerUnavailableError | errors.RequestTimeoutError):
        return ExitCode.UNREACHABLE
    if isinstance(error, errors.NotFoundError):
        return ExitCode.NOT_FOUND
    if isinstance(error, errors.InvalidRequestError):
        return ExitCode.USAGE
    return ExitCode.FAILED


async def _stoppable(verb: Coroutine[Any, Any, T], tidy_up_s: float | None) -> T:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(verb)
    received: list[int] = []

    def leave(number: int) -> None:
        note("Stopped without an answer from the cluster.")
        os._exit(128 + number)

    def stop(number: int) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)
        logging.getLogger("kitemq").setLevel(logging.CRITICAL)  # what is given up now is no news
        task.cancel()
        if tidy_up_s is not None:
            loop.call_later(tidy_up_s, leave, number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if not received:
            raise
        raise Stopped(128 + received[0]) from None
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def with_admin(connection: Connection, verb: Callable[[AdminClient], Awaitable[T]]) -> T:
    """The verb's result, given an open AdminClient. Brokers that do not answer are named on stderr."""
    from kitemq.admin import AdminClient

    async def opened() -> T:
        async with AdminClient(connection.namesrv, tls=connection.tls_config(), on_unanswered=warn_unanswered) as admin:
            return await verb(admin)

    return run(opened())


def warn_unanswered(broker_name: str, error: KiteMQError) -> None:
    """Say that what follows is without one broker."""
    note(f"Warning: broker {broker_name} ({error.address}) does not answer: what it has is missing here")
