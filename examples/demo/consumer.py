"""A member of the group that shares the events. One of the processes of the demo.

    python -m examples.demo.consumer NAMESRV TOPIC GROUP JOURNAL

Writes each delivery into its journal before it says that the message is done: the journals are the proof at the end.
Prints a JSON line ten times a second: which queues it holds, how many messages it has handled. SIGTERM: leaves cleanly.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from pathlib import Path
from typing import TextIO

from examples.demo.check import Handled

import kitemq

REPORT_S = 0.1


class Consumer:
    """Counts and notes down what it handles."""

    def __init__(self, journal: TextIO) -> None:
        self.journal = journal
        self.handled = 0
        self.stop = asyncio.Event()

    async def handle(self, message: kitemq.ReceivedMessage) -> None:
        """What a program would do with an event. To return is to say that it is done."""
        line = int(message.properties["line"])
        queue = f"{message.queue.broker_name}:{message.queue.queue_id}"
        delivery = Handled(time.monotonic_ns(), line, queue, message.queue_offset, message.body)
        self.journal.write(delivery.text())
        self.handled += 1

    async def run(self, namesrv: str, topic: str, group: str) -> None:
        """Handle messages until `stop` is set."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self.stop.set)
        async with kitemq.PushConsumer(namesrv, group=group, from_where=kitemq.Position.FIRST) as consumer:
            await consumer.subscribe(topic, self.handle)
            running = asyncio.create_task(consumer.run())
            while not self.stop.is_set():
                self.report([queue.queue_id for queue in consumer.held_queues()])
                await asyncio.sleep(REPORT_S)
            consumer.stop()
            await running
        self.report([])

    def report(self, queues: list[int]) -> None:
        """One line."""
        print(json.dumps({"queues": queues, "handled": self.handled}), flush=True)


if __name__ == "__main__":
    *where, journal_path = sys.argv[1:]
    with Path(journal_path).open("w", buffering=1) as journal_file:
        asyncio.run(Consumer(journal_file).run(*where))
