"""Applies records of the log to the derived state, as appends did when they were live.

Messages of one batch lie side by side, so they are gathered into a run and applied together: a restart replays hundreds
of thousands of records a second this way.
"""

from __future__ import annotations

from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import FRAME_BYTES, KIND_MESSAGE, tags_code
from kitemq_server.store.consume_queue import ENTRY
from kitemq_server.store.record import Record
from kitemq_server.store.state import State


class Replay:
    """One pass over the log. After the last record, `finish`."""

    __slots__ = ("_entries", "_first", "_instance", "_next_offset", "_next_sequence", "_queue_id", "_state", "_topic")

    def __init__(self, state: State) -> None:
        self._state = state
        self._first: Record | None = None
        self._entries: list[bytes] = []
        self._topic = ""
        self._queue_id = 0
        self._instance = 0
        self._next_offset = 0
        self._next_sequence = 0

    def apply(self, record: Record) -> None:
        """The next record."""
        if record.kind != KIND_MESSAGE:
            self.finish()
            self._state.last_store_timestamp_ms = record.store_timestamp_ms
            message = record.message()
            if message.HasField("system"):
                self._state.apply_change(message.system, record.store_timestamp_ms)
            return
        physical_offset, data, _, queue_id, queue_offset, timestamp_ms, _, _, _ = record
        message = message_pb2.Message.FromString(data[FRAME_BYTES:])
        first = self._first
        if (
            first is None
            or queue_offset != self._next_offset
            or queue_id != self._queue_id
            or message.sequence != self._next_sequence
            or message.producer_instance != self._instance
            or message.topic != self._topic
            or timestamp_ms != first.store_timestamp_ms
        ):
            self.finish()
            self._begin(record, message)
        tag = message.tag
        self._entries.append(ENTRY.pack(physical_offset, len(data), tags_code(tag) if tag else 0))
        self._next_offset += 1
        self._next_sequence += 1
        if not self._instance:
            self._state.dedupe.record_ids(self._topic, (message.message_id,), queue_id, queue_offset)

    def _begin(self, record: Record, message: message_pb2.Message) -> None:
        self._first = record
        self._topic = message.topic
        self._queue_id = record.queue_id
        self._instance = message.producer_instance
        self._next_offset = record.queue_offset
        self._next_sequence = message.sequence

    def finish(self) -> None:
        """Applies what has been gathered."""
        first = self._first
        if first is None:
            return
        state = self._state
        state.last_store_timestamp_ms = first.store_timestamp_ms
        count = len(self._entries)
        queue = state.queues.obtain(self._topic, self._queue_id)
        queue.place(first.queue_offset, first.physical_offset, b"".join(self._entries), count)
        first_sequence = self._next_sequence - count
        if self._instance and first_sequence:
            key = (self._instance, self._topic, self._queue_id)
            state.dedupe.record(key, first_sequence, count, first.queue_offset, first.store_timestamp_ms)
        self._first = None
        self._entries = []
