"""What the key index holds: the bytes of its entries, made of appends and of records. Drawn in docs/format.md."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from typing import NamedTuple

from kitemq.protocol.names import GRPC_BYTES_MAX
from kitemq_server.store.appender import Appended
from kitemq_server.store.consume_queue import ENTRY
from kitemq_server.store.index_buckets import Item

RUN_BYTES_MAX = 256 * 1024  # what a look-up reads for one entry

_OFFSET = struct.Struct(">Q")
_RUN_VALUE = struct.Struct(">IQ")
_RUN_KEY_BYTES = 25
_SDK_ID = re.compile(r"[0-9a-f]{32}")
_SDK_ID_CHARS = {32}
_HALF_CHARS = 16
_AFTER_OFFSETS = b"\xff" * 9  # behind every physical offset


class Located(NamedTuple):
    """One message in the log."""

    message_id: str
    physical_offset: int
    size: int


class Run(NamedTuple):
    """A stretch of the log in which one SDK's messages lie, with counts from lowest to highest, not all of them."""

    start: int
    end: int
    producer: str
    lowest: int
    highest: int

    def may_hold(self, message_id: str) -> bool:
        """Whether the id is one of this producer's in these bounds."""
        return message_id[:_HALF_CHARS] == self.producer and self.lowest <= _count_of(message_id) <= self.highest

    def item(self) -> Item:
        """Its index entry."""
        key = b"r" + bytes.fromhex(f"{self.producer}{self.lowest:016x}") + _OFFSET.pack(self.start)
        return key, _RUN_VALUE.pack(self.end - self.start, self.highest)


def is_sdk_id(message_id: str) -> bool:
    """Whether an id is of an SDK's form: a producer, and a count."""
    return _SDK_ID.fullmatch(message_id) is not None


def _count_of(message_id: str) -> int:
    return int(message_id[_HALF_CHARS:], 16)


def run_of(start: int, end: int, message_ids: Sequence[str]) -> Run | None:
    """The run that these messages are; None when they are not of one SDK's producer, or too long to be read for one."""
    if len(message_ids) == 1:
        lowest = highest = message_ids[0]
    else:
        lowest, highest = min(message_ids), max(message_ids)
        # Of equal length and between two that begin alike, all begin alike.
        if lowest[:_HALF_CHARS] != highest[:_HALF_CHARS] or set(map(len, message_ids)) != _SDK_ID_CHARS:
            return None
        if end - start > RUN_BYTES_MAX or not is_sdk_id(highest):
            return None
    if not is_sdk_id(lowest):
        return None
    return Run(start, end, lowest[:_HALF_CHARS], _count_of(lowest), _count_of(highest))


def run_of_append(start: int, end: int, appended: Sequence[Appended]) -> Run | None:
    """As run_of, for a whole append."""
    if len(appended) == 1:
        return run_of(start, end, appended[0].message_ids)
    return run_of(start, end, list(chain.from_iterable(batch.message_ids for batch in appended)))


def id_items(messages: Sequence[Located]) -> Iterator[Item]:
    """Entries for the ids of messages that lie one behind the other."""
    first, last = messages[0], messages[-1]
    ids = [message.message_id for message in messages]
    run = run_of(first.physical_offset, last.physical_offset + last.size, ids)
    if run is not None:
        yield run.item()
    elif len(messages) > 1 and all(map(is_sdk_id, ids)):
        middle = len(messages) // 2
        yield from id_items(messages[:middle])
        yield from id_items(messages[middle:])
    else:
        for message in messages:
            yield id_prefix(message.message_id) + _OFFSET.pack(message.physical_offset), b""


def id_items_of_batch(batch: Appended) -> Iterator[Item]:
    """Entries for the ids of a batch."""
    entries = ENTRY.iter_unpack(batch.entries)
    return id_items(
        [Located(message_id, entry[0], entry[1]) for message_id, entry in zip(batch.message_ids, entries, strict=True)]
    )


def key_items_of_batch(batch: Appended) -> Iterator[Item]:
    """Entries for the keys of a batch that has some."""
    for keys, entry in zip(batch.keys, ENTRY.iter_unpack(batch.entries), strict=True):
        yield from key_items(batch.topic, keys, entry[0])


def key_items(topic: str, keys: Iterable[str], physical_offset: int) -> Iterator[Item]:
    """Entries for the keys of one message."""
    return ((key_prefix(topic, key) + _OFFSET.pack(physical_offset), b"") for key in keys)


def key_prefix(topic: str, key: str) -> bytes:
    """What all entries of a topic's key begin with."""
    return b"k" + blake2b(b"%b\0%b" % (topic.encode(), key.encode()), digest_size=8).digest()


def id_prefix(message_id: str) -> bytes:
    """What all entries of a single message id begin with."""
    return b"i" + blake2b(message_id.encode(), digest_size=8).digest()


def bounds(prefix: bytes) -> tuple[bytes, bytes]:
    """Keys of entries that begin with a prefix: from, and up to."""
    return prefix, prefix + _AFTER_OFFSETS


def run_bounds(message_id: str) -> tuple[bytes, bytes]:
    """Keys of the runs that may hold an SDK's id: from, and up to."""
    wanted = b"r" + bytes.fromhex(message_id)
    return wanted[:9], wanted + _AFTER_OFFSETS


def offset_of(key: bytes) -> int:
    """The physical offset at the end of an entry's key."""
    return int(_OFFSET.unpack(key[-8:])[0])


def parse_run(item: Item) -> Run | None:
    """The run that an entry states; None for what cannot be one: a bad disk wrote it."""
    key, value = item
    if len(key) != _RUN_KEY_BYTES or len(value) != _RUN_VALUE.size:
        return None
    length, highest = _RUN_VALUE.unpack(value)
    if length > GRPC_BYTES_MAX:  # no append is longer
        return None
    start = offset_of(key)
    return Run(start, start + length, key[1:9].hex(), _OFFSET.unpack(key[9:17])[0], highest)
