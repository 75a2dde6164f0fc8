"""Many limits, many waiters, many permits held over: what a call reads, and what nobody forgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import redis

from tests.integration.limiter.slices import CLOCK, COUNTED, Pool, Process, stray_fields
from tidegate.limiter.messages import Join, load
from tidegate.limiter.model.state import Paces
from tidegate.limiter.policy import Limit, PoolPolicy, Rate
from tidegate.limiter.queue import MAX_FLOWS, MAX_FLOWS_IN_ALL, SpentHere
from tidegate.limiter.session import LOOKS_BESIDE, MAX_ASKS, MAX_LOOKS

LEASE_MS = 30_000
MANY = 2550  # many pages, the last of them not full


def many(tenants: int, revision: int = 1, first: int = 0) -> PoolPolicy:
    """Each tenant has a concurrency and a rate of its own."""
    limits: dict[str, int | Limit] = {"kind:text_only": 100_000}
    for number in range(first, first + tenants):
        limits[f"tenant:{number}"] = 1
        limits[f"rpm:{number}"] = Rate(60, 60_000)
    return PoolPolicy(limits, lease_ms=LEASE_MS, revision=revision)


Made = Callable[[PoolPolicy], Pool]


@pytest.fixture
def made(valkey_url: str, pool: str) -> Iterator[Made]:
    found: list[Pool] = []

    def make(policy: PoolPolicy) -> Pool:
        found.append(Pool(redis.Redis.from_url(valkey_url), pool, policy))
        return found[-1]

    yield make
    for each in found:
        each.close()


def settled(pool: Pool, count: int) -> list[Process]:
    """Processes that know each other, in a pool that lets in."""
    processes = [Process(pool) for _ in range(count)]
    for _ in range(4):
        for process in processes:
            process.compare()
        pool.pass_time(LEASE_MS // 3)
    for process in processes:
        process.compare()
    return processes


# In the place of the end of `sync`: how many of its parts were not built in this run.
_PARTS = b"""
redis.call('HSET', KEYS[1] .. ':testwork', 'parts', #T.later)
return T.reply(status)
"""


def test_an_ordinary_exchange_builds_only_the_parts_of_its_script_that_it_uses(
    made: Made,
) -> None:
    """To build all of them costs Valkey more than most exchanges themselves."""
    pool = made(PoolPolicy({"kind:text_only": 10}, lease_ms=LEASE_MS))
    [process] = settled(pool, 1)
    script = load("sync", clock=CLOCK)
    source = script.source.replace(b"local call = redis.call\n", COUNTED)
    assert source.count(b"return T.reply(status)") == 1
    source = source.replace(b"return T.reply(status)", _PARTS)
    pool.scripts["sync"] = pool.server.script_load(source)
    ordinary = len(script.header["later"].split()) - 4

    process.ask("a", "kind:text_only")
    work = process.say()
    [ticket] = process.queue.held
    assert pool.fields("u") == {"kind:text_only"}
    process.queue.release(
        ticket, outcome="success", actual="", now_ms=float(pool.now_ms), usage_later=False
    )
    pool.pass_time(1_000)  # so long no permit is kept for the next call
    work.append(process.exchange())
    assert [each["parts"] for each in work] == [ordinary, ordinary]
    assert not pool.fields("u")


def test_what_a_tend_reads_does_not_grow_with_the_limits_of_the_pool(made: Made) -> None:
    work = {}
    for tenants in (20, 1000):
        pool = made(many(tenants))
        [process] = settled(pool, 1)
        for number in range(20):
            process.ask(str(number), f"tenant:{number}", f"rpm:{number}")
        process.say()
        assert len(process.queue.held) == 20
        pool.pass_time(LEASE_MS // 3)
        [work[tenants]] = process.compare()
        pool.wipe()
    assert work[1000] == work[20]


def test_a_process_with_many_waiting_tenants_has_them_looked_at_some_by_some(made: Made) -> None:
    pool = made(many(1000))
    [process] = settled(pool, 1)
    for number in range(1000):
        for _ in range(2):
            process.ask(str(number), f"tenant:{number}")
    process.say()
    assert len(process.queue.waiting) == 1000
    pool.pass_time(LEASE_MS // 3)
    looks = process.compare()
    comparisons = math.ceil(1000 / MAX_ASKS)  # each asks after some, and has some looked at
    left = 1000 - comparisons * LOOKS_BESIDE
    assert len(looks) == comparisons + math.ceil(left / MAX_LOOKS)
    # Of the first call: what the session itself holds and where it waits is one answer.
    assert max(work["commands"] for work in looks) < 12 * MAX_LOOKS
    # All of them are looked at: a limit that somebody raises lets in everybody.
    assert len(process.queue.held) == 1000


def test_what_a_comparison_reads_does_not_grow_with_what_the_process_holds(made: Made) -> None:
    most = {}
    for tenants in (100, 1000):
        pool = made(many(1000))
        [process] = settled(pool, 1)
        for number in range(tenants):
            for _ in range(2):
                process.ask(str(number), f"tenant:{number}", f"rpm:{number}")
        process.say()
        process.compare()
        assert (len(process.queue.held), len(process.queue.waiting)) == (tenants, tenants)
        pool.pass_time(LEASE_MS // 3)
        work = process.compare()
        most[tenants] = max(each["elements"] for each in work)
        pool.wipe()
    assert most[1000] < 1.2 * most[100], most
    assert most[1000] < 1500, most


@pytest.mark.parametrize("tenants", [1, 7, 1000])
def test_all_that_was_admitted_without_an_answer_is_found_some_by_some(
    made: Made, tenants: int
) -> None:
    admitting = PoolPolicy({"kind:text_only": 1501}, lease_ms=LEASE_MS, revision=2)
    pool = made(replace(admitting, limits={"kind:text_only": 1}, revision=1))
    process, operator = settled(pool, 2)
    operator.ask("operator", "kind:text_only")
    operator.say()
    for number in range(1500):
        process.ask(f"t{number % tenants}", "kind:text_only")
    process.say()
    operator.session.set_policy(admitting, "operator")
    operator.say()
    while pool.field("u:kind:text_only") != "1501":
        process.session.refresh()
        process.exchange(lost=True)
    assert not process.queue.held
    work = process.say()
    assert len(process.queue.held) == 1500
    assert max(each["elements"] for each in work) < 1500
    assert process.queue.counts.strays == 0


def test_one_call_asks_for_some_tenants_and_the_next_for_others(made: Made) -> None:
    pool = made(many(1000))
    [process] = settled(pool, 1)
    for number in range(1000):
        process.ask(str(number), f"tenant:{number}", f"rpm:{number}")
    work = process.say()
    assert len(process.queue.held) == 1000
    assert max(each["commands"] for each in work) < 15 * MAX_FLOWS
    process.end(list(process.queue.held))
    assert pool.fields("u") == set()


def test_what_many_tenants_have_spent_is_known_to_all_when_valkey_loses_it(made: Made) -> None:
    pool = made(many(MANY))
    spender, survivor = settled(pool, 2)
    for number in range(MANY):
        spender.ask(str(number), f"rpm:{number}")
    spender.say()
    assert len(spender.queue.held) == MANY
    pool.pass_time(LEASE_MS // 3)
    work = survivor.compare()
    assert len(work) == math.ceil(MANY / Paces().on_page), "told in pages, one after another"
    assert all(each["elements"] < 900 for each in work)
    [quiet] = survivor.compare()
    assert quiet["elements"] < 700, "nothing is told twice"

    pool.lose_everything()  # and the spender is killed with it
    survivor.compare()
    survivor.say()
    pool.pass_time(LEASE_MS + 1)
    for number in (0, 1, 999, 1000, 1001, MANY - 1):
        assert pool.field(f"s:rpm:{number}") == "1"
    assert len(pool.fields("s")) == MANY


def test_of_rates_that_were_spent_long_ago_nothing_is_said_after_a_loss(made: Made) -> None:
    pool = made(many(200))
    spender, survivor = settled(pool, 2)
    for number in range(200):
        spender.ask(str(number), f"rpm:{number}")
    spender.say()
    survivor.compare()
    for _ in range(7):  # the window is over
        pool.pass_time(LEASE_MS // 3)
        survivor.session.lease.renewed(float(pool.now_ms), LEASE_MS)
        spender.compare()
    assert survivor.session.remembered.spent(SpentHere(), 0, float(pool.now_ms)) == []
    for _ in range(4):
        spender.compare()
    assert pool.fields("s") == set(), "what is spent no more is forgotten, some by some"


def test_more_permits_held_over_than_a_page_are_told_by_the_survivors(made: Made) -> None:
    pool = made(PoolPolicy({"kind:text_only": 3000}, lease_ms=LEASE_MS, on_expiry="hold"))
    dying, survivor = settled(pool, 2)
    for _ in range(3000):
        dying.ask("t", "kind:text_only", hard_ms=3_600_000)
    dying.say()
    assert len(dying.queue.held) == 3000
    for _ in range(4):
        pool.pass_time(LEASE_MS // 3)
        survivor.compare()
    assert pool.field("u:kind:text_only") == "3000", "held over"

    pool.lose_everything()
    survivor.compare()
    assert pool.field("u:kind:text_only") == "3000"
    pool.pass_time(LEASE_MS + 1)
    survivor.compare()
    survivor.ask("t", "kind:text_only")
    survivor.say()
    assert len(survivor.queue.held) == 0


def test_of_limits_that_are_taken_away_nothing_stays_in_the_record(made: Made) -> None:
    pool = made(many(10))
    [process] = settled(pool, 1)
    sizes = []
    for generation in range(4):
        first = 10 * generation
        process.session.set_policy(many(10, revision=2 + generation, first=first), "somebody")
        process.say()
        waiting = []
        for number in range(first, first + 10):
            for _ in range(2):
                waiting.append(process.ask(str(number), f"tenant:{number}", f"rpm:{number}"))
        process.say()
        pool.pass_time(100)
        process.end(list(process.queue.held))
        if generation % 2:  # somebody still waits and runs when the limits go
            process.session.set_policy(many(10, revision=3 + generation, first=first + 10), "me")
        process.say()
        for waiter in waiting:
            process.queue.abandon(waiter.ticket, float(pool.now_ms))
        process.end(list(process.queue.held))
        record = {
            k.decode(): v.decode(errors="replace")
            for k, v in pool.server.hgetall(pool.keys.meta).items()
        }
        assert stray_fields(record, {}, set(process.session.policy.limits)) == []
        sizes.append(len(record))
    assert sizes[2:] == sizes[:2]


def test_usage_is_kept_for_as_long_as_a_window_that_a_policy_makes_longer(made: Made) -> None:
    def policy(window_ms: int, revision: int) -> PoolPolicy:
        rates = {
            "rpm:x": Rate(5, window_ms),
            "tpm:x": Rate(100, window_ms, "tokens"),
            "tpm:y": Rate(100, window_ms, "tokens", shape="bucket"),
        }
        return PoolPolicy(rates, lease_ms=LEASE_MS, revision=revision)

    pool = made(policy(1000, 1))
    [process] = settled(pool, 1)
    waiter = process.ask("t", "rpm:x", "tpm:x", "tpm:y")
    process.say()
    assert waiter.future.done()
    process.session.set_policy(policy(3_600_000, 2), "somebody")
    process.say()
    # By the server's own clock, which is not the test's.
    for key in ("log:rpm:x", "rate:tpm:x", "rate:tpm:y"):
        assert pool.server.pttl(pool.keys.prefix + key) > 3_600_000 - 60_000


def test_a_clock_that_is_set_back_keeps_no_lower_band_waiting(made: Made) -> None:
    pool = made(PoolPolicy({"rpm:x": Rate(10, 60_000)}, lease_ms=LEASE_MS))
    [process] = settled(pool, 1)
    urgent = [process.ask("t", "rpm:x") for _ in range(11)]  # the last finds no room
    process.say()
    process.compare()
    for waiter in urgent:
        process.queue.abandon(waiter.ticket, float(pool.now_ms))
    process.say()
    pool.set_back(3_600_000)
    for _ in range(10):  # far longer than a lease and a window
        process.compare()
        pool.pass_time(LEASE_MS // 3)
    process.compare()
    waiter = process.ask("t", "rpm:x", band=2)
    process.say()
    assert waiter.future.done()


def test_a_change_of_one_limit_costs_no_work_at_the_others(made: Made) -> None:
    pool = made(many(1000))
    [process] = settled(pool, 1)
    changed = many(1000, revision=2)
    limits = {**changed.limits, "tenant:7": 2}
    process.session.set_policy(replace(changed, limits=limits), "somebody")
    work = process.say()
    assert max(each["commands"] for each in work) < 120
    assert max(each["elements"] for each in work) < 400
    assert pool.field("d:tenant:7").startswith("c|2|")
    assert pool.field("revision") == "2"


def test_a_change_of_a_policy_that_is_not_in_force_is_read_whole(made: Made) -> None:
    pool = made(many(3))
    [process] = settled(pool, 1)
    other = Process(pool)
    other.say()
    changed = many(3, revision=2)
    other.session.set_policy(replace(changed, limits={"tenant:0": 5}, weights={"a": 3}), "other")
    other.exchange()  # of which the process has not heard
    limits = {**changed.limits, "tenant:1": 9}
    process.session.set_policy(replace(changed, limits=limits, revision=3), "process")
    process.say()
    assert pool.field("d:tenant:0").startswith("c|1|")
    assert pool.field("d:tenant:1").startswith("c|9|")
    assert pool.fields("d") == set(limits)
    assert pool.fields("t") == set()

    fewer = replace(changed, limits={"tenant:1": 9, "rpm:1": 7}, weights={"b": 2}, revision=4)
    process.session.set_policy(fewer, "process")
    process.say()
    assert pool.fields("d") == set(fewer.limits)
    assert pool.field("d:rpm:1").startswith("c|7|")
    assert pool.fields("t") == {"b"}


def test_a_process_that_joins_has_a_policy_in_force_read_by_nobody(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = made(many(3))
    settled(pool, 1)
    fields = Join.as_fields

    def unreadable(join: Join) -> dict[str, Any]:
        packed = fields(join)
        assert isinstance(packed["policy"]["limits"], bytes), "unpacked with the request"
        packed["policy"] |= {"limits": b"\xc1", "weights": b"\xc1"}  # of no msgpack
        return packed

    monkeypatch.setattr(Join, "as_fields", unreadable)
    other = Process(pool)
    other.say()
    assert other.session.state == "up"


def test_usage_that_is_announced_and_never_told_is_bounded(made: Made) -> None:
    pool = made(PoolPolicy({"tpm:x": Rate(10_000_000, 60_000, "tokens")}, lease_ms=LEASE_MS))
    [process] = settled(pool, 1)
    for _ in range(14):
        for _ in range(250):
            process.ask("t", "tpm:x")
        process.say()
        process.end(list(process.queue.held), later=True)
    process.compare()
    owed = f"{pool.keys.prefix}owed:{process.session.sid}"
    assert pool.server.hlen(owed) == 2000
    newest = max(int(ticket) for ticket in pool.server.hkeys(owed))
    process.queue.settle_later(newest, "0")
    process.say()
    assert not pool.server.hexists(owed, newest), "what is told late still counts"


def test_a_record_of_before_tells_what_is_spent_and_paused_in_it(made: Made) -> None:
    pool = made(many(3))
    [process] = settled(pool, 1)
    process.ask("1", "rpm:1")
    process.say()
    end_ms = pool.now_ms + 600_000
    pool.server.hset(pool.keys.meta, "p:rpm:2", f"{end_ms}|10000|0|somebody: why")
    pool.server.hdel(pool.keys.meta, "changes", "s:rpm:1")
    pool.server.delete(f"{pool.keys.prefix}spending", f"{pool.keys.prefix}paused")
    other = Process(pool)
    other.compare()
    at_ms = float(pool.now_ms)
    [(name, amount, _, since)] = other.session.remembered.spent(SpentHere(), 0, at_ms)
    assert (name, amount, since) == ("rpm:1", 1, [])
    assert [name for name, *_ in other.session.remembered.paused(at_ms)] == ["rpm:2"]


def test_of_many_timers_that_are_due_a_call_handles_some(made: Made) -> None:
    rates = {f"rpm:{number}": Rate(1, 60_000) for number in range(200)}
    pool = made(PoolPolicy(rates, lease_ms=LEASE_MS))
    process, other = settled(pool, 2)
    for number in range(200):
        for _ in range(2):
            process.ask(str(number), f"rpm:{number}")
    process.say()
    assert (len(process.queue.held), len(process.queue.waiting)) == (200, 200)
    for _ in range(7):
        pool.pass_time(LEASE_MS // 3)
        work = process.compare() + other.compare()
    assert max(each["commands"] for each in work) < 500, "several of the 200 in one call"
    assert len(process.queue.held) == 400


def test_a_limit_that_is_raised_admits_some_in_a_call(made: Made) -> None:
    pool = made(PoolPolicy({"kind:text_only": 1}, lease_ms=LEASE_MS))
    process, operator = settled(pool, 2)
    for number in range(300):
        process.ask(f"t{number}", "kind:text_only")
    process.say()
    raised = PoolPolicy({"kind:text_only": 300}, lease_ms=LEASE_MS, revision=2)
    operator.session.set_policy(raised, "operator")
    work = operator.say()
    # No push reaches a process of this test: it takes grants in its own calls alone.
    assert pool.server.hget(f"{pool.keys.prefix}session:{process.session.sid}", "blocked")
    assert pool.server.zcard(f"{pool.keys.prefix}stalled:{process.session.sid}") > 200
    work += process.compare()
    assert len(process.queue.held) == 300
    assert max(each["commands"] for each in work) < 700
    assert not pool.server.exists(f"{pool.keys.prefix}stalled:{process.session.sid}")


def test_a_process_that_takes_no_grants_yet_does_not_ask_again_at_once(made: Made) -> None:
    """Of a process that nobody has told of yet, since one of those who should has died."""
    pool = made(PoolPolicy({"kind:text_only": 300}, lease_ms=LEASE_MS))
    settled(pool, 1)  # which says nothing from now on
    process = Process(pool)
    process.say()
    for number in range(40):
        process.ask(f"t{number}", "kind:text_only")
    assert len(process.say()) < 10, "calls, of which none admits"
    assert not process.queue.held
    assert len(process.compare()) < 10
    for _ in range(6):
        pool.pass_time(LEASE_MS // 3)
        process.compare()
    assert len(process.queue.held) == 40


def test_a_pool_is_shown_in_parts_of_a_bounded_work(made: Made) -> None:
    most = {}
    for tenants in (100, 1000):
        pool = made(many(tenants))
        process, other = settled(pool, 2)
        for number in range(tenants):
            for _ in range(2):
                process.ask(str(number), f"tenant:{number}", f"rpm:{number}")
        process.say()
        shown, parts = pool.inspect(permits=True)
        most[tenants] = max(each["commands"] for each in parts), len(parts)
        assert set(shown.limits) == set(many(tenants).limits)
        assert (len(shown.permits), len(shown.queues)) == (tenants, tenants)
        assert {one.sid for one in shown.processes} == {process.session.sid, other.session.sid}
        assert sum(one.held for one in shown.processes) == tenants
        assert shown.limits["tenant:7"].used == shown.limits["rpm:7"].used == 1
        assert shown.limits["tenant:7"].waiting == 1
        pool.wipe()
    assert most[1000][0] < 1.5 * most[100][0] < 800, most
    assert most[1000][1] > 20


def test_of_named_limits_it_is_shown_without_work_at_the_others(made: Made) -> None:
    pool = made(many(1000))
    [process] = settled(pool, 1)
    process.ask("7", "tenant:7", "rpm:7")
    process.say()
    shown, [work] = pool.inspect(limits=["tenant:7", "rpm:7", "tenant:8", "tenant:unheard-of"])
    used = {name: one.used for name, one in shown.limits.items()}
    assert used == {"tenant:7": 1, "rpm:7": 1, "tenant:8": 0}
    assert work["commands"] < 15


def test_a_call_says_of_some_flows_what_ended_and_what_begins(made: Made) -> None:
    pool = made(many(100))
    [process] = settled(pool, 1)
    for number in range(40):
        process.ask(str(number), f"tenant:{number}", f"rpm:{number}")
    process.say()
    for ticket in list(process.queue.held):
        process.queue.release(ticket, outcome="success", actual="", now_ms=float(pool.now_ms))
    for number in range(40, 80):
        process.ask(str(number), f"tenant:{number}", f"rpm:{number}")
    batch = process.queue.take()
    process.queue.restore(batch)
    flows = {one.flow for one in batch.enqueues} | {one.flow for one in batch.releases}
    assert len(flows) == MAX_FLOWS_IN_ALL
    work = process.say()
    assert len(process.queue.held) == 40
    assert max(each["commands"] for each in work) < 15 * MAX_FLOWS_IN_ALL


def test_processes_that_die_together_end_one_after_the_other(made: Made) -> None:
    pool = made(many(200))
    *dying, survivor = settled(pool, 6)
    for place, process in enumerate(dying):
        for number in range(40 * place, 40 * place + 40):
            for _ in range(2):
                process.ask(str(number), f"tenant:{number}")
        process.say()
    pool.pass_time(LEASE_MS + 1)
    survivor.session.lease.renewed(float(pool.now_ms), LEASE_MS)
    pool.server.zadd(f"{pool.keys.prefix}sessions", {survivor.session.sid: pool.now_ms + LEASE_MS})
    pool.server.hset(pool.keys.meta, "clock", pool.now_ms - 100)
    work = survivor.compare()
    assert pool.fields("u") == pool.fields("n") == set(), "nothing of them is left"
    assert len(work) >= len(dying), "one session at least of each call"
    assert max(each["commands"] for each in work) < 1500, "of 40 permits and 40 queues"
