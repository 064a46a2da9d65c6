"""One queue as a consumer holds it: what is cached, what is done, where to read on. No I/O.

Bookkeeping is per chunk (one reply of the broker), so a message costs one mark in a bytearray. The smallest offset that
is not done is looked up only when somebody asks: at a commit, or before more is fetched.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Generator

from kitemq.message import MessageQueue, ReceivedMessage
from kitemq.protocol.record import QUEUE_OFFSET_FROM_END, U64


class Chunk:
    """The records of one reply, handed out one by one.

    messages: the views, made as they are taken; several takers may share it. Closing it ends all their loops.
    taken, left: how many have been handed out; how many are still to be finished.
    attempt: which delivery of these messages this is, from 1; above 1 the chunk is one message that is tried again.
    """

    __slots__ = (
        "attempt",
        "buffer",
        "done",
        "first_offset",
        "held",
        "left",
        "messages",
        "records_bytes",
        "sizes",
        "sparse",
        "started",
        "taken",
        "timer",
    )

    def __init__(
        self,
        held: HeldQueue,
        buffer: bytes,
        sizes: list[int],
        *,
        records_bytes: int,
        first_offset: int,
        sparse: bool,
        attempt: int = 1,
    ) -> None:
        self.held = held
        self.buffer = buffer
        self.sizes = sizes
        self.records_bytes = records_bytes
        self.first_offset = first_offset
        self.sparse = sparse
        self.attempt = attempt
        self.taken = 0
        self.left = len(sizes)
        self.done = bytearray(len(sizes))
        self.started = False
        self.timer: asyncio.TimerHandle | None = None
        self.messages = self._views()

    def _views(self) -> Generator[ReceivedMessage, None, None]:
        buffer, queue, attempt = self.buffer, self.held.queue, self.attempt
        skipped = self.taken
        end = sum(self.sizes[:skipped])
        for index in range(skipped, len(self.sizes)):
            start = end
            end += self.sizes[index]
            self.taken = index + 1
            message = ReceivedMessage(buffer, start, end, queue)
            if attempt > 1:
                message.delivery_attempt = attempt
            yield message

    def rest(self) -> None:
        """Stop every taker's loop; what has not been taken stays, for the next one who takes."""
        self.messages.close()
        self.messages = self._views()

    def record(self, index: int) -> bytes:
        """The framed record at `index`, copied out."""
        start = sum(self.sizes[:index])
        return self.buffer[start : start + self.sizes[index]]

    def offset(self, index: int) -> int:
        """Queue offset of the message at `index`."""
        if not self.sparse:
            return self.first_offset + index
        end = sum(self.sizes[: index + 1])
        return int(U64.unpack_from(self.buffer, end - QUEUE_OFFSET_FROM_END)[0])

    def drop(self) -> None:
        """Hand out no more; `left` is then the number of messages that are with a handler right now."""
        self.messages.close()
        self.left -= len(self.sizes) - self.taken
        if self.timer is not None:
            self.timer.cancel()


class HeldQueue:
    """A queue from the moment it is taken over to the moment it is given up.

    fetch_offset: first queue offset that has not been received. credit_*: what the broker may still send.
    waiting_messages: received and not begun. cached_bytes: received and not finished.
    paused, parked: hand nothing out; what has come meanwhile.
    committed: what the offset store is known to hold; committed_durably: whatever happens to the broker.
    rewound: the next commit may move backwards.
    """

    __slots__ = (
        "cached_bytes",
        "chunks",
        "committed",
        "committed_durably",
        "credit_bytes",
        "credit_messages",
        "dropped",
        "fetch_offset",
        "filter",
        "last_epoch",
        "number",
        "parked",
        "paused",
        "queue",
        "retries",
        "rewound",
        "settled",
        "waiting_messages",
    )

    def __init__(self, queue: MessageQueue, *, filter: str, offset: int, committed: int | None) -> None:  # noqa: A002
        self.queue = queue
        self.filter = filter
        self.fetch_offset = offset
        self.committed = committed
        self.committed_durably = True
        self.last_epoch = 0
        self.chunks: deque[Chunk] = deque()
        self.retries: dict[int, Chunk] = {}
        self.number = 0
        self.credit_messages = 0
        self.credit_bytes = 0
        self.waiting_messages = 0
        self.cached_bytes = 0
        self.rewound = False
        self.paused = False
        self.parked: list[Chunk] = []
        self.dropped = False
        self.settled = asyncio.Event()

    # ---- messages in ----

    def add(self, chunk: Chunk, *, next_offset: int, last_epoch: int) -> None:
        """A reply has come."""
        self.chunks.append(chunk)
        self.waiting_messages += len(chunk.sizes)
        self.cached_bytes += chunk.records_bytes
        self.fetch_offset = next_offset
        self.last_epoch = last_epoch

    def wanted(self, *, messages_max: int, bytes_max: int, span_max: int | None) -> tuple[int, int]:
        """Credit to give now, in messages and bytes; (0, 0) while over half of the prefetch is there or on its way."""
        if self.dropped or self.paused:
            return 0, 0
        have = self.waiting_messages + self.credit_messages
        have_bytes = self.cached_bytes + self.credit_bytes
        if 2 * have > messages_max and 2 * have_bytes > bytes_max:
            return 0, 0
        messages = messages_max - have
        if span_max is not None:
            messages = min(messages, span_max - (self.fetch_offset + self.credit_messages - self.done_offset()))
        if messages <= 0 and self.credit_messages <= 0:
            return 0, 0
        return max(messages, 0), max(bytes_max - have_bytes, 0)

    # ---- messages out ----

    def start(self, chunk: Chunk) -> None:
        """A first taker begins with `chunk`."""
        chunk.started = True
        if chunk.attempt == 1:
            self.waiting_messages -= len(chunk.sizes)

    def finish(self, chunk: Chunk) -> None:
        """Nobody works on `chunk` any more: its messages are done, or have been moved to `retries`."""
        if chunk.done[0] and self.retries.get(chunk.first_offset) is chunk:
            del self.retries[chunk.first_offset]
        if self.dropped:
            self._settle()
            return
        self.cached_bytes -= chunk.records_bytes
        chunk.messages.close()
        chunk.buffer = b""  # an unfinished chunk before this one may keep it in the row for long
        while self.chunks and not self.chunks[0].left:
            self.chunks.popleft()

    def retry(self, chunk: Chunk, index: int) -> Chunk:
        """Move one message out of its chunk, to be tried again: a chunk of its own, which holds back the offset."""
        record = chunk.record(index)
        again = Chunk(
            self,
            record,
            [len(record)],
            records_bytes=len(record),
            first_offset=chunk.offset(index),
            sparse=False,
            attempt=chunk.attempt + 1,
        )
        self.retries[again.first_offset] = again
        self.cached_bytes += again.records_bytes
        return again

    # ---- where we are ----

    def position(self) -> int:
        """Queue offset of the next message to be handed out."""
        for chunk in self.chunks:
            if chunk.taken < len(chunk.sizes):
                return chunk.offset(chunk.taken)
        return self.fetch_offset

    def done_offset(self) -> int:
        """The smallest queue offset that is not done: what may be committed."""
        offset = self.fetch_offset
        for chunk in self.chunks:
            index = chunk.done.find(0)
            if index >= 0:
                offset = chunk.offset(index)
                break
        return min(offset, min(self.retries)) if self.retries else offset

    # ---- giving it up ----

    def drop(self) -> None:
        """Hand out no more. `settled` is set once no handler works on a message of this queue."""
        if self.dropped:
            return
        self.dropped = True
        for chunk in (*self.chunks, *self.retries.values()):
            chunk.drop()
        self._settle()

    def _settle(self) -> None:
        if not any(chunk.left for chunk in (*self.chunks, *self.retries.values())):
            self.settled.set()
