"""The store's face: opens it, and names what a broker does with it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from kitemq.errors import KiteMQError, StoreFullError
from kitemq.proto.v1 import message_pb2
from kitemq_server.common.clock import SystemClock
from kitemq_server.store.appender import Appender
from kitemq_server.store.batch import AppendReceipt, ClientBatch
from kitemq_server.store.commit_log import LogReader
from kitemq_server.store.config import FlushMode, StoreConfig
from kitemq_server.store.confirm import Confirmation
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.disk import Disk, RealDisk
from kitemq_server.store.errors import StoreOpenError
from kitemq_server.store.file_cache import FileCache
from kitemq_server.store.housekeeping import Housekeeping
from kitemq_server.store.index_buckets import Buckets, LmdbBuckets, MemoryBuckets
from kitemq_server.store.index_search import FOUND_MAX, IndexSearch
from kitemq_server.store.key_index import KeyIndex
from kitemq_server.store.log_writer import LogWriter
from kitemq_server.store.offset_commits import OffsetCommits
from kitemq_server.store.opening import Opened, open_files
from kitemq_server.store.queue_reader import QueueReader, ReadResult, ReadStatus
from kitemq_server.store.record import Record
from kitemq_server.store.retention import Retention
from kitemq_server.store.scrub import Scrub
from kitemq_server.store.snapshotter import Snapshotter
from kitemq_server.store.store_thread import StoreThread
from kitemq_server.store.tables import EpochStart, LockKey, OffsetTable

logger = logging.getLogger(__name__)

_WALL_CLOCK_MS = SystemClock().wall_ms
_THREAD_FILES_MAX = 8
_END_OF_TIME_MS = 1 << 63


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
        buckets: Buckets,
    ) -> None:
        self._config = config
        self._thread = thread
        self._state = opened.state
        self._log = opened.log
        self._space = opened.space
        self._confirmation = Confirmation(config.flush_mode, opened.log.end_offset)
        self._writer = LogWriter(opened.log, opened.space, thread, self._confirmation, config)
        self._thread_reader = LogReader(opened.log, FileCache(_THREAD_FILES_MAX))
        self._log_reader = LogReader(opened.log, FileCache(config.open_files_max))
        self._index = KeyIndex(
            buckets, store_uuid=opened.store_uuid, thread_reader=self._thread_reader, feed_from=opened.log.end_offset
        )
        self._search = IndexSearch(self._index, self._log_reader)
        self._appender = Appender(
            opened.log,
            self._writer,
            opened.state,
            self._confirmation,
            config,
            clock_ms,
            on_failure=self.fail,
            on_messages=self._index.add,
        )
        self._reader = QueueReader(self._log_reader, self._write_entry)
        self.failed = failed
        self.store_uuid = opened.store_uuid
        self.recovery = opened.report
        self._make_keepers(opened, clock_ms)

    def _make_keepers(self, opened: Opened, clock_ms: Callable[[], int]) -> None:
        """What works by itself: snapshots, scrub, retention, and the rest of the housekeeping."""
        self._snapshotter = Snapshotter(
            opened.disk,
            opened.layout,
            self._config,
            store_uuid=opened.store_uuid,
            state=opened.state,
            writer=self._writer,
            space=opened.space,
            thread=self._thread,
            kept=opened.snapshots,
        )
        self._scrub = Scrub(self._thread_reader, opened.state.queues, self._reader, self._thread, time.monotonic())
        self._retention = Retention(
            log=opened.log,
            reader=self._log_reader,
            thread_reader=self._thread_reader,
            state=opened.state,
            space=opened.space,
            index=self._index,
            thread=self._thread,
            clock_ms=clock_ms,
            snapshotter=self._snapshotter,
            append_change=self.append_change,
            writer=self._writer,
        )
        self._commits = OffsetCommits(
            opened.state.tables.offsets, self._appender.append_changes, interval_ms=self._config.offsets_interval_ms
        )
        self._housekeeping = Housekeeping(
            self._config,
            log=opened.log,
            writer=self._writer,
            appender=self._appender,
            confirmation=self._confirmation,
            commits=self._commits,
            snapshotter=self._snapshotter,
            index=self._index,
            retention=self._retention,
            scrub=self._scrub,
            space=opened.space,
            thread=self._thread,
        )

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
        self._commits.append_pending()
        return self._appender.append_changes([change])

    def commit_offsets(self, offsets: Iterable[message_pb2.GroupOffset], *, durable: bool) -> int:
        """Commits consumer offsets: forwards only, unless `reset`. Visible at once.

        durable: appended at once; returns the physical end to wait for. Otherwise they go into one record every
        `offsets_interval_ms`, and 0 is returned. Raises as `append` (durable only).
        """
        end_offset = self._commits.commit(offsets, durable=durable)
        return self._log.end_offset if durable and not end_offset else end_offset

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
        return self._log_reader.record_at(physical_offset) if physical_offset < self.confirm_offset else None

    def find_by_id(self, message_id: str) -> Record | None:
        """The newest confirmed message with this id."""
        return self._search.by_id(message_id, self.confirm_offset)

    def find_by_key(
        self, topic: str, key: str, *, begin_ms: int = 0, end_ms: int = 0, count_max: int = FOUND_MAX
    ) -> list[Record]:
        """Confirmed messages of the topic with this key, stored in [begin_ms, end_ms), 0 = open; newest 64 first."""
        return self._search.by_key(
            topic,
            key,
            self.confirm_offset,
            begin_ms=begin_ms,
            end_ms=end_ms or _END_OF_TIME_MS,
            count_max=min(count_max, FOUND_MAX),
        )

    def search_timestamp(self, queue: ConsumeQueue, timestamp_ms: int) -> int:
        """First queue offset stored at or after `timestamp_ms`; max_offset when nothing is that young."""
        return self._reader.search_timestamp(queue, timestamp_ms)

    def store_timestamp(self, queue: ConsumeQueue, queue_offset: int) -> int:
        """Store timestamp in ms of the message at `queue_offset`; 0 when there is none."""
        return self._reader.store_timestamp(queue, queue_offset)

    # ---- for metrics

    @property
    def min_physical_offset(self) -> int:
        """Physical offset of the oldest byte kept."""
        return self._log.start_offset

    @property
    def live_floor(self) -> int:
        """Physical offset below which the log says that nothing is needed."""
        return self._retention.live_floor

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
        found = self._reader.damaged_record_count + self._scrub.damaged_stretch_count
        return found + len(self.recovery.damages)

    @property
    def deleted_unconsumed(self) -> Mapping[str, int]:
        """Messages deleted since the start that a group had not consumed, by group."""
        return self._retention.deleted_unconsumed

    @property
    def snapshot_cost_s(self) -> float:
        """Processor time that the last snapshot took, in seconds."""
        return self._snapshotter.cost_s

    @property
    def fsync_observer(self) -> Callable[[float], None] | None:
        """Called on the loop with the seconds that each flush took."""
        return self._writer.fsync_observer

    @fsync_observer.setter
    def fsync_observer(self, observer: Callable[[float], None] | None) -> None:
        self._writer.fsync_observer = observer

    # ---- settings

    @property
    def config(self) -> StoreConfig:
        """The settings in force."""
        return self._config

    def reconfigure(self, config: StoreConfig) -> None:
        """Takes over what may change while the store is open: retention, watermark, speed of the scrub."""
        self._config = self._housekeeping.config = replace(
            self._config,
            retention_hours=config.retention_hours,
            retention_bytes=config.retention_bytes,
            disk_watermark_percent=config.disk_watermark_percent,
            scrub_bytes_per_s=config.scrub_bytes_per_s,
        )

    # ---- life

    def fail(self, error: Exception) -> None:
        """The store is broken: waiters and appends fail from now on, `failed` is done."""
        if not self.failed.done():
            logger.error("store failed, it recovers at the next start: %r", error)
            self._confirmation.fail(f"broker {self._config.broker_name} stops: its store has failed")
            self.failed.set_result(error)

    async def _begin(self, epoch: int) -> None:
        """Begins the epoch of this start: its record is on disk before anything is served."""
        end_offset = self._log.end_offset
        await self._thread.call(lambda: self._index.open(end_offset, self.epochs))
        self._appender.epoch = epoch
        started = message_pb2.EpochStarted(epoch=epoch, first_physical_offset=end_offset, store_uuid=self.store_uuid)
        try:
            self.append_change(message_pb2.SystemRecord(epoch_started=started))
        except StoreFullError as error:
            raise StoreOpenError(f"the disk has no space left even for a start, free some: {error}") from error
        await self._flush()

    def _start_housekeeping(self) -> list[asyncio.Task[None]]:
        """A housekeeper that ends by itself has failed, and the store with it."""
        keepers = [
            asyncio.create_task(self._housekeeping.run(), name="store housekeeping"),
            asyncio.create_task(self._housekeeping.retain(), name="store retention"),
        ]
        for keeper in keepers:
            keeper.add_done_callback(self._keeper_ended)
        return keepers

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        error = None if keeper.cancelled() else keeper.exception()
        if isinstance(error, Exception):
            self.fail(error)

    async def _flush(self) -> None:
        await self._thread.call(self._writer.flush)

    def _write_entry(self, queue: ConsumeQueue, queue_offset: int, entry: bytes) -> None:
        def write() -> None:
            if not queue.deleted:
                self._state.queues.files.write(queue.topic, queue.queue_id, queue_offset, entry)

        self._thread.run(write)

    async def _close(self) -> None:
        """Leaves nothing for the next start to do, unless the store has failed."""
        try:
            if not self._confirmation.failed:
                self._index.stop()
                await self._thread.drain()
                self._housekeeping.snapshot()
                await self._flush()
                self._housekeeping.index()
                await self._thread.drain()
                await self._thread.call(self._writer.trim)
        except (OSError, KiteMQError) as error:
            logger.error("store not closed cleanly, the next start recovers it: %r", error)
        finally:
            self._confirmation.fail(f"broker {self._config.broker_name} is stopping")
            await self._thread.close()
            self._index.close()
            self._log_reader.close()
            self._thread_reader.close()
            self._state.queues.files.close()
            self._writer.close()


@asynccontextmanager
async def open_store(
    disk: Disk,
    root: Path,
    config: StoreConfig,
    *,
    clock_ms: Callable[[], int] = _WALL_CLOCK_MS,
    buckets: Buckets | None = None,
) -> AsyncIterator[MessageStore]:
    """Locks and recovers the store below `root`, begins a new epoch, and closes it cleanly at the end.

    buckets: where the key index is kept; by default in LMDB below `root` on a real disk, else in memory.
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
        if buckets is None:
            buckets = LmdbBuckets(opened.layout.index) if isinstance(disk, RealDisk) else MemoryBuckets()
        store = MessageStore(opened, config, thread, failed, clock_ms, buckets)
        keepers: list[asyncio.Task[None]] = []
        try:
            await store._begin(opened.next_epoch)
            keepers = store._start_housekeeping()
            yield store
        finally:
            for keeper in keepers:
                keeper.cancel()
            await store._close()
    finally:
        opened.lock.close()


__all__ = [
    "AppendReceipt",
    "ClientBatch",
    "ConsumeQueue",
    "FlushMode",
    "MessageStore",
    "ReadResult",
    "ReadStatus",
    "RealDisk",
    "Record",
    "StoreConfig",
    "open_store",
]
