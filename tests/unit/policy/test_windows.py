"""Others on an account whose limits are windows that begin again, and what refusals show. Pure."""

from __future__ import annotations

from collections import deque
from itertools import pairwise, product
from typing import Any

import pytest

from tests.unit.policy.accounts import WindowAccount, count_charge
from tidegate.policy.account import (
    CAREFUL_MARGIN,
    CAREFUL_WINDOWS,
    EVEN_WINDOWS,
    HELD_WINDOWS,
    MOST_UNTOLD_CUT,
    NEARLY_FULL,
    NEXT_CUT,
    RENEWED_S,
    STATED_S,
    UNTOLD_CUT,
    UNTOLD_ENDS,
    UNTOLD_WINDOWS,
    AccountUse,
)
from tidegate.policy.learned import HeaderReading, OthersUse


@pytest.mark.parametrize(
    ("wanted", "late_s"), [*product([5, 100], [0, 4, 10, 20, 55]), (3, 20), (3, 55)]
)
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_others_have_room_in_windows_that_a_backlog_takes_first(
    share: float, wanted: int, late_s: float
) -> None:
    """They are seen by what the pool did not take since the provider's window began."""
    account, others = WindowAccount(60_000, late_s), share * 1_000
    account.run(3, wanted, 0.0)
    assert not account.use.acts
    account.run(12, wanted, others)
    refused, others_refused = account.run(10, wanted, others)
    assert refused <= 10
    assert others_refused <= (0.06 * 6 * others if late_s else 10)
    assert abs(account.use.others / 60_000 - share) < (0.06 if late_s else 0.05)
    ours = min(120 * wanted * 100, (1 - share) * 60_000)
    assert account.total - account.use.kept(account.now) > 0.85 * ours
    account.run(4 + round(late_s / 20), wanted, 0.0)
    assert account.use.kept(account.now) <= CAREFUL_MARGIN * 60_000, "after a refusal"
    account.run(round(CAREFUL_WINDOWS), wanted, 0.0)
    assert account.use.kept(account.now) == 0


@pytest.mark.parametrize("ahead_s", [0, 1, 3])
def test_others_are_seen_in_windows_by_a_process_whose_clock_is_ahead(ahead_s: int) -> None:
    account = WindowAccount(60_000)
    account.ahead_s = ahead_s
    account.run(3, 3, 0.0)
    assert not account.use.acts
    account.run(8, 3, 300.0)
    assert abs(account.use.others / 60_000 - 0.3) < 0.05


@pytest.mark.parametrize("ends_at", [20, 40, 55])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.5])
def test_others_who_take_little_before_a_backlog_cost_few_refusals(
    share: float, ends_at: float
) -> None:
    """A sliding window repeats its burst some seconds into each of the provider's, which has
    nothing left for others after it: answers tell of a small use, and a refusal that there is
    one."""
    account = WindowAccount(60_000, ends_at=ends_at)
    account.run(2, 100, 0.0)
    account.run(1, 100, share * 1_000)
    refused, others_refused = account.run(10, 100, share * 1_000)
    assert refused <= 2
    assert others_refused < 0.5 * 10 * share * 600


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_others_of_whom_no_header_tells_have_room_after_refusals(share: float) -> None:
    refused: dict[bool, int] = {}
    for tells in (False, True):
        account = WindowAccount(60_000)
        account.has_headers, account.tells_refusals = False, tells
        account.run(2, 100, 0.0)
        assert account.refused == 0
        account.run(5, 100, share * 1_000)
        refused[tells], others_refused = account.run(10, 100, share * 1_000)
        ours = account.total - account.use.kept(account.now)
        assert ours + 600 * share * 100 > 0.8 * 60_000
    assert refused[True] <= 0.7 * refused[False]
    assert others_refused < 0.5 * 10 * share * 600
    account.run(30, 100, 0.0)
    assert account.use.kept(account.now) == 0


@pytest.mark.parametrize("began_s", [0, 15, 30, 45])
@pytest.mark.parametrize(("wanted", "share"), [(5, 0.1), (5, 0.3), (100, 0.1), (100, 0.3)])
def test_a_refusal_that_tells_when_its_window_ends_shows_what_others_took(
    wanted: int, share: float, began_s: int
) -> None:
    ours = {}
    for tells in (False, True):
        account = WindowAccount(60_000)
        account.has_headers, account.tells_resets = False, tells
        account.run(2, wanted, 0.0)
        for _ in range(2 * began_s):
            account.half_second(wanted, 0.0)
        account.run(2, wanted, share * 1_000)
        assert 1 <= account.refused <= 2
        account.run(12, wanted, share * 1_000)  # until what was kept at first is released
        before, kept = (account.refused, account.others_refused), list[float]()
        for _ in range(8):
            account.run(1, wanted, share * 1_000)
            kept.append(account.use.kept(account.now) / account.bound)
        assert account.refused - before[0] <= 2
        assert account.others_refused - before[1] <= 0.05 * 8 * share * 600
        ours[tells] = 1 - sum(kept) / len(kept)
        account.run(30, wanted, 0.0)
        assert account.use.kept(account.now) == 0
    assert ours[True] > max(ours[False] - 0.06, 0.85 * (1 - share))


@pytest.mark.parametrize(
    ("uncounted", "tells", "most"), [(1, True, 2), (4, True, 2), (4, False, 11)]
)
def test_after_a_refusal_what_our_count_lacks_is_kept_free(
    uncounted: int, tells: bool, most: int
) -> None:
    account = WindowAccount(60_000)
    account.uncounted, account.tells_refusals = uncounted, tells
    refused, _ = account.run(11, 100, 0.0)
    assert most - 2 < refused <= most
    room = 60_000 * (1 - uncounted / 100)
    assert account.total - account.use.kept(account.now) > 0.96 * room


def test_what_is_kept_free_after_a_refusal_ends_and_is_bounded() -> None:
    use, minute = AccountUse(60.0, 60.5, refills=False), 60.0

    def due(now: float) -> int:
        return use.due(now, use.kept(now), 1_000, 1_000)

    use.refuse(0.0)
    assert due(1.0) == round(1_000 * (UNTOLD_CUT + CAREFUL_MARGIN))
    use.refuse(2.0)
    ending = (RENEWED_S + 3.0) / minute * 1_000 * (UNTOLD_CUT + CAREFUL_MARGIN)
    assert due(3.0) <= ending, "a call that was under way"
    for number in range(20):
        use.refuse((1 + number) * minute)
    assert due(20 * minute) == round(1_000 * (MOST_UNTOLD_CUT + CAREFUL_MARGIN))
    later = (20 + UNTOLD_WINDOWS) * minute
    assert [due(later + second) for second in range(120)] == [0] * 120
    use.refuse(later + 120)
    use.forgive()
    assert due(later + 121) == 0, "another bound"


def test_a_lower_bound_that_a_refusal_states_is_its_cause() -> None:
    use = AccountUse(60.0, 60.5, refills=False)

    def room(now: float) -> int:
        use.due(now, use.kept(now), 1_000, 600)
        return use.kept(now)

    use.take_stated(600, 1_000, 9.0)
    use.refuse(9.0)
    use.refuse(8.9)
    least, most = 400, 400 + CAREFUL_MARGIN * 600
    assert least <= room(10.0) <= most, "nothing for others beside it"
    use.take_stated(600, 1_000, 70.0)
    use.refuse(70.0)
    assert room(71.0) >= least + 0.9 * UNTOLD_CUT * 600, "refused below the bound that was known"
    at = 71.0 + STATED_S
    use.take_stated(600, 1_000, at)
    use.refuse(at)
    assert room(at + 1) <= most, "it was no longer kept to"


def test_what_is_kept_free_frees_no_room_for_many_calls_at_one_moment() -> None:
    """All of a backlog would come together then, and be refused together."""
    use, counted = AccountUse(60.0, 60.5, refills=False), deque[tuple[float, Any]]()
    spent: list[int] = []
    for second in range(1, 240):
        now = float(second)
        if second == 2:
            use.refuse(now)
        used = sum(amount for at, amount in counted if at > now - use.span_s)
        if due := use.due(now, used, 1_000, 1_000):
            count_charge(counted, use, now, due)
        spent.append(used)
    assert max(spent) >= 1_000 * UNTOLD_CUT
    freed = [before - after for before, after in pairwise(spent)]
    assert max(freed) <= 0.02 * 1_000


def test_another_leader_goes_on_with_what_refusals_showed() -> None:
    use, bound, now = AccountUse(60.0, 60.5, refills=False), 1_000, 0.0
    for now in (0.0, 60.0, 120.0):
        use.refuse(now)
    kept = use.due(now, 0, bound, bound)
    before = OthersUse("itpm:m", use.taken_by_others(now, bound), kept)
    other = AccountUse(60.0, 60.5, refills=False)
    other.inherit_refusals(before, bound, now + 2.0)
    other.refuse(now)  # as the notes of others name it
    assert other.taken_by_others(now + 2.0, bound) == before.amount
    assert other.due(now + 2.0, kept, bound, bound) <= 0.1 * kept


@pytest.mark.parametrize("is_told", [True, False])
def test_calls_come_evenly_for_some_windows_after_a_refusal_of_a_full_limit(is_told: bool) -> None:
    use, bound = AccountUse(60.0, 60.5, refills=False), 1_000
    if is_told:
        use.read(HeaderReading("m", "tpm", bound, bound, 0.0))
    assert use.ramp_ms(0.0, bound, bound) is None
    use.refuse(0.0)
    kept = use.due(0.0, 0, bound, bound)
    evenly_ms = round(60_000 * bound / (bound - kept))
    assert use.ramp_ms(1.0, bound, bound) == evenly_ms > 60_000
    assert use.ramp_ms(1.0, round(NEARLY_FULL * bound) - 1, bound) is None, "there is room"
    ends_at = (EVEN_WINDOWS if is_told else UNTOLD_WINDOWS) * 60.0
    assert use.ramp_ms(ends_at - 1, bound, bound) is not None
    assert use.ramp_ms(ends_at, bound, bound) is None


def test_calls_of_a_backlog_come_evenly_where_answers_tell_of_the_window() -> None:
    """Else they all come in one moment of each window, and answers with them."""
    use, bound = AccountUse(60.0, 60.5, refills=False), 1_000
    assert use.ramp_ms(0.0, bound, bound, waiting=1) is None, "nothing is told"
    use.read(HeaderReading("m", "tpm", bound, 0, 0.0, reset_ms=60_000))
    assert use.ramp_ms(0.0, bound, bound, waiting=1) == 60_000
    assert use.ramp_ms(0.0, round(NEARLY_FULL * bound) - 1, bound, waiting=1) is None
    assert use.ramp_ms(0.0, bound, bound, waiting=0) is None, "nobody waits"


@pytest.mark.parametrize("stated", [1_000, 50, 1])
def test_calls_come_evenly_for_no_longer_than_a_refusal_counts(stated: int) -> None:
    """Of a tier that fell far, as where an account can't be charged, nearly all is kept free."""
    use, bound = AccountUse(60.0, 60.5, refills=False), 1_000
    use.take_stated(stated, bound, 0.0)
    for number in range(6):
        use.refuse(number * 60.0)
    kept = use.due(300.0, 0, bound, stated)
    assert kept > NEARLY_FULL * bound
    ramp_ms = use.ramp_ms(300.0, kept, bound)
    assert ramp_ms is not None
    assert ramp_ms <= CAREFUL_WINDOWS * 60_000, "nobody ends it"


def test_what_refusals_showed_ends_some_windows_after_the_last() -> None:
    use, bound = AccountUse(60.0, 60.5, refills=False), 1_000
    for number in range(5):
        use.refuse(number * 60.0)
    held_until, ends_at = 240.0 + HELD_WINDOWS * 60.0, 240.0 + UNTOLD_WINDOWS * 60.0
    assert use.taken_by_others(held_until, bound) == MOST_UNTOLD_CUT * bound
    kept = [
        use.taken_by_others(held_until + step * (ends_at - held_until) / 10, bound)
        for step in range(11)
    ]
    released = [before - after for before, after in pairwise(kept)]
    assert max(released) <= min(released) + 1, "evenly"
    assert kept[-1] == 0
    use.refuse(ends_at + 60.0)
    assert use.taken_by_others(ends_at + 60.0, bound) == UNTOLD_CUT * bound, "as at first"


def test_a_refusal_while_all_is_kept_shows_more_than_one_after_some_was_released() -> None:
    use, bound = AccountUse(60.0, 60.5, refills=False), 1_000
    use.refuse(0.0)
    use.refuse(60.0)
    held = UNTOLD_CUT + (1 - UNTOLD_CUT) / 2
    assert use.taken_by_others(60.0, bound) == round(held * bound), "half of the rest"
    at = 60.0 * (1 + HELD_WINDOWS + 5)
    left = use.taken_by_others(at, bound)
    assert left < held * bound - 4 * UNTOLD_ENDS * bound
    use.refuse(at)
    more = use.taken_by_others(at, bound) - left
    assert abs(more - NEXT_CUT * bound) <= 1, "what was released last was too much"
    assert use.taken_by_others(at + HELD_WINDOWS * 60.0, bound) == left + more
