"""What a provider's cache has of a conversation is expected as it has come true."""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.admission.demand import (
    CACHE_MS,
    MOST_CALLS,
    MOST_OF_A_TENANT,
    ConversationKey,
    Conversations,
    ExpectedInput,
    LastCall,
)

KEY = ConversationKey(1, 2)


@dataclass
class FakeClock:
    ms: float = 0.0

    def __call__(self) -> float:
        return self.ms


def turns(
    conversations: Conversations,
    clock: FakeClock,
    *,
    key: ConversationKey = KEY,
    count: int = 10,
    cached: bool = True,
    tenant: str = "t",
) -> list[tuple[ExpectedInput, int]]:
    """Turns of a conversation at a provider that caches all that it has seen: what was expected of
    each, and its uncached input."""
    found, before = [], 0
    for number in range(count):
        input_tokens = 10_000 + 500 * number
        guessed = input_tokens * 9 // 10
        expected = conversations.expect(tenant, "m", key, guessed, 2 * input_tokens)
        read = before if cached else 0
        call = LastCall(clock(), guessed, input_tokens, input_tokens if cached else 0)
        conversations.learn(tenant, "m", key, expected, call, read)
        found.append((expected, input_tokens - read))
        before = input_tokens
    return found


def test_nothing_is_expected_before_it_has_come_true() -> None:
    clock = FakeClock()
    first = turns(Conversations(clock), clock)
    assert [expected.uncached for expected, _ in first[:5]] == [
        2 * (10_000 + 500 * number) for number in range(5)
    ]


def test_then_little_more_is_expected_than_a_turn_adds_and_never_less() -> None:
    clock = FakeClock()
    later = turns(Conversations(clock), clock, count=30)[5:]
    assert all(uncached <= expected.uncached < 2 * uncached for expected, uncached in later)


def test_a_provider_that_caches_nothing_has_all_of_it_expected() -> None:
    clock = FakeClock()
    found = turns(Conversations(clock), clock, count=30, cached=False)
    assert all(expected.uncached >= uncached for expected, uncached in found)


def test_hits_that_fail_now_and_then_lower_what_is_expected() -> None:
    clock = FakeClock()
    conversations = Conversations(clock)
    turns(conversations, clock, count=30)
    for number in range(5):
        turns(conversations, clock, key=ConversationKey(9, 90 + number), count=2, cached=False)
        conversations.learn("t", "m", KEY, ExpectedInput(0, 100), LastCall(0, 1, 1, 0), 0)
    expected = conversations.expect("t", "m", KEY, 1, 50_000)
    assert expected.uncached == 50_000


def test_a_cache_is_forgotten_when_its_provider_forgets_it() -> None:
    clock = FakeClock()
    conversations = Conversations(clock)
    turns(conversations, clock)
    assert conversations.expect("t", "m", KEY, 14_000, 30_000).uncached < 5_000
    clock.ms += CACHE_MS + 1
    assert conversations.expect("t", "m", KEY, 14_000, 30_000).uncached == 30_000


def test_another_conversation_has_the_opening_in_the_cache() -> None:
    clock = FakeClock()
    conversations = Conversations(clock)
    turns(conversations, clock, count=2)
    for number in range(6):
        other = ConversationKey(KEY.opening, 100 + number)
        expected = conversations.expect("t", "m", other, 9_000, 20_000)
        call = LastCall(clock(), 9_000, 10_000, 10_000)
        conversations.learn("t", "m", other, expected, call, 6_000)
    assert conversations.expect("t", "m", ConversationKey(1, 999), 9_000, 20_000) == (
        ExpectedInput(14_000, 6_000)
    )


def first_calls(
    conversations: Conversations, clock: FakeClock, count: int, uncached: float
) -> None:
    """First calls of conversations of other lengths, that share nothing with one another."""
    for number in range(count):
        tokens = 1_000 + 300 * (number % 10)
        key = ConversationKey(7, 1_000 + number)
        expected = conversations.expect("t", "m", key, tokens, 2 * tokens)
        read = round(tokens * (1 - uncached))
        conversations.learn("t", "m", key, expected, LastCall(clock(), tokens, tokens, read), read)


def test_first_calls_have_the_share_cached_that_nearly_all_had() -> None:
    clock = FakeClock()
    conversations = Conversations(clock)
    another = ConversationKey(7, 1)
    first_calls(conversations, clock, 19, 0.1)
    assert conversations.expect("t", "m", another, 8_000, 16_000).uncached > 14_000
    first_calls(conversations, clock, 60, 0.1)
    assert 800 <= conversations.expect("t", "m", another, 8_000, 16_000).uncached <= 802
    assert conversations.expect("u", "m", another, 8_000, 16_000).uncached == 16_000
    clock.ms += CACHE_MS + 1
    assert conversations.expect("t", "m", another, 8_000, 16_000).uncached == 16_000


def test_one_first_call_in_ten_without_a_hit_leaves_no_share_to_rely_on() -> None:
    clock = FakeClock()
    conversations = Conversations(clock)
    for _ in range(7):
        first_calls(conversations, clock, 9, 0.1)
        first_calls(conversations, clock, 1, 1.0)
    assert conversations.expect("t", "m", ConversationKey(7, 1), 8_000, 16_000).uncached >= 8_000


def test_a_tenant_learns_nothing_from_another() -> None:
    clock = FakeClock()
    conversations = Conversations(clock)
    turns(conversations, clock, tenant="a", count=20)
    assert conversations.expect("b", "m", KEY, 14_000, 30_000).uncached == 30_000


def test_the_memory_is_bounded() -> None:
    clock = FakeClock()
    conversations = Conversations(clock)
    for number in range(2 * MOST_OF_A_TENANT):
        turns(conversations, clock, key=ConversationKey(number, -number), count=1, tenant="busy")
    assert len(conversations._calls["busy"]) == MOST_OF_A_TENANT
    for number in range(MOST_CALLS + 10):
        turns(conversations, clock, tenant=f"t{number}", count=1)
    assert sum(map(len, conversations._calls.values())) <= MOST_CALLS
