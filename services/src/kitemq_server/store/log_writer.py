"""Gets the log's bytes to the disk: from the loop while the disk is quick, by the store's thread while it is slow.

Bytes reach the files in the order of the appends either way: as long as anything waits for the thread, all that follows
waits behind it. A failed write or fsync is fatal, is never tried again, and nothing is confirmed on it; a full disk is
not, what was taken waits until there is space.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from kitemq.errors import BrokerBusyError, StoreFullError
from kitemq_server.store.commit_log import CommitLog, Segment
from kitemq_server.store.config import FlushMode, StoreConfig
from kitemq_server.store.confirm import Confirmation
from kitemq_server.store.disk import syncing, write_all
from kitemq_server.store.record import ROLL_BYTES
from kitemq_server.store.space import Space, is_full
from kitemq_server.store.store_thread import StoreThread

FULL_RETRY_S = 1.0
_BUSY_RETRY_MS = 100
_DRAIN_BYTES_MAX = 4 * 1024 * 1024

Write = tuple[Segment, bytes, int]  # segment, data, physical offset; no data = the segment begins there


class LogWriter:
    """Writes, rolls, preallocates and flushes. Methods are the loop's, but for those whose docstring says thread."""

    def __init__(
        self, log: CommitLog, space: Space, thread: StoreThread, confirmation: Confirmation, config: StoreConfig
    ) -> None:
        self._log = log
        self._space = space
        self._thread = thread
        self._confirmation = confirmation
        self._config = config
        self._slow_s = config.slow_disk_ms / 1000
        self._slow = False
        self._pending: deque[Write] = deque()
        self.pending_bytes = 0
        self._allocating = False
        self._flush_wanted = False
        self._fsync_started = 0.0
        self._flush_error: OSError | None = None
        self._directory_dirty = False
        self._written_offset = confirmation.written_offset
        self._flushed_offset = confirmation.flushed_offset
        self.fsync_observer: Callable[[float], None] | None = None

    # ---- before an append

    def check_room(self, byte_count: int, *, client: bool) -> None:
        """Makes room for an append of at most `byte_count` bytes, before anything has changed.

        Raises StoreFullError (for clients only as long as the reserve lasts) and BrokerBusyError.
        """
        if client and self._space.full:
            raise self._full_error()
        if self.pending_bytes and self.pending_bytes + byte_count > self._config.pending_bytes_max:
            raise BrokerBusyError(
                f"broker {self._config.broker_name} waits for its disk: {self.pending_bytes} bytes are to be written",
                retry_after_ms=_BUSY_RETRY_MS,
            )
        segment = self._log.segments[-1]
        end_offset = min(segment.end_offset + byte_count + ROLL_BYTES, segment.base + self._config.segment_bytes)
        if end_offset > segment.allocated and not self._deferred():
            self._allocate_now(segment, end_offset, client=client)

    def _allocate_now(self, segment: Segment, end_offset: int, *, client: bool) -> None:
        try:
            if client:
                self._space.allocate(segment, end_offset)
            else:
                self._space.allocate_from_reserve(segment, end_offset)
        except OSError as error:
            if not is_full(error):
                raise
            self._space.mark_full()
            raise self._full_error() from None

    def _full_error(self) -> StoreFullError:
        return StoreFullError(
            f"broker {self._config.broker_name} has no disk space left: {self._space.shortage}",
            retry_after_ms=int(FULL_RETRY_S * 1000),
        )

    def _deferred(self) -> bool:
        if self._pending or self.pending_bytes or self._slow:
            return True
        started = self._fsync_started
        return started > 0 and time.monotonic() - started > self._slow_s

    # ---- an append

    def write(self, data: bytes) -> None:
        """Puts `data`, which fits, at the end of the last segment. Raises OSError when the disk has failed."""
        segment = self._log.segments[-1]
        position = segment.end_offset
        segment.end_offset = position + len(data)
        if self._deferred():
            self._defer((segment, data, position))
            return
        started = time.monotonic()
        try:
            self._write_now(segment, data, position)
        except OSError as error:
            if not is_full(error):
                raise
            self._space.mark_full()
            self._defer((segment, data, position))
            return
        self._slow = time.monotonic() - started > self._slow_s
        self._written_offset = segment.end_offset
        if segment.allocated - segment.end_offset < self._config.allocate_bytes // 2:
            self._allocate_ahead()

    def roll(self) -> None:
        """Ends the segment whose ROLL record has been written and begins the next at its end."""
        segment = self._log.segments[-1]
        base = segment.end_offset
        following = Segment(base, base, base)
        deferred = self._deferred()
        try:
            if not deferred:
                self._begin(segment, following)
        except OSError as error:
            if not is_full(error):
                raise
            self._space.mark_full()
            deferred = True
        # Only now: a flush closes what is sealed and no longer the last.
        self._log.segments = (*self._log.segments, following)
        if deferred:
            self._defer((following, b"", base))

    def _write_now(self, segment: Segment, data: bytes, position: int) -> None:
        assert segment.file is not None
        if position + len(data) > segment.allocated:
            self._space.allocate_from_reserve(segment, position + len(data))
        written = segment.file.pwrite(data, position - segment.base)
        if written < len(data):
            write_all(segment.file, data[written:], position - segment.base + written)

    def _begin(self, sealed: Segment, following: Segment) -> None:
        """Loop or thread: truncates the segment that has ended, makes the next one's file and its first step."""
        if not sealed.sealed:  # else this is tried again, and a flush may have closed it since
            self._space.seal(sealed)
        if following.file is None:
            following.file = self._log.disk.open(self._log.layout.segment(following.base), create=True)
            self._directory_dirty = True
        self._space.allocate(following, following.base + min(self._config.allocate_bytes, self._config.segment_bytes))

    def _allocate_ahead(self) -> None:
        segment = self._log.segments[-1]
        if self._allocating or segment.allocated >= segment.base + self._config.segment_bytes:
            return
        self._allocating = True
        self._thread.run(self._allocate_step)

    def _allocate_step(self) -> None:
        """Thread. A full disk shows when the step is needed, not before."""
        segment = self._log.segments[-1]
        try:
            if segment.file is not None and segment.allocated < segment.base + self._config.segment_bytes:
                self._space.allocate(segment, segment.allocated + 1)
        except OSError as error:
            if not is_full(error):
                raise
        finally:
            self._allocating = False

    def recover_space(self) -> None:
        """Tries to take client appends again after the disk was full."""
        self._thread.run(self._recover_space)

    def _recover_space(self) -> None:
        segment = self._log.segments[-1]
        if segment.file is not None:
            self._space.recover(segment, segment.end_offset)

    # ---- by the thread, while the disk is slow

    def _defer(self, write: Write) -> None:
        self._pending.append(write)
        self.pending_bytes += len(write[1])
        self._thread.run(self._drain)

    def _drain(self) -> None:
        """Thread: writes what waits, as much at a time as lies side by side."""
        pending = self._pending
        while pending:
            segment, _, position = pending[0]
            data = self._gather(segment)
            started = time.monotonic()
            try:
                if segment.file is None:
                    segments = self._log.segments
                    self._begin(segments[segments.index(segment) - 1], segment)
                if data:
                    self._write_now(segment, data, position)
            except OSError as error:
                if not is_full(error):
                    raise
                self._space.mark_full()
                self._thread.post(self._thread.run_later, FULL_RETRY_S, self._drain)
                return
            end_offset = self._written_offset = position + len(data)
            while pending and pending[0][0] is segment and pending[0][2] + len(pending[0][1]) <= end_offset:
                pending.popleft()
            slow = time.monotonic() - started > self._slow_s
            self._thread.post(self._drained, len(data), end_offset, slow)

    def _gather(self, segment: Segment) -> bytes:
        """Thread: what waits first for this segment."""
        pieces: list[bytes] = []
        byte_count = 0
        for other, data, _ in list(self._pending):
            if other is not segment or (pieces and byte_count + len(data) > _DRAIN_BYTES_MAX):
                break
            pieces.append(data)
            byte_count += len(data)
        return b"".join(pieces)

    def _drained(self, byte_count: int, end_offset: int, slow: bool) -> None:
        self.pending_bytes -= byte_count
        self._slow = slow
        self._confirmation.written(end_offset)
        if self._config.flush_mode is FlushMode.SYNC_FLUSH:
            self.flush_soon()  # the flush that was asked for may have come before this write

    # ---- flush

    @property
    def dirty(self) -> bool:
        """Something has been written and not flushed."""
        return self._written_offset > self._flushed_offset

    @property
    def written_offset(self) -> int:
        """Physical offset below which everything is written."""
        return self._written_offset

    @property
    def flushed_offset(self) -> int:
        """Physical offset below which everything is on disk."""
        return self._flushed_offset

    def flush_soon(self) -> None:
        """Asks for a flush; what is appended in this turn of the loop, and until it begins, is covered."""
        if not self._flush_wanted:
            self._flush_wanted = True
            self._thread.run(self.flush)

    def flush(self) -> None:
        """Thread: everything written so far is on disk when this returns. Raises OSError, which is fatal: so does every
        later flush, as a second fsync may succeed without having written what the first one lost."""
        self._flush_wanted = False
        target = self._written_offset
        if target <= self._flushed_offset:
            return
        if self._flush_error is not None:
            raise self._flush_error
        started = self._fsync_started = time.monotonic()
        try:
            with syncing():
                self._sync(target)
        except OSError as error:
            self._flush_error = error
            raise
        finally:
            self._fsync_started = 0.0
        self._flushed_offset = target
        self._thread.post(self._flushed, target, time.monotonic() - started)

    def _sync(self, target: int) -> None:
        if self._directory_dirty:
            self._directory_dirty = False
            self._log.disk.fsync_dir(self._log.layout.commit_log)
        for segment in self._log.segments:
            if segment.end_offset > self._flushed_offset and segment.base < target and segment.file is not None:
                segment.file.fdatasync()
                if segment.sealed and segment.end_offset <= target:
                    segment.file.close()
                    segment.file = None

    def trim(self) -> None:
        """Thread: gives back what was preallocated, after the last append: the next start has no zeros to look at."""
        self.flush()
        segment = self._log.segments[-1]
        if segment.file is not None and not self._pending:
            self._space.seal(segment)
            segment.file.fdatasync()

    def close(self) -> None:
        """Closes the files that are open for writing. After the thread's end."""
        for segment in self._log.segments:
            if segment.file is not None:
                segment.file.close()
                segment.file = None

    def _flushed(self, end_offset: int, took_s: float) -> None:
        self._confirmation.flushed(end_offset)
        if self.fsync_observer is not None:
            self.fsync_observer(took_s)
