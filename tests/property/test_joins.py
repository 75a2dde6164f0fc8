"""Sessions that join again while grants are on their way to them, step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from tests.property.policies import LEASE_MS
from tests.property.server import Server
from tests.property.world import Client, World
from tidegate.limiter import Demand, PoolPolicy
from tidegate.limiter.simulation import Paces

LIMIT = "kind:a"
POLICY = PoolPolicy({LIMIT: 1}, lease_ms=LEASE_MS, revision=1)


def say(world: World, client: Client) -> None:
    """All that a client has to say, though it hears no push."""
    while client.session.is_request_due():
        world.exchange(client, "ok")


def ask(world: World, client: Client) -> int:
    flow = client.queue.flow(1, "t", (LIMIT,))
    flow.refresh(client.session.policy)
    waiter = client.queue.ask(
        flow,
        amounts=flow.amounts(Demand((LIMIT,))),
        hard_ms=1_000_000,
        now_ms=world.local_ms,
        deadline_ms=float("inf"),
        by_estimate=False,
    )
    say(world, client)
    return waiter.ticket


def hear(client: Client) -> None:
    for push in client.mailbox:
        client.session.take_push(push)
    client.mailbox.clear()


@pytest.mark.parametrize("fate", ["ok", "reply lost", "request lost"])
def test_a_grant_that_a_join_takes_back_is_not_used_when_its_push_comes_late(
    server: Server, fate: Literal["ok", "reply lost", "request lost"]
) -> None:
    """A policy that changes while a grant is on its way: the join takes the grant back, and
    another process has it before the push of the first one is read."""
    world = World(server, POLICY, Paces())
    first, second, third = clients = [world.new_client() for _ in range(3)]
    for client in clients:
        say(world, client)
    for _ in range(4):  # until all know of one another
        world.advance(LEASE_MS // 2)
        world.renew(clients)
        for client in clients:
            hear(client)
            client.session.refresh()
            say(world, client)
    held = ask(world, first)
    assert list(first.queue.held) == [held]
    ask(world, second)
    ask(world, third)
    first.queue.release(held, outcome="success", actual="", now_ms=world.local_ms)
    say(world, first)
    assert [len(push.grants) for push in second.mailbox if push.grants] == [1]
    # The queue of the tenant is shorter now, so that the second client has no place in it.
    second.session.set_policy(replace(POLICY, revision=2, queue_per_tenant=1), "somebody")
    world.exchange(second, fate)
    for client in (second, third):
        hear(client)
    assert world.really_open(LIMIT) <= 1
    for _ in range(3):
        for client in clients:
            hear(client)
            say(world, client)
    assert world.really_open(LIMIT) == 1, "the permit is not lost"
    world.close()
