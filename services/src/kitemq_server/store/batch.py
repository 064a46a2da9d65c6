"""What the broker hands to an append and gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True)
class ClientBatch:
    """Messages of one producer for one queue, in order, validated by the broker.

    parts: producers' Message bytes without frame and trailer, each of which parses. tags_codes and message_ids: one for
    each part. keys: the keys of each part, or empty when none has any. producer_instance: 0 = none, then repeats are
    found by message id. first_sequence: of parts[0], the others count on from it; 0 = no sequence.
    """

    topic: str
    queue_id: int
    parts: Sequence[bytes | memoryview]
    tags_codes: Sequence[int]
    message_ids: Sequence[str]
    keys: Sequence[Sequence[str]] = ()
    producer_instance: int = 0
    first_sequence: int = 0


@dataclass(slots=True)
class OffsetRun:
    """Queue offsets of neighbouring messages of a batch.

    repeated: stored by an earlier try. unknown: repeated, but longer ago than the store remembers (the offset is 0).
    queue_id differs from the batch's only for a message id that was stored in another queue of the topic before.
    """

    first_queue_offset: int
    count: int
    repeated: bool
    unknown: bool
    queue_id: int


class AppendReceipt(NamedTuple):
    """end_offset: physical end of the last record, of the first copies for repeats: confirmed means all are. runs: one
    list for each batch, in its order, covering every message."""

    end_offset: int
    store_timestamp_ms: int
    runs: list[list[OffsetRun]]
