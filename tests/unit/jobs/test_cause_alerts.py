"""Which causes of the verdict raise an alert, and when."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tidegate.jobs.webhooks import CauseAlerts, alerted
from tidegate.limiter import PoolPolicy, Snapshot
from tidegate.metrics.process import Note, UpstreamFound
from tidegate.metrics.verdict import Cause, CauseKind, DeploymentReading, PoolReading, RecordReading
from tidegate.policy.learned import Drift, LearnedLimit
from tidegate.prices.budgets import Budget
from tidegate.spine.routing import DRAINED
from tidegate.store.budgets import BudgetBook
from tidegate.store.jobs import StuckCounts


class Looks:
    """A watcher of causes, on a clock that is set."""

    def __init__(self) -> None:
        self.now = 1_000.0
        unused: Any = None
        self._alerts = CauseAlerts(unused, unused, clock=lambda: self.now)

    def after(self, seconds: float, *causes: Cause) -> list[tuple[str, str | None]]:
        self.now += seconds
        return [(one.kind, one.subject) for one in self._alerts.lasting(causes)]


def cause(kind: CauseKind, subject: str = "a", level: Any = "degraded") -> Cause:
    return Cause(kind, level, "words", subject=subject)


def test_what_heals_by_itself_raises_none() -> None:
    looks = Looks()
    assert looks.after(0, cause("upstream_out")) == []
    assert looks.after(5, cause("upstream_out")) == []
    assert looks.after(60) == []
    assert looks.after(5, cause("upstream_out")) == []


def test_an_upstream_that_is_tried_now_and_then_is_out_all_the_time() -> None:
    looks = Looks()
    assert looks.after(0, cause("upstream_out")) == []
    assert looks.after(20) == []
    assert looks.after(15, cause("upstream_out")) == [("upstream_out", "a")]


def test_each_subject_and_pool_counts_by_itself() -> None:
    looks = Looks()
    looks.after(0, cause("limit_paused", "x"))
    found = looks.after(30, cause("limit_paused", "x"), cause("limit_paused", "y"))
    assert found == [("limit_paused", "x")]


def test_what_waits_what_a_person_has_done_and_what_budgets_raise_themselves_raise_none() -> None:
    drifts: tuple[Drift, ...] = ("new", "same", "rose", "fell")
    learned = [
        LearnedLimit(f"rpm:{drift}", "m", 60, 60, drift, "openai", 0.0, "") for drift in drifts
    ]
    snapshot = Snapshot(
        {},
        sessions=1,
        epoch=1,
        revision=1,
        recovering_ms=0,
        state="up",
        processes=(),
        tenants=(),
        queues=(),
    )
    pool = PoolReading("default", PoolPolicy({}), snapshot, learned)
    upstreams = {
        "drained": UpstreamFound("out", why=f"ann: {DRAINED}"),
        "out": UpstreamFound("out", why="it failed"),
        "dead": UpstreamFound("out", True, why="invalid API key"),
    }
    paused = BudgetBook("b", "", "usd", 5, 5, 0, 0, None, datetime.now(UTC))
    budget = Budget("b", "usd", 5, "day", at_end="pause")
    record = RecordReading(StuckCounts(0, None, 0, 0, 1), [budget], [paused])
    seen = DeploymentReading([pool], [Note("api-1", upstreams=upstreams)], upstreams, record)
    assert [(one.kind, one.subject) for one in alerted(seen)] == [
        ("upstreams_out", None),
        ("key_refused", "dead"),
        ("upstream_out", "out"),
        ("drift", "rpm:fell"),
        ("drift", "rpm:rose"),
    ]
