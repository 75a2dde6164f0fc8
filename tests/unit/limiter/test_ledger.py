"""What a process decides alone: tickets, cancels, batches that may not have arrived, passing on."""

from __future__ import annotations

import pytest

from tidegate.limiter.ledger import Ledger, Waiter

LIMIT = "kind:a"


@pytest.fixture
async def ledger() -> Ledger:
    return Ledger()


def ask(ledger: Ledger) -> Waiter:
    return ledger.ask(LIMIT, hard_ms=1000, now_ms=0.0, deadline_ms=float("inf"))


def held(ledger: Ledger) -> Waiter:
    """A waiter that was let in, and about which nothing is left to say."""
    waiter = ask(ledger)
    ledger.confirm(ledger.take())
    ledger.grant(waiter.ticket, 1, 1, 0.0)
    return waiter


async def test_a_waiter_that_was_never_sent_leaves_without_a_word(ledger: Ledger) -> None:
    waiter = ask(ledger)
    ledger.abandon(waiter.ticket, 0.0)
    assert ledger.unsaid() == 0


async def test_a_waiter_that_may_be_known_is_cancelled_in_words(ledger: Ledger) -> None:
    waiter = ask(ledger)
    lost = ledger.take()
    ledger.abandon(waiter.ticket, 0.0)
    ledger.restore(lost)
    batch = ledger.take()
    assert (batch.cancels, batch.enqueues) == ([waiter.ticket], [])


async def test_a_grant_that_crosses_a_cancel_is_not_answered_twice(ledger: Ledger) -> None:
    waiter = ask(ledger)
    ledger.take()
    ledger.abandon(waiter.ticket, 0.0)
    ledger.grant(waiter.ticket, 1, 1, 0.0)
    assert ledger.take().cancels == [waiter.ticket]
    assert not ledger.held


async def test_a_grant_for_nobody_is_given_back(ledger: Ledger) -> None:
    ledger.grant(99, 1, 1, 0.0)
    assert ledger.take().cancels == [99]


async def test_a_task_that_is_cancelled_as_it_is_let_in_gives_the_permit_back(
    ledger: Ledger,
) -> None:
    waiter = ask(ledger)
    ledger.confirm(ledger.take())
    waiter.future.cancel()
    ledger.grant(waiter.ticket, 1, 1, 0.0)
    ledger.abandon(waiter.ticket, 0.0)
    assert [release.ticket for release in ledger.take().releases] == [waiter.ticket]


async def test_a_permit_passed_on_many_times_unsaid_is_one_entry(ledger: Ledger) -> None:
    first = held(ledger)
    heirs = [ask(ledger) for _ in range(3)]
    ledger.recycling = True
    for giver in (first, *heirs[:2]):
        ledger.release(giver.ticket, outcome="success", tokens=None, now_ms=0.0)
    batch = ledger.take()
    assert [(t.source, t.heir.ticket) for t in batch.transfers] == [(first.ticket, heirs[2].ticket)]
    assert not batch.enqueues
    assert not batch.releases


async def test_what_was_said_of_passing_on_stays_said_as_it_was(ledger: Ledger) -> None:
    first = held(ledger)
    heirs = [ask(ledger) for _ in range(2)]
    ledger.recycling = True
    ledger.release(first.ticket, outcome="success", tokens=None, now_ms=0.0)
    ledger.restore(ledger.take())  # it may have arrived
    ledger.release(heirs[0].ticket, outcome="success", tokens=None, now_ms=0.0)
    assert [(t.source, t.heir.ticket) for t in ledger.take().transfers] == [
        (first.ticket, heirs[0].ticket),
        (heirs[0].ticket, heirs[1].ticket),
    ]


async def test_a_release_that_may_have_arrived_is_never_passed_on(ledger: Ledger) -> None:
    first = held(ledger)
    ledger.release(first.ticket, outcome="success", tokens=None, now_ms=0.0)
    ledger.restore(ledger.take())
    waiter = ask(ledger)
    ledger.recycling = True
    ledger.recycle_unsent(0.0)
    assert not waiter.future.done()


async def test_a_join_tells_all_and_forgets_what_has_no_object_any_more(ledger: Ledger) -> None:
    holder, waiting, gone = held(ledger), ask(ledger), ask(ledger)
    ledger.take()
    ledger.abandon(gone.ticket, 0.0)
    batch = ledger.take_join()
    assert [holding.ticket for holding in batch.held] == [holder.ticket]
    assert [waiter.ticket for waiter in batch.enqueues] == [waiting.ticket]
    assert batch.cancels == []


async def test_a_lost_push_is_found_by_comparing(ledger: Ledger) -> None:
    waiter = ask(ledger)
    ledger.confirm(ledger.take())
    ledger.reconcile([(waiter.ticket, 5)], 1, 0.0)
    assert waiter.future.result().seq == 5
