"""Opening a store: identity, lock, snapshot, recovery, the next epoch. Runs on the store's thread."""

from __future__ import annotations

import errno
import json
import logging
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from kitemq_server.store.commit_log import CommitLog, LogReader
from kitemq_server.store.config import StoreConfig
from kitemq_server.store.consume_queue import QueueFiles
from kitemq_server.store.disk import Disk, Lock, read_file, replace_file
from kitemq_server.store.errors import StoreOpenError
from kitemq_server.store.file_cache import FileCache
from kitemq_server.store.filenames import Layout, parse_snapshot_name, parse_topic_directory, topic_directory
from kitemq_server.store.recovery import Recovery, Report
from kitemq_server.store.snapshot_file import FORMAT_VERSION, SnapshotDamagedError, load_snapshot
from kitemq_server.store.space import Space
from kitemq_server.store.state import State

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Opened:
    """A recovered store, about to be served. snapshots: physical offsets of the good ones, oldest first."""

    disk: Disk
    layout: Layout
    lock: Lock
    store_uuid: str
    log: CommitLog
    space: Space
    state: State
    snapshots: list[int]
    next_epoch: int
    report: Report


def open_files(disk: Disk, root: Path, config: StoreConfig) -> Opened:
    """Everything of a start but serving. Raises StoreOpenError and OSError."""
    started = time.monotonic()
    layout = Layout(root)
    for directory in layout.directories():
        disk.mkdir(directory)
    disk.fsync_dir(root)
    try:
        lock = disk.lock(layout.lock)
    except BlockingIOError:
        raise StoreOpenError(
            f"{root} is in use by another broker: stop that one, or choose another data directory"
        ) from None
    try:
        opened = _open_locked(disk, layout, lock, config)
    except BaseException:
        lock.close()
        raise
    report = opened.report
    logger.info(
        "store open: path=%s start=%d end=%d records_read=%d damages=%d took_ms=%d",
        root,
        opened.log.start_offset,
        opened.log.end_offset,
        report.records,
        len(report.damages),
        (time.monotonic() - started) * 1000,
    )
    return opened


def _open_locked(disk: Disk, layout: Layout, lock: Lock, config: StoreConfig) -> Opened:
    store_uuid = _identity(disk, layout, config)
    log = CommitLog(disk, layout, config.segment_bytes)
    files = QueueFiles(disk, layout, entries_per_file=config.queue_file_entries, open_files_max=config.open_files_max)
    state = State(files)
    snapshots, newest = _load_snapshots(disk, layout, store_uuid)
    bases = log.list_bases()
    start = bases[0] if bases else 0
    proven = 0
    if newest is not None:
        state.restore(newest)
        start = newest["physical_offset"]
        proven = newest["flushed_offset"]
    reader = LogReader(log, FileCache(config.open_files_max))
    recovery = Recovery(log, reader, state, config)
    recovery.run(start, proven)
    reader.close()
    _find_deleted_topics(disk, layout, state)
    space = Space(disk, layout, config)
    space.prepare(log.segments[-1])
    next_epoch = max(state.epoch, _promised_epoch(disk, layout)) + 1
    replace_file(disk, layout.promised_epoch, b"%d\n" % next_epoch)
    return Opened(disk, layout, lock, store_uuid, log, space, state, snapshots, next_epoch, recovery.report)


def identity_bytes(store_uuid: str, segment_bytes: int) -> bytes:
    """The content of store.json."""
    identity: dict[str, Any] = {
        "store_uuid": store_uuid,
        "format_version": FORMAT_VERSION,
        "segment_bytes": segment_bytes,
    }
    return json.dumps({**identity, "crc32c": _identity_crc(identity)}, indent=2).encode() + b"\n"


def _identity_crc(identity: dict[str, Any]) -> int:
    """CRC-32C of "uuid version segment_bytes"."""
    values = (identity.get("store_uuid"), identity.get("format_version"), identity.get("segment_bytes"))
    return int(google_crc32c.value(" ".join(map(str, values)).encode()))


def _identity(disk: Disk, layout: Layout, config: StoreConfig) -> str:
    """Checks store.json, or writes it for a new store; returns the store's uuid."""
    try:
        data = read_file(disk, layout.store_json)
    except FileNotFoundError:
        if disk.listdir(layout.commit_log):
            raise StoreOpenError(f"{layout.store_json} is missing, but there is a commit log: restore it") from None
        data = identity_bytes(str(uuid.uuid4()), config.segment_bytes)
        replace_file(disk, layout.store_json, data)
    try:
        identity: dict[str, Any] = json.loads(data)
    except ValueError as error:
        raise StoreOpenError(f"{layout.store_json} is not valid JSON ({error}): restore it") from error
    version = identity.get("format_version")
    if version != FORMAT_VERSION:
        raise StoreOpenError(f"{layout.root} has format version {version}; this program reads {FORMAT_VERSION}")
    if identity.get("crc32c") != _identity_crc(identity):
        raise StoreOpenError(f"{layout.store_json} is damaged, its checksum is wrong: restore it")
    if identity.get("segment_bytes") != config.segment_bytes:
        raise StoreOpenError(
            f"{layout.root} was made with segment_bytes={identity.get('segment_bytes')}, the configuration says "
            f"{config.segment_bytes}: the size is fixed when a store is made, set it back"
        )
    return str(identity["store_uuid"])


def _load_snapshots(disk: Disk, layout: Layout, store_uuid: str) -> tuple[list[int], dict[str, Any] | None]:
    """Offsets of the snapshots, oldest first, and the newest good one. Damaged ones are reported and set aside."""
    names = disk.listdir(layout.snapshot)
    offsets = sorted(offset for name in names if (offset := parse_snapshot_name(name)) is not None)
    while offsets:
        path = layout.snapshot_file(offsets[-1])
        try:
            return offsets, load_snapshot(disk, path, store_uuid)
        except (SnapshotDamagedError, OSError) as error:
            if isinstance(error, OSError) and error.errno != errno.EIO:
                raise
            logger.error("snapshot damaged, the one before is used: path=%s what=%s", path, error)
            with suppress(OSError):  # keeping it is a courtesy
                replace_file(disk, layout.damaged / path.name, read_file(disk, path))
            disk.remove(path)
            disk.fsync_dir(layout.snapshot)
            offsets.pop()
    return [], None


def _find_deleted_topics(disk: Disk, layout: Layout, state: State) -> None:
    """A crash may have come between a topic's deletion and that of its files."""
    known = {topic_directory(queue.topic) for queue in state.queues}
    state.deleted_topics.update(
        parse_topic_directory(name) for name in disk.listdir(layout.consume_queue) if name not in known
    )


def _promised_epoch(disk: Disk, layout: Layout) -> int:
    try:
        text = read_file(disk, layout.promised_epoch)
    except FileNotFoundError:
        return 0
    if not text.strip().isdigit():
        raise StoreOpenError(f"{layout.promised_epoch} does not hold a number: restore it")
    return int(text)
