"""Builds the records of one append side by side and hands them to the log. Rolls the segment where it is full."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, count, repeat

import google_crc32c

from kitemq.protocol.record import (
    CRC,
    FLAG_GROUP_CONTINUES,
    FRAME_BYTES,
    KEY_CRC,
    KEY_PHYSICAL_OFFSET,
    KEY_QUEUE_ID,
    KEY_QUEUE_OFFSET,
    KEY_RECORD_KIND,
    KIND_MESSAGE,
    RECORD_BYTES_MIN,
    TRAILER_BYTES,
    frame_header,
)
from kitemq_server.store.commit_log import CommitLog
from kitemq_server.store.consume_queue import ENTRY, ConsumeQueue
from kitemq_server.store.log_writer import LogWriter
from kitemq_server.store.record import (
    ROLL_BYTES,
    TRAILER_OFFSETS,
    TRAILER_PREFIX,
    build_record,
    roll_record,
    trailer_suffix,
)


class RecordBuilder:
    """Records of one append. position: physical offset of the next one."""

    __slots__ = (
        "_epoch",
        "_flushed_offset",
        "_log",
        "_out",
        "_roll_at",
        "_suffix",
        "_timestamp_ms",
        "_writer",
        "position",
    )

    def __init__(
        self, log: CommitLog, writer: LogWriter, *, timestamp_ms: int, epoch: int, flushed_offset: int
    ) -> None:
        self._log = log
        self._writer = writer
        self._timestamp_ms = timestamp_ms
        self._epoch = epoch
        self._flushed_offset = flushed_offset
        self._suffix = trailer_suffix(timestamp_ms, epoch, flushed_offset)
        self._out: list[bytes] = []
        segment = log.segments[-1]
        self.position = segment.end_offset
        self._roll_at = segment.base + log.segment_bytes - ROLL_BYTES

    def add_messages(
        self, queue: ConsumeQueue, parts: Sequence[bytes | memoryview], tags_codes: Sequence[int]
    ) -> bytes:
        """Appends messages to their queue; returns their consume queue entries."""
        head = TRAILER_PREFIX.pack(KEY_RECORD_KIND, KIND_MESSAGE, KEY_QUEUE_ID, queue.queue_id)
        entries: list[bytes] = []
        done = 0
        sizes = [len(part) + RECORD_BYTES_MIN for part in parts]
        while done < len(sizes):
            positions = list(accumulate(sizes[done:], initial=self.position))
            fitting = bisect_right(positions, self._roll_at) - 1
            if fitting <= 0:
                self.roll()
                continue
            chosen = slice(done, done + fitting)
            first_offset = queue.next_offset + done
            self._add_run(parts[chosen], positions, first_offset, head)
            entries += map(ENTRY.pack, positions, sizes[chosen], tags_codes[chosen])
            self.position = positions[fitting]
            done += fitting
        data = b"".join(entries)
        queue.append(data, len(entries))
        return data

    def _add_run(
        self, parts: Sequence[bytes | memoryview], positions: Sequence[int], queue_offset: int, head: bytes
    ) -> None:
        """Messages that fit into the segment, one behind the other. By `map`, which is half of what a loop costs."""
        offsets = map(
            TRAILER_OFFSETS.pack, repeat(KEY_QUEUE_OFFSET), count(queue_offset), repeat(KEY_PHYSICAL_OFFSET), positions
        )
        frames = [frame_header(len(part) + TRAILER_BYTES) for part in parts]
        bodies = list(map(b"".join, zip(frames, parts, repeat(head), offsets, repeat(self._suffix))))
        crcs = map(CRC.pack, repeat(KEY_CRC), map(google_crc32c.value, bodies))
        self._out += chain.from_iterable(zip(bodies, crcs, strict=True))

    def add_group(self, kind: int, payloads: Sequence[bytes]) -> None:
        """Appends records that belong to no queue; several are a group, which lies in one segment."""
        if self.position + sum(map(len, payloads)) + RECORD_BYTES_MIN * len(payloads) > self._roll_at:
            self.roll()
        last = len(payloads) - 1
        for index, payload in enumerate(payloads):
            record = build_record(
                kind,
                payload,
                physical_offset=self.position,
                store_timestamp_ms=self._timestamp_ms,
                epoch=self._epoch,
                flushed_offset=self._flushed_offset,
                flags=FLAG_GROUP_CONTINUES if index < last else 0,
            )
            self._out.append(record)
            self.position += len(record)

    def roll(self) -> None:
        """Ends the segment here and goes on in the next."""
        self._out.append(
            roll_record(
                physical_offset=self.position,
                store_timestamp_ms=self._timestamp_ms,
                epoch=self._epoch,
                flushed_offset=self._flushed_offset,
            )
        )
        self.position += ROLL_BYTES
        self.write()
        self._writer.roll()
        self._roll_at = self.position + self._log.segment_bytes - ROLL_BYTES

    def write(self) -> None:
        """Puts what has been built into the log. Raises OSError when the disk has failed."""
        if self._out:
            data = b"".join(self._out)
            self._out = []
            self._writer.write(data)
            assert self._log.segments[-1].end_offset == self.position


assert RECORD_BYTES_MIN == FRAME_BYTES + TRAILER_BYTES
