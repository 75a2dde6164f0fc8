"""Rates after the server has lost its data: what several processes saw counts once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Literal

import pytest

from tests.property.fleet import DAY, POLICY, REQUESTS, Fleet, counts
from tests.property.server import Server
from tests.property.world import World
from tidegate.limiter.simulation import Paces


@pytest.fixture
def fleet(server: Server) -> Iterator[Fleet]:
    made = Fleet(World(server, POLICY, Paces()))
    yield made
    made.world.close()


@pytest.mark.parametrize("order", ["as they came", "the other way round"])
def test_what_another_process_has_seen_already_counts_once(fleet: Fleet, order: str) -> None:
    first, second, third = fleet.clients
    fleet.ask(first, 4000)
    fleet.ask(third, 500)
    fleet.compare(second)  # has seen both calls; those that hold them have seen neither
    fleet.ask(second, 30)
    fleet.ask(first, 2)  # that only its own process knows
    assert counts(fleet) == (4532, 4, 4)
    fleet.world.flush()
    for client in fleet.clients if order == "as they came" else fleet.clients[::-1]:
        fleet.compare(client)
    assert counts(fleet) == (4532, 4, 4)


@pytest.mark.parametrize("fate", ["reply lost", "twice"])
def test_a_join_that_is_repeated_counts_once(
    fleet: Fleet, fate: Literal["reply lost", "twice"]
) -> None:
    first, second, _ = fleet.clients
    fleet.ask(first, 4000)
    fleet.world.flush()
    first.session.refresh()
    fleet.world.exchange(first, "ok")  # is told of the new epoch
    fleet.world.exchange(first, fate)
    for client in (first, second):
        fleet.compare(client)
    assert counts(fleet) == (4000, 1, 1)


def test_what_a_newcomer_took_before_the_others_reported_counts_beside_it(fleet: Fleet) -> None:
    first, second, third = fleet.clients
    fleet.ask(first, 4000)
    for client in (second, third):
        fleet.compare(client)
        fleet.world.kill(client)
    fleet.world.flush()
    newcomer = fleet.world.new_client()
    fleet.compare(newcomer)
    fleet.ask(newcomer, 300)
    assert fleet.spent() == 300
    fleet.compare(first)
    assert fleet.spent() == 4300
    assert fleet.spent(REQUESTS) == 2


@pytest.mark.parametrize("emptied", [False, True])
def test_a_server_that_kept_its_data_counts_nothing_again(fleet: Fleet, emptied: bool) -> None:
    first, second, _ = fleet.clients
    fleet.ask(first, 4000)
    fleet.compare(second)
    fleet.ask(first, 70)
    if emptied:
        fleet.world.flush()
    fleet.world.restart()
    for client in fleet.clients:
        fleet.compare(client)
    assert counts(fleet) == (4070, 2, 2)


def test_a_day_on_record_is_not_counted_beside_what_processes_saw(fleet: Fleet) -> None:
    first, second, third = fleet.clients
    for client in fleet.clients:
        fleet.ask(client, 1)
    for client in (first, second):
        fleet.compare(client)
    fleet.ask(first, 1)
    fleet.world.flush()
    fleet.compare(third)  # has seen no call but its own
    fleet.world.charge(DAY, 3, recorded=True)
    for client in (first, second):
        fleet.compare(client)
    assert fleet.spent(DAY) == 4


@pytest.mark.parametrize("seed", range(6))
def test_each_call_counts_once_after_any_losses(fleet: Fleet, seed: int) -> None:
    random = Random(seed)
    asked = 0
    for _ in range(5):
        for _ in range(random.randrange(8)):
            fleet.ask(random.choice(fleet.clients), 1 + asked % 3)
            asked += 1
            if random.random() < 0.4:
                fleet.compare(random.choice(fleet.clients))
        if random.random() < 0.7:
            fleet.world.flush()
        else:
            fleet.world.restart()
        fleet.world.advance(100)
        order = random.sample(fleet.clients, 3)
        for client in order[:1] if random.random() < 0.5 else []:
            client.session.refresh()
            fleet.world.exchange(client, "ok")
            fleet.world.exchange(client, "reply lost")
        for client in [*order, order[0]]:
            fleet.compare(client)
        fleet.settle()
        total = sum(1 + number % 3 for number in range(asked))
        assert counts(fleet) == (total, asked, asked)


@pytest.mark.parametrize("used", [100, 900])
@pytest.mark.parametrize("cause", ["policy", "request lost", "reply lost"])
def test_the_usage_of_a_call_that_ends_as_its_session_joins_again_counts(
    fleet: Fleet, used: int, cause: str
) -> None:
    first = fleet.clients[0]
    ticket = fleet.ask(first, 400)
    fleet.end(first, ticket, used)
    if cause != "policy":
        fleet.world.exchange(first, "request lost" if cause == "request lost" else "reply lost")
    first.session.set_policy(replace(POLICY, revision=2), "somebody")
    fleet.compare(first)
    assert fleet.spent() == used
    assert not fleet.world.model.pool.sessions[first.sid].held


@pytest.mark.parametrize("ends", ["before the join", "after it"])
def test_what_a_call_used_beyond_its_reservation_counts_after_a_loss(
    fleet: Fleet, ends: str
) -> None:
    first, second, _ = fleet.clients
    more, less = fleet.ask(first, 400), fleet.ask(first, 400)
    fleet.compare(second)
    fleet.world.flush()
    if ends == "after it":
        for client in fleet.clients:
            fleet.compare(client)
    fleet.end(first, more, 900)
    fleet.end(first, less, 100)
    for client in fleet.clients:
        fleet.compare(client)
    assert fleet.spent() == 900 + 400  # what was reserved and not used stays until its window ends
    assert not fleet.world.model.pool.sessions[first.sid].held
