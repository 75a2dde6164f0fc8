"""Whose turn comes, judged on the model alone: shares, bands, order, and that nobody starves.

What holds here holds for the Lua, which the other property test steps beside the model.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from tests.property.crowd import Crowd, bands_of, tenants_of
from tidegate.limiter import MAX_LEASE_MS, Band, FairBy, PoolPolicy, Rate
from tidegate.limiter.simulation import DUE_APART_MS, LEAST_USE, Paces, read_place

WEIGHTS = {"a": 1, "b": 2, "c": 4, "d": 8}


@pytest.mark.parametrize("processes", [1, 4])
@pytest.mark.parametrize("bound", [1, 5, 50])
def test_shares_follow_weights_within_a_twentieth(bound: int, processes: int) -> None:
    crowd = Crowd(PoolPolicy({"kind:x": bound}, weights=WEIGHTS), processes)
    for number, tenant in enumerate(WEIGHTS):
        for offset in range(2):
            process = crowd.processes[(number + offset) % processes]
            crowd.ask(process, tenant, "kind:x", times=bound + 10)
    crowd.run(4 * bound)
    shares = tenants_of(crowd.run(2000))
    for tenant, weight in WEIGHTS.items():
        assert shares[tenant] == pytest.approx(2000 * weight / 15, rel=0.05)


def test_shares_are_of_time_not_of_calls() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 4}))
    process = crowd.processes[0]
    crowd.ask(process, "short", "kind:x", took_ms=500, times=20)
    crowd.ask(process, "long", "kind:x", took_ms=1500, times=20)
    crowd.run(400)
    shares = tenants_of(crowd.run(2000))
    assert shares["short"] / shares["long"] == pytest.approx(3, rel=0.05)


def test_shares_may_be_of_calls() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 4}, fair_by="calls", weights={"long": 2}))
    process = crowd.processes[0]
    crowd.ask(process, "short", "kind:x", took_ms=500, times=20)
    crowd.ask(process, "long", "kind:x", took_ms=1500, times=20)
    crowd.run(400)
    shares = tenants_of(crowd.run(2000))
    assert shares["long"] / shares["short"] == pytest.approx(2, rel=0.01)


def test_shares_may_be_of_what_calls_cost_whatever_was_foreseen() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 4}, fair_by="cost"))
    process = crowd.processes[0]
    crowd.ask(process, "cheap", "kind:x", took_ms=1500, use=9000, cost=1000, times=20)
    crowd.ask(process, "dear", "kind:x", took_ms=500, use=500, cost=7000, times=20)
    crowd.run(400)
    shares = tenants_of(crowd.run(2000))
    assert shares["cheap"] / shares["dear"] == pytest.approx(7, rel=0.05)


def test_calls_that_cost_nothing_keep_nobody_waiting_for_ever() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 1}, fair_by="cost"))
    process = crowd.processes[0]
    crowd.ask(process, "fails", "kind:x", use=1000, cost=LEAST_USE, times=3)
    crowd.ask(process, "works", "kind:x", use=1000, cost=1000, times=3)
    crowd.run(20)
    assert tenants_of(crowd.run(1000))["works"] >= 9


def test_a_change_of_what_shares_are_measured_in_loses_no_waiter_and_starves_nobody() -> None:
    policy = PoolPolicy({"kind:x": 3})
    crowd = Crowd(policy, 2)
    process = crowd.processes[0]
    crowd.ask(process, "slow", "kind:x", took_ms=3000, use=100_000, cost=100_000, times=20)
    crowd.ask(process, "dear", "kind:x", took_ms=100, use=3_000_000, cost=3_000_000, times=20)
    ratios: dict[FairBy, float] = {"cost": 30, "calls": 1, "seconds": 1 / 30}
    for revision, (fair_by, ratio) in enumerate(ratios.items(), 2):
        waiting = list(process.waiting)
        crowd.change(replace(policy, fair_by=fair_by, revision=revision))
        assert list(process.waiting) == waiting
        assert min(tenants_of(crowd.run(70)).values()) >= 2
        crowd.run(300)
        shares = tenants_of(crowd.run(3100))
        assert shares["slow"] / shares["dear"] == pytest.approx(ratio, rel=0.05)


def test_lanes_that_share_a_limit_share_it_by_weight() -> None:
    policy = PoolPolicy({"kind:x": 8, "kind:y": 8, "pool:all": 4}, weights={"b": 3})
    crowd = Crowd(policy, 2)
    crowd.ask(crowd.processes[0], "a", "kind:x", "pool:all", times=20)
    crowd.ask(crowd.processes[1], "b", "kind:y", "pool:all", times=20)
    crowd.run(50)
    shares = tenants_of(crowd.run(2000))
    assert shares["b"] / shares["a"] == pytest.approx(3, rel=0.05)


def test_every_band_gets_its_least_share_and_the_highest_all_the_rest() -> None:
    bands = (Band("high"), Band("normal", min_share=0.1), Band("low", min_share=0.05))
    crowd = Crowd(PoolPolicy({"kind:x": 5}, bands=bands))
    for band in (1, 2, 3):
        crowd.ask(crowd.processes[0], "t", "kind:x", band=band, times=20)
    crowd.run(100)
    shares = bands_of(crowd.run(2000))
    assert 200 <= shares[2] <= 220
    assert 100 <= shares[3] <= 110


def test_a_band_without_a_least_share_waits_for_the_higher_ones() -> None:
    bands = (Band("high"), Band("low"))
    crowd = Crowd(PoolPolicy({"kind:x": 2}, bands=bands))
    process = crowd.processes[0]
    crowd.ask(process, "t", "kind:x", band=1, times=10)
    crowd.ask(process, "t", "kind:x", band=2, times=10)
    assert bands_of(crowd.run(300))[2] == 0


def test_headroom_is_kept_free_of_lower_bands() -> None:
    bands = (Band("high", headroom=0.4), Band("low"))
    crowd = Crowd(PoolPolicy({"kind:x": 5}, bands=bands))
    process = crowd.processes[0]
    crowd.ask(process, "t", "kind:x", band=2, times=10)
    assert len(crowd.running) == 3
    crowd.ask(process, "t", "kind:x", band=1, times=3)
    assert len(crowd.running) == 5
    assert bands_of(crowd.admitted[-2:]) == {1: 2}


def test_a_least_share_is_given_of_headroom_too_while_higher_bands_wait() -> None:
    """What is kept free of a band is for higher ones that come; while they wait they use it."""
    bands = (Band("high", headroom=0.2), Band("low", min_share=0.3), Band("lowest"))
    crowd = Crowd(PoolPolicy({"kind:x": 5}, bands=bands))
    process = crowd.processes[0]
    for band in (1, 2, 3):
        crowd.ask(process, "t", "kind:x", band=band, times=55)
    [call] = crowd.ask(process, "t", "kind:x", band=2)
    place = read_place(crowd.model.position(process.sid, call.ticket, crowd.now_ms))
    assert place is not None
    assert place.wait_ms == pytest.approx(56 * 1000 / 5 / 0.3, rel=0.3)
    admitted = bands_of(crowd.run(1000))
    assert admitted[2] == pytest.approx(300, abs=2)
    assert admitted[1] == 1000 - admitted[2], "none of the band without a share"


@pytest.mark.parametrize(
    ("fair_by", "wait_ms"), [("seconds", 300), ("calls", None), ("cost", None)]
)
def test_before_any_call_has_ended_a_wait_is_only_told_where_shares_are_of_time(
    fair_by: FairBy, wait_ms: int | None
) -> None:
    """What a call costs, in micro-dollars, is not how long it takes."""
    crowd = Crowd(PoolPolicy({"kind:x": 1}, fair_by=fair_by))
    process = crowd.processes[0]
    crowd.ask(process, "t", "kind:x", use=600)
    [call] = crowd.ask(process, "t", "kind:x", use=600)
    place = read_place(crowd.model.position(process.sid, call.ticket, crowd.now_ms))
    assert place is not None
    assert place.wait_ms == wait_ms


def test_a_call_that_needs_two_busy_limits_does_not_starve() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 3, "kind:y": 3}), 3)
    one, two, both = crowd.processes
    crowd.ask(one, "one", "kind:x", times=20)
    crowd.ask(two, "two", "kind:y", took_ms=700, times=20)
    crowd.ask(both, "both", "kind:x", "kind:y", times=5)
    for _ in range(20):
        assert tenants_of(crowd.run(100))["both"] >= 5


def test_what_is_kept_for_one_that_starves_is_free_when_it_gives_up() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 1, "kind:y": 1}), 3)
    one, two, both = crowd.processes
    crowd.ask(one, "one", "kind:x", times=3)
    crowd.ask(two, "two", "kind:y", times=3)
    [call] = crowd.ask(both, "both", "kind:x", "kind:y")
    while not crowd.model.queues.starving():
        crowd.end_one(ask_again=True)
    crowd.end_one()
    assert len(crowd.running) == 1  # the other half is kept for it
    crowd.cancel(both, call)
    assert len(crowd.running) == 2


def test_a_tenants_own_waiters_go_in_their_order_over_all_processes() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 1}), 3)
    crowd.ask(crowd.processes[0], "other", "kind:x", times=5)
    asked = [
        call.ticket
        for number in range(30)
        for call in crowd.ask(crowd.processes[number * 7 % 3], "own", "kind:x")
    ]
    calls = crowd.run(60)
    own = [call.ticket for call in calls if "|own|" in call.flow]
    assert own[:30] == asked


def test_the_earliest_deadline_of_a_tenant_comes_first_over_all_processes() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 1}), 3)
    crowd.ask(crowd.processes[0], "other", "kind:x")
    dues = [0, 60_000, 10_000, 0, 30_000, 700_000, 20_000, 10_000, 590_000, 601_000]
    calls = [
        crowd.ask(crowd.processes[number % 3], "own", "kind:x", due_ms=due_ms)[0]
        for number, due_ms in enumerate(dues)
    ]
    for _ in dues:
        crowd.end_one()
    order = [calls.index(call) for call in crowd.admitted[1:]]
    assert [dues[number] for number in order] == [
        *(10_000, 10_000, 20_000, 30_000, 60_000, 590_000, 0, 0, 601_000, 700_000)
    ]


@pytest.mark.parametrize("number", range(20))
def test_no_call_goes_behind_one_whose_deadline_is_clearly_later(number: int) -> None:
    random = Random(number)
    crowd = Crowd(PoolPolicy({"kind:x": 1, "kind:y": 5}, lease_ms=MAX_LEASE_MS), 3)
    crowd.ask(crowd.processes[0], "other", "kind:x")
    due_at: dict[int, int] = {}
    for _ in range(60):
        crowd.now_ms += random.choice([0, 1, 40, 300, 5000])
        due_ms = random.choice([0, 0, 20_000, random.randrange(1, 900_000)])
        process = random.choice(crowd.processes)
        lane = random.choice([("kind:x",), ("kind:x", "kind:y")])
        [call] = crowd.ask(process, "own", *lane, due_ms=due_ms)
        due_at[call.ticket] = crowd.now_ms + (due_ms or Paces().due_after_ms)
        if random.random() < 0.2:
            crowd.end_one()
            latest = due_at.pop(crowd.admitted[-1].ticket, 0)
            assert all(latest <= due + DUE_APART_MS for due in due_at.values())
    while due_at:
        crowd.end_one()
        latest = due_at.pop(crowd.admitted[-1].ticket)
        assert all(latest <= due + DUE_APART_MS for due in due_at.values())


def test_deadlines_gain_a_tenant_nothing_over_others() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 4}, weights={"patient": 2}), 2)
    for number in range(20):
        crowd.ask(crowd.processes[0], "hasty", "kind:x", due_ms=20_000 - 999 * number)
        crowd.ask(crowd.processes[1], "patient", "kind:x")
    crowd.run(100)
    shares = tenants_of(crowd.run(1500))
    assert shares["patient"] / shares["hasty"] == pytest.approx(2, rel=0.02)


def test_a_call_without_a_deadline_is_due_after_a_time() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 1}, lease_ms=MAX_LEASE_MS))
    process = crowd.processes[0]
    [first, patient] = crowd.ask(process, "own", "kind:x", times=2)
    began_ms = crowd.now_ms
    while patient not in crowd.admitted:
        crowd.ask(process, "own", "kind:x", due_ms=30_000)
        crowd.now_ms += 1000
        crowd.compare(process)
        crowd.end_one()
    assert Paces().due_after_ms - 31_000 <= crowd.now_ms - began_ms <= Paces().due_after_ms
    assert first in crowd.admitted


def test_deadlines_of_one_length_leave_the_order_as_it_is() -> None:
    """So permits go on being passed on within a process."""
    crowd = Crowd(PoolPolicy({"kind:x": 1}), 2)
    for number in range(40):
        crowd.now_ms += 30
        # What one process has to say comes a little later.
        late_ms = 20 * (number % 2)
        crowd.ask(crowd.processes[number % 2], "own", "kind:x", due_ms=30_000 - late_ms)
    for session in crowd.model.pool.sessions.values():
        for queue in session.queues.values():
            assert all(stamp % 1 == 0 for stamp in queue.tickets.values())


def test_who_was_idle_has_saved_up_nothing() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 4}), 2)
    busy, idle = crowd.processes
    crowd.ask(busy, "busy", "kind:x", times=20)
    crowd.run(1000)
    crowd.ask(idle, "idle", "kind:x", times=20)
    shares = tenants_of(crowd.run(100))
    assert 40 <= shares["idle"] <= 60


def test_who_asks_again_as_it_gives_back_does_not_pass_those_who_wait() -> None:
    crowd = Crowd(PoolPolicy({"kind:x": 2}), 2)
    busy, late = crowd.processes
    crowd.ask(busy, "busy", "kind:x", times=2)  # which never wait
    crowd.ask(late, "late", "kind:x", times=10)
    shares = tenants_of(crowd.run(40))
    assert 15 <= shares["late"] <= 25


def test_a_great_demand_is_not_passed_by_small_ones_for_ever() -> None:
    crowd = Crowd(PoolPolicy({"tpm:x": Rate(1000, 60_000, "tokens")}), 2)
    small, great = crowd.processes
    crowd.ask(small, "small", "tpm:x", amounts="100", times=8)
    [call] = crowd.ask(great, "great", "tpm:x", amounts="900")
    for _ in range(1000):
        if call in crowd.admitted:
            break
        crowd.now_ms += 1000
        crowd.ask(small, "small", "tpm:x", amounts="100")
        for process in crowd.processes:
            crowd.compare(process)
    assert call in crowd.admitted
    assert len(crowd.admitted) < 30


def _room_for_a_burst() -> tuple[Crowd, list[int]]:
    """Two processes whose calls have come in turn, as a whole window becomes free: the first one
    admits all that it may. Returns the tickets in their order."""
    limit = "rpm:x"
    crowd = Crowd(PoolPolicy({limit: Rate(20, window_ms=10_000, slack_ms=0)}), 2)
    crowd.ask(crowd.processes[0], "t", limit, times=20)
    calls = [crowd.ask(crowd.processes[n % 2], "t", limit)[0] for n in range(40)]
    crowd.admitted.clear()
    crowd.now_ms += 10_001
    for process in crowd.processes:  # as if they had renewed their lease all the while
        crowd.model.pool.sessions[process.sid].expiry = crowd.now_ms + crowd.policy.lease_ms
    crowd.compare(crowd.processes[0])
    return crowd, [call.ticket for call in calls]


def test_no_waiter_of_a_rate_is_passed_while_its_process_has_grants_to_acknowledge() -> None:
    crowd, tickets = _room_for_a_burst()
    assert len(crowd.admitted) == 17  # the second process may have eight that it has not confirmed
    crowd.compare(crowd.processes[1])
    crowd.compare(crowd.processes[0])
    assert sorted(call.ticket for call in crowd.admitted) == tickets[:20]


def test_a_process_that_confirms_no_grant_keeps_others_waiting_for_a_moment_only() -> None:
    crowd, tickets = _room_for_a_burst()
    crowd.now_ms += 100
    crowd.compare(crowd.processes[0])
    passed = [*tickets[:17], *tickets[18:24:2]]
    assert sorted(call.ticket for call in crowd.admitted) == passed
