"""A load generator's process: `python -m kitemq.bench.worker`.

The first line on standard input names the job and its options; every later line is an order, answered by one line on
standard output. The end of the input ends the process. Nothing else is on its event loop.
"""

from __future__ import annotations

import asyncio
import json
import selectors
import sys
import traceback
from contextlib import AbstractAsyncContextManager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

TIMER_SLACK = Path("/proc/self/timerslack_ns")


class Job(Protocol):
    """What an open job can do. `info`: what the parent needs to know before its first order."""

    info: dict[str, Any]

    async def run(self, order: dict[str, Any]) -> dict[str, Any]: ...


# Job -> where it is; imported when it is asked for, so that a process holds only what it needs.
JOBS = {
    "echo-server": ("kitemq.bench.baselines", "echo_server"),
    "echo-client": ("kitemq.bench.baselines", "echo_client"),
    "send": ("kitemq.bench.producing", "send_job"),
    "send-batch": ("kitemq.bench.producing", "send_batch_job"),
    "send-sync": ("kitemq.bench.producing", "send_sync_job"),
    "send-paced": ("kitemq.bench.producing", "send_paced_job"),
    "send-to-queues": ("kitemq.bench.producing", "send_to_queues_job"),
    "pull": ("kitemq.bench.consuming", "pull_job"),
    "push": ("kitemq.bench.consuming", "push_job"),
    "push-latency": ("kitemq.bench.consuming", "push_latency_job"),
    "holding": ("kitemq.bench.holding", "holding_job"),
}


def open_job(name: str, options: dict[str, Any]) -> AbstractAsyncContextManager[Job]:
    """The job of that name, to be used as `async with`."""
    module, function = JOBS[name]
    opened: AbstractAsyncContextManager[Job] = getattr(import_module(module), function)(**options)
    return opened


def _reply(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


async def serve_orders() -> None:
    """Do the job that standard input asks for, until the input ends."""
    orders = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    try:
        first = json.loads(await orders.readline())
        async with open_job(first["job"], first["options"]) as job:
            _reply(job.info)
            async for line in orders:
                _reply(await job.run(json.loads(line)))
    except Exception as error:
        traceback.print_exc()
        _reply({"error": f"{type(error).__name__}: {error}"})


def main() -> None:
    """Serve the orders on standard input."""
    with suppress(OSError):  # the kernel may wake a sleeper 50 us late
        TIMER_SLACK.write_text("1")
    # select() waits to the microsecond, epoll to the millisecond: a paced sender needs the former. There is one
    # descriptor to wait for whatever the number of connections, because gRPC polls those in a thread of its own.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(serve_orders())


if __name__ == "__main__":
    main()
