"""Verdict on a deployment: which state, which causes, in which order, and what acts on them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from tidegate.limiter import (
    Concurrency,
    LimitView,
    PoolPolicy,
    QueueView,
    SessionView,
    Snapshot,
    TenantView,
)
from tidegate.metrics.process import Note, UpstreamFound
from tidegate.metrics.verdict import (
    MOST_CAUSES,
    DeploymentReading,
    PoolReading,
    RecordReading,
    judge,
)
from tidegate.policy.learned import LearnedLimit
from tidegate.prices.budgets import Budget
from tidegate.store.budgets import BudgetBook
from tidegate.store.jobs import MOST_STUCK, StuckCounts

NOTHING = RecordReading(StuckCounts(0, None, 0, 0, 1))
POLICY = PoolPolicy({"kind:text_only": Concurrency(6), "model:m": Concurrency(12)})


def limit(name: str, **named: Any) -> LimitView:
    usual: dict[str, Any] = {"sort": "c", "bound": 6, "used": 6, "waiting": 0, "lapsing": 0}
    usual |= {"current": 6, "shadowed": 0, "paused_ms": 0, "paused_by": "", "room_in_ms": 0}
    return LimitView(name, **usual | named)


def pool(*limits: LimitView, learned: tuple[LearnedLimit, ...] = (), **named: Any) -> PoolReading:
    queues = tuple(
        QueueView("s", "api-1", 0, tenant, (one.limit,), one.limit, count, 1)
        for one in limits
        if one.waiting
        for tenant, count in (("acme", one.waiting - 1), ("globex", 1))
    )
    waiting = sum(one.waiting for one in limits)
    usual: dict[str, Any] = {"sessions": 1, "epoch": 1, "revision": 1, "recovering_ms": 0}
    snapshot = Snapshot(
        {one.limit: one for one in limits},
        **usual | named,
        state="up",
        processes=(SessionView("s", "api-1", 900, 3, False),),
        tenants=(TenantView("acme", waiting, 1),),
        queues=queues,
    )
    return PoolReading("gemini", POLICY, snapshot, learned)


def seen(
    *pools: PoolReading, record: RecordReading | None = NOTHING, **upstreams: UpstreamFound
) -> DeploymentReading:
    found = upstreams or {"gemini": UpstreamFound("ok")}
    return DeploymentReading(pools or (pool(),), [Note("api-1", upstreams=found)], found, record)


def stuck(**named: Any) -> RecordReading:
    return replace(NOTHING, stuck=replace(NOTHING.stuck, **named))


def kinds(found: DeploymentReading) -> list[tuple[str, str]]:
    return [(one.kind, one.level) for one in judge(found).causes]


def test_all_is_well() -> None:
    verdict = judge(seen())
    assert (verdict.health, verdict.causes, verdict.in_flight) == ("healthy", (), 3)
    assert verdict.sentence == "Healthy: nothing waits."


def test_a_deployment_without_calls_is_down_and_nothing_waits() -> None:
    verdict = judge(seen(pool(), gemini=UpstreamFound("out")))
    assert verdict.sentence == "Down: no call is served, nothing waits."


def test_waiting_is_normal_until_it_lasts() -> None:
    found = seen(pool(limit("kind:text_only", waiting=12, cost_ms=600)))
    verdict = judge(found)
    assert (verdict.health, verdict.sentence) == (
        "healthy",
        "Healthy: 12 requests wait for a turn.",
    )
    (cause,) = verdict.causes
    assert cause.words == "kind:text_only is the bottleneck: 12 waiting."
    assert cause.detail == (
        "Full: 6 of 6 used. The last waiting call waits about 1 s. Waiting: acme 11, globex 1."
    )
    slow = judge(seen(pool(limit("kind:text_only", waiting=12, cost_ms=60_000))))
    assert (slow.health, slow.sentence) == ("degraded", "Degraded: 1 problem, 12 requests wait.")


@pytest.mark.parametrize(
    ("others", "said"), [(0, ""), (1, " and 1 more tenant"), (2, " and 2 more tenants")]
)
def test_the_tenants_that_are_not_named_are_counted(others: int, said: str) -> None:
    reading = pool(limit("kind:text_only", waiting=12))
    assert reading.snapshot is not None
    (first, *_) = reading.snapshot.queues
    names = ["a", "b", "c", *map(str, range(others))]
    queues = tuple(replace(first, tenant=name, waiting=9 - at) for at, name in enumerate(names))
    (cause,) = judge(
        seen(replace(reading, snapshot=replace(reading.snapshot, queues=queues)))
    ).causes
    assert cause.detail.endswith(f"Waiting: a 9, b 8, c 7{said}.")


def test_a_long_wait_counts_where_more_calls_wait_for_another_limit() -> None:
    busy = limit("kind:text_only", waiting=50, cost_ms=600)
    spent = limit("rpd:m", sort="q", bound=100, used=100, waiting=40, room_in_ms=7_200_000)
    verdict = judge(seen(pool(busy, spent)))
    assert verdict.sentence == "Degraded: 1 problem, 90 requests wait."
    assert [(one.subject, one.level) for one in verdict.causes] == [
        ("rpd:m", "degraded"),
        ("kind:text_only", "healthy"),
    ]


def test_an_adaptive_limit_that_has_found_a_lower_bound_says_so() -> None:
    narrowed = limit("model:m", bound=12, current=3, used=3, waiting=2, cost_ms=100)
    (cause,) = judge(seen(pool(narrowed))).causes
    assert cause.detail.startswith("Full: 3 of 3 used. Adapted from 12 to 3 after 429s.")


def test_why_postgresql_is_unavailable_is_the_detail_of_its_cause() -> None:
    for problem, words in (
        ("PostgreSQL is unavailable: no answer in time", "PostgreSQL does not answer"),
        ("PostgreSQL accepts no writes: in_hot_standby is on", "PostgreSQL accepts no writes"),
    ):
        (cause,) = judge(replace(seen(record=None), problem=problem)).causes
        assert (cause.kind, cause.detail) == ("postgresql_away", problem)
        assert cause.words.partition(":")[0] == words


@pytest.mark.parametrize(
    ("found", "health", "first"),
    [
        (seen(PoolReading("gemini", POLICY, None, problem="gone")), "down", "valkey_away"),
        (seen(gemini=UpstreamFound("out", why="503")), "down", "upstreams_out"),
        (seen(gemini=UpstreamFound("trying")), "healthy", None),
        (seen(a=UpstreamFound("ok"), b=UpstreamFound("out", True)), "degraded", "key_refused"),
        (seen(a=UpstreamFound("ok"), b=UpstreamFound("out")), "degraded", "upstream_out"),
        (
            seen(
                a=UpstreamFound("ok"),
                b=UpstreamFound("out", why="for 9 s: an operator has drained it"),
            ),
            *("healthy", "upstream_out"),
        ),
        (seen(record=None), "degraded", "postgresql_away"),
        (seen(pool(recovering_ms=2_000)), "degraded", "recovering"),
        (seen(pool(limit("model:m", bound=0, waiting=1))), "degraded", "limit_closed"),
        (seen(record=stuck(jobs=2)), "degraded", "dead_jobs"),
        (seen(record=stuck(ready=2, workers=0)), "degraded", "no_workers"),
        (seen(record=stuck(workers=0)), "healthy", None),
        (seen(record=stuck(webhooks=1)), "degraded", "webhooks_given_up"),
        (seen(record=stuck(alerts=1)), "degraded", "alerts_given_up"),
    ],
)
def test_each_state_has_its_cause(found: DeploymentReading, health: str, first: str | None) -> None:
    verdict = judge(found)
    assert verdict.health == health
    assert next((one.kind for one in verdict.causes), None) == first
    assert verdict.sentence.startswith(health.capitalize())


def test_the_worst_comes_first_with_what_acts_on_it() -> None:
    drift = LearnedLimit("rpm:m", "m", 60, 100, "fell", "openai", 0.0, "")
    paused = limit("kind:text_only", paused_ms=90_000, paused_by="ann: quota.", waiting=9)
    short = limit("kind:b", paused_ms=2_000)  # it ends before a person could act
    found = seen(
        pool(paused, short, limit("model:m", waiting=20), learned=(drift,)),
        record=stuck(jobs=1),
        a=UpstreamFound("ok"),
        b=UpstreamFound("out", True, why="invalid API key"),
    )
    assert kinds(found) == [
        ("key_refused", "degraded"),
        ("limit_paused", "degraded"),
        ("dead_jobs", "degraded"),
        ("drift", "degraded"),
        ("bottleneck", "healthy"),
    ]
    verdict = judge(found)
    assert verdict.sentence == "Degraded: 4 problems, 29 requests wait."
    by_kind = {one.kind: one for one in verdict.causes if one.level == "degraded"}
    assert by_kind["key_refused"].detail == "Invalid API key."
    resume = by_kind["limit_paused"]
    assert resume.words == "kind:text_only is paused for 1 min 30 s more."
    assert resume.detail == "By ann: quota. Waiting: acme 8, globex 1."
    assert resume.command == "tidegate limits resume kind:text_only --pool gemini"
    assert by_kind["drift"].command == "tidegate limits accept rpm:m --pool gemini"


def test_a_command_is_one_command_whatever_is_in_a_name() -> None:
    drift = LearnedLimit("rpm:$(reboot)", "$(reboot)", 60, 100, "fell", "openai", 0.0, "")
    paused = limit("rpm:gpt-5*", paused_ms=90_000)
    closed = limit("tenant:a;b", bound=0, waiting=2)
    assert [one.command for one in judge(seen(pool(paused, closed, learned=(drift,)))).causes] == [
        "tidegate limits resume 'rpm:gpt-5*' --pool gemini",
        "tidegate limits set 'tenant:a;b=N' --pool gemini",
        "tidegate limits accept 'rpm:$(reboot)' --pool gemini",
    ]


def test_the_calls_that_wait_for_an_upstream_are_told_with_it() -> None:
    gate = limit("upstream:b", bound=10**10, paused_ms=90_000, waiting=3)
    found = seen(pool(gate), a=UpstreamFound("ok"), b=UpstreamFound("out", why="503"))
    (cause,) = judge(found).causes
    assert (cause.subject, cause.waiting) == ("b", 3)
    assert cause.detail == "503. Waiting: acme 2, globex 1."


def test_an_upstream_that_is_paused_and_not_out_is_a_paused_limit() -> None:
    throttled = limit(
        "upstream:b", bound=10**10, paused_ms=3_600_000, paused_by="b: 429", waiting=3
    )
    verdict = judge(seen(pool(throttled), a=UpstreamFound("ok"), b=UpstreamFound("ok")))
    assert verdict.sentence == "Degraded: 1 problem, 3 requests wait."
    (cause,) = verdict.causes
    assert (cause.kind, cause.subject, cause.waiting) == ("limit_paused", "upstream:b", 3)
    assert cause.command == "tidegate limits resume upstream:b --pool gemini"
    tried = judge(seen(pool(throttled), a=UpstreamFound("ok"), b=UpstreamFound("trying")))
    assert tried.causes == (), "it is on its way back"


@pytest.mark.parametrize(
    ("waiting", "ready", "retrying", "sentence"),
    [
        (0, 3, 88, "Healthy: 91 jobs are queued."),
        (0, 0, 1, "Healthy: 1 job is queued for a retry."),
        (2, 1, 0, "Healthy: 2 requests wait for a turn, 1 more job is queued."),
        (0, MOST_STUCK, 5, "Healthy: 1,005 or more jobs are queued."),
    ],
)
def test_queued_jobs_wait_too(waiting: int, ready: int, retrying: int, sentence: str) -> None:
    at_limit = limit("kind:text_only", waiting=waiting, cost_ms=600)
    verdict = judge(seen(pool(at_limit), record=stuck(ready=ready, retrying=retrying)))
    assert (verdict.sentence, verdict.queued) == (sentence, ready + retrying)


@pytest.mark.parametrize(("retrying", "health"), [(0, "healthy"), (9, "degraded")])
def test_an_upstream_that_stays_out_stays_a_cause_while_it_is_probed(
    retrying: int, health: str
) -> None:
    probed = UpstreamFound("trying", faults=3, why="could not connect")
    verdict = judge(seen(record=stuck(retrying=retrying), a=UpstreamFound("ok"), b=probed))
    (cause,) = verdict.causes
    assert (verdict.health, cause.kind, cause.subject) == (health, "upstream_out", "b")
    assert cause.words == "Upstream b is being probed: its last call failed."
    assert cause.detail == "Could not connect."


def test_budgets_that_hold_calls_up_are_causes() -> None:
    end = datetime(2026, 1, 1, tzinfo=UTC)
    budgets = [
        Budget("team", "usd", 10, "month"),
        Budget("people", "tokens", 10, "day", each=("subject",), at_end="pause"),
        Budget("soft", "usd", 10, "day", at_end="fall_back", fallback="small"),
    ]
    books = [
        BudgetBook("team", "", "usd", 10, 10, 0, 0, end, None),
        BudgetBook("people", '["ann"]', "tokens", 10, 3, 0, 0, end, end),
        BudgetBook("soft", "", "usd", 10, 12, 0, 0, end, None),
        BudgetBook("team", "", "usd", 10, 9, 0, 0, end, None),
        BudgetBook("removed", "", "usd", 10, 90, 0, 0, end, None),
    ]
    verdict = judge(seen(record=replace(NOTHING, budgets=budgets, books=books)))
    assert [one.words for one in verdict.causes] == [
        "Budget people (ann) is paused: its calls are rejected.",
        "Budget team is used up: its calls are rejected.",
        "Budget soft is used up: its calls use small.",
    ]
    assert [one.command.removeprefix("tidegate budgets resume ") for one in verdict.causes] == [
        *("people --of ann", "team", "soft")
    ]


@pytest.mark.parametrize(
    ("other", "health", "kinds"),
    [
        (UpstreamFound("ok"), "degraded", ["upstream_out"]),
        (UpstreamFound("trying"), "degraded", ["upstream_out"]),
        (UpstreamFound("out"), "down", ["upstreams_out", "upstream_out"]),
    ],
)
def test_what_one_process_alone_finds_out_is_not_down(
    other: UpstreamFound, health: str, kinds: list[str]
) -> None:
    notes = [
        Note("api-1", upstreams={"gemini": UpstreamFound("out", why="503")}),
        Note("api-2", upstreams={"gemini": other}),
    ]
    verdict = judge(DeploymentReading((pool(),), notes, {"gemini"}, NOTHING))
    assert (verdict.health, [one.kind for one in verdict.causes]) == (health, kinds)


def test_the_command_reaches_every_dead_job() -> None:
    since = datetime(2026, 1, 1, 10, 30, 59, tzinfo=UTC)
    (cause,) = judge(seen(record=stuck(jobs=1, dead_since=since))).causes
    assert cause.command == "tidegate requeue --status dead --since 2026-01-01T10:30"


def test_causes_are_bounded() -> None:
    paused = [limit(f"kind:{number:03}", paused_ms=90_000) for number in range(100)]
    verdict = judge(seen(pool(*paused)))
    assert (len(verdict.causes), verdict.more) == (MOST_CAUSES, 100 - MOST_CAUSES)
    assert verdict.sentence == "Degraded: 100 problems, nothing waits."
