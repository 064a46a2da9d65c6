"""What a client sends, checked before it may be appended.

The whole batch is parsed at once in C, and the frames are held against the stated sizes, so the slices that are stored
are exactly the messages that were checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from google.protobuf.message import DecodeError

from kitemq.errors import InvalidMessageError, InvalidRequestError
from kitemq.proto.v1 import broker_pb2, message_pb2
from kitemq.protocol.names import (
    KEYS_MAX,
    MESSAGE_ID_CHARS_MAX,
    PROPERTIES_BYTES_MAX,
    RECORD_BYTES_MAX,
    SHARDING_KEY_CHARS_MAX,
    check_group,
)
from kitemq.protocol.record import FRAME_BYTES, TRAILER_BYTES, frame_header, frame_length, tags_code
from kitemq_server.broker.plain_batch import read_plain
from kitemq_server.store.batch import ClientBatch

PART_BYTES_MAX = RECORD_BYTES_MAX - TRAILER_BYTES


@lru_cache(maxsize=4096)
def tag_problem(tag: str) -> str | None:
    """What is wrong with a non-empty tag, or None."""
    if "|" in tag or tag != tag.strip() or not tag.isprintable():
        return "may not hold '|', outer blanks or control characters"
    return None


def parse_batch(batch: broker_pb2.QueueBatch, *, body_bytes_max: int) -> ClientBatch:
    """The batch as the store takes it. Raises InvalidMessageError for the first thing that is wrong with it."""
    topic = batch.topic
    records = batch.records
    parts = split_frames(records, list(batch.sizes))
    plain = read_plain(parts, topic=topic, body_bytes_max=body_bytes_max)
    if plain is not None:
        return ClientBatch(
            topic,
            batch.queue_id,
            parts,
            (0,) * len(parts),
            plain.message_ids,
            (),
            plain.producer_instance,
            plain.first_sequence,
        )
    messages = parse_messages(records, len(parts))
    ids = check_messages(messages, topic, body_bytes_max=body_bytes_max)
    keys = [tuple(message.keys) for message in messages]
    instance = messages[0].producer_instance
    return ClientBatch(
        topic=topic,
        queue_id=batch.queue_id,
        parts=parts,
        tags_codes=[tags_code(message.tag) for message in messages],
        message_ids=ids,
        keys=keys if any(keys) else (),
        producer_instance=instance,
        first_sequence=messages[0].sequence if instance else 0,
    )


def split_frames(records: bytes, sizes: Sequence[int]) -> list[bytes]:
    """The Messages in `records`, each framed with a padded length. Raises InvalidMessageError when sizes disagree."""
    if not sizes:
        raise InvalidMessageError("batch has no messages")
    parts = []
    start = 0
    for index, size in enumerate(sizes):
        if size > PART_BYTES_MAX:
            raise InvalidMessageError(f"message {index} has {size} bytes encoded: at most {PART_BYTES_MAX}")
        frame_end = start + FRAME_BYTES
        if not records.startswith(frame_header(size), start):
            raise InvalidMessageError(
                f"message {index}: no frame of {size} bytes at byte {start} of the batch "
                "(key 0x0A, then the length as a varint padded to 5 bytes)"
            )
        start = frame_end + size
        parts.append(records[frame_end:start])
    if start != len(records):
        raise InvalidMessageError(f"sizes say that the batch has {start} bytes, but it has {len(records)}")
    return parts


def parse_messages(records: bytes, count: int) -> list[message_pb2.Message]:
    """All messages of a batch whose frames were checked. Raises InvalidMessageError when one does not parse."""
    try:
        messages = list(message_pb2.Segment.FromString(records).records)
    except DecodeError:
        raise InvalidMessageError(f"message {_first_unparsable(records)} is not a valid Message") from None
    assert len(messages) == count
    return messages


def _first_unparsable(records: bytes) -> int:
    index = start = 0
    while start < len(records):
        end = start + FRAME_BYTES + frame_length(records, start)
        try:
            message_pb2.Segment.FromString(records[start:end])
        except DecodeError:
            break
        start = end
        index += 1
    return index


def check_messages(messages: Sequence[message_pb2.Message], topic: str, *, body_bytes_max: int) -> list[str]:
    """The message ids, when every rule is kept.

    Raises InvalidMessageError for the first rule that is broken, with the message's index and what is wrong.
    """
    instance = messages[0].producer_instance
    sequence = messages[0].sequence
    ids = []
    for index, message in enumerate(messages):
        if message.topic != topic:
            raise _refusal(index, f"is for topic {message.topic[:40]!r}, its batch is not", topic)
        if message.HasField("system") or message.HasField("origin"):
            raise _refusal(index, "holds `system` or `origin`: only brokers write these", topic)
        if not 0 < len(message.body) <= body_bytes_max:
            raise _refusal(index, f"has a body of {len(message.body)} bytes: 1..{body_bytes_max} are allowed", topic)
        if message.producer_instance != instance:
            raise _refusal(index, "comes from another producer instance than message 0", topic)
        if instance and message.sequence != sequence + index:
            raise _refusal(index, f"has sequence {message.sequence}, not {sequence + index}", topic)
        if message.tag or message.keys or message.properties or message.sharding_key:
            problem = attributes_problem(message)
            if problem:
                raise _refusal(index, problem, topic)
        ids.append(message.message_id)
    if instance and not sequence:
        raise _refusal(0, "has a producer instance, but sequence 0: sequences count from 1", topic)
    if not all(ids) or max(map(len, ids)) > MESSAGE_ID_CHARS_MAX or not "".join(ids).isprintable():
        for index, message_id in enumerate(ids):
            if problem := id_problem(message_id):
                raise _refusal(index, problem, topic)
    for group in {message.producer_group for message in messages}:
        _check_producer_group(group, topic)
    return ids


def id_problem(message_id: str) -> str | None:
    """What is wrong with a message id, or None."""
    if not message_id:
        return "has no message_id: choose one and keep it on every retry"
    if len(message_id) > MESSAGE_ID_CHARS_MAX:
        return f"has a message_id of {len(message_id)} characters: at most {MESSAGE_ID_CHARS_MAX}"
    return None if message_id.isprintable() else "has a message_id with control characters"


def attributes_problem(message: message_pb2.Message) -> str | None:
    """What is wrong with tag, keys, properties or sharding key, or None."""
    if message.tag and (problem := tag_problem(message.tag)):
        return f"tag {message.tag[:40]!r} {problem}"
    keys = message.keys
    if len(keys) > KEYS_MAX or not all(keys) or not "".join(keys).isprintable():
        return f"keys must be at most {KEYS_MAX} non-empty words without control characters"
    if len(message.sharding_key) > SHARDING_KEY_CHARS_MAX:
        return f"sharding key has {len(message.sharding_key)} characters: at most {SHARDING_KEY_CHARS_MAX}"
    size = sum(len(name.encode()) + len(value.encode()) + 2 for name, value in message.properties.items())
    size += len(message.tag.encode()) + sum(len(key.encode()) + 1 for key in keys)
    if size > PROPERTIES_BYTES_MAX:
        return f"tag, keys and properties take {size} bytes together: at most {PROPERTIES_BYTES_MAX}"
    return None


def _check_producer_group(group: str, topic: str) -> None:
    if group:
        try:
            check_group(group, kind="producer group")
        except InvalidRequestError as error:
            raise InvalidMessageError(error.message, topic=topic) from None


def _refusal(index: int, problem: str, topic: str) -> InvalidMessageError:
    return InvalidMessageError(f"message {index} {problem}", topic=topic)
