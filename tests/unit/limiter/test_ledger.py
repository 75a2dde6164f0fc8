"""What a process decides alone: tickets, cancels, batches that may not have arrived, passing on."""

from __future__ import annotations

import pytest

from tidegate.errors import DemandImpossible
from tidegate.limiter import queue as outbox
from tidegate.limiter.messages import USAGE_LATER, Hint
from tidegate.limiter.policy import Adaptive, Concurrency, PoolPolicy, Quota, Rate
from tidegate.limiter.queue import CHAIN, Batch, Ledger, Tokens, Waiter

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
    }
)


@pytest.fixture
async def ledger() -> Ledger:
    return Ledger()


def ask(ledger: Ledger, *limits: str, tokens: int = 100) -> Waiter:
    flow = ledger.flow(1, "t", limits or LIMITS)
    flow.refresh(POLICY)
    amounts = flow.amounts(Tokens(tokens), 0)
    return ledger.ask(flow, amounts=amounts, hard_ms=1000, now_ms=0.0, deadline_ms=float("inf"))


def said(ledger: Ledger) -> Batch:
    """A batch that arrived."""
    batch = ledger.take()
    ledger.outbox.confirm(batch)
    return batch


def held(ledger: Ledger, *limits: str) -> Waiter:
    """A waiter that was let in, and about which nothing is left to say."""
    waiter = ask(ledger, *limits)
    said(ledger)
    ledger.grant(waiter.ticket, 1, CHAIN, 0.0)
    return waiter


def release(ledger: Ledger, waiter: Waiter, actual: str = "", *, later: bool = False) -> None:
    ledger.release(waiter.ticket, outcome="success", actual=actual, now_ms=20.0, usage_later=later)


def hint(ledger: Ledger, waiter: Waiter, horizon: int) -> None:
    ledger.flows_to_hint(16)
    ledger.take_hints({waiter.flow.key: Hint(1, horizon, 0, 1, 100)})


# -- waiting


async def test_a_waiter_that_was_never_sent_leaves_without_a_word(ledger: Ledger) -> None:
    waiter = ask(ledger)
    ledger.abandon(waiter.ticket, 0.0)
    assert len(ledger.outbox) == 0


async def test_a_waiter_that_may_be_known_is_cancelled_in_words(ledger: Ledger) -> None:
    waiter = ask(ledger)
    lost = ledger.take()
    ledger.abandon(waiter.ticket, 0.0)
    ledger.restore(lost)
    batch = ledger.take()
    assert batch.cancels == [(waiter.ticket, waiter.flow, waiter.member)]
    assert batch.enqueues == []


async def test_a_grant_that_crosses_a_cancel_is_not_answered_twice(ledger: Ledger) -> None:
    waiter = ask(ledger)
    ledger.take()
    ledger.abandon(waiter.ticket, 0.0)
    ledger.grant(waiter.ticket, 1, 1, 0.0)
    assert [ticket for ticket, _, _ in ledger.take().cancels] == [waiter.ticket]
    assert not ledger.held


async def test_a_grant_for_nobody_is_given_back(ledger: Ledger) -> None:
    ledger.grant(99, 1, 1, 0.0)
    assert ledger.take().cancels == [(99, None, "")]


async def test_a_task_that_is_cancelled_as_it_is_let_in_gives_the_permit_back(
    ledger: Ledger,
) -> None:
    waiter = ask(ledger)
    said(ledger)
    waiter.future.cancel()
    ledger.grant(waiter.ticket, 1, 1, 0.0)
    ledger.abandon(waiter.ticket, 0.0)
    assert [release.ticket for release in ledger.take().releases] == [waiter.ticket]


async def test_a_lost_push_is_found_by_comparing(ledger: Ledger) -> None:
    waiter = ask(ledger)
    said(ledger)
    ledger.reconcile([(waiter.ticket, 5, 1_000)], 1, 0.0, float)
    assert waiter.future.result().seq == 5


async def test_what_is_being_given_back_is_not_taken_up_again_by_comparing(
    ledger: Ledger,
) -> None:
    waiter = held(ledger)
    release(ledger, waiter)
    ledger.reconcile([(waiter.ticket, CHAIN, 1_000)], 1, 0.0, float)
    batch = ledger.take()
    assert [release.ticket for release in batch.releases] == [waiter.ticket]
    assert batch.cancels == []


async def test_held_and_waiting_are_counted_under_every_limit(ledger: Ledger) -> None:
    held(ledger, "kind:a", "kind:b")
    ask(ledger, "kind:b")
    assert ledger.held_of == {"kind:a": 1, "kind:b": 1}
    assert ledger.waiting_of == {"kind:b": 1}


# -- passing on


async def test_a_permit_is_passed_on_as_far_as_the_hint_allows(ledger: Ledger) -> None:
    first, near, far = held(ledger), ask(ledger), ask(ledger)
    ledger.stamp([near, far], [4, 9])
    said(ledger)
    hint(ledger, near, horizon=5)
    release(ledger, first)
    assert near.future.done()
    assert not far.future.done()
    release(ledger, near)
    assert not far.future.done()
    batch = ledger.take()
    assert [(t.source, t.heir.ticket, t.heir.seq) for t in batch.transfers] == [
        (first.ticket, near.ticket, CHAIN + 1)
    ]
    assert [release.ticket for release in batch.releases] == [near.ticket]


async def test_without_a_hint_everything_goes_back(ledger: Ledger) -> None:
    first, waiter = held(ledger), ask(ledger)
    release(ledger, first)
    assert not waiter.future.done()
    assert ledger.outbox.urgent


async def test_a_limit_that_must_hear_of_every_call_is_never_passed_on(ledger: Ledger) -> None:
    first, waiter = held(ledger, "kind:b"), ask(ledger, "kind:b")
    ledger.stamp([waiter], [1])
    hint(ledger, waiter, horizon=5)
    release(ledger, first)
    assert not waiter.future.done()


@pytest.mark.parametrize("away", [False, True])
async def test_a_fence_never_reaches_the_one_that_the_server_gives_next(
    ledger: Ledger, *, away: bool
) -> None:
    waiters = [held(ledger), *(ask(ledger) for _ in range(CHAIN + 1))]
    if away:
        ledger.start_recycling()
    else:
        ledger.stamp(waiters[1:], range(1, CHAIN + 2))
        hint(ledger, waiters[1], horizon=10 * CHAIN)
    for waiter in waiters[:CHAIN]:
        release(ledger, waiter)
    fences = [w.future.result().seq for w in waiters if w.future.done()]
    assert fences == list(range(CHAIN, 2 * CHAIN))


async def test_a_grant_of_one_who_was_let_in_here_already_is_told_at_once(ledger: Ledger) -> None:
    first, heir, next_one = held(ledger), ask(ledger), ask(ledger)
    said(ledger)
    ledger.stamp([heir, next_one], (1, 2))
    hint(ledger, heir, horizon=2)
    release(ledger, first)
    ledger.outbox.urgent = False
    ledger.grant(heir.ticket, 1, 7 * CHAIN, 20.0)
    assert ledger.outbox.urgent
    assert ledger.held[heir.ticket].seq == CHAIN + 1
    assert [t.heir.ticket for t in said(ledger).transfers] == [heir.ticket]


async def test_a_permit_freed_while_nobody_waits_goes_to_the_next_who_asks(
    ledger: Ledger,
) -> None:
    first = held(ledger)
    ledger.idle = True
    release(ledger, first)
    next_one = ask(ledger)
    assert next_one.future.result().seq == CHAIN + 1
    batch = ledger.take()
    assert not batch.releases
    assert not batch.enqueues
    assert [(t.source, t.member) for t in batch.transfers] == [(first.ticket, "")]


async def test_a_permit_that_was_said_to_be_free_is_not_taken_out_again(ledger: Ledger) -> None:
    first = held(ledger)
    ledger.idle = True
    release(ledger, first)
    ledger.restore(ledger.take())
    assert not ask(ledger).future.done()


async def test_a_spare_permit_stays_for_the_next_one_while_other_things_are_said(
    ledger: Ledger,
) -> None:
    first, second = held(ledger), held(ledger)
    ledger.idle = True
    release(ledger, first)
    ledger.settle_later(first.ticket, "7")
    other = ask(ledger, "kind:b")
    batch = ledger.take(20.0 + outbox.SPARE_MS / 2)
    assert [waiter.ticket for waiter in batch.enqueues] == [other.ticket]
    assert not batch.releases
    assert not batch.settles
    assert not ledger.outbox.urgent
    assert ask(ledger).future.done()
    release(ledger, second)
    batch = ledger.take(20.0 + outbox.SPARE_MS)
    assert [one.ticket for one in batch.releases] == [second.ticket]
    assert batch.settles == [(first.ticket, "7")]
    assert not ask(ledger).future.done()


async def test_nothing_is_kept_once_somebody_waits_in_the_pool(ledger: Ledger) -> None:
    first = held(ledger)
    ledger.idle = True
    release(ledger, first)
    ledger.outbox.urgent = False
    ledger.note_idle(False)
    assert ledger.outbox.urgent
    assert [one.ticket for one in ledger.take(20.0).releases] == [first.ticket]


async def test_recycling_passes_on_what_nobody_heard_of_in_a_fair_order(ledger: Ledger) -> None:
    first = held(ledger)
    release(ledger, first)
    heir = ask(ledger)
    ledger.start_recycling()
    ledger.recycle_unsent(30.0)
    assert heir.future.result().seq == CHAIN + 1
    assert [(t.source, t.heir.ticket) for t in ledger.take().transfers] == [
        (first.ticket, heir.ticket)
    ]


async def test_a_release_that_may_have_arrived_is_never_passed_on(ledger: Ledger) -> None:
    first = held(ledger)
    release(ledger, first)
    ledger.restore(ledger.take())
    waiter = ask(ledger)
    ledger.start_recycling()
    ledger.recycle_unsent(0.0)
    assert not waiter.future.done()
    ledger.recycle_forgotten(0.0)  # but by a server that lost its past
    assert waiter.future.done()


async def test_a_rate_is_never_recycled(ledger: Ledger) -> None:
    first, waiter = held(ledger, "kind:a", "rpm:x"), ask(ledger, "kind:a", "rpm:x")
    ledger.start_recycling()
    release(ledger, first)
    assert not waiter.future.done()


async def test_a_fenced_permit_is_given_back_and_not_passed_on(ledger: Ledger) -> None:
    first, waiter = held(ledger), ask(ledger)
    ledger.start_recycling()
    ledger.fence()
    release(ledger, first)
    assert not waiter.future.done()
    assert [release.ticket for release in ledger.take().releases] == [first.ticket]


# -- batches


async def test_what_was_said_stays_said_in_its_order(ledger: Ledger) -> None:
    first = held(ledger)
    heirs = [ask(ledger) for _ in range(2)]
    ledger.start_recycling()
    release(ledger, first)
    ledger.restore(ledger.take())  # it may have arrived
    release(ledger, heirs[0])
    assert [(t.source, t.heir.ticket) for t in ledger.take().transfers] == [
        (first.ticket, heirs[0].ticket),
        (heirs[0].ticket, heirs[1].ticket),
    ]


async def test_a_join_tells_all_and_forgets_what_has_no_object_any_more(ledger: Ledger) -> None:
    holder, waiting, gone = held(ledger), ask(ledger), ask(ledger)
    ledger.take()
    ledger.abandon(gone.ticket, 0.0)
    batch = ledger.take_join()
    assert [holding.ticket for holding in batch.held] == [holder.ticket]
    assert [waiter.ticket for waiter in batch.enqueues] == [waiting.ticket]
    assert batch.cancels == []


async def test_usage_is_told_after_the_release_that_announced_it(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_ENTRIES", 1)
    first, second = held(ledger, "tpm:x"), held(ledger, "tpm:x")
    for waiter in (first, second):
        release(ledger, waiter, later=True)
        ledger.settle_later(waiter.ticket, "70")
    batch = said(ledger)
    assert [release.outcome for release in batch.releases] == [USAGE_LATER]
    assert batch.settles == []
    assert said(ledger).settles == [(first.ticket, "70")]
    assert said(ledger).settles == [(second.ticket, "70")]


# -- amounts


async def test_amounts_are_said_only_where_they_count_and_never_exceed_the_limit(
    ledger: Ledger,
) -> None:
    assert ask(ledger).amounts == ""
    assert ask(ledger, "kind:a", "rpm:x", "tpm:x", tokens=5000).amounts == "1,1,1000"
    flow = ledger.flow(1, "t", ("in:x", "ipm:x", "rpd:x"))
    flow.refresh(POLICY)
    assert flow.amounts(Tokens(30, 50), 2) == "30,2,1"
    assert flow.actual(Tokens(40, 60), None) == "40,-,-"
    assert flow.actual(None, None) == ""
    with pytest.raises(ValueError, match="say tokens="):
        flow.amounts(None, 0)


async def test_a_limit_that_lets_nobody_in_is_said_at_once(ledger: Ledger) -> None:
    for name in ("kind:none", "kind:unheard-of"):
        with pytest.raises(DemandImpossible) as raised:
            ask(ledger, "kind:a", name)
        assert raised.value.limit == name


async def test_what_is_let_in_counts_as_spent_until_the_next_comparison(ledger: Ledger) -> None:
    held(ledger, "kind:a", "rpm:x", "tpm:x")
    assert ledger.spent_since == {"rpm:x": 1, "tpm:x": 100}


async def test_a_waiter_from_before_its_limit_became_a_rate_spends_one(ledger: Ledger) -> None:
    waiter = ask(ledger)
    waiter.flow.refresh(PoolPolicy({"kind:a": Rate(3, 60_000)}))
    ledger.grant(waiter.ticket, 1, CHAIN, 0.0)
    assert ledger.spent_since == {"kind:a": 1}


async def test_a_grant_that_a_comparison_finds_is_as_old_as_the_server_says(
    ledger: Ledger,
) -> None:
    waiter = ask(ledger)
    rows = [(waiter.ticket, CHAIN, 5_000 + waiter.hard_ms), (waiter.ticket + 1, CHAIN, 9_000)]
    ledger.reconcile(rows, 1, 30.0, lambda server_ms: server_ms - 4_990)
    assert ledger.held[waiter.ticket].admitted_ms == 10
    assert ledger.counts.strays == 1
