"""The store's face: opens it, and names what a broker does with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from kitemq.errors import BrokerUnavailableError
from kitemq.proto.v1 import message_pb2
from kitemq_server.store.appender import Appended, Appender
from kitemq_server.store.batch import AppendReceipt, ClientBatch, OffsetRun
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.config import FlushMode, StoreConfig
from kitemq_server.store.confirm import Confirmation
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.disk import Disk, RealDisk
from kitemq_server.store.file_cache import FileCache
from kitemq_server.store.log_writer import LogWriter
from kitemq_server.store.opening import Opened, open_files
from kitemq_server.store.queue_reader import QueueReader, ReadResult, ReadStatus
from kitemq_server.store.record import Record
from kitemq_server.store.snapshotter import Snapshotter
from kitemq_server.store.store_thread import StoreThread
from kitemq_server.store.tables import EpochStart, LockKey, OffsetTable

logger = logging.getLogger(__name__)

OFFSETS_PER_RECORD = 10_000
_FULL_RETRY_S = 1.0


def wall_clock_ms() -> int:
    """Unix milliseconds."""
    return time.time_ns() // 1_000_000


class MessageStore:
    """One broker's store, open. Everything here is for the loop that opened it; nothing but waits is awaited.

    failed: done, with the error as its result, once the store is broken: the process has to stop, and recovers when it
    starts again. From then on appends raise BrokerUnavailableError and nothing more is confirmed.
    """

    def __init__(
        self,
        opened: Opened,
        config: StoreConfig,
        thread: StoreThread,
        failed: asyncio.Future[Exception],
        clock_ms: Callable[[], int],
    ) -> None:
        self._config = config
        self._thread = thread
        self._state = opened.state
        self._log = opened.log
        self._space = opened.space
        self._confirmation = Confirmation(config.flush_mode, opened.log.end_offset)
        self._writer = LogWriter(opened.log, opened.space, thread, self._confirmation, config)
        self._appender = Appender(
            opened.log,
            self._writer,
            opened.state,
            self._confirmation,
            config,
            clock_ms,
            on_failure=self.fail,
            on_messages=self._appended_messages,
        )
        self._log_reader = LogReader(opened.log, FileCache(config.open_files_max))
        self._reader = QueueReader(self._log_reader)
        self._snapshotter = Snapshotter(
            opened.disk,
            opened.layout,
            config,
            store_uuid=opened.store_uuid,
            state=opened.state,
            writer=self._writer,
            space=opened.space,
            thread=thread,
            kept=opened.snapshots,
        )
        self._uncommitted: dict[tuple[str, str, int], message_pb2.GroupOffset] = {}
        self._uncommitted_since = 0.0
        self._full_retry_at = 0.0
        self.failed = failed
        self.store_uuid = opened.store_uuid
        self.recovery = opened.report

    # ---- tables, read only

    @property
    def topics(self) -> Mapping[str, message_pb2.TopicConfig]:
        """All topics by name. Change them with `append_change`; never change what is in here."""
        return self._state.tables.topics

    @property
    def groups(self) -> Mapping[str, message_pb2.GroupConfig]:
        """All consumer groups by name."""
        return self._state.tables.groups

    @property
    def offsets(self) -> OffsetTable:
        """Committed consumer offsets."""
        return self._state.tables.offsets

    @property
    def key_values(self) -> Mapping[str, str]:
        """Settings kept in the log."""
        return self._state.tables.key_values

    @property
    def queue_locks(self) -> Mapping[LockKey, message_pb2.QueueLocked]:
        """Locks by (group, topic, queue id), expired ones too."""
        return self._state.tables.queue_locks

    @property
    def epochs(self) -> Sequence[EpochStart]:
        """All epochs in the log and where their bytes begin, oldest first."""
        return self._state.tables.epochs

    @property
    def epoch(self) -> int:
        """The epoch of this start."""
        return self._appender.epoch

    @property
    def data_version(self) -> tuple[int, int]:
        """(timestamp in ms, counter) of the topic table: higher is newer."""
        tables = self._state.tables
        return tables.data_version_timestamp_ms, tables.data_version

    def queue(self, topic: str, queue_id: int) -> ConsumeQueue | None:
        """A queue; None when the topic has no such queue."""
        queue = self._state.queues.get(topic, queue_id)
        if queue is None:
            config = self._state.tables.topics.get(topic)
            if config is not None and queue_id < max(config.read_queue_count, config.write_queue_count):
                queue = self._state.queues.obtain(topic, queue_id)
        return queue

    # ---- writing

    def append(self, batches: Sequence[ClientBatch]) -> AppendReceipt:
        """Appends all batches, or raises and appends none. A plain function: nothing can interrupt it half-way.

        Repeats are answered with the first copy's offsets; wait for `end_offset` to be confirmed either way.
        Raises StoreFullError, BrokerBusyError (the disk is slow; with retry_after_ms), InvalidMessageError (too large),
        BrokerUnavailableError once the store has failed or closed.
        """
        return self._appender.append(batches)

    def append_change(self, change: message_pb2.SystemRecord) -> int:
        """Appends a change of the tables, applies it, and returns its physical end. Raises as `append`."""
        return self._appender.append_changes([change])

    def commit_offsets(self, offsets: Iterable[message_pb2.GroupOffset], *, durable: bool) -> int:
        """Commits consumer offsets: forwards only, unless `reset`. Visible at once.

        durable: appended at once; returns the physical end to wait for. Otherwise they go into one record every
        `offsets_interval_ms`, and 0 is returned. Raises as `append` (durable only).
        """
        table = self._state.tables.offsets
        moved = [offset for offset in offsets if table.moves(offset)]
        if durable:
            return self._append_offsets(moved) if moved else self._confirmation.confirm_offset
        if moved and not self._uncommitted:
            self._uncommitted_since = time.monotonic()
        for offset in moved:
            table.commit(offset)
            self._uncommitted[offset.group, offset.topic, offset.queue_id] = offset
        return 0

    def _append_offsets(self, offsets: Sequence[message_pb2.GroupOffset]) -> int:
        return self._appender.append_changes(
            [
                message_pb2.SystemRecord(
                    offsets_committed=message_pb2.OffsetsCommitted(offsets=offsets[start : start + OFFSETS_PER_RECORD])
                )
                for start in range(0, len(offsets), OFFSETS_PER_RECORD)
            ]
        )

    def _append_uncommitted(self) -> None:
        offsets, self._uncommitted = list(self._uncommitted.values()), {}
        if offsets:
            self._append_offsets(offsets)

    # ---- confirmation

    @property
    def written_offset(self) -> int:
        """Physical offset below which everything is written."""
        return self._confirmation.written_offset

    @property
    def flushed_offset(self) -> int:
        """Physical offset below which everything is on disk."""
        return self._confirmation.flushed_offset

    @property
    def confirm_offset(self) -> int:
        """Physical offset below which everything is as durable as the flush mode promises, and readable."""
        return self._confirmation.confirm_offset

    async def wait_confirmed(self, end_offset: int, timeout_s: float) -> bool:
        """True once everything below `end_offset` is confirmed, False after `timeout_s`.

        Raises BrokerUnavailableError as soon as the store has failed.
        """
        return await self._confirmation.wait(end_offset, timeout_s)

    @property
    def confirmed_listener(self) -> Callable[[Sequence[ConsumeQueue]], None]:
        """Called on the loop with the queues whose max_offset has just moved, or that are gone with their topic."""
        return self._confirmation.listener

    @confirmed_listener.setter
    def confirmed_listener(self, listener: Callable[[Sequence[ConsumeQueue]], None]) -> None:
        self._confirmation.listener = listener

    # ---- reading

    def read(
        self,
        queue: ConsumeQueue,
        queue_offset: int,
        *,
        count_max: int,
        bytes_max: int,
        tags: frozenset[str] | None = None,
    ) -> ReadResult:
        """Reads confirmed records from `queue_offset` on: at least one, even if it is larger than `bytes_max`.

        tags: only messages with one of these; at most 16,000 messages are looked at, and NO_MATCHED_MSG says where to
        go on. Damaged records are skipped and counted, never raised.
        """
        return self._reader.read(queue, queue_offset, count_max=count_max, bytes_max=bytes_max, tags=tags)

    def read_record(self, physical_offset: int) -> Record | None:
        """The confirmed record that begins at `physical_offset`, checked; None when there is none or it is damaged."""
        record = self._log_reader.record_at(physical_offset)
        return record if record is not None and record.end_offset <= self.confirm_offset else None

    def search_timestamp(self, queue: ConsumeQueue, timestamp_ms: int) -> int:
        """First queue offset stored at or after `timestamp_ms`; max_offset when nothing is that young."""
        return self._reader.search_timestamp(queue, timestamp_ms)

    def timestamp_at(self, queue: ConsumeQueue, queue_offset: int) -> int:
        """Store timestamp in ms of the message at `queue_offset`; 0 when there is none."""
        return self._reader.timestamp_at(queue, queue_offset)

    # ---- for metrics

    @property
    def min_physical_offset(self) -> int:
        """Physical offset of the oldest byte kept."""
        return self._log.start_offset

    @property
    def store_bytes(self) -> int:
        """Bytes of the log."""
        return self._log.bytes_kept

    @property
    def disk_free_bytes(self) -> int:
        """Free on the store's file system."""
        return self._space.free_bytes

    @property
    def disk_total_bytes(self) -> int:
        """Size of the store's file system."""
        return self._space.total_bytes

    @property
    def full(self) -> bool:
        """The disk is full: client appends are refused."""
        return self._space.full

    @property
    def queue_count(self) -> int:
        """Queues that have been written or read."""
        return len(self._state.queues)

    @property
    def damaged_record_count(self) -> int:
        """Damaged records and stretches found since the start."""
        return self._reader.damaged_record_count + len(self.recovery.damages)

    @property
    def snapshot_cost_s(self) -> float:
        """What the last snapshot took of the store's thread."""
        return self._snapshotter.cost_s

    @property
    def fsync_observer(self) -> Callable[[float], None] | None:
        """Called on the loop with the seconds that each flush took."""
        return self._writer.fsync_observer

    @fsync_observer.setter
    def fsync_observer(self, observer: Callable[[float], None] | None) -> None:
        self._writer.fsync_observer = observer

    # ---- life

    def fail(self, error: Exception) -> None:
        """The store is broken: waiters and appends fail from now on, `failed` is done."""
        if not self.failed.done():
            logger.error("store failed, it recovers at the next start: %r", error)
            self._confirmation.fail(
                BrokerUnavailableError(f"broker {self._config.broker_name} stops: its store has failed")
            )
            self.failed.set_result(error)

    def _begin_epoch(self, epoch: int) -> int:
        self._appender.epoch = epoch
        started = message_pb2.EpochStarted(
            epoch=epoch, first_physical_offset=self._log.end_offset, store_uuid=self.store_uuid
        )
        return self.append_change(message_pb2.SystemRecord(epoch_started=started))

    def _appended_messages(self, timestamp_ms: int, start: int, end: int, appended: list[Appended]) -> None:
        pass

    async def _run(self) -> None:
        """What has to be done now and then."""
        while True:
            await asyncio.sleep(self._config.flush_interval_ms / 1000)
            if self._confirmation.error is None:
                self._tick(time.monotonic())

    def _tick(self, now_s: float) -> None:
        if self._writer.dirty:
            self._writer.flush_soon()
        if self._uncommitted and (now_s - self._uncommitted_since) * 1000 >= self._config.offsets_interval_ms:
            self._append_uncommitted()
        if self._space.full and now_s >= self._full_retry_at:
            self._full_retry_at = now_s + _FULL_RETRY_S
            self._writer.recover_space()
        self._snapshotter.start_if_due(self._log.end_offset, self._appender.record_count)

    async def _close(self) -> None:
        """Leaves nothing for the next start to do, unless the store has failed."""
        if self._confirmation.error is None:
            self._append_uncommitted()
            await self._thread.call(self._writer.flush)
            self._snapshotter.start(self._log.end_offset, self._appender.record_count)
            await self._thread.drain()
            self._confirmation.fail(BrokerUnavailableError(f"broker {self._config.broker_name} is stopping"))
        await self._thread.close()
        self._log_reader.close()
        self._state.queues.files.close()
        self._writer.close()


@asynccontextmanager
async def open_store(
    disk: Disk, root: Path, config: StoreConfig, *, clock_ms: Callable[[], int] = wall_clock_ms
) -> AsyncIterator[MessageStore]:
    """Locks and recovers the store below `root`, begins a new epoch, and closes it cleanly at the end.

    Raises StoreOpenError when the directory cannot be served as it is, OSError when the disk fails.
    """
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[Exception] = loop.create_future()
    store: MessageStore | None = None

    def fail(error: Exception) -> None:
        if store is not None:
            store.fail(error)

    thread = StoreThread(loop, fail)
    thread.start()
    try:
        opened = await thread.call(lambda: open_files(disk, root, config))
    except BaseException:
        await thread.close()
        raise
    try:
        store = MessageStore(opened, config, thread, failed, clock_ms)
        end_offset = store._begin_epoch(opened.next_epoch)
        await thread.call(store._writer.flush)
        await store.wait_confirmed(end_offset, timeout_s=60)
        async with asyncio.TaskGroup() as tasks:
            runner = tasks.create_task(store._run())
            try:
                yield store
            finally:
                runner.cancel()
                await store._close()
    finally:
        opened.lock.close()


__all__ = [
    "AppendReceipt",
    "ClientBatch",
    "ConsumeQueue",
    "FlushMode",
    "MessageStore",
    "OffsetRun",
    "ReadResult",
    "ReadStatus",
    "RealDisk",
    "Record",
    "StoreConfig",
    "open_store",
]
