"""What a start does with the log: the decision table of docs/format.md, row by row.

Damage below what is proven to have been on disk is rot: it is set aside and reported, what is valid behind it stays.
Above it, the log is cut at the first bad byte, and nothing of what was cut can ever be read again.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import zip_longest

from kitemq.protocol.record import FRAME_BYTES, KIND_ROLL
from kitemq_server.store.commit_log import CommitLog, LogReader, Segment
from kitemq_server.store.config import StoreConfig
from kitemq_server.store.disk import write_all
from kitemq_server.store.queue_repair import check_queues, rebuild_queues
from kitemq_server.store.record import ROLL_BYTES, Record, record_bytes
from kitemq_server.store.replay import Replay
from kitemq_server.store.scan import CHUNK_BYTES, find_record, is_zero, read_records
from kitemq_server.store.state import State

logger = logging.getLogger(__name__)

_FLUSH_TAILS_RECORDS = 500_000  # entries in memory while a long log is read


@dataclass(slots=True)
class Damage:
    """Bytes of the log, from `start` up to `end`, that should have been records."""

    start: int
    end: int
    reason: str


@dataclass(slots=True)
class Report:
    """What recovery did. Offsets are physical. cut_from: where the log was cut; -1 = it was not."""

    records: int = 0
    cut_from: int = -1
    rewritten_bytes: int = 0
    damages: list[Damage] = field(default_factory=list)


class Recovery:
    """One start. Runs on one thread, with nothing else using the store."""

    def __init__(self, log: CommitLog, reader: LogReader, state: State, config: StoreConfig) -> None:
        self._log = log
        self._reader = reader
        self._state = state
        self._config = config
        self._proven = 0
        self._epoch = state.epoch
        self._group: list[Record] = []
        self._applied = Replay(state)
        self._unflushed_records = 0
        self._gaps: list[Damage] = []  # below the snapshot
        self.report = Report()

    def run(self, start: int, proven: int) -> None:
        """Replays the log from `start`, makes its end sound, and leaves its last segment open for writing.

        start: what the state is true up to. proven: physical offset known to have been on disk.
        """
        self._proven = proven
        self._open_segments(start)
        broken = check_queues(self._state.queues, self._log.start_offset if self._log.segments else start)
        if broken:
            rebuild_queues(self._reader, broken, start, self._flush_tails)
            self._state.queues.files.sync()  # the snapshot says that they are complete
        end_offset = self._replay(start)
        self._applied.finish()
        self._cut(end_offset)
        self._rewrite(min(self._proven, end_offset), end_offset)
        self._state.confirm_all()
        self._finish_deletion()

    # ---- the files

    def _open_segments(self, start: int) -> None:
        """Lists the segments, each taken to reach to the end of its file or to where the next begins."""
        log = self._log
        bases = log.list_bases()
        segments = []
        for base, following in zip_longest(bases, bases[1:]):
            end = base + log.disk.file_bytes(log.layout.segment(base))
            if following is not None:
                if end < following <= start:
                    self._gaps.append(Damage(end, following, "missing"))
                end = min(end, following)
            segments.append(Segment(base, end, end))
        log.segments = tuple(segments)

    def _finish_deletion(self) -> None:
        """Segments that retention had given up when a crash came are given up again, all of them."""
        log = self._log
        live_floor = self._state.tables.live_floor
        gone = [segment for segment in log.segments[:-1] if segment.end_offset <= live_floor]
        for segment in gone:
            self._reader.forget(segment.base)
            log.disk.remove(log.layout.segment(segment.base))
        if gone:
            log.segments = log.segments[len(gone) :]
            log.disk.fsync_dir(log.layout.commit_log)
            for queue in self._state.queues:
                queue.min_offset = queue.first_at_or_after(log.start_offset)
        for gap in self._gaps:
            if gap.end > live_floor:
                self._report(gap)

    # ---- the decision table

    def _replay(self, start: int) -> int:
        """Reads from `start` to the end of the log and returns that end."""
        position = start
        segments = self._log.segments
        for segment in segments:
            if segment.end_offset <= position and segment is not segments[-1]:
                continue  # below the snapshot
            if segment.base > position:
                if not self._is_rot(position):  # row D: the file before ends early, or is not there
                    return self._torn(position)
                self._report(Damage(position, segment.base, "missing"))  # row G
                self._group.clear()
                position = segment.base
            if segment.end_offset >= position:
                position = self._replay_segment(segment, position)
            if self.report.cut_from >= 0:
                return position
        if self._group:
            return self._torn(position)  # row D
        if start > 0 and (not segments or segments[-1].end_offset < start):
            self._report(Damage(segments[-1].end_offset if segments else 0, start, "missing"))
        return position  # rows B and C

    def _replay_segment(self, segment: Segment, position: int) -> int:
        """Reads one segment from `position` and returns where its records end."""
        end = segment.end_offset
        while position < end:
            for record in read_records(self._reader, position, end):
                if not self._plausible(record):
                    break
                position = record.end_offset
                self._accept(record)
                if record.kind == KIND_ROLL:
                    self._trim(segment, position)  # rows A and B
                    return position
            if position >= end:
                break
            unproven = self._proven <= position and segment is self._log.segments[-1] and not self._group
            if unproven and is_zero(self._reader, position, end):
                return position  # row C
            if not self._is_rot(position):
                return self._torn(position)  # row D
            following = self._next_valid(position, end)
            self._group.clear()
            if following is None:
                return self._rot_to_end(segment, position)
            self._set_aside(position, following)  # row E
            position = following
        return position

    def _plausible(self, record: Record) -> bool:
        return record.epoch >= self._epoch and record.flushed_offset <= record.physical_offset

    def _is_rot(self, position: int) -> bool:
        """Whether bytes from `position` on are proven to have been on disk. Looks at everything behind it first."""
        if self._proven <= position:
            self._prove(position)
        return self._proven > position

    def _prove(self, position: int) -> None:
        """Raises `proven` to the highest flushed offset that any valid record behind `position` states.

        Inside a frame that begins there lies, as like as not, the body of a torn message, and it may hold anything:
        records there count only if they go on up to the frame's end or to that of the log.
        """
        frame_end = position + max(record_bytes(self._reader.pread(position, FRAME_BYTES), 0), 0)
        for segment in self._log.segments:
            at = max(position + 1, segment.base)
            while (found := find_record(self._reader, at, segment.end_offset)) is not None:
                proven = 0
                at = found.end_offset
                for record in read_records(self._reader, found.physical_offset, segment.end_offset):
                    at = record.end_offset
                    if self._plausible(record):
                        proven = record.flushed_offset
                if at >= min(frame_end, segment.end_offset) or is_zero(self._reader, at, segment.end_offset):
                    self._proven = max(self._proven, proven)

    def _next_valid(self, position: int, end: int) -> int | None:
        """Where the next valid record of this segment begins, behind damage at `position`."""
        size = record_bytes(self._reader.pread(position, FRAME_BYTES), 0)
        if size > 0 and position + size < end:
            record = self._reader.record_at(position + size)
            if record is not None and self._plausible(record):
                return position + size
        position += 1
        while (record := find_record(self._reader, position, end)) is not None:
            if self._plausible(record):
                return record.physical_offset
            position = record.end_offset
        return None

    def _torn(self, position: int) -> int:
        """Row D: the log ends here, or where the open group began."""
        if self._group:
            position = self._group[0].physical_offset
            self._group.clear()
        self.report.cut_from = position
        return position

    def _rot_to_end(self, segment: Segment, position: int) -> int:
        """Row F, or row E with the valid record in a later segment."""
        if segment is not self._log.segments[-1]:
            self._set_aside(position, segment.end_offset)
            return segment.end_offset
        self._set_aside(position, self._last_byte(position, segment.end_offset))
        self.report.cut_from = position
        return position

    def _last_byte(self, position: int, end: int) -> int:
        """The end of what is not zero, or of what is proven."""
        last = max(position, min(self._proven, end))
        while position < end and (chunk := self._reader.pread(position, min(CHUNK_BYTES, end - position))):
            if used := len(chunk.rstrip(b"\0")):
                last = max(last, position + used)
            position += len(chunk)
        return last

    def _trim(self, segment: Segment, end_offset: int) -> None:
        """A crash came between the segment's ROLL record and its truncation."""
        if segment.end_offset > end_offset:
            file = self._log.disk.open(self._log.layout.segment(segment.base))
            try:
                file.truncate(end_offset - segment.base)
                file.fdatasync()
            finally:
                file.close()
        segment.end_offset = segment.allocated = end_offset

    # ---- what is valid

    def _accept(self, record: Record) -> None:
        self._epoch = record.epoch
        self._proven = max(self._proven, record.flushed_offset)
        self.report.records += 1
        if record.group_continues or self._group:
            self._group.append(record)
            if record.group_continues:
                return
            for member in self._group:
                self._applied.apply(member)
            self._group.clear()
        else:
            self._applied.apply(record)
        self._unflushed_records += 1
        if self._unflushed_records >= _FLUSH_TAILS_RECORDS:
            self._flush_tails()

    def _flush_tails(self) -> None:
        """Keeps memory bounded; synced with the next snapshot, as what the snapshot before says stays true."""
        self._applied.finish()
        queues = self._state.queues
        tails = queues.take_tails()
        for tail in tails:
            queues.files.write(tail.queue.topic, tail.queue.queue_id, tail.first, tail.data)
        queues.drop_tails(tails)
        self._unflushed_records = 0

    # ---- damage

    def _report(self, damage: Damage) -> None:
        self.report.damages.append(damage)
        logger.error(
            "commit log damaged: start=%d end=%d bytes=%d what=%s",
            damage.start,
            damage.end,
            damage.end - damage.start,
            damage.reason,
        )

    def _set_aside(self, start: int, end: int) -> None:
        """Copies bytes that should have been records to `damaged/`."""
        disk = self._log.disk
        path = self._log.layout.damaged_file(start, end - start)
        file = disk.open(path, create=True)
        try:
            position = start
            while position < end and (chunk := self._reader.pread(position, min(CHUNK_BYTES, end - position))):
                write_all(file, chunk, position - start)
                position += len(chunk)
            file.fdatasync()
        finally:
            file.close()
        disk.fsync_dir(self._log.layout.damaged)
        self._report(Damage(start, end, "damaged"))

    # ---- the end of the log

    def _cut(self, end_offset: int) -> None:
        """Nothing is left behind the end of the log, on disk, before the next append."""
        log = self._log
        disk = log.disk
        kept = [segment for segment in log.segments if segment.base <= end_offset]
        for segment in log.segments[len(kept) :]:
            self._reader.forget(segment.base)
            disk.remove(log.layout.segment(segment.base))
        if not kept or kept[-1].end_offset < end_offset or self._sealed(kept[-1], end_offset):
            kept.append(Segment(end_offset, end_offset, end_offset))
        last = kept[-1]
        last.end_offset = last.allocated = end_offset
        last.file = disk.open(log.layout.segment(last.base), create=True)
        last.file.truncate(end_offset - last.base)
        last.file.fdatasync()
        disk.fsync_dir(log.layout.commit_log)
        log.segments = tuple(kept)
        if self.report.cut_from >= 0:
            logger.warning("commit log cut at its torn tail: physical_offset=%d", end_offset)

    def _sealed(self, segment: Segment, end_offset: int) -> bool:
        """Whether the segment ends there, with a ROLL record."""
        if segment.end_offset != end_offset or end_offset - segment.base < ROLL_BYTES:
            return False
        record = self._reader.record_at(end_offset - ROLL_BYTES)
        return record is not None and record.kind == KIND_ROLL

    def _rewrite(self, start: int, end: int) -> None:
        """Writes what is not proven again: after a failed fsync the page cache may show what the disk never got."""
        for segment in self._log.segments:
            position = max(start, segment.base)
            if position >= min(end, segment.end_offset):
                continue
            file = self._log.disk.open(self._log.layout.segment(segment.base))
            try:
                while position < min(end, segment.end_offset):
                    chunk = self._reader.pread(position, min(CHUNK_BYTES, segment.end_offset - position))
                    write_all(file, chunk, position - segment.base)
                    position += len(chunk)
                    self.report.rewritten_bytes += len(chunk)
                file.fdatasync()
            finally:
                file.close()
