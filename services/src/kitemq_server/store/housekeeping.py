"""What has to be done now and then while a store is open: flush, offsets, snapshots, index, scrub, retention."""

from __future__ import annotations

import asyncio
import logging
import time

from kitemq.errors import BrokerBusyError, BrokerUnavailableError, StoreFullError
from kitemq.proto.v1 import message_pb2
from kitemq_server.store.appender import Appender
from kitemq_server.store.commit_log import CommitLog
from kitemq_server.store.config import StoreConfig
from kitemq_server.store.confirm import Confirmation
from kitemq_server.store.key_index import KeyIndex
from kitemq_server.store.log_writer import FULL_RETRY_S, LogWriter
from kitemq_server.store.offset_commits import OffsetCommits
from kitemq_server.store.retention import Retention
from kitemq_server.store.scrub import Scrub
from kitemq_server.store.snapshotter import Snapshotter
from kitemq_server.store.space import Space
from kitemq_server.store.store_thread import StoreThread

logger = logging.getLogger(__name__)

_INDEX_INTERVAL_S = 1.0
_RETENTION_INTERVAL_S = 10.0
_HELD_BACK_INTERVAL_S = 1.0
_LATER = (StoreFullError, BrokerBusyError, BrokerUnavailableError)
_BUSY_FACTOR = 4  # a log that grows this much faster than the scrub reads is left alone


class Housekeeping:
    """Loop only. config may be replaced at any time."""

    def __init__(
        self,
        config: StoreConfig,
        *,
        log: CommitLog,
        writer: LogWriter,
        appender: Appender,
        confirmation: Confirmation,
        commits: OffsetCommits,
        snapshotter: Snapshotter,
        index: KeyIndex,
        retention: Retention,
        scrub: Scrub,
        space: Space,
        thread: StoreThread,
    ) -> None:
        self.config = config
        self._log = log
        self._writer = writer
        self._appender = appender
        self._confirmation = confirmation
        self._commits = commits
        self._snapshotter = snapshotter
        self._index = index
        self._retention = retention
        self._scrub = scrub
        self._space = space
        self._thread = thread
        self._space_at = 0.0
        self._index_at = 0.0
        self._scrubbed_end_offset = log.end_offset

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(self.config.flush_interval_ms / 1000)
            if not self._confirmation.failed:
                try:
                    self.tick(time.monotonic())
                except _LATER as error:
                    logger.warning("offsets are not recorded yet: %s", error)

    async def retain(self) -> None:
        """Deletes old segments, until it is cancelled."""
        self._retention.look_at_disk(self.config)
        interval_s = _RETENTION_INTERVAL_S
        while True:
            await asyncio.sleep(interval_s)
            interval_s = _RETENTION_INTERVAL_S
            if not self._confirmation.failed:
                try:
                    await self._retention.run_once(self.config)
                    if self._retention.held_back:
                        self.raise_floor()
                        # A log that grows has its snapshots anyway; sends that are refused wait for these.
                        if self._space.full:
                            interval_s = _HELD_BACK_INTERVAL_S
                except _LATER as error:
                    logger.warning("segments are not deleted yet: %s", error)

    def raise_floor(self) -> None:
        """Begins a snapshot for the sake of what it lets retention delete, if it can now. Raises as an append."""
        if not self._snapshotter.may_start():
            return
        self._commits.append_pending()
        if not self._snapshotter.is_new(self._log.end_offset):
            # Nothing has been appended since the last one: a record that repeats what holds makes the next another.
            floor = message_pb2.LiveFloorRaised(physical_offset=self._retention.live_floor)
            self._appender.append_changes([message_pb2.SystemRecord(live_floor_raised=floor)])
        self.snapshot()

    def tick(self, now_s: float) -> None:
        """One turn of everything but retention. Raises as an append."""
        if self._writer.dirty:
            self._writer.flush_soon()
        if self._space.full and now_s >= self._space_at:
            self._space_at = now_s + FULL_RETRY_S
            self._writer.recover_space()
        if self._snapshotter.due(self._log.end_offset, self._appender.record_count):
            self.snapshot()
        if now_s >= self._index_at:
            self._index_at = now_s + _INDEX_INTERVAL_S
            self.index()
        self._scrub_some(now_s)
        self._commits.append_if_due(now_s)

    def snapshot(self) -> None:
        """Begins a snapshot; what waits is recorded first: it says no more than the log. Raises as an append."""
        self._commits.append_pending()
        self._snapshotter.start(self._log.end_offset, self._appender.record_count)

    def index(self) -> None:
        """Gives the key index what has been confirmed."""
        self._index.work(self._confirmation.confirm_offset, self._thread.run_steps)

    def _scrub_some(self, now_s: float) -> None:
        end_offset = self._log.end_offset
        byte_count = int(self.config.scrub_bytes_per_s * self.config.flush_interval_ms / 1000)
        if byte_count and end_offset - self._scrubbed_end_offset <= byte_count * _BUSY_FACTOR:
            self._scrub.work(now_s, byte_count, self._confirmation.flushed_offset)
        self._scrubbed_end_offset = end_offset
