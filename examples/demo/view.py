"""What the demo shows while it runs: a live page on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PLAIN_S = 2.0
STEPS_SHOWN = 9


@dataclass(slots=True)
class Member:
    """A consumer process. queues: None = it is not there."""

    name: str
    queues: list[int] | None = None
    handled: int = 0


@dataclass(slots=True)
class State:
    """All that is shown. handled counts deliveries, so it may pass `events`."""

    title: str
    events: int
    began: float = field(default_factory=time.monotonic)
    sent: int = 0
    acknowledged: int = 0
    failed: int = 0
    broker: str = "starting"
    members: list[Member] = field(default_factory=list)
    steps: list[tuple[float, str]] = field(default_factory=list)

    @property
    def handled(self) -> int:
        """Deliveries over all consumers."""
        return sum(member.handled for member in self.members)

    @property
    def elapsed_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self.began


class View:
    """Shows a State: `with View(state) as view: view.step("the broker is serving")`."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.console = Console(highlight=False)
        self._live: Live | None = None
        self._printed = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._page, console=self.console, refresh_per_second=8)
            self._live.start(refresh=True)
        else:
            print(self.state.title, flush=True)
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _value: BaseException | None, _trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, text: str) -> None:
        """Something has happened."""
        self.state.steps.append((self.state.elapsed_s, text))
        if self._live is None:
            print(f"{self.state.elapsed_s:5.1f} s  {text}", flush=True)

    def tick(self) -> None:
        """Numbers have changed: without a terminal, a line now and then."""
        if self._live is None and time.monotonic() - self._printed >= PLAIN_S and self.state.sent:
            self._printed = time.monotonic()
            state = self.state
            shares = "  ".join(f"{member.name}: {_queues(member)}" for member in state.members)
            counts = f"acknowledged {state.acknowledged}, handled {state.handled}"
            print(f"{state.elapsed_s:5.1f} s  {counts}  queues {shares}", flush=True)

    def _page(self) -> RenderableType:
        state = self.state
        narrow = self.console.width < 100
        bars = Table.grid(padding=(0, 2))
        for name, value, style in (
            ("acknowledged", state.acknowledged, "cyan"),
            ("handled", state.handled, "green"),
        ):
            bar = ProgressBar(total=state.events, completed=value, width=30 if narrow else 60, complete_style=style)
            bars.add_row(name, bar, f"{value:,} of {state.events:,}")
        up = state.broker.startswith("serving")
        broker = Text.assemble("broker  ", (state.broker, "green" if up else "bold red"))
        members = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2))
        members.add_column("consumer")
        members.add_column("holds queues", min_width=22)
        members.add_column("handled", justify="right")
        for member in state.members:
            members.add_row(member.name, _queues(member), f"{member.handled:,}", style=_style(member))
        steps = [Text(f"{at:5.1f} s  {text}", overflow="ellipsis", no_wrap=True) for at, text in state.steps]
        title = Text.assemble((state.title, "bold"), (f"   {state.elapsed_s:.0f} s", "dim"))
        return Group(title, Text(), bars, Text(), broker, Text(), members, Text(), *steps[-STEPS_SHOWN:])


def _queues(member: Member) -> str:
    if member.queues is None:
        return "not in the group"
    return " ".join(map(str, member.queues)) or "none"


def _style(member: Member) -> str:
    return "" if member.queues is not None else "dim"
