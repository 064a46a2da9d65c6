"""Tag filters of pulls: "*", or tags joined by "||"."""

from __future__ import annotations

from functools import lru_cache

from kitemq.errors import InvalidRequestError
from kitemq_server.broker.incoming import tag_problem

FILTER_CHARS_MAX = 8192
FILTER_TAGS_MAX = 256


@lru_cache(maxsize=4096)
def parse_filter(expression: str) -> frozenset[str] | None:
    """The tags that "a || b" lets pass; None = all messages ("*" or nothing).

    Raises InvalidRequestError for an expression that is too long, names no tag, or holds what cannot be one.
    """
    if len(expression) > FILTER_CHARS_MAX:
        raise InvalidRequestError(f"filter has {len(expression)} characters: at most {FILTER_CHARS_MAX}")
    if expression.strip() in ("", "*"):
        return None
    tags = frozenset(tag for part in expression.split("||") if (tag := part.strip()))
    if not tags:
        raise InvalidRequestError(f"filter {expression[:40]!r} names no tag: write 'a || b', or '*' for all messages")
    if len(tags) > FILTER_TAGS_MAX:
        raise InvalidRequestError(f"filter has {len(tags)} tags: at most {FILTER_TAGS_MAX}")
    for tag in tags:
        if problem := tag_problem(tag):
            raise InvalidRequestError(f"filter: tag {tag[:40]!r} {problem}")
    return tags
