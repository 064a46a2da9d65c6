"""A shortcut for the messages that the SDK sends most: topic, group, body, id, times, and nothing else.

The SDK writes these fields in one order, so a few comparisons of bytes prove that a message consists of exactly them:
a third of what it costs to look at every field of a parsed message. Whatever looks different takes the long way.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from kitemq.errors import InvalidRequestError
from kitemq.protocol.names import check_group
from kitemq.protocol.record import BORN_KEY, IDENTITY, INSTANCE_KEY, SEQUENCE_KEY, length_delimited, varint

_TOPIC_KEY = 0x0A
_GROUP_KEY = 0x5A
_BODY_KEY = 0x12
_ID_BYTES = 32
_ID_HEAD = bytes((0x32, _ID_BYTES))
_BORN_HEAD = bytes((BORN_KEY,))
# message_id, born_timestamp_ms, producer_instance, sequence: key and value each; of the born time only the key.
_END = struct.Struct(f"<2s{_ID_BYTES}s1s8x10sQ")


class PlainMessages(NamedTuple):
    """What the store must know of a batch of plain messages."""

    message_ids: list[str]
    producer_instance: int
    first_sequence: int


def read_plain(parts: Sequence[bytes], *, topic: str, body_bytes_max: int) -> PlainMessages | None:
    """The messages, when every part is plain and nothing about it can be refused; None = look at it the long way."""
    first = parts[0]
    start = _start(first, topic)
    if start is None or len(first) < _END.size:
        return None
    instance_key, instance, sequence_key, first_sequence = IDENTITY.unpack_from(first, len(first) - IDENTITY.size)
    if instance_key != INSTANCE_KEY or sequence_key != SEQUENCE_KEY or not instance or not first_sequence:
        return None
    identity_head = first[-IDENTITY.size : -8]
    unpack_end = _END.unpack_from
    size = -1
    head: bytes | None = None
    ids = []
    sequence = first_sequence
    for part in parts:
        if len(part) != size:
            size = len(part)
            head = _head(start, size, body_bytes_max)
            end_at = size - _END.size
        if head is None or not part.startswith(head):
            return None
        id_head, message_id, born_head, part_identity_head, part_sequence = unpack_end(part, end_at)
        if (
            id_head != _ID_HEAD
            or born_head != _BORN_HEAD
            or part_identity_head != identity_head
            or part_sequence != sequence
        ):
            return None
        ids.append(message_id)
        sequence += 1
    try:
        text = b"".join(ids).decode("ascii")
    except UnicodeDecodeError:
        return None
    if not text.isprintable():
        return None
    message_ids = [text[at : at + _ID_BYTES] for at in range(0, len(text), _ID_BYTES)]
    return PlainMessages(message_ids, instance, first_sequence)


def _start(part: bytes, topic: str) -> bytes | None:
    """Topic and producer group at the beginning of `part`; None when they are not there, or not valid."""
    topic_field = _topic_field(topic)
    at = len(topic_field)
    if not part.startswith(topic_field) or len(part) < at + 2 or part[at] != _GROUP_KEY or part[at + 1] > 0x7F:
        return None
    end = at + 2 + part[at + 1]
    return part[:end] if _is_group(part[at + 2 : end]) else None


@lru_cache(maxsize=4096)
def _topic_field(topic: str) -> bytes:
    return length_delimited(_TOPIC_KEY, topic.encode())


@lru_cache(maxsize=4096)
def _is_group(name: bytes) -> bool:
    try:
        check_group(name.decode("ascii"), kind="producer group")
    except (UnicodeDecodeError, InvalidRequestError):
        return False
    return True


@lru_cache(maxsize=4096)
def _head(start: bytes, size: int, body_bytes_max: int) -> bytes | None:
    """Everything up to the body of a plain message of `size` bytes; None when there is none of that size."""
    room = size - len(start) - 1 - _END.size
    for length_bytes in range(1, 5):
        body_bytes = room - length_bytes
        if 0 < body_bytes <= body_bytes_max and len(varint(body_bytes)) == length_bytes:
            return start + bytes((_BODY_KEY,)) + varint(body_bytes)
    return None
