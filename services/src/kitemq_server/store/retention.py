"""Deletes whole segments, oldest first: for their age, for the log's size, for the disk's watermark.

Never the segment being written, never what is needed (live floor) or what a restart from the older snapshot reads.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kitemq.proto.v1 import message_pb2
from kitemq_server.store.commit_log import CommitLog, LogReader, Segment
from kitemq_server.store.config import StoreConfig
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.key_index import KeyIndex
from kitemq_server.store.log_writer import LogWriter
from kitemq_server.store.record import ROLL_BYTES
from kitemq_server.store.snapshotter import Snapshotter
from kitemq_server.store.space import Space
from kitemq_server.store.state import State
from kitemq_server.store.store_thread import StoreThread

logger = logging.getLogger(__name__)

CLOCK_JUMP_MS = 10 * 60 * 1000
_HOUR_MS = 3_600_000
_WATERMARK = "disk watermark"
_QUEUES_PER_TURN = 100
_WARN_AGAIN_PERCENT = 5  # below its watermark the disk has to come, before what the watermark deletes is news again


class ClockGuard:
    """Notices jumps of the wall clock against the monotonic one, and waits for a while after each."""

    def __init__(self, *, wall_ms: int, monotonic_ms: int, last_store_timestamp_ms: int) -> None:
        self._wall_ms = wall_ms
        self._monotonic_ms = monotonic_ms
        # A start that seems to come long after the last record may be a machine whose clock is wrong.
        jumped = last_store_timestamp_ms > 0 and abs(wall_ms - last_store_timestamp_ms) > CLOCK_JUMP_MS
        self._wait_until_ms = monotonic_ms + CLOCK_JUMP_MS if jumped else 0

    def trusts(self, *, wall_ms: int, monotonic_ms: int) -> bool:
        """Whether the wall clock may be believed now."""
        drift_ms = (wall_ms - self._wall_ms) - (monotonic_ms - self._monotonic_ms)
        self._wall_ms = wall_ms
        self._monotonic_ms = monotonic_ms
        if abs(drift_ms) > CLOCK_JUMP_MS:
            self._wait_until_ms = monotonic_ms + CLOCK_JUMP_MS
            logger.warning("wall clock jumped, nothing is deleted for its age for a while: jump_ms=%d", drift_ms)
        return monotonic_ms >= self._wait_until_ms


@dataclass(frozen=True, slots=True)
class Candidate:
    """A sealed segment that may go. end_offset: physical; byte_count: what its deletion frees."""

    end_offset: int
    byte_count: int
    last_timestamp_ms: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What the limits are judged by. oldest_ms: records stored before go for their age; 0 = none."""

    log_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    oldest_ms: int

    @property
    def disk_used_percent(self) -> float:
        """Of what the broker could use."""
        return self.disk_used_bytes * 100 / max(1, self.disk_total_bytes)

    def above(self, watermark_percent: int, freed_bytes: int = 0) -> bool:
        """Whether the disk is above the watermark (0 = off), still so with some more bytes free."""
        used_bytes = self.disk_used_bytes - freed_bytes
        return watermark_percent > 0 and used_bytes * 100 > self.disk_total_bytes * watermark_percent


def choose(candidates: Sequence[Candidate], usage: Usage, config: StoreConfig) -> tuple[int, str]:
    """How many of the candidates, oldest first, have to go, and why the last of them."""
    freed_bytes = 0
    reason = ""
    for count, candidate in enumerate(candidates):
        if candidate.last_timestamp_ms < usage.oldest_ms:
            reason = "age"
        elif config.retention_bytes and usage.log_bytes - freed_bytes > config.retention_bytes:
            reason = "size of the log"
        elif usage.above(config.disk_watermark_percent, freed_bytes):
            reason = _WATERMARK
        else:
            return count, reason
        freed_bytes += candidate.byte_count
    return len(candidates), reason


def _warn_of_watermark(usage: Usage, config: StoreConfig, deleted: Sequence[Candidate]) -> None:
    logger.warning(
        "disk above its watermark: used_percent=%.1f watermark_percent=%d log_bytes=%d other_bytes=%d "
        "deleted_segments=%d deleted_bytes=%d",
        usage.disk_used_percent,
        config.disk_watermark_percent,
        usage.log_bytes,
        max(0, usage.disk_used_bytes - usage.log_bytes),
        len(deleted),
        sum(one.byte_count for one in deleted),
    )


class Retention:
    """Runs on the loop; files are removed by the store's thread."""

    def __init__(
        self,
        *,
        log: CommitLog,
        reader: LogReader,
        thread_reader: LogReader,
        state: State,
        space: Space,
        index: KeyIndex,
        thread: StoreThread,
        clock_ms: Callable[[], int],
        snapshotter: Snapshotter,
        append_change: Callable[[message_pb2.SystemRecord], int],
        writer: LogWriter,
    ) -> None:
        self._log = log
        self._reader = reader
        self._thread_reader = thread_reader
        self._state = state
        self._space = space
        self._index = index
        self._thread = thread
        self._clock_ms = clock_ms
        self._snapshotter = snapshotter
        self._append_change = append_change
        self._writer = writer
        self._guard = ClockGuard(
            wall_ms=clock_ms(),
            monotonic_ms=time.monotonic_ns() // 1_000_000,
            last_store_timestamp_ms=state.last_store_timestamp_ms,
        )
        self._last_timestamps: dict[int, int] = {}
        self.deleted_unconsumed: dict[str, int] = {}
        self.deleted_segment_count = 0
        self._watermark_warned = False
        self._removing = False
        self._wanted_end = 0  # physical offset below which segments had to go at the last look

    @property
    def live_floor(self) -> int:
        """Physical offset below which the log says that nothing is needed."""
        return self._state.tables.live_floor

    @property
    def held_back(self) -> bool:
        """Segments have to go that a restart from the older snapshot would read."""
        return self._wanted_end > self._snapshotter.floor

    async def run_once(self, config: StoreConfig) -> None:
        """Deletes what has to go now."""
        if self._removing:
            return  # what the disk gets back from it is still to be seen
        candidates = self._candidates()
        wall_ms = self._clock_ms()
        trusted = self._guard.trusts(wall_ms=wall_ms, monotonic_ms=time.monotonic_ns() // 1_000_000)
        by_age = trusted and config.retention_hours > 0
        usage = self._usage(oldest_ms=wall_ms - int(config.retention_hours * _HOUR_MS) if by_age else 0)
        if usage.disk_used_percent < config.disk_watermark_percent - _WARN_AGAIN_PERCENT:
            self._watermark_warned = False
        wanted, _ = choose(candidates, usage, config)
        self._wanted_end = candidates[wanted - 1].end_offset if wanted else 0
        floor = self._snapshotter.floor
        count, reason = choose([one for one in candidates if one.end_offset <= floor], usage, config)
        if count:
            if reason == _WATERMARK and not self._watermark_warned:
                self._watermark_warned = True
                _warn_of_watermark(usage, config, candidates[:count])
            await self._delete_below(candidates[count - 1].end_offset, reason)

    def look_at_disk(self, config: StoreConfig) -> None:
        """Warns of a disk that is above its watermark at the start: what it will cost is said before it is gone."""
        usage = self._usage(oldest_ms=0)
        if usage.above(config.disk_watermark_percent):
            _warn_of_watermark(usage, config, [])

    def _usage(self, *, oldest_ms: int) -> Usage:
        total_bytes = self._space.total_bytes
        used_bytes = total_bytes - self._space.free_bytes
        return Usage(self._log.bytes_kept, used_bytes, total_bytes, oldest_ms)

    def _candidates(self) -> list[Candidate]:
        """Sealed segments that are on disk, oldest first."""
        flushed_offset = self._writer.flushed_offset
        return [
            Candidate(segment.end_offset, segment.end_offset - segment.base, self._last_timestamp(segment))
            for segment in self._log.segments[:-1]
            if segment.end_offset < flushed_offset
        ]

    def _last_timestamp(self, segment: Segment) -> int:
        """Store timestamp of a sealed segment's last record; that of the next segment's first, if it is damaged."""
        known = self._last_timestamps.get(segment.base)
        if known is None:
            record = self._reader.record_at(segment.end_offset - ROLL_BYTES) or self._reader.record_at(
                segment.end_offset
            )
            # What cannot be dated stays until something younger behind it has to go.
            known = record.store_timestamp_ms if record is not None else 1 << 63
            self._last_timestamps[segment.base] = known
        return known

    async def _delete_below(self, physical_offset: int, reason: str) -> None:
        if physical_offset > self.live_floor:
            floor = message_pb2.LiveFloorRaised(physical_offset=physical_offset)
            self._append_change(message_pb2.SystemRecord(live_floor_raised=floor))
            await self._thread.call(self._writer.flush)
        moved = await self._move_min_offsets(physical_offset)
        await self._count_unconsumed(moved)
        segments = self._log.segments
        dropped = [segment for segment in segments if segment.end_offset <= physical_offset]
        self._log.segments = segments[len(dropped) :]
        for segment in dropped:
            self._reader.forget(segment.base)
            self._last_timestamps.pop(segment.base, None)
        self.deleted_segment_count += len(dropped)
        logger.info(
            "segments deleted: count=%d below=%d because=%s", len(dropped), physical_offset, reason.replace(" ", "_")
        )
        self._removing = True
        self._thread.run_steps(self._remove([segment.base for segment in dropped], physical_offset, list(moved)))

    async def _move_min_offsets(self, physical_offset: int) -> dict[ConsumeQueue, int]:
        """Queues whose first messages are going, with the min offsets that they had."""
        moved: dict[ConsumeQueue, int] = {}
        for number, queue in enumerate(list(self._state.queues), 1):
            if number % _QUEUES_PER_TURN == 0:
                await asyncio.sleep(0)
            if queue.deleted:
                continue
            min_offset = min(queue.first_at_or_after(physical_offset), queue.max_offset)
            if min_offset > queue.min_offset:
                moved[queue] = queue.min_offset
                queue.min_offset = min_offset
        return moved

    async def _count_unconsumed(self, moved: dict[ConsumeQueue, int]) -> None:
        """What groups with an offset in these queues will never see is counted, and said."""
        offsets = self._state.tables.offsets
        bounds = {(queue.topic, queue.queue_id): (first, queue.min_offset) for queue, first in moved.items()}
        for group in list(offsets.groups()):
            lost = 0
            for key, consumer_offset in offsets.of_group(group).items():
                if key in bounds:
                    first, min_offset = bounds[key]
                    lost += max(0, min_offset - max(first, consumer_offset))
            if lost:
                self.deleted_unconsumed[group] = self.deleted_unconsumed.get(group, 0) + lost
                logger.warning("messages deleted before they were consumed: group=%s count=%d", group, lost)
            await asyncio.sleep(0)

    def _remove(self, bases: list[int], physical_offset: int, moved: list[ConsumeQueue]) -> Iterator[None]:
        """Thread."""
        log = self._log
        for base in bases:
            self._thread_reader.forget(base)
            log.disk.remove(log.layout.segment(base))
            yield
        log.disk.fsync_dir(log.layout.commit_log)
        self._thread.post(self._removed)
        yield
        self._index.drop_below(physical_offset)
        files = self._state.queues.files
        for queue in moved:
            yield
            if not queue.deleted and files.remove_below(queue.topic, queue.queue_id, queue.min_offset):
                self._thread.post(files.forget, queue.topic)

    def _removed(self) -> None:
        self._removing = False
