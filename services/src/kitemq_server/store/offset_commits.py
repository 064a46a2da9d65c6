"""Commits of consumer offsets: visible at once, recorded one by one (durable) or together, every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from kitemq.proto.v1 import message_pb2
from kitemq_server.store.tables import OffsetTable

_OFFSETS_PER_RECORD = 5_000


class OffsetCommits:
    """What has been committed and is not in the log yet. Loop only.

    append_changes: appends system records as a group and applies them; returns their physical end.
    """

    def __init__(
        self,
        table: OffsetTable,
        append_changes: Callable[[Sequence[message_pb2.SystemRecord]], int],
        *,
        interval_ms: int,
    ) -> None:
        self._table = table
        self._append_changes = append_changes
        self._interval_s = interval_ms / 1000
        self._pending: dict[tuple[str, str, int], message_pb2.GroupOffset] = {}
        self._pending_since = 0.0

    def commit(self, offsets: Iterable[message_pb2.GroupOffset], *, durable: bool) -> int:
        """See MessageStore.commit_offsets. Of a durable commit that moves nothing, 0 is returned."""
        moved = [offset for offset in offsets if self._table.moves(offset)]
        if durable:
            end_offset = self.append_pending()
            return self._append(moved) if moved else end_offset
        if moved and not self._pending:
            self._pending_since = time.monotonic()
        for offset in moved:
            self._table.commit(offset)
            key = (offset.group, offset.topic, offset.queue_id)
            before = self._pending.get(key)
            if before is not None and (before.reset or before.deleted) and not offset.deleted:
                # One record says what two did: back, and forwards again.
                merged = message_pb2.GroupOffset(reset=True)
                merged.MergeFrom(offset)
                offset = merged
            self._pending[key] = offset
        return 0

    def append_if_due(self, now_s: float) -> None:
        """Records what has waited long enough."""
        if self._pending and now_s - self._pending_since >= self._interval_s:
            self.append_pending()

    def append_pending(self) -> int:
        """Records what waits; returns its physical end, 0 = nothing waited."""
        if not self._pending:
            return 0
        end_offset = self._append(list(self._pending.values()))
        self._pending.clear()
        return end_offset

    def _append(self, offsets: Sequence[message_pb2.GroupOffset]) -> int:
        return self._append_changes(
            [
                message_pb2.SystemRecord(
                    offsets_committed=message_pb2.OffsetsCommitted(offsets=offsets[start : start + _OFFSETS_PER_RECORD])
                )
                for start in range(0, len(offsets), _OFFSETS_PER_RECORD)
            ]
        )
