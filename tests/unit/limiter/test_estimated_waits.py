"""The estimated time of a wait, from a line as Valkey describes it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tidegate.limiter.estimates import Rival, WaitingLine
from tidegate.limiter.model.capacity import LEFT_FREE

UNITS = 100_000  # of virtual time in a ms of use by a tenant of weight 1
NOW_MS = 100_000
# Four calls at a time that take a second each; nobody else waits.
CALLS = WaitingLine(
    now_ms=NOW_MS,
    sort="c",
    bound=4,
    span=0,
    virtual=1_000_000,
    tag=1_000_000,
    weight=1,
    cost_ms=1000,
    paused_ms=0,
    share=100,
    waiting=40,
    rivals=[],
    above=0,
    samples=[],
    free=[],
    even=0,
    pace=0,
    amount=1,
)
# 60 a minute, all used between 50 and 59 s ago.
SPENT = [(NOW_MS + 1000 * at, 6) for at in range(1, 11)]
RATE = replace(CALLS, sort="r", bound=60, span=60_000, free=SPENT)


def _samples(virtual_per_ms: float, cost_ms: int = 1000) -> list[tuple[int, int, int]]:
    """Twenty seconds of progress at this speed, up to now."""
    return [
        (NOW_MS - ago, int(CALLS.virtual - ago * virtual_per_ms), cost_ms)
        for ago in range(20_000, 0, -1000)
    ]


def test_before_anything_was_measured_the_time_of_calls_decides() -> None:
    told = CALLS.estimate(39)
    assert told.wait_ms == pytest.approx(10_000, rel=0.05)
    assert (told.ahead, told.is_certain) == (39, False)


def test_without_any_time_of_calls_nothing_is_told() -> None:
    assert replace(CALLS, cost_ms=0).estimate(3).wait_ms is None
    assert replace(CALLS, cost_ms=0).estimate(3, 2000).wait_ms == pytest.approx(1750, rel=0.1)


def test_what_the_limit_admitted_lately_comes_before_its_bound() -> None:
    """A higher band took half of the limit for the last twenty seconds."""
    slow = replace(CALLS, samples=_samples(2 * UNITS), above=5)
    assert slow.estimate(40).wait_ms == pytest.approx(20_000, rel=0.05)


def test_behind_higher_bands_a_band_is_told_no_less_than_its_share() -> None:
    """Its share of four calls is half of one, a second each: chance has admitted fewer."""
    behind = replace(CALLS, samples=_samples(0.2 * UNITS), above=5, share=125)
    assert behind.estimate(40).wait_ms == pytest.approx(81_000, rel=0.05)
    assert replace(behind, share=0).estimate(40).wait_ms == pytest.approx(202_500, rel=0.05)


def test_a_share_of_calls_tells_nothing_of_calls_that_cost_more_than_others() -> None:
    """One call of 5,000 in 40 s beside cheap ones of another tenant, as measured."""
    speed = 0.125 * UNITS
    one = replace(CALLS, samples=_samples(speed), above=5, share=125, use=5_000)
    both = replace(one, rivals=[Rival(CALLS.tag, 1, 90)])
    assert both.estimate(10).wait_ms == pytest.approx(420_000, rel=0.05)
    assert one.estimate(10).wait_ms == pytest.approx(21_000, rel=0.05)


def test_the_mean_time_of_calls_counts_not_the_last_one() -> None:
    """The last value of the moving average is a third too high."""
    line = replace(CALLS, cost_ms=1300, samples=_samples(4 * UNITS))
    assert line.estimate(40).wait_ms == pytest.approx(10_000, rel=0.05)


def test_other_tenants_count_by_their_weights() -> None:
    rival = Rival(CALLS.tag, 3, 90)
    told = replace(CALLS, rivals=[rival]).estimate(10)
    assert told.ahead == pytest.approx(41, abs=1)
    assert told.wait_ms == pytest.approx(10_250, rel=0.1)


def test_one_call_of_another_tenant_is_one_call() -> None:
    assert replace(CALLS, rivals=[Rival(CALLS.tag, 3, 1)]).estimate(10).ahead == 11


def test_a_window_says_when_there_is_room_again() -> None:
    assert RATE.estimate(0).wait_ms == 1000
    told = RATE.estimate(29)
    assert (told.wait_ms, told.is_certain) == (5000, True)
    assert RATE.estimate(60).wait_ms == 61_000
    assert replace(RATE, free=SPENT[1:]).estimate(5).wait_ms == 0
    assert replace(RATE, free=SPENT[1:]).estimate(6).wait_ms == 2000


def test_a_call_that_takes_more_waits_for_more() -> None:
    line = replace(RATE, amount=2)
    assert line.estimate(5, amount=12).wait_ms == 4000


def test_a_pace_spreads_what_a_window_would_admit() -> None:
    """One a second; an even flow has made up for all that was taken."""
    line = replace(RATE, free=[], even=NOW_MS * 1000, pace=1_000_000)
    assert line.estimate(0).wait_ms == 0
    assert line.estimate(20).wait_ms == pytest.approx(20_000, abs=1)


@pytest.mark.parametrize("line", [CALLS, RATE, replace(CALLS, bound=0)])
def test_a_pause_is_a_least_time(line: WaitingLine) -> None:
    assert replace(line, paused_ms=90_000).estimate(0).wait_ms == 90_000


def test_who_waits_behind_others_waits_for_them_after_a_pause() -> None:
    """Its four calls have ended by then, so that the first four are admitted immediately."""
    paused = replace(CALLS, paused_ms=90_000)
    assert paused.estimate(3).wait_ms == 90_000
    assert paused.estimate(39).wait_ms == pytest.approx(99_000, rel=0.01)
    stopped = [(NOW_MS - ago, CALLS.virtual - 10 * UNITS, 1000) for ago in (20_000, 10_000)]
    assert replace(paused, samples=stopped).estimate(39).wait_ms == paused.estimate(39).wait_ms
    behind = replace(paused, above=40)
    assert behind.estimate(0).wait_ms == pytest.approx(91_500, rel=0.01)
    assert replace(paused, paused_ms=100).estimate(39).wait_ms == pytest.approx(9_875, rel=0.01)


def test_where_shares_are_of_calls_their_time_still_tells_the_wait() -> None:
    """A call counts 1000 whatever it takes: four at a time, each of 200 ms."""
    line = replace(CALLS, cost_ms=200, use=1000, rivals=[Rival(CALLS.tag, 1, 90, 0, ())])
    assert line.estimate(39).wait_ms == pytest.approx(2 * 1975, rel=0.02)
    assert line.estimate(39).ahead == pytest.approx(79, abs=1)


def test_a_rate_that_refills_is_told_by_what_has_refilled() -> None:
    """One a second, full: the tenth call waits for ten of them, with nobody before the first."""
    full = replace(RATE, sort="b", free=[], even=(NOW_MS + 60_000) * 1000, pace=60_000_000)
    assert [full.estimate(ahead).wait_ms for ahead in (0, 9, 99)] == [1_000, 10_000, 100_000]
    half = replace(full, even=(NOW_MS + 30_000) * 1000)
    assert [half.estimate(ahead).wait_ms for ahead in (0, 29, 30)] == [0, 0, 1_000]


def _still(seconds: int) -> list[tuple[int, int, int]]:
    """Samples of so many seconds in which no call has ended, up to now."""
    return [(NOW_MS - ago * 1000, CALLS.virtual, CALLS.cost_ms) for ago in range(seconds, 0, -1)]


def test_behind_calls_that_take_far_longer_than_usual_nothing_is_estimated() -> None:
    """Calls of a second hang for 39 s: their usual duration does not tell when they end."""
    told = replace(CALLS, samples=_still(39)).estimate(0)
    assert (told.wait_ms, told.stalled_ms, told.rate_per_s) == (None, 39_000, None)
    assert replace(CALLS, samples=_still(39), above=5).estimate(0).stalled_ms == 39_000
    # Less than twice the usual duration, or too short to be measured.
    slow = [(at, virtual, 20_000) for at, virtual, _ in _still(39)]
    assert replace(CALLS, cost_ms=20_000, samples=slow).estimate(0).wait_ms == 2_500
    assert replace(CALLS, samples=_still(3)).estimate(0).wait_ms == 125


def test_a_stall_is_over_once_a_call_has_ended_or_while_its_limit_is_paused() -> None:
    ended = [(at, virtual, 999) for at, virtual, _ in _still(39)]
    assert replace(CALLS, samples=ended).estimate(0).wait_ms == pytest.approx(125, abs=1)
    admitted = [(at, virtual - 1, cost) for at, virtual, cost in _still(39)]
    assert replace(CALLS, samples=admitted).estimate(0).stalled_ms == 0
    assert replace(CALLS, samples=_still(39), paused_ms=500).estimate(0).wait_ms == 500


# 60 a minute since half a minute, all used; they grow by 50 % a minute, up to 600.
GROWING = replace(RATE, bound=600, ramp=(60, NOW_MS - 30_000, 50, 60))


def test_a_limit_that_grows_admits_as_much_as_its_window_may_take_then() -> None:
    """75 fit now, then one more each two seconds, and what expires from the second one on."""
    assert GROWING.estimate(14).wait_ms == 0
    assert GROWING.estimate(15).wait_ms == 1_000
    assert GROWING.estimate(20).wait_ms == 1_000
    full = replace(GROWING, free=[(NOW_MS + 50_000, 75)])
    assert full.estimate(0).wait_ms == 2_000
    assert full.estimate(5).wait_ms == 12_000
    assert full.estimate(14).wait_ms == 30_000
    # From a minute on, the part is one of the 90 that were used then.
    assert full.estimate(15).wait_ms == pytest.approx(30_000 + 1_333, abs=2)


def test_a_bucket_that_grows_has_room_when_both_have() -> None:
    full = replace(GROWING, sort="b", even=NOW_MS * 1000, pace=60_000_000)
    full = replace(full, free=[(NOW_MS + 50_000, 75)])
    assert full.estimate(5).wait_ms == 12_000
    assert replace(full, even=(NOW_MS + 90_000) * 1000).estimate(0).wait_ms == 30_100


@pytest.mark.parametrize("above", [0, 30])
def test_behind_many_calls_a_ramp_is_taken_to_be_used_up_as_it_grows(above: int) -> None:
    """In the first minute 112 are admitted, in each further one half more than before."""
    full = replace(GROWING, free=[(NOW_MS + 50_000, 75)], share=0, above=above)
    told = full.estimate(1_200 - above)
    assert 265_000 <= (told.wait_ms or 0) <= 285_000


def test_a_ramp_delays_no_call_of_a_limit_that_nothing_uses() -> None:
    assert replace(GROWING, free=[]).estimate(0).wait_ms == 0
    unused = replace(GROWING, free=[], ramp=(0, 0, 50, 60))
    assert unused.estimate(59).wait_ms == 0
    assert unused.estimate(60).wait_ms == 2_000


# Some calls of this band wait behind a higher one that takes all but a tenth of 60 a minute.
BEHIND = replace(RATE, above=3, samples=_samples(0), owed_from=NOW_MS - 25_000)


def test_behind_a_higher_band_a_rate_comes_as_something_is_free_and_the_share_is_owed() -> None:
    """The share of six a minute gives a call each ten seconds, and is owed for two and a half."""
    assert BEHIND.estimate(0).wait_ms == 1_000, "when the first of the window are free"
    assert BEHIND.estimate(2).wait_ms == 5_000
    assert BEHIND.estimate(3).wait_ms == 61_000, "owed in 15 s, free in the next window"
    assert BEHIND.estimate(8).wait_ms == 65_000
    assert replace(BEHIND, owed_from=0).estimate(6).wait_ms == 1_000, "for a window at most"
    assert replace(BEHIND, owed_from=0).estimate(7).wait_ms == 10_000
    even = replace(BEHIND, sort="b", free=[], even=NOW_MS * 1000, pace=60_000_000)
    assert even.estimate(3).wait_ms == 15_000


def test_what_a_band_got_lately_is_told_if_that_is_more_than_its_share() -> None:
    quick = replace(BEHIND, span=10_000, samples=_samples(0.5 * UNITS), share=20, owed_from=NOW_MS)
    assert quick.estimate(3).wait_ms == pytest.approx(7_000, abs=10)
    alone = replace(quick, share=0)
    assert alone.estimate(3).wait_ms == pytest.approx(7_000, abs=10)
    assert replace(alone, samples=_samples(0)).estimate(3).wait_ms == alone._by_total(4)


def test_only_those_who_wait_now_come_first_until_the_band_has_waited_for_a_while() -> None:
    new = replace(BEHIND, samples=_samples(0)[-5:])
    assert new.estimate(3).wait_ms == 2_000
    assert replace(BEHIND, paused_ms=500).estimate(3).wait_ms == 2_000


# 30 of 60 a minute are taken by a higher band, and each second one becomes free.
BESIDE = replace(
    RATE, bound=60, free=[(NOW_MS + 1000 * at, 1) for at in range(1, 58)], taken=30, share=0
)


def test_a_higher_band_takes_its_part_of_what_becomes_free() -> None:
    alone = replace(BESIDE, taken=0)
    assert alone.estimate(9).wait_ms == 7_000
    assert alone.estimate(9).is_certain
    told = BESIDE.estimate(9)
    assert told.wait_ms == pytest.approx(20_000, abs=1_000)
    assert not told.is_certain


def test_a_band_waits_until_a_higher_one_was_held_up_for_a_window_or_for_its_share() -> None:
    held = replace(BESIDE, held_ms=30_000)
    assert held.estimate(0).wait_ms == 30_000
    owed = replace(held, share=500, owed_from=NOW_MS)
    assert owed.estimate(0).wait_ms == 2_000


def test_a_higher_band_that_takes_nearly_all_and_was_held_up_leaves_the_least_share() -> None:
    full = replace(BESIDE, taken=50, held_ms=60_000, share=100, owed_from=NOW_MS)
    full = replace(full, samples=_samples(0))
    assert full.estimate(0).wait_ms == pytest.approx(10_000, abs=1_000)


def test_beyond_what_is_simulated_a_higher_band_takes_its_part_too() -> None:
    line = replace(BESIDE, bound=6_000, taken=3_000, amount=1, free=[(NOW_MS + 60_000, 6_000)])
    told_ms = line.estimate(9_000).wait_ms
    assert told_ms is not None
    assert 3.0 <= told_ms / 60_000 <= 4.5
    assert 6_000 // line.left_free() == LEFT_FREE


def test_a_day_quota_has_no_least_share_behind_a_higher_band() -> None:
    """What is left of the day goes to the calls above first, however large the share is."""
    day = replace(BEHIND, sort="q", bound=100, span=0, free=[(NOW_MS + 500_000, 97)])
    assert day.estimate(0).wait_ms == 500_000
    assert replace(day, free=[(NOW_MS + 500_000, 96)]).estimate(0).wait_ms == 0
