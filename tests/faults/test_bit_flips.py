"""One flipped bit, anywhere in a store: it is found, reported with its place, and costs at most the record it is in."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitemq.proto.v1 import message_pb2
from kitemq_server.store.config import FlushMode, StoreConfig
from kitemq_server.store.disk import RealDisk
from kitemq_server.store.errors import StoreOpenError
from kitemq_server.store.filenames import Layout
from kitemq_server.store.message_store import MessageStore, open_store
from tests.crash.crash_disk import CrashDisk
from tests.crash.log_oracle import Log, LogRecord, parse_record, read_log
from tests.crash.producers import Producer

ROOT = Path("/store")
LAYOUT = Layout(ROOT)
BATCH_COUNT = 40
SETTLED_S = 20.0


def config() -> StoreConfig:
    return StoreConfig(
        flush_mode=FlushMode.SYNC_FLUSH,
        flush_interval_ms=10**8,
        segment_bytes=4096,
        allocate_bytes=1024,
        reserve_bytes=0,
        record_bytes_max=2048,
        queue_file_entries=8,
        snapshot_interval_ms=10**8,
        disk_watermark_percent=0,
        scrub_bytes_per_s=0,
        slow_disk_ms=60_000,
    )


@dataclass(frozen=True)
class Image:
    """A store at rest. parts: what was sent, by queue and queue offset."""

    disk: CrashDisk
    parts: dict[tuple[str, int], list[bytes]]
    log: Log


async def make_image(how: str) -> Image:
    """how: "stopped" (a snapshot at the end), "killed late" (a snapshot in the middle), "killed early" (none)."""
    rng = random.Random(1)
    disk = CrashDisk(ROOT)
    producer = Producer(0xA1)
    parts: dict[tuple[str, int], list[bytes]] = {}
    async with open_store(disk, ROOT, config()) as store:
        for topic in ("orders", "audit"):
            store.append_change(message_pb2.SystemRecord(topic_set=message_pb2.TopicConfig(name=topic)))
        for number in range(BATCH_COUNT):
            queue = (("orders", "audit")[number % 2], number // 2 % 2)
            batch = producer.batch(queue, 2, rng, equal=False).batch
            parts.setdefault(queue, []).extend(map(bytes, batch.parts))
            assert await store.wait_confirmed(store.append([batch]).end_offset, SETTLED_S)
            if how == "killed late" and number == BATCH_COUNT // 2:
                store._housekeeping.snapshot()
                await store._thread.drain()
        offset = message_pb2.GroupOffset(group="billing", topic="orders", queue_id=0, queue_offset=7)
        assert await store.wait_confirmed(store.commit_offsets([offset], durable=True), SETTLED_S)
        if how != "stopped":
            disk = disk.kill(rng)
    if how == "stopped":
        disk = disk.kill(rng)
    return Image(disk, parts, read_log(disk.files(), LAYOUT.commit_log))


@pytest.fixture(scope="module")
def images() -> dict[str, Image]:
    return {how: asyncio.run(make_image(how)) for how in ("stopped", "killed late", "killed early")}


def read_all(store: MessageStore, queue_name: tuple[str, int]) -> Iterator[LogRecord]:
    """Everything that a consumer gets of a queue."""
    queue = store.queue(*queue_name)
    assert queue is not None
    offset = queue.min_offset
    while offset < queue.max_offset:
        result = store.read(queue, offset, count_max=4, bytes_max=10**6)
        at = 0
        for size in struct.unpack(f"<{result.count}I", result.sizes):
            physical_offset = struct.unpack_from("<Q", result.records, at + size - 46)[0]
            record = parse_record(result.records, at, physical_offset)
            assert record is not None, "a read gave what is no record"
            yield record
            at += size
        assert result.next_offset > offset
        offset = result.next_offset


@dataclass
class Findings:
    """What is left of a store. lost: (queue, queue offset). damaged: physical offsets that were reported."""

    lost: list[tuple[tuple[str, int], int]] = field(default_factory=list)
    damaged: list[range] = field(default_factory=list)
    topics: set[str] = field(default_factory=set)
    offset: int | None = None
    cut: bool = False


async def examine(image: Image, disk: CrashDisk) -> Findings:
    """Opens the store and reads everything. What is read is what was sent, and what is not read was reported."""
    findings = Findings()
    async with open_store(disk, ROOT, config()) as store:
        findings.damaged = [range(damage.start, damage.end) for damage in store.recovery.damages]
        findings.cut = store.recovery.cut_from >= 0
        for name, parts in image.parts.items():
            records = {record.message.queue_offset: record for record in read_all(store, name)}
            assert all(record.part == parts[offset] for offset, record in records.items()), "changed"
            findings.lost += [(name, offset) for offset in range(len(parts)) if offset not in records]
            queue = store.queue(*name)
            assert queue is not None
            for offset in queue.damaged:
                entry = queue.entry(offset)
                assert entry is not None
                findings.damaged.append(range(entry[0], entry[0] + entry[1]))
        assert store.damaged_record_count == len(findings.damaged)
        findings.topics = set(store.topics)
        findings.offset = store.offsets.get("billing", "orders", 0)
    return findings


def flipped(image: Image, path: Path, position: int, bit: int) -> Findings:
    """The findings after one bit of one file has changed."""
    disk = image.disk.copy()
    disk.flip_bit(path, position, bit)
    return asyncio.run(examine(image, disk))


hows = st.sampled_from(("stopped", "killed late", "killed early"))
bits = st.integers(0, 7)
anywhere = st.floats(0, 1, exclude_max=True)


@given(how=hows, where=anywhere, bit=bits)
@settings(max_examples=250)
def test_in_a_record(images: dict[str, Image], how: str, where: float, bit: int) -> None:
    """Frame, producer's part or trailer, of any kind of record, in any segment."""
    image = images[how]
    position = int(where * image.log.end_offset)
    record = next(record for record in image.log.records if record.physical_offset <= position < record.end_offset)
    base = max(
        int(path.name) for path in image.disk.files() if path.parent == LAYOUT.commit_log and int(path.name) <= position
    )
    findings = flipped(image, LAYOUT.segment(base), position - base, bit)
    message = record.message
    is_last = record is image.log.records[-1]
    if message.record_kind == message_pb2.MESSAGE:
        assert findings.lost == [((message.topic, message.queue_id), message.queue_offset)]
    else:
        assert not findings.lost
    reported = any(position in damage for damage in findings.damaged)
    # Below a snapshot nobody needs what is no message; what nothing proves to have been on disk is a torn tail.
    needed = message.record_kind == message_pb2.MESSAGE or (how == "killed early" and not is_last)
    assert reported or not needed
    assert len(findings.damaged) <= 1
    change = message.system.WhichOneof("change") if how == "killed early" else None
    assert findings.topics == {"orders", "audit"} - (
        {message.system.topic_set.name} if change == "topic_set" else set()
    )
    assert findings.offset == 7 or (is_last and how != "stopped")


@given(how=hows, where=anywhere, bit=bits)
@settings(max_examples=25)
def test_behind_the_end_of_the_log(images: dict[str, Image], how: str, where: float, bit: int) -> None:
    image = images[how]
    path = max(path for path in image.disk.files() if path.parent == LAYOUT.commit_log)
    end = image.log.end_offset - int(path.name)
    size = len(image.disk.files()[path])
    if end < size:
        findings = flipped(image, path, end + int(where * (size - end)), bit)
        assert findings.cut
        assert not findings.lost
        assert not findings.damaged
        assert findings.offset == 7


@given(how=hows, where=anywhere, bit=bits)
@settings(max_examples=100)
def test_in_a_consume_queue(images: dict[str, Image], how: str, where: float, bit: int) -> None:
    """The entry is made again from the log."""
    image = images[how]
    files = [(path, data) for path, data in sorted(image.disk.files().items()) if LAYOUT.consume_queue in path.parents]
    if files:
        position = int(where * sum(len(data) for _path, data in files))
        for path, data in files:
            if position < len(data):
                findings = flipped(image, path, position, bit)
                assert not findings.lost
                assert not findings.damaged
                return
            position -= len(data)


@given(where=anywhere, bit=bits)
@settings(max_examples=50)
def test_in_a_snapshot(images: dict[str, Image], where: float, bit: int) -> None:
    """It is set aside, and the log says what it said."""
    image = images["stopped"]
    path = max(path for path in image.disk.files() if path.parent == LAYOUT.snapshot)
    disk = image.disk.copy()
    disk.flip_bit(path, int(where * len(disk.files()[path])), bit)
    assert asyncio.run(examine(image, disk)) == Findings(topics={"orders", "audit"}, offset=7)
    assert (LAYOUT.damaged / path.name) in disk.files()


@given(where=anywhere, bit=bits)
@settings(max_examples=60)
def test_in_the_stores_identity(images: dict[str, Image], where: float, bit: int) -> None:
    """The start is refused in words that name the file: nothing is taken for another store."""
    image = images["stopped"]
    position = int(where * len(image.disk.files()[LAYOUT.store_json]))
    try:
        findings = flipped(image, LAYOUT.store_json, position, bit)
    except StoreOpenError as error:
        assert str(ROOT) in str(error)
    else:  # a space that is another space now
        assert findings == Findings(topics={"orders", "audit"}, offset=7)


@given(where=anywhere, bit=bits)
@settings(max_examples=20)
def test_in_the_promised_epoch(images: dict[str, Image], where: float, bit: int) -> None:
    """Another number is no harm: an epoch never falls below that of the log. What is no number is refused."""
    image = images["stopped"]
    position = int(where * len(image.disk.files()[LAYOUT.promised_epoch]))
    try:
        findings = flipped(image, LAYOUT.promised_epoch, position, bit)
    except StoreOpenError as error:
        assert str(LAYOUT.promised_epoch) in str(error)
    else:
        assert findings == Findings(topics={"orders", "audit"}, offset=7)


async def test_in_pages_of_the_key_index(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A look-up finds nothing there, says so, and the next start makes the bucket again. The queues do not mind."""
    rng = random.Random(1)
    producer = Producer(0xA1)
    sent = [producer.batch(("orders", 0), 1, rng, equal=False).batch for _ in range(300)]
    message_ids = [message_id for batch in sent for message_id in batch.message_ids]
    async with open_store(RealDisk(), tmp_path, config()) as store:
        for batch in sent:
            store.append([batch])
    async with open_store(RealDisk(), tmp_path, config()) as store:
        assert store.find_by_id(message_ids[0]) is not None
        bucket = next((tmp_path / "index").iterdir())
        page_bytes = 4096
        with (bucket / "data.mdb").open("r+b") as file:
            for page in range(2, (bucket / "data.mdb").stat().st_size // page_bytes):  # the first two name the root
                file.seek(page * page_bytes)
                file.write(bytes(page_bytes))
        assert [store.find_by_id(message_id) for message_id in message_ids] == [None] * len(message_ids)
        assert len(list(read_all(store, ("orders", 0)))) == len(message_ids)
    assert "index bucket damaged" in caplog.text
    assert str(bucket) in caplog.text
    async with open_store(RealDisk(), tmp_path, config()) as store:
        store._housekeeping.index()
        await store._thread.drain()
        for message_id in message_ids:
            record = store.find_by_id(message_id)
            assert record is not None
            assert record.message().message_id == message_id
