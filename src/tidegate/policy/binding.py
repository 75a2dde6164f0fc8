"""Which limit holds a queued job up, also before a worker has it, and how fast it admits. Pure.

The pool knows of jobs only once a worker has claimed them. Those behind wait for what these wait
for: for the limit at which tickets of the same tenant, type and model stand, or those of others;
where none stands, for one of their limits that is paused or full.
"""

from __future__ import annotations

from collections.abc import Iterator

from tidegate.call import CLASSIFIER_LIMIT
from tidegate.limiter import LimitView, QueueView, Snapshot
from tidegate.limiter.limits import Concurrency, Limit, Rate
from tidegate.policy.scopes import MEASURES, TOTAL, plain_model, whom_it_binds
from tidegate.store.running import Whereabouts


def binding_limit(found: Whereabouts, snapshot: Snapshot) -> LimitView | None:
    """The limit that a queued job waits for; None where it seems to wait for none."""
    queues = [one for one in alike(found, snapshot) if one.held_up_by]
    own = [one for one in queues if one.tenant == found.tenant_id]
    if not own and found.claimed_by is None:
        own = [one for one in queues if _binds(one.held_up_by or "", found, any_model=True)]
    if own:
        # Several processes may have some waiting: the one that has this job speaks first.
        queue = max(own, key=lambda one: (one.process == found.claimed_by, one.waiting))
        return snapshot.limits.get(queue.held_up_by or "")
    views = [one for one in snapshot.limits.values() if _binds(one.limit, found)]
    held = [one for one in views if one.paused_ms or one.waiting or is_full(one)]
    if found.claimed_by is not None:  # it is not in the queue of another limit than its type's
        held = [one for one in held if one.limit == _kind_limit(found)]
    return max(held, key=lambda one: (one.paused_ms, one.room_in_ms, one.waiting), default=None)


def is_full(view: LimitView) -> bool:
    return view.used >= (view.current if view.sort == "c" else view.bound)


def adapted_from(view: LimitView) -> int | None:
    """The bound of an adaptive limit that has found a lower one; None of others."""
    return view.bound if view.sort == "c" and view.current < view.bound else None


def admitted_per_s(view: LimitView, limit: Limit | None) -> float | None:
    """How many calls a second a full limit admits: by how long its last calls took, or by its
    window. None while nobody knows, and of limits that count something else than calls."""
    if view.paused_ms:
        return None
    if isinstance(limit, Concurrency) and view.cost_ms:
        return view.current * 1000 / view.cost_ms
    if isinstance(limit, Rate) and limit.unit == "requests":
        return limit.bound * 1000 / limit.window_ms
    return None


def _kind_limit(found: Whereabouts) -> str:
    # While its kind is not known it is the classifier's answer that it waits for.
    return CLASSIFIER_LIMIT if found.kind is None else f"kind:{found.kind}"


def alike(found: Whereabouts, snapshot: Snapshot) -> Iterator[QueueView]:
    """What waits of the same type, and of no other model as far as that is known."""
    kind_limit = _kind_limit(found)
    for queue in snapshot.queues:
        models = {model for one in queue.limits if (model := _model_of(one)) is not None}
        other = found.model is not None and models and plain_model(found.model) not in models
        if kind_limit in queue.limits and not other:
            yield queue


def _binds(limit_id: str, found: Whereabouts, *, any_model: bool = False) -> bool:
    """Whether a job falls under a limit. `any_model`: of a job whose model is not known yet, also
    where it is one on a model."""
    model = _model_of(limit_id)
    if model is not None:
        return any_model if found.model is None else model == plain_model(found.model)
    if limit_id == f"upstream:{found.pool}":
        return True
    kind = _kind_limit(found).partition(":")[2]
    return whom_it_binds(limit_id) in (f"kind/{kind}", f"tenant/{found.tenant_id}", TOTAL)


def _model_of(limit_id: str) -> str | None:
    """The model that a limit is on; None of others."""
    scope, _, name = limit_id.partition(":")
    is_other = name == TOTAL or name.startswith(("kind/", "tenant/"))
    if scope == "model" or (scope in MEASURES and not is_other):
        return plain_model(name)
    return None
