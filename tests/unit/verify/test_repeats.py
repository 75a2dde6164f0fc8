"""What a verification says of calls that were repeated, and of what only a busy machine broke."""

from __future__ import annotations

import pytest

from tidegate.verify.plan import Report, Verdict
from tidegate.verify.promises import AT_ONCE, Repeats, in_a_call, repeats


def test_calls_of_a_killed_worker_are_repeated_whether_they_had_ended_or_not() -> None:
    """Six were, where three were open: the results of the others were not on record yet."""
    cut_short = [{"one": 1}] * 6 + [{}] * 34
    assert repeats([2] * 6 + [1] * 34, cut_short, "one") == Repeats(6, 0, 0)


def test_an_attempt_that_was_cut_short_before_its_call_repeats_nothing() -> None:
    assert repeats([1], [{"one": 1}], "one") == Repeats(0, 0, 0)


def test_a_call_that_is_repeated_for_another_reason_is_told_apart() -> None:
    assert repeats([2, 2, 3], [{"two": 1}, {}, {"one": 1}], "one") == Repeats(1, 3, 2)


def report(measured: str, is_kept: bool, *, lasting: bool = False) -> Report:
    made = Report({"took": "40 s"})
    made.kept("always", "0", "0", True, lasting=True)
    made.kept("soon", "<= 1 s", measured, is_kept, "slow", lasting=lasting)
    return made


def test_what_a_busy_machine_may_have_broken_holds_if_it_holds_the_second_time() -> None:
    first = report("3 s", False)
    assert [one.promise for one in first.in_doubt] == ["soon"]
    held = first.repeated(report("0.5 s", True))
    assert held.is_sound
    assert [(one.measured, one.why) for one in held.results] == [
        ("0", ""),
        ("0.5 s", "at the second try; at the first 3 s"),
    ]
    broken = first.repeated(report("2 s", False))
    assert [(one.verdict, one.why) for one in broken.broken] == [
        (Verdict.BROKEN, "slow, at the second try; at the first 3 s")
    ]


def test_what_no_load_can_break_is_not_tried_again_and_stays_broken() -> None:
    first = report("1 over", False, lasting=True)
    assert (first.in_doubt, first.is_sound) == ([], False)
    other = report("3 s", False)
    again = report("0.5 s", True)
    again.kept("never more", "0 over", "1 over", False, lasting=True)
    again.left.append("a row")
    both = other.repeated(again)
    assert [one.promise for one in both.broken] == ["never more"]
    assert both.left == ["a row"]


def test_a_complaint_that_only_the_first_run_had_is_gone() -> None:
    first = report("0.5 s", True)
    first.kept("and all of them are used again", "<= 5 s", "not all", False)
    assert first.repeated(report("0.4 s", True)).is_sound


def test_what_the_first_run_did_not_reach_is_of_the_second() -> None:
    first = Report()
    first.kept("it runs to its end", "", "Valkey was away", False)
    whole = first.repeated(report("0.5 s", True))
    assert [(one.promise, one.verdict) for one in whole.results] == [
        ("always", Verdict.KEPT),
        ("soon", Verdict.KEPT),
    ]


@pytest.mark.parametrize(
    ("held", "finished", "in_flight", "calling"),
    [
        ([("a", 7), ("b", 3)], 2 * AT_ONCE, AT_ONCE, ["a", "b"]),
        ([("b", 7)], 2 * AT_ONCE, 1, ["b"]),  # a busy machine: the other one has not begun
        ([("b", 7)], AT_ONCE, AT_ONCE, []),
        ([("b", 7)], 2 * AT_ONCE, 0, []),
        ([("other", 7)], 2 * AT_ONCE, 1, []),
    ],
)
def test_any_worker_that_calls_is_one_to_kill(
    held: list[tuple[str, int]], finished: int, in_flight: int, calling: list[str]
) -> None:
    assert in_a_call(("a", "b"), held, finished, in_flight) == calling
