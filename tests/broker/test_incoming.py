"""A batch is stored exactly as it was checked, or refused with the index of what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kitemq.message
from kitemq.compression import Compression
from kitemq.errors import InvalidMessageError
from kitemq.producer.encoding import MessageEncoder
from kitemq.proto.v1.broker_pb2 import QueueBatch
from kitemq.proto.v1.message_pb2 import EpochStarted, Message, Origin, Segment, SystemRecord
from kitemq.protocol.record import (
    BORN,
    BORN_KEY,
    IDENTITY,
    INSTANCE_KEY,
    SEQUENCE_KEY,
    frame_header,
    length_delimited,
    tags_code,
)
from kitemq_server.broker.incoming import check_messages, parse_batch, parse_messages, split_frames
from kitemq_server.broker.plain_batch import read_plain
from kitemq_server.store.batch import ClientBatch
from tests.broker.wire import batch, message, numbered

BODY_MAX = 4 * 1024 * 1024


def parsed(wanted: QueueBatch, *, body_bytes_max: int = BODY_MAX) -> ClientBatch:
    return parse_batch(wanted, body_bytes_max=body_bytes_max)


def raw_batch(*parts: bytes, **fields: Any) -> QueueBatch:
    records = b"".join(frame_header(len(part)) + part for part in parts)
    return QueueBatch(topic="orders", records=records, sizes=[len(part) for part in parts], **fields)


def test_a_batch_as_the_store_takes_it() -> None:
    messages = [
        message("orders", b"a", sequence=5, tag="paid", keys=["k1", "k2"]),
        message("orders", b"b", sequence=6, properties={"p": "v"}),
    ]
    checked = parsed(batch(messages, queue_id=3))
    assert checked.parts == [item.SerializeToString() for item in messages]
    assert checked.tags_codes == [tags_code("paid"), 0]
    assert checked.message_ids == [item.message_id for item in messages]
    assert checked.keys == [("k1", "k2"), ()]
    assert (checked.topic, checked.queue_id) == ("orders", 3)
    assert (checked.producer_instance, checked.first_sequence) == (7, 5)


def test_without_an_instance_sequences_do_not_count() -> None:
    checked = parsed(batch([message("orders", instance=0, message_id=name) for name in ("a", "b")]))
    assert (checked.producer_instance, checked.first_sequence) == (0, 0)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([message("orders", b"")], "message 0 has a body of 0 bytes"),
        ([message("orders"), message("other", sequence=2)], "message 1 is for topic 'other'"),
        ([message("orders"), message("orders", sequence=3)], "message 1 has sequence 3, not 2"),
        ([message("orders"), message("orders", instance=8, sequence=2)], "message 1 comes from another producer"),
        ([message("orders", sequence=0)], "sequence 0"),
        ([message("orders", message_id="")], "message 0 has no message_id"),
        ([message("orders", message_id="x" * 129)], "message_id of 129 characters"),
        ([message("orders", message_id="a\nb")], "control characters"),
        ([message("orders", tag="a|b")], "message 0 tag 'a|b' may not hold"),
        ([message("orders", tag=" a")], "outer blanks"),
        ([message("orders", tag="a\x00")], "control characters"),
        ([message("orders", keys=["a", ""])], "non-empty words"),
        ([message("orders", keys=["k"] * 65)], "at most 64"),
        ([message("orders", keys=["k" * 40_000])], "40001 bytes together: at most 32767"),
        ([message("orders", properties={"a": "x" * 32_767})], "at most 32767"),
    ],
)
def test_what_is_refused_and_why(messages: list[Message], text: str) -> None:
    with pytest.raises(InvalidMessageError) as caught:
        parsed(batch(messages))
    assert text in caught.value.message


def test_the_brokers_fields_are_refused() -> None:
    for item in (message("orders"), message("orders")):
        item.system.CopyFrom(SystemRecord(epoch_started=EpochStarted(epoch=9)))
        with pytest.raises(InvalidMessageError, match="only brokers"):
            parsed(batch([item]))
    item = message("orders")
    item.origin.CopyFrom(Origin())
    with pytest.raises(InvalidMessageError, match="only brokers"):
        parsed(batch([item]))


def test_a_long_sharding_key_and_a_bad_producer_group_are_refused() -> None:
    item = message("orders")
    item.sharding_key = "s" * 65
    with pytest.raises(InvalidMessageError, match="sharding key has 65"):
        parsed(batch([item]))
    item = message("orders")
    item.producer_group = "bad group"
    with pytest.raises(InvalidMessageError, match="producer group"):
        parsed(batch([item]))


def test_the_body_limit_is_the_brokers() -> None:
    parsed(batch([message("orders", b"x" * 100)]), body_bytes_max=100)
    with pytest.raises(InvalidMessageError, match=r"101 bytes: 1\.\.100"):
        parsed(batch([message("orders", b"x" * 101)]), body_bytes_max=100)


def test_frames_must_be_padded_and_fit_the_sizes() -> None:
    part = message("orders").SerializeToString()
    plain = Segment(records=[Message.FromString(part)]).SerializeToString()
    with pytest.raises(InvalidMessageError, match="no frame of"):
        parsed(QueueBatch(topic="orders", records=plain, sizes=[len(part)]))
    good = raw_batch(part, part)
    with pytest.raises(InvalidMessageError, match="no frame of"):
        parsed(QueueBatch(topic="orders", records=good.records, sizes=[len(part), len(part) + 1]))
    with pytest.raises(InvalidMessageError, match="sizes say"):
        parsed(QueueBatch(topic="orders", records=good.records, sizes=[len(part)]))
    with pytest.raises(InvalidMessageError, match="no frame of"):
        parsed(QueueBatch(topic="orders", records=good.records[:-1], sizes=[len(part), len(part), 3]))
    with pytest.raises(InvalidMessageError, match="has no messages"):
        parsed(QueueBatch(topic="orders"))
    with pytest.raises(InvalidMessageError, match="bytes encoded: at most"):
        parsed(QueueBatch(topic="orders", records=b"", sizes=[2**32 - 1]))


def test_a_message_that_would_swallow_the_trailer_is_refused() -> None:
    """Bytes that end in an open length-delimited field parse only together with what comes behind them."""
    open_ended = message("orders").SerializeToString() + b"\x1a\x46"
    with pytest.raises(InvalidMessageError, match="message 1 is not a valid Message"):
        parsed(raw_batch(message("orders").SerializeToString(), open_ended))


@settings(max_examples=300)
@given(st.binary(max_size=300), st.lists(st.integers(0, 2**32 - 1), max_size=4))
def test_any_bytes_are_taken_whole_or_refused(records: bytes, sizes: list[int]) -> None:
    try:
        checked = parsed(QueueBatch(topic="orders", records=records, sizes=sizes))
    except InvalidMessageError:
        return
    assert b"".join(frame_header(len(part)) + bytes(part) for part in checked.parts) == records


def sdk_part(
    sequence: int, body: bytes, *, topic: str = "orders", group: str = "tests", attributes: bytes = b""
) -> bytes:
    """As the SDK writes a message."""
    return b"".join(
        (
            length_delimited(0x0A, topic.encode()),
            length_delimited(0x5A, group.encode()),
            length_delimited(0x12, body),
            attributes,
            length_delimited(0x32, f"{7:016x}{sequence:016x}".encode()),
            BORN.pack(BORN_KEY, 1_700_000_000_000),
            IDENTITY.pack(INSTANCE_KEY, 7, SEQUENCE_KEY, sequence),
        )
    )


def the_long_way(wanted: QueueBatch, *, body_bytes_max: int = BODY_MAX) -> list[str] | None:
    """The ids, found by looking at every field; None = refused."""
    try:
        parts = split_frames(wanted.records, wanted.sizes)
        messages = parse_messages(wanted.records, len(parts))
        return check_messages(messages, wanted.topic, body_bytes_max=body_bytes_max)
    except InvalidMessageError:
        return None


def test_the_shortcut_takes_what_the_sdk_sends() -> None:
    bodies = [b"x" * size for size in (1, 127, 128, 16_383, 16_384, 1, 2_097_152)]
    parts = [sdk_part(sequence, body) for sequence, body in enumerate(bodies, 1)]
    ids = [f"{7:016x}{sequence:016x}" for sequence in range(1, len(bodies) + 1)]
    assert read_plain(parts, topic="orders", body_bytes_max=BODY_MAX) == (ids, 7, 1)
    assert read_plain(parts, topic="orders", body_bytes_max=2_097_151) is None
    encoder = MessageEncoder(group="tests", compression=Compression.NONE, compress_from_bytes=0)
    made, message_id = encoder.encode(kitemq.message.Message("orders", b"body"), "")
    made += IDENTITY.pack(INSTANCE_KEY, encoder.instance, SEQUENCE_KEY, 5)
    assert read_plain([made], topic="orders", body_bytes_max=BODY_MAX) == ([message_id], encoder.instance, 5)


@settings(max_examples=1000)
@given(st.data())
def test_the_shortcut_decides_as_the_long_way_does(data: st.DataObject) -> None:
    attributes = st.sampled_from(
        [b"", b"", length_delimited(0x1A, b"tag"), length_delimited(0x22, b""), b"\x80\x01\x00"]
    )
    parts = [
        bytearray(sdk_part(sequence, data.draw(st.binary(min_size=0, max_size=3)), attributes=data.draw(attributes)))
        for sequence in range(1, data.draw(st.integers(2, 4)))
    ]
    for part in parts[data.draw(st.integers(0, 1)) :]:
        if data.draw(st.booleans()):
            part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(part)))
            part[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    wanted = raw_batch(*map(bytes, parts))
    body_bytes_max = data.draw(st.integers(1, 3))
    expected = the_long_way(wanted, body_bytes_max=body_bytes_max)
    try:
        got = list(parsed(wanted, body_bytes_max=body_bytes_max).message_ids)
    except InvalidMessageError:
        got = None
    assert got == expected


GROUPS = [
    b"",
    b"g",
    b"g" * 120,
    b"g" * 121,
    b"g" * 128,
    b"DEFAULT_PRODUCER",
    b"CID_RMQ_SYS_x",
    b"a b",
    "\xe9".encode(),
    b"\xff",
]
IDS = [
    b"i" * 31,
    b"i" * 32,
    b"i" * 33,
    b"i" * 31 + b"\n",
    b"i" * 31 + b"\x7f",
    "\xe9".encode() * 16,
    b"\xff" * 32,
    b"",
    b" " * 32,
]


@settings(max_examples=500)
@given(st.data())
def test_the_shortcut_takes_no_other_limits_than_the_long_way(data: st.DataObject) -> None:
    """Fields in the SDK's order, with values at and beyond the limits: the same batch, or refused by both."""
    topic = data.draw(st.sampled_from(["orders", "", "t" * 127, "t" * 128, "\xe9"]))
    group = data.draw(st.sampled_from(GROUPS))
    instance = data.draw(st.sampled_from([0, 7, 2**64 - 1]))
    first_sequence = data.draw(st.sampled_from([0, 1, 2**64 - 2]))
    parts = []
    for index in range(data.draw(st.integers(1, 3))):
        odd = data.draw(st.integers(0, 3)) == 0
        fields = [
            length_delimited(0x0A, b"other" if odd and data.draw(st.booleans()) else topic.encode()),
            length_delimited(0x5A, data.draw(st.sampled_from(GROUPS)) if odd else group),
            length_delimited(0x12, b"x" * data.draw(st.sampled_from([0, 1, 127, 128, 129]))),
            length_delimited(0x32, data.draw(st.sampled_from(IDS)) if odd else b"i" * 32),
            BORN.pack(BORN_KEY, data.draw(st.integers(0, 2**64 - 1))),
            IDENTITY.pack(INSTANCE_KEY, instance, SEQUENCE_KEY, (first_sequence + index) % 2**64),
        ]
        if odd and data.draw(st.booleans()):  # twice, left out, or elsewhere
            at, to = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
            fields.insert(to, fields[at] if data.draw(st.booleans()) else fields.pop(at))
        parts.append(b"".join(fields))
    records = b"".join(frame_header(len(part)) + part for part in parts)
    wanted = QueueBatch(topic=topic, queue_id=3, records=records, sizes=[len(part) for part in parts])
    body_bytes_max = data.draw(st.sampled_from([127, 128, BODY_MAX]))
    expected = the_long_way(wanted, body_bytes_max=body_bytes_max)
    if expected is None:
        with pytest.raises(InvalidMessageError):
            parsed(wanted, body_bytes_max=body_bytes_max)
        return
    messages = parse_messages(records, len(parts))
    got = parsed(wanted, body_bytes_max=body_bytes_max)
    assert (got.topic, got.queue_id, got.parts, list(got.message_ids)) == (topic, 3, parts, expected)
    assert (list(got.tags_codes), got.keys) == ([0] * len(parts), ())
    assert got.producer_instance == messages[0].producer_instance
    assert got.first_sequence == (messages[0].sequence if got.producer_instance else 0)


@settings(max_examples=300)
@given(st.data())
def test_a_changed_byte_is_seen_or_harmless(data: st.DataObject) -> None:
    """Whatever passes, parses message by message, with and without the broker's trailer behind it."""
    good = batch(numbered("orders", 1, 3))
    records = bytearray(good.records)
    at = data.draw(st.integers(0, len(records) - 1))
    records[at] = data.draw(st.integers(0, 255))
    good.records = bytes(records)
    try:
        checked = parsed(good)
    except InvalidMessageError:
        return
    trailer = Message(queue_offset=12345).SerializeToString()
    for part in checked.parts:
        message_read = Message.FromString(bytes(part) + trailer)
        assert message_read.queue_offset == 12345
        assert message_read.topic == "orders"
        assert not message_read.HasField("system")
