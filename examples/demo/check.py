"""What the demo proves at the end: what was sent against what was handled."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Handled:
    """One delivery, as a consumer wrote it into its journal before it said that the message is done.

    at_ns: the machine's monotonic clock, which all processes share. line: number of the event in the file, from 1.
    """

    at_ns: int
    line: int
    queue: str
    queue_offset: int
    body: bytes

    def text(self) -> str:
        """A line of a journal."""
        body = base64.b64encode(self.body).decode()
        return json.dumps([self.at_ns, self.line, self.queue, self.queue_offset, body]) + "\n"

    @staticmethod
    def parse(text: str) -> Handled:
        """The delivery that a line of a journal tells of."""
        at_ns, line, queue, queue_offset, body = json.loads(text)
        return Handled(at_ns, line, queue, queue_offset, base64.b64decode(body))


@dataclass(slots=True)
class Verdict:
    """The comparison. Sums are SHA-256 in hex; handled_sum is that of the events put back into the file's order."""

    events: int = 0
    acknowledged: int = 0
    deliveries: int = 0
    handled: int = 0
    sent_sum: str = ""
    handled_sum: str = ""
    lost: list[int] = field(default_factory=list)
    strangers: int = 0
    queues: int = 0
    disordered: list[str] = field(default_factory=list)

    @property
    def repeated(self) -> int:
        """Deliveries of events that had been handled before."""
        return self.deliveries - self.handled - self.strangers

    @property
    def good(self) -> bool:
        """Every event was acknowledged, and handled as it is in the file, in order."""
        return (
            self.acknowledged == self.events == self.handled
            and self.sent_sum == self.handled_sum
            and not (self.lost or self.strangers or self.disordered)
        )


def read_events(path: Path) -> Iterator[bytes]:
    """The events of a file: its lines, each with its newline, so that even an empty one has a body."""
    with path.open("rb") as file:
        yield from file


def read_journals(paths: Iterable[Path]) -> list[Handled]:
    """All deliveries of all consumers, in the order in which they happened."""
    deliveries = [Handled.parse(line) for path in paths for line in path.read_text().splitlines()]
    return sorted(deliveries, key=lambda one: one.at_ns)


def compare(events: Iterable[bytes], acknowledged: int, deliveries: Iterable[Handled]) -> Verdict:
    """What became of the events. acknowledged: sends that the broker confirmed."""
    verdict = Verdict(acknowledged=acknowledged)
    first: dict[int, Handled] = {}
    last_offset: dict[str, int] = {}
    sent_sum, handled_sum = hashlib.sha256(), hashlib.sha256()
    for delivery in deliveries:
        verdict.deliveries += 1
        if delivery.line in first:
            continue
        first[delivery.line] = delivery
        if delivery.queue_offset <= last_offset.get(delivery.queue, -1):
            verdict.disordered.append(f"{delivery.queue} offset {delivery.queue_offset}")
        last_offset[delivery.queue] = delivery.queue_offset
    for number, event in enumerate(events, 1):
        verdict.events += 1
        sent_sum.update(event)
        handled = first.pop(number, None)
        if handled is None:
            verdict.lost.append(number)
            continue
        verdict.handled += 1
        handled_sum.update(handled.body)
    verdict.strangers = len(first)
    verdict.queues = len(last_offset)
    verdict.sent_sum, verdict.handled_sum = sent_sum.hexdigest(), handled_sum.hexdigest()
    return verdict
