"""What bands get of a rate, step by step, on the real Lua and the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.property.server import Server
from tests.property.test_rates import MINUTE_MS, Bench
from tidegate.limiter import Ramp, Rate


@pytest.fixture
def bench(server: Server) -> Iterator[Bench]:
    made = Bench(server)
    made.say()
    yield made
    made.world.close()


def test_a_lower_band_gets_its_share_of_what_a_ramp_admits_and_not_of_the_bound(
    bench: Bench,
) -> None:
    bench.put_in_force(Rate(6000, MINUTE_MS, "tokens", ramp=Ramp(10, 600)))
    taken = {1: 0, 2: 0}
    waiting = bench.client.queue.waiting
    for number in range(80):
        for band in (1, 2):
            while sum(one.flow.band == band for one in waiting.values()) < 6:
                bench.ask(20, band)
        bench.wait(3_000)
        for ticket, holding in list(bench.client.queue.held.items()):
            taken[holding.flow.band] += 20 if number >= 40 else 0
            bench.end(ticket, 20)
    assert taken[1] > 1000
    assert 0.05 * taken[1] < taken[2] < 0.2 * taken[1], "a tenth of all"


def test_a_place_counts_what_is_kept_free_for_a_lower_band(bench: Bench) -> None:
    bench.put_in_force(Rate(1000, MINUTE_MS, "tokens", slack_ms=0))
    bench.ask(940)
    low = bench.ask(90, band=2)
    for _ in range(2):
        bench.wait(20_000)
        bench.ask(20)
    ticket = bench.ask(10)
    assert {low, ticket} == set(bench.client.queue.waiting)
    bench.world.look(bench.client, ticket)
    *_, line = bench.world.model.position(bench.client.sid, ticket, bench.world.wall_ms)
    kept = sum(amount for _, amount in line[14]) - bench.spent
    assert bench.spent + 10 <= 1000 < bench.spent + 10 + kept
    assert kept <= 90
