"""Rates under `when_away = "local"`: what a process admitted while it was cut off counts once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

import pytest

from tests.property.fleet import HOUR_MS, POLICY, REQUESTS, TOKENS, Fleet, counts
from tests.property.policies import LEASE_MS
from tests.property.server import Server
from tests.property.world import Client, World
from tidegate.limiter.simulation import Paces


@pytest.fixture
def fleet(server: Server) -> Iterator[Fleet]:
    made = Fleet(World(server, replace(POLICY, when_away="local"), Paces()))
    yield made
    made.world.close()


def cut_off(fleet: Fleet, *cut: Client, leases: float = 1.5) -> None:
    """Pass so much time in which only the others reach the server."""
    others = [client for client in fleet.clients if client not in cut]
    for client in cut:
        client.session.failed("cut off")
    for _ in range(round(3 * leases)):
        fleet.world.advance(LEASE_MS // 3)
        fleet.world.renew(others)
        for client in others:
            fleet.compare(client)
        for client in cut:
            client.session.check_lapse()


def admitted_locally(fleet: Fleet, client: Client, tokens: list[int]) -> int:
    """Return how many of these calls the local share admits."""
    tickets = [fleet.request(client, each) for each in tokens]
    client.session.admit_locally()
    admitted = [ticket for ticket in tickets if ticket in client.queue.held]
    for ticket in set(tickets) - set(admitted):
        client.queue.abandon(ticket, fleet.world.local_ms)
    return len(admitted)


def test_what_was_admitted_while_cut_off_counts_when_the_process_is_back(fleet: Fleet) -> None:
    first = fleet.clients[0]
    cut_off(fleet, first)
    assert admitted_locally(fleet, first, [1000, 2000, 333, 1]) == 3
    assert counts(fleet) == (0, 0, 0)
    fleet.compare(first)
    assert first.session.lease.identity.epoch == fleet.world.model.pool.epoch
    assert counts(fleet) == (3333, 3, 3)
    fleet.settle()
    assert counts(fleet) == (3333, 3, 3)


def test_what_such_a_call_used_beyond_its_reservation_counts(fleet: Fleet) -> None:
    first = fleet.clients[0]
    cut_off(fleet, first)
    assert admitted_locally(fleet, first, [1000, 2000]) == 2
    ended, running = list(first.queue.held)
    fleet.end(first, ended, 400)
    fleet.compare(first)
    assert counts(fleet) == (3000, 2, 2)  # what was not used stays until its window ends
    fleet.end(first, running, 2500)
    fleet.compare(first)
    assert counts(fleet) == (3500, 2, 2)


@pytest.mark.parametrize("times", [1, 2])
def test_a_join_that_is_repeated_counts_once(fleet: Fleet, times: int) -> None:
    first = fleet.clients[0]
    cut_off(fleet, first)
    assert admitted_locally(fleet, first, [1000]) == 1
    for _ in range(times):
        fleet.world.exchange(first, "ok")  # is refused, and has to join
        fleet.world.exchange(first, "reply lost")
        cut_off(fleet, first)
        assert admitted_locally(fleet, first, [500]) == 1
    fleet.compare(first)
    assert counts(fleet) == (1000 + 500 * times, 1 + times, 1 + times)
    cut_off(fleet, first)
    assert admitted_locally(fleet, first, [20]) == 1
    fleet.compare(first)
    assert counts(fleet) == (1020 + 500 * times, 2 + times, 2 + times)


def test_what_has_expired_meanwhile_does_not_count(fleet: Fleet) -> None:
    first = fleet.clients[0]
    cut_off(fleet, first)
    assert admitted_locally(fleet, first, [1000]) == 1
    fleet.world.advance(HOUR_MS + 1000)
    for other in fleet.clients[1:]:
        fleet.compare(other)
    assert admitted_locally(fleet, first, [70]) == 1
    fleet.compare(first)
    assert (fleet.spent(TOKENS), fleet.spent(REQUESTS)) == (70, 1)


def test_a_loss_after_it_was_reported_counts_it_once(fleet: Fleet) -> None:
    first = fleet.clients[0]
    cut_off(fleet, first)
    assert admitted_locally(fleet, first, [1000]) == 1
    fleet.compare(first)
    fleet.world.flush()
    for client in fleet.clients:
        fleet.compare(client)
    assert counts(fleet) == (1000, 1, 1)


def test_a_local_share_is_one_of_what_was_left(fleet: Fleet) -> None:
    """What the window has admitted before is no process's share of it again."""
    first, second, third = fleet.clients
    fleet.ask(first, 4000)
    for client in fleet.clients:
        fleet.compare(client)
    fleet.ask(second, 300)  # that the others do not know of
    cut_off(fleet, first, second, third)
    assert admitted_locally(fleet, first, [2000, 1]) == 1
    assert admitted_locally(fleet, second, [1700, 1]) == 1
    assert admitted_locally(fleet, third, [2001, 2000]) == 0, "the first does not fit"
    assert admitted_locally(fleet, third, [2000]) == 1
    for client in fleet.clients:
        fleet.compare(client)
    assert fleet.spent(TOKENS) == 10_000
    fleet.world.advance(HOUR_MS + 61_000)
    fleet.settle()
    cut_off(fleet, first, second, third)
    assert admitted_locally(fleet, first, [3333, 1]) == 1


@pytest.mark.parametrize("seed", range(6))
def test_each_call_counts_once_after_any_cuts(fleet: Fleet, seed: int) -> None:
    random, calls = Random(seed), 0
    for _ in range(6):
        for _ in range(random.randrange(5)):
            fleet.ask(random.choice(fleet.clients), 3)
            calls += 1
        cut = random.sample(fleet.clients, random.randrange(1, 4))
        cut_off(fleet, *cut)
        for client in cut:
            calls += admitted_locally(fleet, client, [3] * random.randrange(5))
        if random.random() < 0.3:
            fleet.world.flush()
        for client in cut:
            if random.random() < 0.5:
                client.session.refresh()
                fleet.world.exchange(client, "ok")
                fleet.world.exchange(client, random.choice(["reply lost", "twice"]))
        fleet.settle()
        assert counts(fleet) == (3 * calls, calls, calls)
