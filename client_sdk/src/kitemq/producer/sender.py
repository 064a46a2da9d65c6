"""One Send stream to the master of one broker group: what may go, in which order, and what to do about a refusal.

What may be retried where (docs/guarantees.md): a refusal that is certainly not stored goes to another broker at once,
unless a key, a selector or an explicit queue binds it; where the outcome is unknown (stream broken, no answer within
`request_timeout_s`) the same numbered messages go to the same queue again, where the broker recognises repeats.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import grpc
import grpc.aio

from kitemq.errors import (
    BrokerUnavailableError,
    KiteMQError,
    OutOfOrderError,
    RequestTimeoutError,
    error_from_rpc,
    error_from_stream,
)
from kitemq.message import MessageQueue
from kitemq.producer.accumulator import (
    BATCH_MESSAGES_MAX,
    REQUEST_BYTES_MAX,
    BatchEncoder,
    Entry,
    QueueState,
    count_messages,
)
from kitemq.proto.v1 import broker_pb2
from kitemq.protocol.names import REQUEST_BATCHES_MAX, REQUEST_MESSAGES_MAX
from kitemq.rpc import Channels

logger = logging.getLogger(__name__)

SEND_METHOD = "/kitemq.v1.Broker/Send"
IN_FLIGHT_REQUESTS_MAX = 8
# A request costs broker and producer as much as a hundred messages in one. So beside others under way one goes only
# with this many messages, of which half stay for the next, or when the last one has had no answer for this long.
SIDE_BY_SIDE_MESSAGES = 3
SIDE_BY_SIDE_REQUESTS_MAX = 3
SIDE_BY_SIDE_S = 0.01
# Above this malloc gets a buffer from the kernel each time, page by page; a request this full goes as it is.
REQUEST_BYTES_WANTED = 100_000
REQUEST_BYTES_FULL = 64 * 1024
IN_FLIGHT_BATCHES_MAX = 16  # per queue; the broker remembers 64 runs
CONNECT_TIMEOUT_S = 2.0
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 1.0
TICK_S = 0.1


@dataclass(frozen=True, slots=True)
class SenderSettings:
    """What the senders of one producer share."""

    instance: int
    request_timeout_s: float
    default_topic_queue_count: int
    retry_elsewhere: bool


class Sends:
    """What a sender asks of its producer. The producer implements it."""

    def delivered(
        self, state: QueueState, entries: list[Entry], result: broker_pb2.BatchResult, elapsed_s: float
    ) -> None:
        """The entries are stored."""
        raise NotImplementedError

    def failed(self, entry: Entry, error: KiteMQError) -> None:
        """The entry is given up."""
        raise NotImplementedError

    def move(self, entry: Entry, state: QueueState) -> bool:
        """Put the entry into a queue of another broker. False when there is none."""
        raise NotImplementedError

    def broker_failed(self, broker_name: str, error: KiteMQError) -> None:
        """Skip this broker for a while; read routes again if the error says so."""
        raise NotImplementedError


class _Request:
    __slots__ = ("batches", "sent_at")

    def __init__(self, batches: list[tuple[QueueState, list[Entry]]], sent_at: float) -> None:
        self.batches = batches
        self.sent_at = sent_at


class BrokerSender:
    """Sends what waits for one broker's queues. All methods run on the loop that `run` runs on."""

    def __init__(
        self,
        broker_name: str,
        *,
        address_of: Callable[[str], str | None],
        channels: Channels,
        settings: SenderSettings,
        sends: Sends,
    ) -> None:
        self.broker_name = broker_name
        self.address = ""
        self._address_of = address_of
        self._channels = channels
        self._settings = settings
        self._sends = sends
        self._encoder = BatchEncoder(instance=settings.instance, queue_count=settings.default_topic_queue_count)
        self._loop = asyncio.get_running_loop()
        self._states: dict[MessageQueue, QueueState] = {}
        self._ready: deque[QueueState] = deque()
        self._requests: dict[int, _Request] = {}
        self._waiting = 0  # messages that are ready
        self._in_flight_messages = 0
        self._next_number = 1
        self._last_sent_at = 0.0
        self._timer_set = False
        self._waiter: asyncio.Future[None] | None = None
        self._ticking = False
        self._stream: Any = None
        self._timed_out = False

    def state(self, queue: MessageQueue) -> QueueState:
        """The queue's waiting room."""
        state = self._states.get(queue)
        if state is None:
            state = self._states[queue] = QueueState(queue, self)
        return state

    def submit(self, entry: Entry, state: QueueState) -> None:
        """Queue the entry behind what waits already."""
        state.add(entry)
        self._waiting += len(entry.parts)
        if not state.blocked:
            if len(state.pending) == 1:
                self._ready.append(state)
            waiter = self._waiter
            if waiter is not None and not waiter.done() and self._may_send():
                waiter.set_result(None)
        if not self._ticking:
            self._ticking = True
            self._loop.call_later(TICK_S, self._tick)

    def entries(self) -> list[Entry]:
        """Everything not answered yet."""
        found = [entry for state in self._states.values() for entry in (*state.refused, *state.pending)]
        for request in self._requests.values():
            found += [entry for _, entries in request.batches for entry in entries]
        return found

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _may_send(self) -> bool:
        """Whether what waits may go now. Otherwise it goes with the next answer, or when it has waited long enough."""
        under_way = len(self._requests)
        if not under_way or (self._waiting >= SIDE_BY_SIDE_MESSAGES and under_way < SIDE_BY_SIDE_REQUESTS_MAX):
            return True
        wait_s = self._last_sent_at + SIDE_BY_SIDE_S - monotonic()
        if under_way < IN_FLIGHT_REQUESTS_MAX:
            if wait_s <= 0:
                return True
            if not self._timer_set:
                self._timer_set = True
                self._loop.call_later(wait_s, self._timer_over)
        return False

    def _timer_over(self) -> None:
        self._timer_set = False
        if self._ready and self._may_send():
            self._wake()

    async def run(self) -> None:
        """Connect when something waits; resend what was under way when a stream breaks. Ends by cancellation."""
        failures = 0
        while True:
            while not self._ready:
                await self._wait()
            address = self._address_of(self.broker_name)
            if address is None or not await self._connect(address):
                failures += 1
                self._unreachable(address)
                await self._pause(failures)
                continue
            answered, error = await self._converse(address)
            failures = 0 if answered else failures + 1
            self._recover(error)
            if failures:
                await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        delay_s = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2 ** min(failures - 1, 8))
        await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))

    async def _connect(self, address: str) -> bool:
        """Whether the broker can be reached. A refused connection is a no at once, a silent address after 2 s."""
        channel = self._channels.get(address)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                state = channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        return False
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            return False
        self.address = address
        return True

    async def _converse(self, address: str) -> tuple[bool, KiteMQError]:
        """One stream, until it breaks. Returns whether it ever answered, and why it broke."""
        channel = self._channels.get(address)
        stream: Any = channel.stream_stream(SEND_METHOD)()
        self._stream = stream
        self._timed_out = False
        progress = [False]
        tasks = [asyncio.create_task(self._read(stream, progress)), asyncio.create_task(self._write(stream))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._stream = None
            for task in tasks:
                task.cancel()
            stream.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        error: KiteMQError = BrokerUnavailableError("the broker closed the stream", address=address)
        if self._timed_out:
            error = RequestTimeoutError(
                f"no answer within {self._settings.request_timeout_s} s: may or may not be stored", address=address
            )
        for outcome in outcomes:
            if isinstance(outcome, grpc.aio.AioRpcError) and not self._timed_out:
                error = error_from_rpc(outcome, address=address)
            elif isinstance(outcome, Exception) and not isinstance(
                outcome, (grpc.aio.AioRpcError, asyncio.InvalidStateError)
            ):
                raise outcome
        return progress[0], error

    async def _write(self, stream: Any) -> None:
        while True:
            request = self._next_request()
            if request is None:
                await self._wait()
            else:
                await stream.write(request)

    async def _read(self, stream: Any, progress: list[bool]) -> None:
        while True:
            data = await stream.read()
            if data is grpc.aio.EOF:
                return
            progress[0] = True
            for result in broker_pb2.SendResponse.FromString(data).results:
                self._answered(result)
            if self._ready:
                self._wake()

    def _next_request(self) -> bytes | None:
        ready = self._ready
        self._waiting = sum([state.message_count for state in ready])
        if not ready or not self._may_send():
            return None
        batches: list[tuple[QueueState, list[Entry]]] = []
        pieces: list[bytes] = [b""]
        size = 0
        # What goes only because answers take long had better be large.
        late = len(self._requests) >= SIDE_BY_SIDE_REQUESTS_MAX
        bytes_wanted, bytes_full = (REQUEST_BYTES_MAX,) * 2 if late else (REQUEST_BYTES_WANTED, REQUEST_BYTES_FULL)
        # Half of what is under way, so that broker and producer work at the same time, not in turn.
        under_way = self._waiting + self._in_flight_messages
        wanted = under_way if under_way < 2 * SIDE_BY_SIDE_MESSAGES else (under_way + 1) // 2
        wanted = min(wanted, REQUEST_MESSAGES_MAX - BATCH_MESSAGES_MAX)  # the last entry may be a full one
        again: list[QueueState] = []
        while ready and wanted > 0 and size < bytes_full and len(batches) < REQUEST_BATCHES_MAX:
            state = ready.popleft()
            if state.blocked or not state.pending:
                continue
            if state.in_flight >= IN_FLIGHT_BATCHES_MAX:
                again.append(state)
                continue
            entries, message_count, byte_count = state.take(bytes_wanted - size, wanted)
            size += byte_count
            wanted -= message_count
            self._waiting -= message_count
            self._in_flight_messages += message_count
            state.in_flight += 1
            batches.append((state, entries))
            pieces += self._encoder.encode(state, entries)
            if state.pending:
                again.append(state)
        ready.extend(again)
        if not batches:
            return None
        number = self._next_number
        self._next_number = number + 1
        self._last_sent_at = monotonic()
        self._requests[number] = _Request(batches, self._last_sent_at)
        for _, entries in batches:
            for entry in entries:
                entry.sent = True
        pieces[0] = broker_pb2.SendRequest(number=number).SerializeToString()
        return b"".join(pieces)

    def _answered(self, result: broker_pb2.SendResult) -> None:
        request = self._requests.pop(result.number, None)
        if request is None:
            logger.warning("send: answer to unknown request broker=%s number=%d", self.broker_name, result.number)
            return
        elapsed_s = monotonic() - request.sent_at
        for (state, entries), batch in zip(request.batches, result.batches, strict=True):
            state.in_flight -= 1
            self._in_flight_messages -= count_messages(entries)
            if batch.HasField("error"):
                self._refused(state, entries, batch.error)
            else:
                self._sends.delivered(state, entries, batch, elapsed_s)
            if state.blocked and not state.in_flight:
                self._resume_later(state)

    def _refused(self, state: QueueState, entries: list[Entry], reason: broker_pb2.Error) -> None:
        """Nothing of the batch is stored. What came behind it in its queue will be refused too: collect, resume."""
        error = error_from_stream(reason, address=self.address, topic=state.queue.topic)
        state.blocked = True
        for entry in entries:
            entry.sent = False
            if not isinstance(error, OutOfOrderError):
                entry.last_error = error
        if not error.retriable:
            if len(entries) == 1:
                self._sends.failed(entries[0], error)
                entries = []
            else:  # one of them is to blame: find it by sending each alone
                for entry in entries:
                    entry.alone = True
        elif not isinstance(error, OutOfOrderError):
            self._sends.broker_failed(self.broker_name, error)
        state.refused += entries

    def _resume_later(self, state: QueueState) -> None:
        """Everything in flight behind the refusal has come back: move what may move, send the rest again in order."""
        refused, state.refused = state.refused, []
        causes = [entry.last_error for entry in refused if entry.last_error is not None]
        cause = next((error for error in causes if error.retriable), None)
        stay = refused
        if cause is not None:
            stay = [entry for entry in refused if entry.bound or entry.alone or not self._sends.move(entry, state)]
        state.put_back(stay)
        if cause is not None and stay:
            delay_s = cause.retry_after_ms / 1000 or BACKOFF_MIN_S
            self._loop.call_later(delay_s * random.uniform(1.0, 1.2), self._unblock, state)
        else:
            self._unblock(state)

    def _unblock(self, state: QueueState) -> None:
        state.blocked = False
        if state.pending:
            self._ready.append(state)
            self._wake()

    def _recover(self, error: KiteMQError) -> None:
        """The stream is gone: put what was under way back in front, in order, under the same numbers."""
        requests, self._requests = self._requests, {}
        self._in_flight_messages = 0
        lost: dict[QueueState, list[Entry]] = {}
        for state in self._states.values():
            if state.refused:
                lost[state] = []
        for request in requests.values():
            for state, entries in request.batches:
                lost.setdefault(state, []).extend(entries)
        if lost:
            self._sends.broker_failed(self.broker_name, error)
        for state, entries in lost.items():
            # A refusal stands at the head of what was in flight behind it.
            back = sorted((*state.refused, *entries), key=lambda entry: entry.first_sequence)
            state.refused = []
            state.in_flight = 0
            for entry in back:
                entry.last_error = error
            if self._settings.retry_elsewhere:
                back = [entry for entry in back if entry.bound or not self._sends.move(entry, state)]
            state.put_back(back)
            state.blocked = False
        for state in self._states.values():
            state.resume = True  # a new stream begins each queue anew
        self._ready = deque(state for state in self._states.values() if state.pending and not state.blocked)

    def _unreachable(self, address: str | None) -> None:
        """No connection: what was never written may go to another broker at once."""
        if address is None:
            error = BrokerUnavailableError(f"broker group {self.broker_name!r} has no master in the route")
        else:
            error = BrokerUnavailableError("cannot connect to the broker", address=address)
        self._sends.broker_failed(self.broker_name, error)
        for state in self._states.values():
            stay: deque[Entry] = deque()
            for entry in state.pending:
                entry.last_error = error
                if entry.bound or entry.sent or not self._sends.move(entry, state):
                    stay.append(entry)
            state.keep(stay)
        self._ready = deque(state for state in self._states.values() if state.pending and not state.blocked)

    def _tick(self) -> None:
        """Ten times a second while anything waits: give up what is over its time, break a silent stream."""
        now = monotonic()
        busy = bool(self._requests)
        for request in self._requests.values():
            if now - request.sent_at > self._settings.request_timeout_s and self._stream is not None:
                self._timed_out = True
                self._stream.cancel()
            break  # the first is the oldest
        for state in list(self._states.values()):  # giving one up lets another in, maybe for a new queue
            if state.pending and min(entry.deadline for entry in state.pending) <= now:
                self._expire(state, now)
            busy = busy or bool(state.pending) or bool(state.refused)
        if busy:
            self._loop.call_later(TICK_S, self._tick)
        else:
            self._ticking = False

    def _expire(self, state: QueueState, now: float) -> None:
        overdue = [entry for entry in state.pending if entry.deadline <= now]
        # First, as giving one up may let another in behind.
        state.keep([entry for entry in state.pending if entry.deadline > now])
        if not state.pending and state in self._ready:
            self._ready.remove(state)
        for entry in overdue:
            cause = f": {entry.last_error.message}" if entry.last_error is not None else ""
            if entry.sent:
                text = f"delivery timed out, the message may or may not be stored{cause}"
            else:
                text = f"delivery timed out, the message is not stored{cause}"
            self._sends.failed(entry, RequestTimeoutError(text, topic=state.queue.topic, address=self.address or None))
