"""A user's message as the bytes that travel and are stored: everything but (producer_instance, sequence)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from kitemq.compression import Compression, compressor, sys_flag
from kitemq.errors import InvalidMessageError
from kitemq.message import Message
from kitemq.protocol.names import (
    BODY_BYTES_MAX,
    KEYS_MAX,
    MESSAGE_ID_CHARS_MAX,
    PROPERTIES_BYTES_MAX,
    SHARDING_KEY_CHARS_MAX,
    check_sendable,
    check_topic,
)
from kitemq.protocol.record import BORN, BORN_KEY, encode_attributes, length_delimited, varint


class MessageEncoder:
    """Encodes one producer's messages and gives them their ids."""

    def __init__(self, *, group: str, compression: Compression, compress_from_bytes: int) -> None:
        self.instance = secrets.randbits(63) | 1  # 0 would mean "none"
        self._id_prefix = f"{self.instance:016x}"
        self._next_id = 0
        self._group_field = length_delimited(0x5A, group.encode())
        self._compress: Callable[[bytes], bytes] | None = (
            compressor(compression) if compression is not Compression.NONE else None
        )
        self._compressed_flag = sys_flag(compression)
        self._compress_from_bytes = compress_from_bytes
        self._prefixes: dict[str, bytes] = {}

    def encode(self, message: Message, sharding_key: str) -> tuple[bytes, str]:
        """(bytes, message id). Raises InvalidMessageError for a message that breaks a limit."""
        prefix = self._prefixes.get(message.topic) or self._new_prefix(message.topic)
        body = message.body
        if not isinstance(body, bytes):
            raise InvalidMessageError(f"body is {type(body).__name__}, not bytes: encode it first", topic=message.topic)
        if not 0 < len(body) <= BODY_BYTES_MAX:
            raise InvalidMessageError(
                f"body has {len(body)} bytes: 1..{BODY_BYTES_MAX} are allowed", topic=message.topic
            )
        flag = 0
        if self._compress is not None and len(body) >= self._compress_from_bytes:
            compressed = self._compress(body)
            if len(compressed) < len(body):
                body, flag = compressed, self._compressed_flag
        attributes = b""
        if message.tag or message.keys or message.properties or sharding_key or flag:
            attributes = _attributes(message, sharding_key, flag)
        message_id = message.message_id
        if message_id:
            id_field = _id_field(message)
        else:
            self._next_id += 1
            message_id = f"{self._id_prefix}{self._next_id:016x}"
            id_field = b"\x32\x20" + message_id.encode()
        born = BORN.pack(BORN_KEY, int(time.time() * 1000))
        return b"".join((prefix, varint(len(body)), body, attributes, id_field, born)), message_id

    def _new_prefix(self, topic: str) -> bytes:
        check_topic(topic)
        check_sendable(topic)
        prefix = length_delimited(0x0A, topic.encode()) + self._group_field + b"\x12"
        self._prefixes[topic] = prefix
        return prefix


def _attributes(message: Message, sharding_key: str, flag: int) -> bytes:
    tag = message.tag
    if tag and ("|" in tag or tag != tag.strip() or not tag.isprintable()):
        raise InvalidMessageError(
            f"tag {tag[:40]!r} may not hold '|', outer blanks or control characters", topic=message.topic
        )
    if isinstance(message.keys, str):
        raise InvalidMessageError("keys is a string: pass a list of strings", topic=message.topic)
    if len(message.keys) > KEYS_MAX or not all(message.keys):
        raise InvalidMessageError(f"keys must be at most {KEYS_MAX} non-empty words", topic=message.topic)
    if len(sharding_key) > SHARDING_KEY_CHARS_MAX:
        raise InvalidMessageError(
            f"sharding key has {len(sharding_key)} characters: at most {SHARDING_KEY_CHARS_MAX}", topic=message.topic
        )
    if message.properties:
        size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in message.properties.items())
        if size > PROPERTIES_BYTES_MAX:
            raise InvalidMessageError(
                f"properties take {size} bytes: at most {PROPERTIES_BYTES_MAX}", topic=message.topic
            )
    return encode_attributes(
        tag=tag, keys=message.keys, properties=message.properties, sharding_key=sharding_key, sys_flag=flag
    )


def _id_field(message: Message) -> bytes:
    if len(message.message_id) > MESSAGE_ID_CHARS_MAX:
        raise InvalidMessageError(
            f"message id has {len(message.message_id)} characters: at most {MESSAGE_ID_CHARS_MAX}", topic=message.topic
        )
    return length_delimited(0x32, message.message_id.encode())
