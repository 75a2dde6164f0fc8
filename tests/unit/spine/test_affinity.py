"""Affinity: which upstream a conversation goes to, and for how long its cache is waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from tidegate.admission.demand import CACHE_MS
from tidegate.call import Usage, UsageDetails
from tidegate.policy.deployment import Upstream
from tidegate.record import Lineage
from tidegate.spine import affinity
from tidegate.spine.affinity import (
    HANDOVER_MS,
    Affinity,
    Home,
    conversation_key,
    lineage_in,
)
from tidegate.spine.routing import Target
from tidegate.store.provider.resources import ResourceOwner

KEYS = [b"%d" % number for number in range(3_000)]


def targets(**weights: int) -> list[Target]:
    return [
        Target(Upstream(name, {"openai": "http://here"}, "key", weight=weight), "m")
        for name, weight in weights.items()
    ]


def placed(found: Home | None) -> Home:
    assert found is not None
    return found


def named(found: Home | None) -> str:
    return placed(found).target.upstream.name


def affinity_at(now_ms: Callable[[], float], drawn: float = 1.0) -> Affinity:
    return Affinity(200, now_ms, lambda: drawn)


def test_all_processes_choose_alike_by_weight() -> None:
    three = targets(a=1, b=1, c=2)
    one, other = affinity_at(float), affinity_at(float)
    chosen = [named(one.home(key, three)) for key in KEYS]
    assert chosen == [named(other.home(key, three[::-1])) for key in KEYS]
    shares = Counter(chosen)
    assert shares["a"] / len(KEYS) == pytest.approx(0.25, abs=0.04)
    assert shares["c"] / len(KEYS) == pytest.approx(0.5, abs=0.04)


def test_an_upstream_that_goes_moves_only_its_own_conversations() -> None:
    three = targets(a=1, b=1, c=1)
    known = affinity_at(float)
    before = [named(known.home(key, three)) for key in KEYS]
    after = [named(known.home(key, three[:2])) for key in KEYS]
    assert all(now == was for was, now in zip(before, after, strict=True) if was != "c")


def test_a_conversation_stays_where_it_was_answered_while_its_cache_lasts() -> None:
    now = [0.0]
    two = targets(a=1, b=1)
    known = affinity_at(lambda: now[0])
    first = placed(known.home(b"talk", two))
    other = next(one for one in two if one != first.target)
    assert (first.is_known, first.wait_ms) == (False, HANDOVER_MS)
    details = UsageDetails(cache_write_tokens=1_000)
    known.note(first, other, Usage(input_tokens=9_000, cached_tokens=4_000, details=details))
    now[0] = CACHE_MS
    again = placed(known.home(b"talk", two))
    assert (again.target, again.is_known, again.wait_ms) == (other, True, 1_000.0)
    assert named(known.home(b"talk", [first.target, *targets(c=1)])) != other.upstream.name
    now[0] = CACHE_MS + 1
    assert not placed(known.home(b"talk", two)).is_known


def test_a_call_of_no_conversation_has_no_home() -> None:
    assert affinity_at(float).home(None, targets(a=1, b=1)) is None


def test_nothing_is_waited_for_where_tokens_are_worth_nothing() -> None:
    two = targets(a=1, b=1)
    known = Affinity(0, float)
    for _ in range(2):
        found = placed(known.home(b"talk", two))
        assert found.wait_ms == 0
        known.note(found, found.target, Usage(cached_tokens=4_000))


@pytest.mark.parametrize(("drawn", "share"), [(1.0, 1.0), (0.5, 0.62), (0.0, 0.0)])
def test_a_stay_is_worth_a_share_of_what_its_cache_saves(drawn: float, share: float) -> None:
    two, known = targets(a=1, b=1), affinity_at(float, drawn)
    first = placed(known.home(b"talk", two))
    known.note(first, first.target, Usage(cached_tokens=5_000))
    assert placed(known.home(b"talk", two)).wait_ms == pytest.approx(1_000 * share, abs=1)


def test_all_calls_of_a_stay_wait_together_for_as_long_as_it_is_worth() -> None:
    two, known, usage = targets(a=1, b=1), affinity_at(float), Usage(cached_tokens=5_000)
    first = placed(known.home(b"talk", two))
    known.note(first, first.target, usage)
    left = []
    for _ in range(4):
        found = placed(known.home(b"talk", two))
        left.append(found.wait_ms)
        known.waited(found, found.target, 400)
        known.note(found, found.target, usage)
    assert left == [1_000, 600, 200, 0]
    moved = placed(known.home(b"talk", two))
    known.note(moved, next(one for one in two if one != moved.target), usage)
    assert placed(known.home(b"talk", two)).wait_ms == 1_000


WHOSE, OTHERS = ("t", "m"), ("u", "m")


def answered(known: Affinity, whose: tuple[str, str], *, us_per_token: float) -> None:
    """Streamed answers to conversations, of which each fourth read nothing from a cache."""
    (at,) = targets(a=1)
    for number in range(40):
        cached = None if number % 4 == 0 else 8_000  # Gemini leaves out a zero
        first_ms = 300 + 40 * (number % 3) + (9_000 - (cached or 0)) * us_per_token / 1000
        usage = Usage(input_tokens=9_000, cached_tokens=cached)
        known.note(Home(b"%d" % number, at, whose=whose), at, usage, first_ms=first_ms)


@pytest.mark.parametrize("us_per_token", [50, 600])
def test_a_cached_token_is_worth_the_time_that_reading_one_takes(us_per_token: float) -> None:
    known = Affinity(None, float)
    assert known.ms_per_token(WHOSE) == pytest.approx(affinity.GUESSED_US_PER_TOKEN / 1000)
    answered(known, WHOSE, us_per_token=us_per_token)
    assert known.ms_per_token(WHOSE) * 1000 == pytest.approx(us_per_token, rel=0.1)
    assert known.ms_per_token(OTHERS) == pytest.approx(affinity.GUESSED_US_PER_TOKEN / 1000)


def test_a_token_that_saves_no_time_is_worth_little_and_a_fixed_worth_is_kept() -> None:
    known, fixed = Affinity(None, float), Affinity(600, float)
    for one in (known, fixed):
        answered(one, WHOSE, us_per_token=0)
    assert known.ms_per_token(WHOSE) * 1000 == affinity.LEAST_US_PER_TOKEN
    assert fixed.ms_per_token(WHOSE) * 1000 == 600


def test_the_worth_follows_an_upstream_that_reads_slower_than_before() -> None:
    known = Affinity(None, float)
    for _ in range(20):
        answered(known, WHOSE, us_per_token=50)
    for _ in range(20):
        answered(known, WHOSE, us_per_token=400)
    assert known.ms_per_token(WHOSE) * 1000 == pytest.approx(400, rel=0.1)


def test_answers_whose_first_byte_says_nothing_of_reading_change_no_worth() -> None:
    (at,) = targets(a=1)
    known = Affinity(None, float)
    home = Home(b"talk", at, whose=WHOSE)
    for cached in (0, 8_000):
        known.note(home, at, Usage(input_tokens=9_000, cached_tokens=cached))  # not streamed
        known.note(home, at, Usage(cached_tokens=cached), first_ms=10.0 * (cached + 1))
    assert known.ms_per_token(WHOSE) == pytest.approx(affinity.GUESSED_US_PER_TOKEN / 1000)


def test_measured_worths_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MOST_WAITS", 2)
    known = Affinity(None, float)
    for name in "abc":
        answered(known, (name, "m"), us_per_token=600)
    worths = [known.ms_per_token((name, "m")) * 1000 for name in "abc"]
    assert worths == pytest.approx([affinity.GUESSED_US_PER_TOKEN, 600, 600], rel=0.1)


def stay(known: Affinity, two: list[Target], answered: Target) -> Home:
    """A conversation of 5,000 cached tokens, worth a second, that one of two targets answered."""
    known.note(placed(known.home(b"talk", two, WHOSE)), answered, Usage(cached_tokens=5_000))
    return placed(known.home(b"talk", two, WHOSE))


def wait(known: Affinity, target: Target, wait_ms: float, times: int = 3) -> None:
    """Calls of another conversation of the tenant that waited there."""
    for _ in range(times):
        known.waited(Home(b"other", target, whose=WHOSE), target, wait_ms)


def test_what_a_call_would_wait_elsewhere_too_uses_up_nothing_of_a_stay() -> None:
    two, known = targets(a=1, b=1), affinity_at(float)
    wait(known, two[1], 700)
    for _ in range(9):
        found = stay(known, two, two[0])
        assert found.wait_ms == pytest.approx(1_000 + 4 * 700, abs=1)
        known.waited(found, two[0], 700)
        known.note(found, two[0], Usage(cached_tokens=5_000))
    known.waited(found, two[0], 1_100)
    assert found.excess_ms == pytest.approx(400, abs=1)
    known.waited(found, two[0], 0)
    assert found.excess_ms == 0, "a shorter wait than elsewhere makes up for it"


@pytest.mark.parametrize(("usual_ms", "wait_ms"), [(1_000, 4 * 700), (1_100, 0)])
def test_a_stay_that_is_used_up_goes_on_unless_its_queue_is_longer_by_more_than_chance(
    usual_ms: float, wait_ms: float
) -> None:
    two, known = targets(a=1, b=1), affinity_at(float)
    wait(known, two[0], usual_ms)
    wait(known, two[1], 700)
    found = stay(known, two, two[0])
    found.excess_ms = 5_000
    known.note(found, two[0], Usage(cached_tokens=5_000))
    assert placed(known.home(b"talk", two, WHOSE)).wait_ms == pytest.approx(wait_ms, abs=1)
    assert placed(known.home(b"talk", two, OTHERS)).wait_ms == 0, "waits of another tenant"


def test_what_was_measured_before_a_move_or_long_ago_says_nothing_of_now() -> None:
    now = [0.0]
    three, known = targets(a=1, b=1, c=1), affinity_at(lambda: now[0])
    known.note(placed(known.home(b"talk", three, WHOSE)), three[0], Usage(cached_tokens=5_000))
    for target in three:
        wait(known, target, 600)
    now[0] = 1.0
    known.moved(b"talk", "c", 5_000)
    assert [known.usual_ms(WHOSE, one) for one in three] == [None, 600, None]
    now[0] = 2.0
    wait(known, three[2], 700, times=2)
    assert known.usual_ms(WHOSE, three[2]) is None, "of too few calls"
    wait(known, three[2], 700, times=1)
    assert known.usual_ms(WHOSE, three[2]) == pytest.approx(700)
    now[0] = CACHE_MS + 1
    assert [known.usual_ms(WHOSE, one) for one in three[1:]] == [None, pytest.approx(700)]


def test_the_memory_of_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MOST_WAITS", 2)
    (one,), known = targets(a=1), affinity_at(float)
    for tenant in "tuv":
        for _ in range(3):
            known.waited(Home(b"x", one, whose=(tenant, "m")), one, 100)
    assert [known.usual_ms((tenant, "m"), one) for tenant in "tuv"] == [None, 100, 100]


def test_all_processes_have_a_conversation_move_in_one_order() -> None:
    four = targets(a=1, b=1, c=1, d=1)
    orders = set()
    for at, process in enumerate((affinity_at(float), affinity_at(float))):
        shown = four[at:] + four[:at]
        found = placed(process.home(b"talk", shown))
        order = [shown[place] for place in found.places(shown)]
        assert order[0] == found.target
        orders.add(tuple(one.upstream.name for one in order))
    assert len(orders) == 1
    assert sorted(*orders) == ["a", "b", "c", "d"]
    known = affinity_at(float)
    assert len({tuple(placed(known.home(key, four)).places(four)) for key in KEYS}) == 24


def talking(count: int) -> list[Affinity]:
    """Processes that notify one another of moves, themselves too, as PostgreSQL does it."""
    processes = [affinity_at(float) for _ in range(count)]

    def tell(key: bytes, upstream: str, tokens: int) -> None:
        for process in processes:
            process.moved(key, upstream, tokens)

    for process in processes:
        process.on_move = tell
    return processes


def test_a_move_is_known_to_other_processes() -> None:
    two, usage = targets(a=1, b=1), Usage(cached_tokens=5_000)
    one, other = talking(2)
    first = placed(one.home(b"talk", two))
    elsewhere = next(target for target in two if target != first.target)
    one.note(first, elsewhere, usage)
    for process in (one, other):
        found = placed(process.home(b"talk", two))
        assert (found.target, found.is_known, found.wait_ms) == (elsewhere, True, 1_000)


def test_processes_agree_on_a_move_during_a_call_of_another() -> None:
    two, usage = targets(a=1, b=1), Usage(cached_tokens=5_000)
    one, other = talking(2)
    first = placed(one.home(b"talk", two))
    elsewhere = next(target for target in two if target != first.target)
    begun = placed(other.home(b"talk", two))
    one.note(first, elsewhere, usage)
    other.note(begun, begun.target, usage)
    assert [placed(each.home(b"talk", two)).target for each in (one, other)] == [first.target] * 2


def test_a_move_of_a_conversation_without_a_cache_is_notified_to_nobody() -> None:
    two = targets(a=1, b=1)
    one, other = talking(2)
    first = placed(one.home(b"talk", two))
    one.note(first, next(target for target in two if target != first.target), Usage())
    assert not placed(other.home(b"talk", two)).is_known


def test_the_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MOST_CONVERSATIONS", 3)
    two = targets(a=1, b=1)
    known = affinity_at(float)
    for key in KEYS[:4]:
        known.note(placed(known.home(key, two)), two[0], Usage())
    assert [placed(known.home(key, two)).is_known for key in KEYS[:4]] == [False, True, True, True]


SYSTEM = {"role": "system", "content": "You are a tide table"}
OPENAI = {"messages": [SYSTEM, {"role": "user", "content": "When is high water?"}]}
LATER = {"messages": [*OPENAI["messages"], {"role": "assistant", "content": "At six."}]}


def key_of(
    body: dict[str, Any],
    *,
    model: str = "m",
    tenant: str = "t",
    conversation: str | None = None,
) -> bytes | None:
    return conversation_key(model, tenant, lineage_in(body, Lineage(conversation)).conversation)


def test_turns_of_one_conversation_have_one_key() -> None:
    assert key_of(OPENAI) == key_of(LATER)
    others = [
        key_of({"messages": [SYSTEM, {"role": "user", "content": "And low water?"}]}),
        key_of({**OPENAI, "tools": [{"type": "function"}]}),
        key_of(OPENAI, model="n"),
        key_of(OPENAI, tenant="u"),
        key_of(OPENAI, model="mt", tenant=""),
    ]
    assert len({key_of(OPENAI), *others}) == 6
    assert key_of({"prompt": "no messages"}) is None


def test_a_name_counts_before_what_is_said() -> None:
    body = {**OPENAI, "prompt_cache_key": "cache"}
    named = [key_of(body, conversation="mine"), key_of(body), key_of(OPENAI)]
    assert len(set(named)) == 3
    assert key_of({**LATER, "prompt_cache_key": "cache"}, conversation="mine") == named[0]
    assert key_of({"messages": [], "prompt_cache_key": "cache"}) == named[1]


@pytest.mark.parametrize("value", ["", 7, None, ["x"], {"a": 1}])
def test_what_names_nothing_is_passed_over(value: object) -> None:
    assert key_of({**OPENAI, "prompt_cache_key": value}, conversation="") == key_of(OPENAI)


def test_a_conversation_goes_by_its_name_else_by_that_before_else_by_its_opening() -> None:
    before = ResourceOwner("t", "a", b"", UUID(int=7), "first")
    told = Lineage(None, trace_id="ab", parent_span="cd")
    opening = lineage_in(OPENAI, told)
    assert opening.conversation == f"opening-{opening.opening}"
    assert (opening.trace_id, opening.parent_span, opening.parent_id) == ("ab", "cd", None)
    continued = lineage_in({"input": "And low water?"}, told, before)
    assert (continued.conversation, continued.parent_id) == ("first", UUID(int=7))
    assert continued.opening not in (None, opening.opening)
    at_provider = lineage_in({"input": "x", "conversation": {"id": "conv_1"}}, told, before)
    assert at_provider.conversation == "conv_1"
    assert lineage_in(OPENAI, Lineage("mine"), before).conversation == "mine"
    assert lineage_in({}, told) == told
