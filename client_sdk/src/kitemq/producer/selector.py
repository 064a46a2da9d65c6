"""Which queue a message goes to. Pure functions and plain state; the clock is passed in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from kitemq.message import Message, MessageQueue

QueueSelector = Callable[[Sequence[MessageQueue], Message], MessageQueue]

# RocketMQ 5's table: a send that took this long (ms) keeps its broker out for so long (ms).
_LATENCY_MS = (50, 100, 550, 1800, 3000, 5000, 15_000)
_UNAVAILABLE_MS = (0, 0, 2000, 5000, 6000, 10_000, 30_000)
FAILED_BROKER_MS = 10_000
JUST_FAILED_MS = 1_000


def select_by_key(queues: Sequence[MessageQueue], sharding_key: str) -> MessageQueue:
    """The key's queue: the same one as long as the list is the same."""
    return queues[zlib.crc32(sharding_key.encode()) % len(queues)]


def unavailable_ms(latency_ms: float) -> int:
    """How long a broker that took `latency_ms` is passed over."""
    for threshold, penalty in zip(reversed(_LATENCY_MS), reversed(_UNAVAILABLE_MS), strict=True):
        if latency_ms >= threshold:
            return penalty
    return 0


class BrokerFaults:
    """Brokers to pass over for a while. With `latency_enable`, slow ones too, as RocketMQ's sendLatencyFaultEnable."""

    def __init__(self, *, latency_enable: bool) -> None:
        self._latency_enable = latency_enable
        self._until_ms: dict[str, float] = {}

    def failed(self, broker_name: str, now_ms: float) -> None:
        penalty = FAILED_BROKER_MS if self._latency_enable else JUST_FAILED_MS
        self._extend(broker_name, now_ms + penalty)

    def answered(self, broker_name: str, latency_ms: float, now_ms: float) -> None:
        if self._latency_enable:
            penalty = unavailable_ms(latency_ms)
            if penalty:
                self._extend(broker_name, now_ms + penalty)

    def _extend(self, broker_name: str, until_ms: float) -> None:
        self._until_ms[broker_name] = max(until_ms, self._until_ms.get(broker_name, 0.0))

    def usable(self, broker_name: str, now_ms: float) -> bool:
        until = self._until_ms.get(broker_name)
        if until is None:
            return True
        if until <= now_ms:
            del self._until_ms[broker_name]
            return True
        return False

    def __bool__(self) -> bool:
        return bool(self._until_ms)


class RoundRobin:
    """Takes queues in turn, brokers alternating.

    Messages that wait at the same time share a queue up to `run_messages`, so that they travel and lie side by side;
    sends that are awaited one by one go to a new queue each.
    """

    run_messages = 16

    def __init__(self, queues: Sequence[MessageQueue], start: int) -> None:
        self.queues = sorted(queues, key=lambda queue: (queue.queue_id, queue.broker_name))
        self._next = start % len(self.queues) if self.queues else 0

    def next(self, usable: Callable[[str], bool] | None, *, avoid: str | None = None) -> MessageQueue:
        """The next in turn whose broker is usable and not `avoid`; else the next not `avoid`; else the next."""
        count = len(self.queues)
        fallback: MessageQueue | None = None
        if usable is not None or avoid is not None:
            for step in range(count):
                queue = self.queues[(self._next + step) % count]
                if queue.broker_name == avoid:
                    continue
                if usable is None or usable(queue.broker_name):
                    self._next = (self._next + step + 1) % count
                    return queue
                fallback = fallback or queue
        if fallback is not None:
            return fallback
        queue = self.queues[self._next]
        self._next = (self._next + 1) % count
        return queue
