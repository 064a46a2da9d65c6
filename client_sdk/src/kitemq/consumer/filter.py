"""Tag expressions: which messages of a topic a consumer wants."""

from __future__ import annotations

from kitemq.errors import InvalidRequestError

ALL = "*"


def tags_of(expression: str) -> tuple[str, ...]:
    """The tags of "a || b", in order, each once; empty for "*" and "": everything.

    Raises InvalidRequestError for an expression that names no tag, or one with control characters.
    """
    text = expression.strip()
    if text in ("", ALL):
        return ()
    tags = tuple(dict.fromkeys(tag for part in text.split("||") if (tag := part.strip())))
    if not tags:
        raise InvalidRequestError(f"filter {expression!r} names no tag: write 'a || b', or '*' for all messages")
    for tag in tags:
        if tag == ALL:
            raise InvalidRequestError(f"filter {expression!r} mixes '*' with tags: use one or the other")
        if "|" in tag or not tag.isprintable():
            raise InvalidRequestError(f"filter {expression!r}: {tag!r} is no tag: separate tags with '||'")
    return tags


def normalized(expression: str) -> str:
    """The expression as it goes over the wire: "*", or tags joined by " || ". Raises as `tags_of`."""
    return " || ".join(tags_of(expression)) or ALL
