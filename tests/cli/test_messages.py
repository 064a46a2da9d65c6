"""Messages as JSON lines: what is printed is what can be read again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitemq.admin.results import received_from_proto
from kitemq.cli.messages import body_text, message_line, message_object, parse_message_line, printable, terminal_line
from kitemq.message import ReceivedMessage
from kitemq.proto.v1 import message_pb2

text = st.text(st.characters(codec="utf-8"), max_size=20)


def stored(**fields: Any) -> ReceivedMessage:
    message = message_pb2.Message(
        topic="orders",
        message_id="AB" * 16,
        producer_group="shop",
        born_timestamp_ms=1_700_000_000_000,
        record_kind=1,
        queue_id=3,
        queue_offset=0,
        physical_offset=4096,
        store_timestamp_ms=1_700_000_000_005,
        epoch=2,
        **fields,
    )
    return received_from_proto("broker-a", message)


@given(
    body=st.binary(min_size=1, max_size=60) | text.map(str.encode).filter(bool),
    tag=text,
    keys=st.lists(text, max_size=3),
    properties=st.dictionaries(text, text, max_size=3),
    sharding_key=text,
)
def test_a_printed_line_reads_as_the_same_message(
    body: bytes, tag: str, keys: list[str], properties: dict[str, str], sharding_key: str
) -> None:
    printed = stored(body=body, tag=tag, keys=keys, properties=properties, sharding_key=sharding_key)
    shown = message_line(printed)
    assert shown.splitlines() == [shown]
    assert json.loads(shown) == message_object(printed)
    line = shown.encode()
    message, key = parse_message_line(line, topic="copy")
    assert message.topic == "copy"
    assert (message.body, message.tag, list(message.keys), dict(message.properties)) == (body, tag, keys, properties)
    assert (message.message_id, key) == ("", sharding_key)


def test_the_fields_of_a_line_are_stable() -> None:
    assert message_object(stored(body=b"hello", tag="paid", keys=["o-1"], properties={"a": "b"})) == {
        "topic": "orders",
        "body": "hello",
        "tag": "paid",
        "keys": ["o-1"],
        "properties": {"a": "b"},
        "sharding_key": "",
        "message_id": "AB" * 16,
        "producer_group": "shop",
        "born_timestamp_ms": 1_700_000_000_000,
        "broker_name": "broker-a",
        "queue_id": 3,
        "queue_offset": 0,
        "physical_offset": 4096,
        "store_timestamp_ms": 1_700_000_000_005,
        "reconsume_times": 0,
    }
    assert message_object(stored(body=b"\xff\x00"))["body_base64"] == "/wA="


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"hello", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "must be a JSON object, is list"),
        (b"{}", "needs either 'body' or 'body_base64'"),
        (b'{"body": "a", "body_base64": "YQ=="}', "needs either"),
        (b'{"body": 7}', "'body' must be text"),
        (b'{"body_base64": "!"}', "'body_base64'"),
        (b'{"bdy": "a"}', "unknown field 'bdy'"),
        (b'{"body": "a", "keys": "k"}', "'keys' must be a list of texts"),
        (b'{"body": "a", "keys": [1]}', "'keys' must be a list of texts"),
        (b'{"body": "a", "properties": {"n": 1}}', "'properties' must be an object of texts"),
        (b'{"body": "a", "properties": []}', "'properties' must be an object of texts"),
        (b'{"body": "\\ud800"}', "surrogate"),
        (b'{"body": "a", "properties": {"n": "\\ud800"}}', "surrogate"),
        (b'{"body": "a", "keys": ["\\ud800"]}', "surrogate"),
    ],
)
def test_a_line_that_is_no_message_is_refused_in_words(line: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_message_line(line, topic="orders")


def test_a_body_cannot_move_the_cursor() -> None:
    assert body_text(b"a\x1b[2Jb\r\n\tc\x9b") == "a\\x1b[2Jb\\x0d\\x0a\tc\\x9b"
    assert printable("grün") == "grün"
    line = terminal_line(stored(body="ü\x1b[0m".encode(), tag="pa\x07id", keys=["k\x1b"]))
    assert line.count("\x1b") == 2  # dim on, dim off
    assert "broker-a:3:0 pa\\x07id #k\\x1b" in line
    assert line.endswith(" ü\\x1b[0m")


@given(queue_offset=st.integers(0, 2**63), body=st.binary(min_size=1, max_size=20))
def test_a_parsed_record_keeps_its_place(queue_offset: int, body: bytes) -> None:
    message = message_pb2.Message(topic="t", body=body, queue_id=7, queue_offset=queue_offset, epoch=1)
    received = received_from_proto("b", message)
    assert (received.queue_offset, received.queue.queue_id, received.body) == (queue_offset, 7, body)
    assert (received.physical_offset, received.store_timestamp_ms, received.epoch) == (0, 0, 1)
    assert received.detach().queue_offset == queue_offset
