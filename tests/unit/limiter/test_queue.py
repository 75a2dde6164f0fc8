"""What a process decides alone: tickets, cancels, batches that may not have arrived, passing on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from math import inf

import pytest

from tidegate.errors import DemandImpossible
from tidegate.limiter import queue as queues
from tidegate.limiter.flow import MessageBatch, Waiter
from tidegate.limiter.messages import USAGE_LATER, Hint
from tidegate.limiter.policy import (
    Adaptive,
    CallUse,
    Concurrency,
    Demand,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
    Tokens,
)
from tidegate.limiter.queue import CHAIN, LocalQueue, LocalShare, PoolUse, SpentHere

LIMITS = ("kind:a",)
POLICY = PoolPolicy(
    {
        "kind:a": 3,
        "kind:b": Concurrency(3, adaptive=Adaptive(1)),
        "kind:none": 0,
        "rpm:x": Rate(3, 60_000),
        "tpm:x": Rate(1000, 60_000, "tokens"),
        "in:x": Rate(1000, 60_000, "input_tokens"),
        "rpd:x": Quota(10),
        "ipm:x": Rate(5, 60_000, "images"),
        "rpm:shadow": Rate(1, 60_000, shadow=True),
    }
)


@pytest.fixture
async def queue() -> LocalQueue:
    return LocalQueue()


def ask(queue: LocalQueue, *limits: str, tokens: int = 100) -> Waiter:
    flow = queue.flow(1, "t", limits or LIMITS)
    flow.refresh(POLICY)
    amounts = flow.amounts(Demand(flow.limits, tokens=Tokens(tokens)))
    return queue.ask(flow, amounts=amounts, hard_ms=1000, now_ms=0.0, deadline_ms=float("inf"))


def said(queue: LocalQueue) -> MessageBatch:
    """A batch that arrived."""
    batch = queue.take()
    queue.confirm(batch)
    return batch


def held(queue: LocalQueue, *limits: str, seq: int = CHAIN) -> Waiter:
    """A waiter that was let in, and about which nothing is left to say."""
    waiter = ask(queue, *limits)
    said(queue)
    queue.grant(waiter.ticket, 1, seq, 0.0)
    return waiter


def release(
    queue: LocalQueue,
    waiter: Waiter,
    actual: str = "",
    *,
    later: bool = False,
    now_ms: float = 20.0,
) -> None:
    queue.release(waiter.ticket, outcome="success", actual=actual, now_ms=now_ms, usage_later=later)


def stamp(waiters: Iterable[Waiter], stamps: Iterable[int]) -> None:
    """Where the server put these tickets."""
    for waiter, one in zip(waiters, stamps, strict=True):
        waiter.stamp = one


def hint(queue: LocalQueue, waiter: Waiter, horizon: int, requested_ms: float = 0.0) -> None:
    queue.flows_to_hint(16)
    queue.take_hints({waiter.flow.key: Hint(1, horizon, 0, 1, 100)}, requested_ms)


# -- waiting


async def test_a_waiter_that_was_never_sent_leaves_without_a_word(queue: LocalQueue) -> None:
    waiter = ask(queue)
    queue.abandon(waiter.ticket, 0.0)
    assert queue.pending == 0


async def test_a_waiter_that_may_be_known_is_cancelled_in_words(queue: LocalQueue) -> None:
    waiter = ask(queue)
    lost = queue.take()
    queue.abandon(waiter.ticket, 0.0)
    queue.restore(lost)
    batch = queue.take()
    assert batch.cancels == [(waiter.ticket, waiter.flow, waiter.member)]
    assert batch.enqueues == []


async def test_a_grant_that_crosses_a_cancel_is_not_answered_twice(queue: LocalQueue) -> None:
    waiter = ask(queue)
    queue.take()
    queue.abandon(waiter.ticket, 0.0)
    queue.grant(waiter.ticket, 1, 1, 0.0)
    assert [ticket for ticket, _, _ in queue.take().cancels] == [waiter.ticket]
    assert not queue.held


async def test_a_grant_for_nobody_is_given_back(queue: LocalQueue) -> None:
    queue.grant(99, 1, 1, 0.0)
    assert queue.take().cancels == [(99, None, "")]


async def test_a_task_that_is_cancelled_as_it_is_let_in_gives_the_permit_back(
    queue: LocalQueue,
) -> None:
    waiter = ask(queue)
    said(queue)
    waiter.future.cancel()
    queue.grant(waiter.ticket, 1, 1, 0.0)
    queue.abandon(waiter.ticket, 0.0)
    assert [release.ticket for release in queue.take().releases] == [waiter.ticket]


async def test_a_lost_push_is_found_by_comparing(queue: LocalQueue) -> None:
    waiter = ask(queue)
    said(queue)
    queue.reconcile([(waiter.ticket, 5, 1_000)], 1, 0.0, float, 1_000)
    assert waiter.future.result().seq == 5


async def test_what_is_being_given_back_is_not_taken_up_again_by_comparing(
    queue: LocalQueue,
) -> None:
    waiter = held(queue)
    release(queue, waiter)
    queue.reconcile([(waiter.ticket, CHAIN, 1_000)], 1, 0.0, float, 1_000)
    batch = queue.take()
    assert [release.ticket for release in batch.releases] == [waiter.ticket]
    assert batch.cancels == []


async def test_held_and_waiting_are_counted_under_every_limit(queue: LocalQueue) -> None:
    held(queue, "kind:a", "kind:b")
    ask(queue, "kind:b")
    assert queue.held_of == {"kind:a": 1, "kind:b": 1}
    assert queue.waiting_of == {"kind:b": 1}


# -- passing on


async def test_a_permit_is_passed_on_as_far_as_the_hint_allows(queue: LocalQueue) -> None:
    first, near, far = held(queue), ask(queue), ask(queue)
    stamp([near, far], [4, 9])
    said(queue)
    hint(queue, near, horizon=5)
    release(queue, first)
    assert near.future.done()
    assert not far.future.done()
    release(queue, near)
    assert not far.future.done()
    batch = queue.take()
    assert [(t.source, t.heir.ticket, t.heir.seq) for t in batch.transfers] == [
        (first.ticket, near.ticket, CHAIN + 1)
    ]
    assert [release.ticket for release in batch.releases] == [near.ticket]


async def test_without_a_hint_everything_goes_back(queue: LocalQueue) -> None:
    first, waiter = held(queue), ask(queue)
    release(queue, first)
    assert not waiter.future.done()
    assert queue.urgent


@pytest.mark.parametrize(("late_ms", "passed_on"), [(0.0, True), (0.1, False)])
async def test_a_hint_is_not_followed_once_others_may_have_come(
    queue: LocalQueue, late_ms: float, *, passed_on: bool
) -> None:
    first, waiter = held(queue), ask(queue)
    stamp([waiter], [1])
    hint(queue, waiter, horizon=5, requested_ms=1000.0)
    release(queue, first, now_ms=1000.0 + queues.HINT_MS + late_ms)
    assert waiter.future.done() is passed_on
    assert (queue.take().releases == []) is passed_on


async def test_a_limit_that_must_hear_of_every_call_is_never_passed_on(queue: LocalQueue) -> None:
    first, waiter = held(queue, "kind:b"), ask(queue, "kind:b")
    stamp([waiter], [1])
    hint(queue, waiter, horizon=5)
    release(queue, first)
    assert not waiter.future.done()


@pytest.mark.parametrize("away", [False, True])
async def test_a_fence_never_reaches_the_one_that_the_server_gives_next(
    queue: LocalQueue, *, away: bool
) -> None:
    waiters = [held(queue), *(ask(queue) for _ in range(CHAIN + 1))]
    if away:
        queue.start_recycling()
    else:
        stamp(waiters[1:], range(1, CHAIN + 2))
        hint(queue, waiters[1], horizon=10 * CHAIN)
    for waiter in waiters[:CHAIN]:
        release(queue, waiter)
    fences = [w.future.result().seq for w in waiters if w.future.done()]
    assert fences == list(range(CHAIN, 2 * CHAIN))


async def test_a_grant_of_one_who_was_let_in_here_already_is_told_at_once(
    queue: LocalQueue,
) -> None:
    first, heir, next_one = held(queue), ask(queue), ask(queue)
    said(queue)
    stamp([heir, next_one], (1, 2))
    hint(queue, heir, horizon=2)
    release(queue, first)
    queue.urgent = False
    queue.grant(heir.ticket, 1, 7 * CHAIN, 20.0)
    assert queue.urgent
    assert queue.held[heir.ticket].seq == CHAIN + 1
    assert [t.heir.ticket for t in said(queue).transfers] == [heir.ticket]


async def test_a_permit_freed_while_nobody_waits_goes_to_the_next_who_asks(
    queue: LocalQueue,
) -> None:
    first = held(queue)
    queue.idle = True
    release(queue, first)
    next_one = ask(queue)
    assert next_one.future.result().seq == CHAIN + 1
    batch = queue.take()
    assert not batch.releases
    assert not batch.enqueues
    assert [(t.source, t.member) for t in batch.transfers] == [(first.ticket, "")]


async def test_a_permit_that_was_said_to_be_free_is_not_taken_out_again(queue: LocalQueue) -> None:
    first = held(queue)
    queue.idle = True
    release(queue, first)
    queue.restore(queue.take())
    assert not ask(queue).future.done()


async def test_a_spare_permit_stays_for_the_next_one_while_other_things_are_said(
    queue: LocalQueue,
) -> None:
    first, second = held(queue), held(queue)
    queue.idle = True
    release(queue, first)
    queue.settle_later(first.ticket, "7")
    other = ask(queue, "kind:b")
    batch = queue.take(20.0 + queues.SPARE_MS / 2)
    assert [waiter.ticket for waiter in batch.enqueues] == [other.ticket]
    assert not batch.releases
    assert not batch.settles
    assert not queue.urgent
    assert ask(queue).future.done()
    release(queue, second)
    batch = queue.take(20.0 + queues.SPARE_MS)
    assert [one.ticket for one in batch.releases] == [second.ticket]
    assert batch.settles == [(first.ticket, "7")]
    assert not ask(queue).future.done()


async def test_nothing_is_kept_once_somebody_waits_in_the_pool(queue: LocalQueue) -> None:
    first = held(queue)
    queue.idle = True
    release(queue, first)
    queue.urgent = False
    queue.note_idle(False)
    assert queue.urgent
    assert [one.ticket for one in queue.take(20.0).releases] == [first.ticket]


async def test_recycling_passes_on_what_nobody_heard_of_in_a_fair_order(queue: LocalQueue) -> None:
    first = held(queue)
    release(queue, first)
    heir = ask(queue)
    queue.start_recycling()
    queue.recycle_unsent(30.0)
    assert heir.future.result().seq == CHAIN + 1
    assert [(t.source, t.heir.ticket) for t in queue.take().transfers] == [
        (first.ticket, heir.ticket)
    ]


async def test_a_release_that_may_have_arrived_is_never_passed_on(queue: LocalQueue) -> None:
    first = held(queue)
    release(queue, first)
    queue.restore(queue.take())
    waiter = ask(queue)
    queue.start_recycling()
    queue.recycle_unsent(0.0)
    assert not waiter.future.done()
    queue.recycle_forgotten(0.0)  # but by a server that lost its past
    assert waiter.future.done()


async def test_without_a_server_the_earliest_deadline_of_a_flow_comes_first(
    queue: LocalQueue,
) -> None:
    flow = queue.flow(1, "t", LIMITS)
    flow.refresh(POLICY)
    first = held(queue)
    waiters = [
        queue.ask(flow, hard_ms=1000, now_ms=0.0, deadline_ms=deadline_ms, due=due)
        for deadline_ms, due in ((9e6, False), (60_000, True), (30_000, True), (10_000, False))
    ]
    queue.start_recycling()
    order = []
    for _ in waiters:
        release(queue, first)
        first = next(one for one in waiters if one.ticket in queue.held)
        order.append(waiters.index(first))
    assert order == [2, 1, 0, 3]
    assert flow.dues == 0


async def test_a_request_says_how_long_it_is_to_the_deadlines_that_count(queue: LocalQueue) -> None:
    flow = queue.flow(1, "t", LIMITS)
    flow.refresh(POLICY)
    for deadline_ms, due in ((60_000, False), (30_000.5, True), (5, True)):
        queue.ask(flow, hard_ms=1000, now_ms=0.0, deadline_ms=deadline_ms, due=due)
    assert queue.take().dues(10.0) == [0, 29_991, 1]
    ask(queue)
    assert queue.take().dues(10.0) == []


async def test_what_calls_cost_is_sent_where_shares_are_of_that(queue: LocalQueue) -> None:
    flow = queue.flow(1, "t", LIMITS)
    flow.refresh(replace(POLICY, fair_by="cost"))
    demand = Demand(LIMITS, cost_micros=700)
    waiter = queue.ask(
        flow, use=flow.use_of(demand), hard_ms=1000, now_ms=0.0, deadline_ms=float("inf")
    )
    assert waiter.member == f"{waiter.ticket}|1000|700|"
    queue.take()
    queue.grant(waiter.ticket, 1, CHAIN, 0.0)
    cost = flow.cost_of(CallUse(cost_micros=900))
    queue.release(waiter.ticket, outcome="success", actual="", now_ms=20.0, use=cost)
    assert queue.take().uses() == [(waiter.ticket, 900)]


async def test_a_rate_is_never_recycled(queue: LocalQueue) -> None:
    first, waiter = held(queue, "kind:a", "rpm:x"), ask(queue, "kind:a", "rpm:x")
    queue.start_recycling()
    release(queue, first)
    assert not waiter.future.done()


async def test_a_fenced_permit_is_given_back_and_not_passed_on(queue: LocalQueue) -> None:
    first, waiter = held(queue), ask(queue)
    queue.start_recycling()
    queue.fence()
    release(queue, first)
    assert not waiter.future.done()
    assert [release.ticket for release in queue.take().releases] == [first.ticket]


# -- batches


async def test_what_was_said_stays_said_in_its_order(queue: LocalQueue) -> None:
    first = held(queue)
    heirs = [ask(queue) for _ in range(2)]
    queue.start_recycling()
    release(queue, first)
    queue.restore(queue.take())  # it may have arrived
    release(queue, heirs[0])
    assert [(t.source, t.heir.ticket) for t in queue.take().transfers] == [
        (first.ticket, heirs[0].ticket),
        (heirs[0].ticket, heirs[1].ticket),
    ]


async def test_a_join_tells_all_and_forgets_what_has_no_object_any_more(queue: LocalQueue) -> None:
    holder, waiting, gone = held(queue), ask(queue), ask(queue)
    queue.take()
    queue.abandon(gone.ticket, 0.0)
    batch = queue.take_join()
    assert [holding.ticket for holding in batch.held] == [holder.ticket]
    assert [waiter.ticket for waiter in batch.enqueues] == [waiting.ticket]
    assert batch.cancels == []


async def test_usage_is_told_after_the_release_that_announced_it(
    queue: LocalQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queues, "MAX_ENTRIES", 1)
    first, second = held(queue, "tpm:x"), held(queue, "tpm:x")
    for waiter in (first, second):
        release(queue, waiter, later=True)
        queue.settle_later(waiter.ticket, "70")
    batch = said(queue)
    assert [release.outcome for release in batch.releases] == [USAGE_LATER]
    assert batch.settles == []
    assert said(queue).settles == [(first.ticket, "70")]
    assert said(queue).settles == [(second.ticket, "70")]


# -- amounts


async def test_amounts_are_said_only_where_they_count_and_never_exceed_the_limit(
    queue: LocalQueue,
) -> None:
    assert ask(queue).amounts == ""
    assert ask(queue, "kind:a", "rpm:x", "tpm:x", tokens=5000).amounts == "1,1,1000"
    flow = queue.flow(1, "t", ("in:x", "ipm:x", "rpd:x"))
    flow.refresh(POLICY)
    assert flow.amounts(Demand(flow.limits, tokens=Tokens(30, 50), images=2)) == "30,2,1"
    assert flow.actual(CallUse(Tokens(40, 60))) == "40,-,-"
    assert flow.actual(CallUse()) == ""
    with pytest.raises(ValueError, match="say tokens="):
        flow.amounts(Demand(flow.limits))


async def test_a_limit_that_lets_nobody_in_is_said_at_once(queue: LocalQueue) -> None:
    for name in ("kind:none", "kind:unheard-of"):
        with pytest.raises(DemandImpossible) as raised:
            ask(queue, "kind:a", name)
        assert raised.value.limit == name


async def test_what_is_let_in_counts_as_spent_until_the_next_comparison(queue: LocalQueue) -> None:
    held(queue, "kind:a", "rpm:x", "tpm:x")
    assert queue.spent_since.totals() == {"rpm:x": 1, "tpm:x": 100}


async def test_a_waiter_from_before_its_limit_became_a_rate_spends_one(queue: LocalQueue) -> None:
    waiter = ask(queue)
    waiter.flow.refresh(PoolPolicy({"kind:a": Rate(3, 60_000)}))
    queue.grant(waiter.ticket, 1, CHAIN, 0.0)
    assert queue.spent_since.totals() == {"kind:a": 1}


async def test_a_grant_that_a_comparison_finds_is_as_old_as_the_server_says(
    queue: LocalQueue,
) -> None:
    waiter = ask(queue)
    rows = [(waiter.ticket, CHAIN, 5_000 + waiter.hard_ms), (waiter.ticket + 1, CHAIN, 9_000)]
    queue.reconcile(rows, 1, 30.0, lambda server_ms: server_ms - 4_990, 1_000)
    assert queue.held[waiter.ticket].admitted_ms == 10
    assert queue.counts.strays == 1


async def test_a_call_that_may_be_refused_early_does_not_wait_long_for_others(
    queue: LocalQueue,
) -> None:
    ask(queue)
    said(queue)
    flow = queue.flow(1, "t", LIMITS)
    for by_estimate in (False, True):
        queue.ask(flow, hard_ms=1000, now_ms=0.0, deadline_ms=5.0, by_estimate=by_estimate)
        assert (queue.urgent, queue.hurried) == (False, by_estimate)
    said(queue)
    assert not queue.hurried


async def test_a_limit_in_shadow_delays_no_call_while_valkey_is_away(queue: LocalQueue) -> None:
    share, waiter = LocalShare(), ask(queue, "kind:a", "rpm:shadow")
    use = PoolUse(2, queue.amount_held, lambda *_: (0, 0), lambda _: 60_000.0)
    assert [share.allows(waiter, use, 0.0) for _ in range(2)] == [True, True]
    assert not share.allows(ask(queue, "rpm:x"), replace(use, sessions=4), 0.0)


async def test_a_share_of_a_rate_is_reported_once_and_what_came_after_it_later(
    queue: LocalQueue,
) -> None:
    share, waiter = LocalShare(), ask(queue, "tpm:x")
    use = PoolUse(1, queue.amount_held, lambda *_: (500, 100), lambda _: 60_000.0)
    assert [share.allows(waiter, use, at_ms) for at_ms in (0.0, 1.0, 2.0)] == [True, True, True]
    own = share.unreported(60_000.0)
    assert own == [("tpm:x", 200, 300)]
    assert share.allows(waiter, use, 60_000.0)
    share.reported(own)
    assert share.unreported(60_000.0) == [("tpm:x", 100, 400)]
    assert [share.allows(waiter, use, 60_000.0) for _ in range(4)] == [True, True, True, False]


def shares_of(rate: Rate, seen: int = 0) -> Callable[[float], bool]:
    """Whether one of two processes admits a call of such a limit locally, at a time in ms."""
    queue, share = LocalQueue(), LocalShare()
    flow = queue.flow(1, "t", ("rpm:x",))
    flow.refresh(PoolPolicy({"rpm:x": rate}))
    use = PoolUse(2, queue.amount_held, lambda *_: (seen, 0), lambda _: 60_000.0)

    def admits(at_ms: float) -> bool:
        waiter = queue.ask(flow, amounts="1", hard_ms=1, now_ms=at_ms, deadline_ms=inf)
        return share.allows(waiter, use, at_ms)

    return admits


async def test_a_share_of_a_paced_rate_is_as_even_as_the_rate() -> None:
    admits = shares_of(Rate(60, 60_000, pace_ms=1_000))
    times_ms = range(0, 10_001, 500)
    assert [at for at in times_ms if admits(at)] == list(range(0, 10_001, 2_000))
    admits = shares_of(Rate(60, 60_000, pace_ms=4_000))
    assert [at for at in [0, 0, 0, 1_000, 2_000, 2_000] if admits(at)] == [0, 0, 2_000]


async def test_a_share_of_a_rate_that_grows_is_one_of_what_its_last_window_took() -> None:
    rate = Rate(600, 60_000, ramp=Ramp(50, 20))
    admits = shares_of(rate)
    assert [admits(0.0) for _ in range(12)] == [True] * 10 + [False] * 2
    assert not shares_of(rate, 30)(0.0), "the window has taken 30, and may not grow unseen"
    admits = shares_of(rate, 10)
    assert [admits(0.0) for _ in range(7)] == [True] * 5 + [False] * 2


async def test_a_grant_that_came_after_the_comparison_was_made_is_in_no_report_of_it(
    queue: LocalQueue,
) -> None:
    """Its push may be read before the comparison's reply."""
    held(queue, "rpm:x", seq=2 * CHAIN)
    queue.reconcile([], 1, 0.0, float, CHAIN)
    assert queue.spent_since.since("rpm:x", 1) == [2 * CHAIN, 1]
    queue.reconcile([], 1, 0.0, float, 2 * CHAIN)
    assert not queue.spent_since


def test_many_admissions_are_merged_and_none_is_reported_before_all_of_its_part_are() -> None:
    here = SpentHere()
    for number in range(1, 1000):
        here.add("rpm:x", number, 1, number)
    since = here.since("rpm:x", 1)
    assert len(since) < 600
    assert sum(since[1::2]) == sum(range(1000))
    assert here.since("rpm:x", 2) == [0, sum(range(1000))]
    here.reported(["rpm:x"], 1, 500)
    left = here.since("rpm:x", 1)
    assert min(left[::2]) > 500
    assert sum(left[1::2]) >= sum(range(501, 1000))
