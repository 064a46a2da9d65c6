"""What a tag expression lets pass."""

from __future__ import annotations

import pytest

from kitemq.errors import InvalidRequestError
from kitemq_server.broker.filters import parse_filter


@pytest.mark.parametrize(
    ("expression", "tags"),
    [
        ("", None),
        ("*", None),
        (" * ", None),
        ("a", {"a"}),
        ("a || b", {"a", "b"}),
        ("a||b || a||", {"a", "b"}),
        ("ä b", {"ä b"}),
    ],
)
def test_expressions(expression: str, tags: set[str] | None) -> None:
    assert parse_filter(expression) == tags


@pytest.mark.parametrize(
    "expression", ["||", " || ", "a | b", "a || b\n || c\x00", "x" * 8193, "||".join(map(str, range(257)))]
)
def test_what_is_no_filter(expression: str) -> None:
    with pytest.raises(InvalidRequestError):
        parse_filter(expression)
