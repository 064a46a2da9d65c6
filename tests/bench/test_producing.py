"""The generators: how many are in flight, when a latency begins, what an error does."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from kitemq.bench.histogram import Histogram
from kitemq.bench.producing import closed_loop, paced
from kitemq.errors import BrokerBusyError, KiteMQError


def in_ns(seconds: float) -> int:
    return time.perf_counter_ns() + int(seconds * 1e9)


async def test_a_closed_loop_has_exactly_so_many_in_flight() -> None:
    now = high = 0

    async def send() -> None:
        nonlocal now, high
        now += 1
        high = max(high, now)
        await asyncio.sleep(0.001)
        now -= 1

    histogram = Histogram()
    await closed_loop(send, histogram, in_flight=7, deadline_ns=in_ns(0.05))
    assert high == 7
    assert now == 0
    assert histogram.count >= 7
    assert histogram.percentile_ns(0) >= 0.99e6


async def test_an_error_ends_a_closed_loop() -> None:
    async def send() -> None:
        raise BrokerBusyError("full")

    with pytest.raises(BrokerBusyError):
        await closed_loop(send, Histogram(), in_flight=1, deadline_ns=in_ns(60))


async def test_an_error_that_is_wanted_is_told_and_not_timed() -> None:
    errors: list[KiteMQError] = []
    sends = 0

    async def send() -> None:
        nonlocal sends
        sends += 1
        await asyncio.sleep(0)
        if sends % 2:
            raise BrokerBusyError("full")

    histogram = Histogram()
    await closed_loop(send, histogram, in_flight=1, deadline_ns=in_ns(0.02), failed=errors.append)
    assert errors
    assert histogram.count + len(errors) == sends


async def test_a_fixed_rate_makes_that_many_sends() -> None:
    dues: list[int] = []

    async def send(due_ns: int) -> None:
        dues.append(due_ns)

    histogram = Histogram()
    deadline_ns = in_ns(0.1)
    count = await paced(send, histogram, rate=1000, deadline_ns=deadline_ns)
    assert {later - earlier for earlier, later in itertools.pairwise(dues)} == {1_000_000}
    assert dues[-1] < deadline_ns <= dues[-1] + 1_000_000
    assert len(dues) == histogram.count == count


async def test_a_stall_counts_for_every_message_that_it_held_up() -> None:
    stall_s = 0.1

    async def send(due_ns: int) -> None:
        if send.first:  # type: ignore[attr-defined]
            send.first = False  # type: ignore[attr-defined]
            time.sleep(stall_s)  # the whole loop stands still: nothing is sent meanwhile  # noqa: ASYNC251

    send.first = True  # type: ignore[attr-defined]
    histogram, lateness = Histogram(), Histogram()
    await paced(send, histogram, rate=1000, deadline_ns=in_ns(0.2), lateness=lateness)
    # Of some 200 sends half were due during the stall: theirs are its length, half of it on the average.
    assert histogram.percentile_ns(100) >= stall_s * 0.9e9
    assert histogram.percentile_ns(60) >= stall_s * 0.1e9
    assert lateness.percentile_ns(60) >= stall_s * 0.1e9


async def test_a_slow_answer_does_not_slow_a_fixed_rate() -> None:
    async def send(_: int) -> None:
        await asyncio.sleep(0.05)

    histogram = Histogram()
    started_ns = time.perf_counter_ns()
    count = await paced(send, histogram, rate=500, deadline_ns=started_ns + 100_000_000)
    assert count > 2  # it did not wait for the answers
    assert histogram.percentile_ns(50) >= 0.045e9


async def test_an_error_ends_a_fixed_rate() -> None:
    async def send(_: int) -> None:
        raise BrokerBusyError("full")

    with pytest.raises(BrokerBusyError):
        await paced(send, Histogram(), rate=1000, deadline_ns=in_ns(60))
