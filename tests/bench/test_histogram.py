"""Percentiles against a sorted list."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitemq.bench.histogram import LATENCY_NS_MAX, Histogram, Latency

latencies = st.lists(st.integers(0, LATENCY_NS_MAX), min_size=1, max_size=200)


def recorded(values: list[int]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.record(value)
    return histogram


@given(latencies, st.sampled_from([0, 1, 50, 75, 95, 99, 99.9, 100]))
def test_a_percentile_is_that_of_the_sorted_values_to_a_five_hundredth(values: list[int], percent: float) -> None:
    rank = max(1, math.ceil(len(values) * percent / 100))
    exact = sorted(values)[rank - 1]
    assert abs(recorded(values).percentile_ns(percent) - exact) <= exact / 500


@given(latencies)
def test_the_summary_is_in_milliseconds_and_rises(values: list[int]) -> None:
    latency = recorded(values).latency()
    mean_ms = sum(values) / len(values) / 1e6
    assert abs(latency.avg_ms - mean_ms) <= mean_ms / 500
    assert list(latency[1:]) == sorted(latency[1:])
    assert abs(latency.max_ms - max(values) / 1e6) <= max(values) / 1e6 / 500


def test_known_percentiles() -> None:
    histogram = recorded([n * 1_000_000 for n in range(1, 1001)])
    latency = histogram.latency()
    assert latency == pytest.approx((500.5, 500, 750, 950, 990, 999, 1000), rel=0.002)
    assert histogram.count == 1000


@given(latencies, latencies)
def test_adding_is_recording_both(first: list[int], second: list[int]) -> None:
    total = recorded(first)
    total.add(recorded(second))
    assert total.to_json() == recorded(first + second).to_json()


@given(latencies)
def test_it_survives_json(values: list[int]) -> None:
    histogram = recorded(values)
    assert Histogram.from_json(histogram.to_json()).to_json() == histogram.to_json()


def test_taking_begins_again() -> None:
    histogram = recorded([1_000, 2_000])
    assert histogram.taken().count == 2
    histogram.record(3_000)
    assert histogram.taken().count == 1
    assert histogram.taken().count == 0


def test_what_is_out_of_range_counts_at_the_edge() -> None:
    histogram = recorded([-5, LATENCY_NS_MAX * 2])
    assert histogram.count == 2
    assert histogram.percentile_ns(50) == 0
    assert histogram.percentile_ns(100) > LATENCY_NS_MAX * 0.99


def test_without_samples_there_is_no_percentile() -> None:
    assert math.isnan(Histogram().percentile_ns(99))
    assert Histogram().latency() == Latency()
