"""host:port texts, listeners and advertised addresses."""

from __future__ import annotations

import pytest

from kitemq_server.common.addresses import (
    Listener,
    advertised_addresses,
    join_address,
    parse_listeners,
    primary_host,
    split_address,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:9876", ("127.0.0.1", 9876)),
        ("broker-a.example_net:0", ("broker-a.example_net", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:1", ("fe80::1%eth0", 1)),
    ],
)
def test_addresses(text: str, expected: tuple[str, int]) -> None:
    assert split_address(text) == expected
    assert join_address(*expected) == text


@pytest.mark.parametrize("text", ["host", "[::1]"])
def test_a_default_port(text: str) -> None:
    assert split_address(text, default_port=7) == (text.strip("[]"), 7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no port"),
        ("host", "no port"),
        ("[::1]", "no port"),
        (":1", "no valid host"),
        ("::1:9876", "in brackets"),
        ("a b:1", "no valid host"),
        ("host:port", "no valid port"),
        ("host:65536", "no valid port"),
        ("host:-1", "no valid port"),
        ("host:٣", "no valid port"),
    ],
)
def test_malformed_addresses(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_address(text)


def test_listeners_from_text_and_table() -> None:
    both = (Listener("internal", "0.0.0.0", 1), Listener("external", "::", 2))
    assert parse_listeners("0.0.0.0:1,external=[::]:2") == both
    assert parse_listeners({"internal": "0.0.0.0:1", "external": "[::]:2"}) == both
    assert parse_listeners(both) == both
    assert [str(listener) for listener in both] == ["0.0.0.0:1", "external=[::]:2"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("", "needs 1 to 8"),
        ("a:1,b:2", "'internal' occurs twice"),
        ("x=a:1,x=b:2", "'x' occurs twice"),
        ("UP=a:1", "listener name 'UP'"),
        (7, "must be text or a table"),
        ({f"l{i}": "a:1" for i in range(9)}, "needs 1 to 8"),
    ],
)
def test_malformed_listeners(value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_listeners(value)


def test_what_others_are_told_to_dial() -> None:
    listeners = [
        Listener("internal", "0.0.0.0", 0),
        Listener("local", "127.0.0.1", 0),
        Listener("external", "::", 0),
        Listener("wan", "0.0.0.0", 0),
    ]
    ports = {"internal": 1, "local": 2, "external": 3, "wan": 4}
    advertise = {"external": "queue.example.com", "wan": "203.0.113.7:4000"}
    assert advertised_addresses(listeners, ports=ports, advertise=advertise) == {
        "internal": f"{primary_host()}:1",
        "local": "127.0.0.1:2",
        "external": "queue.example.com:3",
        "wan": "203.0.113.7:4000",
    }
