"""Takes snapshots: when, and in which order their parts reach the disk.

A snapshot is captured on the loop and written by the store's thread in small steps: first the log up to it, then the
consume queues, then the file itself. Only then may what it makes needless go: older snapshots, deleted topics' files.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kitemq_server.store.config import StoreConfig
from kitemq_server.store.consume_queue import Tail
from kitemq_server.store.disk import Disk, replace_file
from kitemq_server.store.filenames import Layout, parse_snapshot_name
from kitemq_server.store.log_writer import LogWriter
from kitemq_server.store.snapshot_file import FORMAT_VERSION, encode_snapshot, snapshot_bytes
from kitemq_server.store.space import Space, is_full
from kitemq_server.store.state import State
from kitemq_server.store.store_thread import StoreThread

logger = logging.getLogger(__name__)

SNAPSHOTS_KEPT = 2
_SHARE = 0.02  # of a processor that goes into snapshots, on average
_CREDIT_MAX_S = 3.0  # what may be spent at once: the first snapshot of many queues makes all their files
_REST_FACTOR = 4  # at most a fifth of the time of a disk that is busy with other things
_FULL_RETRY_S = 10.0
_TAILS_PER_STEP = 64


@dataclass(slots=True)
class Capture:
    """Everything that one snapshot needs of the loop."""

    physical_offset: int
    record_count: int
    state: dict[str, Any]
    tails: list[Tail]
    deleted_topics: dict[str, dict[int, int]]  # with the end offsets of queues that have begun anew
    cost_s: float = 0.0  # of processor time, so far


class Snapshotter:
    """Owned by the loop; `_steps` and what it calls run on the thread."""

    def __init__(
        self,
        disk: Disk,
        layout: Layout,
        config: StoreConfig,
        *,
        store_uuid: str,
        state: State,
        writer: LogWriter,
        space: Space,
        thread: StoreThread,
        kept: list[int],
    ) -> None:
        self._disk = disk
        self._layout = layout
        self._config = config
        self._store_uuid = store_uuid
        self._state = state
        self._writer = writer
        self._space = space
        self._thread = thread
        self._running = False
        self._last_offset = kept[-1] if kept else -1
        self._last_record_count = 0
        self._last_started = self._last_done = time.monotonic()
        self.kept = kept  # physical offsets of the snapshots on disk, oldest first
        self._not_before = 0.0
        self._credit_s = _CREDIT_MAX_S
        self.cost_s = 0.0  # processor time that the last one took
        self.count = 0
        self.on_done: Callable[[], None] | None = None

    @property
    def floor(self) -> int:
        """Physical offset of the oldest snapshot kept: the log from here on is needed."""
        return self.kept[0] if len(self.kept) >= SNAPSHOTS_KEPT else 0

    def due(self, physical_offset: int, record_count: int) -> bool:
        """Whether enough has changed and enough time has passed."""
        if self._running or physical_offset == self._last_offset:
            return False
        now = time.monotonic()
        if now < self._not_before:
            return False
        waited = now - self._last_started
        config = self._config
        return (
            record_count - self._last_record_count >= config.snapshot_records
            or physical_offset - self._last_offset >= config.snapshot_bytes
            or waited * 1000 >= config.snapshot_interval_ms
        )

    def may_start(self) -> bool:
        """Whether none is under way, and those before have been paid for."""
        return not self._running and time.monotonic() >= self._not_before

    def is_new(self, physical_offset: int) -> bool:
        """Whether a snapshot there would be another one than the last."""
        return physical_offset != self._last_offset

    def start(self, physical_offset: int, record_count: int) -> None:
        """Begins a snapshot, unless one is under way."""
        if self._running:
            return
        self._running = True
        self._last_started = time.monotonic()
        started = time.thread_time()
        queues = self._state.queues
        deleted = {
            topic: {queue.queue_id: queue.next_offset for queue in queues.of_topic(topic)}
            for topic in self._state.deleted_topics
        }
        capture = Capture(physical_offset, record_count, self._state.capture(), queues.take_tails(), deleted)
        capture.cost_s = time.thread_time() - started
        self._thread.run_steps(self._guarded(capture))

    # ---- on the thread

    def _guarded(self, capture: Capture) -> Iterator[None]:
        """The steps, timed; on a full disk once more, with what the reserve held."""
        steps = self._steps(capture)
        while True:
            started = time.thread_time()
            try:
                next(steps)
            except StopIteration:
                self._thread.post(self._done, capture)
                return
            except OSError as error:
                if not is_full(error):
                    raise
                if not self._space.release_reserve():
                    self._thread.post(self._abandoned)
                    return
                steps = self._steps(capture)
            capture.cost_s += time.thread_time() - started
            yield

    def _steps(self, capture: Capture) -> Iterator[None]:
        self._writer.flush()
        if self._writer.flushed_offset < capture.physical_offset:
            raise OSError(errno.ENOSPC, "the log waits for space")
        yield
        files = self._state.queues.files
        for index, tail in enumerate(capture.tails):
            if index % _TAILS_PER_STEP == 0:
                yield
            files.write(tail.queue.topic, tail.queue.queue_id, tail.first, tail.data)
        yield
        files.sync()
        yield
        pieces = []
        for piece in encode_snapshot(self._with_header(capture)):
            pieces.append(piece)
            yield
        data = snapshot_bytes(b"".join(pieces))
        yield
        replace_file(self._disk, self._layout.snapshot_file(capture.physical_offset), data)
        yield
        self._prune()
        for topic, ends in capture.deleted_topics.items():
            yield
            files.remove_deleted(topic, ends)

    def _with_header(self, capture: Capture) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "store_uuid": self._store_uuid,
            "physical_offset": capture.physical_offset,
            "flushed_offset": self._writer.flushed_offset,
            **capture.state,
        }

    def _prune(self) -> None:
        names = self._disk.listdir(self._layout.snapshot)
        offsets = sorted(offset for name in names if (offset := parse_snapshot_name(name)) is not None)
        for offset in offsets[:-SNAPSHOTS_KEPT]:
            self._disk.remove(self._layout.snapshot_file(offset))

    # ---- back on the loop

    def _done(self, capture: Capture) -> None:
        self._running = False
        now = time.monotonic()
        took_s = now - self._last_started
        self.cost_s = capture.cost_s
        earned_s = (now - self._last_done) * _SHARE
        self._last_done = now
        self._credit_s = min(self._credit_s + earned_s, _CREDIT_MAX_S) - capture.cost_s
        self._not_before = now + max(-self._credit_s / _SHARE, took_s * _REST_FACTOR)
        self.count += 1
        self._last_offset = capture.physical_offset
        self._last_record_count = capture.record_count
        self.kept = [*self.kept, capture.physical_offset][-SNAPSHOTS_KEPT:]
        self._state.queues.drop_tails(capture.tails)
        for topic in capture.deleted_topics:
            self._state.queues.files.forget(topic)
        self._state.deleted_topics.difference_update(capture.deleted_topics)
        logger.debug(
            "snapshot: physical_offset=%d cost_ms=%.1f took_ms=%.1f",
            capture.physical_offset,
            capture.cost_s * 1000,
            took_s * 1000,
        )

    def _abandoned(self) -> None:
        self._running = False
        self._not_before = time.monotonic() + _FULL_RETRY_S
        logger.warning("snapshot not taken: the disk is full")
