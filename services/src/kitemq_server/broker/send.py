"""The Send stream and SendMessage: check, append, answer once it is confirmed."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Sequence

from google.protobuf.message import DecodeError

from kitemq.errors import (
    BrokerBusyError,
    BrokerUnavailableError,
    InvalidMessageError,
    InvalidRequestError,
    KiteMQError,
    OutOfOrderError,
    error_to_stream,
)
from kitemq.proto.v1 import broker_pb2, message_pb2
from kitemq.proto.v1.broker_pb2 import FLUSH_DISK_TIMEOUT, SEND_OK, BatchResult, SendResponse
from kitemq.protocol.names import REQUEST_BATCHES_MAX, REQUEST_MESSAGES_MAX
from kitemq.protocol.record import FRAME_BYTES, TRAILER_BYTES, tags_code
from kitemq_server.broker.incoming import PART_BYTES_MAX, check_messages, parse_batch
from kitemq_server.broker.metrics import MessageCounts
from kitemq_server.broker.settings import LiveSettings
from kitemq_server.broker.streams import STOPPING, DuplexStream, RawContext, StreamLimits
from kitemq_server.broker.topics import Topics
from kitemq_server.store.batch import AppendReceipt, ClientBatch
from kitemq_server.store.message_store import MessageStore

STREAMS_MAX = 20_000
REQUESTS_IN_FLIGHT_MAX = 64
# Queues of one stream that wait for a `resume`. More means that the client does not follow the protocol.
REFUSED_QUEUES_MAX = 65_536
BUSY_RETRY_AFTER_MS = 100
# A request that comes this soon after the last reply was sent with others in flight: then replies go by the other task,
# so that reading and writing overlap. One at a time is answered by the reading task itself, without the detour.
OVERLAP_S = 60e-6

TRAILER_FIELDS = (
    "record_kind",
    "queue_id",
    "queue_offset",
    "physical_offset",
    "store_timestamp_ms",
    "epoch",
    "flushed_offset",
    "flags",
    "crc32c",
)


class Sends:
    """What all sends of a broker share."""

    def __init__(
        self, store: MessageStore, topics: Topics, live: LiveSettings, counts: MessageCounts, broker_name: str
    ):
        self.store = store
        self._topics = topics
        self._live = live
        self._counts = counts
        self._broker_name = broker_name
        self._limits = StreamLimits("Send", streams_max=STREAMS_MAX)
        self._streams: set[SendStream] = set()
        self._next_queue = 0
        self._stopping = False
        self.waiting_bytes = 0

    @property
    def stream_count(self) -> int:
        return len(self._limits)

    @property
    def waiting_count(self) -> int:
        """Requests of streams that are appended and not answered yet."""
        return sum(len(stream.replies) for stream in self._streams)

    @property
    def flush_timeout_s(self) -> float:
        return self._live.flush_timeout_ms / 1000

    async def serve(self, context: RawContext) -> None:
        """Handler of Broker.Send, bytes in and out."""
        if self._stopping:
            raise BrokerUnavailableError(STOPPING)
        with self._limits.open(context.peer()):
            stream = SendStream(self, context)
            self._streams.add(stream)
            try:
                await stream.run()
            finally:
                self._streams.discard(stream)
                stream.release()

    def stop(self) -> None:
        """Let every stream answer what it has read, and end."""
        self._stopping = True
        for stream in self._streams:
            stream.stop()

    def parse(self, batch: broker_pb2.QueueBatch) -> ClientBatch:
        """The batch as the store takes it. Raises InvalidMessageError."""
        return parse_batch(batch, body_bytes_max=self._live.body_bytes_max)

    def check_topic(self, batch: broker_pb2.QueueBatch) -> None:
        """Raises an error of the table unless the batch's queue may be written; creates the topic where that is due."""
        self._topics.for_send(batch.topic, queue_id=batch.queue_id, wanted_queue_count=batch.default_topic_queue_count)

    def append(self, batches: Sequence[ClientBatch]) -> AppendReceipt:
        """All of them or none. Raises BrokerBusyError, StoreFullError and what else the store refuses with."""
        if self.waiting_bytes >= self._live.in_flight_bytes_max:
            raise BrokerBusyError(
                f"broker {self._broker_name!r} has {self.waiting_bytes} bytes that wait for the disk",
                retry_after_ms=BUSY_RETRY_AFTER_MS,
            )
        receipt = self.store.append(batches)
        for batch, runs in zip(batches, receipt.runs, strict=True):
            self._counts.count_in(batch.topic, batch.parts, runs)
        return receipt

    async def send_message(self, request: broker_pb2.SendMessageRequest) -> broker_pb2.SendMessageResponse:
        """One message: appended, confirmed, answered."""
        message = request.message
        topic = message.topic
        part = _own_part(message, body_bytes_max=self._live.body_bytes_max)
        config = self._topics.for_send(
            topic,
            queue_id=request.queue_id if request.HasField("queue_id") else None,
            wanted_queue_count=request.default_topic_queue_count,
        )
        if request.HasField("queue_id"):
            queue_id = request.queue_id
        else:
            self._next_queue += 1
            queue_id = self._next_queue % config.write_queue_count
        receipt = self.append(
            [
                ClientBatch(
                    topic,
                    queue_id,
                    [part],
                    [tags_code(message.tag)],
                    [message.message_id],
                    [tuple(message.keys)] if message.keys else (),
                    message.producer_instance,
                    message.sequence if message.producer_instance else 0,
                )
            ]
        )
        self.waiting_bytes += len(part)
        try:
            confirmed = await self.store.wait_confirmed(receipt.end_offset, self.flush_timeout_s)
        finally:
            self.waiting_bytes -= len(part)
        run = receipt.runs[0][0]
        return broker_pb2.SendMessageResponse(
            status=SEND_OK if confirmed else FLUSH_DISK_TIMEOUT,
            message_id=message.message_id,
            broker_name=self._broker_name,
            queue_id=run.queue_id,
            queue_offset=run.first_queue_offset,
            physical_offset=0 if run.repeated else receipt.end_offset - FRAME_BYTES - len(part) - TRAILER_BYTES,
            store_timestamp_ms=receipt.store_timestamp_ms,
            repeated=run.repeated,
        )


def _own_part(message: message_pb2.Message, *, body_bytes_max: int) -> bytes:
    """The message as the broker stores it: the trailer's fields dropped, an id where there was none."""
    if message.HasField("system") or message.HasField("origin"):
        raise InvalidMessageError("`system` and `origin` are written by brokers only", topic=message.topic)
    for name in TRAILER_FIELDS:
        message.ClearField(name)  # type: ignore[arg-type]
    message.DiscardUnknownFields()
    if not message.message_id:
        message.message_id = secrets.token_hex(16)
    check_messages([message], message.topic, body_bytes_max=body_bytes_max)
    part = message.SerializeToString()
    if len(part) > PART_BYTES_MAX:
        raise InvalidMessageError(
            f"message has {len(part)} bytes encoded: at most {PART_BYTES_MAX}", topic=message.topic
        )
    return part


class _Reply:
    """An answer that may have to wait until everything below `end_offset` is confirmed."""

    __slots__ = ("bytes", "deadline", "end_offset", "response")

    def __init__(self) -> None:
        self.response = SendResponse()
        self.end_offset = 0
        self.bytes = 0
        self.deadline = 0.0

    def encode(self, *, confirmed: bool) -> bytes:
        if not confirmed:
            for batch in self.response.results[0].batches:
                if not batch.HasField("error"):
                    batch.status = FLUSH_DISK_TIMEOUT
        return self.response.SerializeToString()


class SendStream(DuplexStream):
    """One producer's stream. Keeps the order of each (topic, queue, producer instance) across a refusal."""

    def __init__(self, sends: Sends, context: RawContext) -> None:
        super().__init__(context)
        self._sends = sends
        self._store = sends.store
        self._time = asyncio.get_running_loop().time
        self.replies: deque[_Reply] = deque()
        self._room = asyncio.Event()
        self._writing = False
        self._last_write = 0.0
        # (topic, queue id) -> producer instances that must resume; None = every one, the batch did not even parse.
        self._refused: dict[tuple[str, int], set[int] | None] = {}

    def release(self) -> None:
        """The stream is over: what it waited for counts no more."""
        for reply in self.replies:
            self._sends.waiting_bytes -= reply.bytes
        self.replies.clear()

    async def _read(self, raw: bytes) -> None:
        overlapping = self._time() - self._last_write < OVERLAP_S
        reply = self._take(raw)
        if reply.end_offset <= self._store.confirm_offset and not (overlapping or self._writing or self.replies):
            self._writing = True
            await self._context.write(reply.encode(confirmed=True))
            self._writing = False
            self._last_write = self._time()
            return
        self._sends.waiting_bytes += reply.bytes
        self.replies.append(reply)
        self._wake.set()
        while len(self.replies) >= REQUESTS_IN_FLIGHT_MAX:
            self._room.clear()
            await self._room.wait()

    async def _write(self) -> None:
        while True:
            while self.replies:
                out = await self._confirmed_replies()
                self._room.set()
                self._writing = True
                await self._context.write(b"".join(out))
                self._writing = False
                self._last_write = self._time()
            if self._finishing:
                return
            self._wake.clear()
            await self._wake.wait()

    async def _confirmed_replies(self) -> list[bytes]:
        """The next replies that are due, all at once. Waits for the first."""
        replies = self.replies
        first = replies[0]
        confirmed = first.end_offset <= self._store.confirm_offset or await self._store.wait_confirmed(
            first.end_offset, max(0.0, first.deadline - self._time())
        )
        out = [replies.popleft().encode(confirmed=confirmed)]
        self._sends.waiting_bytes -= first.bytes
        confirm_offset = self._store.confirm_offset
        while replies and replies[0].end_offset <= confirm_offset:
            self._sends.waiting_bytes -= replies[0].bytes
            out.append(replies.popleft().encode(confirmed=True))
        return out

    def _take(self, raw: bytes) -> _Reply:
        """Check and append one request; nothing in it awaits, so a client that leaves can not cut it in two."""
        try:
            request = broker_pb2.SendRequest.FromString(raw)
        except DecodeError:
            raise InvalidRequestError("the request is not a valid SendRequest") from None
        if len(request.batches) > REQUEST_BATCHES_MAX:
            raise InvalidRequestError(
                f"request {request.number} has {len(request.batches)} batches: at most {REQUEST_BATCHES_MAX}"
            )
        message_count = sum(len(batch.sizes) for batch in request.batches)
        if message_count > REQUEST_MESSAGES_MAX:
            raise InvalidRequestError(
                f"request {request.number} has {message_count} messages: at most {REQUEST_MESSAGES_MAX}"
            )
        reply = _Reply()
        result = reply.response.results.add(number=request.number)
        good: list[tuple[ClientBatch, BatchResult]] = []
        for batch in request.batches:
            outcome = result.batches.add()
            try:
                good.append((self._check(batch), outcome))
            except KiteMQError as error:
                outcome.error.CopyFrom(error_to_stream(error))
        if len(self._refused) > REFUSED_QUEUES_MAX:
            raise InvalidRequestError(f"over {REFUSED_QUEUES_MAX} queues of this stream wait for a batch with `resume`")
        if good:
            self._append(good, reply)
            reply.bytes = len(raw)
        return reply

    def _check(self, batch: broker_pb2.QueueBatch) -> ClientBatch:
        place = (batch.topic, batch.queue_id)
        instance = None
        try:
            checked = self._sends.parse(batch)
            instance = checked.producer_instance
            if self._refused:
                self._check_order(place, instance, resume=batch.resume)
            self._sends.check_topic(batch)
        except KiteMQError:
            self._refuse(place, instance)
            raise
        return checked

    def _append(self, good: list[tuple[ClientBatch, BatchResult]], reply: _Reply) -> None:
        try:
            receipt = self._sends.append([batch for batch, _ in good])
        except KiteMQError as error:
            for batch, outcome in good:
                self._refuse((batch.topic, batch.queue_id), batch.producer_instance)
                outcome.error.CopyFrom(error_to_stream(error))
            return
        for (_, outcome), runs in zip(good, receipt.runs, strict=True):
            outcome.store_timestamp_ms = receipt.store_timestamp_ms
            for run in runs:
                offsets = outcome.offsets.add(first_queue_offset=run.first_queue_offset, count=run.count)
                if run.repeated:
                    offsets.repeated = True
                    offsets.unknown = run.unknown
        reply.end_offset = receipt.end_offset
        reply.deadline = self._time() + self._sends.flush_timeout_s

    def _refuse(self, place: tuple[str, int], instance: int | None) -> None:
        instances = self._refused.get(place, set())
        if instances is None or instance is None:
            self._refused[place] = None
        else:
            instances.add(instance)
            self._refused[place] = instances

    def _check_order(self, place: tuple[str, int], instance: int, *, resume: bool) -> None:
        """Raises OutOfOrderError for a batch behind a refused one."""
        instances = self._refused.get(place, set())
        if instances is not None and instance not in instances:
            return
        if not resume:
            raise OutOfOrderError(
                f"an earlier batch for queue {place[1]} was refused: send that one again, with `resume`", topic=place[0]
            )
        if instances is not None:
            instances.discard(instance)
        if not instances:
            del self._refused[place]
