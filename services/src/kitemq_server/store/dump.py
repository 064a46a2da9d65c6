"""Prints what a segment of the commit log holds, record by record, damage included. Reads a file, opens no store."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict

from kitemq.proto.v1 import message_pb2
from kitemq_server.store.commit_log import CommitLog, LogReader, Segment
from kitemq_server.store.disk import RealDisk
from kitemq_server.store.file_cache import FileCache
from kitemq_server.store.filenames import Layout, parse_offset_name
from kitemq_server.store.record import Record
from kitemq_server.store.scan import find_record, is_zero, read_records


def dump_segment(path: Path) -> Iterator[dict[str, Any]]:
    """One dict for each record of a segment file, in order, and one with the key `damaged` for what is none.

    Raises ValueError when the file is not named by its physical offset, OSError when it cannot be read.
    """
    base = parse_offset_name(path.name)
    if base is None:
        raise ValueError(f"{path.name} is not the name of a segment: 20 digits, the physical offset of its first byte")
    disk = RealDisk()
    end = base + disk.file_bytes(path)
    log = CommitLog(disk, Layout(path.absolute().parent.parent), end - base)
    log.segments = (Segment(base, end, end),)
    reader = LogReader(log, FileCache(1))
    try:
        yield from _dump(reader, base, end)
    finally:
        reader.close()


def _dump(reader: LogReader, position: int, end: int) -> Iterator[dict[str, Any]]:
    while position < end:
        for record in read_records(reader, position, end):
            yield describe(record)
            position = record.end_offset
        if position == end or is_zero(reader, position, end):
            return
        found = find_record(reader, position + 1, end)
        following = found.physical_offset if found is not None else end
        yield {"physical_offset": position, "damaged": True, "size": following - position}
        position = following


def describe(record: Record) -> dict[str, Any]:
    """What an operator wants to know of a record: the trailer's fields, and the payload without the body."""
    message = record.message()
    known = message_pb2.RecordKind.DESCRIPTOR.values_by_number.get(record.kind)
    stored = datetime.fromtimestamp(record.store_timestamp_ms / 1000, UTC)
    line: dict[str, Any] = {
        "physical_offset": record.physical_offset,
        "size": len(record.data),
        "kind": known.name if known is not None else record.kind,
        "epoch": record.epoch,
        "stored": stored.isoformat(timespec="milliseconds"),
        "flushed_offset": record.flushed_offset,
    }
    if message.topic:
        line |= {"topic": message.topic, "queue_id": record.queue_id, "queue_offset": record.queue_offset}
        line |= {"message_id": message.message_id, "body_bytes": len(message.body)}
        line |= {name: value for name, value in (("tag", message.tag), ("keys", list(message.keys))) if value}
    if message.HasField("system"):
        line["system"] = MessageToDict(message.system, preserving_proto_field_name=True)
    if record.group_continues:
        line["group_continues"] = True
    return line
