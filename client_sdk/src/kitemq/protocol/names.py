"""Names and limits, as in RocketMQ, each with its own error that says what and where."""

from __future__ import annotations

import re

from kitemq.errors import InvalidMessageError, InvalidRequestError

TOPIC_CHARS_MAX = 127
SYSTEM_TOPIC_CHARS_MAX = 255  # %RETRY% and %DLQ% topics
GROUP_CHARS_MAX = 120
BODY_BYTES_MAX = 4 * 1024 * 1024
RECORD_BYTES_MAX = BODY_BYTES_MAX + 64 * 1024
PROPERTIES_BYTES_MAX = 32_767
KEYS_MAX = 64
SHARDING_KEY_CHARS_MAX = 64
MESSAGE_ID_CHARS_MAX = 128
QUEUE_COUNT_MAX = 16_384
# Of one SendRequest. It is one turn of the broker's loop: so many messages take it some 50 ms.
REQUEST_BATCHES_MAX = 1_024
REQUEST_MESSAGES_MAX = 16_384

# gRPC messages: a full request or reply, and what a last record may add to it.
GRPC_BYTES_MAX = 16 * 1024 * 1024

RETRY_PREFIX = "%RETRY%"
DLQ_PREFIX = "%DLQ%"
DEFAULT_TOPIC = "TBW102"
SYSTEM_PREFIX = "rmq_sys_"
SYSTEM_TOPICS = frozenset(
    {
        DEFAULT_TOPIC,
        "SCHEDULE_TOPIC_XXXX",
        "BenchmarkTest",
        "RMQ_SYS_TRANS_HALF_TOPIC",
        "RMQ_SYS_TRACE_TOPIC",
        "RMQ_SYS_TRANS_OP_HALF_TOPIC",
        "TRANS_CHECK_MAX_TIME_TOPIC",
        "SELF_TEST_TOPIC",
        "OFFSET_MOVED_EVENT",
        "CHECKPOINT_TOPIC",
    }
)
NOT_SENDABLE_TOPICS = frozenset(
    {
        "SCHEDULE_TOPIC_XXXX",
        "RMQ_SYS_TRANS_HALF_TOPIC",
        "RMQ_SYS_TRANS_OP_HALF_TOPIC",
        "TRANS_CHECK_MAX_TIME_TOPIC",
        "SELF_TEST_TOPIC",
        "OFFSET_MOVED_EVENT",
    }
)
NOT_ALLOWED_GROUPS = frozenset({"DEFAULT_PRODUCER", "DEFAULT_CONSUMER"})

PERMISSION_INHERIT = 1
PERMISSION_WRITE = 2
PERMISSION_READ = 4
PERMISSION_READ_WRITE = PERMISSION_READ | PERMISSION_WRITE

_NAME = re.compile(r"[%|a-zA-Z0-9_-]+", re.ASCII)


def is_system_topic(topic: str) -> bool:
    """True for topics that users may not create, change or delete."""
    return topic in SYSTEM_TOPICS or topic.startswith(SYSTEM_PREFIX)


def check_topic(topic: str) -> None:
    """Raises InvalidRequestError unless `topic` is a legal topic name."""
    _check_name(
        "topic", topic, SYSTEM_TOPIC_CHARS_MAX if topic.startswith((RETRY_PREFIX, DLQ_PREFIX)) else TOPIC_CHARS_MAX
    )


def check_group(group: str, *, kind: str = "group") -> None:
    """Raises InvalidRequestError unless `group` is a legal producer or consumer group name."""
    _check_name(kind, group, GROUP_CHARS_MAX)
    if group in NOT_ALLOWED_GROUPS:
        raise InvalidRequestError(f"{kind} name {group!r} is reserved: choose your own")


def check_sendable(topic: str) -> None:
    """Raises InvalidMessageError for a topic that takes no messages from users."""
    if topic in NOT_SENDABLE_TOPICS:
        raise InvalidMessageError(f"topic {topic!r} takes no messages from users", topic=topic)


def _check_name(kind: str, name: str, chars_max: int) -> None:
    if not name:
        raise InvalidRequestError(f"{kind} name is empty")
    if len(name) > chars_max:
        raise InvalidRequestError(f"{kind} name {name[:40]!r}… has {len(name)} characters: at most {chars_max}")
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(f"{kind} name {name!r} may hold letters, digits, '_', '-', '%' and '|' only")
