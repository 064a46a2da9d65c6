"""Random histories of one store: what clients do, what the machine does to it, and the checks after each restart.

A history is a list of steps, each with a seed of its own, so that steps can be left out without changing the others:
that is how a failing one is made small.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kitemq.errors import BrokerBusyError, BrokerUnavailableError, StoreFullError
from kitemq.proto.v1 import message_pb2
from kitemq_server.store.batch import OffsetRun
from kitemq_server.store.config import FlushMode, StoreConfig
from kitemq_server.store.message_store import MessageStore, open_store
from tests.crash import checks
from tests.crash.crash_buckets import CrashBuckets
from tests.crash.crash_disk import CrashDisk
from tests.crash.fault_plan import PowerLossError
from tests.crash.model import UNKNOWN, Model, StoredMessage
from tests.crash.producers import Producer, Sent

ROOT = Path("/store")
TOPICS = ("orders", "audit")
QUEUE_COUNT = 2
GROUPS = ("billing", "shipping")
CONFIRM_TIMEOUT_S = 30.0
NEVER_MS = 10**9
FIRST_TIME_MS = 1_700_000_000_000
LATE_S = 10.0**6  # later than everything that waits for its time


class Step(NamedTuple):
    """One thing that happens."""

    name: str
    seed: int

    def __str__(self) -> str:
        return f"{self.name}:{self.seed}"


# How often each step comes, per hundred or so.
WEIGHTS = {
    "send": 30,
    "send again": 6,
    "change": 6,
    "commit": 8,
    "wait": 10,
    "read": 5,
    "tick": 6,
    "snapshot": 7,
    "settle": 6,
    "retain": 3,
    "power off soon": 3,
    "fail a sync": 2,
    "crash": 7,
    "kill": 5,
    "stop": 3,
}


def plan(seed: int) -> list[Step]:
    """The steps of history `seed`."""
    rng = random.Random(seed)
    names = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=rng.randint(5, 60))
    return [Step(name, rng.getrandbits(32)) for name in names]


class History:
    """Runs the steps of one history."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.sync = rng.random() < 0.5
        self.equal = rng.random() < 0.5
        self.config = StoreConfig(
            flush_mode=FlushMode.SYNC_FLUSH if self.sync else FlushMode.ASYNC_FLUSH,
            flush_interval_ms=NEVER_MS,
            segment_bytes=rng.choice((4096, 8192, 65536)),
            allocate_bytes=rng.choice((512, 4096)),
            reserve_bytes=rng.choice((0, 2048)),
            record_bytes_max=2048,
            slow_disk_ms=rng.choice((0, 60_000, 60_000)),
            queue_file_entries=rng.choice((3, 1000)),
            open_files_max=rng.choice((1, 16)),
            snapshot_records=NEVER_MS,
            snapshot_interval_ms=NEVER_MS,
            retention_hours=0,
            disk_watermark_percent=0,
            scrub_bytes_per_s=0,
        )
        self.disk = CrashDisk(ROOT, rng=rng)
        self.buckets = CrashBuckets(self.disk.faults)
        self.short_writes = rng.random() < 0.3
        self.model = Model()
        self.producers = [Producer(0), Producer(0xA1), Producer(0xB2)]
        self.stack = AsyncExitStack()
        self.store: MessageStore | None = None
        self.now_ms = FIRST_TIME_MS
        self.late_s = LATE_S
        self.flushed_offset = 0
        self.epoch = 0
        self.steps: dict[str, Callable[[random.Random], object]] = {
            "send": self.send,
            "send again": self.send_again,
            "change": self.change,
            "commit": self.commit,
            "read": self.read,
            "tick": self.tick,
            "snapshot": self.snapshot,
            "power off soon": self.power_off_soon,
            "fail a sync": self.fail_a_sync,
        }

    def clock_ms(self) -> int:
        """The store's wall clock: mostly forwards."""
        self.now_ms += random.Random(self.now_ms).choice((0, 1, 50, 1000, -3000))
        return self.now_ms

    # ---- running

    async def run(self, steps: list[Step]) -> None:
        """Runs all steps, then the last checks."""
        await self.open()
        self.epoch = self.opened.epoch
        for step in steps:
            rng = random.Random(step.seed)
            try:
                await self.take(step.name, rng)
            except (BrokerUnavailableError, PowerLossError):
                await self.restart(rng, how="crash" if self.disk.faults.dead else "kill")
        await self.end(random.Random(self.seed))

    async def end(self, rng: random.Random) -> None:
        """The last checks, on the store as it is and after a restart."""
        with suppress(BrokerUnavailableError, PowerLossError):
            await self.check_against_rebuilt()
        await self.restart(rng, how=rng.choice(("stop", "crash", "kill")))
        self.disk.faults.clear()
        await self.check_against_rebuilt()
        await self.close()

    async def take(self, name: str, rng: random.Random) -> None:
        """One step."""
        match name:
            case "wait":
                await self.wait(rng)
            case "settle":
                await self.settle(self.opened)
                checks.check_log(self.opened, self.disk)
            case "retain":
                await self.retain(rng)
            case "crash" | "kill" | "stop":
                await self.restart(rng, how=name)
            case _:
                self.steps[name](rng)
                for _turn in range(rng.choice((0, 0, 1, 3))):
                    await asyncio.sleep(0)

    @property
    def opened(self) -> MessageStore:
        """The store, which is open."""
        assert self.store is not None
        return self.store

    # ---- what clients do

    def send(self, rng: random.Random) -> None:
        """One append of new messages to one or more queues."""
        batches: list[Sent] = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            queue = (rng.choice(TOPICS), rng.randrange(QUEUE_COUNT))
            producer = rng.choice(self.producers)
            if all(other.batch.topic != queue[0] or other.batch.queue_id != queue[1] for other in batches):
                batches.append(producer.batch(queue, rng.choice((1, 1, 2, 5)), rng, equal=self.equal))
        self.append(batches)

    def send_again(self, rng: random.Random) -> None:
        """A repeat, as a client sends it whose answer was lost: of one batch, settled or not."""
        producer = rng.choice(self.producers)
        # A sequence that has been overtaken by a lost one is never sent again: a client keeps the order of a queue.
        unsettled = {sent.queue for sent in producer.unsettled()}
        candidates = [sent for sent in producer.sent if sent.queue not in unsettled]
        if candidates:
            self.append([rng.choice(candidates)])

    def append(self, batches: list[Sent]) -> None:
        """Hands batches to the store, and what becomes of them to the model."""
        start_offset = self.opened._log.end_offset
        before = [[self.stored_at(sent, identity) for identity in sent.identities()] for sent in batches]
        try:
            receipt = self.opened.append([sent.batch for sent in batches])
        except (StoreFullError, BrokerBusyError):
            return
        except BrokerUnavailableError:
            # Stored, or not, or in part: the next start tells.
            for sent in batches:
                self.add_to_model(sent, start_offset, UNKNOWN)
            raise
        assert receipt.end_offset <= self.opened._log.end_offset
        for sent, known, runs in zip(batches, before, receipt.runs, strict=True):
            sent.end_offset = receipt.end_offset
            self.add_to_model(sent, start_offset, self.opened._log.end_offset)
            self.check_runs(sent, known, runs)

    def stored_at(self, sent: Sent, identity: tuple[int, int] | str) -> int | None:
        """Queue offset of the first copy."""
        return self.model.queue_offset(sent.queue, identity)

    def add_to_model(self, sent: Sent, start_offset: int, end_offset: int) -> None:
        """Messages of the batch that are not stored yet."""
        for identity, part in zip(sent.identities(), sent.batch.parts, strict=True):
            if self.stored_at(sent, identity) is None:
                self.model.add(StoredMessage(sent.queue, identity, bytes(part)), start_offset, end_offset)

    def check_runs(self, sent: Sent, known: list[int | None], runs: list[OffsetRun]) -> None:
        """The receipt names every message's offset, and says which are repeats. known: offsets before the append."""
        told = []
        for run in runs:
            assert not run.unknown
            assert run.queue_id == sent.batch.queue_id
            told += [(run.first_queue_offset + index, run.repeated) for index in range(run.count)]
        wanted = [
            (self.stored_at(sent, identity), old is not None)
            for identity, old in zip(sent.identities(), known, strict=True)
        ]
        assert told == wanted, f"told {told}, wanted {wanted}"

    def change(self, rng: random.Random) -> None:
        """A change of the tables."""
        change = message_pb2.SystemRecord()
        kind = rng.choice(("topic", "topic", "group", "group gone", "value", "value", "value gone", "topic gone"))
        name = rng.choice(TOPICS)
        match kind:
            case "topic":
                change.topic_set.CopyFrom(
                    message_pb2.TopicConfig(name=name, read_queue_count=rng.randint(1, 8), write_queue_count=2)
                )
            case "topic gone":
                change.topic_deleted = name
            case "group":
                change.group_set.CopyFrom(
                    message_pb2.GroupConfig(name=rng.choice(GROUPS), retry_max_times=rng.randint(0, 9))
                )
            case "group gone":
                change.group_deleted = rng.choice(GROUPS)
            case "value":
                change.key_value_set.CopyFrom(message_pb2.KeyValue(key=rng.choice("ab"), value=str(rng.random())))
            case "value gone":
                change.key_value_deleted = rng.choice("ab")
        self.append_change(change)

    def append_change(self, change: message_pb2.SystemRecord) -> None:
        """Hands a change to the store and the model."""
        start_offset = self.opened._log.end_offset
        with self.offsets_watched():
            try:
                end_offset = self.opened.append_change(change)
            except (StoreFullError, BrokerBusyError):
                return
            except BrokerUnavailableError:
                self.model.change(change, start_offset, UNKNOWN)
                raise
            self.model.change(change, start_offset, end_offset)
        if change.WhichOneof("change") == "topic_deleted":
            for producer in self.producers:
                producer.sent = [sent for sent in producer.sent if sent.batch.topic != change.topic_deleted]

    def commit(self, rng: random.Random) -> None:
        """A group commits what it has consumed."""
        group, topic, queue_id = rng.choice(GROUPS), rng.choice(TOPICS), rng.randrange(QUEUE_COUNT)
        offset = message_pb2.GroupOffset(
            group=group, topic=topic, queue_id=queue_id, queue_offset=rng.randint(0, 30), reset=rng.random() < 0.2
        )
        with self.offsets_watched():
            try:
                self.opened.commit_offsets([offset], durable=rng.random() < 0.4)
            except (StoreFullError, BrokerBusyError):
                return
            finally:
                self.model.commit((group, topic, queue_id), offset.queue_offset, reset=offset.reset)

    @contextmanager
    def offsets_watched(self) -> Iterator[None]:
        """Tells the model when offsets that waited for their record have got it."""
        store = self.opened
        start_offset = store._log.end_offset
        end_offset = UNKNOWN
        try:
            yield
            end_offset = store._log.end_offset
        finally:
            if end_offset == UNKNOWN or not store._commits._pending:
                self.model.offsets_recorded(start_offset, end_offset)

    def read(self, rng: random.Random) -> None:
        """A consumer reads what is confirmed, now, while appends wait for their flush."""
        try:
            for name, queue in checks.queues_of(self.opened).items():
                expected = self.model.now.queues.get(name, [])
                for record in checks.read_queue(self.opened, queue, rng):
                    assert record.part == expected[record.message.queue_offset].part
        except AssertionError:
            if not self.disk.faults.dead:  # what a dead disk does not give back is skipped
                raise

    async def wait(self, rng: random.Random) -> None:
        """Everything is confirmed, or the store has failed."""
        store = self.opened
        assert await store.wait_confirmed(store._log.end_offset, CONFIRM_TIMEOUT_S) or not self.sync
        self.settle_producers()

    def settle_producers(self) -> None:
        """Clients have got their answers."""
        for producer in self.producers:
            producer.settle(self.opened.confirm_offset)

    # ---- what the store does now and then

    def tick(self, rng: random.Random) -> None:
        """Flush, and offsets that wait for their record."""
        if rng.random() < 0.5:
            self.opened._housekeeping.tick(0.0)
        else:
            self.tick_late()

    def tick_late(self) -> None:
        """Everything that waits for its time is due."""
        self.late_s += LATE_S
        with self.offsets_watched():
            self.opened._housekeeping.tick(self.late_s)

    def snapshot(self, rng: random.Random) -> None:
        """A snapshot begins; what follows happens while it is written."""
        with self.offsets_watched():
            self.opened._housekeeping.snapshot()

    async def retain(self, rng: random.Random) -> None:
        """The oldest segments go, all but a few."""
        config = replace(self.config, retention_bytes=rng.choice((1, self.config.segment_bytes * 2)))
        try:
            with self.offsets_watched():
                await self.opened._retention.run_once(config)
        except OSError as error:
            raise BrokerUnavailableError("the broker stops") from error

    async def settle(self, store: MessageStore) -> None:
        """Waits until the store has nothing left to do."""
        store._writer.flush_soon()
        drained = asyncio.ensure_future(store._thread.drain())
        await asyncio.wait((drained, store.failed), return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            drained.cancel()
        assert await store.wait_confirmed(store._log.end_offset, CONFIRM_TIMEOUT_S)

    # ---- what the machine does

    def power_off_soon(self, rng: random.Random) -> None:
        """The power goes off in the middle of one of the next changes of the disk."""
        self.disk.faults.power_off_after(rng.randint(0, 20))

    def fail_a_sync(self, rng: random.Random) -> None:
        """One of the next fdatasyncs fails."""
        self.disk.faults.fail("sync", nth=rng.randint(1, 4))

    async def open(self) -> None:
        """Opens the store."""
        if self.short_writes:
            self.disk.faults.shorten_writes(random.Random(self.seed))
        self.store = await self.stack.enter_async_context(
            open_store(self.disk, ROOT, self.config, clock_ms=self.clock_ms, buckets=self.buckets)
        )

    async def close(self) -> None:
        """Closes the store."""
        self.store = None
        stack, self.stack = self.stack, AsyncExitStack()
        await stack.aclose()

    async def restart(self, rng: random.Random, *, how: str) -> None:
        """The process or the machine stops; the store is opened again and checked, until that succeeds."""
        while True:
            survives = await self.end_process(rng, how)
            survives = await self.open_through_faults(rng, survives)
            try:
                await self.check_restarted(rng, survives)
                return
            except (BrokerUnavailableError, PowerLossError):
                how = "crash" if self.disk.faults.dead else "kill"

    async def end_process(self, rng: random.Random, how: str) -> int:
        """Stops, kills or crashes; returns the physical offset up to which the log must be there afterwards."""
        store = self.opened
        self.flushed_offset = store.confirm_offset if self.sync else store.flushed_offset
        start_offset = store._log.end_offset
        if how == "stop" and await self.stop_cleanly():
            self.model.offsets_recorded(start_offset, store._log.end_offset)
            self.flushed_offset = survives = store._log.end_offset
            self.crash(rng)
        elif how == "crash" or self.disk.faults.dead:
            survives = self.flushed_offset
            self.crash(rng)
        else:
            survives = self.flushed_offset if self.disk.faults.failed_count else store.written_offset
            self.kill(rng)
        if how == "stop":
            self.model.offsets_recorded(start_offset, UNKNOWN)
        if self.store is not None:
            with suppress(OSError, BrokerUnavailableError):
                await self.close()
        return survives

    def crash(self, rng: random.Random) -> None:
        """The power fails."""
        self.disk = self.disk.crash(rng)
        self.buckets = self.buckets.crash(self.disk.faults, rng)

    def kill(self, rng: random.Random) -> None:
        """The process dies."""
        self.disk = self.disk.kill(rng)
        self.buckets = self.buckets.kill(self.disk.faults)

    async def stop_cleanly(self) -> bool:
        """A clean end of the process; False when the disk did not let it."""
        try:
            await self.close()
        except (OSError, BrokerUnavailableError):
            return False
        return not self.disk.faults.dead and not self.disk.faults.failed_count

    async def open_through_faults(self, rng: random.Random, survives: int) -> int:
        """Opens the store; every now and then the power goes off, or a sync fails, while it recovers.

        Returns what must be there then: with the power goes what only a killed process leaves.
        """
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            if rng.random() < 0.7:
                self.disk.faults.power_off_after(rng.randint(0, 25))
            else:
                self.disk.faults.fail("sync", nth=rng.randint(1, 4))
            try:
                await self.open()
                return survives
            except (OSError, BrokerUnavailableError):
                self.stack = AsyncExitStack()
                survives = self.flushed_offset
                if self.disk.faults.dead or rng.random() < 0.5:
                    self.crash(rng)
                else:
                    self.kill(rng)
        await self.open()
        return survives

    async def check_restarted(self, rng: random.Random, survives: int) -> None:
        """Nothing that was promised is lost, nothing was invented, everything derived is right; clients go on."""
        store, model = self.opened, self.model
        # Starts that did not get far enough may have left epoch records of their own.
        recovered_end = min(start.first_physical_offset for start in store.epochs if start.epoch > self.epoch)
        self.epoch = store.epoch
        assert recovered_end >= survives, f"the log ends at {recovered_end}, {survives} was promised"
        seen = checks.outline_of(store)
        count = model.find_prefix(seen, recovered_end)
        assert count is not None, f"nothing that was sent looks like {seen}\nall of it: {model.now.outline()}"
        model.cut(count)
        model.offsets_lost(recovered_end)
        checks.check_contents(store, model, rng)
        checks.check_offsets(store, model)
        if rng.random() < 0.2:
            await self.check_against_rebuilt()
        else:
            await self.settle(self.opened)
            checks.check_log(store, self.disk)
        self.send_unsettled(rng)

    def send_unsettled(self, rng: random.Random) -> None:
        """Clients send again what they have no answer for, in order, or give it up."""
        for producer in self.producers:
            unsettled = producer.unsettled()
            if rng.random() < 0.7:
                for sent in unsettled:
                    self.append([sent])
            else:
                producer.sent = [sent for sent in producer.sent if sent.settled]

    async def check_against_rebuilt(self) -> None:
        """Every derived structure is equal to one built from the log alone."""
        store = self.opened
        await self.settle_all(store)
        checks.check_log(store, self.disk)
        checks.check_contents(store, self.model, random.Random(0))
        live = checks.dump(store, self.model)
        root = Path("/rebuilt")
        disk = checks.strip_to_log(self.disk, root, keep_snapshots=store.min_physical_offset > 0)
        async with open_store(disk, root, self.config, clock_ms=self.clock_ms) as rebuilt:
            await self.settle_all(rebuilt)
            built = checks.dump(rebuilt, self.model)
        for name, value in live.items():
            assert value == built[name], f"{name}: {checks.difference(value, built[name])}"

    async def settle_all(self, store: MessageStore) -> None:
        """Waits until the key index has everything too."""
        while True:
            if store is self.store:
                self.tick_late()
            else:
                store._housekeeping.tick(10 * self.late_s)
            await self.settle(store)
            if store._index.applied_offset >= store.confirm_offset:
                return
