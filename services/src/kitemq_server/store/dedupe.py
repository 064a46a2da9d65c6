"""Which sends are repeats: the last sequences of each producer in each queue, and recent ids of messages without.

Derived from the log alone (store timestamps included), so that a restart and a replica know the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

WINDOW_RUNS_MAX = 64
WINDOW_IDLE_MS = 15 * 60 * 1000  # longer than any client retries
WINDOWS_MAX = 100_000
RECENT_IDS_MAX = 10_000

WindowKey = tuple[int, str, int]  # producer instance, topic, queue id
IdKey = tuple[str, str]  # topic, message id


class Stretch(NamedTuple):
    """Neighbouring messages of a batch with one answer.

    queue_offset: of the first copies, or NEW (not stored yet) or UNKNOWN (too long ago to tell). queue_id: where they
    are; -1 = in the queue that was asked for.
    """

    first_index: int
    length: int
    queue_offset: int
    queue_id: int = -1


NEW = -1
UNKNOWN = -2


class Window:
    """Sequences of one producer instance in one queue, in runs without a gap in sequence or queue offset."""

    __slots__ = ("counts", "firsts", "floor", "last_sequence", "queue_offsets", "timestamp_ms")

    def __init__(self) -> None:
        self.firsts: list[int] = []
        self.counts: list[int] = []
        self.queue_offsets: list[int] = []
        self.last_sequence = 0
        self.floor = 0  # sequences up to here have been forgotten
        self.timestamp_ms = 0

    def record(self, sequence: int, count: int, queue_offset: int) -> None:
        """These have been stored."""
        firsts = self.firsts
        end = sequence + count
        at = len(firsts) if sequence > self.last_sequence else bisect_right(firsts, sequence)
        if at:
            before = self.counts[at - 1]
            if firsts[at - 1] + before == sequence and self.queue_offsets[at - 1] + before == queue_offset:
                self.counts[at - 1] += count
                self.last_sequence = max(self.last_sequence, end - 1)
                return
        firsts.insert(at, sequence)
        self.counts.insert(at, count)
        self.queue_offsets.insert(at, queue_offset)
        self.last_sequence = max(self.last_sequence, end - 1)
        if len(firsts) > WINDOW_RUNS_MAX:
            self.floor = max(self.floor, firsts[0] + self.counts[0] - 1)
            del firsts[0], self.counts[0], self.queue_offsets[0]

    def split(self, sequence: int, count: int) -> list[Stretch]:
        """What is known of `count` sequences from `sequence`, in order, without a gap."""
        stretches: list[Stretch] = []
        index = 0
        while index < count:
            wanted = sequence + index
            rest = count - index
            at = bisect_right(self.firsts, wanted) - 1
            if at >= 0 and wanted < self.firsts[at] + self.counts[at]:
                skip = wanted - self.firsts[at]
                length = min(rest, self.counts[at] - skip)
                queue_offset = self.queue_offsets[at] + skip
            else:
                queue_offset = UNKNOWN if wanted <= self.floor else NEW
                limits = [self.firsts[at + 1]] if at + 1 < len(self.firsts) else []
                if wanted <= self.floor:
                    limits.append(self.floor + 1)
                length = min([rest, *(limit - wanted for limit in limits)])
            stretches.append(Stretch(index, length, queue_offset))
            index += length
        return stretches


class Dedupe:
    """All windows of a store, and the table of recent ids. Bounded; the longest unused go first."""

    __slots__ = ("_ids", "_windows")

    def __init__(self) -> None:
        self._windows: OrderedDict[WindowKey, Window] = OrderedDict()
        self._ids: OrderedDict[IdKey, tuple[int, int]] = OrderedDict()

    def window(self, key: WindowKey) -> Window | None:
        """What is remembered of this producer in this queue."""
        return self._windows.get(key)

    def record(self, key: WindowKey, sequence: int, count: int, queue_offset: int, timestamp_ms: int) -> None:
        """Messages from `sequence` on have been stored from `queue_offset` on."""
        windows = self._windows
        window = windows.get(key)
        if window is None:
            self._expire(timestamp_ms)
            window = windows[key] = Window()
        else:
            windows.move_to_end(key)
        window.timestamp_ms = timestamp_ms
        window.record(sequence, count, queue_offset)

    def find_id(self, topic: str, message_id: str) -> tuple[int, int] | None:
        """(queue id, queue offset) of a recent message without a producer instance."""
        return self._ids.get((topic, message_id))

    def knows_any_id(self, topic: str, message_ids: Iterable[str]) -> bool:
        """Whether `find_id` would find one of these."""
        ids = self._ids
        return any((topic, message_id) in ids for message_id in message_ids)

    def record_ids(self, topic: str, message_ids: Iterable[str], queue_id: int, queue_offset: int) -> None:
        """Messages without a producer instance have been stored from `queue_offset` on. An empty id is none."""
        ids = self._ids
        for offset, message_id in enumerate(message_ids, queue_offset):
            if message_id:
                ids[topic, message_id] = (queue_id, offset)
        while len(ids) > RECENT_IDS_MAX:
            ids.popitem(last=False)

    def drop_topic(self, topic: str) -> None:
        """The topic has been deleted: nothing sent to it before counts as stored."""
        for window_key in [key for key in self._windows if key[1] == topic]:
            del self._windows[window_key]
        for id_key in [key for key in self._ids if key[0] == topic]:
            del self._ids[id_key]

    def _expire(self, now_ms: int) -> None:
        """Makes room for one more window; the idle go."""
        windows = self._windows
        while windows:
            key, oldest = next(iter(windows.items()))
            if len(windows) < WINDOWS_MAX and oldest.timestamp_ms >= now_ms - WINDOW_IDLE_MS:
                return
            del windows[key]

    def capture(self) -> tuple[list[list[object]], list[list[object]]]:
        """Windows and ids as plain lists, in the order of their last use."""
        windows: list[list[object]] = [
            [*key, window.timestamp_ms, window.floor, *_interleave(window)] for key, window in self._windows.items()
        ]
        ids: list[list[object]] = [[*key, *place] for key, place in self._ids.items()]
        return windows, ids

    def restore(self, windows: Iterable[Sequence[object]], ids: Iterable[Sequence[object]]) -> None:
        """Replaces everything by what `capture` gave."""
        self._windows.clear()
        self._ids.clear()
        for instance, topic, queue_id, timestamp_ms, floor, *runs in windows:
            window = Window()
            window.timestamp_ms = _integer(timestamp_ms)
            window.floor = _integer(floor)
            numbers = [_integer(value) for value in runs]
            window.firsts = numbers[0::3]
            window.counts = numbers[1::3]
            window.queue_offsets = numbers[2::3]
            window.last_sequence = max(
                (first + count - 1 for first, count in zip(window.firsts, window.counts, strict=True)), default=0
            )
            self._windows[_integer(instance), str(topic), _integer(queue_id)] = window
        for topic, message_id, queue_id, queue_offset in ids:
            self._ids[str(topic), str(message_id)] = (_integer(queue_id), _integer(queue_offset))


def _interleave(window: Window) -> list[int]:
    runs = zip(window.firsts, window.counts, window.queue_offsets, strict=True)
    return [number for run in runs for number in run]


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value
