"""The hand-made encoding against the generated class."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitemq import Compression, InvalidMessageError, InvalidRequestError, Message
from kitemq.compression import decompress
from kitemq.producer.accumulator import IDENTITY_BYTES
from kitemq.producer.encoding import MessageEncoder
from kitemq.proto.v1 import message_pb2
from kitemq.protocol.record import IDENTITY, INSTANCE_KEY, SEQUENCE_KEY, frame_header, frame_length, varint

words = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="|"), min_size=1, max_size=40).filter(
    lambda text: text == text.strip() and text.isprintable()
)


def encoder(compression: Compression = Compression.NONE, compress_from_bytes: int = 4096) -> MessageEncoder:
    return MessageEncoder(group="g", compression=compression, compress_from_bytes=compress_from_bytes)


@given(
    topic=st.from_regex(r"[%|a-zA-Z0-9_-]{1,127}", fullmatch=True).filter(lambda name: name != "SELF_TEST_TOPIC"),
    body=st.binary(min_size=1, max_size=2000),
    tag=st.one_of(st.just(""), words),
    keys=st.lists(words, max_size=5),
    properties=st.dictionaries(st.text(max_size=50), st.text(max_size=200), max_size=5),
    sharding_key=st.text(max_size=64),
    message_id=st.one_of(st.just(""), words),
    sequence=st.integers(1, 2**63),
)
def test_what_is_encoded_is_what_parses(
    topic: str,
    body: bytes,
    tag: str,
    keys: list[str],
    properties: dict[str, str],
    sharding_key: str,
    message_id: str,
    sequence: int,
) -> None:
    coder = encoder()
    message = Message(topic, body, tag=tag, keys=keys, properties=properties, message_id=message_id)
    part, given_id = coder.encode(message, sharding_key)
    whole = part + IDENTITY.pack(INSTANCE_KEY, coder.instance, SEQUENCE_KEY, sequence)
    framed = frame_header(len(whole)) + whole
    (parsed,) = message_pb2.Segment.FromString(framed).records
    assert (parsed.topic, parsed.body, parsed.tag, list(parsed.keys)) == (topic, body, tag, keys)
    assert dict(parsed.properties) == properties
    assert parsed.sharding_key == sharding_key
    assert parsed.message_id == given_id == (message_id or given_id)
    assert (parsed.producer_instance, parsed.sequence, parsed.producer_group) == (coder.instance, sequence, "g")
    assert parsed.born_timestamp_ms > 1_600_000_000_000
    assert not parsed.HasField("system") and not parsed.HasField("origin")
    assert frame_length(framed, 0) == len(part) + IDENTITY_BYTES


@given(st.integers(0, 2**63))
def test_varint_reads_back(value: int) -> None:
    data = varint(value)
    assert sum((byte & 0x7F) << 7 * index for index, byte in enumerate(data)) == value
    assert all(byte & 0x80 for byte in data[:-1]) and not data[-1] & 0x80


def test_ids_differ_and_count() -> None:
    coder = encoder()
    ids = [coder.encode(Message("t", b"x"), "")[1] for _ in range(3)]
    assert len({*ids}) == 3 and {len(text) for text in ids} == {32}
    assert [int(text[16:], 16) for text in ids] == [1, 2, 3]
    assert len({text[:16] for text in ids}) == 1


@pytest.mark.parametrize("algorithm", [Compression.ZLIB, Compression.LZ4, Compression.ZSTD])
def test_big_bodies_are_compressed_and_come_back(algorithm: Compression) -> None:
    body = b"abc" * 5000
    part, _ = encoder(algorithm).encode(Message("t", body), "")
    parsed = message_pb2.Message.FromString(part)
    assert len(parsed.body) < len(body) // 10
    assert parsed.sys_flag & 1 and (parsed.sys_flag >> 8) & 7 == algorithm.value
    assert decompress(parsed.body, parsed.sys_flag) == body


def test_small_and_incompressible_bodies_stay_as_they_are() -> None:
    import os

    noise = os.urandom(8192)
    for body in (b"a" * 4095, noise):
        parsed = message_pb2.Message.FromString(encoder(Compression.ZLIB).encode(Message("t", body), "")[0])
        assert (parsed.body, parsed.sys_flag) == (body, 0)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (Message("t", b""), "0 bytes"),
        (Message("t", b"x" * (4 * 1024 * 1024 + 1)), "4194305 bytes"),
        (Message("t", "text"), "encode it first"),  # type: ignore[arg-type]
        (Message("t", b"x", tag="a|b"), "tag"),
        (Message("t", b"x", tag=" a"), "tag"),
        (Message("t", b"x", tag="a\n"), "tag"),
        (Message("t", b"x", keys="word"), "list of strings"),
        (Message("t", b"x", keys=["a", ""]), "non-empty"),
        (Message("t", b"x", keys=["k"] * 65), "64"),
        (Message("t", b"x", properties={"a": "x" * 32_767}), "32767"),
        (Message("t", b"x", message_id="i" * 129), "128"),
        (Message("SELF_TEST_TOPIC", b"x"), "takes no messages"),
    ],
)
def test_bad_messages_say_what_is_wrong(message: Message, text: str) -> None:
    with pytest.raises(InvalidMessageError, match=text):
        encoder().encode(message, "")


@pytest.mark.parametrize("topic", ["", "a b", "ä", "x" * 128, "a/b", "t\n"])
def test_bad_topics_are_refused(topic: str) -> None:
    with pytest.raises(InvalidRequestError, match="topic"):
        encoder().encode(Message(topic, b"x"), "")


def test_long_sharding_keys_are_refused() -> None:
    with pytest.raises(InvalidMessageError, match="sharding key"):
        encoder().encode(Message("t", b"x"), "k" * 65)
