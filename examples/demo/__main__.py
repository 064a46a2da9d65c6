"""`make demo`: real events through a cluster that loses its broker on the way, and the proof that none is lost.

    python -m examples.demo [--file FILE] [--seconds SECONDS]

Starts a namesrv and a broker, a producer that sends every line of FILE, and two consumers of one group that share
them. A third consumer joins and leaves; the broker is killed with SIGKILL in the middle and started again. At the end
what was sent is compared with what was handled. Exits with 0 when everything is there, in order.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.demo.check import Verdict, compare, read_events, read_journals
from examples.demo.processes import Cluster, Process, program
from examples.demo.view import Member, State, View
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kitemq.admin import AdminClient
from kitemq.errors import KiteMQError
from kitemq.protocol.names import BODY_BYTES_MAX

EVENTS = Path(__file__).with_name("events.txt")
TOPIC = "events"
GROUP = "demo"
QUEUES = 8
# How long something that should happen may take before the demo gives up.
PATIENCE_S = 30.0
# When the third consumer joins and leaves, and when the broker is killed: parts of the sending time.
JOIN_AT, KILL_AT, LEAVE_AT = 0.2, 0.4, 0.85
DOWN_S = 1.0


class DemoError(Exception):
    """The demo cannot go on."""


class Demo:
    """One run."""

    def __init__(self, file: Path, seconds: float, folder: Path, view: View) -> None:
        self.file = file
        self.seconds = seconds
        self.folder = folder
        self.view = view
        self.state = view.state
        self.cluster = Cluster(folder)
        self.consumers: dict[str, Process] = {}
        self.producer: Process | None = None

    async def run(self) -> None:
        """The whole story, until everything is handled and every process has stopped."""
        try:
            await self._start()
            self.producer = await Process.start(
                "producer",
                program("producer", self.cluster.namesrv, TOPIC, str(self.file), str(self.seconds)),
                self.folder,
                self._producer_reports,
            )
            await self._until(lambda: self.state.acknowledged > 0, "the producer sends")
            self.view.step(f"the producer sends {self.state.events:,} events within {self.seconds:.0f} s")
            await self._until(lambda: self._sent_part() >= JOIN_AT, "a fifth is sent")
            await self._join("C")
            await self._shared("consumer C has joined")
            await self._until(lambda: self._sent_part() >= KILL_AT, "two fifths are sent")
            await self._lose_broker()
            await self._until(lambda: self._sent_part() >= LEAVE_AT, "most is sent")
            await self._leave("C")
            code = await self.producer.wait()
            if code:
                raise DemoError(f"the producer ended with {code}")
            self.view.step("the producer has finished: every event is acknowledged")
            await self._drain()
        finally:
            await self._stop()

    async def _start(self) -> None:
        await self.cluster.start()
        async with AdminClient(self.cluster.namesrv) as admin:
            await self._serving(admin)
            await admin.create_topic(TOPIC, queue_count=QUEUES)
        self.state.broker = "serving"
        self.view.step("namesrv and broker serve")
        await self._join("A")
        await self._join("B")
        await self._shared("consumers A and B have joined")

    async def _serving(self, admin: AdminClient) -> None:
        """Wait until the broker answers at the address that clients are told."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                await admin.describe_broker("demo")
                return
            except KiteMQError as error:
                if time.monotonic() > until:
                    raise DemoError(f"the broker does not serve: {error}") from None
            await asyncio.sleep(0.05)

    async def _join(self, name: str) -> None:
        member = next((one for one in self.state.members if one.name == name), None) or Member(name)
        if member not in self.state.members:
            self.state.members.append(member)

        def reports(report: dict[str, Any]) -> None:
            member.queues, member.handled = report["queues"], report["handled"]
            self.view.tick()

        self.consumers[name] = await Process.start(
            f"consumer-{name}",
            program("consumer", self.cluster.namesrv, TOPIC, GROUP, str(self._journal(name))),
            self.folder,
            reports,
        )

    async def _leave(self, name: str) -> None:
        code = await self.consumers.pop(name).stop()
        if code:
            raise DemoError(f"consumer {name} ended with {code}")
        next(one for one in self.state.members if one.name == name).queues = None
        await self._shared(f"consumer {name} has left")

    async def _shared(self, what: str) -> None:
        """Wait until every queue has one reader and no consumer has two queues more than another."""

        def balanced() -> bool:
            shares = [one.queues for one in self.state.members if one.name in self.consumers]
            counts = [len(queues or ()) for queues in shares]
            held = sorted(queue for queues in shares for queue in queues or ())
            return held == list(range(QUEUES)) and max(counts) - min(counts) <= 1

        began = time.monotonic()
        await self._until(balanced, "the queues are shared")
        members = [one for one in self.state.members if one.queues is not None]
        shares = ", ".join(f"{one.name} {len(one.queues or ())}" for one in members)
        self.view.step(f"{what}; {QUEUES} queues: {shares} (after {time.monotonic() - began:.1f} s)")

    async def _lose_broker(self) -> None:
        assert self.cluster.broker is not None
        self.cluster.broker.kill()
        code = await self.cluster.broker.wait()
        assert code == -signal.SIGKILL
        self.state.broker = "killed"
        self.view.step("the broker is killed with SIGKILL, in the middle of everything")
        await asyncio.sleep(DOWN_S)
        self.state.broker = "starting"
        began = time.monotonic()
        await self.cluster.start_broker()
        async with AdminClient(self.cluster.namesrv) as admin:
            await self._serving(admin)
        self.state.broker = "serving again"
        self.view.step(f"the broker serves again, {time.monotonic() - began:.1f} s after its start")

    async def _drain(self) -> None:
        await self._until(lambda: self.state.handled >= self.state.events, "everything is handled", strict=False)
        for name in list(self.consumers):
            process = self.consumers.pop(name)
            if await process.stop():
                raise DemoError(f"consumer {name} did not stop cleanly")
        self.view.step("the consumers have handled everything, and left")

    async def _stop(self) -> None:
        for process in (self.producer, *self.consumers.values()):
            if process is not None:
                await process.stop()
        await self.cluster.stop()

    # ---- watching ----

    def _producer_reports(self, report: dict[str, Any]) -> None:
        self.state.sent, self.state.acknowledged = report["sent"], report["acknowledged"]
        self.state.failed = report["failed"]
        self.view.tick()

    def _sent_part(self) -> float:
        return self.state.sent / self.state.events

    async def _until(self, happened: Callable[[], bool], what: str, *, strict: bool = True) -> None:
        """Wait for it. Raises DemoError when a process dies, or nothing at all has changed for PATIENCE_S."""
        progress, changed = self._progress(), time.monotonic()
        while not happened():
            await asyncio.sleep(0.05)
            dead = [one.name for one in self.consumers.values() if one.exit_code is not None]
            if self.producer is not None and self.producer.exit_code:
                dead.append("producer")
            if dead:
                raise DemoError(f"{dead[0]} has died")
            if self._progress() != progress:
                progress, changed = self._progress(), time.monotonic()
            elif time.monotonic() - changed > PATIENCE_S:
                if not strict:
                    return
                raise DemoError(f"nothing has moved for {PATIENCE_S:.0f} s while waiting until {what}")

    def _progress(self) -> tuple[object, ...]:
        return self.state.acknowledged, self.state.handled, [one.queues for one in self.state.members]

    # ---- the proof ----

    def _journal(self, name: str) -> Path:
        return self.folder / f"journal-{name}"

    def verdict(self) -> Verdict:
        """What was sent against what was handled."""
        journals = [self._journal(member.name) for member in self.state.members]
        return compare(read_events(self.file), self.state.acknowledged, read_journals(journals))


def show(console: Console, verdict: Verdict, elapsed_s: float) -> None:
    """The result, for people."""
    table = Table.grid(padding=(0, 2))

    def row(good: bool, name: str, text: str) -> None:
        table.add_row(Text("ok" if good else "FAILED", style="green" if good else "bold red"), name, text)

    row(
        verdict.acknowledged == verdict.events,
        "sent",
        f"{verdict.acknowledged:,} of {verdict.events:,} events acknowledged",
    )
    again = f"; {verdict.repeated:,} came more than once" if verdict.repeated else ""
    row(
        not verdict.lost and not verdict.strangers,
        "handled",
        f"{verdict.handled:,} events, lost {len(verdict.lost)}{again}",
    )
    row(
        verdict.sent_sum == verdict.handled_sum,
        "checksum",
        f"sha256 of the file              {verdict.sent_sum[:32]}…\n"
        f"of what was handled, in order   {verdict.handled_sum[:32]}…",
    )
    broken = f"{len(verdict.disordered)} out of order, first {verdict.disordered[0]}" if verdict.disordered else "kept"
    row(not verdict.disordered, "order", f"{broken} in each of {verdict.queues} queues (first deliveries)")
    console.print()
    console.print(table)
    outcome = "Nothing was lost" if verdict.good else "Something is wrong"
    console.print(Text(f"\n{outcome}, in {elapsed_s:.0f} s.", style="bold green" if verdict.good else "bold red"))


def count_events(file: Path) -> int:
    """The number of events. Raises DemoError for a file that cannot be sent."""
    events = 0
    for events, event in enumerate(read_events(file), 1):
        if len(event) > BODY_BYTES_MAX:
            raise DemoError(f"line {events} of {file} has {len(event)} bytes: a message holds {BODY_BYTES_MAX}")
    if not events:
        raise DemoError(f"{file} has no lines: there is nothing to send")
    return events


def cancel_on_signals() -> None:
    """The first Ctrl-C or SIGTERM cancels this task, which stops every process; more of them do nothing."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    stopping = False

    def stop() -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


async def run(file: Path, seconds: float) -> int:
    """Run the demo; the exit code."""
    try:
        events = count_events(file)
    except DemoError as error:
        print(error, file=sys.stderr)
        return 2
    cancel_on_signals()
    folder = Path(tempfile.mkdtemp(prefix="kitemq-demo-"))
    kept = True
    state = State(f"KiteMQ demo: {events:,} events of {file.name}", events)
    try:
        with View(state) as view:
            demo = Demo(file, seconds, folder, view)
            await demo.run()
        verdict = demo.verdict()
        show(view.console, verdict, state.elapsed_s)
        kept = not verdict.good
        return 0 if verdict.good else 1
    except asyncio.CancelledError:
        kept = False
        print("Stopped.", file=sys.stderr)
        return 130
    except DemoError as error:
        print(f"The demo failed: {error}.", file=sys.stderr)
        return 1
    finally:
        if kept:
            print(f"Logs and journals are kept in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make demo", description="The demo of KiteMQ.")
    parser.add_argument("--file", type=Path, default=EVENTS, help="a file whose lines are the events")
    parser.add_argument("--seconds", type=float, default=18.0, help="how long the sending takes (default 18)")
    arguments = parser.parse_args()
    if not arguments.file.is_file():
        parser.error(f"{arguments.file} is no file")
    sys.exit(asyncio.run(run(arguments.file.resolve(), arguments.seconds)))


if __name__ == "__main__":
    main()
