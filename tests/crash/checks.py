"""What must hold of a store at rest: against the list model, against the bytes of its log, against one rebuilt."""

from __future__ import annotations

import random
import struct
from bisect import bisect_left
from pathlib import Path
from typing import Any

from kitemq.proto.v1 import message_pb2
from kitemq_server.store.filenames import Layout
from kitemq_server.store.message_store import ConsumeQueue, MessageStore, ReadStatus
from tests.crash.crash_disk import CrashDisk
from tests.crash.log_oracle import Derived, LogRecord, parse_record, read_log
from tests.crash.model import Model, Outline, QueueName, StoredMessage, serialized
from tests.crash.producers import KEYS, TAGS

_ENTRY = struct.Struct(">QIQ")


def queues_of(store: MessageStore) -> dict[QueueName, ConsumeQueue]:
    """The queues that hold, or held, anything."""
    return {(queue.topic, queue.queue_id): queue for queue in store._state.queues if queue.next_offset}


def read_queue(store: MessageStore, queue: ConsumeQueue, rng: random.Random) -> list[LogRecord]:
    """Everything that a consumer can read of a queue, in reads of random size."""
    records: list[LogRecord] = []
    offset = queue.min_offset
    while offset < queue.max_offset:
        result = store.read(queue, offset, count_max=rng.randint(1, 8), bytes_max=rng.choice((1, 500, 5000)))
        assert result.status is ReadStatus.FOUND, f"{queue.topic}/{queue.queue_id} at {offset}: {result.status.name}"
        assert not result.sparse
        assert result.first_queue_offset == offset
        sizes = struct.unpack(f"<{result.count}I", result.sizes)
        at = 0
        for size in sizes:
            physical_offset = struct.unpack_from("<Q", result.records, at + size - 46)[0]
            record = parse_record(result.records, at, physical_offset)
            assert record is not None, "a read returned bytes that are no record"
            assert record.size == size
            assert record.message.queue_offset == offset
            assert record.message.queue_id == queue.queue_id
            assert record.message.topic == queue.topic
            records.append(record)
            at += size
            offset += 1
        assert at == len(result.records)
        assert result.next_offset == offset
    assert store.read(queue, offset, count_max=1, bytes_max=1).status is ReadStatus.NO_NEW_MSG
    return records


def outline_of(store: MessageStore) -> Outline:
    """What the store shows."""
    return (
        {name: queue.max_offset for name, queue in queues_of(store).items() if queue.max_offset},
        {name: serialized(topic) for name, topic in store.topics.items()},
        {name: serialized(group) for name, group in store.groups.items()},
        dict(store.key_values),
    )


def check_contents(store: MessageStore, model: Model, rng: random.Random) -> None:
    """Every queue holds exactly the model's messages, byte for byte, at the model's offsets."""
    for name, queue in queues_of(store).items():
        expected = model.now.queues.get(name, [])
        assert queue.max_offset == len(expected), f"{name} ends at {queue.max_offset}, not {len(expected)}"
        for record in read_queue(store, queue, rng):
            wanted: StoredMessage = expected[record.message.queue_offset]
            assert record.part == wanted.part, f"{name} at {record.message.queue_offset}"
            found = store.read_record(record.physical_offset)
            assert found is not None
            assert found.data == record.data
        check_searches(store, queue, expected, rng)


def check_searches(store: MessageStore, queue: ConsumeQueue, expected: list[StoredMessage], rng: random.Random) -> None:
    """A filtered read gives the messages with the tag; a search by time the first that is as young."""
    tag = rng.choice(TAGS[1:])
    wanted = [
        offset
        for offset in range(queue.min_offset, queue.max_offset)
        if message_pb2.Message.FromString(expected[offset].part).tag == tag
    ]
    seen: list[int] = []
    offset = queue.min_offset
    while offset < queue.max_offset:
        result = store.read(queue, offset, count_max=3, bytes_max=10**6, tags=frozenset((tag,)))
        at = 0
        for size in struct.unpack(f"<{result.count}I", result.sizes):
            at += size
            seen.append(struct.unpack_from("<Q", result.records, at - 56)[0])
        assert result.next_offset > offset
        offset = result.next_offset
    assert seen == wanted, f"tag {tag}: {seen}, not {wanted}"
    times = [store.store_timestamp(queue, offset) for offset in range(queue.min_offset, queue.max_offset)]
    for moment in rng.sample(times, min(3, len(times))):
        first = queue.min_offset + bisect_left(times, moment + 1)
        assert store.search_timestamp(queue, moment + 1) == first


def check_offsets(store: MessageStore, model: Model) -> None:
    """Groups stand where the records of the log say."""
    seen = {
        (group, *queue): offset
        for group in store.offsets.groups()
        for queue, offset in store.offsets.of_group(group).items()
    }
    for key in seen.keys() | model.offsets.keys():
        allowed = model.offset_may_be(key)
        assert seen.get(key) in allowed, f"{key} is at {seen.get(key)}, allowed: {allowed}"
        model.offset_seen(key, seen.get(key))


def check_log(store: MessageStore, disk: CrashDisk) -> None:
    """The store knows what the bytes of its log say, and nothing but zeros lies behind them."""
    log = read_log(disk.files(), Layout(disk.root).commit_log)
    assert log.end_offset == store._log.end_offset, f"log ends at {log.end_offset}, not {store._log.end_offset}"
    assert log.clean, f"something lies behind the end of the log at {log.end_offset}"
    positions = [record.message.flushed_offset <= record.physical_offset for record in log.records]
    assert all(positions), "a record claims that more was flushed than had been written"
    times = [record.message.store_timestamp_ms for record in log.records]
    assert times == sorted(times)
    epochs = [record.message.epoch for record in log.records]
    assert epochs == sorted(epochs)
    starts = [record.message.epoch for record in log.records if record.message.record_kind == message_pb2.EPOCH]
    assert len(starts) == len(set(starts)), f"an epoch was begun twice: {starts}"
    derived = Derived(log)
    queues = queues_of(store)
    for name, queue in queues.items():
        records = derived.queues.get(name, {})
        assert sorted(records) == list(range(queue.min_offset, queue.next_offset)), f"{name}: {sorted(records)}"
        entries = queue.entries(queue.min_offset, queue.next_offset - queue.min_offset)
        for (position, size, _tags_code), offset in zip(
            _ENTRY.iter_unpack(entries), range(queue.min_offset, queue.next_offset), strict=True
        ):
            assert (position, size) == (records[offset].physical_offset, records[offset].size), f"{name} at {offset}"
    assert derived.queues.keys() <= queues.keys()
    if log.start_offset == 0:
        assert derived.topics == dict(store.topics)
        assert derived.groups == dict(store.groups)
        assert derived.key_values == dict(store.key_values)
        assert derived.epochs == [tuple(epoch) for epoch in store.epochs]


def dump(store: MessageStore, model: Model) -> dict[str, Any]:
    """Everything derived, comparable between two stores of one log. Epochs and times of the two starts left out."""
    state = store._state.capture()
    return {
        "topics": sorted(map(serialized, state["topics"])),
        "groups": sorted(map(serialized, state["groups"])),
        "offsets": {group: queues for group, queues in state["offsets"].items() if queues},
        "key_values": state["key_values"],
        "queue_locks": sorted(lock.SerializeToString() for lock in state["queue_locks"]),
        "live_floor": state["live_floor"],
        "data_version": state["data_version"],
        "queues": {
            name: (queue.min_offset, queue.next_offset, queue.max_offset) for name, queue in queues_of(store).items()
        },
        "entries": {
            name: queue.entries(queue.min_offset, queue.next_offset - queue.min_offset)
            for name, queue in queues_of(store).items()
        },
        "windows": state["windows"],
        "recent_ids": state["recent_ids"],
        "times": {
            name: [store.store_timestamp(queue, offset) for offset in range(queue.min_offset, queue.max_offset)]
            for name, queue in queues_of(store).items()
        },
        **look_ups(store, model),
    }


def look_ups(store: MessageStore, model: Model) -> dict[str, Any]:
    """What the key index finds: every message by its id, those of a key newest first."""
    ids: dict[str, int | None] = {}
    for item in model.items:
        if isinstance(item.what, StoredMessage):
            message_id = message_pb2.Message.FromString(item.what.part).message_id
            found = store.find_by_id(message_id)
            ids[message_id] = found.physical_offset if found is not None else None
    keys = {
        (topic, key): [
            record.physical_offset for record in store.find_by_key(topic, key, begin_ms=0, end_ms=2**53, count_max=1000)
        ]
        for topic in {queue[0] for queue in queues_of(store)}
        for key in KEYS
    }
    return {"ids": ids, "keys": keys}


def strip_to_log(disk: CrashDisk, root: Path, *, keep_snapshots: bool) -> CrashDisk:
    """A copy below another root with nothing but the commit log and the store's identity."""
    bare = disk.copy(root)
    layout = Layout(root)
    for path in (layout.consume_queue, layout.index, layout.damaged, layout.promised_epoch, layout.reserve):
        bare.erase(path)
    if not keep_snapshots:
        bare.erase(layout.snapshot)
    return bare


def difference(live: Any, built: Any) -> str:
    """Where two values of a dump differ."""
    if isinstance(live, dict):
        differing = {key: (live.get(key), built.get(key)) for key in live.keys() | built.keys()}
        return ", ".join(f"{key} is {a}, rebuilt: {b}" for key, (a, b) in differing.items() if a != b)
    return f"{live}, rebuilt: {built}"
