"""How far behind each consumer group is. Looked up when somebody asks; nothing is kept."""

from __future__ import annotations

from kitemq_server.broker.membership import Membership
from kitemq_server.store.consume_queue import ConsumeQueue
from kitemq_server.store.message_store import MessageStore


class Lags:
    """Over the queues in which a group has committed an offset."""

    def __init__(self, store: MessageStore, membership: Membership) -> None:
        self._store = store
        self._membership = membership

    def topics(self, group: str) -> list[str]:
        """Topics that the group has offsets in, or a member subscribed to; sorted."""
        topics = {topic for topic, _ in self._store.offsets.of_group(group)}
        for client in self._membership.registry.members(group).values():
            topics.update(subscription.topic for subscription in client.consumers[group].subscriptions)
        return sorted(topics)

    def queues(self, group: str) -> list[tuple[ConsumeQueue, int]]:
        """The queues, each with the first offset that waits in it."""
        found = []
        for (topic, queue_id), queue_offset in self._store.offsets.of_group(group).items():
            queue = self._store.queue(topic, queue_id)
            if queue is not None:
                found.append((queue, max(queue_offset, queue.min_offset)))
        return found

    def messages(self, group: str) -> dict[str, int]:
        """Messages that wait, by topic."""
        waiting: dict[str, int] = {}
        for queue, queue_offset in self.queues(group):
            waiting[queue.topic] = waiting.get(queue.topic, 0) + max(0, queue.max_offset - queue_offset)
        return waiting

    def oldest_ms(self, group: str) -> dict[str, int]:
        """Store time of the oldest message that waits, by topic; topics in which none does are left out."""
        oldest: dict[str, int] = {}
        for queue, queue_offset in self.queues(group):
            timestamp_ms = self._store.store_timestamp(queue, queue_offset)
            if timestamp_ms:
                oldest[queue.topic] = min(timestamp_ms, oldest.get(queue.topic, timestamp_ms))
        return oldest
