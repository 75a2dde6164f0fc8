"""Which policy a program joins its pool with, by what was in force before."""

from __future__ import annotations

import pytest

from tidegate.errors import PolicyConflict
from tidegate.limiter.policy import (
    WRITTEN_BY,
    Change,
    Concurrency,
    OnConflict,
    PoolPolicy,
    WrittenPolicy,
)

ONE, TEN = {"kind:text_only": 1}, {"kind:text_only": 10}


def written(
    limits: dict[str, int], revision: int = 1, on_conflict: OnConflict = "raise"
) -> WrittenPolicy:
    return WrittenPolicy("gemini", PoolPolicy(limits, revision=revision), on_conflict)


def change(limits: dict[str, int], revision: int, by: str = WRITTEN_BY) -> Change:
    return Change(revision, 0, by, PoolPolicy(limits, revision=revision))


def test_an_empty_pool_takes_the_policy() -> None:
    assert written(ONE).among([]) == PoolPolicy(ONE)


def test_an_edited_policy_replaces_the_one_that_was_written_before() -> None:
    assert written(TEN).among([change(ONE, 1)]) == PoolPolicy(TEN, revision=2)


def test_the_same_policy_runs_under_the_revision_in_force() -> None:
    history = [change(TEN, 4, "ann"), change(ONE, 3)]
    assert written(TEN).among(history) == PoolPolicy(TEN, revision=4)


def test_a_number_and_the_concurrency_that_it_stands_for_are_the_same() -> None:
    policy = PoolPolicy({"kind:text_only": Concurrency(1)})
    assert WrittenPolicy("gemini", policy, "raise").is_in(PoolPolicy(ONE, revision=7))


def test_a_higher_revision_replaces_even_what_was_set_live() -> None:
    assert written(TEN, revision=3).among([change(ONE, 2, "ann")]) == PoolPolicy(TEN, revision=3)


def test_an_older_policy_is_a_conflict_that_says_what_to_do() -> None:
    with pytest.raises(PolicyConflict) as raised:
        written(ONE).among([change(TEN, 2), change(ONE, 1)])
    conflict = raised.value
    expected = (
        "pool 'gemini' holds kind:text_only=10 (revision 2, which replaced this policy); this "
        "process asks for kind:text_only=1: pass revision=3 in the policy or "
        "on_conflict='replace' to put it in force, or on_conflict='keep' to run under what is "
        "in force"
    )
    assert str(conflict) == conflict.message == expected
    assert (conflict.pool, conflict.limit) == ("gemini", "kind:text_only")
    assert (conflict.in_force, conflict.asked) == ("10", "1")


def test_a_live_change_is_never_overwritten_without_a_word() -> None:
    with pytest.raises(PolicyConflict, match=r"\(revision 2, set live by ann\)"):
        written({"kind:text_only": 3}).among([change(TEN, 2, "ann"), change(ONE, 1)])


@pytest.mark.parametrize("by", [WRITTEN_BY, "ann"])
def test_replace_puts_it_in_force_whatever_was_there(by: str) -> None:
    history = [change(TEN, 2, by), change(ONE, 1)]
    assert written(ONE, on_conflict="replace").among(history) == PoolPolicy(ONE, revision=3)


def test_a_limit_that_only_one_of_both_has_and_an_option_are_named() -> None:
    policy = PoolPolicy({"pool:total": 4}, lease_ms=5000)
    with pytest.raises(PolicyConflict) as raised:
        WrittenPolicy("gemini", policy, "raise").among([change(ONE, 2, "ann")])
    assert "holds pool:total=none, lease_ms=3000, kind:text_only=1 (" in str(raised.value)
    assert "asks for pool:total=4, lease_ms=5000, kind:text_only=none:" in str(raised.value)
