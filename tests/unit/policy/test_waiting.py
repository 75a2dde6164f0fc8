"""What a request's owner is told of its waiting."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tidegate.call import Status, new_id
from tidegate.limiter import LimitView, QueueView, Snapshot, WaitEstimate
from tidegate.policy.inspection import waiting
from tidegate.store.requests import Whereabouts

NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUEUED = Whereabouts(
    request_id=new_id(),
    tenant_id="acme",
    pool="gemini",
    status=Status.QUEUED,
    kind="text_only",
    model=None,
    claimed_by="worker-1",
    attempts=0,
    created_at=NOW,
    not_before=None,
    admitted_at=None,
    finished_at=None,
    failure_code=None,
)
KIND = LimitView("kind:text_only", "c", 5, 5, 3, 0, 5, 0, 0, "", 0)
RATE = LimitView("rpm:tenant/acme", "r", 60, 60, 9, 0, 60, 0, 0, "", 12_000)
IDLE = replace(KIND, used=2, waiting=0)
PAUSED = replace(KIND, used=0, paused_ms=47_000, paused_by="ann")
RATED = QueueView("s", "worker-1", 1, "acme", (KIND.limit, RATE.limit), RATE.limit, 9, 7)
OTHERS = replace(RATED, tenant="other", held_up_by="tenant:other")


def pool(*limits: LimitView, queues: tuple[QueueView, ...] = (), quiet_ms: int = 0) -> Snapshot:
    views = {one.limit: one for one in limits}
    return Snapshot(views, 1, 1, 1, quiet_ms, "up", queues=queues)


@pytest.mark.parametrize(
    ("found", "snapshot", "sentence", "limit"),
    [
        (QUEUED, pool(KIND), "waits for kind:text_only: 5 of 5 are in use", "kind:text_only"),
        (QUEUED, pool(PAUSED), "waits for kind:text_only, which is paused for 47 s more", None),
        (
            QUEUED,
            pool(IDLE, RATE, queues=(OTHERS, RATED)),
            "waits for rpm:tenant/acme: 60 of 60 are spent, room in 12 s",
            "rpm:tenant/acme",
        ),
        (QUEUED, pool(IDLE, queues=(OTHERS,)), "is being prepared", None),
        (replace(QUEUED, claimed_by=None), pool(IDLE), "waits for a worker to take it", None),
        (replace(QUEUED, kind=None), pool(KIND), "is being prepared", None),
        (
            replace(QUEUED, kind=None),
            pool(KIND, replace(KIND, limit="kind:classifier", bound=2, current=2, used=2)),
            "waits for kind:classifier: 2 of 2 are in use",
            "kind:classifier",
        ),
        (QUEUED, pool(KIND, quiet_ms=2_000), "waits 2 s more, because Valkey lost its data", None),
        (QUEUED, None, "waits until Valkey is back", None),
        (
            replace(QUEUED, not_before=NOW + timedelta(seconds=5), failure_code="upstream"),
            pool(KIND),
            "is retried in 5 s, after upstream",
            None,
        ),
        (
            replace(QUEUED, not_before=NOW + timedelta(seconds=5)),
            pool(KIND, replace(PAUSED, limit="upstream:gemini")),
            "waits for upstream:gemini, which is paused for 47 s more; is retried in 5 s",
            "upstream:gemini",
        ),
        (  # no worker takes it: its upstream is out until a call there is answered
            replace(QUEUED, claimed_by=None),
            pool(KIND, replace(PAUSED, limit="upstream:gemini", paused_ms=1)),
            "waits for upstream:gemini, which is paused until a call there is answered",
            "upstream:gemini",
        ),
        (
            replace(
                QUEUED,
                not_before=NOW + timedelta(seconds=5),
                failure_code="budget_exceeded",
                failure_message="the budget day has no room for this call: $0.79 of $0.80 spent",
            ),
            pool(KIND),
            "waits for a budget: the budget day has no room for this call: $0.79 of $0.80 spent; "
            "it is retried in 5 s",
            None,
        ),
        (replace(QUEUED, status=Status.RUNNING), None, "is running", None),
        (replace(QUEUED, status=Status.FAILED), None, "has ended: failed", None),
    ],
)
def test_an_owner_is_told_the_limit_and_nobody_elses_business(
    found: Whereabouts, snapshot: Snapshot | None, sentence: str, limit: str | None
) -> None:
    told = waiting(found, snapshot, NOW)
    assert told.sentence == sentence
    assert limit is None or told.limit == limit
    assert "ann" not in told.sentence
    assert "worker-1" not in told.sentence


def test_an_owner_learns_that_a_wait_behind_hung_calls_has_no_estimate() -> None:
    told = waiting(QUEUED, pool(KIND), NOW, WaitEstimate(None, 1, stalled_ms=39_000))
    assert told.sentence == (
        "waits for kind:text_only: 5 of 5 are in use; 1 call is ahead, no estimate: "
        "no call under this limit has ended for at least 39 s"
    )
    assert (told.ahead, told.wait_ms) == (1, None)
