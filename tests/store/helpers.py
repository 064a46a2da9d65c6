"""Small stores, and messages for them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import FRAME_BYTES, tags_code
from kitemq_server.store.batch import AppendReceipt, ClientBatch
from kitemq_server.store.config import StoreConfig
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.disk import Disk, File
from kitemq_server.store.filenames import Layout
from kitemq_server.store.index_buckets import Buckets
from kitemq_server.store.message_store import MessageStore, open_store
from kitemq_server.store.record import record_bytes
from tests.crash.crash_disk import CrashDisk

ROOT = Path("/store")
LAYOUT = Layout(ROOT)
TOPIC = "orders"
NOW_MS = 1_700_000_000_000


class Clock:
    """A wall clock that stands still until it is moved."""

    def __init__(self, now_ms: int = NOW_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> int:
        return self.now_ms


def small(**changes: Any) -> StoreConfig:
    """Small segments, and nothing that happens by itself within a test."""
    settings: dict[str, Any] = {
        "segment_bytes": 64 * 1024,
        "allocate_bytes": 4096,
        "reserve_bytes": 0,
        "record_bytes_max": 16 * 1024,
        "flush_interval_ms": 60_000,
        "snapshot_records": 10**9,
        "disk_watermark_percent": 0,
        "scrub_bytes_per_s": 0,
        # A busy machine is not a slow disk.
        "slow_disk_ms": 60_000,
    }
    return StoreConfig(**(settings | changes))


def new_disk() -> CrashDisk:
    """An empty disk in memory."""
    return CrashDisk(ROOT)


@asynccontextmanager
async def opened(
    disk: Disk,
    config: StoreConfig | None = None,
    *,
    root: Path = ROOT,
    clock: Clock | None = None,
    buckets: Buckets | None = None,
) -> AsyncIterator[MessageStore]:
    """A small store."""
    async with open_store(disk, root, config or small(), clock_ms=clock or Clock(), buckets=buckets) as store:
        yield store


def message(body: bytes = b"x" * 100, *, topic: str = TOPIC, message_id: str = "", **fields: Any) -> bytes:
    """A producer's part."""
    return message_pb2.Message(topic=topic, body=body, message_id=message_id, **fields).SerializeToString()


def batch(
    count: int = 1,
    *,
    topic: str = TOPIC,
    queue_id: int = 0,
    body: bytes = b"x" * 100,
    instance: int = 0,
    sequence: int = 0,
    tags: Sequence[str] = (),
    ids: Sequence[str] = (),
    keys: Sequence[Sequence[str]] = (),
) -> ClientBatch:
    """Messages for one queue. Without ids, each gets one of its own if it has a producer instance, else none."""
    tags = tags or [""] * count
    if not ids:
        ids = [f"{instance:016x}{sequence + index:016x}" if instance else "" for index in range(count)]
    parts = [
        message(
            body,
            topic=topic,
            message_id=ids[index],
            tag=tags[index],
            keys=keys[index] if keys else (),
            producer_instance=instance,
            sequence=sequence + index if sequence else 0,
        )
        for index in range(count)
    ]
    return ClientBatch(
        topic=topic,
        queue_id=queue_id,
        parts=parts,
        tags_codes=[tags_code(tag) for tag in tags],
        message_ids=list(ids),
        keys=keys,
        producer_instance=instance,
        first_sequence=sequence,
    )


def topic_set(name: str = TOPIC, queues: int = 4) -> message_pb2.SystemRecord:
    """A topic is created."""
    return message_pb2.SystemRecord(
        topic_set=message_pb2.TopicConfig(name=name, read_queue_count=queues, write_queue_count=queues, permission=6)
    )


def topic_deleted(name: str = TOPIC) -> message_pb2.SystemRecord:
    """A topic is deleted."""
    return message_pb2.SystemRecord(topic_deleted=name)


async def send(store: MessageStore, *batches: ClientBatch) -> AppendReceipt:
    """Appends, and waits until it is confirmed."""
    receipt = store.append(batches)
    assert await store.wait_confirmed(receipt.end_offset, 10)
    return receipt


def queue_of(store: MessageStore, queue_id: int = 0, topic: str = TOPIC) -> ConsumeQueue:
    """A queue that is there."""
    queue = store.queue(topic, queue_id)
    assert queue is not None
    return queue


def split(records: bytes) -> list[message_pb2.Message]:
    """The messages in framed records."""
    messages = []
    start = 0
    while start < len(records):
        size = record_bytes(records, start)
        assert size > 0
        messages.append(message_pb2.Message.FromString(records[start + FRAME_BYTES : start + size]))
        start += size
    return messages


def read_all(store: MessageStore, queue_id: int = 0, topic: str = TOPIC, **options: Any) -> list[message_pb2.Message]:
    """All messages of a queue that can be read, from its first."""
    queue = store.queue(topic, queue_id)
    if queue is None:
        return []
    messages: list[message_pb2.Message] = []
    offset = queue.min_offset
    while offset < queue.max_offset:
        result = store.read(queue, offset, **({"count_max": 32, "bytes_max": 1 << 20} | options))
        assert result.next_offset > offset
        messages += split(result.records)
        offset = result.next_offset
    return messages


def bodies(store: MessageStore, queue_id: int = 0, topic: str = TOPIC) -> list[bytes]:
    """The bodies of all messages of a queue."""
    return [found.body for found in read_all(store, queue_id, topic)]


def segment_bases(disk: CrashDisk) -> list[int]:
    """Physical offsets at which segment files begin."""
    return [int(name) for name in disk.listdir(LAYOUT.commit_log)]


def overwrite(disk: Disk, path: Path, position: int, data: bytes) -> None:
    """Changes bytes of a file behind the store's back."""
    file: File = disk.open(path)
    file.pwrite(data, position)
    file.fdatasync()
    file.close()
