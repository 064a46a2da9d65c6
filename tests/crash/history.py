"""Random histories of one store: what clients do, what the machine does to it, and the checks after each restart.

A history is a list of steps, each with a seed of its own, so that steps can be left out without changing the others:
that is how a failing one is made small.
"""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from kitemq.errors import BrokerUnavailableError, StoreFullError
from kitemq_server.store.config import FlushMode, StoreConfig
from kitemq_server.store.errors import StoreOpenError
from kitemq_server.store.message_store import MessageStore, open_store
from tests.crash import checks
from tests.crash.clients import Clients
from tests.crash.crash_buckets import CrashBuckets
from tests.crash.crash_disk import CrashDisk
from tests.crash.fault_plan import PowerLossError
from tests.crash.model import UNKNOWN

ROOT = Path("/store")
TICK_S = 0.2
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
    "retain": 5,
    "power off soon": 3,
    "fail a sync": 2,
    "fill disk": 3,
    "an hour later": 2,
    "crash": 7,
    "kill": 5,
    "stop": 3,
}


def plan(seed: int) -> list[Step]:
    """The steps of history `seed`."""
    rng = random.Random(seed)
    names = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()), k=rng.randint(5, 60))
    return [Step(name, rng.getrandbits(32)) for name in names]


class History(Clients):
    """Runs the steps of one history."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)
        self.seed = seed
        self.sync = rng.random() < 0.5
        super().__init__(CrashDisk(ROOT, rng=rng), equal=rng.random() < 0.5)
        self.config = StoreConfig(
            flush_mode=FlushMode.SYNC_FLUSH if self.sync else FlushMode.ASYNC_FLUSH,
            flush_interval_ms=NEVER_MS,
            segment_bytes=rng.choice((4096, 8192, 65536)),
            allocate_bytes=rng.choice((512, 4096)),
            reserve_bytes=rng.choice((0, 16384)),
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
        self.buckets = CrashBuckets(self.disk.faults)
        self.short_writes = rng.random() < 0.3
        self.stack = AsyncExitStack()
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
            "fill disk": self.fill_disk,
            "an hour later": self.an_hour_later,
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
                await self.wait()
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

    # ---- what the store does now and then

    async def wait(self) -> None:
        """Everything is confirmed, or the store has failed."""
        self.free_space()
        await self.confirmed(self.opened)
        self.settle_producers()

    async def confirmed(self, store: MessageStore) -> None:
        """Returns when everything is confirmed. What had to wait for space is flushed with the tick after it."""
        while not await store.wait_confirmed(store._log.end_offset, TICK_S):
            if store is self.store:
                self.tick_late()

    def tick(self, rng: random.Random) -> None:
        """Flush, and offsets that wait for their record."""
        if rng.random() < 0.5:
            self.opened._housekeeping.tick(0.0)
        else:
            self.tick_late()

    def tick_late(self) -> None:
        """Everything that waits for its time is due."""
        self.late_s += LATE_S
        with self.offsets_watched(), suppress(StoreFullError):
            self.opened._housekeeping.tick(self.late_s)

    def snapshot(self, rng: random.Random) -> None:
        """A snapshot begins; what follows happens while it is written."""
        with self.offsets_watched(), suppress(StoreFullError):
            self.opened._housekeeping.snapshot()

    async def retain(self, rng: random.Random) -> None:
        """The oldest segments go, all but a few."""
        config = replace(self.config, retention_bytes=rng.choice((1, self.config.segment_bytes * 2)))
        try:
            with self.offsets_watched(), suppress(StoreFullError):
                await self.opened._retention.run_once(config)
                if self.opened._retention.held_back:
                    self.opened._snapshotter._not_before = 0.0
                    self.opened._housekeeping.raise_floor()
        except OSError as error:
            raise BrokerUnavailableError("the broker stops") from error

    async def settle(self, store: MessageStore) -> None:
        """Waits until the store has nothing left to do."""
        self.free_space()
        store._writer.flush_soon()
        drained = asyncio.ensure_future(store._thread.drain())
        await asyncio.wait((drained, store.failed), return_when=asyncio.FIRST_COMPLETED)
        if not drained.done():
            drained.cancel()
        await self.confirmed(store)

    # ---- what the machine does

    def power_off_soon(self, rng: random.Random) -> None:
        """The power goes off in the middle of one of the next changes of the disk."""
        self.disk.faults.power_off_after(rng.randint(0, 20))

    def an_hour_later(self, rng: random.Random) -> None:
        """Longer than anybody retries; the key index begins a new bucket."""
        self.now_ms += 3_600_000
        for producer in self.producers:
            producer.sent.clear()

    def fill_disk(self, rng: random.Random) -> None:
        """Others have used up the disk, all but little."""
        self.disk.capacity_bytes = self.disk.used_bytes() + rng.choice((0, 1, 100, 1000, 3000))

    def free_space(self) -> None:
        """There is space again; the store notices by itself."""
        if self.disk.capacity_bytes:
            self.disk.capacity_bytes = 0
            self.tick_late()

    def fail_a_sync(self, rng: random.Random) -> None:
        """One of the next fdatasyncs fails."""
        self.disk.faults.fail("sync", nth=rng.randint(1, 4))

    async def open(self) -> None:
        """Opens the store. A disk that is too full for that gets space."""
        if self.short_writes:
            self.disk.faults.shorten_writes(random.Random(self.seed))
        for attempt in (1, 2):
            try:
                self.store = await self.stack.enter_async_context(
                    open_store(self.disk, ROOT, self.config, clock_ms=self.clock_ms, buckets=self.buckets)
                )
                return
            except (StoreOpenError, OSError) as error:
                full = isinstance(error, StoreOpenError) or error.errno == errno.ENOSPC
                if attempt == 2 or not full or not self.disk.capacity_bytes:
                    raise
            self.disk.capacity_bytes = 0

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
        store = self.opened
        try:
            await self.close()
        except (OSError, BrokerUnavailableError):
            return False
        # A full disk may leave something unwritten that nobody was told of.
        wrote_all = store.flushed_offset == store._log.end_offset and not store._commits._pending
        return wrote_all and not self.disk.faults.dead and not self.disk.faults.failed_count

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
        begun = [start.first_physical_offset for start in store.epochs if start.epoch > self.epoch]
        assert begun, f"epoch {self.epoch} is begun again"
        recovered_end = min(begun)
        self.epoch = store.epoch
        assert recovered_end >= survives, f"the log ends at {recovered_end}, {survives} was promised"
        assert not store.recovery.damages, f"nothing is damaged: {store.recovery.damages}"
        seen = checks.outline_of(store)
        count = model.find_prefix(seen, recovered_end)
        assert count is not None, f"nothing that was sent looks like {seen}\nall of it: {model.now.outline()}"
        model.cut(count)
        model.offsets_lost(recovered_end)
        with self.unless_dead():
            checks.check_contents(store, model, rng)
        checks.check_offsets(store, model)
        if rng.random() < 0.2:
            await self.check_against_rebuilt()
        else:
            await self.settle(self.opened)
            checks.check_log(store, self.disk)
        self.send_unsettled(rng)

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
