"""Pulls that wait for messages: who waits for which queue.

An append for a queue that nobody waits for costs one look-up; a pull that waits costs memory and no CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kitemq_server.store.consume_queue import ConsumeQueue


class Waiter(Protocol):
    """Something that wants to read a queue as soon as there is more of it."""

    def wake(self) -> None:
        """Look again. Called once per hold; must not append, and only note that there is something to do."""


class Holds:
    """Waiters by queue. Owned by the event loop."""

    def __init__(self) -> None:
        self._waiting: dict[ConsumeQueue, set[Waiter]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, queue: ConsumeQueue, waiter: Waiter) -> None:
        """Wake `waiter` once, when the queue's confirmed end moves or the queue goes away."""
        waiters = self._waiting.get(queue)
        if waiters is None:
            self._waiting[queue] = {waiter}
            self._count += 1
        elif waiter not in waiters:
            waiters.add(waiter)
            self._count += 1

    def discard(self, queue: ConsumeQueue, waiter: Waiter) -> None:
        """Do not wake it; no error when it does not wait."""
        waiters = self._waiting.get(queue)
        if waiters is not None and waiter in waiters:
            waiters.discard(waiter)
            self._count -= 1
            if not waiters:
                del self._waiting[queue]

    def wake(self, queues: Sequence[ConsumeQueue]) -> None:
        """The confirmed ends of these queues have moved: the store's `confirmed_listener`."""
        waiting = self._waiting
        if waiting:
            for queue in queues:
                waiters = waiting.pop(queue, None)
                if waiters is not None:
                    self._count -= len(waiters)
                    for waiter in waiters:
                        waiter.wake()

    def wake_topic(self, topic: str) -> None:
        """The topic was changed or deleted: whoever waits for it must look."""
        self.wake([queue for queue in self._waiting if queue.topic == topic])

    def wake_all(self) -> None:
        """The broker is stopping, or its rights have changed."""
        self.wake(list(self._waiting))
