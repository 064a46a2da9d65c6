"""A process from its first signal handler to its exit code."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable

from kitemq_server.common.config import ConfigError
from kitemq_server.common.serving import ServeError

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
# As a shell reports a process that SIGINT ended.
EXIT_INTERRUPTED = 130


# A young collection for every so many new objects: what a burst of requests holds for a moment is not worth a look.
YOUNG_OBJECTS = 10_000

Service = Callable[[asyncio.Event], Awaitable[None]]


def run(service: Service, *, mendable: tuple[type[Exception], ...] = ()) -> int:
    """Run `service` until it returns, and say with which code the process should exit.

    service: gets an event that SIGTERM or SIGINT sets, upon which it stops cleanly. A second signal ends the process
    at once. An exception out of `service` is logged, with its traceback unless its text says to an operator what to do:
    ConfigError (exit code 2), ServeError, OSError and those in `mendable`.
    """
    return asyncio.run(_run(service, (ServeError, OSError, *mendable)))


def settle() -> None:
    """Once a service is up: what is there stays, so the garbage collector need not look at it again.

    A full collection over all that a broker has imported takes 25 to 75 ms, and every message waits for it.
    """
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS, 10, 10)


async def _run(service: Service, mendable: tuple[type[Exception], ...]) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(signum: signal.Signals) -> None:
        if stop.is_set():
            # Nothing that is still being written is acknowledged, so this is a crash that the next start recovers from.
            os._exit(EXIT_INTERRUPTED)
        logger.info("stopping signal=%s (again to stop at once)", signum.name)
        stop.set()

    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, on_signal, signum)
    try:
        await service(stop)
        logger.info("stopped")
    except Exception as error:
        return _report(error, mendable)
    finally:
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(signum)
    return EXIT_OK


def _report(error: Exception, mendable: tuple[type[Exception], ...]) -> int:
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, (ConfigError, *mendable)):
        # Without a file name the text says all there is, and "[Errno 98]" nothing.
        text = error.strerror if isinstance(error, OSError) and error.filename is None else None
        logger.error("%s", text or error)
        return EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED
    logger.error("failed", exc_info=error)
    return EXIT_FAILED
