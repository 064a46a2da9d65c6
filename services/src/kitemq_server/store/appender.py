"""The append: one plain function from checked batches to bytes on their way to the disk. The hottest code of a broker.

Everything that can be refused is refused before anything changes; from then on nothing but a broken disk stops it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from kitemq.errors import BrokerUnavailableError, InvalidMessageError, InvalidRequestError
from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import KIND_EPOCH, KIND_LIVE_FLOOR, KIND_METADATA, RECORD_BYTES_MIN, TRAILER_BYTES
from kitemq_server.store.batch import AppendReceipt, ClientBatch, OffsetRun
from kitemq_server.store.commit_log import CommitLog
from kitemq_server.store.config import FlushMode, StoreConfig
from kitemq_server.store.confirm import Confirmation
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.dedupe import NEW, UNKNOWN, Stretch
from kitemq_server.store.log_writer import LogWriter
from kitemq_server.store.record import system_payload
from kitemq_server.store.record_builder import RecordBuilder
from kitemq_server.store.state import State

_KINDS = {"epoch_started": KIND_EPOCH, "live_floor_raised": KIND_LIVE_FLOOR}


class Appended(NamedTuple):
    """Messages of one batch that have just been appended: what the key index needs. entries: their consume queue's."""

    topic: str
    message_ids: Sequence[str]
    keys: Sequence[Sequence[str]]
    entries: bytes


class Appender:
    """Builds records, puts them into the log, and changes the derived state with them. Loop only.

    on_failure: told of a broken disk. on_messages: told (timestamp in ms, start and end physical offset, batches) of
    every append with messages.
    """

    def __init__(
        self,
        log: CommitLog,
        writer: LogWriter,
        state: State,
        confirmation: Confirmation,
        config: StoreConfig,
        clock_ms: Callable[[], int],
        *,
        on_failure: Callable[[Exception], None],
        on_messages: Callable[[int, int, int, list[Appended]], None],
    ) -> None:
        self._log = log
        self._writer = writer
        self._state = state
        self._confirmation = confirmation
        self._clock_ms = clock_ms
        self._on_failure = on_failure
        self._on_messages = on_messages
        self._part_bytes_max = config.record_bytes_max - TRAILER_BYTES
        self._sync = config.flush_mode is FlushMode.SYNC_FLUSH
        self.epoch = 0
        self.record_count = 0

    def append(self, batches: Sequence[ClientBatch]) -> AppendReceipt:
        """Appends all batches, or raises and appends none. See MessageStore.append."""
        byte_count = 0
        for batch in batches:
            sizes = list(map(len, batch.parts))
            assert 0 < len(sizes) == len(batch.tags_codes) == len(batch.message_ids)
            assert not batch.keys or len(batch.keys) == len(sizes)
            if max(sizes) > self._part_bytes_max:
                raise InvalidMessageError(
                    f"message has {max(sizes)} bytes encoded: at most {self._part_bytes_max}", topic=batch.topic
                )
            byte_count += sum(sizes) + RECORD_BYTES_MIN * len(sizes)
        builder = self._begin(byte_count, client=True)
        start_offset = builder.position
        timestamp_ms = self._state.last_store_timestamp_ms
        queues: dict[ConsumeQueue, None] = {}
        appended: list[Appended] = []
        runs: list[list[OffsetRun]] = []
        repeated_end = 0
        try:
            for batch in batches:
                queue = self._state.queues.obtain(batch.topic, batch.queue_id)
                batch_runs = []
                for stretch in self._split(batch):
                    run, end_offset = self._answer(batch, queue, stretch)
                    batch_runs.append(run)
                    repeated_end = max(repeated_end, end_offset)
                    if not run.repeated:
                        appended.append(self._append_stretch(builder, batch, queue, stretch, timestamp_ms))
                        queues[queue] = None
                runs.append(batch_runs)
            builder.write()
        except Exception as error:  # also of a bug: memory and log may not agree any more
            raise self._failed(error) from error
        end_offset = builder.position
        if queues:
            self._on_messages(timestamp_ms, start_offset, end_offset, appended)
            self._end(end_offset, list(queues))
            end_offset = max(end_offset, repeated_end)
        else:
            end_offset = repeated_end
        return AppendReceipt(end_offset, timestamp_ms, runs)

    def append_changes(self, changes: Sequence[message_pb2.SystemRecord]) -> int:
        """Appends system records, several as a group, applies them, and returns their physical end."""
        payloads = [system_payload(change) for change in changes]
        largest = max(map(len, payloads))
        if largest > self._part_bytes_max:
            raise InvalidRequestError(f"change has {largest} bytes encoded: at most {self._part_bytes_max}")
        kind = _KINDS.get(changes[0].WhichOneof("change") or "", KIND_METADATA)
        builder = self._begin(sum(map(len, payloads)) + RECORD_BYTES_MIN * len(payloads), client=False)
        try:
            builder.add_group(kind, payloads)
            builder.write()
            gone: list[ConsumeQueue] = []
            for change in changes:
                gone += self._state.apply_change(change, self._state.last_store_timestamp_ms)
        except Exception as error:
            raise self._failed(error) from error
        self.record_count += len(changes)
        self._end(builder.position, gone)
        return builder.position

    # ---- the steps of an append

    def _begin(self, byte_count: int, *, client: bool) -> RecordBuilder:
        """Refuses what has to be refused. After it, only a broken disk can stop the append."""
        if self._confirmation.failure:
            raise self._confirmation.error()
        try:
            self._writer.check_room(byte_count, client=client)
        except OSError as disk_error:
            raise self._failed(disk_error) from disk_error
        state = self._state
        state.last_store_timestamp_ms = max(state.last_store_timestamp_ms, self._clock_ms())
        return RecordBuilder(
            self._log,
            self._writer,
            timestamp_ms=state.last_store_timestamp_ms,
            epoch=self.epoch,
            flushed_offset=self._confirmation.flushed_offset,
        )

    def _end(self, end_offset: int, queues: Sequence[ConsumeQueue]) -> None:
        self._confirmation.appended(end_offset, queues)
        if self._sync:
            self._writer.flush_soon()
        self._confirmation.written(self._writer.written_offset)

    def _failed(self, error: Exception) -> BrokerUnavailableError:
        self._on_failure(error)
        assert self._confirmation.failed
        return self._confirmation.error()

    # ---- repeats

    def _split(self, batch: ClientBatch) -> list[Stretch]:
        """The batch in stretches: new ones, and repeats with the first copy's offsets."""
        count = len(batch.parts)
        if batch.producer_instance and batch.first_sequence:
            window = self._state.dedupe.window((batch.producer_instance, batch.topic, batch.queue_id))
            if window is not None and batch.first_sequence <= window.last_sequence:
                return window.split(batch.first_sequence, count)
        elif not batch.producer_instance and self._state.dedupe.knows_any_id(batch.topic, batch.message_ids):
            return [self._split_id(batch, index) for index in range(count)]
        return [Stretch(0, count, NEW)]

    def _split_id(self, batch: ClientBatch, index: int) -> Stretch:
        place = self._state.dedupe.find_id(batch.topic, batch.message_ids[index])
        return Stretch(index, 1, NEW) if place is None else Stretch(index, 1, place[1], place[0])

    def _answer(self, batch: ClientBatch, queue: ConsumeQueue, stretch: Stretch) -> tuple[OffsetRun, int]:
        """What the client is told of a stretch, and the physical end of the first copies."""
        if stretch.queue_offset == NEW:
            return OffsetRun(queue.next_offset, stretch.length, False, False, batch.queue_id), 0
        if stretch.queue_offset == UNKNOWN:
            return OffsetRun(0, stretch.length, True, True, batch.queue_id), 0
        queue_id = batch.queue_id if stretch.queue_id < 0 else stretch.queue_id
        first_copies = queue if queue_id == queue.queue_id else self._state.queues.obtain(batch.topic, queue_id)
        last = stretch.queue_offset + stretch.length - 1
        entry = first_copies.entry(last) if last >= first_copies.min_offset else None
        run = OffsetRun(stretch.queue_offset, stretch.length, True, False, queue_id)
        return run, entry[0] + entry[1] if entry is not None else 0

    def _append_stretch(
        self, builder: RecordBuilder, batch: ClientBatch, queue: ConsumeQueue, stretch: Stretch, timestamp_ms: int
    ) -> Appended:
        """Appends the messages of a new stretch, and remembers them against repeats."""
        count = stretch.length
        parts, tags_codes, message_ids, keys = batch.parts, batch.tags_codes, batch.message_ids, batch.keys
        first = stretch.first_index
        if count != len(parts):
            end = first + count
            parts, tags_codes = parts[first:end], tags_codes[first:end]
            message_ids, keys = message_ids[first:end], keys[first:end]
        queue_offset = queue.next_offset
        entries = builder.add_messages(queue, parts, tags_codes)
        dedupe = self._state.dedupe
        if batch.producer_instance and batch.first_sequence:
            key = (batch.producer_instance, batch.topic, batch.queue_id)
            dedupe.record(key, batch.first_sequence + first, count, queue_offset, timestamp_ms)
        elif not batch.producer_instance:
            dedupe.record_ids(batch.topic, message_ids, batch.queue_id, queue_offset)
        self.record_count += count
        return Appended(batch.topic, message_ids, keys, entries)
