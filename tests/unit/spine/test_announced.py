"""What is kept of the rate limits that upstreams announce."""

from __future__ import annotations

import pytest

from tidegate.dialects.headers import RateStatus, rate_statuses
from tidegate.errors import StatedBound
from tidegate.policy.learned import RefusedLimit
from tidegate.spine import learning as announced
from tidegate.spine.learning import MOST_MODELS, Announced, Announcement

OPENAI = [
    (b"Content-Type", b"application/json"),
    (b"X-RateLimit-Limit-Requests", b"500"),
    (b"x-ratelimit-remaining-requests", b"499"),
    (b"x-ratelimit-reset-requests", b"120ms"),
    (b"x-ratelimit-limit-tokens", b"30000"),
    (b"x-ratelimit-remaining-tokens", b"29000"),
    (b"x-ratelimit-limit-project-tokens", b"20000"),
    (b"x-ratelimit-remaining-project-tokens", b"1000"),
]
ANTHROPIC = [
    (b"anthropic-ratelimit-input-tokens-limit", b"80000"),
    (b"anthropic-ratelimit-input-tokens-remaining", b"0"),
    (b"anthropic-ratelimit-input-tokens-reset", b"1970-01-01T00:16:45Z"),
]


def test_the_latest_answer_of_each_model_counts() -> None:
    now = 1_000.0
    heard = Announced(lambda: now)
    heard.note("a", OPENAI)
    heard.note("b", [(b"content-type", b"text/plain")])
    tightest = RateStatus("tokens", None, 20_000, 1_000)
    first = (RateStatus("requests", None, 500, 499, 120), tightest)
    assert heard.all() == [Announcement("a", 1_000.0, first, 1_000.0)]
    now = 1_001.0
    heard.note("a", ANTHROPIC)
    (said,) = heard.all()
    tokens = RateStatus("input_tokens", None, 80_000, 0, 4_000)
    assert said == Announcement("a", now, (tokens,), now)
    limit = {"unit": "input_tokens", "limit": 80_000, "remaining": 0, "reset_ms": 4_000}
    assert said.shown() == {
        "model": "a",
        "at": "1970-01-01T00:16:41.000+00:00",
        "limits": [limit],
    }


def test_a_refusal_stands_against_answers_that_were_made_before_it() -> None:
    now = 1_000.0
    heard = Announced(lambda: now)
    heard.note("a", ANTHROPIC, 429)
    now += 0.9
    heard.note("a", OPENAI)
    assert "a" in heard
    assert [one.unit for one in heard.all()[0].limits] == ["input_tokens"]
    heard.note("a", [(b"x-ratelimit-limit-requests", b"7")], 429)  # but another refusal
    assert [one.limit for one in heard.all()[0].limits] == [7]
    now += 1.0
    heard.note("a", OPENAI)
    assert [one.unit for one in heard.all()[0].limits] == ["requests", "tokens"]
    heard.note("a", ANTHROPIC, 429)
    now -= 500.0
    heard.note("a", OPENAI, took_s=40.0)
    assert len(heard.all()[0].limits) == 2, "the clock was set back"


def test_headers_are_as_of_the_beginning_of_their_call() -> None:
    """Whichever answer comes last: that of the call that was counted last counts."""
    now = 1_000.0
    heard = Announced(lambda: now)
    heard.note("a", OPENAI, took_s=3.0)
    heard.note("a", [(b"x-ratelimit-limit-requests", b"7")], took_s=20.0)
    (said,) = heard.all()
    assert (said.at, said.heard_at, said.limits[0].reset_ms) == (997.0, 1_000.0, 120)
    now -= 500.0
    heard.note("a", [(b"x-ratelimit-limit-requests", b"8")])
    assert heard.all()[0].limits[0].limit == 8, "the clock was set back"
    now += 500.0
    # A moment, as Anthropic's is, is from then on; also by a clock that is an hour ahead.
    hours = ((b"00", b""), (b"01", b"Thu, 01 Jan 1970 01:16:40 GMT"))
    for number, (hour, date) in enumerate(hours):
        reset = b"anthropic-ratelimit-input-tokens-reset", b"1970-01-01T%s:16:45Z" % hour
        heard.note(f"b{number}", [*ANTHROPIC[:2], reset, (b"date", date)], took_s=2.0)
        said = heard.all()[-1]
        assert (said.at, said.limits[0].reset_ms) == (998.0, 7_000)


def test_headers_that_name_what_the_call_has_cost_are_as_of_its_end() -> None:
    heard = Announced(lambda: 1_000.0)
    mistral = [
        (b"x-ratelimit-limit-tokens-minute", b"100000"),
        (b"x-ratelimit-remaining-tokens-minute", b"98321"),
        (b"x-ratelimit-tokens-query-cost", b"32"),
    ]
    heard.note("a", mistral, took_s=8.0)
    assert heard.all()[0].at == 1_000.0


def test_an_answer_is_parsed_when_someone_asks_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = 0

    def counting(*given: object) -> list[RateStatus]:
        nonlocal parsed
        parsed += 1
        return rate_statuses(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(announced, "rate_statuses", counting)
    heard = Announced(lambda: 1_000.0)
    for _ in range(1_000):
        heard.note("m", list(OPENAI))
    assert parsed == 0
    assert heard.all() == heard.all()
    assert parsed == 1


def test_whatever_an_upstream_sends_is_bounded() -> None:
    heard = Announced(lambda: 1_000.0)
    for number in range(3 * MOST_MODELS):
        many = [(b"x-ratelimit-limit-tokens-%d" % one, b"9") for one in range(1_000)]
        odd = [(b"x-ratelimit-limit-requests", b"\xff"), (b"ratelimit", b"9" * 50)]
        heard.note(f"m{number}", [*OPENAI, *odd, *many])
    found = heard.all()
    assert len(found) == MOST_MODELS
    assert {one.model for one in found} == {
        f"m{number}" for number in range(2 * MOST_MODELS, 3 * MOST_MODELS)
    }
    assert all(len(one.limits) < 10 for one in found)


def test_models_that_were_only_refused_give_way_to_those_that_answered() -> None:
    """A client may name any model, and an upstream may refuse it by a 429."""
    heard = Announced(lambda: 1_000.0)
    heard.note("real", OPENAI)
    for number in range(3 * MOST_MODELS):
        heard.note(f"invented-{number}", OPENAI, 429)
    models = [one.model for one in heard.all()]
    assert "real" in models
    assert len(models) == MOST_MODELS
    assert "real" in heard
    assert "invented-149" not in heard
    for number in range(MOST_MODELS):
        heard.note(f"other-{number}", OPENAI)
        heard.note("invented", OPENAI, 429)
    assert {one.model for one in heard.all()} == {f"other-{n}" for n in range(MOST_MODELS)}
    assert "real" not in heard


def test_a_refusal_without_limits_leaves_what_was_announced() -> None:
    """Of a provider whose refusals have no such headers nothing is forgotten in a pause."""
    heard = Announced(lambda: 1_000.0)
    heard.note("a", OPENAI)
    heard.note("a", [(b"retry-after", b"20")], 429)
    assert [one.model for one in heard.all()] == ["a"]


def test_the_bounds_that_refusals_state_are_known_each_with_its_time() -> None:
    now = 1_000.0
    heard = Announced(lambda: now)
    heard.refuse("rpm:a", "a", [StatedBound("requests", "minute", 20)])
    heard.refuse("rpm:a", "a", [StatedBound("requests", "minute", 10)])
    now += 1
    heard.refuse("", "a", [StatedBound("requests", "day", 250)])
    heard.refuse("itpm:a", "a")
    assert heard.stated() == [
        Announcement("a", 1_000.0, (RateStatus("requests", "minute", 10),), 1_000.0),
        Announcement("a", 1_001.0, (RateStatus("requests", "day", 250),), 1_001.0),
    ]
    assert [one.limit for one in heard.refusals()] == ["rpm:a", "itpm:a"]
    assert not heard.all()
    for number in range(2 * MOST_MODELS):
        heard.refuse("", f"m{number}", [StatedBound("requests", "minute", 10)])
    assert len(heard.stated()) == MOST_MODELS


def test_of_several_bounds_that_a_refusal_states_the_lowest_counts() -> None:
    """Such as of a free tier and of a paid one, or of two places: the call was over each."""
    heard = Announced(lambda: 1_000.0)
    bounds = [10, 1_000]
    for stated in (bounds, bounds[::-1]):
        heard.refuse("", "a", [StatedBound("requests", "minute", bound) for bound in stated])
        (said,) = heard.stated()
        assert said.limits == (RateStatus("requests", "minute", 10),)


def test_the_last_refusal_of_each_limit_is_known() -> None:
    now = 1_000.0
    heard = Announced(lambda: now)
    heard.refuse("tpm:a")
    for number in range(MOST_MODELS):
        now += 1
        heard.refuse(f"rpm:{number}")
    heard.refuse("rpm:0")
    found = heard.refusals()
    assert len(found) == MOST_MODELS
    assert RefusedLimit("tpm:a", 1_000.0) not in found
    assert found[-1] == RefusedLimit("rpm:0", now)
