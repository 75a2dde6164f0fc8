"""Processing tiers in a rehearsal: which a job is put into, when it ends there, and its cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tidegate.call import Tier
from tidegate.errors import ConfigError
from tidegate.limiter import PoolPolicy, Rate
from tidegate.policy.deployment import Preempt
from tidegate.prices.budgets import Budget
from tidegate.rehearse.budgets import TierTerms
from tidegate.rehearse.load import Arrival, TokenPace, Usual, load_of, read_trace, write_trace
from tidegate.rehearse.report import (
    Findings,
    TierUse,
    difference_of,
    sentence_of,
    tables_of,
)
from tidegate.rehearse.simulation import Setting, compare, rehearse

KIND = "kind:text_only"
HOUR_MS, DAY_MS = 3_600_000, 86_400_000
JOB = Arrival(0.0, "acme", model="m", duration_ms=2_000, cost_usd=0.25, deadline_ms=DAY_MS)
HALF = TierTerms(share=lambda _model, _tier: 0.5, flex_times=3.0, batch_ms=float(HOUR_MS))
USUAL = Usual({"text_only": "m"}, TokenPace())


def played(*arrivals: Arrival, terms: TierTerms = HALF, limit: int = 1, **setting: Any) -> Findings:
    policy = PoolPolicy({KIND: limit})
    in_order = sorted(arrivals, key=lambda one: one.time_ms)
    return rehearse("", in_order, policy, Setting(tiers=terms, **setting))


def uses(found: Findings) -> dict[str, TierUse]:
    return {one.tier: one for one in found.tiers}


def made(found: Findings) -> dict[str, int]:
    return {one.tier: one.jobs for one in found.tiers if one.jobs}


def test_a_call_that_names_no_tier_has_none() -> None:
    found = played(JOB)
    assert found.tiers == []
    assert found.cost_micros == 250_000


def test_a_batch_takes_no_permit_ends_after_its_time_and_costs_half() -> None:
    jobs = [replace(JOB, tiers="batch") for _ in range(5)]
    found = played(*jobs)
    batch = uses(found)["batch"]
    assert (batch.jobs, batch.late, batch.cost_micros) == (5, 0, 5 * 125_000)
    assert batch.took.p50_ms == batch.took.longest_ms == pytest.approx(HOUR_MS, abs=1)
    assert (found.limits[0].peak, found.queued, found.cost_micros) == (0, 0, 5 * 125_000)
    assert found.end_ms == pytest.approx(HOUR_MS, abs=1)
    assert found.waits.p50_ms is None  # for a permit


def test_flex_holds_a_permit_for_its_longer_time() -> None:
    found = played(*(replace(JOB, tiers="flex") for _ in range(2)))
    flex = uses(found)["flex"]
    assert (flex.jobs, flex.late, flex.cost_micros) == (2, 0, 250_000)
    assert flex.took.p50_ms == pytest.approx(6_000, abs=5)
    assert flex.took.longest_ms == pytest.approx(12_000, abs=10)
    assert (found.limits[0].peak, found.queued) == (1, 1)


@pytest.mark.parametrize("tiers", ["flex", "batch", "flex,batch"])
def test_a_job_that_is_due_in_a_minute_is_live(tiers: str) -> None:
    found = played(replace(JOB, tiers=tiers, deadline_ms=60_000))
    live = uses(found)["live"]
    assert (live.jobs, live.late, live.cost_micros) == (1, 0, 250_000)
    assert live.took.p50_ms == pytest.approx(2_000, abs=5)


def test_a_batch_is_chosen_as_long_as_half_as_much_again_is_left() -> None:
    """An hour counts for 90 min, live for 17.5 s before the deadline, a cancelled batch for ten
    minutes before that."""
    least_ms = 90 * 60_000 + 17_500 + 600_000
    assert made(played(replace(JOB, tiers="batch", deadline_ms=least_ms))) == {"batch": 1}
    assert made(played(replace(JOB, tiers="batch", deadline_ms=least_ms - 1))) == {"live": 1}


def test_a_tier_without_a_price_is_not_offered() -> None:
    def share(_model: str, tier: Tier) -> float | None:
        return 0.4 if tier is Tier.BATCH else None

    job = replace(JOB, tiers="flex,batch")
    assert made(played(job, terms=replace(HALF, share=share))) == {"batch": 1}
    assert made(played(job, terms=TierTerms())) == {"live": 1}
    assert uses(played(job, terms=replace(HALF, share=share)))["batch"].cost_micros == 100_000


@pytest.mark.parametrize(("limit", "in_flex"), [(1, 7), (2, 13)])
def test_full_limits_send_jobs_to_the_batch_at_the_same_price(limit: int, in_flex: int) -> None:
    """A call counts for 10 s while none was seen: a job waits for flex where at most a minute of
    others is before it."""
    jobs = [replace(JOB, tiers="flex,batch", deadline_ms=None) for _ in range(20)]
    assert made(played(*jobs, limit=limit)) == {"flex": in_flex, "batch": 20 - in_flex}


def test_flex_without_capacity_is_asked_again_until_only_live_is_in_time() -> None:
    """Flex counts for 15 min while it was not seen, live for 17.5 s: of 20 min the first 282.5 s
    are for flex, which is out for a minute and a half at most."""
    terms = replace(HALF, flex_refused=1.0)
    found = played(replace(JOB, tiers="flex", deadline_ms=1_200_000), terms=terms)
    live, flex = uses(found)["live"], uses(found)["flex"]
    assert (live.jobs, live.late, live.cost_micros) == (1, 0, 250_000)
    assert 7 <= flex.busy <= 13  # 1, 2, 4, 8, 16, 32, then 60 s each, and up to half more
    assert live.took.p50_ms is not None
    assert 200_000 < live.took.p50_ms < 282_500 + 90_000
    assert flex.jobs == 0


def test_flex_that_takes_too_long_is_given_up_for_live() -> None:
    job = replace(JOB, tiers="flex", duration_ms=10_000, deadline_ms=950_000)
    found = played(job, terms=replace(HALF, flex_times=100.0))
    live, flex = uses(found)["live"], uses(found)["flex"]
    assert (live.jobs, live.late, live.cost_micros, flex.given_up) == (1, 0, 250_000, 1)
    # Given up 17.5 s before it is due, and made in ten once it is in its queue again.
    assert live.took.p50_ms == pytest.approx(942_600, abs=10)
    assert found.gave_way == 0


def test_a_job_that_waits_for_flex_leaves_its_queue_in_time() -> None:
    before = replace(JOB, tenant="live", duration_ms=940_000, deadline_ms=None)
    job = replace(JOB, time_ms=1.0, tiers="flex", duration_ms=1_000, deadline_ms=950_000)
    found = played(before, job)
    live = uses(found)["live"]
    assert (live.jobs, uses(found)["flex"].given_up) == (1, 1)
    assert live.took.p50_ms == pytest.approx(941_000, abs=10)


def test_a_job_that_ends_after_its_deadline_is_late() -> None:
    jobs = [replace(JOB, tiers="flex", deadline_ms=3_000) for _ in range(2)]
    live = uses(played(*jobs))["live"]
    assert (live.jobs, live.late) == (2, 1)
    refused = played(*jobs, replace(jobs[0], time_ms=1.0, deadline_ms=500))
    assert (uses(refused)["live"].jobs, refused.refused) == (2, {"deadline": 1})


def test_a_budget_reserves_what_the_tier_costs() -> None:
    budget = Budget("acme", "usd", 1_000_000, "day", tenant="acme")
    jobs = [replace(JOB, time_ms=60_000.0 * n, tiers="batch") for n in range(9)]
    policy = PoolPolicy({KIND: 1})
    found = rehearse("", jobs, policy, Setting(tiers=HALF), budgets=[budget])
    assert (found.budgets[0].spent, found.budgets[0].refused) == (1_000_000, 1)
    assert made(found) == {"batch": 8}


def test_rates_count_jobs_in_flex_and_none_in_a_batch() -> None:
    policy = PoolPolicy({KIND: 9, "rpm:total": Rate(10, 60_000)})
    jobs = [replace(JOB, tiers=tier) for tier in ("flex", "batch", "batch", "flex", "flex")]
    found = rehearse("", jobs, policy, Setting(tiers=HALF))
    assert next(one.peak for one in found.limits if one.limit == "rpm:total") == 3


def test_a_job_in_flex_that_gives_way_chooses_again() -> None:
    job = replace(JOB, tiers="flex", duration_ms=20_000, priority=-100, gives_way=True)
    live = Arrival(10_000.0, "live", duration_ms=2_000)
    found = played(job, live, preempt=Preempt(), terms=HALF)
    assert (found.gave_way, made(found)) == (1, {"flex": 1})
    assert found.end_ms == pytest.approx(10_000 + 1_000 + 2_000 + 60_000, abs=1_000)


def test_the_report_has_jobs_late_ones_and_costs_by_tier() -> None:
    jobs = [replace(JOB, tiers="flex,batch", deadline_ms=None) for _ in range(20)]
    policies = {"as it is": PoolPolicy({KIND: 1}), "more": PoolPolicy({KIND: 2})}
    found = compare(jobs, policies, Setting(tiers=HALF))
    rows = {row[0]: row[1:] for row in tables_of(found)[0].rows}
    assert (rows["jobs in flex"], rows["jobs in batch"]) == (("7", "13"), ("13", "7"))
    assert "jobs in live" not in rows
    assert (rows["cost of batch"], rows["late jobs"]) == (("$1.63", "$0.88"), ("0", "0"))
    assert "jobs: 7 in flex, 13 in batch" in sentence_of(found[0])
    said = difference_of(*found)
    assert "jobs would have been 13 in flex, 7 in batch instead of 7 in flex, 13 in batch" in said
    table = next(one for one in tables_of(found[:1]) if one.title == "Tiers")
    assert table.rows[0][:4] == ("flex", "7", "", "$0.88")


def test_the_same_load_gives_the_same_tiers() -> None:
    terms = replace(HALF, flex_refused=0.5)
    jobs = [replace(JOB, time_ms=500.0 * n, tiers="flex,batch") for n in range(60)]
    first, again = played(*jobs, terms=terms), played(*jobs, terms=terms)
    assert first.tiers == again.tiers
    assert uses(first)["flex"].busy > 0


def test_a_load_and_a_trace_name_tiers() -> None:
    stream = {"per_second": 1, "duration_ms": 10, "tiers": ["live", "flex", "batch"]}
    arrivals = load_of({"lasts": "10s", "arrivals": [stream]}).draw(USUAL, 1)
    assert {one.tiers for one in arrivals} == {"flex,batch"}
    again = read_trace("trace.csv", write_trace(arrivals), USUAL)
    assert {one.tiers for one in again} == {"flex,batch"}
    none = read_trace("t", '{"time_ms": 0, "duration_ms": 5, "tiers": "live"}', USUAL)
    assert [one.tiers for one in none] == [""]
    for wrong in ('"slow"', "[1]", "3"):
        with pytest.raises(ConfigError, match="tiers"):
            read_trace("t", f'{{"time_ms": 0, "duration_ms": 5, "tiers": {wrong}}}', USUAL)
