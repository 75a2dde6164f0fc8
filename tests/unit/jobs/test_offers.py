"""Offers of tiers: what our limits admit a second, and what a refusal by a tier means for a job."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from math import inf
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from tidegate.admission.charges import LiveRoom, TierChoice, admitted_per_second
from tidegate.call import Classification, ClassifiedBy, Kind, Tier, Usage
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    TidegateError,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTierBusy,
    UpstreamTimeout,
)
from tidegate.jobs.tiers import TierOffers
from tidegate.limiter import Concurrency, Limit, Quota, Rate
from tidegate.policy.deployment import Upstream
from tidegate.record import CallRecord
from tidegate.settings import Config
from tidegate.spine.routing import Target
from tidegate.store.records import ClaimedJob

KEY = ("openai", "gpt-5")


def a_job(tier: Tier | None, **more: Any) -> ClaimedJob:
    return ClaimedJob(
        request_id=uuid4(),
        claim=1,
        attempts=0,
        created_at=datetime.now(UTC),
        prompt="x",
        classification=Classification(Kind.TEXT_ONLY, ClassifiedBy.CALLER, ""),
        attachments=(),
        image_uri=None,
        model="gpt-5",
        priority=0,
        deadline_at=None,
        tenant_id="default",
        pool="gemini",
        tier=tier,
        **more,
    )


def a_record() -> CallRecord:
    record = CallRecord("job", "default", datetime.now(UTC), uuid4())
    record.upstream, record.model = KEY
    record.upstream_ms = 40.0
    record.answer.usage = Usage(100, 50)
    return record


class NoJobs:
    async def of(self, _lane: str, _due: datetime | None) -> int:
        return 0

    async def lines(self, _due: datetime | None) -> int:
        return 40_000


async def no_batches(_upstream: str, _model: str) -> None:
    return None


@pytest.fixture
def offers() -> TierOffers:
    return TierOffers(
        Config(),
        NoJobs(),  # type: ignore[arg-type]
        lambda _: [],
        lambda target: pytest.fail(f"{target} is not to be looked at"),
        taken_in=lambda _: Dialect.OPENAI,
        usual_batches=no_batches,
        clock=lambda: 0.0,
    )


@pytest.mark.parametrize(("ahead", "leaves"), [(500, True), (700, False)])
async def test_no_batch_is_left_for_the_usual_tier_that_would_be_late(
    offers: TierOffers, monkeypatch: pytest.MonkeyPatch, ahead: int, leaves: bool
) -> None:
    async def room(*_: Any) -> LiveRoom:
        return LiveRoom(ahead=ahead, per_second=1.0, call_ms=10_000)

    monkeypatch.setattr(offers, "_room", room)
    due = datetime.now(UTC) + timedelta(seconds=600)
    target = Target(Upstream("openai", {"openai": "http://127.0.0.1:1"}, "k"), "gpt-5")
    left = await offers.leaves_at(Kind.TEXT_ONLY, target, due)
    assert (left is not None) == leaves


SIZES = {"requests": 1.0, "input_tokens": 200.0}


@pytest.mark.parametrize(
    ("limit", "per_second"),
    [
        (None, inf),
        (Concurrency(10), 5.0),
        (Concurrency(0), 0.0),
        (Concurrency(10, shadow=True), inf),
        (Rate(120, 60_000), 2.0),
        (Rate(60_000, 60_000, "input_tokens"), 5.0),
        (Rate(60_000, 60_000, "output_tokens"), inf),
        (Rate(0, 60_000, "output_tokens"), 0.0),
        (Quota(0, unit="images"), 0.0),
        (Quota(86_400), 1.0),
    ],
)
def test_what_a_limit_admits_a_second(limit: Limit | None, per_second: float) -> None:
    assert admitted_per_second(limit, 2_000, SIZES.get) == per_second


@pytest.mark.parametrize(
    ("tier", "error", "wait_ms"),
    [
        (Tier.FLEX, None, None),
        (Tier.FLEX, UpstreamThrottled("slow down"), None),
        (Tier.FLEX, UpstreamRejected("no flex for this model", status=400), 0),
        (Tier.FLEX, UpstreamTimeout("too long", phase="first_byte"), 0),
        (Tier.LIVE, UpstreamRejected("no such thing", status=400), None),
        (None, UpstreamTimeout("too long", phase="first_byte"), None),
        (Tier.FLEX, UpstreamTierBusy("given up by itself"), 0),
    ],
)
def test_only_what_the_tier_refused_uses_up_no_attempt(
    offers: TierOffers, tier: Tier | None, error: TidegateError | None, wait_ms: int | None
) -> None:
    job = a_job(tier)
    assert offers.ended(job, a_record(), error) == wait_ms
    was_refused = wait_ms == 0 and not isinstance(error, UpstreamTierBusy)
    assert offers.flex.is_refused(job.request_id) == was_refused


def test_flex_without_capacity_puts_its_jobs_off(offers: TierOffers) -> None:
    busy = UpstreamTierBusy("Resource Unavailable", status=429)
    waited_ms = offers.ended(a_job(Tier.FLEX), a_record(), busy)
    assert waited_ms is not None
    assert 1_000 <= waited_ms <= 1_500
    assert offers.put_off_ms(KEY) >= 1_000
    assert offers.put_off_ms(KEY, ("gemini", "m")) == 0
    offers.ended(a_job(Tier.FLEX), a_record(), None)
    assert offers.put_off_ms(KEY) == 0


async def test_a_job_that_allows_no_other_tier_is_not_chosen_for(offers: TierOffers) -> None:
    assert await offers.choice(a_job(None), Kind.TEXT_ONLY) is None


async def test_a_job_that_can_go_nowhere_is_offered_nothing(offers: TierOffers) -> None:
    choice = await offers.choice(a_job(None, tiers_allowed=(Tier.FLEX,)), Kind.TEXT_ONLY)
    assert choice == TierChoice(
        Tier.LIVE, None, "no cheaper tier is allowed and offered for its model"
    )


@pytest.mark.parametrize(("is_line", "most_ms"), [(True, 201_500), (False, 101_500)])
async def test_many_wait_for_flex_long_but_not_past_their_review(
    offers: TierOffers, monkeypatch: pytest.MonkeyPatch, is_line: bool, most_ms: int
) -> None:
    """40,000 lines, or 20,000 jobs: 200 of them a second."""

    async def jobs(_self: NoJobs, kind: str, due: datetime | None) -> int:
        return 20_000 if kind == Kind.TEXT_ONLY and due is not None else 0

    monkeypatch.setattr(NoJobs, "of", jobs)
    wait_ms = partial(offers.wait_ms, is_line=is_line)
    one = a_job(Tier.FLEX)
    assert await wait_ms(one, Kind.TEXT_ONLY, KEY) == 0
    offers.ended(one, a_record(), UpstreamTierBusy("Resource Unavailable", status=429))
    waits = [await wait_ms(one, Kind.TEXT_ONLY, KEY) for _ in range(100)]
    assert min(waits) >= 1_000
    assert most_ms / 3 < max(waits) <= most_ms
    soon = a_job(Tier.FLEX, revisit_at=datetime.now(UTC) + timedelta(seconds=3))
    assert max([await wait_ms(soon, Kind.TEXT_ONLY, KEY) for _ in range(100)]) <= 3_000
    past = a_job(Tier.FLEX, revisit_at=datetime.now(UTC) - timedelta(seconds=3))
    assert await wait_ms(past, Kind.TEXT_ONLY, KEY) == 1


async def test_all_lines_that_expire_until_then_count_for_the_usual_tier(
    offers: TierOffers, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = SimpleNamespace(
        limiter=SimpleNamespace(policy=SimpleNamespace(binding=lambda limit: limit)),
        demands=SimpleNamespace(
            prices=SimpleNamespace(share=lambda *_: 0.5),
            limits=lambda *_, **__: [Rate(60_000, 60_000)],
        ),
    )
    monkeypatch.setattr(offers, "_account_of", lambda _: account)
    upstream = Upstream("openai", {"openai": "http://127.0.0.1:1"}, "k")
    monkeypatch.setattr(offers, "_targets_of", lambda _: [Target(upstream, "gpt-5")])
    due = datetime.now(UTC) + timedelta(seconds=960)
    line = replace(a_job(None, tiers_allowed=(Tier.FLEX,)), deadline_at=due)
    as_job = await offers.choice(line, Kind.TEXT_ONLY)
    as_line = await offers.choice(line, Kind.TEXT_ONLY, is_line=True)
    assert as_job is not None
    assert as_line is not None
    assert (as_job.tier, as_line.tier) == (Tier.FLEX, Tier.LIVE), "40 s of lines before it"
