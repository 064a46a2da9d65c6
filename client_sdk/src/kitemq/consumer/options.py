"""What a consumer is told when it is made, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from urllib.parse import quote

from kitemq.consumer.allocate import Allocation
from kitemq.errors import InvalidRequestError
from kitemq.proto.v1 import broker_pb2
from kitemq.protocol.names import check_group
from kitemq.rpc import TlsConfig, parse_addresses

MIB = 1024 * 1024


class MessageModel(Enum):
    """CLUSTERING: the members of a group share the messages. BROADCASTING: every member gets all of them."""

    CLUSTERING = broker_pb2.CLUSTERING
    BROADCASTING = broker_pb2.BROADCASTING


class Position(Enum):
    """An end of a queue. FIRST: the oldest message there is. LAST: only what comes from now on."""

    FIRST = "first"
    LAST = "last"


Start = Position | datetime


def timestamp_ms(moment: datetime) -> int:
    """Unix milliseconds. Raises InvalidRequestError for a time without a time zone, or before 1970."""
    if moment.tzinfo is None:
        raise InvalidRequestError(f"{moment.isoformat()} has no time zone: write datetime(..., tzinfo=UTC)")
    milliseconds = int(moment.timestamp() * 1000)
    if milliseconds < 0:
        raise InvalidRequestError(f"{moment.isoformat()} is before 1970")
    return milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerOptions:
    """The settings that both kinds of consumer have; what they mean is said at the constructors.

    Raises InvalidRequestError for one that makes no sense.
    """

    namesrv: str | Sequence[str]
    group: str
    # None = one that is new at every start.
    client_id: str | None
    consume_type: broker_pb2.ConsumeType.ValueType
    message_model: MessageModel
    from_where: Start
    allocation: Allocation
    prefetch_messages: int
    prefetch_bytes: int
    # None = no limit.
    span_max: int | None
    auto_commit: bool
    commit_interval_s: float
    drain_timeout_s: float
    offsets_dir: str | Path | None
    tls: TlsConfig | None

    def __post_init__(self) -> None:
        check_group(self.group, kind="consumer group")
        self.addresses()
        _within("prefetch_messages", self.prefetch_messages, 1, 65_535)
        _within("prefetch_bytes", self.prefetch_bytes, 64 * 1024, 1024 * MIB)
        if self.span_max is not None:
            _within("span_max", self.span_max, 1, 65_535)
        _within("commit_interval_s", self.commit_interval_s, 0.05, 3600)
        _within("drain_timeout_s", self.drain_timeout_s, 0, 24 * 3600)
        if isinstance(self.from_where, datetime):
            timestamp_ms(self.from_where)
        elif not isinstance(self.from_where, Position):
            raise InvalidRequestError(
                f"from_where is {self.from_where!r}: give Position.FIRST, Position.LAST or a datetime"
            )

    def addresses(self) -> list[str]:
        """Of the namesrvs."""
        return parse_addresses(self.namesrv if isinstance(self.namesrv, str) else list(self.namesrv))

    @property
    def clustering(self) -> bool:
        return self.message_model is MessageModel.CLUSTERING

    @property
    def offsets_file(self) -> Path | None:
        """Where a broadcasting consumer keeps its offsets; None = in memory, because nothing names it across starts."""
        if self.client_id is None:
            return None
        root = Path(self.offsets_dir) if self.offsets_dir is not None else Path.home() / ".kitemq" / "offsets"
        return root / quote(self.client_id, safe="@#") / f"{quote(self.group, safe='')}.json"


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} {value} is not within {low}..{high}")
