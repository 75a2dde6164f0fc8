"""What headers report beside what is in force, and what others on the account take. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace
from typing import Any

import orjson
import pytest

from tests.unit.policy.accounts import count_charge
from tidegate.errors import NotFound
from tidegate.limiter import PoolPolicy
from tidegate.metrics.process import Note, packed, unpacked
from tidegate.policy.account import RENEWED_S, AccountUse, DayUse
from tidegate.policy.format import of_plain, to_plain
from tidegate.policy.imported import acceptance
from tidegate.policy.learned import (
    HeaderReading,
    LearnedLimit,
    LearnedNote,
    LimitMatch,
    OthersUse,
    RefusedLimit,
    kept_free,
    learned_limits,
    readings_of_days,
    unpacked_note,
)
from tidegate.spine.learning import Confirmations

IMPORTED = {"bound": 80_000, "source": "imported"}
READ = HeaderReading("gpt-5", "tpm", 60_000, 60_000, 100.0)


def policy(**limits: Any) -> PoolPolicy:
    return of_plain({"limits": {name.replace("__", ":"): one for name, one in limits.items()}})


def learned(in_force: PoolPolicy, *readings: HeaderReading, provider: str = "") -> Any:
    note = LearnedNote(readings)
    return {one.limit: one for one in learned_limits([note], LimitMatch(in_force, provider))}


@pytest.mark.parametrize(
    ("limit", "bound"),
    [
        # A person's own minute, and what the preset makes of 720 a minute.
        ({"bound": 720, "unit": "requests"}, 720),
        ({"bound": 120, "window_ms": 10_000}, 120),
        ({"bound": 9, "window_ms": 1_000}, 12),
    ],
)
def test_azures_requests_are_of_ten_seconds_whatever_the_limit_counts(
    limit: dict[str, Any], bound: int
) -> None:
    reading = HeaderReading("gpt-5", "rpm", 120, 119, 100.0, window_ms=10_000.0)
    in_force = policy(**{"rpm:gpt-5": limit})
    found = learned(in_force, reading, provider="azure")["rpm:gpt-5"]
    assert found.bound == bound
    assert found.drift == ("same" if bound == limit["bound"] else "rose")
    unknown = learned(in_force, replace(reading, window_ms=None), provider="azure")
    assert [one.bound for one in unknown.values()] == [bound] * (bound == 120)


@pytest.mark.parametrize(
    ("limits", "limit", "in_force", "drift"),
    [
        ({}, "tpm:gpt-5", None, "new"),
        ({"tpm:gpt-5": 60_000}, "tpm:gpt-5", 60_000, "same"),
        ({"tpm:gpt-5": 30_000}, "tpm:gpt-5", 30_000, "rose"),
        ({"tpm:gpt-*": 90_000}, "tpm:gpt-*", 90_000, "fell"),
        ({"tpm:gpt-4,gpt-5": 90_000}, "tpm:gpt-4,gpt-5", 90_000, "fell"),
        # Of several the narrowest: its header is of the model alone. Other units are no match.
        ({"tpm:gpt-*": 90_000, "tpm:gpt-5": 80_000}, "tpm:gpt-5", 80_000, "fell"),
        ({"tpm:gpt-*": 50_000, "tpm:gpt-5": 80_000}, "tpm:gpt-5", 80_000, "fell"),
        ({"tpm:gpt-*": 50_000, "tpm:gpt-4,gpt-5": 80_000}, "tpm:gpt-4,gpt-5", 80_000, "fell"),
        ({"tpm:g*": 50_000, "tpm:o3,gpt-*": 80_000}, "tpm:o3,gpt-*", 80_000, "fell"),
        ({"tps:gpt-5": 1_000, "tpm:gpt-5": 80_000}, "tpm:gpt-5", 80_000, "fell"),
        # A person's own cap is not what the provider reports where an import knows that.
        ({"tpm:gpt-*": IMPORTED, "tpm:gpt-5": 10_000}, "tpm:gpt-*", 80_000, "fell"),
        ({"tpm:gpt-5-mini": 1, "itpm:gpt-5": 1, "tpd:gpt-5": 1}, "tpm:gpt-5", None, "new"),
    ],
)
def test_a_reading_is_put_beside_the_limit_in_force(
    limits: dict[str, Any], limit: str, in_force: int | None, drift: str
) -> None:
    (found,) = learned(of_plain({"limits": limits}), READ).values()
    assert (found.limit, found.in_force, found.drift) == (limit, in_force, drift)


def test_uncached_input_is_what_a_header_of_input_reports() -> None:
    told = replace(READ, scope="itpm")
    in_force = of_plain({"limits": {"itpm:gpt-5": {"bound": 5, "unit": "uncached_input_tokens"}}})
    assert learned(in_force, told)["itpm:gpt-5"].drift == "rose"


def test_a_limit_of_another_window_is_compared_only_where_the_header_implies_its_own() -> None:
    in_force = of_plain({"limits": {"tpm:gpt-5": {"bound": 10_000, "window_ms": 10_000}}})
    assert learned(in_force, READ) == {}
    minute = replace(READ, window_ms=61_000.0)
    assert learned(in_force, minute)["tpm:gpt-5"].drift == "same"
    own = replace(READ, window_ms=9_800.0)
    assert learned(in_force, own)["tpm:gpt-5"].bound == 60_000


def test_the_newest_reading_of_all_processes_counts() -> None:
    notes = [LearnedNote((READ,)), LearnedNote((replace(READ, bound=5, at=101.0),))]
    (found,) = learned_limits(notes, LimitMatch(policy(), ""))
    assert found.bound == 5


def test_one_of_which_nothing_remains_stands_against_answers_of_before_it() -> None:
    refused = replace(READ, bound=30_000, remaining=0)
    for later_s, bound in ((0.9, 30_000), (1.1, 60_000)):
        answered = replace(READ, at=READ.at + later_s)
        (found,) = learned(policy(tpm__gpt_5=90_000), refused, answered).values()
        assert found.bound == bound


def test_a_note_of_something_else_is_empty() -> None:
    refusals = (RefusedLimit("tpm:gpt-5", 99.5),)
    note = LearnedNote((READ,), (OthersUse("tpm:gpt-5", 7, 9),), refusals)
    assert unpacked_note(orjson.dumps(note)) == note
    assert unpacked_note(packed(Note("api"), asdict(note))) == note, "beside what else it says"
    assert unpacked(packed(Note("api", 3), asdict(note))) == Note("api", 3)
    assert unpacked_note(b'{"process": "api", "calls": []}') == LearnedNote()


def accepted(limits: dict[str, Any], names: list[str], *found: LearnedLimit) -> Any:
    plain = {"limits": limits}
    return to_plain(of_plain(acceptance(found, names, "openai")(plain)))["limits"]


def test_what_another_version_has_added_to_a_note_is_passed_over() -> None:
    """Processes of two versions share notes during a rolling restart."""
    refusals = (RefusedLimit("tpm:gpt-5", 60.0, 15.0),)
    note = LearnedNote((READ,), (OthersUse("tpm:gpt-5", 200, 210),), refusals)
    told = asdict(note)
    for name in ("readings", "others", "refusals"):
        told[name] = [{**one, "added": 1} for one in told[name]]
    assert unpacked_note(orjson.dumps({**told, "added": []})) == note


def test_an_acceptance_changes_the_bound_and_nothing_else_that_was_set() -> None:
    own = {"bound": 30_000, "reserve": "bound", "slack_ms": 7}
    found = learned(of_plain({"limits": {"tpm:gpt-5": own}}), READ)["tpm:gpt-5"]
    assert accepted({"tpm:gpt-5": own}, [], found) == {"tpm:gpt-5": {**own, "bound": 60_000}}
    (new,) = learned(policy(), READ).values()
    limits = accepted({}, ["tpm:gpt-5"], new)
    counted = {"reserve": "larger", "settles": False, "shape": "bucket"}
    told = {"bound": 60_000, "source": "learned", **counted}
    assert limits == {"tpm:gpt-5": told}


def test_a_limit_that_was_removed_meanwhile_does_not_come_back() -> None:
    rose = learned(of_plain({"limits": {"tpm:gpt-5": 30_000}}), READ)["tpm:gpt-5"]
    assert accepted({}, [], rose) == {}


def test_nothing_is_accepted_that_is_not_learned_or_does_not_differ() -> None:
    (new,) = learned(policy(), READ).values()
    with pytest.raises(NotFound, match="nothing was learned about a limit rpm:gpt-5"):
        acceptance([new], ["rpm:gpt-5"], "")
    with pytest.raises(NotFound, match="no limit in force differs"):
        acceptance([replace(new, drift="same")], [], "")


def test_a_bound_is_confirmed_by_an_answer_that_reports_it_some_seconds_later() -> None:
    confirmations = Confirmations(5)

    def confirms(at: float, now: float, bound: int = 500, in_force: int = 400) -> bool:
        current = policy(tpm__gpt_5=in_force)
        (found,) = learned(current, replace(READ, model="gpt_5", bound=bound, at=at)).values()
        return confirmations.take(found, now)

    assert not confirms(0, 0)
    assert not confirms(0, 3_600), "no other answer"
    assert not confirms(3_604, 3_604, bound=600), "another bound"
    assert not confirms(3_608, 3_608, bound=600)
    assert confirms(3_609, 3_609, bound=600)
    # An import changes the limit; the last answer is of an hour before it.
    assert not confirms(3_609, 7_200, bound=600, in_force=5_000)
    assert not confirms(3_609, 7_206, bound=600, in_force=5_000)
    assert not confirms(7_204, 7_206, bound=600, in_force=5_000)
    assert confirms(7_205, 7_206, bound=600, in_force=5_000)


def test_answers_of_before_a_change_confirm_nothing_to_a_process_that_leads_since() -> None:
    (found,) = learned(policy(tpm__gpt_5=5_000), replace(READ, model="gpt_5", at=0)).values()
    confirmations = Confirmations(5)
    assert [confirmations.take(found, now) for now in (60, 65, 3_600)] == [False] * 3


class Account:
    """A bucket of an account, used by us and by others, second by second, and filled to begin
    with. What does not fit is refused, and counts as used at the pool alone."""

    def __init__(
        self,
        bound: int,
        window_s: float = 60.0,
        *,
        is_bucket: bool = False,
        late: int = 0,
        every: int = 1,
    ) -> None:
        """late: seconds after which an answer comes, with headers of its call's beginning; a
        refusal comes immediately. every: of so many seconds one has such an answer; those of the
        others come after it."""
        self.in_force = self.bound = self.told_bound = bound
        self.left = float(bound)
        self.now = 0.0
        self.counted: deque[tuple[float, float]] = deque()
        self.total = 0.0
        self.refused = self.admitted = 0
        self.use = AccountUse(window_s, window_s + 0.5, refills=True)
        self.is_bucket, self.level, self.tells_level = is_bucket, 0.0, True
        self.answers: deque[HeaderReading] = deque()
        self.late, self.every = late, every
        self.paused_until = 0.0
        self.ahead_s = 0.0  # the clock of what learns

    def used(self) -> float:
        """What decides at our limit: the level of a bucket, or what was spent in its window."""
        return self.level if self.is_bucket else self.spent()

    def spent(self) -> float:
        since = self.now - self.use.span_s
        while self.counted and self.counted[0][0] <= since:
            self.total -= self.counted.popleft()[1]
        return self.total

    def count(self, amount: float) -> None:
        self.counted.append((self.now, amount))
        self.total += amount
        self.level += amount

    def change(self, bound: int) -> None:
        """A tier that rises or falls: what is used stays used."""
        self.left += bound - self.bound
        self.bound = bound

    def take(self, amount: float) -> bool:
        fits = amount <= self.left
        self.left -= amount if fits else 0.0
        return fits

    @property
    def full_in_s(self) -> float:
        return (self.bound - self.left) * self.use.window_s / self.bound

    def second(self, wanted: int, others: float, error: float = 1.0) -> None:
        """One second in which we make so many calls of 100, of which the provider counts `error`
        times as much."""
        self.now += 1
        clock_s = self.now + self.ahead_s
        self.left = min(self.bound, self.left + self.bound / self.use.window_s)
        self.level = max(0.0, self.level - self.in_force / self.use.window_s)
        self.take(others)
        is_paused, refused = self.now < self.paused_until, self.refused
        for _ in range(0 if is_paused else wanted):
            if self.used() + 100 <= self.in_force:
                self.count(100.0)
                fits = self.take(100 * error)
                self.refused += not fits
                self.admitted += fits
        if not is_paused and self.now % self.every == 0:
            left, used = max(0, int(self.left)), self.bound - self.left
            window_ms = self.full_in_s * 1000 * self.bound / min(used, self.bound) if used else None
            reading = HeaderReading("m", "tpm", self.bound, left, clock_s, window_ms)
            if self.refused > refused:
                self.answers.clear()  # older ones are passed over
            self.answers.append(reading)
        late = 0 if self.refused > refused else self.late
        if self.answers and self.answers[0].at <= clock_s - late:
            reading = replace(self.answers.popleft(), heard_at=clock_s)
            self.hear(reading)
        bound = self.told_bound
        taken, level = round(self.spent()), round(self.level)
        if self.is_bucket and self.tells_level:
            due = self.use.level_due(clock_s, taken, level, self.in_force, bound)
        else:
            due = self.use.due(clock_s, taken, self.in_force, bound)
        if due:
            count_charge(self.counted, self.use, self.now, due)
            self.total += due
            self.level += due

    def hear(self, reading: HeaderReading) -> None:
        self.told_bound = reading.bound
        self.use.read(reading)

    def run(self, seconds: int, wanted: int = 50, others: float = 0.0, error: float = 1.0) -> int:
        """How many calls were refused meanwhile."""
        before = self.refused
        for _ in range(seconds):
            self.second(wanted, others, error)
        return self.refused - before


@pytest.mark.parametrize("is_bucket", [False, True])
@pytest.mark.parametrize("wanted", [0, 3, 10, 50])
def test_without_others_nothing_is_kept_free_whatever_we_use(wanted: int, is_bucket: bool) -> None:
    account = Account(60_000, is_bucket=is_bucket)
    account.run(300, wanted)
    assert not account.use.acts
    assert account.use.kept(account.now) == 0
    assert account.spent() >= min(59_900, wanted * 6_000)


@pytest.mark.parametrize("error", [0.6, 1.0, 1.02])
def test_our_own_error_is_taken_for_no_others(error: float) -> None:
    account = Account(60_000)
    account.run(300, 10, error=error)
    assert account.use.kept(account.now) == 0


def test_others_are_noticed_within_a_minute_and_forgotten_after_they_left() -> None:
    account = Account(60_000)
    account.run(120)
    account.run(30, others=300.0)
    assert account.use.acts
    account.run(60, others=300.0)
    assert 0.25 < account.use.others / 60_000 < 0.35
    assert account.run(300, others=300.0) <= 5  # a minute's worth of one each
    account.run(130)
    assert account.use.kept(account.now) == 0
    assert account.spent() > 0.95 * 60_000


def test_a_limit_far_below_the_accounts_keeps_nothing_free_for_others() -> None:
    account = Account(60_000)
    account.in_force = 12_000
    account.run(180, 5, others=300.0)
    assert account.use.acts
    assert account.use.kept(account.now) == 0
    account.in_force = 48_000  # of 42,000 that the others leave
    account.run(120, 50, others=300.0)
    assert 6_000 < account.use.kept(account.now) < 12_000


@pytest.mark.parametrize("others", [0.0, 150.0])
def test_room_is_kept_free_for_a_bound_that_fell_and_freed_when_it_rose_again(
    others: float,
) -> None:
    account = Account(60_000)
    account.run(180, others=2 * others)
    account.change(30_000)
    account.run(120, others=others)
    assert account.use.kept(account.now) >= 30_000
    assert account.run(300, others=others) <= 5
    account.change(60_000)
    account.run(120, others=0.0)
    assert account.use.kept(account.now) == 0


@pytest.mark.parametrize("is_bucket", [False, True])
@pytest.mark.parametrize("bound", [9_600, 4_800, 3_000])
@pytest.mark.parametrize("wanted", [2, 50])
def test_an_account_far_below_the_limit_in_force_is_used_nevertheless(
    wanted: int, bound: int, is_bucket: bool
) -> None:
    """As of a limit that was copied from another account: the margins alone exceed its bound."""
    account = Account(240_000, is_bucket=is_bucket)
    account.change(bound)
    account.left = float(bound)
    account.run(120, wanted)
    admitted = account.admitted
    assert account.run(300, wanted) == 0
    least = 0.9 if is_bucket else 0.15
    assert account.admitted - admitted > least * 300 * min(wanted, bound / 100 / 60)


@pytest.mark.parametrize("reported", [0, 20_000, 30_000, 35_000])
def test_after_a_loss_what_no_process_reports_again_is_charged_again(reported: int) -> None:
    use = AccountUse(60.0, 60.5, refills=False)
    assert use.due(0.0, 0, 60_000, 30_000) == 30_000
    use.lose()
    charged = max(0, 30_000 - reported)
    # What ends before the next looks is charged again already.
    ending = (RENEWED_S + 5.0 + 0.5) / 60.0 * 30_000
    again = use.due(5.0, reported, 60_000, 30_000)
    assert charged <= again <= charged + ending
    assert 30_000 <= use.kept(5.0) <= 30_000 + ending
    assert use.due(10.0, reported + again, 60_000, 30_000) <= ending


@pytest.mark.parametrize(
    ("lowered", "kept"), [((30_000,), 300), ((10_000, 20_000), 300), ((10_000,), 20_300)]
)
def test_a_lower_bound_in_force_ends_what_was_kept_for_the_difference(
    lowered: tuple[int, ...], kept: int
) -> None:
    """As in the pool. What is kept for others stays, and nothing that has ended is charged again,
    also after a loss."""
    use = AccountUse(60.0, 60.5, refills=False)
    use.inherit(OthersUse("tpm:gpt-5", 0, 300), 0.0)
    assert use.due(0.0, 300, 60_000, 29_700) == pytest.approx(30_000, abs=20)
    for by in lowered:
        use.lower(by, 0.0)
    assert use.kept(0.0) == pytest.approx(kept, abs=20)
    use.lose()
    in_force = 60_000 - sum(lowered)
    due = use.due(0.1, use.kept(0.1), in_force, 29_700)
    assert due <= (RENEWED_S + 1.1) / 60.0 * kept, "what ends before the next looks"
    use.lower(60_000, 0.1)
    assert use.kept(0.1) == 0


def test_a_bucket_is_at_the_accounts_level_once_the_lower_bound_is_in_force() -> None:
    use = AccountUse(60.0, 60.5, refills=True)
    reading = HeaderReading("m", "tpm", 30_000, 10_000, 0.0, window_ms=60_000.0)
    use.read(reading)
    charged = use.level_due(0.0, 20_000, 20_000, 60_000, 30_000)
    assert charged == 30_000
    use.lower(30_000, 0.1)
    assert use.kept(0.1) == 0
    later = replace(reading, remaining=11_000, at=2.0)
    use.read(later)
    assert use.level_due(2.0, 20_000, 19_000, 30_000, 30_000) == 0


def test_a_charge_that_reached_the_pool_late_is_no_use_of_ours() -> None:
    """The empty bucket had nothing to lose until then, and has as much more of the charge."""
    use = AccountUse(60.0, 60.5, refills=True)
    use.read(HeaderReading("m", "rpm", 120, 117, 0.0, window_ms=1_500.0))
    assert use.level_due(1.0, 3, 3, 500, 120) == 380
    use.note_charged(11.0)
    taken, level = 383, 380 - round(500 / 60)
    due = use.level_due(12.0, taken, level, 500, 120)
    margins = 0.03 * 500 + RENEWED_S * 380 / 60
    assert level + due == pytest.approx(380 + margins, abs=1)


def test_the_level_of_a_bucket_follows_the_accounts() -> None:
    account = Account(60_000, is_bucket=True)
    account.run(120)
    assert account.run(60, others=300.0) <= 5
    assert account.use.acts
    assert 0.25 < account.use.others / 60_000 < 0.35
    assert account.run(300, others=300.0) == 0
    kept = account.use.kept(account.now)
    assert account.spent() - kept > 0.95 * 0.7 * 60_000  # of what the others leave
    account.change(30_000)
    assert account.run(60, others=150.0) <= 5
    assert account.run(240, others=150.0) == 0
    account.change(60_000)
    account.run(180)
    assert account.use.others < 0.02 * 60_000
    assert account.use.kept(account.now) == 0
    assert account.spent() > 0.95 * 60_000


@pytest.mark.parametrize("late", [1, 2, 3, 10, 20, 40])
def test_long_calls_cost_no_more_refusals(late: int) -> None:
    """Their headers are as of their beginning: others are seen by what was ours then."""
    account = Account(60_000, is_bucket=True, late=late)
    account.run(120)
    account.run(60 + 10 * late, others=300.0)
    assert account.run(300, others=300.0) <= 5  # a minute's worth of one each
    assert 0.25 < account.use.others / 60_000 < 0.35
    account.run(180 + 2 * late)
    account.change(30_000)
    account.run(60 + 2 * late)
    before = account.admitted
    assert account.run(300) <= 5
    assert account.admitted - before > 0.95 * 300 * 5  # of 30,000 a minute


@pytest.mark.parametrize("is_bucket", [False, True])
@pytest.mark.parametrize("late", [3, 10, 20, 40])
@pytest.mark.parametrize(("wanted", "on_s", "off_s"), [(50, 10, 60), (10, 20, 20), (5, 60, 60)])
def test_bursts_of_long_calls_are_no_use_of_others(
    wanted: int, on_s: int, off_s: int, late: int, is_bucket: bool
) -> None:
    account = Account(60_000, is_bucket=is_bucket, late=late)
    for _ in range(6):
        account.run(on_s, wanted)
        account.paused_until = account.now + off_s
        account.run(off_s - 1)
        assert not account.use.acts
        assert account.use.others < 0.01 * 60_000


@pytest.mark.parametrize("is_bucket", [False, True])
@pytest.mark.parametrize("late", [0, 10, 20, 40])
@pytest.mark.parametrize("every", [8, 10, 15])
def test_answers_that_come_seldom_and_late_tell_of_others(
    every: int, late: int, is_bucket: bool
) -> None:
    """Between them nothing is forgotten of what is compared when the next one comes."""
    account = Account(60_000, is_bucket=is_bucket, late=late, every=every)
    account.run(120)
    account.run(240, others=300.0)
    found, refused = [], account.run(240, others=300.0)
    for _ in range(60):
        refused += account.run(1, others=300.0)
        found.append(account.use.others / 60_000)
    assert refused <= 5
    assert 0.2 < sum(found) / len(found) < 0.35


@pytest.mark.parametrize("is_bucket", [False, True])
@pytest.mark.parametrize("late", [0, 20, 40])
@pytest.mark.parametrize("every", [1, 3, 5])
@pytest.mark.parametrize(("wanted", "on_s"), [(50, 10), (20, 10), (50, 5)])
def test_a_job_that_begins_each_minute_is_no_use_of_others(
    wanted: int, on_s: int, every: int, late: int, is_bucket: bool
) -> None:
    """Of what was used between two answers only a part may be of the last window."""
    account = Account(60_000, is_bucket=is_bucket, late=late, every=every)
    for _ in range(6):
        account.run(on_s, wanted)
        account.paused_until = account.now + 60 - on_s
        for _ in range(60 - on_s):
            account.run(1)
            assert not account.use.acts
            assert account.use.others < 0.01 * 60_000


@pytest.mark.parametrize("pause_s", [20, 40, 55])
def test_what_others_take_in_a_pause_is_not_taken_for_room(pause_s: int) -> None:
    account = Account(60_000, is_bucket=True)
    account.run(180, others=300.0)
    account.paused_until = account.now + pause_s
    assert account.run(pause_s + 120, 600, others=300.0) == 0
    assert account.use.acts


@pytest.mark.parametrize("late_s", [0, 20, 40])
def test_after_a_pause_others_still_have_their_part(late_s: int) -> None:
    """In a pause there are no answers: what others take meanwhile is not ours to burst into, nor
    what was used beyond a bound that fell."""
    account = Account(60_000, is_bucket=True)
    account.run(120, others=300.0)
    account.change(30_000)
    account.run(5, others=150.0)
    pause_s = round(account.full_in_s - account.use.window_s + 1) + late_s  # until a call fits
    account.paused_until = account.now + pause_s
    assert account.run(pause_s + 12, 600, others=150.0) == 0
    assert account.left < 4_000, "nor is it left unused"
    assert account.run(110, 600, others=150.0) == 0
    assert account.use.acts
    account.run(120)
    assert account.spent() - account.use.kept(account.now) > 0.95 * 30_000


def test_an_idle_bucket_has_no_more_room_than_a_bound_that_fell() -> None:
    account = Account(60_000, is_bucket=True)
    account.run(10)
    account.change(20_000)
    account.run(200, wanted=0)
    assert account.in_force - account.level <= 20_000 + 0.01 * 20_000 + 1_000


@pytest.mark.parametrize("is_bucket", [False, True])
@pytest.mark.parametrize("others", [0.0, 150.0])
def test_another_leader_takes_charges_of_the_one_before_for_no_use_of_others(
    others: float, is_bucket: bool
) -> None:
    account = Account(60_000, is_bucket=is_bucket)
    account.run(180)
    account.change(30_000)
    account.run(240, others=others)
    kept, admitted, refused = account.use.kept(account.now), account.admitted, account.refused
    known = account.use.others if account.use.acts else 0.0
    account.use = AccountUse(60.0, 60.5, refills=True)
    account.use.inherit(OthersUse("tpm:m", round(known), kept), account.now)
    assert account.use.kept(account.now) == kept
    for _ in range(180):
        account.second(50, others)
        assert account.use.others < others * 60 + 0.05 * 30_000
    assert account.refused - refused <= 5
    assert account.admitted - admitted > 0.8 * (500 - others) / 100 * 180


@pytest.mark.parametrize("is_bucket", [False, True])
@pytest.mark.parametrize("back_s", [5, 30, 3_600])
def test_after_a_clock_was_set_back_others_are_known_again(back_s: int, is_bucket: bool) -> None:
    account = Account(60_000, is_bucket=is_bucket)
    account.run(180, others=300.0)
    account.ahead_s = -back_s
    for _ in range(120):
        account.second(50, 300.0)
        assert account.use.others < 0.35 * 60_000
    assert account.use.others / 60_000 > 0.25
    assert account.refused <= 5
    account.run(130)
    assert account.use.kept(account.now - back_s) == 0
    assert account.spent() > 0.95 * 60_000
    assert len(account.use._samples) < 70


@pytest.mark.parametrize("late", [0, 20, 40])
def test_in_a_pause_nothing_is_kept_free_for_nobody(late: int) -> None:
    """An idle limit costs no charges, and a call that takes nearly all of it fits."""
    account = Account(60_000, is_bucket=True, late=late)
    account.run(120, 5)
    account.paused_until = account.now + 3_600
    account.run(100)
    assert account.level == 0
    assert account.use.kept(account.now) == 0


def test_what_an_account_counts_higher_is_made_up_for_in_a_bucket() -> None:
    account = Account(60_000, is_bucket=True)
    account.run(120, error=1.02)
    assert account.run(300, error=1.02) == 0


@pytest.mark.parametrize("is_known_by", ["provider", "readings"])
def test_a_window_that_begins_again_is_no_use_of_others(is_known_by: str) -> None:
    use = AccountUse(60.0, 60.5, refills=is_known_by != "provider")
    counted = 0
    for second in range(1, 200):
        left = 60_000 - (second % 60) * 800
        counted = min(60, second) * 800
        reset_ms = (60 - second % 60) * 1e3 if is_known_by == "readings" else None
        use.read(HeaderReading("m", "tpm", 60_000, left, float(second), reset_ms=reset_ms))
        lately = min(second, second % 60 + 1) * 800
        assert use.due(float(second), counted, 60_000, 60_000, recent=lately) == 0


@pytest.mark.parametrize("burst", [2, 5, 20])
@pytest.mark.parametrize("late", [1, 4])
def test_a_backlog_that_comes_in_bursts_is_no_use_of_others(burst: int, late: int) -> None:
    """Each window is used up in its first seconds; the headers tell of a call seconds after the
    pool has counted it, and of one call sooner than of an earlier one."""
    bound, period = 600_000, 61
    use = AccountUse(60.0, 60.5, refills=False)

    def used_by(second: int) -> int:
        """Of the window that the second is in."""
        return min(second % period, burst) * bound // burst

    for second in range(1, 5 * period):
        told = second - late - second * 5 % 3
        if told % period in range(1, burst + 1):
            left, reset_ms = bound - used_by(told), (60.0 - told % period) * 1000
            reading = HeaderReading("m", "tpm", bound, left, float(second), reset_ms=reset_ms)
            use.read(reading)
        earlier = bound - used_by(second) if second > period else 0  # leaves as the new one comes
        lately = used_by(second)
        assert use.due(float(second), lately + earlier, bound, bound, recent=lately) == 0


DAY = 2_000_000


class DayAccount(Account):
    """An account whose answers tell of a day's bound of the same calls, and not of its minute's."""

    def __init__(self, bound: int) -> None:
        super().__init__(bound, is_bucket=True)
        self.day_used, self.refills, self.tells_level = 0.0, True, False
        self.day_bound = DAY

    def take(self, amount: float) -> bool:
        fits = super().take(amount)
        self.day_used += amount if fits else 0.0
        return fits

    def second(self, wanted: int, others: float, error: float = 1.0) -> None:
        self.day_used = max(0.0, self.day_used - self.refills * self.day_bound / 86_400)
        refused = self.refused
        super().second(wanted, others, error)
        if self.refused > refused:
            self.use.refuse(self.now)

    def hear(self, reading: HeaderReading) -> None:
        day_ms, left = 86_400_000.0, self.day_bound - round(self.day_used)
        told = replace(reading, scope="rpd", bound=self.day_bound, remaining=left, window_ms=day_ms)
        if not self.refills:
            told = replace(told, reset_ms=day_ms - self.now * 1000)
        self.use.read_day(told)
        self.told_bound = self.use.by_day(self.in_force)

    def change(self, bound: int) -> None:
        self.day_bound = self.day_bound * bound // self.bound
        super().change(bound)


@pytest.mark.parametrize("wanted", [0, 3, 10, 50])
def test_a_days_bound_shows_no_others_where_there_are_none(wanted: int) -> None:
    account = DayAccount(60_000)
    assert account.run(300, wanted) == 0
    assert account.use.taken_by_others(account.now, 60_000) == account.use.kept(account.now) == 0


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_days_bound_shows_others_of_a_minute_that_no_answer_tells_of(share: float) -> None:
    account = DayAccount(60_000)
    account.run(120)
    account.run(60, others=share * 1000)
    assert account.use.taken_by_others(account.now, 60_000) >= 0.6 * share * 60_000
    before = account.admitted
    assert account.run(600, others=share * 1000) == 0
    used = (account.admitted - before) * 100 / 600_000
    assert used >= 0.75 * (1 - share), "what the first refusals keep free ends slowly"
    account.run(180)
    assert account.use.taken_by_others(account.now, 60_000) == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("others", [0.0, 0.3])
def test_a_days_bound_shows_a_tier_that_fell(share: float, others: float) -> None:
    account = DayAccount(60_000)
    account.run(300, others=others * 1_000)
    bound = round(share * 60_000)
    account.change(bound)
    account.run(2, others=others * share * 1_000)
    assert account.use.by_day(60_000) == bound, "by the next answer"
    account.run(round(60 / share), others=others * share * 1_000)  # until it may be full again
    before = account.admitted
    assert account.run(600, others=others * share * 1_000) == 0
    used = (account.admitted - before) * 100 / (bound * 10)
    assert used >= 0.7 * (1 - others)


def test_a_tier_that_rose_frees_no_more_than_what_is_in_force() -> None:
    account = DayAccount(60_000)
    account.run(120)
    account.change(120_000)
    assert account.run(300) == 0
    assert account.use.by_day(60_000) == 120_000
    assert account.use.kept(account.now) == 0


def test_a_changed_bound_in_force_goes_with_the_days_bound() -> None:
    use = AccountUse(60.0, 60.5, refills=True)
    day = HeaderReading("m", "rpd", 1_000, 900, 100.0, DAY_MS)
    use.read_day(day)
    use.read_day(replace(day, bound=500, remaining=400, at=101.0))
    assert use.by_day(60) == 30
    use.read_day(replace(day, at=99.0))
    use.read_day(None)
    assert use.by_day(60) == 30, "an older answer, or none, shows nothing"
    use.forgive()
    assert use.by_day(30) == 30
    later = AccountUse(60.0, 60.5, refills=True)
    later.inherit_day(30, 60, replace(day, bound=500))
    assert later.by_day(60) == 30, "of an earlier leader"
    use.read(HeaderReading("m", "rpm", 60, 50, 102.0))
    assert use.by_day(60) == 60, "an answer tells of the limit itself"


def test_a_day_that_begins_again_shows_nothing_of_a_minute() -> None:
    """How much of it refills in a minute would be taken for others."""
    account = DayAccount(60_000)
    account.refills = False
    assert account.run(120, 3, others=300) == 0
    assert account.use.taken_by_others(account.now, 60_000) == 0


def test_others_of_whom_refusals_alone_tell_are_named_with_their_limit() -> None:
    in_force = policy(itpm__gemini={"bound": 1_000, "source": "imported"}, rpm__gemini=100)
    refusals = (RefusedLimit("itpm:gemini", 60.0), RefusedLimit("itpm:gone", 70.0))
    notes = [
        LearnedNote(others=(OthersUse("itpm:gemini", 200, 210), OthersUse("itpm:gone", 1, 1))),
        LearnedNote(refusals=(RefusedLimit("itpm:gemini", 50.0),)),
        LearnedNote(refusals=refusals),
    ]
    (one,) = learned_limits(notes, LimitMatch(in_force, "gemini"))
    assert (one.limit, one.model, one.drift, one.source) == ("itpm:gemini", "", "same", "imported")
    assert (one.bound, one.in_force, one.others_share) == (1_000, 1_000, 0.2)
    assert one.at == "1970-01-01T00:01:00+00:00"
    (told,) = learned_limits(
        [*notes, LearnedNote((replace(READ, model="gemini", scope="itpm", bound=900),))],
        LimitMatch(in_force, "gemini"),
    )
    assert (told.model, told.bound, told.drift) == ("gemini", 900, "fell")


def test_a_days_requests_tell_of_the_rate_that_has_the_same_calls() -> None:
    match = LimitMatch(policy(rpm__m=30, **{"rpm__l*": 30}), "groq")
    of_m, of_l = of_day(100), replace(of_day(100), model="l-8b")
    notes = [LearnedNote((of_m, of_l)), LearnedNote((replace(of_m, at=90.0),))]
    assert readings_of_days(notes, match, ()) == {"rpm:m": of_m, "rpm:l*": of_l}
    assert readings_of_days(notes, match, {"rpm:m"}) == {"rpm:l*": of_l}
    of_another = LearnedNote((replace(of_l, model="l-70b"),))
    assert readings_of_days([*notes, of_another], match, ()) == {"rpm:m": of_m}
    others = LearnedNote(others=(OthersUse("rpm:m", 10, 11),))
    shown = {one.limit: one for one in learned_limits([*notes, others], match)}
    assert (shown["rpm:m"].model, shown["rpm:m"].others_share) == ("", 0.333)
    assert shown["rpm:m"].at == "1970-01-01T00:01:40+00:00"
    fell = LearnedNote(others=(OthersUse("rpm:m", 0, 15, bound=15),))
    shown = {one.limit: one for one in learned_limits([*notes, fell], match)}
    assert (shown["rpm:m"].bound, shown["rpm:m"].in_force, shown["rpm:m"].drift) == (15, 30, "fell")


HOUR_MS, DAY_MS = 3_600_000.0, 86_400_000.0


def of_day(remaining: int | None, window_ms: float | None = DAY_MS) -> HeaderReading:
    return HeaderReading("m", "rpd", 1_000, remaining, 100.0, window_ms)


@pytest.mark.parametrize(
    ("reading", "counted", "left_ms", "age_s", "due"),
    [
        # Half of the day is left, in which the bucket refills by 500: the pool may use no more.
        (of_day(100), 0, DAY_MS / 2, 0, 400),
        (of_day(100), 400, DAY_MS / 2, 0, 0),
        (of_day(100), 300, DAY_MS / 2, 0, 100),
        (of_day(100), 351, DAY_MS / 2, 0, 0),  # less than a twentieth may be an error of counting
        (of_day(100, None), 0, DAY_MS / 2, 0, 400),
        # What has refilled since the answer counts too.
        (of_day(100), 0, DAY_MS / 2, 8_640, 300),
        # A bound that begins again in 2 h 15 min: before the pool's day ends, and after it.
        (of_day(100, 2.5 * HOUR_MS), 0, 3 * HOUR_MS, 0, 0),
        (of_day(100, 2.5 * HOUR_MS), 0, 2 * HOUR_MS, 0, 900),
        (of_day(100, 2.5 * HOUR_MS), 0, 2 * HOUR_MS, 1_000, 0),
        # The same where half of the day has passed evenly, as a bucket's would have.
        (replace(of_day(500, None), reset_ms=12 * HOUR_MS), 0, 13 * HOUR_MS, 0, 0),
        (replace(of_day(500, None), reset_ms=12 * HOUR_MS), 0, 11 * HOUR_MS, 0, 500),
        (of_day(None), 0, HOUR_MS, 0, 0),
    ],
)
def test_of_a_day_no_more_is_used_than_the_provider_gives_until_it_ends(
    reading: HeaderReading, counted: int, left_ms: float, age_s: float, due: int
) -> None:
    use = DayUse()
    assert use.due(reading, counted, 1_000, left_ms, reading.at + age_s) == due
    assert use.kept == due
    assert use.due(reading, counted + due, 1_000, left_ms, reading.at + age_s) == 0


def test_what_is_kept_of_a_day_ends_with_it_and_is_for_the_limit_in_force() -> None:
    use = DayUse(300)
    assert use.due(of_day(1_000), 320, 1_000, HOUR_MS, 100.0) == 0
    assert use.kept == 300
    assert use.due(of_day(1_000), 10, 1_000, HOUR_MS, 100.0) == 0
    assert use.kept == 10
    # Far below the account's bound others take nothing of ours.
    assert DayUse().due(of_day(500, None), 0, 200, 0.0, 100.0) == 0


def test_a_lower_bound_of_a_day_ends_what_was_kept_for_the_difference() -> None:
    use = DayUse(400)
    use.lower(300)
    assert use.kept == 100
    use.lower(300)
    assert use.kept == 0


def test_what_is_kept_free_is_told_with_its_reason() -> None:
    one = LearnedLimit("tpm:m", "m", 60_000, 60_000, "same", "set", 0.0, "")
    assert kept_free([one], "tpm:m") == []
    fell = replace(one, drift="fell", others_share=0.125)
    assert kept_free([fell], "rpm:m") == []
    assert kept_free([one, fell], "tpm:m") == [
        "Others on the account take 12%, which is kept free for them and counts as spent",
        "The provider reports a bound of 60,000: the rest is kept free and counts as spent",
    ]
