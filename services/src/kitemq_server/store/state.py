"""All derived state that a snapshot holds."""

from __future__ import annotations

from typing import Any

from kitemq_server.store.consume_queue import ConsumeQueue, QueueFiles, QueueTable
from kitemq_server.store.dedupe import Dedupe
from kitemq_server.store.tables import Tables


class State:
    """Queues, tables and dedupe windows of a store.

    deleted_topics: topics deleted since the last snapshot that is on disk, with the files of their queues still there.
    """

    __slots__ = ("dedupe", "deleted_topics", "last_store_timestamp_ms", "queues", "tables")

    def __init__(self, files: QueueFiles) -> None:
        self.queues = QueueTable(files)
        self.tables = Tables()
        self.dedupe = Dedupe()
        self.last_store_timestamp_ms = 0
        self.deleted_topics: set[str] = set()

    @property
    def epoch(self) -> int:
        """The highest epoch in the log."""
        epochs = self.tables.epochs
        return epochs[-1].epoch if epochs else 0

    def apply_change(self, change: Any, timestamp_ms: int) -> list[ConsumeQueue]:
        """A system record takes effect; returns the queues that are gone with it."""
        self.tables.apply(change, timestamp_ms)
        if change.WhichOneof("change") != "topic_deleted":
            return []
        topic = change.topic_deleted
        self.dedupe.drop_topic(topic)
        self.deleted_topics.add(topic)
        return self.queues.drop_topic(topic)

    def confirm_all(self) -> None:
        """Everything applied is confirmed: the end of recovery."""
        for queue in self.queues:
            queue.max_offset = queue.trusted_offset = queue.next_offset

    def capture(self) -> dict[str, Any]:
        """What a snapshot holds, copied as far as it can change."""
        windows, recent_ids = self.dedupe.capture()
        return {
            **self.tables.capture(),
            "last_store_timestamp_ms": self.last_store_timestamp_ms,
            "queues": [(queue.topic, queue.queue_id, queue.min_offset, queue.next_offset) for queue in self.queues],
            "windows": windows,
            "recent_ids": recent_ids,
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Replaces everything by what a snapshot holds."""
        self.tables.restore(snapshot)
        self.last_store_timestamp_ms = snapshot["last_store_timestamp_ms"]
        for topic, queues in snapshot["queues"].items():
            for queue_id, min_offset, end_offset in queues:
                self.queues.add(
                    ConsumeQueue(self.queues.files, topic, queue_id, min_offset=min_offset, end_offset=end_offset)
                )
        self.dedupe.restore(snapshot["windows"], snapshot["recent_ids"])
