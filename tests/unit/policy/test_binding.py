"""Which limit a queued job waits for, though no worker has it yet, and how fast that one admits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.limiter.test_estimated_waits import CALLS
from tests.unit.policy.test_waiting import IDLE, KIND, QUEUED, RATED, pool
from tidegate.limiter import Concurrency, Limit, LimitView, QueueView, Quota, Rate, WaitingLine
from tidegate.policy.inspection import adapted_from, admitted_per_s, binding_limit, estimate_of
from tidegate.store.requests import JobsAhead, Whereabouts

FLASH = LimitView("model:flash", "c", 12, 6, 164, 0, 6, 0, 0, "", 0, cost_ms=2_000)
PRO = replace(FLASH, limit="model:pro")
DAILY = LimitView("rpd:flash", "q", 200, 200, 0, 0, 200, 0, 0, "", 24_640_000)
UNCLAIMED = replace(QUEUED, claimed_by=None)
OF_FLASH = replace(UNCLAIMED, model="flash")


def queue(tenant: str, *limits: str, at: str, waiting: int = 5) -> QueueView:
    return replace(RATED, tenant=tenant, limits=limits, held_up_by=at, waiting=waiting)


OWN = queue("acme", KIND.limit, FLASH.limit, at=FLASH.limit)
OTHERS = replace(OWN, tenant="other")
OWN_PRO = queue("acme", KIND.limit, PRO.limit, at=PRO.limit, waiting=50)
OWN_OF_A_GROUP = queue("acme", "model:fl*,pro", at="model:fl*,pro")  # of a pool without types
OF_A_GROUP = replace(FLASH, limit="model:fl*,pro")
BY_ITS_TENANT = queue("other", KIND.limit, "tenant:other", at="tenant:other")
OF_KEY = LimitView("rpm:key/k1", "r", 2, 2, 164, 0, 2, 0, 0, "", 30_000)
OF_USER = replace(OF_KEY, limit="user:acme/ann", sort="c")
BY_ITS_KEY = queue("acme", KIND.limit, OF_KEY.limit, at=OF_KEY.limit)
BY_ITS_USER = queue("acme", KIND.limit, OF_USER.limit, at=OF_USER.limit)
OF_K1 = replace(UNCLAIMED, key_id="k1")
OF_ANN = replace(UNCLAIMED, key_id="k2", subject="ann")


@pytest.mark.parametrize(
    ("found", "queues", "limit"),
    [
        (OF_K1, (BY_ITS_KEY,), OF_KEY.limit),
        (OF_ANN, (BY_ITS_USER, BY_ITS_KEY), OF_USER.limit),
        (OF_ANN, (BY_ITS_KEY,), OF_USER.limit),  # none of its queues: what is full
        (replace(OF_K1, key_id="k2"), (BY_ITS_KEY, BY_ITS_USER), None),
        (replace(OF_ANN, tenant_id="other"), (BY_ITS_USER,), None),
        (replace(OF_K1, claimed_by="worker-1"), (BY_ITS_KEY,), OF_KEY.limit),
    ],
)
def test_a_job_waits_for_no_limit_of_another_key_or_user(
    found: Whereabouts, queues: tuple[QueueView, ...], limit: str | None
) -> None:
    view = binding_limit(found, pool(IDLE, OF_KEY, OF_USER, queues=queues))
    assert (None if view is None else view.limit) == limit


@pytest.mark.parametrize(
    ("found", "queues", "limit"),
    [
        (UNCLAIMED, (OWN,), "model:flash"),
        (UNCLAIMED, (OTHERS,), "model:flash"),  # its model is not known: as most of its type
        (OF_FLASH, (OWN_PRO, OTHERS), "model:flash"),
        (OF_FLASH, (OWN_PRO,), "rpd:flash"),  # nobody stands anywhere: what is used up
        (replace(OF_FLASH, model="models/pro"), (OWN, OWN_PRO), "model:pro"),
        (UNCLAIMED, (BY_ITS_TENANT,), None),
        (replace(UNCLAIMED, model="lite"), (OWN, OTHERS), None),
        (QUEUED, (OTHERS,), None),  # a worker has it: it stands in no queue yet
        (OF_FLASH, (OWN_OF_A_GROUP,), OF_A_GROUP.limit),
        (replace(OF_FLASH, claimed_by="worker-1"), (OWN_OF_A_GROUP,), OF_A_GROUP.limit),
        (replace(UNCLAIMED, model="lite"), (OWN_OF_A_GROUP,), None),
    ],
)
def test_a_job_that_no_worker_has_waits_for_what_those_before_it_wait_for(
    found: Whereabouts, queues: tuple[QueueView, ...], limit: str | None
) -> None:
    view = binding_limit(found, pool(IDLE, FLASH, PRO, DAILY, OF_A_GROUP, queues=queues))
    assert (None if view is None else view.limit) == limit


def test_a_job_waits_for_no_limit_in_shadow_that_is_over_its_bound() -> None:
    shadow = replace(DAILY, shadow=True)
    view = binding_limit(OF_FLASH, pool(shadow, replace(FLASH, used=7)))
    assert (view and view.limit) == FLASH.limit
    assert binding_limit(OF_FLASH, pool(IDLE, shadow)) is None
    paused = binding_limit(OF_FLASH, pool(FLASH, replace(shadow, paused_ms=5_000)))
    assert (paused and paused.limit) == DAILY.limit


def test_a_job_without_images_waits_for_no_limit_on_images() -> None:
    images = LimitView("ipm:flash", "r", 9, 9, 3, 0, 9, 0, 60_000, "ann", 60_000)
    of_images = replace(OF_FLASH, kind="image_generation")
    view = binding_limit(OF_FLASH, pool(images, replace(FLASH, used=7)))
    assert (view and view.limit) == FLASH.limit
    view = binding_limit(of_images, pool(images, FLASH))
    assert (view and view.limit) == images.limit


def test_what_is_paused_comes_before_what_is_full() -> None:
    paused = replace(IDLE, paused_ms=47_000)
    view = binding_limit(OF_FLASH, pool(paused, FLASH, DAILY))
    assert view is not None
    assert view.limit == KIND.limit


@pytest.mark.parametrize(
    ("found", "ahead"),
    [
        (replace(OF_FLASH, claimed_by="worker-1"), 39),
        (OF_FLASH, 300 + 120),
    ],
)
async def test_jobs_that_a_worker_has_for_other_limits_are_not_ahead(
    found: Whereabouts, ahead: int
) -> None:
    async def line(*_: object) -> WaitingLine:
        return CALLS

    looked = pool(IDLE, FLASH, queues=(OWN,))
    told = await estimate_of(line, found, looked, JobsAhead(300, 120))
    assert told is not None
    assert told.ahead == ahead


@pytest.mark.parametrize(
    ("view", "limit", "per_s"),
    [
        (FLASH, Concurrency(12), 3.0),
        (replace(FLASH, cost_ms=0), Concurrency(12), None),
        (replace(FLASH, paused_ms=1), Concurrency(12), None),
        (replace(DAILY, sort="r"), Rate(120, 60_000), 2.0),
        (replace(DAILY, sort="r"), Rate(120, 60_000, "tokens"), None),
        (DAILY, Quota(200), None),
        (FLASH, None, None),
    ],
)
def test_how_fast_a_limit_admits_is_said_only_where_it_is_known(
    view: LimitView, limit: Limit | None, per_s: float | None
) -> None:
    assert admitted_per_s(view, limit) == per_s


def test_only_an_adaptive_limit_below_its_bound_has_adapted() -> None:
    assert (adapted_from(FLASH), adapted_from(KIND), adapted_from(DAILY)) == (12, None, None)
