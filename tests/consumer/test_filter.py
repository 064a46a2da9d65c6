"""Tag expressions."""

from __future__ import annotations

import pytest

from kitemq.consumer.filter import normalized, tags_of
from kitemq.errors import InvalidRequestError


@pytest.mark.parametrize(
    ("expression", "wanted"),
    [
        ("*", "*"),
        ("", "*"),
        (" * ", "*"),
        ("paid", "paid"),
        ("paid||refunded", "paid || refunded"),
        ("  paid  ||  refunded ||", "paid || refunded"),
        ("paid || paid", "paid"),
        ("größe || 大", "größe || 大"),
    ],
)
def test_normalized(expression: str, wanted: str) -> None:
    assert normalized(expression) == wanted
    assert normalized(wanted) == wanted


@pytest.mark.parametrize("expression", ["||", "a | b", "a || b\x00", "|||", "a || *"])
def test_what_cannot_be(expression: str) -> None:
    with pytest.raises(InvalidRequestError):
        tags_of(expression)
