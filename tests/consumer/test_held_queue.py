"""The offset that may be committed, whatever order handlers come back in."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kitemq.consumer.held_queue import Chunk
from tests.consumer.records import add_chunk, held_queue


class HeldQueueModel(RuleBasedStateMachine):
    """Handlers take, finish and fail in any order; chunks come with and without gaps; at last the queue is given up."""

    def __init__(self) -> None:
        super().__init__()
        self.held = held_queue()
        self.received: set[int] = set()
        self.done: set[int] = set()
        self.row: list[Chunk] = []
        self.waiting: list[Chunk] = []
        self.running: list[tuple[Chunk, int, int]] = []
        self.sizes: dict[Chunk, int] = {}

    @precondition(lambda self: not self.held.dropped)
    @rule(gaps=st.lists(st.integers(0, 3), min_size=1, max_size=6), tail=st.integers(0, 3))
    def reply(self, gaps: list[int], tail: int) -> None:
        offset, offsets = self.held.fetch_offset, []
        for gap in gaps:
            offset += gap
            offsets.append(offset)
            offset += 1
        chunk = add_chunk(self.held, offsets, next_offset=offset + tail)
        self.received.update(offsets)
        self.sizes[chunk] = chunk.records_bytes
        self.row.append(chunk)

    @precondition(lambda self: not self.held.dropped)
    @rule(skipped=st.integers(1, 5))
    def nothing_matched(self, skipped: int) -> None:
        self.held.fetch_offset += skipped

    @rule()
    def take(self) -> None:
        for chunk in self.row:
            message = next(chunk.messages, None)
            if message is not None:
                assert not self.held.dropped
                index = chunk.taken - 1
                assert message.queue_offset == chunk.offset(index)
                assert message.delivery_attempt == chunk.attempt
                assert message.queue_offset not in self.done
                self.running.append((chunk, index, message.queue_offset))
                return

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def handler_returns(self, data: st.DataObject) -> None:
        chunk, index, offset = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        chunk.done[index] = 1
        self.done.add(offset)
        self._ended(chunk)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def handler_raises(self, data: st.DataObject) -> None:
        chunk, index, _ = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        if not self.held.dropped:
            chunk.done[index] = 1
            again = self.held.retry(chunk, index)
            self.sizes[again] = again.records_bytes
            self.waiting.append(again)
        self._ended(chunk)

    @precondition(lambda self: self.waiting and not self.held.dropped)
    @rule()
    def back_off_ends(self) -> None:
        self.row.append(self.waiting.pop(0))

    @precondition(lambda self: len(self.received) > 10)
    @rule()
    def given_up(self) -> None:
        self.held.drop()

    def _ended(self, chunk: Chunk) -> None:
        chunk.left -= 1
        if not chunk.left:
            self.held.finish(chunk)
            del self.sizes[chunk]

    @invariant()
    def committable_is_the_smallest_unfinished(self) -> None:
        unfinished = self.received - self.done
        assert self.held.done_offset() == min(unfinished, default=self.held.fetch_offset)

    @invariant()
    def counts(self) -> None:
        if self.held.dropped:
            assert self.held.settled.is_set() == (not self.running)
        else:
            assert self.held.cached_bytes == sum(self.sizes.values())


HeldQueueModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestHeldQueue = HeldQueueModel.TestCase


def test_credit_is_given_when_half_is_used_up() -> None:
    held = held_queue()
    limits: dict[str, Any] = {"messages_max": 100, "bytes_max": 1_000_000, "span_max": None}
    assert held.wanted(**limits) == (100, 1_000_000)
    held.credit_messages, held.credit_bytes = 100, 1_000_000
    assert held.wanted(**limits) == (0, 0)
    chunk = add_chunk(held, list(range(60)))
    held.credit_messages -= 60
    held.credit_bytes -= chunk.records_bytes
    assert held.wanted(**limits) == (0, 0)  # all 60 still wait
    held.start(chunk)
    assert held.wanted(**limits) == (60, 0)


def test_big_messages_are_bounded_by_bytes() -> None:
    held = held_queue()
    chunk = add_chunk(held, [0, 1])
    limits: dict[str, Any] = {"messages_max": 1000, "bytes_max": chunk.records_bytes, "span_max": None}
    held.credit_messages = 998
    held.start(chunk)
    assert held.wanted(**limits) == (0, 0)
    chunk.left = 0
    held.finish(chunk)
    assert held.wanted(**limits) == (2, chunk.records_bytes)


def test_an_unfinished_message_stops_the_reading_at_the_span() -> None:
    held = held_queue()
    limits: dict[str, Any] = {"messages_max": 100, "bytes_max": 1_000_000, "span_max": 150}
    first = add_chunk(held, list(range(100)))
    held.start(first)
    messages = first.messages
    next(messages)
    for _ in messages:
        first.done[first.taken - 1] = 1
        first.left -= 1
    assert held.wanted(**limits)[0] == 50
    held.credit_messages = 50
    add_chunk(held, list(range(100, 150)))
    held.credit_messages = 0
    assert held.wanted(**limits) == (0, 0)
    first.done[0] = 1
    first.left -= 1
    held.finish(first)
    assert held.wanted(**limits)[0] == 50


def test_position_is_what_comes_next() -> None:
    held = held_queue(offset=10)
    assert held.position() == 10
    chunk = add_chunk(held, [10, 12, 13], next_offset=20)
    assert held.position() == 10
    next(chunk.messages)
    assert held.position() == 12
    chunk.rest()
    assert [message.queue_offset for message in chunk.messages] == [12, 13]
    assert held.position() == 20


def test_a_finished_chunk_frees_its_bytes_behind_a_stuck_one() -> None:
    held = held_queue()
    stuck = add_chunk(held, [0])
    quick = add_chunk(held, [1])
    next(stuck.messages)
    next(quick.messages)
    quick.done[0] = 1
    quick.left = 0
    held.finish(quick)
    assert quick.buffer == b""
    assert held.done_offset() == 0
