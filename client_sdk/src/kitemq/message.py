"""What users hold: a message to send, a message received, where it lies, and the receipt of a send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kitemq import compression
from kitemq.proto.v1 import broker_pb2, message_pb2
from kitemq.protocol.record import (
    EPOCH_FROM_END,
    FRAME_BYTES,
    PHYSICAL_OFFSET_FROM_END,
    QUEUE_OFFSET_FROM_END,
    STORE_TIMESTAMP_FROM_END,
    U32,
    U64,
)


class MessageQueue(NamedTuple):
    """One queue of a topic on one broker group. Sorts as RocketMQ's do: topic, broker, id."""

    topic: str
    broker_name: str
    queue_id: int

    def __str__(self) -> str:
        return f"{self.topic}@{self.broker_name}:{self.queue_id}"


class SendStatus(Enum):
    """All four are stored messages; the last three without proof of their durability yet."""

    SEND_OK = broker_pb2.SEND_OK
    FLUSH_DISK_TIMEOUT = broker_pb2.FLUSH_DISK_TIMEOUT
    FLUSH_SLAVE_TIMEOUT = broker_pb2.FLUSH_SLAVE_TIMEOUT
    SLAVE_NOT_AVAILABLE = broker_pb2.SLAVE_NOT_AVAILABLE


SEND_STATUSES = {status.value: status for status in SendStatus}


class SendReceipt(NamedTuple):
    """Where a message was stored.

    queue_offset: -1 when an earlier try stored it so long ago that the broker no longer knows the offset.
    repeated: an earlier try of the same send had stored it.
    """

    status: SendStatus
    message_id: str
    queue: MessageQueue
    queue_offset: int
    store_timestamp_ms: int
    repeated: bool = False


@dataclass(slots=True)
class Message:
    """A message to send.

    topic: 1..127 characters of letters, digits, '_', '-', '%', '|'. body: 1 byte .. 4 MiB.
    tag: one filter word, or empty. keys: words to look the message up by. properties: at most 32,767 bytes together.
    message_id: empty = the producer makes one, 32 hex digits.
    """

    topic: str
    body: bytes
    tag: str = ""
    keys: Sequence[str] = ()
    properties: Mapping[str, str] = field(default_factory=dict)
    message_id: str = ""


class ReceivedMessage:
    """A stored message: a view of the reply it came in, its fields decoded when they are read.

    Holding one keeps the whole reply (up to `reply_bytes_max`, 1 MiB) in memory; `detach()` copies it out.
    """

    __slots__ = ("_buffer", "_end", "_parsed", "_start", "delivery_attempt", "queue")

    def __init__(self, buffer: bytes, start: int, end: int, queue: MessageQueue) -> None:
        """`buffer[start:end]` is one framed record of `queue`."""
        self._buffer = buffer
        self._start = start
        self._end = end
        self._parsed: message_pb2.Message | None = None
        self.queue = queue
        self.delivery_attempt = 1

    @property
    def raw(self) -> message_pb2.Message:
        """The record as a protobuf message."""
        parsed = self._parsed
        if parsed is None:
            parsed = message_pb2.Message.FromString(self._buffer[self._start + FRAME_BYTES : self._end])
            self._parsed = parsed
        return parsed

    @property
    def topic(self) -> str:
        return self.queue.topic

    @property
    def body(self) -> bytes:
        """The body, decompressed. Raises CorruptRecordError when it does not decompress."""
        raw = self.raw
        return compression.decompress(raw.body, raw.sys_flag) if raw.sys_flag else raw.body

    @property
    def tag(self) -> str:
        return self.raw.tag

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.raw.keys)

    @property
    def properties(self) -> dict[str, str]:
        return dict(self.raw.properties)

    @property
    def sharding_key(self) -> str:
        return self.raw.sharding_key

    @property
    def message_id(self) -> str:
        return self.raw.message_id

    @property
    def producer_group(self) -> str:
        return self.raw.producer_group

    @property
    def born_timestamp_ms(self) -> int:
        """Producer's clock, Unix milliseconds."""
        return self.raw.born_timestamp_ms

    @property
    def queue_offset(self) -> int:
        return int(U64.unpack_from(self._buffer, self._end - QUEUE_OFFSET_FROM_END)[0])

    @property
    def physical_offset(self) -> int:
        return int(U64.unpack_from(self._buffer, self._end - PHYSICAL_OFFSET_FROM_END)[0])

    @property
    def store_timestamp_ms(self) -> int:
        """Broker's clock, Unix milliseconds."""
        return int(U64.unpack_from(self._buffer, self._end - STORE_TIMESTAMP_FROM_END)[0])

    @property
    def epoch(self) -> int:
        return int(U32.unpack_from(self._buffer, self._end - EPOCH_FROM_END)[0])

    @property
    def reconsume_times(self) -> int:
        """Deliveries before this one."""
        return self.raw.origin.reconsume_times

    def detach(self) -> ReceivedMessage:
        """A copy that keeps only its own bytes alive."""
        record = self._buffer[self._start : self._end]
        copy = ReceivedMessage(record, 0, len(record), self.queue)
        copy.delivery_attempt = self.delivery_attempt
        return copy

    def __repr__(self) -> str:
        return (
            f"ReceivedMessage({self.queue}, queue_offset={self.queue_offset}, message_id={self.message_id!r}, "
            f"tag={self.tag!r}, body={len(self.raw.body)} bytes)"
        )
