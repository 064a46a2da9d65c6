"""What a broker counts, and how Prometheus reads it.

Counting is adding to plain numbers on the loop. What takes a look at the store is gathered on the loop too, when it is
scraped, group by group, so that a scrape delays nobody.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from kitemq_server.store.batch import OffsetRun

# RocketMQ's bounds, in bytes.
SIZE_BUCKETS = (1024, 4 * 1024, 512 * 1024, 1024 * 1024, 2 * 1024 * 1024, 4 * 1024 * 1024)
SECONDS_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


class TopicCounts:
    """Messages that came in for one topic."""

    __slots__ = ("bytes", "messages", "sizes")

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0
        self.sizes = [0] * (len(SIZE_BUCKETS) + 1)


class GroupCounts:
    """Messages of one topic that went out to one group."""

    __slots__ = ("bytes", "messages")

    def __init__(self) -> None:
        self.messages = 0
        self.bytes = 0


class Durations:
    """A histogram of seconds."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS_BUCKETS) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        """One more."""
        self.counts[bisect_left(SECONDS_BUCKETS, seconds)] += 1
        self.sum_s += seconds


class MessageCounts:
    """Messages in and out. Owned by the loop; read by the scraping thread."""

    def __init__(self) -> None:
        self.topics: dict[str, TopicCounts] = {}
        self.groups: dict[tuple[str, str], GroupCounts] = {}
        self.fsyncs = Durations()
        self.messages_in = 0
        self.messages_out = 0

    def count_in(self, topic: str, parts: Sequence[bytes | memoryview], runs: Sequence[OffsetRun]) -> None:
        """A batch was appended; what an earlier try had stored is not counted again."""
        sizes = [len(part) for part in parts]
        if len(runs) > 1 or runs[0].repeated:
            fresh = []
            start = 0
            for run in runs:
                if not run.repeated:
                    fresh += sizes[start : start + run.count]
                start += run.count
            sizes = fresh
            if not sizes:
                return
        counts = self.topics.get(topic)
        if counts is None:
            counts = self.topics[topic] = TopicCounts()
        self.messages_in += len(sizes)
        counts.messages += len(sizes)
        counts.bytes += sum(sizes)
        bucket = bisect_left(SIZE_BUCKETS, max(sizes))
        if bisect_left(SIZE_BUCKETS, min(sizes)) == bucket:
            counts.sizes[bucket] += len(sizes)
        else:
            for size in sizes:
                counts.sizes[bisect_left(SIZE_BUCKETS, size)] += 1

    def out(self, topic: str, group: str) -> GroupCounts:
        """The counter of one group in one topic. Worth keeping."""
        counts = self.groups.get((topic, group))
        if counts is None:
            counts = self.groups[topic, group] = GroupCounts()
        return counts

    def count_out(self, counts: GroupCounts, count: int, byte_count: int) -> None:
        """Messages went out to a group; `counts` is what `out` gave for it."""
        counts.messages += count
        counts.bytes += byte_count
        self.messages_out += count

    def forget_topic(self, topic: str) -> None:
        """A deleted topic is not shown any more."""
        self.topics.pop(topic, None)
        for key in [key for key in self.groups if key[0] == topic]:
            del self.groups[key]
