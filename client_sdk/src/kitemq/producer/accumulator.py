"""What waits to be sent to each queue. No I/O, no clock of its own: plain state that the sender drives.

Source: the split into API, accumulator and sender is aiokafka's.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from kitemq.errors import KiteMQError
from kitemq.message import Message, MessageQueue, SendReceipt
from kitemq.producer.selector import QueueSelector
from kitemq.protocol.record import (
    FRAME_BYTES,
    IDENTITY,
    INSTANCE_KEY,
    SEQUENCE_KEY,
    frame_header,
    length_delimited,
    varint,
)

if TYPE_CHECKING:
    from kitemq.producer.publisher import Publisher
    from kitemq.producer.sender import BrokerSender

BATCH_MESSAGES_MAX = 1024
REQUEST_BYTES_MAX = 1024 * 1024
IDENTITY_BYTES = IDENTITY.size


class Wish(NamedTuple):
    """What a send asks of its queue. Any of the first three binds the messages to what it chooses."""

    queue: MessageQueue | None = None
    sharding_key: str = ""
    selector: QueueSelector | None = None
    message: Message | None = None


ANY_QUEUE = Wish()


class Entry:
    """Messages that travel and are answered together: one of `send`, or a slice of `send_batch`.

    parts: encoded messages without their sequence. sent: written to a stream at least once, so its outcome may be
    unknown. alone: must not share a batch (its last one was refused as a whole).
    """

    __slots__ = (
        "alone",
        "body_bytes",
        "deadline",
        "first_sequence",
        "future",
        "last_error",
        "message_ids",
        "parts",
        "publisher",
        "sent",
        "wish",
    )

    def __init__(
        self,
        parts: list[bytes],
        message_ids: list[str],
        body_bytes: int,
        future: asyncio.Future[list[SendReceipt]] | None,
        deadline: float,
        wish: Wish,
        publisher: Publisher,
    ) -> None:
        self.parts = parts
        self.message_ids = message_ids
        self.body_bytes = body_bytes
        self.future = future
        self.deadline = deadline
        self.wish = wish
        self.publisher = publisher
        self.first_sequence = 0
        self.sent = False
        self.alone = False
        self.last_error: KiteMQError | None = None

    @property
    def bound(self) -> bool:
        return self.wish is not ANY_QUEUE


def count_messages(entries: Iterable[Entry]) -> int:
    """How many messages the entries hold."""
    return sum([len(entry.parts) for entry in entries])


class QueueState:
    """One queue's waiting entries, and what the broker must be told about their order."""

    __slots__ = (
        "blocked",
        "head",
        "in_flight",
        "message_count",
        "next_sequence",
        "pending",
        "queue",
        "refused",
        "resume",
        "sender",
    )

    def __init__(self, queue: MessageQueue, sender: BrokerSender) -> None:
        self.queue = queue
        self.head = length_delimited(0x0A, queue.topic.encode())  # of each QueueBatch: topic, queue id
        if queue.queue_id:
            self.head += b"\x10" + varint(queue.queue_id)
        self.sender = sender
        self.pending: deque[Entry] = deque()
        self.message_count = 0  # in `pending`
        self.next_sequence = 1
        self.in_flight = 0  # batches
        self.refused: list[Entry] = []  # refused, in order; to go first again once nothing is in flight
        self.resume = False
        self.blocked = False  # waits for a back-off, or for what is in flight behind a refusal

    def add(self, entry: Entry) -> None:
        """One more that waits."""
        self.pending.append(entry)
        self.message_count += len(entry.parts)

    def keep(self, entries: Iterable[Entry]) -> None:
        """Only these wait from now on."""
        self.pending = deque(entries)
        self.message_count = count_messages(self.pending)

    def take(self, bytes_left: int, messages_left: int) -> tuple[list[Entry], int, int]:
        """The next entries for one batch: at least one, then as many as fit. Returns them, their messages and bytes."""
        pending = self.pending
        entries: list[Entry] = []
        count = size = 0
        while pending:
            entry = pending[0]
            first = entry.first_sequence or self.next_sequence
            if entries and (
                size + entry.body_bytes > bytes_left
                or count >= messages_left
                or count + len(entry.parts) > BATCH_MESSAGES_MAX
                or entry.alone
                or entries[-1].alone
                or first != entries[-1].first_sequence + len(entries[-1].parts)  # one was moved or given up between
            ):
                break
            pending.popleft()
            if not entry.first_sequence:
                entry.first_sequence = first
                self.next_sequence = first + len(entry.parts)
            entries.append(entry)
            count += len(entry.parts)
            size += entry.body_bytes
        self.message_count -= count
        return entries, count, size

    def put_back(self, entries: list[Entry]) -> None:
        """Entries that must be sent again, in order, before everything that waits."""
        self.pending.extendleft(reversed(entries))
        self.message_count += count_messages(entries)
        self.resume = True


class BatchEncoder:
    """Numbers entries and writes them as one QueueBatch, its field key included, in pieces for one `join`.

    By hand, because a protobuf object would copy every body three times on the way.
    """

    def __init__(self, *, instance: int, queue_count: int) -> None:
        self._instance = instance
        self._queue_count = b"\x30" + varint(queue_count) if queue_count else b""

    def encode(self, state: QueueState, entries: list[Entry]) -> list[bytes]:
        """The pieces."""
        pack = IDENTITY.pack
        instance = self._instance
        pieces: list[bytes] = [b"", state.head, b""]
        sizes: list[int] = []
        for entry in entries:
            sequence = entry.first_sequence
            for part in entry.parts:
                size = len(part) + IDENTITY_BYTES
                sizes.append(size)
                pieces += (frame_header(size), part, pack(INSTANCE_KEY, instance, SEQUENCE_KEY, sequence))
                sequence += 1
        count = len(sizes)
        records_bytes = sum(sizes) + FRAME_BYTES * count
        pieces[2] = b"\x1a" + varint(records_bytes)
        tail = length_delimited(0x22, struct.pack(f"<{count}I", *sizes))
        if state.resume:
            tail += b"\x28\x01"
            state.resume = False
        tail += self._queue_count
        pieces.append(tail)
        pieces[0] = b"\x12" + varint(len(state.head) + len(pieces[2]) + records_bytes + len(tail))
        return pieces
