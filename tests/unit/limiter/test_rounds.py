"""Rounds through all flows that wait: each has its turn, however often a round begins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tidegate.limiter.queue import Ledger


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    loop = asyncio.new_event_loop()
    yield Ledger(loop.create_future)
    loop.close()


def wait(ledger: Ledger, tenant: str, count: int = 1) -> list[int]:
    """Tickets of a tenant that have been said."""
    flow = ledger.flow(1, tenant, ("kind:text_only",))
    found = [ledger.ask(flow, hard_ms=1, now_ms=0.0, deadline_ms=0.0) for _ in range(count)]
    for waiter in found:
        waiter.sent = True
    return [waiter.ticket for waiter in found]


def test_a_round_that_begins_again_and_again_comes_to_everybody(ledger: Ledger) -> None:
    tickets = [wait(ledger, f"t{number}")[0] for number in range(10)]
    asked, looked = [], []
    for _ in range(5):
        ledger.rounds.begin()
        asked += ledger.rounds.tickets_to_ask_after(2)
        looked += [flow.tenant for flow in ledger.rounds.flows_to_look_at(2)]
    assert asked == tickets
    assert looked == [f"t{number}" for number in range(10)]


def test_of_few_flows_more_tickets_are_asked_after_in_one_call(ledger: Ledger) -> None:
    one, other = wait(ledger, "t1", 300), wait(ledger, "t2", 2)
    ledger.rounds.begin()
    assert ledger.rounds.tickets_to_ask_after(200) == one[:100] + other
    assert not ledger.rounds.asks


def test_after_one_that_was_admitted_the_next_of_its_flow_are_asked_after(ledger: Ledger) -> None:
    tickets = wait(ledger, "t1", 3)
    ledger.rounds.begin()
    assert ledger.rounds.tickets_to_ask_after(1) == tickets[:1]
    ledger.reconcile([(tickets[0], 1000, 5)], 1, 0.0, float)
    assert ledger.rounds.tickets_to_ask_after(1) == tickets[1:2]
    ledger.reconcile([], 1, 0.0, float)
    assert not ledger.rounds.asks


def test_what_was_never_said_and_who_waits_no_more_is_asked_after_by_nobody(
    ledger: Ledger,
) -> None:
    [gone], [there] = wait(ledger, "t1"), wait(ledger, "t2")
    unsaid = ledger.ask(ledger.flow(1, "t3", ()), hard_ms=1, now_ms=0.0, deadline_ms=0.0)
    ledger.rounds.begin()
    ledger.abandon(gone, 0.0)
    assert not unsaid.sent
    assert ledger.rounds.tickets_to_ask_after(200) == [there]
