"""Leased shares of regions on the model: never over in any fault, and all used again after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bench.regions import (
    Coordinator,
    Course,
    Cut,
    LeaseTerms,
    ShareRequest,
    Unit,
    Way,
    World,
    fair_shares,
)

NAMES = ("a", "b", "c")
CALLS = LeaseTerms(8, NAMES, "calls", lease_ms=20_000, refresh_ms=2_000, longest_ms=9_000)
RATE = LeaseTerms(8, NAMES, "a minute", lease_ms=75_000, refresh_ms=4_000)
TERMS = {"calls": CALLS, "a minute": RATE}
MORE_THAN_ENOUGH = dict.fromkeys(NAMES, 8)
FAULTS_END_MS = 70_000.0
STEADY = [(0.0, MORE_THAN_ENOUGH)]
LONG_MS = 8_000
SLOW = (0.999,) * 4
# A region with nearly all of the limit is cut off before the others want it.
CUT_OFF = Course(
    [(0.0, {"a": 8}), (10_500.0, {"b": 8, "c": 8})], [Cut("a", 10_000, 100_000)], call_ms=LONG_MS
)

moments = st.floats(0, FAULTS_END_MS)
cuts = st.builds(
    lambda region, begin, length, way: Cut(region, begin, min(begin + length, FAULTS_END_MS), way),
    st.sampled_from(NAMES),
    moments,
    st.floats(5_000, 60_000),
    st.sampled_from(["both", "to the coordinator", "to the region"]),
)
loads = st.lists(
    st.tuples(moments, st.dictionaries(st.sampled_from(NAMES), st.integers(0, 8))), max_size=5
)
courses = st.builds(
    lambda load, cut, restarts, clocks, trouble: Course(
        [(0.0, MORE_THAN_ENOUGH), *load, (FAULTS_END_MS, MORE_THAN_ENOUGH)],
        cut,
        restarts,
        clocks,
        trouble,
    ),
    loads,
    st.lists(cuts, max_size=3),
    st.lists(st.tuples(moments, st.sampled_from([10.0, 3_000.0, 30_000.0])), max_size=2),
    st.lists(st.sampled_from([0.999, 1.0, 1.001]), min_size=4, max_size=4),
    st.sampled_from([0.0, 0.0, 0.1, 0.4]),
)


@contextmanager
def running(
    terms: LeaseTerms, course: Course, seed: int = 1, kind: type[Coordinator] = Coordinator
) -> Iterator[World]:
    world = World(terms, course, seed, kind)
    try:
        yield world
    finally:
        world.close()


# A thousand examples take half a minute of a core.
@pytest.mark.timeout(600)
@example(CALLS, Course(STEADY, [Cut("a", 5_693, 25_713, "to the coordinator")], clocks=SLOW), 0)
@given(st.sampled_from([*TERMS.values()]), courses, st.integers(0, 99))
def test_the_account_is_never_over_its_limit(terms: LeaseTerms, course: Course, seed: int) -> None:
    with running(terms, course, seed) as world:
        world.run_until(FAULTS_END_MS + terms.lease_ms)
        assert world.provider.most <= terms.limit


@pytest.mark.parametrize("way", ["both", "to the coordinator", "to the region"])
@pytest.mark.parametrize("restarts", [[], [(30_000.0, 500.0)]])
def test_all_of_the_limit_is_used_again_after_the_faults(
    way: Way, restarts: list[tuple[float, float]]
) -> None:
    course = Course(STEADY, [Cut("a", 10_000, 40_000, way)], restarts)
    with running(CALLS, course) as world:
        world.run_until(50_000)
        before = world.provider.used
        world.run_until(70_000)
        assert (world.provider.used - before) / (CALLS.limit * 20_000) >= 0.95
        assert sum(region.share for region in world.regions.values()) == CALLS.limit


def test_who_hears_no_answers_keeps_no_share_that_others_want() -> None:
    """Though its requests arrive."""
    course = Course(STEADY, [Cut("a", 10_000, 100_000, "to the region")])
    with running(CALLS, course) as world:
        world.run_until(60_000)
        shares = {name: region.share for name, region in world.regions.items()}
        assert shares["a"] == CALLS.safe
        assert sum(shares.values()) == CALLS.limit


@given(
    st.integers(3, 100), st.dictionaries(st.sampled_from("abc"), st.integers(0, 120), min_size=1)
)
def test_shares_are_max_min_fair_and_sum_to_the_limit(
    capacity: int, wants: Mapping[str, int]
) -> None:
    shares = fair_shares(capacity, wants, 1)
    assert sum(shares.values()) == capacity
    assert min(shares.values()) >= 1
    lacking = [share for name, share in shares.items() if share < wants[name]]
    if lacking:
        assert max(shares.values()) <= max(1, min(lacking) + 1)


class Hasty(Coordinator):
    """Counts a share as free as soon as it has cut it down, though calls above it still run."""

    def taken(self, region: str, now_ms: float) -> int:
        entry = self._book.get(region)
        shares = fair_shares(self.terms.limit, {n: e.wants for n, e in self._book.items()}, 1)
        return super().taken(region, now_ms) if entry is None else shares[region]


class Impatient(Coordinator):
    """Takes a share back before its lease has ended."""

    def taken(self, region: str, now_ms: float) -> int:
        return super().taken(region, now_ms + self.terms.lease_ms / 2)


class Forgetful(Coordinator):
    """Gives shares out from its start on, though it knows nobody's."""

    def is_learning(self, now_ms: float) -> bool:
        return False


MOVES = [(0.0, {"a": 12}), (25_000.0, {"b": 12, "c": 12})]


@pytest.mark.parametrize(
    ("kind", "course"),
    [
        (Hasty, Course(MOVES, call_ms=LONG_MS)),
        (Impatient, CUT_OFF),
        (
            Forgetful,
            Course(STEADY, [Cut("a", 10_000, 60_000)], [(10_500.0, 10.0)], call_ms=LONG_MS),
        ),
    ],
)
@pytest.mark.parametrize("unit", TERMS)
def test_the_simulation_shows_a_coordinator_that_leases_too_much(
    kind: type[Coordinator], course: Course, unit: Unit
) -> None:
    """And the real one, in the same course, does not."""
    terms = TERMS[unit]
    with running(terms, course) as sound, running(terms, course, kind=kind) as broken:
        for world in (sound, broken):
            world.run_until(2 * FAULTS_END_MS)
        assert sound.provider.most <= terms.limit
        assert broken.provider.most > terms.limit


def test_clocks_that_run_farther_apart_than_the_terms_say_are_seen() -> None:
    with running(CALLS, replace(CUT_OFF, clocks=(0.4, 1, 1, 1))) as world:
        world.run_until(FAULTS_END_MS)
        assert world.provider.most > CALLS.limit


def test_a_request_of_before_a_restart_counts_for_nothing() -> None:
    """It may report less than its region holds by now."""
    coordinator = Coordinator(CALLS, 2, 0.0)
    answer = coordinator.answer(ShareRequest("a", 1, 0, 1, 3, 3, 8), 10.0)
    assert answer is not None
    assert answer.share is None
    assert coordinator.taken("a", 10.0) == CALLS.safe


def test_terms_that_can_not_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match="lasts longer"):
        replace(CALLS, longest_ms=20_000)
    with pytest.raises(ValueError, match="fit the limit"):
        replace(CALLS, safe=3)
