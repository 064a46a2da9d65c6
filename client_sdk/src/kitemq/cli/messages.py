"""Messages on stdout and stdin: one JSON object a line, or one body a line.

The JSON of `tail`, `consume` and `message get` is what `produce --json` reads:

    body (text) or body_base64 (when the body is not UTF-8), tag, keys, properties, sharding_key
    topic, message_id, producer_group, born_timestamp_ms, broker_name, queue_id, queue_offset, physical_offset,
    store_timestamp_ms, reconsume_times       which message it was: ignored when read, for a copy is a new message
"""

from __future__ import annotations

import base64
import binascii
import json
import sys
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kitemq.message import Message, ReceivedMessage

_SENT_FIELDS = frozenset({"body", "body_base64", "tag", "keys", "properties", "sharding_key"})
_STORED_FIELDS = frozenset(
    {
        "topic",
        "message_id",
        "producer_group",
        "born_timestamp_ms",
        "broker_name",
        "queue_id",
        "queue_offset",
        "physical_offset",
        "store_timestamp_ms",
        "reconsume_times",
    }
)
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if code != 0x09}
# What json leaves as it is, but what moves a terminal's cursor or ends a line for some readers.
_JSON_CONTROL = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), 0x2028, 0x2029)}


class MessageFormat(StrEnum):
    """-o of verbs that print messages."""

    TEXT = "text"
    JSON = "json"


def message_object(message: ReceivedMessage) -> dict[str, Any]:
    """A stored message as the JSON object of its line."""
    body = message.body
    try:
        content = {"body": body.decode()}
    except UnicodeDecodeError:
        content = {"body_base64": base64.b64encode(body).decode()}
    return {
        "topic": message.topic,
        **content,
        "tag": message.tag,
        "keys": list(message.keys),
        "properties": message.properties,
        "sharding_key": message.sharding_key,
        "message_id": message.message_id,
        "producer_group": message.producer_group,
        "born_timestamp_ms": message.born_timestamp_ms,
        "broker_name": message.queue.broker_name,
        "queue_id": message.queue.queue_id,
        "queue_offset": message.queue_offset,
        "physical_offset": message.physical_offset,
        "store_timestamp_ms": message.store_timestamp_ms,
        "reconsume_times": message.reconsume_times,
    }


def message_line(message: ReceivedMessage) -> str:
    """A stored message as one line of JSON."""
    return json.dumps(message_object(message), ensure_ascii=False).translate(_JSON_CONTROL)


def parse_message_line(line: bytes, *, topic: str) -> tuple[Message, str]:
    """The message for `topic` that a JSON line describes, and its sharding key.

    Raises ValueError, in words for people, for a line that is none.
    """
    from kitemq.message import Message

    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"must be a JSON object, is {type(value).__name__}")
    unknown = value.keys() - _SENT_FIELDS - _STORED_FIELDS
    if unknown:
        raise ValueError(f"unknown field {min(unknown)!r}: {', '.join(sorted(_SENT_FIELDS))} are known")
    message = Message(
        topic=topic,
        body=_body(value),
        tag=_text(value, "tag"),
        keys=_texts(value, "keys"),
        properties=_properties(value),
    )
    return message, _text(value, "sharding_key")


def _body(value: Mapping[str, Any]) -> bytes:
    if ("body" in value) == ("body_base64" in value):
        raise ValueError("needs either 'body' or 'body_base64'")
    if "body" in value:
        return _text(value, "body").encode()
    try:
        return base64.b64decode(_text(value, "body_base64"), validate=True)
    except binascii.Error as error:
        raise ValueError(f"'body_base64': {error}") from None


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name, "")
    if not isinstance(text, str):
        raise ValueError(f"{name!r} must be text")
    _check_encodable(name, text)
    return text


def _texts(value: Mapping[str, Any], name: str) -> list[str]:
    texts = value.get(name, [])
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name!r} must be a list of texts")
    _check_encodable(name, *texts)
    return texts


def _properties(value: Mapping[str, Any]) -> dict[str, str]:
    properties = value.get("properties", {})
    if not isinstance(properties, dict) or not all(isinstance(text, str) for text in properties.values()):
        raise ValueError("'properties' must be an object of texts")
    _check_encodable("properties", *properties, *properties.values())
    return properties


def _check_encodable(name: str, *texts: str) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half of a surrogate pair") from None


class MessagePrinter:
    """Writes messages to stdout, a line each.

    Text: the body as it is; on a terminal with when and where it was stored, and with control characters spelt out.
    """

    def __init__(self, output: MessageFormat) -> None:
        self._json = output is MessageFormat.JSON
        self._on_terminal = sys.stdout.isatty()
        self._stream = sys.stdout.buffer
        self.count = 0

    def print(self, message: ReceivedMessage) -> None:
        """One message. Raises BrokenPipeError, here or in `flush`, when nobody reads any more."""
        if self._json:
            line = message_line(message).encode()
        elif self._on_terminal:
            line = terminal_line(message).encode()
        else:
            line = message.body
        self._stream.write(line + b"\n")
        self.count += 1

    def flush(self) -> None:
        self._stream.flush()


def terminal_line(message: ReceivedMessage) -> str:
    """When, where, tag and keys of a message, dimmed, and its body without control characters."""
    when = datetime.fromtimestamp(message.store_timestamp_ms / 1000).strftime("%H:%M:%S.%f")[:-3]  # noqa: DTZ006
    labels = [f"{when} {message.queue.broker_name}:{message.queue.queue_id}:{message.queue_offset}"]
    if message.tag:
        labels.append(message.tag)
    labels += [f"#{key}" for key in message.keys]
    return f"\x1b[2m{printable(' '.join(labels))}\x1b[0m {body_text(message.body)}"


def body_text(body: bytes) -> str:
    """A body for people: text with control characters and foreign bytes spelt out."""
    return printable(body.decode(errors="backslashreplace"))


def printable(text: str) -> str:
    """Text that cannot move the cursor or change the terminal."""
    return text.translate(_CONTROL)
