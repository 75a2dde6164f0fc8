"""Lengths counted by their size: percentiles that are near enough, and sums that are exact."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tidegate.store.statistics import (
    CLASSES,
    class_of,
    counts,
    histogram_of,
    pack,
    percentiles,
    unpack,
)


def histogram(lengths: list[float]) -> int:
    classes = [0] * CLASSES
    for length in lengths:
        classes[class_of(length)] += 1
    return histogram_of(classes)


LENGTHS = st.lists(st.floats(1, 3_000_000), min_size=1, max_size=200)


@given(LENGTHS, st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_a_percentile_is_within_its_class(lengths: list[float], share: float) -> None:
    (found,) = percentiles(histogram(lengths), (share,))
    assert found is not None
    ordered = sorted(lengths)
    exact = ordered[math.ceil(len(ordered) * share) - 1]
    assert exact / 1.19 <= found <= exact * 1.19


@given(LENGTHS, LENGTHS)
def test_adding_the_numbers_adds_the_histograms(some: list[float], others: list[float]) -> None:
    both = histogram(some) + histogram(others)
    assert both == histogram(some + others)
    assert sum(counts(both)) == len(some) + len(others)
    assert unpack(pack(both)) == both


def test_what_is_out_of_range_is_counted_at_the_ends() -> None:
    assert (class_of(0), class_of(0.99), class_of(1)) == (0, 0, 1)
    assert class_of(1e12) == CLASSES - 1
    assert percentiles(0, (0.5,)) == [None]
    assert (pack(0), unpack(b"")) == (b"", 0)
