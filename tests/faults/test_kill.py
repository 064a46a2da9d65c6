"""Thirty times SIGKILL of a broker under retrying producers and rebalancing groups: nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path

import pytest

import kitemq
from kitemq import KiteMQError, Message, MessageQueue, Position, PullConsumer, PushConsumer, ReceivedMessage
from kitemq.admin import AdminClient
from tests.faults.processes import ServiceProcess
from tests.waiting import eventually

KILLS = 30
PRODUCERS = 4
QUEUES = 6
# What a broker has answered as committed is in the log within 5 s; sampling and the kill itself take some of it.
OFFSET_WINDOW_S = 6.5
TOPIC = "kill"


class History:
    """What was acknowledged, and what each group was handed, in order."""

    def __init__(self) -> None:
        self.acknowledged: dict[str, tuple[int, int]] = {}  # body -> queue id, queue offset
        self.handled: dict[str, Counter[str]] = defaultdict(Counter)
        self.first_deliveries: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        self.committed: dict[str, list[tuple[float, dict[int, int]]]] = defaultdict(list)
        self.kills: list[float] = []

    def deliver(self, group: str, message: ReceivedMessage) -> None:
        body = message.body.decode()
        if not self.handled[group][body]:
            self.first_deliveries[group][message.queue.queue_id].append(message.queue_offset)
        self.handled[group][body] += 1

    def keep(self, path: Path) -> None:
        path.write_text(json.dumps({key: value for key, value in vars(self).items()}, default=str))


async def produce(namesrv: str, name: str, history: History, stop: asyncio.Event) -> None:
    """One message after the other into each queue by turns, eight under way; each is known by its number."""
    async with kitemq.Producer(namesrv, group="producers", delivery_timeout_s=60.0) as producer:

        async def send(number: int) -> None:
            body = f"{name}:{number}"
            queue = MessageQueue(TOPIC, "broker", number % QUEUES)
            receipt = await producer.send(Message(TOPIC, body.encode()), queue=queue)
            history.acknowledged[body] = (receipt.queue.queue_id, receipt.queue_offset)

        number = 0
        async with asyncio.TaskGroup() as tasks:
            while not stop.is_set():
                for _ in range(8):
                    tasks.create_task(send(number))
                    number += 1
                await asyncio.sleep(0.04)


async def consume(namesrv: str, group: str, history: History, stop: asyncio.Event) -> None:
    def consumer() -> PushConsumer:
        return PushConsumer(namesrv, group=group, from_where=Position.FIRST, commit_interval_s=1.0)

    async def handle(message: ReceivedMessage) -> None:
        history.deliver(group, message)

    async with consumer() as member:
        await member.subscribe(TOPIC, handle)
        running = asyncio.create_task(member.run())
        await stop.wait()
        member.stop()
        await running


async def come_and_go(namesrv: str, group: str, history: History, stop: asyncio.Event, rng: random.Random) -> None:
    """A member that joins and leaves, so that queues change hands while the broker dies."""
    while not stop.is_set():
        leave = asyncio.Event()
        member = asyncio.create_task(consume(namesrv, group, history, leave))
        await asyncio.wait(
            {asyncio.create_task(stop.wait()), member}, timeout=rng.uniform(2.0, 5.0), return_when="FIRST_COMPLETED"
        )
        leave.set()
        await member


async def sample_offsets(admin: AdminClient, groups: list[str], history: History) -> None:
    for group in groups:
        try:
            described = await admin.describe_group(group)
        except KiteMQError:
            continue  # the broker is away
        offsets = {queue.queue.queue_id: queue.consumer_offset or 0 for queue in described.queues}
        history.committed[group].append((time.monotonic(), offsets))


async def kill_often(
    broker: ServiceProcess, admin: AdminClient, groups: list[str], history: History, rng: random.Random
) -> None:
    for _ in range(KILLS):
        life_s = rng.choice([0.3, 1.0, 2.0, 3.0]) * rng.uniform(0.5, 1.5)
        if rng.random() < 0.15:
            life_s = 8.0  # long enough for offsets that must come back
        until = time.monotonic() + life_s
        while time.monotonic() < until:
            await sample_offsets(admin, groups, history)
            await asyncio.sleep(min(0.25, max(0.0, until - time.monotonic())))
        await broker.kill()
        history.kills.append(time.monotonic())
        await broker.start()


async def read_log(namesrv: str) -> dict[int, list[ReceivedMessage]]:
    """All of every queue, in order."""
    log: dict[int, list[ReceivedMessage]] = {queue_id: [] for queue_id in range(QUEUES)}
    async with PullConsumer(namesrv, group="reader", auto_commit=False) as reader:
        queues = [MessageQueue(TOPIC, "broker", queue_id) for queue_id in range(QUEUES)]
        await reader.assign(queues)
        for queue in queues:
            await reader.seek(queue, 0)
        while messages := await reader.poll(1000, timeout_s=3.0):
            for message in messages:
                log[message.queue.queue_id].append(message.detach())
    return log


def check_log(history: History, log: dict[int, list[ReceivedMessage]]) -> None:
    places = defaultdict(list)
    for queue_id, messages in log.items():
        assert [message.queue_offset for message in messages] == list(range(len(messages))), "offsets are dense"
        last: dict[str, int] = defaultdict(lambda: -1)
        for message in messages:
            producer, _, number = message.body.decode().partition(":")
            assert int(number) > last[producer], f"queue {queue_id}: {producer} sent {number} before {last[producer]}"
            last[producer] = int(number)
            places[message.body.decode()].append((queue_id, message.queue_offset))
    lost = {body for body in history.acknowledged if body not in places}
    twice = {body: at for body, at in places.items() if len(at) > 1}
    moved = {body for body, at in history.acknowledged.items() if at[1] >= 0 and places.get(body) not in ([at], None)}
    assert (len(lost), len(twice), len(moved)) == (0, 0, 0), (
        sorted(lost)[:5],
        list(twice.items())[:5],
        sorted(moved)[:5],
    )


def check_groups(history: History, groups: list[str]) -> None:
    for group in groups:
        missing = set(history.acknowledged) - set(history.handled[group])
        assert not missing, f"{group} never saw {len(missing)} messages: {sorted(missing)[:5]}"
        for queue_id, offsets in history.first_deliveries[group].items():
            late = [(a, b) for a, b in pairwise(offsets) if b < a]
            assert not late, f"{group}, queue {queue_id}: first deliveries out of order {late[:5]}"


def check_offsets(history: History, groups: list[str]) -> None:
    """After a kill no offset is behind what that broker had answered as committed longer than the window before."""
    compared = 0
    for group in groups:
        samples = history.committed[group]
        for started, killed in pairwise([0.0, *history.kills]):
            settled = [offsets for at, offsets in samples if started < at < killed - OFFSET_WINDOW_S]
            after = next((offsets for at, offsets in samples if at > killed), None)
            if settled and after is not None:
                for queue_id, offset in settled[-1].items():
                    compared += 1
                    assert after.get(queue_id, 0) >= offset, f"{group}, queue {queue_id}: {after} behind {settled[-1]}"
    assert compared


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.timeout(420)
async def test_thirty_kills_lose_nothing_and_store_nothing_twice(tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED", "0")) or random.randrange(1 << 32)
    print(f"seed {seed}: SEED={seed} replays the moments of the kills")
    rng = random.Random(seed)
    history = History()
    groups = ["two-and-a-guest", "alone"]
    namesrv = ServiceProcess("namesrv", tmp_path / "namesrv")
    broker = ServiceProcess("broker", tmp_path / "broker", "--namesrv", namesrv.address, "--broker-name", "broker")
    stop_producing, stop_consuming = asyncio.Event(), asyncio.Event()
    try:
        await namesrv.start()
        await broker.start()
        async with AsyncExitStack() as stack:
            admin = await stack.enter_async_context(AdminClient(namesrv.address, timeout_s=2.0))
            await eventually(admin.list_brokers)
            await admin.create_topic(TOPIC, queue_count=QUEUES)
            async with asyncio.TaskGroup() as tasks:
                for group in (groups[0], groups[0], groups[1]):
                    tasks.create_task(consume(namesrv.address, group, history, stop_consuming))
                guest = tasks.create_task(
                    come_and_go(namesrv.address, groups[0], history, stop_producing, random.Random(seed + 1))
                )
                producing = [
                    tasks.create_task(produce(namesrv.address, f"p{number}", history, stop_producing))
                    for number in range(PRODUCERS)
                ]
                await kill_often(broker, admin, groups, history, rng)
                stop_producing.set()
                await asyncio.gather(guest, *producing)
                await eventually(
                    lambda: all(set(history.acknowledged) <= set(history.handled[group]) for group in groups),
                    timeout_s=90.0,
                )
                stop_consuming.set()
        log = await read_log(namesrv.address)
        check_log(history, log)
        check_groups(history, groups)
        check_offsets(history, groups)
        assert len(history.acknowledged) > 1000
    except BaseException:
        history.keep(tmp_path / "history.json")
        print(f"history: {tmp_path / 'history.json'}")
        raise
    finally:
        await broker.stop()
        await namesrv.stop()
