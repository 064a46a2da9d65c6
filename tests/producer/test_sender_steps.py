"""The sender step by step, in any interleaving of its writer, the wire, the broker and the clock, all of them played.

Nothing that may go is left without something that will wake the writer; order and once hold; all is answered at last.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import pytest

from kitemq.errors import (
    BrokerBusyError,
    BrokerUnavailableError,
    InvalidMessageError,
    KiteMQError,
    OutOfOrderError,
    RequestTimeoutError,
    error_to_stream,
)
from kitemq.message import MessageQueue
from kitemq.producer import sender as sender_module
from kitemq.producer.accumulator import ANY_QUEUE, Entry, QueueState
from kitemq.producer.sender import IN_FLIGHT_REQUESTS_MAX, BrokerSender, SenderSettings, Sends
from kitemq.proto.v1 import broker_pb2, message_pb2
from kitemq.protocol.record import length_delimited

BAD = b"bad"
DRAIN_S = 1.5  # back-offs included
MESSAGE_COUNTS = (1, 1, 1, 1, 2, 5, 600, 1024)
EXTRA_BYTES = (0, 0, 0, 70_000, 110_000)
PASSING_S = (0.0005, 0.003, 0.01, 0.05, 0.2, 1.0)
DEADLINES_S = (1e9,) * 9 + (0.3,)  # from now
FAULTS = (*(None,) * 8, BrokerBusyError("busy", retry_after_ms=30))


class Clock:
    """Time, and the part of an event loop that a sender uses."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def call_later(self, delay_s: float, callback: Callable[..., None], *arguments: Any) -> None:
        self._count += 1
        heapq.heappush(self.timers, (self.now + max(0.0, delay_s), self._count, callback, arguments))

    def pass_until(self, when: float) -> None:
        self.now = max(self.now, when)
        while self.timers and self.timers[0][0] <= self.now:
            _, _, callback, arguments = heapq.heappop(self.timers)
            callback(*arguments)


class Waiter:
    """The future of a writer that waits."""

    def __init__(self) -> None:
        self._done = False

    def done(self) -> bool:
        return self._done

    def set_result(self, _: None) -> None:
        assert not self._done
        self._done = True


class Outcomes(Sends):
    """What became of each entry: its offsets, or its error."""

    def __init__(self) -> None:
        self.of: dict[Entry, list[int] | KiteMQError] = {}

    def delivered(self, state: QueueState, entries: list[Entry], result: Any, elapsed_s: float) -> None:
        offsets = iter([run.first_queue_offset for run in result.offsets])
        for entry in entries:
            assert entry not in self.of
            self.of[entry] = [next(offsets) for _ in entry.parts]

    def failed(self, entry: Entry, error: KiteMQError) -> None:
        assert entry not in self.of
        self.of[entry] = error

    def move(self, entry: Entry, state: QueueState) -> bool:
        return False

    def broker_failed(self, broker_name: str, error: KiteMQError) -> None:
        pass


class Broker:
    """Stores each number once, in order; refuses what comes behind a refusal until `resume`."""

    def __init__(self) -> None:
        self.stored: dict[int, list[bytes]] = {}
        self.refused: set[int] = set()
        self._offsets: dict[int, dict[int, int]] = {}
        self._last: dict[int, int] = {}

    def take(self, batch: broker_pb2.QueueBatch, fault: KiteMQError | None) -> broker_pb2.BatchResult:
        queue_id = batch.queue_id
        if batch.resume:
            self.refused.discard(queue_id)
        messages = message_pb2.Segment.FromString(batch.records).records
        if any(message.body.startswith(BAD) for message in messages):
            fault = InvalidMessageError("bad")
        if queue_id in self.refused:
            fault = OutOfOrderError("resume first")
        if fault is not None:
            self.refused.add(queue_id)
            return broker_pb2.BatchResult(error=error_to_stream(fault))
        stored = self.stored.setdefault(queue_id, [])
        offsets = self._offsets.setdefault(queue_id, {})
        result = broker_pb2.BatchResult()
        for message in messages:
            number = message.sequence
            if number not in offsets:
                assert number > self._last.get(queue_id, 0), "overtaken by a later one"
                self._last[queue_id] = number
                offsets[number] = len(stored)
                stored.append(message.body)
            assert stored[offsets[number]] == message.body, "two messages with one number"
            result.offsets.add(first_queue_offset=offsets[number], count=1)
        return result


class Play:
    """One sender and its world."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.outcomes = Outcomes()
        self.broker = Broker()
        self.wire: deque[broker_pb2.SendRequest] = deque()
        self.replies: deque[broker_pb2.SendResult] = deque()
        self.entries: list[tuple[int, Entry, list[bytes]]] = []
        self._sent = 0
        monkeypatch.setattr(sender_module, "monotonic", lambda: self.clock.now)
        with monkeypatch.context() as patched:
            patched.setattr(asyncio, "get_running_loop", lambda: self.clock)
            self.sender = BrokerSender(
                "a",
                address_of=lambda name: None,
                channels=cast(Any, None),
                settings=SenderSettings(7, 1e9, 4, False),
                sends=self.outcomes,
            )

    def submit(self) -> None:
        queue = MessageQueue("t", "a", self.random.randrange(3))
        count = self.random.choice(MESSAGE_COUNTS)
        kind = BAD if self.random.random() < 0.03 else b""
        bodies = [kind + b"%d" % (self._sent + index) for index in range(count)]
        self._sent += count
        parts = [length_delimited(0x12, body) for body in bodies]
        size = sum(map(len, parts)) + self.random.choice(EXTRA_BYTES)
        deadline = self.clock.now + self.random.choice(DEADLINES_S)
        entry = Entry(parts, [""] * count, size, None, deadline, ANY_QUEUE, cast(Any, None))
        self.entries.append((queue.queue_id, entry, bodies))
        self.sender.submit(entry, self.sender.state(queue))

    def write(self) -> bool:
        sender = self.sender
        if sender._waiter is not None and not sender._waiter.done():
            return False
        sender._waiter = None
        data = sender._next_request()
        if data is None:
            sender._waiter = cast(Any, Waiter())
            return False
        self.wire.append(broker_pb2.SendRequest.FromString(data))
        return True

    def serve(self, fault: KiteMQError | None = None) -> bool:
        if not self.wire:
            return False
        request = self.wire.popleft()
        result = broker_pb2.SendResult(number=request.number)
        for batch in request.batches:
            result.batches.append(self.broker.take(batch, fault if self.random.random() < 0.6 else None))
        self.replies.append(result)
        return True

    def read(self) -> bool:
        if not self.replies:
            return False
        self.sender._answered(self.replies.popleft())
        if self.sender._ready:
            self.sender._wake()
        return True

    def break_stream(self) -> None:
        for _ in range(self.random.randrange(3)):
            self.serve()  # its reply is lost
        self.wire.clear()
        self.replies.clear()
        self.broker.refused.clear()
        self.sender._waiter = None
        self.sender._recover(BrokerUnavailableError("gone"))

    def check(self) -> None:
        sender = self.sender
        able = [state for state in sender._states.values() if state.pending and not state.blocked]
        assert all(state in sender._ready for state in able)
        if able and sender._waiter is not None and not sender._waiter.done():
            timer = any(callback == sender._timer_over for _, _, callback, _ in self.clock.timers)
            assert sender._requests and (timer or len(sender._requests) >= IN_FLIGHT_REQUESTS_MAX)
        under_way = [batch for request in sender._requests.values() for batch in request.batches]
        assert sender._in_flight_messages == sum(len(entry.parts) for _, entries in under_way for entry in entries)
        for state in sender._states.values():
            assert state.in_flight == sum(1 for other, _ in under_way if other is state)

    def step(self) -> None:
        what = self.random.choices(
            (
                self.submit,
                self.write,
                lambda: self.serve(self.random.choice(FAULTS)),
                self.read,
                lambda: self.clock.pass_until(self.clock.now + self.random.choice(PASSING_S)),
                self.break_stream,
            ),
            (35, 25, 15, 15, 7, 2),
        )
        what[0]()
        self.check()

    def drain(self) -> None:
        """From here on all is well."""
        started = self.clock.now
        while True:
            while self.write() or self.serve() or self.read():
                self.check()
            self.check()
            if len(self.outcomes.of) == len(self.entries):
                break
            self.clock.pass_until(self.clock.timers[0][0])
            assert self.clock.now - started < DRAIN_S

    def check_outcomes(self) -> None:
        ends: dict[int, int] = {}
        answered: set[bytes] = set()
        given_up: set[bytes] = set()  # may or may not be stored
        for queue_id, entry, bodies in self.entries:
            outcome = self.outcomes.of[entry]
            if isinstance(outcome, RequestTimeoutError):
                given_up.update(bodies)
                continue
            if isinstance(outcome, KiteMQError):
                assert bodies[0].startswith(BAD)
                continue
            assert outcome == list(range(outcome[0], outcome[0] + len(bodies)))
            assert outcome[0] >= ends.get(queue_id, 0)  # in the order of the sends
            ends[queue_id] = outcome[-1] + 1
            answered.update(bodies)
            assert self.broker.stored[queue_id][outcome[0] : outcome[-1] + 1] == bodies
        for stored in self.broker.stored.values():
            assert len(set(stored)) == len(stored)
            assert set(stored) <= answered | given_up


@pytest.mark.parametrize("seed", range(12))
def test_nothing_waits_for_ever_is_overtaken_or_stored_twice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play = Play(seed, monkeypatch)
    for _ in range(play.random.choice((60, 300, 600))):
        play.step()
    play.drain()
    play.check_outcomes()
