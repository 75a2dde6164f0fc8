"""Deployments, people and losses, on a real Valkey and a real PostgreSQL."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.clusters import FAST, copied
from tests.integration.policy.conftest import Member, Start
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.policy import rollout as keeping
from tidegate.policy.format import Plain, edit
from tidegate.policy.inspection import Control
from tidegate.policy.tenants import share_edit
from tidegate.store import tenants
from tidegate.store.records import ACTING, Acting, acting
from tidegate.store.requests import ActiveRequests
from tidegate.store.tenants import Tenants
from tidegate.telemetry.logging import Log


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keepers look every tenth of a second."""
    monkeypatch.setattr(keeping, "_WATCH_S", 0.1)
    monkeypatch.setattr(keeping, "_RETRY_S", 0.1)


def to(limit: int) -> Callable[[Plain], Plain]:
    return lambda plain: {**plain, "limits": {**plain["limits"], "kind:text_only": limit}}


async def in_force(limit: int, *members: Member) -> None:
    await wait_until(lambda: all(member.limit == limit for member in members), 20, f"{limit}")


async def recorded(member: Member, *expected: tuple[int, str, int]) -> None:
    async def is_so() -> bool:
        try:
            return await member.record() == list(expected)
        except StoreUnavailable:
            return False

    await wait_until(is_so, 20, f"a record of {expected}")


async def test_a_new_deployment_wins_everywhere_and_an_older_one_never(start: Start) -> None:
    old = await start(5)
    await recorded(old, (1, "deployment", 5))
    new = await start(7)
    await in_force(7, old, new)
    with capture_logs() as logs:
        older = await start(5)

        def conflict() -> dict[str, Any] | None:
            found = [line for line in logs if line["event"] == Log.LIMITS_CONFLICT]
            return dict(found[0]) if found else None

        told = await wait_until(conflict, 20, "the conflict in the log")
    assert told["differs"] == ["limits.kind:text_only: 7 -> 5"]
    assert told["revision"] == 2
    await in_force(7, old, new, older)
    await recorded(older, (1, "deployment", 5), (2, "deployment", 7))


async def test_what_is_set_live_is_in_force_everywhere_and_outlives_every_start(
    start: Start,
) -> None:
    one, other = await start(5), await start(5)
    await recorded(one, (1, "deployment", 5))
    changed = await one.keeper.change(to(3), set_by="ann", reason="the provider is ill")
    assert (changed.number, changed.set_by) == (2, "ann")
    await in_force(3, one, other)
    with capture_logs() as logs:
        same, unlike = await start(5), await start(9)
        for member in (same, unlike):
            await asyncio.wait_for(member.keeper.settled.wait(), 5)
    told = {tuple(line["differs"]): line for line in logs if "differs" in line}
    kept, ignored = (told[f"limits.kind:text_only: {change}",] for change in ("5 -> 3", "3 -> 9"))
    assert (kept["log_level"], kept["event"]) == ("info", Log.LIVE_LIMITS_KEPT)
    assert (ignored["log_level"], ignored["event"]) == ("warning", Log.LIMITS_CONFLICT)
    await in_force(3, same, unlike)
    newest = (await other.keeper.history(1))[0]
    assert (newest.set_by, newest.reason) == ("ann", "the provider is ill")
    await one.keeper.adopt_stated(set_by="ann")
    await in_force(5, one, other)
    await in_force(9, await start(9), one, other)


async def test_what_tenants_were_given_goes_on_through_deployments(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants, "_LIVE_KEPT", 2)
    one = await start(5)
    await recorded(one, (1, "deployment", 5))
    for weight in (2, 3, 4):
        edit = share_edit("acme", weight=weight, limits={"tenant:acme": weight})
        assert edit is not None
        await one.keeper.change(edit, set_by="ann")
    other = await start(7)
    await in_force(7, one, other)
    await one.keeper.change(to(3), set_by="ann")
    await in_force(3, one, other)
    await other.keeper.adopt_stated(set_by="ann")
    await in_force(7, one, other)
    assert (await start(5)).limit == 7, "it is older"
    for member in (one, other):
        assert member.limiter.policy.weights == {"acme": 4}
        assert member.limiter.policy.bound("tenant:acme") == 4
    # Of each deployment what it asks for, and what it came to last; the rest is pruned.
    kept = [(number, limit) for number, _, limit in await one.record()]
    assert kept == [(1, 5), (4, 5), (5, 7), (8, 7), (9, 7)]


async def test_a_file_takes_away_what_it_gave_a_tenant_beside_what_others_were_given(
    start: Start,
) -> None:
    one = await start(5, more={"tenant:acme": 3})
    await recorded(one, (1, "deployment", 5))
    edit = share_edit("other", weight=7)
    assert edit is not None
    await one.keeper.change(edit, set_by="ann")
    other = await start(6)
    await in_force(6, one, other)
    for member in (one, other):
        assert "tenant:acme" not in member.limiter.policy.limits
        assert member.limiter.policy.weights == {"other": 7}


async def test_of_many_that_start_at_once_with_one_new_policy_one_puts_it_on_record(
    start: Start,
) -> None:
    first = await start(5)
    await recorded(first, (1, "deployment", 5))
    many = await asyncio.gather(*(start(6, name=f"api-{n}") for n in range(8)))
    await in_force(6, first, *many)
    await recorded(first, (1, "deployment", 5), (2, "deployment", 6))


async def test_changes_at_once_are_all_on_record_and_the_last_is_in_force(start: Start) -> None:
    members = [await start(5) for _ in range(3)]
    await recorded(members[0], (1, "deployment", 5))
    await asyncio.gather(
        *(member.keeper.change(to(10 + n), set_by="ann") for n, member in enumerate(members))
    )
    record = await members[0].record()
    assert [number for number, *_ in record] == [1, 2, 3, 4]
    assert {limit for _, _, limit in record[1:]} == {10, 11, 12}
    await in_force(record[-1][2], *members)


async def test_an_empty_valkey_does_not_forget_what_was_set_live(
    start: Start, own_valkey: ValkeyServer
) -> None:
    member = await start(5, url=own_valkey.url)
    await recorded(member, (1, "deployment", 5))
    await member.keeper.change(to(3), set_by="ann")
    await in_force(3, member)
    member.keeping.cancel()
    await member.limiter.aclose()
    own_valkey.kill()
    own_valkey.start()
    again = await start(5, url=own_valkey.url)
    assert again.limit == 3
    await recorded(again, (1, "deployment", 5), (2, "live", 3))


def control_of(member: Member) -> Control:
    ACTING.set(Acting("someone", "admin", "a test"))
    connections = member.policies._connections
    return Control(member.keeper, ActiveRequests(connections), Tenants(connections))


async def paused(member: Member) -> dict[str, str]:
    views = (await member.limiter.snapshot()).limits
    return {name: one.paused_by for name, one in views.items() if one.paused_ms}


async def test_a_pause_by_a_person_goes_on_in_an_empty_valkey_until_it_is_over_or_resumed(
    start: Start, own_valkey: ValkeyServer
) -> None:
    names = ("model:for-ever", "model:an-hour", "model:over", "model:resumed", "model:shortened")
    member = await start(5, url=own_valkey.url, more=dict.fromkeys(names, 1))
    await recorded(member, (1, "deployment", 5))
    control = control_of(member)
    for name, for_ms in zip(names, (None, 3_600_000, 1, None, 3_600_000), strict=True):
        assert await control.pause(name, for_ms, by="ann", reason=name[6:])
    assert not await control.pause("model:shortened", 60_000, by="bob")
    assert await control.resume("model:resumed", by="bob")
    assert await control.pause("upstream:gone", None, by="ann", reason="of none")
    of_old = {"for_ms": None, "reason": "", "pool": member.limiter.pool}  # as before `by` was kept
    await control.tenants.actions.write("limit.pause", "kind:text_only", after=of_old)
    await member.limiter.penalise("kind:text_only", reason="a 429 of the provider")
    member.keeping.cancel()
    await member.limiter.aclose()
    own_valkey.kill()
    own_valkey.start()

    again = await start(5, url=own_valkey.url, more=dict.fromkeys(names, 1))
    await asyncio.wait_for(again.keeper.settled.wait(), 20)
    told = {
        "model:for-ever": "ann: for-ever",
        "model:an-hour": "ann: an-hour",
        "model:shortened": "ann: shortened",
        "upstream:gone": "ann: of none",
    }
    assert await paused(again) == told
    left = (await again.limiter.snapshot()).limits
    assert 3_000_000 < left["model:shortened"].paused_ms <= 3_600_000
    assert left["model:for-ever"].paused_ms > 366 * 86_400_000
    assert await control_of(again).resume("model:for-ever", by="bob")
    same = await start(5, url=own_valkey.url, more=dict.fromkeys(names, 1))
    await asyncio.wait_for(same.keeper.settled.wait(), 20)
    del told["model:for-ever"]
    assert await paused(same) == told


async def test_a_pause_that_is_resumed_while_it_is_restored_does_not_come_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = await start(5)
    await recorded(member, (1, "deployment", 5))
    control, penalise = control_of(member), Limiter.penalise
    await control.pause("kind:text_only", None, by="ann")

    async def late(limiter: Limiter, limit: str, **how: Any) -> bool:
        await control.resume(limit, by="bob")
        return await penalise(limiter, limit, **how)

    monkeypatch.setattr(Limiter, "penalise", late)
    again = await start(5)
    await asyncio.wait_for(again.keeper.settled.wait(), 20)
    assert await paused(again) == {}


async def test_a_change_that_changes_nothing_or_is_not_sound_leaves_no_trace(start: Start) -> None:
    member = await start(5)
    await recorded(member, (1, "deployment", 5))
    assert (await member.keeper.change(to(5), set_by="ann")).number == 1
    with pytest.raises(ConfigError):
        await member.keeper.change(to(-1), set_by="ann")
    await recorded(member, (1, "deployment", 5))


async def test_without_postgresql_limits_work_and_its_return_brings_what_is_on_record(
    start: Start, tmp_path: Path
) -> None:
    server = copied(tmp_path / "postgres", FAST, migrated=True)
    server.start()
    try:
        url = server.url()
        first = await start(5, database=url)
        await recorded(first, (1, "deployment", 5))
        await first.keeper.change(to(3), set_by="ann")
        server.stop()
        late = await asyncio.wait_for(start(8, database=url, within_s=300), 60)
        assert late.limit == 3  # as Valkey has it, without a wait for the record
        with pytest.raises(StoreUnavailable):
            await late.keeper.change(to(4), set_by="ann")
        server.start()
        await recorded(late, (1, "deployment", 5), (2, "live", 3))
        await in_force(3, first, late)
    finally:
        server.stop()


async def test_a_process_waits_for_a_slow_record_where_valkey_has_lost_the_limits(
    start: Start, own_valkey: ValkeyServer, tmp_path: Path
) -> None:
    server = copied(tmp_path / "postgres", FAST, migrated=True)
    server.start()
    try:
        of_both = {"url": own_valkey.url, "database": server.url()}
        first = await start(5, **of_both)
        await recorded(first, (1, "deployment", 5))
        await first.keeper.change(to(3), set_by="ann")
        first.keeping.cancel()
        await first.limiter.aclose()
        own_valkey.kill()
        own_valkey.start()
        server.pause()
        with capture_logs() as logs:
            starting = asyncio.ensure_future(start(5, **of_both, within_s=300))

            def is_slow() -> bool:
                found = [one for one in logs if one["event"] == Log.STORE_AWAY]
                return any("detail" in one for one in found) or starting.done()

            await wait_until(is_slow, 20, "a read of the record in vain")
        assert not starting.done()
        server.resume()
        assert (await starting).limit == 3
    finally:
        server.resume()
        server.stop()


async def test_a_process_starts_with_its_own_limits_where_no_server_has_any(start: Start) -> None:
    nowhere = "postgresql://127.0.0.1:1/nobody"
    alone = await asyncio.wait_for(start(5, database=nowhere, within_s=0.5), 60)
    assert alone.limit == 5


async def test_a_return_to_the_deployment_removes_no_limit_for_good(start: Start) -> None:
    """What answers report may be applied again, unless a person has removed it."""
    member = await start(5)
    await recorded(member, (1, "deployment", 5))

    async def change(edited: Callable[[Plain], Plain] | None) -> set[str]:
        with acting("ann", "admin", "a test"):
            if edited is None:
                await member.keeper.adopt_stated(set_by="ann")
            else:
                await member.keeper.change(edited, set_by="ann")
        return await member.keeper.removed_by_people(["tpm:m"])

    assert await change(edit({"tpm:m": 100})) == set()
    assert await change(None) == set()
    assert "tpm:m" not in member.limiter.policy.limits
    assert await change(edit({"tpm:m": 100})) == set()
    assert await change(edit({}, ["tpm:m"])) == {"tpm:m"}
    assert await change(edit({"kind:text_only": 9})) == {"tpm:m"}
    assert await change(None) == {"tpm:m"}, "a removal before it stands"


async def test_a_change_that_reached_the_record_alone_is_put_in_force_by_those_who_run(
    start: Start, own_valkey: ValkeyServer, valkey_url: str
) -> None:
    """As a command leaves it, whose process ended while Valkey was away."""
    running = await start(5)
    await recorded(running, (1, "deployment", 5))
    elsewhere = await start(5, url=own_valkey.url, name="cli")
    await elsewhere.keeper.change(to(2), set_by="ann")
    await in_force(2, running)


async def test_a_change_past_the_record_is_put_on_it(start: Start) -> None:
    member = await start(5)
    await recorded(member, (1, "deployment", 5))
    await member.limiter.set_policy(
        PoolPolicy({"kind:text_only": 4}, lease_ms=800, revision=2), by="bob"
    )
    await recorded(member, (1, "deployment", 5), (2, "live", 4))
    assert (await member.keeper.history(1))[0].set_by == "bob"
    await in_force(4, await start(9), member)
