"""The books of budgets in PostgreSQL, stepped beside a model in plain Python."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from random import Random
from uuid import UUID

import asyncpg
import pytest

from tests.waiting import wait_until
from tidegate.call import UNKNOWN_CHARGE, CallCost, Caller, Charge, Usage, UsageState, new_id
from tidegate.errors import (
    BudgetExceeded,
    BudgetPaused,
    BudgetReserved,
    BudgetUnbounded,
    ConfigError,
    NotFound,
    QuotaExceeded,
    StoreUnavailable,
)
from tidegate.prices.budgets import Binding, Budget, amount_text, tenants_budget
from tidegate.prices.reconciliation import DoubtfulCall, ModelDay, UsageSum, compared
from tidegate.store import budgets as module
from tidegate.store import notifications
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections, sql
from tidegate.store.provider.settlements import settle_holds
from tidegate.store.retention import Whose
from tidegate.store.store import Store

ACME, OTHER = Caller("acme", "k1"), Caller("other", "k2")
_WAITING = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND wait_event_type = 'Lock'
"""
DAY = Budget("day", "usd", 1_000, "day", tenant="acme")


def cost(micros: int | None, tokens: int | None = 0) -> CallCost:
    return CallCost(micros, tokens, micros or 0, tokens or 0, "the request has no max_tokens")


def told(micros: int, tokens: int = 0) -> Charge:
    return Charge(UsageState.TOLD, Usage(output_tokens=tokens), None, micros)


def cut(micros: int | None) -> Charge:
    return Charge(UsageState.ESTIMATED, Usage(), None, micros)


@pytest.fixture
async def connections(database_url: str) -> AsyncIterator[Connections]:
    made = Connections(database_url, patience_ms=60_000)  # through a stall of the machine
    yield made
    await made.aclose()


@pytest.fixture
def budgets(connections: Connections) -> Budgets:
    return Budgets(connections, instance_id="one")


async def held_by(budgets: Budgets, caller: Caller, micros: int, model: str = "m") -> UUID:
    bindings = budgets.binding(caller, model)
    assert bindings
    return await budgets.reserve(bindings, new_id(), cost(micros))


async def with_budgets(budgets: Budgets, *given: Budget) -> None:
    for one in given:
        await budgets.records.set(one, by="test")
    await budgets.refresh()


@dataclass
class Book:
    """A book of the model."""

    amount: int
    spent: int = 0
    estimated: int = 0
    held: int = 0


@dataclass
class Books:
    """All books of the model, and what is held of them by id."""

    budgets: list[Budget]
    books: dict[tuple[str, str], Book] = field(default_factory=dict)
    holds: dict[UUID, list[tuple[Binding, int]]] = field(default_factory=dict)
    kept: dict[UUID, list[tuple[Binding, int]]] = field(default_factory=dict)

    def book(self, binding: Binding) -> Book:
        key = (binding.budget.name, binding.scope)
        return self.books.setdefault(key, Book(binding.budget.amount))

    def reserve(self, hold: UUID, bindings: tuple[Binding, ...], given: CallCost) -> str | None:
        why = None
        for one in bindings:
            book, need = self.book(one), one.budget.need(given)
            if book.spent + need > book.amount:
                why = "spent"
            elif why is None and book.spent + book.held + need > book.amount:
                why = "held"
        if why is None:
            self.holds[hold] = [(one, one.budget.need(given)) for one in bindings]
            for one, need in self.holds[hold]:
                self.book(one).held += need
        return why

    def settle(self, hold: UUID, charge: Charge) -> None:
        doubt = charge.state is not UsageState.TOLD
        for one, need in self.holds.pop(hold):
            book = self.book(one)
            paid = charge.cost_micros if one.budget.unit == "usd" else charge.tokens
            pays = need if paid is None else paid
            if doubt and one.budget.doubt == "bound":
                pays = max(pays, need)
            if doubt:
                self.kept.setdefault(hold, []).append((one, pays))
            book.held -= need
            book.spent += pays
            book.estimated += pays if doubt else 0

    def correct(self, hold: UUID, charge: Charge) -> None:
        for one, was in self.kept.pop(hold):
            paid = charge.cost_micros if one.budget.unit == "usd" else charge.tokens
            book = self.book(one)
            book.spent += (paid or 0) - was
            book.estimated -= was

    def seen(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        return {
            key: (one.spent, one.estimated, one.held)
            for key, one in self.books.items()
            if one.spent or one.estimated or one.held
        }


@pytest.mark.parametrize("seed", range(4))
async def test_the_books_are_those_of_the_model(
    budgets: Budgets, database_url: str, seed: int
) -> None:
    random = Random(seed)
    rules = [
        DAY,
        Budget("all", "usd", 2_500, "month"),
        Budget("each", "tokens", 600, "week", each=("tenant", "key"), zone="Europe/Berlin"),
        Budget("soft", "usd", 900, "day", model="m*", doubt="estimate", each=("key",)),
    ]
    await with_budgets(budgets, *rules)
    model = Books(rules)
    for _ in range(100):
        step = random.random()
        if step < 0.55 or not model.holds:
            caller, name = random.choice((ACME, OTHER)), random.choice(("m1", "other"))
            given = cost(random.randrange(200), random.randrange(80))
            bindings = budgets.binding(caller, name)
            try:
                hold = await budgets.reserve(bindings, new_id(), given)
                why = None
            except QuotaExceeded as refused:
                why = "held" if isinstance(refused, BudgetReserved) else "spent"
                hold = new_id()
            assert model.reserve(hold, bindings, given) == why
        elif step < 0.9:
            hold = random.choice(list(model.holds))
            need = model.holds[hold][0][1]
            state = random.choice((UsageState.TOLD, UsageState.TOLD, UsageState.PARTIAL))
            micros = random.choice((None, need // 2)) if state is UsageState.PARTIAL else need
            charge = Charge(state, Usage(output_tokens=random.randrange(80)), None, micros)
            budgets.settle(hold, charge)
            await budgets.flush()
            model.settle(hold, charge)
        elif model.kept:
            hold = random.choice(list(model.kept))
            true = told(random.randrange(50), random.randrange(20))
            budgets.settle(hold, true)
            await budgets.flush()
            model.correct(hold, true)
            budgets._refusals.clear()  # what reconciliation does by a new revision
        assert await seen(database_url) == model.seen()
    assert budgets.held == len(model.holds)


async def seen(url: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT budget, scope, sum(spent)::bigint AS spent, sum(held)::bigint AS held,"
            " sum(estimated)::bigint AS estimated FROM budget_books GROUP BY 1, 2"
        )
    finally:
        await connection.close()
    return {
        (row["budget"], row["scope"]): (row["spent"], row["estimated"], row["held"])
        for row in rows
        if row["spent"] or row["estimated"] or row["held"]
    }


async def test_of_two_hundred_at_once_in_two_processes_those_that_fit_are_admitted(
    database_url: str,
) -> None:
    sides = [Connections(database_url, patience_ms=60_000) for _ in range(2)]
    processes = [Budgets(one, instance_id=f"p{n}") for n, one in enumerate(sides)]
    await processes[0].records.set(DAY, by="test")
    await processes[0].records.set(Budget("wide", "usd", 100_000, "month"), by="test")
    for one in processes:
        await one.refresh()

    async def ask(place: int) -> bool:
        try:
            await held_by(processes[place % 2], ACME, 37)
        except BudgetReserved:
            return False
        return True

    done = await asyncio.gather(*(ask(place) for place in range(200)))
    assert sum(done) == 1_000 // 37
    assert (await seen(database_url))["day", ""] == (0, 0, 37 * (1_000 // 37))
    for one in processes:
        for hold in list(one._open):
            one.settle(hold, told(10))
        await one.flush()
        assert one.held == 0
    spent = 10 * (1_000 // 37)
    assert await seen(database_url) == {("day", ""): (spent, 0, 0), ("wide", ""): (spent, 0, 0)}
    for side in sides:
        await side.aclose()


async def test_a_call_that_one_of_its_budgets_refuses_holds_nothing_of_the_others(
    budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, DAY, Budget("all", "usd", 90, "month"))
    with pytest.raises(BudgetExceeded, match=r"all .*\$0\.00 of \$0\.00009 spent") as refused:
        await held_by(budgets, ACME, 100)
    assert refused.value.limit == "all"
    assert refused.value.retry_after_ms is None  # no month has room for as much
    assert await seen(database_url) == {}
    assert budgets.held == 0


async def test_what_a_dead_process_holds_stays_charged_until_it_is_corrected(
    budgets: Budgets, connections: Connections, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_budgets(budgets, DAY)
    dead = Budgets(connections, instance_id="dead")
    await dead.refresh()
    hold = await held_by(dead, ACME, 400)
    assert await budgets.charge_orphans() == 0  # it was heard of a moment ago
    monkeypatch.setattr(module, "DEAD_AFTER_S", -1.0)
    assert await budgets.charge_orphans() == 1
    assert await seen(database_url) == {("day", ""): (400, 400, 0)}
    with pytest.raises(BudgetExceeded):
        await held_by(budgets, ACME, 601)
    assert await budgets.charge_orphans() == 0
    # It was not dead, or its record is found: what it really cost.
    dead.settle(hold, told(30))
    await dead.flush()
    assert await seen(database_url) == {("day", ""): (30, 0, 0)}
    await budgets.refresh()
    await held_by(budgets, ACME, 601)  # the refusal is not remembered
    monkeypatch.undo()
    before = await dead.records.revision()
    dead.settle(await held_by(dead, ACME, 1), told(1))
    await dead.flush()
    assert await dead.records.revision() == before, "no change of which others have to know"


async def test_of_a_budget_that_takes_estimates_what_is_unknown_stays_charged_in_either_unit(
    budgets: Budgets, connections: Connections, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dead process, and of an answer that could not be read: as what was expected of it."""
    taken = [tenants_budget("acme", f"budget_day_{one}", 900) for one in ("money", "tokens")]
    await with_budgets(budgets, *taken)
    dead = Budgets(connections, instance_id="dead")
    await dead.refresh()
    await dead.reserve(dead.binding(ACME, "m"), new_id(), cost(400, 300))
    monkeypatch.setattr(module, "DEAD_AFTER_S", -1.0)
    assert await budgets.charge_orphans() == 1
    money, tokens = ("acme/budget_day_money", ""), ("acme/budget_day_tokens", "")
    assert await seen(database_url) == {money: (400, 400, 0), tokens: (300, 300, 0)}
    hold = await budgets.reserve(budgets.binding(ACME, "m"), new_id(), cost(40, 30))
    budgets.settle(hold, UNKNOWN_CHARGE)
    await budgets.flush()
    assert await seen(database_url) == {money: (440, 440, 0), tokens: (330, 330, 0)}


async def test_an_estimate_is_corrected_by_what_a_request_has_cost(
    budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, DAY, Budget("t", "tokens", 500, "day"))
    request = new_id()
    for _ in range(2):  # tries
        hold = await budgets.reserve(budgets.binding(ACME, "m"), request, cost(100, 50))
        budgets.settle(hold, cut(5))
    await budgets.flush()
    assert await seen(database_url) == {("day", ""): (200, 200, 0), ("t", ""): (100, 100, 0)}
    assert await budgets.records.correct(request, micros=17, tokens=9) == 4
    assert await seen(database_url) == {("day", ""): (17, 0, 0), ("t", ""): (9, 0, 0)}
    assert await budgets.records.correct(request, micros=17, tokens=9) == 0


@pytest.mark.parametrize("theirs", [5, 8])
async def test_a_cut_call_whose_charge_the_provider_confirms_is_no_longer_charged_its_bound(
    store: Store, budgets: Budgets, database_url: str, theirs: int
) -> None:
    """Alone, where all is equal, and beside another whose charge is corrected."""
    await with_budgets(budgets, DAY)
    calls = []
    for charged in (5, 0)[: 1 if theirs == 5 else 2]:
        request = new_id()
        hold = await budgets.reserve(budgets.binding(ACME, "m"), request, cost(100))
        budgets.settle(hold, cut(charged))
        calls.append(DoubtfulCall(request, "partial", 9, 1, charged, weight=5 if charged else 3))
    await budgets.flush()
    held = 100 * len(calls)
    assert await seen(database_url) == {("day", ""): (held, held, 0)}
    ours = {"m": ModelDay(doubtful=tuple(calls))}
    found = compared(ours, {"m": UsageSum(len(calls), 9, 0, 0, 1, 0, theirs)}, {})
    assert found[0].verdict == ("equal" if theirs == 5 else "explained")
    for _ in range(2):
        await store.reconciliations.keep("oai", "openai", date(2026, 11, 24), found)
        # A charge that is not on record can't be corrected, and its reservation stays.
        left = 100 * (len(calls) - 1)
        assert await seen(database_url) == {("day", ""): (5 + left, left, 0)}


async def test_an_erased_person_has_no_book(
    store: Store, budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, Budget("s", "usd", 900, "day", each=("tenant", "subject")))
    for caller in (ACME, OTHER):
        for subject in ("ann", "bob", None):
            bindings = budgets.binding(caller, "m", subject)
            budgets.settle(await budgets.reserve(bindings, new_id(), cost(5)), told(5))
    await budgets.flush()
    await store.retention.erase(Whose("acme", "ann"), dry_run=False, within_s=20)
    assert sorted(scope for _, scope in await seen(database_url)) == [
        '["acme", "bob"]',
        '["acme", null]',
        '["other", "ann"]',
        '["other", "bob"]',
        '["other", null]',
    ]


async def test_reservations_that_wait_for_an_erasure_are_bound_by_the_budget(
    budgets: Budgets, connections: Connections, database_url: str
) -> None:
    other = Budgets(connections, instance_id="two")
    await with_budgets(budgets, Budget("s", "usd", 10, "day", each=("subject",)))
    await other.refresh()
    bindings = budgets.binding(ACME, "m", "ann")
    budgets.settle(await budgets.reserve(bindings, new_id(), cost(1)), told(1))
    await budgets.flush()
    eraser = await asyncpg.connect(database_url)

    async def both_wait() -> bool:
        return bool(await connections.run(lambda one: one.fetchval(_WAITING)) == 2)

    erasure = eraser.transaction()
    await erasure.start()
    try:
        for name in ("lock_books_of_erased", "forget_books_of_erased"):
            await eraser.execute(sql(name), None, "ann")
        waiting = asyncio.gather(
            budgets.reserve(bindings, new_id(), cost(9)),
            other.reserve(bindings, new_id(), cost(9)),
            return_exceptions=True,
        )
        await wait_until(both_wait)
        await erasure.commit()
        results = await waiting
    finally:
        await eraser.close()
    assert sorted(type(one).__name__ for one in results) == ["BudgetReserved", "UUID"]
    assert await seen(database_url) == {("s", '["ann"]'): (0, 0, 9)}


async def named(url: str) -> set[tuple[str, str, str]]:
    """What there is of each person: books, what is held of them, pauses and alerts."""
    connection = await asyncpg.connect(url)
    try:
        rows = await connection.fetch(
            "SELECT 'book', budget, scope FROM budget_books"
            " UNION SELECT 'hold', budget, scope FROM budget_holds"
            " UNION SELECT 'pause', budget, scope FROM budget_pauses"
            " UNION SELECT 'alert', data->>'budget', data->>'scope' FROM alerts"
        )
    finally:
        await connection.close()
    return {tuple(row) for row in rows if row[2]}


@pytest.mark.parametrize(
    ("whose", "left"),
    [
        (Whose("acme", "ann"), {'["bob"]', '["acme", "bob"]', '["other", "ann"]'}),
        (Whose(None, "ann"), {'["bob"]', '["acme", "bob"]'}),
        (Whose("acme"), {'["other", "ann"]'}),
    ],
)
async def test_nothing_of_a_budget_names_a_person_who_was_erased(
    store: Store, budgets: Budgets, database_url: str, whose: Whose, left: set[str]
) -> None:
    people = Budget(
        "p", "usd", 100, "day", tenant="acme", each=("subject",), at_end="pause", alerts=(50,)
    )
    everybody = Budget("all", "usd", 9_000, "day", alerts=(1,))
    each = Budget("e", "usd", 900, "rolling", window_s=3_600, each=("tenant", "subject"))
    await with_budgets(budgets, people, everybody, each)
    running = []
    for caller, subject in ((ACME, "ann"), (ACME, "bob"), (OTHER, "ann")):
        bindings = budgets.binding(caller, "m", subject)
        running.append(await budgets.reserve(bindings, new_id(), cost(1)))
        budgets.settle(await budgets.reserve(bindings, new_id(), cost(99)), cut(99))
        await budgets.flush()
        if caller == ACME:
            with pytest.raises(BudgetPaused):
                await budgets.reserve(bindings, new_id(), cost(50))
    of_ann = {what for what, _, scope in await named(database_url) if "ann" in scope}
    assert of_ann == {"book", "hold", "pause", "alert"}
    await store.retention.erase(whose, dry_run=False, within_s=20)
    for hold in running:  # a running call that ends has no book to write
        budgets.settle(hold, cut(1))
    await budgets.flush()
    assert {scope for _, _, scope in await named(database_url)} == left
    assert (await seen(database_url))["all", ""] == (300, 300, 0)


async def test_a_settlement_that_is_written_twice_counts_once(
    budgets: Budgets, connections: Connections, database_url: str
) -> None:
    await with_budgets(budgets, DAY)
    hold = await held_by(budgets, ACME, 400)
    budgets.settle(hold, cut(90))
    for _ in range(2):
        await connections.run(
            lambda connection: settle_holds(
                connection, [one for found in budgets._pending.values() for _, one in found]
            )
        )
    assert await seen(database_url) == {("day", ""): (400, 400, 0)}


async def test_settlements_that_two_flushes_write_at_a_time_count_once(
    budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, DAY)
    request = new_id()
    for _ in range(3):  # tries
        hold = await budgets.reserve(budgets.binding(ACME, "m"), request, cost(100))
        budgets.settle(hold, told(100))
    await asyncio.gather(budgets.flush(), budgets.flush(), budgets.aclose())
    assert await seen(database_url) == {("day", ""): (300, 0, 0)}
    assert budgets.held == 0


async def test_a_cancelled_reservation_holds_nothing(budgets: Budgets, database_url: str) -> None:
    await with_budgets(budgets, DAY)
    for _ in range(20):
        task = asyncio.create_task(held_by(budgets, ACME, 400))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await budgets._reservations.aclose()
    await asyncio.sleep(0)
    await budgets.flush()
    assert await seen(database_url) == {}
    assert budgets.held == 0


async def test_a_refusal_that_is_remembered_holds_up_no_pause(connections: Connections) -> None:
    now = 0.0
    one = Budgets(connections, instance_id="one", clock=lambda: now)
    other = Budgets(connections, instance_id="other")
    await with_budgets(one, Budget("p", "usd", 100, "day", at_end="pause"))
    await other.refresh()
    one.settle(await held_by(one, ACME, 60), told(60))
    await one.flush()
    with pytest.raises(BudgetExceeded):
        await held_by(one, ACME, 50)
    other.settle(await held_by(other, ACME, 40), told(40))
    await other.flush()
    now = 1.0
    with pytest.raises(BudgetPaused):
        await held_by(one, ACME, 50)


async def test_a_process_reports_that_it_lives_after_its_machine_was_suspended(
    budgets: Budgets, connections: Connections, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_budgets(budgets, DAY)
    before = await held_by(budgets, ACME, 1)
    await connections.run(
        lambda one: one.execute("UPDATE budget_instances SET seen_at = now() - interval '1 hour'")
    )
    awake = notifications._now
    monkeypatch.setattr(
        notifications, "_now", lambda: awake() + 3_600
    )  # time.monotonic stands still
    after = await held_by(budgets, ACME, 2)
    rows = "SELECT count(*) FROM budget_instances WHERE seen_at > now() - interval '1 minute'"
    assert await connections.run(lambda one: one.fetchval(rows)) == 1, "else it counts as dead"
    assert before in budgets._overdue, "it may have been charged as a dead process's"
    assert after not in budgets._overdue


async def test_a_refusal_from_before_a_change_is_not_remembered_after_it(
    budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    await with_budgets(budgets, DAY)
    written = budgets._written

    async def changed_meanwhile(asked: bytes) -> list[asyncpg.Record]:
        rows = await written(asked)
        await with_budgets(budgets, replace(DAY, amount=5_000))
        return rows

    monkeypatch.setattr(budgets, "_written", changed_meanwhile)
    with pytest.raises(BudgetExceeded):
        await held_by(budgets, ACME, 1_001)
    monkeypatch.undo()
    assert await held_by(budgets, ACME, 1_001)


async def test_a_budget_that_pauses_goes_on_when_a_person_says_so(
    budgets: Budgets, database_url: str
) -> None:
    """One call that needed more than what was left of it paused it for all."""
    paused = Budget("p", "usd", 100, "day", at_end="pause", each=("tenant",))
    await with_budgets(budgets, paused)
    for too_much in (101, 500):
        with pytest.raises(BudgetExceeded, match=r"budget p of acme has no room for this call"):
            await held_by(budgets, ACME, too_much)
    await budgets.check(ACME)
    for micros, left in ((98, 2), (1, 1)):  # what fits still does
        budgets.settle(await held_by(budgets, ACME, micros), told(micros))
        await budgets.flush()
        assert (await budgets.records.books("p", '["acme"]'))[0].spent == 100 - left
    with pytest.raises(BudgetPaused, match=r"budget p of acme is paused .*a person must resume it"):
        await held_by(budgets, ACME, 2)
    with pytest.raises(BudgetPaused):  # whatever it needs
        await held_by(budgets, ACME, 1)
    with pytest.raises(BudgetPaused):
        await budgets.check(ACME)
    await held_by(budgets, OTHER, 100)
    assert await budgets.records.resume("p", scope=None, extra=20, by="test") == [
        '["acme"]',
        '["other"]',
    ]
    await budgets.refresh()
    assert (await held_by(budgets, ACME, 21)) is not None
    with pytest.raises(NotFound):
        await budgets.records.resume("q", scope=None, extra=0, by="test")
    connection = await asyncpg.connect(database_url)
    kinds = await connection.fetch("SELECT kind, data->>'scope' AS scope FROM alerts")
    await connection.close()
    assert [(row["kind"], row["scope"]) for row in kinds] == [("budget_paused", '["acme"]')]


async def test_what_a_rolling_budget_is_allowed_more_ends_with_its_window(
    budgets: Budgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Budget("short", "usd", 100, "rolling", window_s=1)
    long = Budget("long", "usd", 100, "rolling", window_s=3_600)
    await with_budgets(budgets, short, long)
    budgets.settle(await held_by(budgets, ACME, 1), told(1))
    await budgets.flush()

    async def amounts() -> list[int]:
        books = [await budgets.records.books(one.name) for one in (short, long)]
        return [book.amount for (book,) in books]

    for one in (short, long):
        more = await budgets.records.resume(one.name, scope=None, extra=20, by="test")
        assert more == [""]
    assert await amounts() == [120, 120]

    async def is_over() -> bool:
        return (await amounts())[0] == 100

    monkeypatch.setattr(module, "_EXTRAS_EVERY_S", 0.0)
    running = asyncio.create_task(budgets.run())
    try:
        await wait_until(is_over, 10, "the end of the window")
    finally:
        running.cancel()
    assert await amounts() == [100, 120]
    await budgets.records.resume(long.name, scope=None, extra=5, by="test")
    await budgets.end_extras()
    assert await amounts() == [100, 125]


@pytest.mark.parametrize("scope", ["", '["acme"]'])
async def test_what_a_person_allows_before_the_first_call_of_a_period_is_there_for_it(
    budgets: Budgets, scope: str
) -> None:
    each = Budget("day", "usd", 100, "day", each=("tenant",) if scope else ())
    await with_budgets(budgets, each)
    for given in (scope or None, scope):
        assert await budgets.records.resume("day", scope=given, extra=50, by="test") == [scope]
    with pytest.raises(NotFound, match="the budget day has no amount for"):
        await budgets.records.resume("day", scope='["acme", "ann"]', extra=50, by="test")
    await budgets.refresh()
    await held_by(budgets, ACME, 200)
    with pytest.raises(BudgetReserved):
        await held_by(budgets, ACME, 1)


async def test_shares_are_told_once_each(budgets: Budgets, database_url: str) -> None:
    await with_budgets(budgets, Budget("s", "usd", 1_000, "day", alerts=(50, 80, 100)))
    for micros in (400, 150, 10, 300, 140):
        budgets.settle(await held_by(budgets, ACME, micros), told(micros))
        await budgets.flush()
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            await held_by(budgets, ACME, 1)
        budgets._refusals.clear()
    connection = await asyncpg.connect(database_url)
    rows = await connection.fetch(
        "SELECT kind, (data->>'share')::integer AS share, (data->>'spent')::integer AS spent"
        " FROM alerts ORDER BY created_at"
    )
    await connection.close()
    assert [tuple(row) for row in rows] == [
        ("budget_share", 50, 550),
        ("budget_share", 80, 860),
        ("budget_share", 100, 1_000),
        ("budget_out", None, 1_000),
    ]


async def test_shares_are_told_after_a_call_that_never_fits_too(
    budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, Budget("s", "usd", 1_000, "day", alerts=(20, 80)))
    budgets.settle(await held_by(budgets, ACME, 250), told(250))
    await budgets.flush()
    for _ in range(2):
        with pytest.raises(BudgetExceeded):
            await held_by(budgets, ACME, 5_000)
        budgets._refusals.clear()
    for _ in range(2):
        budgets.settle(await held_by(budgets, ACME, 300), told(300))
        await budgets.flush()
    with pytest.raises(BudgetExceeded):
        await held_by(budgets, ACME, 200)
    connection = await asyncpg.connect(database_url)
    rows = await connection.fetch(
        "SELECT kind, (data->>'share')::integer AS share FROM alerts ORDER BY created_at"
    )
    await connection.close()
    assert [tuple(row) for row in rows] == [
        ("budget_share", 20),
        ("budget_out", None),
        ("budget_share", 80),
    ]


async def test_a_rolling_budget_frees_what_has_left_its_window(
    budgets: Budgets, database_url: str
) -> None:
    await with_budgets(budgets, Budget("r", "usd", 100, "rolling", window_s=600))
    budgets.settle(await held_by(budgets, ACME, 60), told(60))
    await budgets.flush()
    with pytest.raises(BudgetExceeded) as refused:
        await held_by(budgets, ACME, 50)
    assert refused.value.retry_after_ms is not None
    assert 590_000 < refused.value.retry_after_ms <= 620_000
    await held_by(budgets, ACME, 40)
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "UPDATE budget_books SET period = period - interval '700 s' WHERE period > '-infinity'"
    )
    await connection.close()
    budgets._refusals.clear()
    await held_by(budgets, ACME, 60)


async def test_alerts_of_a_rolling_budget_begin_again_once_little_of_it_is_used(
    budgets: Budgets, database_url: str
) -> None:
    rule = Budget("r", "usd", 1_000, "rolling", window_s=600, alerts=(50, 90))
    await with_budgets(budgets, rule)
    connection = await asyncpg.connect(database_url)

    async def spend(*amounts: int) -> list[tuple[str, int | None]]:
        for one in amounts:
            budgets.settle(await held_by(budgets, ACME, one), told(one))
            await budgets.flush()
        rows = await connection.fetch(
            "DELETE FROM alerts RETURNING kind, (data->>'share')::integer AS share"
        )
        return [tuple(row) for row in rows]

    async def leave_window(but_for: int) -> None:
        await connection.execute(
            "UPDATE budget_books SET period = period - interval '700 s' WHERE period > '-infinity'"
        )
        budgets._refusals.clear()
        if but_for:
            await connection.execute(
                "INSERT INTO budget_books (budget, scope, period, spent)"
                " VALUES ('r', '', budget_span(600, now()), $1)",
                but_for,
            )

    assert await spend(400) == []
    assert await spend(150, 10) == [("budget_share", 50)]
    assert await spend(400) == [("budget_share", 90)]
    with pytest.raises(BudgetExceeded):
        await held_by(budgets, ACME, 100)
    assert await spend() == [("budget_out", None)]
    # At 45 % it is not calm yet, at 30 % it is: below four fifths of its lowest share.
    await leave_window(450)
    assert await spend(100) == []
    await leave_window(300)
    assert await spend(300) == [("budget_share", 50)]
    await connection.close()


async def test_many_reservations_are_decided_together_and_alone_as_the_model_says(
    budgets: Budgets, database_url: str
) -> None:
    """Concurrently, so that one message has several: all fit, one does not, some are repeated."""
    await with_budgets(budgets, DAY, Budget("all", "usd", 2_000, "month"))
    held = await asyncio.gather(*(held_by(budgets, ACME, 90) for _ in range(10)))
    assert (await seen(database_url))["day", ""] == (0, 0, 900)
    results = await asyncio.gather(
        *(held_by(budgets, ACME, one) for one in (60, 60, 40)),
        *(held_by(budgets, OTHER, 100) for _ in range(3)),
        return_exceptions=True,
    )
    assert [isinstance(one, BudgetReserved) for one in results] == [False, True, False] + [
        False
    ] * 3
    books = await seen(database_url)
    assert (books["day", ""], books["all", ""]) == ((0, 0, 1_000), (0, 0, 1_300))
    for one in (*held, *(one for one in results if isinstance(one, UUID))):
        budgets.settle(one, told(1))
    await budgets.flush()
    assert (await seen(database_url))["all", ""] == (15, 0, 0)


async def test_a_call_without_a_bound_is_refused_unless_estimates_are_taken(
    budgets: Budgets,
) -> None:
    await with_budgets(budgets, DAY)
    bindings = budgets.binding(ACME, "m")
    with pytest.raises(BudgetUnbounded, match="the request has no max_tokens"):
        await budgets.reserve(bindings, new_id(), CallCost(None, 5, 10, 5, cost(1).unknown))
    soft = [Binding(Budget("s", "usd", 15, "day", doubt="estimate"), "")]
    assert soft[0].budget.need(CallCost(None, 5, 10, 5)) == 10


async def test_a_new_budget_begins_with_what_its_period_has_on_record(
    budgets: Budgets, database_url: str
) -> None:
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "INSERT INTO usage_days (tenant_id, day, model, pool, cost_micros) VALUES"
        " ('acme', (now() AT TIME ZONE 'UTC')::date, 'm-1', 'gemini', 300),"
        " ('acme', (now() AT TIME ZONE 'UTC')::date, 'x', 'gemini', 7),"
        " ('other', (now() AT TIME ZONE 'UTC')::date, 'm-1', 'gemini', 40)"
    )
    await connection.execute(
        "INSERT INTO audit (id, created_at, request_id, tenant_id, pool, source, status, kind,"
        " classified_by, classified_reason, priority, attempts, lapses, instance_id, submitted_at,"
        " finished_at, queue_ms, upstream_ms, key_id, subject, cost_micros, model)"
        " VALUES (gen_random_uuid(), now(), gen_random_uuid(), 'acme', 'gemini', 'relay',"
        " 'succeeded', 'text_only', 'body', '', 0, 1, 0, 'i', now(), now(), 0, 0, 'k1', 'ann', 55,"
        " 'm-1')"
    )
    await connection.close()
    await with_budgets(
        budgets,
        Budget("all", "usd", 1_000, "month"),
        Budget("acme-m", "usd", 1_000, "day", tenant="acme", model="m-*"),
        Budget("tenants", "usd", 1_000, "day", each=("tenant",)),
        Budget("people", "usd", 1_000, "week", zone="Asia/Tokyo", each=("tenant", "subject")),
        Budget("lately", "usd", 1_000, "rolling", window_s=3_600, key="k1"),
    )
    assert {key: spent for key, (spent, *_) in (await seen(database_url)).items()} == {
        ("all", ""): 347,
        ("acme-m", ""): 300,
        ("tenants", '["acme"]'): 307,
        ("tenants", '["other"]'): 40,
        ("people", '["acme", "ann"]'): 55,
        ("lately", ""): 55,
    }


async def test_a_start_in_an_outage_knows_the_budgets_that_the_host_read_last(
    connections: Connections, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    before = Budgets(connections, instance_id="before", folder=folder)
    await with_budgets(before, DAY, Budget("e", "tokens", 5, "week", each=("subject",)))
    nowhere = Connections("postgresql://nobody@127.0.0.1:1/nothing")
    started = Budgets(nowhere, instance_id="started", folder=folder)
    assert started.any
    await started.known()
    assert [one.budget.name for one in started.binding(ACME, "m")] == ["day", "e"]
    with pytest.raises(StoreUnavailable):
        await held_by(started, ACME, 1)
    for other in (tmp_path / "other", None):
        unknown = Budgets(nowhere, instance_id="unknown", folder=other)
        with pytest.raises(StoreUnavailable):
            await unknown.known()
    await nowhere.aclose()


async def test_a_change_is_seen_and_a_removed_budget_binds_no_one(budgets: Budgets) -> None:
    await with_budgets(budgets, DAY)
    assert [one.budget.name for one in budgets.binding(ACME, "m")] == ["day"]
    assert budgets.binding(OTHER, "m") == ()
    hold = await held_by(budgets, ACME, 900)
    await with_budgets(budgets, Budget("day", "usd", 2_000, "day", tenant="acme"))
    await held_by(budgets, ACME, 1_000)
    (book,) = await budgets.records.books("day")
    assert (book.amount, book.spent, book.held) == (2_000, 0, 1_900)
    await budgets.records.remove("day", by="test")
    await budgets.refresh()
    assert not budgets.any
    budgets.settle(hold, told(5))
    await budgets.flush()
    assert await budgets.records.books() == []
    with pytest.raises(NotFound):
        await budgets.records.remove("day", by="test")


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (Budget("", "usd", 1, "day"), "name"),
        (Budget("a", "usd", -1, "day"), "amount"),
        (Budget("a", "usd", 1, "day", zone="Mars"), "zone"),
        (Budget("a", "usd", 1, "rolling"), "window_s"),
        (Budget("a", "usd", 1, "day", window_s=5), "window_s"),
        (Budget("a", "usd", 1, "day", at_end="fall_back"), "fallback"),
        (Budget("a", "usd", 1, "day", tenant="x", each=("tenant",)), "each"),
        (Budget("a", "usd", 1, "day", alerts=(0,)), "alerts"),
    ],
)
async def test_what_a_budget_can_not_be_names_its_field(
    budgets: Budgets, wrong: Budget, field: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        await budgets.records.set(wrong, by="test")
    assert refused.value.variable == field


@pytest.mark.parametrize(
    ("micros", "shown"),
    [
        (790_000, "$0.79"),
        (1, "$0.000001"),
        (12_000_000, "$12.00"),
        (0, "$0.00"),
        (-5_500, "-$0.0055"),
        # Half up, as on the page.
        (15_000, "$0.02"),
        (995_000, "$1.00"),
        (-1_234_565_000, "-$1,234.57"),
    ],
)
def test_money_is_shown_as_dollars(micros: int, shown: str) -> None:
    assert amount_text("usd", micros) == shown


async def test_what_is_kept_for_an_outage_is_for_its_user_alone(
    connections: Connections, tmp_path: Path
) -> None:
    here = Budgets(connections, instance_id="one", folder=tmp_path)
    await with_budgets(here, DAY)
    assert (tmp_path / "budgets.json").stat().st_mode & 0o777 == 0o600
