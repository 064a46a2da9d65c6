"""Sends every line of a file as an event, spread over some seconds. One of the processes of the demo.

    python -m examples.demo.producer NAMESRV TOPIC FILE SECONDS

Prints a JSON line ten times a second: how many are sent, how many the broker has confirmed, how many have failed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from examples.demo.check import read_events

import kitemq

REPORT_S = 0.1
UNDER_WAY_MAX = 4096


class Sending:
    """The sends of one run, paced so that all of them take `seconds`."""

    def __init__(self, producer: kitemq.Producer, topic: str) -> None:
        self.producer = producer
        self.topic = topic
        self.sent = 0
        self.acknowledged = 0
        self.failed = 0
        self.room = asyncio.Semaphore(UNDER_WAY_MAX)

    async def run(self, file: Path, seconds: float) -> None:
        """Send the file's lines and wait for all answers."""
        count = sum(1 for _ in read_events(file))
        began = time.monotonic()
        async with asyncio.TaskGroup() as sends:
            for number, event in enumerate(read_events(file), 1):
                early_s = began + number * seconds / count - time.monotonic()
                if early_s > 0.005:
                    await asyncio.sleep(early_s)
                await self.room.acquire()
                self.sent += 1
                sends.create_task(self.send(number, event))

    async def send(self, number: int, event: bytes) -> None:
        """Send one event. The SDK tries again by itself, and never stores it twice."""
        try:
            await self.producer.send(kitemq.Message(self.topic, event, properties={"line": str(number)}))
            self.acknowledged += 1
        except kitemq.KiteMQError as error:
            self.failed += 1
            print(f"event {number}: {error}", file=sys.stderr, flush=True)
        finally:
            self.room.release()

    async def report_forever(self) -> None:
        """Say how far we are."""
        while True:
            self.report()
            await asyncio.sleep(REPORT_S)

    def report(self) -> None:
        """One line."""
        print(json.dumps({"sent": self.sent, "acknowledged": self.acknowledged, "failed": self.failed}), flush=True)


async def main(namesrv: str, topic: str, file: str, seconds: str) -> None:
    """Send the file."""
    async with kitemq.Producer(namesrv, group="demo-producer") as producer:
        sending = Sending(producer, topic)
        reporter = asyncio.create_task(sending.report_forever())
        await sending.run(Path(file), float(seconds))
        reporter.cancel()
        sending.report()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
