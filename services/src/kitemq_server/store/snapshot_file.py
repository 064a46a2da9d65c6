"""Snapshot files: JSON with a CRC, encoded in small pieces, each written so that it is whole or not there."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import google_crc32c

from kitemq_server.store.disk import Disk, read_file
from kitemq_server.store.tables import encode_messages

FORMAT_VERSION = 1
_PIECE_ITEMS = 500  # of a list: the interpreter is not held longer than a millisecond or so
_HEAD = re.compile(rb'\{"crc32c": (\d+), "state": ')


class SnapshotDamagedError(Exception):
    """The file is not a snapshot of this store, or fails its checksum; the text says which."""


def encode_snapshot(captured: dict[str, Any]) -> Iterator[bytes]:
    """The `state` member of what State.capture gave, and the scalars added to it, piece by piece."""
    members = {
        **captured,
        "topics": encode_messages(captured["topics"]),
        "groups": encode_messages(captured["groups"]),
        "queue_locks": encode_messages(captured["queue_locks"]),
        "windows": iter(captured["windows"]),
        "recent_ids": iter(captured["recent_ids"]),
    }
    offsets = captured["offsets"]
    members["offsets"] = (
        (group, [(topic, queue_id, offset) for (topic, queue_id), offset in queues.items()])
        for group, queues in offsets.items()
    )
    members["queues"] = _by_topic(captured["queues"]).items()
    separator = b"{"
    for name, value in members.items():
        yield separator + _encode(name) + b": "
        separator = b",\n"
        if name in ("offsets", "queues"):
            yield from _encode_object(value)
        elif isinstance(value, Iterator):
            yield from _encode_list(value)
        else:
            yield _encode(value)
    yield b"}"


def _by_topic(queues: Iterable[tuple[str, int, int, int]]) -> dict[str, list[tuple[int, int, int]]]:
    topics: defaultdict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for topic, queue_id, min_offset, end_offset in queues:
        topics[topic].append((queue_id, min_offset, end_offset))
    return topics


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _encode_list(items: Iterator[object]) -> Iterator[bytes]:
    separator = b"["
    while piece := list(islice(items, _PIECE_ITEMS)):
        yield separator + _encode(piece)[1:-1]
        separator = b",\n"
    yield b"]" if separator != b"[" else b"[]"


def _encode_object(items: Iterable[tuple[str, object]]) -> Iterator[bytes]:
    separator = b"{"
    for key, value in items:
        yield separator + _encode(key) + b":" + _encode(value)
        separator = b",\n"
    yield b"}" if separator != b"{" else b"{}"


def snapshot_bytes(state: bytes) -> bytes:
    """The whole file for an encoded `state`."""
    return b'{"crc32c": %d, "state": %b}\n' % (google_crc32c.value(state), state)


def load_snapshot(disk: Disk, path: Path, store_uuid: str) -> dict[str, Any]:
    """The state in a snapshot file. Raises SnapshotDamagedError."""
    data = read_file(disk, path)
    head = _HEAD.match(data)
    if head is None or not data.endswith(b"}\n"):
        raise SnapshotDamagedError("not a whole snapshot")
    state = data[head.end() : -2]
    if google_crc32c.value(state) != int(head[1]):
        raise SnapshotDamagedError("its checksum is wrong")
    try:
        decoded: dict[str, Any] = json.loads(state)
    except ValueError as error:
        raise SnapshotDamagedError(f"not JSON: {error}") from None
    if decoded["format_version"] != FORMAT_VERSION:
        raise SnapshotDamagedError(f"format version {decoded['format_version']}, this program knows {FORMAT_VERSION}")
    if decoded["store_uuid"] != store_uuid:
        raise SnapshotDamagedError(f"it belongs to store {decoded['store_uuid']}")
    return decoded
