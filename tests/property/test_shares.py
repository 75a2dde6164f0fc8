"""Shares of tenants in virtual time, for weights, lengths and costs of calls of all sorts.

The sessions and ledgers are the product's own; the pool is the model, which the other property test
steps beside the Lua.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.property.backlog import RAREST, Backlog, Tenant, random_backlog
from tests.property.server import Server
from tests.property.world import World
from tidegate.limiter import MEASURES_OF_SHARES, FairBy
from tidegate.limiter.simulation import Paces, SyncReply, SyncRequest
from tidegate.rehearse.simulation import START_MS

pytestmark = pytest.mark.slow

# Cases, and calls of all tenants together in each; `chaos/` has 100 of each, and of more calls.
CASES = {"seconds": 40, "calls": 12, "cost": 12}
CALLS = {"seconds": 1000, "calls": 2000, "cost": 2000}
CHUNKS = 4


@pytest.mark.parametrize("hand_off", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Tenant(1, 115), Tenant(1, 185)),
        (Tenant(1000, 10), Tenant(600, 10)),
        (Tenant(1000, 20), Tenant(700, 20)),
        (Tenant(1, 5.4), Tenant(1, 5.6)),
        (Tenant(218, 17), Tenant(42, 56)),
    ],
)
def test_shares_are_of_what_calls_really_take(
    one: Tenant, other: Tenant, processes: int, hand_off: bool
) -> None:
    crowd = Backlog({"one": one, "other": other}, 5, processes=processes, hand_off=hand_off)
    assert all(abs(share - 1) < 0.05 for share in crowd.shares(calls=300).values())


class OnValkey(Backlog):
    """With the real Lua beside the model, compared at each answer."""

    def __init__(
        self, server: Server, tenants: dict[str, Tenant], *, hand_off: bool, fair_by: FairBy
    ) -> None:
        super().__init__(tenants, 5, hand_off=hand_off, fair_by=fair_by)
        self.world = World(server, self.policy, Paces())
        self.model = self.world.model

    def exchange(
        self, request: SyncRequest, *, tend: bool, answered: Callable[[SyncReply], None]
    ) -> None:
        def arrived() -> None:
            self.world.advance(START_MS + int(self.now_ms) - int(self.world.wall_ms))
            reply = self.world.call(request, tend=tend)
            self.after(0.3, lambda: answered(reply))

        self.after(0.3, arrived)


@pytest.mark.parametrize("hand_off", [True, False])
@pytest.mark.parametrize("fair_by", MEASURES_OF_SHARES)
def test_the_lua_shares_as_the_model_does(server: Server, hand_off: bool, fair_by: FairBy) -> None:
    tenants = {"one": Tenant(1000, 115, cost_usd=0.03), "other": Tenant(600, 185)}
    crowd = OnValkey(server, tenants, hand_off=hand_off, fair_by=fair_by)
    try:
        assert all(abs(share - 1) < 0.05 for share in crowd.shares(calls=120).values())
    finally:
        crowd.world.close()


def test_a_single_caller_of_long_calls_waits_for_no_more_than_it_uses() -> None:
    tenants = {"long": Tenant(1, 5000, callers=1), "short": Tenant(1, 50)}
    crowd = Backlog(tenants, 4, hand_off=True)
    shares = crowd.shares(calls=10)
    assert shares["long"] == pytest.approx(0.5, rel=0.05)  # one of its two permits, all the time


@pytest.mark.parametrize("hand_off", [True, False])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("fair_by", ["calls", "cost"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Tenant(1, 20, cost_usd=0.1), Tenant(1, 400, cost_usd=0.01)),
        (Tenant(1000, 115, cost_usd=0.01), Tenant(600, 185, cost_usd=0.02)),
        (Tenant(3, 20, cost_usd=0.0002), Tenant(5, 10, cost_usd=0.0008)),
    ],
)
def test_shares_are_of_calls_or_of_what_they_cost(
    one: Tenant, other: Tenant, fair_by: FairBy, processes: int, hand_off: bool
) -> None:
    tenants = {"one": one, "other": other}
    crowd = Backlog(tenants, 5, processes=processes, hand_off=hand_off, fair_by=fair_by)
    assert all(abs(share - 1) < 0.05 for share in crowd.shares(calls=300).values())


@pytest.mark.slow
@pytest.mark.parametrize("fair_by", MEASURES_OF_SHARES)
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_shares_are_exact_for_random_weights_and_calls(chunk: int, fair_by: FairBy) -> None:
    calls = CALLS[fair_by]
    for number in range(chunk, CASES[fair_by], CHUNKS):
        shares = random_backlog(number, fair_by).shares(calls=calls // RAREST, together=calls)
        assert all(abs(share - 1) < 0.05 for share in shares.values()), (number, shares)
