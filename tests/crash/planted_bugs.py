"""Bugs that a store could have, each planted for the time of a `with`: the histories must find every one of them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import google_crc32c

from kitemq_server.store import log_writer, message_store, opening, scan, snapshotter
from kitemq_server.store.confirm import Confirmation
from kitemq_server.store.consume_queue import ConsumeQueue, QueueFiles
from kitemq_server.store.dedupe import Dedupe
from kitemq_server.store.disk import Disk, File
from kitemq_server.store.housekeeping import Housekeeping
from kitemq_server.store.log_writer import LogWriter
from kitemq_server.store.offset_commits import OffsetCommits
from kitemq_server.store.record import Record, check_framed, check_record
from kitemq_server.store.recovery import Recovery
from tests.crash.crash_disk import CrashDisk, CrashFile

Patches = Iterator[None]


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Patches:
    """Replaces an attribute for a while."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _nothing(*_arguments: object, **_named: object) -> None:
    pass


@contextmanager
def checksums_are_not_checked() -> Patches:
    def trusting(check: Callable[[bytes, int], Record | None]) -> Callable[[bytes, int], Record | None]:
        def checked(data: bytes, physical_offset: int) -> Record | None:
            right = data[:-4] + struct.pack("<I", google_crc32c.value(data[:-6]))
            record = check(right, physical_offset)
            return None if record is None else record._replace(data=data)

        return checked

    with (
        patched(scan, "check_record", trusting(check_record)),
        patched(scan, "check_framed", trusting(check_framed)),
    ):
        yield


@contextmanager
def confirmed_when_written() -> Patches:
    """SYNC_FLUSH that does not wait for the flush."""
    begin = Confirmation.__init__

    def hasty(self: Confirmation, *arguments: Any) -> None:
        begin(self, *arguments)
        self._sync = False

    with patched(Confirmation, "__init__", hasty):
        yield


@contextmanager
def a_flush_that_does_not_sync() -> Patches:
    with patched(LogWriter, "_sync", _nothing):
        yield


@contextmanager
def the_directory_is_never_synced() -> Patches:
    with patched(CrashDisk, "fsync_dir", _nothing):
        yield


@contextmanager
def a_cut_leaves_what_follows() -> Patches:
    cut = Recovery._cut

    def careless(self: Recovery, end_offset: int) -> None:
        with patched(CrashFile, "truncate", _nothing):
            cut(self, end_offset)

    with patched(Recovery, "_cut", careless):
        yield


@contextmanager
def the_epoch_does_not_rise() -> Patches:
    open_files = opening.open_files

    def same_epoch(*arguments: Any, **named: Any) -> opening.Opened:
        opened = open_files(*arguments, **named)
        opened.next_epoch = max(1, opened.state.epoch)
        return opened

    with patched(message_store, "open_files", same_epoch):
        yield


@contextmanager
def snapshots_do_not_wait_for_queues() -> Patches:
    def forgetful(self: QueueFiles) -> None:
        self._unsynced.clear()

    with patched(QueueFiles, "sync", forgetful):
        yield


@contextmanager
def snapshots_do_not_wait_for_the_log() -> Patches:
    steps = snapshotter.Snapshotter._steps

    def hasty(self: snapshotter.Snapshotter, capture: Any) -> Iterator[None]:
        with patched(LogWriter, "flush", _nothing), patched(LogWriter, "flushed_offset", capture.physical_offset):
            yield from steps(self, capture)

    with patched(snapshotter.Snapshotter, "_steps", hasty):
        yield


@contextmanager
def snapshots_say_more_than_the_log() -> Patches:
    def hasty(self: Housekeeping) -> None:
        self._snapshotter.start(self._log.end_offset, self._appender.record_count)

    with patched(Housekeeping, "snapshot", hasty):
        yield


@contextmanager
def files_are_renamed_before_they_are_synced() -> Patches:
    def hasty(disk: Disk, path: Any, data: bytes) -> None:
        temporary = path.with_name(path.name + ".tmp")
        file = disk.open(temporary, create=True)
        file.truncate(0)
        file.pwrite(data, 0)
        file.close()
        disk.rename(temporary, path)
        disk.fsync_dir(path.parent)

    with patched(snapshotter, "replace_file", hasty), patched(opening, "replace_file", hasty):
        yield


@contextmanager
def the_unproven_tail_is_believed() -> Patches:
    """After a failed fsync, what reads show is taken to be on disk."""
    with patched(Recovery, "_rewrite", _nothing):
        yield


@contextmanager
def a_failed_flush_is_tried_again() -> Patches:
    flush = LogWriter.flush

    def stubborn(self: LogWriter) -> None:
        try:
            flush(self)
        except OSError:
            self._flush_error = None
            flush(self)

    with patched(LogWriter, "flush", stubborn):
        yield


@contextmanager
def a_torn_tail_counts_as_rot() -> Patches:
    with patched(Recovery, "_is_rot", lambda self, position: True):
        yield


@contextmanager
def repeats_are_forgotten_at_a_restart() -> Patches:
    with patched(Dedupe, "restore", _nothing):
        yield


@contextmanager
def the_rest_of_a_short_write_is_dropped() -> Patches:
    def careless(file: File, data: bytes, position: int) -> None:
        file.pwrite(data, position)

    with patched(log_writer, "write_all", careless):
        yield


@contextmanager
def durable_commits_wait_too() -> Patches:
    commit = OffsetCommits.commit

    def lazy(self: OffsetCommits, offsets: Any, *, durable: bool) -> int:
        return commit(self, offsets, durable=False)

    with patched(OffsetCommits, "commit", lazy):
        yield


@contextmanager
def what_is_not_confirmed_is_read() -> Patches:
    append = ConsumeQueue.append

    def eager(self: ConsumeQueue, entries: bytes, count: int) -> None:
        append(self, entries, count)
        self.max_offset = self.next_offset

    with patched(ConsumeQueue, "append", eager):
        yield


BUGS: tuple[Callable[[], Any], ...] = (
    checksums_are_not_checked,
    confirmed_when_written,
    a_flush_that_does_not_sync,
    the_directory_is_never_synced,
    a_cut_leaves_what_follows,
    the_epoch_does_not_rise,
    snapshots_do_not_wait_for_queues,
    snapshots_do_not_wait_for_the_log,
    snapshots_say_more_than_the_log,
    files_are_renamed_before_they_are_synced,
    the_unproven_tail_is_believed,
    a_failed_flush_is_tried_again,
    a_torn_tail_counts_as_rot,
    repeats_are_forgotten_at_a_restart,
    the_rest_of_a_short_write_is_dropped,
    durable_commits_wait_too,
    what_is_not_confirmed_is_read,
)
