"""Every structure on disk, byte for byte, as version 1 of the format has it. A change here is a new version.

The files are made once, by `python -m tests.store.test_golden`, and never again for the same version.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import KIND_MESSAGE, tags_code
from kitemq_server.store.consume_queue import ENTRY
from kitemq_server.store.index_buckets import _APPLIED, Applied
from kitemq_server.store.index_entries import Run, id_prefix, key_prefix
from kitemq_server.store.record import build_record, check_record
from kitemq_server.store.snapshot_file import load_snapshot
from tests.store.helpers import LAYOUT, NOW_MS, TOPIC, bodies, message, opened, queue_of, read_all
from tests.store.log_files import STORE_UUID, LogFiles

GOLDEN = Path(__file__).parent.parent / "golden" / "store-v1"


def record() -> bytes:
    """One message with every field of the producer's part."""
    part = message(
        b"body",
        message_id="00000000000000010000000000000002",
        tag="paid",
        keys=["k1", "k2"],
        properties={"p": "v"},
        born_timestamp_ms=NOW_MS - 5,
        producer_instance=1,
        sequence=2,
        sharding_key="user-7",
        producer_group="shop",
    )
    return build_record(
        KIND_MESSAGE,
        part,
        physical_offset=1 << 33,
        store_timestamp_ms=NOW_MS,
        epoch=5,
        flushed_offset=(1 << 33) - 100,
        queue_id=3,
        queue_offset=1 << 40,
    )


def log() -> LogFiles:
    """A sealed segment and an active one."""
    files = LogFiles().begin_epoch().message("one").key_value("k1", continues=True).key_value("k2")
    return files.message("two").flushed().roll().message("three")


def entries() -> bytes:
    """Consume queue entries: a tagged message, one without a tag, a hole."""
    return b"".join(
        (ENTRY.pack(1 << 33, 300, tags_code("paid")), ENTRY.pack((1 << 33) + 300, 76, 0), ENTRY.pack(1 << 34, 0, 0))
    )


def index() -> bytes:
    """A key index entry of each kind, and what a bucket says of itself; one a line, in hex."""
    run_key, run_value = Run(1 << 33, (1 << 33) + 4096, f"{0xAB:016x}", 7, 99).item()
    applied = Applied(bytes(range(16)), 1 << 35, 5, 1_699_999_200, 1 << 34)
    lines = (run_key, run_value, key_prefix("orders", "k1"), id_prefix("my-id"), _APPLIED.pack(*applied))
    return b"".join(line.hex().encode() + b"\n" for line in lines)


STRUCTURES = {
    "record": record,
    "segment-sealed": lambda: bytes(log().segments[0]),
    "segment-active": lambda: bytes(log().segments[max(log().segments)]),
    "consume-queue": entries,
    "index": index,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_bytes_are_as_they_were(name: str) -> None:
    assert STRUCTURES[name]() == (GOLDEN / name).read_bytes()


def test_a_golden_record_is_good() -> None:
    checked = check_record((GOLDEN / "record").read_bytes(), 1 << 33)
    assert checked is not None
    assert checked.message().keys == ["k1", "k2"]


def test_a_sealed_segment_is_a_protobuf_message() -> None:
    segment = message_pb2.Segment.FromString((GOLDEN / "segment-sealed").read_bytes())
    assert [message_pb2.RecordKind.keys()[one.record_kind] for one in segment.records] == [
        "EPOCH",
        "MESSAGE",
        "METADATA",
        "METADATA",
        "MESSAGE",
        "ROLL",
    ]


async def test_a_store_of_version_1_opens() -> None:
    """Log, consume queue and snapshot of the first version, served by this program."""
    disk = LogFiles().disk()
    for base, name in zip(sorted(log().segments), ("segment-sealed", "segment-active"), strict=True):
        disk.overwrite(LAYOUT.segment(base), (GOLDEN / name).read_bytes())
    snapshot = (GOLDEN / "snapshot.json").read_bytes()
    state = json.loads(snapshot)["state"]
    disk.overwrite(LAYOUT.snapshot_file(state["physical_offset"]), snapshot)
    disk.mkdir(LAYOUT.queue(TOPIC, 0))
    disk.overwrite(LAYOUT.queue(TOPIC, 0) / f"{0:020d}", (GOLDEN / "snapshot-queue").read_bytes())
    loaded = load_snapshot(disk, LAYOUT.snapshot_file(state["physical_offset"]), STORE_UUID)
    assert loaded == state
    async with opened(disk) as store:
        assert store.recovery.records == 1
        assert [body.decode() for body in bodies(store)] == ["one", "two", "three"]
        assert dict(store.key_values) == {"k1": "1", "k2": "1"}
        assert set(store.topics) == {TOPIC}
        assert store.offsets.get("g", TOPIC, 0) == 1
        assert queue_of(store).min_offset == 0
        assert not store.recovery.damages
        assert len(read_all(store)) == 3


def snapshot_state() -> dict[str, object]:
    """The state of the golden log at its roll."""
    position = log().bounds["roll1"][1]
    return {
        "format_version": 1,
        "store_uuid": STORE_UUID,
        "physical_offset": position,
        "flushed_offset": position,
        "topics": [{"name": TOPIC, "read_queue_count": 4, "write_queue_count": 4, "permission": 6}],
        "groups": [{"name": "g", "consume_enabled": True, "retry_max_times": 16}],
        "offsets": {"g": [[TOPIC, 0, 1]]},
        "key_values": {"k1": "1", "k2": "1"},
        "queue_locks": [{"group": "g", "topic": TOPIC, "queue_id": 1, "client_id": "c", "token": "9"}],
        "epochs": [[1, 0]],
        "live_floor": 0,
        "data_version": [NOW_MS, 1],
        "last_store_timestamp_ms": NOW_MS,
        "queues": {TOPIC: [[0, 0, 2]]},
        "windows": [[7, TOPIC, 0, NOW_MS, 0, 1, 2, 0]],
        "recent_ids": [[TOPIC, "a", 0, 1]],
    }


def _write() -> None:
    from kitemq_server.store.snapshot_file import snapshot_bytes

    GOLDEN.mkdir(parents=True)
    for name, make in STRUCTURES.items():
        (GOLDEN / name).write_bytes(make())
    files = log()
    queue = b"".join(
        ENTRY.pack(start, end - start, 0) for start, end in (files.bounds[name] for name in ("one", "two"))
    )
    (GOLDEN / "snapshot-queue").write_bytes(queue)
    (GOLDEN / "snapshot.json").write_bytes(snapshot_bytes(json.dumps(snapshot_state(), indent=1).encode()))


if __name__ == "__main__":
    _write()
