"""Rounds through all flows that wait: each has its turn, however often a round begins."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tidegate.limiter.queue import LocalQueue


@pytest.fixture
def queue() -> Iterator[LocalQueue]:
    loop = asyncio.new_event_loop()
    yield LocalQueue(loop.create_future)
    loop.close()


def wait(queue: LocalQueue, tenant: str, count: int = 1) -> list[int]:
    """Tickets of a tenant that have been said."""
    flow = queue.flow(1, tenant, ("kind:text_only",))
    found = [queue.ask(flow, hard_ms=1, now_ms=0.0, deadline_ms=0.0) for _ in range(count)]
    for waiter in found:
        waiter.sent = True
    return [waiter.ticket for waiter in found]


def test_a_round_that_begins_again_and_again_comes_to_everybody(queue: LocalQueue) -> None:
    tickets = [wait(queue, f"t{number}")[0] for number in range(10)]
    asked, looked = [], []
    for _ in range(5):
        queue.begin_rounds()
        asked += queue.tickets_to_verify(2)
        looked += [flow.tenant for flow in queue.flows_to_inspect(2)]
    assert asked == tickets
    assert looked == [f"t{number}" for number in range(10)]


def test_of_few_flows_more_tickets_are_asked_after_in_one_call(queue: LocalQueue) -> None:
    one, other = wait(queue, "t1", 300), wait(queue, "t2", 2)
    queue.begin_rounds()
    assert queue.tickets_to_verify(200) == one[:100] + other
    assert not queue.asks


def test_tickets_that_the_server_put_first_are_asked_after_first(queue: LocalQueue) -> None:
    tickets = wait(queue, "t1", 5)
    flow = queue.flow(1, "t1", ("kind:text_only",))
    flow.dues = 1
    for ticket, stamp in zip(tickets, (1, 2, 0.25, 3, 1.5), strict=True):
        queue.waiting[ticket].stamp = stamp
    queue.begin_rounds()
    assert queue.tickets_to_verify(3) == [tickets[2], tickets[0], tickets[4]]


def test_after_one_that_was_admitted_the_next_of_its_flow_are_asked_after(
    queue: LocalQueue,
) -> None:
    tickets = wait(queue, "t1", 3)
    queue.begin_rounds()
    assert queue.tickets_to_verify(1) == tickets[:1]
    queue.reconcile([(tickets[0], 1000, 5)], 1, 0.0, float, 1000)
    assert queue.tickets_to_verify(1) == tickets[1:2]
    queue.reconcile([], 1, 0.0, float, 1000)
    assert not queue.asks


def test_what_was_never_said_and_who_waits_no_more_is_asked_after_by_nobody(
    queue: LocalQueue,
) -> None:
    [gone], [there] = wait(queue, "t1"), wait(queue, "t2")
    unsaid = queue.ask(queue.flow(1, "t3", ()), hard_ms=1, now_ms=0.0, deadline_ms=0.0)
    queue.begin_rounds()
    queue.abandon(gone, 0.0)
    assert not unsaid.sent
    assert queue.tickets_to_verify(200) == [there]
