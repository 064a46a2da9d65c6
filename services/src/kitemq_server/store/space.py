"""Room on the disk: preallocation of segments, and the reserve that lets a full disk still record offsets.

A full disk is no failure: client appends are refused, reads go on, and preallocation is tried again until it succeeds.
"""

from __future__ import annotations

import errno
import logging
import threading

from kitemq.protocol.record import FRAME_BYTES
from kitemq_server.store.commit_log import Segment
from kitemq_server.store.config import StoreConfig
from kitemq_server.store.disk import Disk
from kitemq_server.store.filenames import Layout
from kitemq_server.store.record import ROLL_BYTES

logger = logging.getLogger(__name__)

_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
_SMALL_STEP_BYTES = 1024 * 1024  # what system records get from the reserve at a time


def is_full(error: OSError) -> bool:
    """The disk has no room left, as opposed to being broken."""
    return error.errno in _FULL_ERRNOS


class Space:
    """Called by the loop and by the store's thread; a lock keeps their preallocations apart."""

    def __init__(self, disk: Disk, layout: Layout, config: StoreConfig) -> None:
        self._disk = disk
        self._layout = layout
        self._config = config
        self._lock = threading.RLock()
        self._reserved = False
        self.full = False  # client appends are refused

    @property
    def free_bytes(self) -> int:
        """Bytes free on the store's file system."""
        return self._disk.free_bytes(self._layout.root)

    @property
    def total_bytes(self) -> int:
        """Size of the store's file system."""
        return self._disk.total_bytes(self._layout.root)

    @property
    def shortage(self) -> str:
        """In words: how much is free, and how much must be before client appends go on."""
        config = self._config
        wanted_bytes = config.allocate_bytes + (0 if self._reserved else config.reserve_bytes)
        return f"{self.free_bytes} bytes are free, {wanted_bytes} are needed"

    def allocate(self, segment: Segment, end_offset: int) -> None:
        """Makes sure of space up to `end_offset`, a whole step at a time. Raises OSError."""
        with self._lock:
            if end_offset > segment.allocated and not segment.sealed:
                self._extend(segment, end_offset, self._config.allocate_bytes)

    def seal(self, segment: Segment) -> None:
        """Gives back what the segment did not need; nothing is allocated to it any more. Raises OSError."""
        assert segment.file is not None
        with self._lock:
            segment.file.truncate(segment.end_offset - segment.base)
            segment.allocated = segment.end_offset
            segment.sealed = True

    def allocate_from_reserve(self, segment: Segment, end_offset: int) -> None:
        """As `allocate`, for what must be written also on a full disk. Raises OSError."""
        with self._lock:
            if end_offset <= segment.allocated:
                return
            step = self._config.allocate_bytes
            for smaller in (min(_SMALL_STEP_BYTES, step), 0):
                try:
                    return self._extend(segment, end_offset, step)
                except OSError as error:
                    if not is_full(error):
                        raise
                    self.release_reserve()
                step = smaller
            self._extend(segment, end_offset, step)

    def _extend(self, segment: Segment, end_offset: int, step: int) -> None:
        assert segment.file is not None
        target = min(max(end_offset, segment.allocated + step), segment.base + self._config.segment_bytes)
        segment.file.allocate(segment.allocated - segment.base, target - segment.allocated)
        segment.allocated = target

    def release_reserve(self) -> bool:
        """Gives the reserve to system records and snapshots; client appends wait until it is back.

        False when it had been given away before.
        """
        self.mark_full()
        with self._lock:
            if not self._reserved:
                return False
            self._disk.remove(self._layout.reserve)
            self._reserved = False
            return True

    def mark_full(self) -> None:
        """Client appends are refused from now on."""
        if not self.full:
            self.full = True
            logger.error("disk full, sends are refused: path=%s free_bytes=%d", self._layout.root, self.free_bytes)

    def prepare(self, segment: Segment) -> None:
        """The first step of a store that opens. On a full disk it serves reads, and sends wait for space."""
        if not self.recover(segment, segment.end_offset):
            self.mark_full()

    def recover(self, segment: Segment, end_offset: int) -> bool:
        """Tries to take the reserve back and room for the largest record; True when client appends may go on."""
        room = FRAME_BYTES + self._config.record_bytes_max + ROLL_BYTES
        try:
            self.take_reserve()
            # With less, small messages would still be taken and large ones refused, in turns every second.
            self.allocate(segment, min(end_offset + room, segment.base + self._config.segment_bytes))
        except OSError as error:
            if not is_full(error):
                raise
            return False
        if self.full:
            self.full = False
            logger.warning("disk has space again, sends go on: free_bytes=%d", self.free_bytes)
        return True

    def take_reserve(self) -> None:
        """Reserves space for later. Raises OSError."""
        with self._lock:
            if self._reserved or not self._config.reserve_bytes:
                return
            file = self._disk.open(self._layout.reserve, create=True)
            try:
                file.allocate(0, self._config.reserve_bytes)
            except OSError:
                self._disk.remove(self._layout.reserve)
                raise
            finally:
                file.close()
            self._reserved = True
