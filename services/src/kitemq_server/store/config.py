"""What can be set about a store, each with its default and its why."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kitemq.protocol.names import RECORD_BYTES_MAX
from kitemq.protocol.record import FRAME_BYTES, RECORD_BYTES_MIN

MIB = 1024 * 1024


class FlushMode(Enum):
    """When an append counts as confirmed: once written, or once it is on disk."""

    ASYNC_FLUSH = "ASYNC_FLUSH"
    SYNC_FLUSH = "SYNC_FLUSH"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """Settings of one store. Bytes, counts and milliseconds as the names say; ends are exclusive."""

    broker_name: str = "broker"  # named in errors that reach clients, where a path must not be
    flush_mode: FlushMode = FlushMode.ASYNC_FLUSH
    flush_interval_ms: int = 500  # ASYNC_FLUSH: what a power loss may take
    segment_bytes: int = 1024 * MIB  # fixed when the store is made: replicas roll at the same byte
    allocate_bytes: int = 64 * MIB  # step of preallocation
    reserve_bytes: int = 64 * MIB  # kept for system records and snapshots when the disk is full; 0 = none
    record_bytes_max: int = RECORD_BYTES_MAX
    pending_bytes_max: int = 64 * MIB  # appends that wait in memory for a slow disk
    slow_disk_ms: int = 50  # a write or fsync over this: appends go by the store thread
    queue_file_entries: int = 300_000
    open_files_max: int = 256  # sealed segments and consume queue files kept open for reads
    snapshot_records: int = 200_000  # bounds what a restart reads again
    snapshot_bytes: int = 256 * MIB
    snapshot_interval_ms: int = 60_000
    offsets_interval_ms: int = 5_000  # what consumers may see again after a crash
    retention_hours: float = 72.0  # 0 = for ever
    retention_bytes: int = 0  # 0 = no limit
    disk_watermark_percent: int = 85  # oldest segments go above it; 0 = off
    scrub_bytes_per_s: int = 4 * MIB  # 0 = no scrub

    def __post_init__(self) -> None:
        record = FRAME_BYTES + self.record_bytes_max
        if self.segment_bytes < record + RECORD_BYTES_MIN:
            raise ValueError(
                f"segment_bytes is {self.segment_bytes}: a record of {record} bytes and the segment's last one need "
                f"{record + RECORD_BYTES_MIN}"
            )
        for name in (
            "flush_interval_ms",
            "allocate_bytes",
            "pending_bytes_max",
            "queue_file_entries",
            "open_files_max",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("reserve_bytes", "retention_hours", "retention_bytes", "scrub_bytes_per_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must not be below 0")
        if not 0 <= self.disk_watermark_percent <= 100:
            raise ValueError(f"disk_watermark_percent is {self.disk_watermark_percent}: it must be 0 (off) .. 100")
