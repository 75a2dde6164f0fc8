"""What a process says of itself: it costs what is in use here, however many limits there are."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tidegate.limiter.limiter import Limiter
from tidegate.limiter.messages import Hint
from tidegate.limiter.policy import Limit, PoolPolicy, Rate
from tidegate.limiter.queue import CHAIN

TENANTS = 10_000


class Watched(dict[str, int | Limit]):
    """Limits that nobody may walk through."""

    def __iter__(self) -> object:  # type: ignore[override]
        raise AssertionError("somebody walked through all limits")

    items = values = keys = __iter__  # type: ignore[assignment]


@pytest.fixture
async def limiter() -> Limiter:
    limits: dict[str, int | Limit] = {}
    for number in range(TENANTS):
        limits[f"tenant:{number}"] = 2
        limits[f"rpm:{number}"] = Rate(60, 60_000)
    limiter = Limiter("redis://nowhere.invalid", pool="p", policy=PoolPolicy(limits))
    object.__setattr__(limiter.policy, "limits", Watched(limiter.policy.limits))
    return limiter


def ask(limiter: Limiter, number: int) -> int:
    flow = limiter._queue.flow(1, str(number), (f"rpm:{number}", f"tenant:{number}"))
    flow.refresh(limiter.policy)
    waiter = limiter._queue.ask(
        flow, amounts="1,1", hard_ms=1000, now_ms=float(number), deadline_ms=float("inf")
    )
    return waiter.ticket


@pytest.mark.parametrize(
    "question",
    [
        lambda limiter: limiter.state,
        lambda limiter: limiter.permits_held,
        lambda limiter: limiter.waiters,
        Limiter.local_state,
        lambda limiter: limiter.local_permits(10),
        lambda limiter: limiter.local_queues(10),
    ],
)
async def test_no_question_about_this_process_walks_through_all_limits(
    limiter: Limiter, question: Callable[[Limiter], object]
) -> None:
    ask(limiter, 7)
    question(limiter)


async def test_the_state_names_the_limits_that_are_in_use_here(limiter: Limiter) -> None:
    first, second, third = (ask(limiter, number) for number in (7, 8, 8))
    limiter._queue.grant(first, 1, CHAIN, 0.0)
    state = limiter.local_state()
    assert state.held == {"rpm:7": 1, "tenant:7": 1}
    assert state.waiting == {"rpm:8": 2, "tenant:8": 2}
    assert state.waiting["tenant:9"] == 0
    assert (limiter.permits_held, limiter.waiters) == (state.permits, state.waiters) == (1, 2)
    assert [(q.tenant, q.waiting) for q in limiter.local_queues(1)] == [("8", 2)]
    limiter._queue.release(first, outcome="success", actual="", now_ms=1.0)
    for ticket in (second, third):
        limiter._queue.abandon(ticket, 1.0)
    state = limiter.local_state()
    assert (state.held, state.waiting) == ({}, {})


async def test_an_answer_without_hints_looks_at_no_flow_that_has_none(limiter: Limiter) -> None:
    queue = limiter._queue
    held, waiting = ask(limiter, 7), ask(limiter, 7)
    queue.grant(held, 1, CHAIN, 0.0)
    flow = queue.waiting[waiting].flow
    flow.plain = True
    assert queue.flows_to_hint(16) == [flow]
    queue.take_hints({flow.key: Hint(1, 5, 0, 1, 100)}, 0.0)
    hints = [flow.hint]
    queue._lanes = Watched(queue._lanes)  # type: ignore[assignment,arg-type]
    queue.forget_hints()
    assert hints != [flow.hint] == [None]
