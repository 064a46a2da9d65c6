"""What the producer writes by hand is what the broker's generated class reads."""

from __future__ import annotations

from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from kitemq.message import MessageQueue
from kitemq.producer.accumulator import ANY_QUEUE, BATCH_MESSAGES_MAX, BatchEncoder, Entry, QueueState
from kitemq.proto.v1 import broker_pb2, message_pb2
from kitemq.protocol.record import BORN, BORN_KEY, FRAME_BYTES, frame_header, length_delimited

NUMBERS = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))
SEQUENCES = st.one_of(st.integers(1, 5), st.integers(1, 2**64 - 100))


def entry(bodies: list[bytes], *, first_sequence: int = 0) -> Entry:
    """One send of messages with these bodies."""
    parts = [length_delimited(0x12, body) + BORN.pack(BORN_KEY, 5) for body in bodies]
    made = Entry(parts, [""] * len(parts), sum(map(len, parts)), None, 0.0, ANY_QUEUE, cast(Any, None))
    made.first_sequence = first_sequence
    return made


def state_of(queue: MessageQueue) -> QueueState:
    return QueueState(queue, cast(Any, None))


QUEUES = st.builds(MessageQueue, st.text(max_size=200), st.just("a"), NUMBERS)
SENDS = st.lists(st.lists(st.binary(max_size=200), min_size=1, max_size=12), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(
    number=st.integers(0, 2**64 - 1),
    batches=st.lists(st.tuples(QUEUES, SENDS, SEQUENCES, st.booleans()), max_size=4),
    instance=st.integers(1, 2**64 - 1),
    queue_count=NUMBERS,
)
def test_a_request_by_hand_says_what_was_meant(
    number: int, batches: list[tuple[MessageQueue, Any, int, bool]], instance: int, queue_count: int
) -> None:
    encoder = BatchEncoder(instance=instance, queue_count=queue_count)
    pieces = [broker_pb2.SendRequest(number=number).SerializeToString()]
    wanted = broker_pb2.SendRequest(number=number)
    for queue, sends, first_sequence, resume in batches:
        state = state_of(queue)
        state.resume = resume
        messages = []
        entries = []
        sequence = first_sequence
        for bodies in sends:
            entries.append(entry(bodies, first_sequence=sequence))
            for body in bodies:
                messages.append(
                    message_pb2.Message(
                        body=body, born_timestamp_ms=5, producer_instance=instance, sequence=sequence % 2**64
                    )
                )
                sequence += 1
        if sequence > 2**64:
            continue
        made = encoder.encode(state, entries)
        assert not state.resume
        pieces += made
        again = encoder.encode(state, entries)
        assert not broker_pb2.SendRequest.FromString(b"".join(again)).batches[0].resume  # said once
        wanted.batches.add(
            topic=queue.topic,
            queue_id=queue.queue_id,
            records=message_pb2.Segment(records=messages).SerializeToString(),
            resume=resume,
            default_topic_queue_count=queue_count,
        )
    found = broker_pb2.SendRequest.FromString(b"".join(pieces))
    assert found.number == number
    assert len(found.batches) == len(wanted.batches)
    for batch, meant in zip(found.batches, wanted.batches, strict=True):
        assert (batch.topic, batch.queue_id, batch.resume) == (meant.topic, meant.queue_id, meant.resume)
        assert batch.default_topic_queue_count == meant.default_topic_queue_count
        records = message_pb2.Segment.FromString(batch.records).records
        assert records == message_pb2.Segment.FromString(meant.records).records
        start = 0  # frames are padded, and `sizes` are theirs
        for size in batch.sizes:
            assert batch.records.startswith(frame_header(size), start)
            start += FRAME_BYTES + size
        assert start == len(batch.records)
        assert len(batch.sizes) == len(records)


def test_a_large_request_by_hand_has_long_lengths() -> None:
    """Lengths of one to four bytes, of a batch of many messages and of one of a large one."""
    encoder = BatchEncoder(instance=7, queue_count=4)
    for bodies in ([b""], [b"x" * 2_200_000], [b"y" * 100] * BATCH_MESSAGES_MAX):
        made = b"".join(encoder.encode(state_of(MessageQueue("t", "a", 300)), [entry(bodies, first_sequence=1)]))
        (batch,) = broker_pb2.SendRequest.FromString(made).batches
        assert [message.body for message in message_pb2.Segment.FromString(batch.records).records] == bodies
        assert batch.queue_id == 300


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_taking_keeps_the_order_and_its_limits(data: st.DataObject) -> None:
    """Whatever is taken, put back, moved away or given up: each taken batch is one run of consecutive numbers."""
    state = state_of(MessageQueue("t", "a", 0))
    pending = [entry([b"x"] * data.draw(st.integers(1, 600))) for _ in range(data.draw(st.integers(1, 12)))]
    state.keep(pending)
    for _ in range(data.draw(st.integers(1, 12))):
        if not state.pending:
            break
        if data.draw(st.booleans()):
            state.pending[data.draw(st.integers(0, len(state.pending) - 1))].alone = data.draw(st.booleans())
        bytes_left, messages_left = data.draw(st.integers(0, 10_000)), data.draw(st.integers(1, 1500))
        before = list(state.pending)
        taken, count, size = state.take(bytes_left, messages_left)
        assert taken and [*taken, *state.pending] == before
        assert count == sum(len(each.parts) for each in taken)
        assert size == sum(each.body_bytes for each in taken)
        assert len(taken) == 1 or (size <= bytes_left and count <= BATCH_MESSAGES_MAX)
        assert count - len(taken[-1].parts) < messages_left
        assert len(taken) == 1 or not any(each.alone for each in taken)
        sequence = taken[0].first_sequence
        assert sequence > 0
        for each in taken:
            assert each.first_sequence == sequence
            sequence += len(each.parts)
        assert sequence <= state.next_sequence
        what = data.draw(st.sampled_from(["sent", "put back", "lose one"]))
        if what == "put back":
            state.put_back(taken)
            assert state.resume and list(state.pending) == before
        elif what == "lose one":  # one of them moved to another broker
            del taken[data.draw(st.integers(0, len(taken) - 1))]
            state.put_back(taken)
