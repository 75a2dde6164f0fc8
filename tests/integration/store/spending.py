"""Random calls under random budgets, on PostgreSQL, with a clock that the test sets.

Judged by a plain list of what was reserved and charged, and by the calendar of `zoneinfo`: nothing
here is taken from the statements of budgets.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Self
from uuid import UUID
from zoneinfo import ZoneInfo

import asyncpg
import pytest

from tidegate.call import CallCost, Caller, Charge, Usage, UsageState, new_id
from tidegate.errors import (
    BudgetExceeded,
    BudgetPaused,
    BudgetReserved,
    BudgetUnbounded,
    NotFound,
    QuotaExceeded,
)
from tidegate.prices import budgets as prices_budgets
from tidegate.prices.budgets import Binding, Budget, scope_text, scope_values
from tidegate.store import budgets as store_budgets
from tidegate.store.budgets import Budgets
from tidegate.store.database import Connections

# In a schema before `pg_catalog`: what the statements and functions of budgets then call.
_CLOCK = """
CREATE SCHEMA clock;
CREATE TABLE clock.time (at timestamptz NOT NULL);
INSERT INTO clock.time VALUES ('2000-01-01');
CREATE FUNCTION clock.now() RETURNS timestamptz STABLE LANGUAGE sql AS 'SELECT at FROM clock.time';
ALTER TABLE budget_holds ALTER held_at SET DEFAULT clock.now();
ALTER TABLE budget_instances ALTER seen_at SET DEFAULT clock.now();
ALTER TABLE budget_pauses ALTER since SET DEFAULT clock.now();
"""
_PATH = "search_path=clock,pg_catalog,public"
SILENT = timedelta(seconds=31)
TENANTS, KEYS, MODELS, PEOPLE = ("a", "b"), ("k1", "k2"), ("big-1", "big-2", "small"), ("p", None)
# Shortly before ends of periods: of a year, of months with 28 to 31 days, of daylight saving time.
STARTS = (
    ("2027-12-31T20:00", "UTC"),
    ("2028-02-28T22:00", "Europe/Berlin"),
    ("2028-02-29T03:00", "America/New_York"),
    ("2027-02-28T18:00", "Asia/Kathmandu"),
    ("2026-03-28T21:00", "Europe/Berlin"),
    ("2026-10-24T20:00", "Europe/Berlin"),
    ("2026-10-24T22:30", "Atlantic/Azores"),
    ("2026-03-28T23:30", "Atlantic/Azores"),
    ("2026-11-01T03:10", "America/Havana"),
    ("2026-03-08T04:10", "America/Havana"),
    ("2026-04-23T20:30", "Africa/Cairo"),
    ("2026-10-29T20:30", "Africa/Cairo"),
    ("2026-09-06T03:00", "America/Santiago"),
    ("2026-04-05T02:00", "America/Santiago"),
    ("2026-04-04T12:00", "Australia/Lord_Howe"),
    ("2026-07-31T09:30", "Pacific/Kiritimati"),
    ("2026-03-08T02:00", "America/New_York"),
)
WINDOWS_S = (1, 59, 60, 90, 3_600, 5 * 3_600, 86_400)


Scope = tuple[str | None, ...]


class Clock:
    """The time of PostgreSQL, of both modules of budgets, and of every process."""

    def __init__(self, connection: asyncpg.Connection, at: datetime) -> None:
        self._connection = connection
        self.at = at

    def seconds(self) -> float:
        return self.at.timestamp()

    async def set(self, at: datetime) -> None:
        self.at = at
        await self._connection.execute("UPDATE clock.time SET at = $1", at)

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = self

        class Now(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Self:
                return clock.at.astimezone(tz)  # type: ignore[return-value]

        for module in (prices_budgets, store_budgets):
            monkeypatch.setattr(module, "datetime", Now)


def first_instant(day: datetime, zone: ZoneInfo) -> datetime:
    """Return when the calendar of `zone` first shows the date of `day`, a local time."""
    local = datetime(day.year, day.month, day.day, tzinfo=zone)
    at = local.astimezone(UTC) - timedelta(hours=3)
    while at.astimezone(zone).date() < local.date():
        at += timedelta(minutes=15)
    return at


def period_of(budget: Budget, at: datetime) -> tuple[datetime, datetime]:
    """Return the start and the end of the calendar period in which `at` is."""
    zone = ZoneInfo(budget.zone)
    first = at.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0, tzinfo=None)
    if budget.period == "week":
        first -= timedelta(days=first.weekday())
        last = first + timedelta(days=7)
    elif budget.period == "month":
        first = first.replace(day=1)
        last = (first + timedelta(days=32)).replace(day=1)
    else:
        last = first + timedelta(days=1)
    return first_instant(first, zone), first_instant(last, zone)


@dataclass
class Entry:
    """What a call reserves of a budget, then costs."""

    budget: str
    scope: Scope
    need: int
    at: datetime
    paid: int | None = None
    is_estimate: bool = False
    paid_at: datetime | None = None


@dataclass
class Call:
    hold: UUID
    request_id: UUID
    process: int
    cost: CallCost
    entries: list[Entry]
    is_open: bool = True
    can_correct: bool = False


@dataclass
class Ask:
    """A call that asks for room, and the answer."""

    process: int
    cost: CallCost
    binds: list[tuple[Budget, Scope]]
    bindings: tuple[Binding, ...]
    request_id: UUID
    hold: UUID | None = None
    refused: QuotaExceeded | None = None

    @property
    def needs(self) -> dict[str, int]:
        cost = self.cost
        micros, tokens = cost.most_micros, cost.most_tokens
        if micros is None or tokens is None:
            micros, tokens = cost.likely_micros, cost.likely_tokens
        return {one.name: micros if one.unit == "usd" else tokens for one, _ in self.binds}


@dataclass
class Extra:
    budget: str
    scope: Scope
    at: datetime
    amount: int


@dataclass
class Ledger:
    """The plain list."""

    budgets: dict[str, Budget] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    paused: set[tuple[str, Scope]] = field(default_factory=set)

    def resume(self, budget: Budget, scope: Scope, at: datetime, extra: int) -> None:
        self.paused.discard((budget.name, scope))
        if extra:
            self.extras.append(Extra(budget.name, scope, at, extra))

    def binding(self, call: dict[str, str | None]) -> Iterator[tuple[Budget, Scope]]:
        for one in self.budgets.values():
            named = {"tenant": one.tenant, "key": one.key, "subject": one.subject}
            if any(value not in (None, call[name]) for name, value in named.items()):
                continue
            model = call["model"] or ""
            if one.model is not None and not model.startswith(one.model.rstrip("*")):
                continue
            yield one, tuple(call[name] for name in one.each)

    def counts(self, budget: Budget, when: datetime | None, at: datetime) -> bool:
        """Whether what was spent `when` counts `at` that time."""
        if when is None:
            return False
        if budget.window_s is None:
            return period_of(budget, when)[0] == period_of(budget, at)[0]
        step = max(1, budget.window_s // 60)
        span = math.floor(when.timestamp() / step) * step
        counts = at.timestamp() < span + step + budget.window_s
        age = (at - when).total_seconds()
        assert counts or age > budget.window_s
        assert not counts or age <= budget.window_s + step
        return counts

    def of(self, budget: Budget, scope: Scope) -> list[Entry]:
        return [one for one in self.entries if (one.budget, one.scope) == (budget.name, scope)]

    def spent(self, budget: Budget, scope: Scope, at: datetime) -> tuple[int, int]:
        """Return what is spent, and how much of it is an estimate."""
        found = [
            one
            for one in self.of(budget, scope)
            if one.paid is not None
            and self.counts(budget, one.at if budget.window_s is None else one.paid_at, at)
        ]
        estimates = sum(one.paid or 0 for one in found if one.is_estimate)
        return sum(one.paid or 0 for one in found), estimates

    def held(self, budget: Budget, scope: Scope, at: datetime) -> int:
        return sum(
            one.need
            for one in self.of(budget, scope)
            if one.paid is None and (budget.window_s is not None or self.counts(budget, one.at, at))
        )

    def amount(self, budget: Budget, scope: Scope, at: datetime) -> int:
        return budget.amount + sum(
            one.amount
            for one in self.extras
            if (one.budget, one.scope) == (budget.name, scope) and self.counts(budget, one.at, at)
        )


def random_budget(random: Random, name: str, zone: str) -> Budget:
    period: Any = random.choice(("day", "week", "month", "rolling", "rolling"))
    tenant, key = random.choice((None, None, None, "a")), random.choice((None, None, None, "k1"))
    subject = random.choice((None, None, None, "p"))
    free: list[Any] = [
        one
        for one, named in (("tenant", tenant), ("key", key), ("subject", subject))
        if named is None and random.random() < 0.2
    ]
    if "subject" in free and tenant is key is None and "tenant" not in free:
        free.insert(0, "tenant")
    at_end: Any = random.choice(("refuse", "refuse", "pause", "fall_back"))
    return Budget(
        name,
        random.choice(("usd", "usd", "tokens")),
        random.choice((0, 150, 300, 300, 700, 1_500)),
        period,
        tenant=tenant,
        key=key,
        model=random.choice((None, None, "big*", "small")),
        subject=subject,
        each=tuple(free),
        zone="UTC" if period == "rolling" else random.choice((zone, zone, "UTC")),
        window_s=random.choice(WINDOWS_S) if period == "rolling" else None,
        at_end=at_end,
        fallback="small" if at_end == "fall_back" else None,
        doubt=random.choice(("bound", "bound", "estimate")),
        alerts=random.choice(((), (50, 80, 100))),
    )


class Spending:
    """See the module."""

    def __init__(self, url: str, seed: int) -> None:
        self.random = Random(seed)
        self.url = f"{url}{'&' if '?' in url else '?'}{_PATH}"
        self.ledger = Ledger()
        self.calls: list[Call] = []
        self.steps: list[str] = []
        self.refused = self.admitted = 0
        self._names = 0
        self._refusals: dict[tuple[int, str, Scope], datetime] = {}

    async def start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._admin = await asyncpg.connect(self.url)
        if not await self._admin.fetchval("SELECT to_regclass('clock.time') IS NOT NULL"):
            await self._admin.execute(_CLOCK)
        text, self._zone = self.random.choice(STARTS)
        start = datetime.fromisoformat(text).replace(tzinfo=UTC)
        self.clock = Clock(self._admin, start)
        self.clock.patch(monkeypatch)
        await self.clock.set(start + timedelta(seconds=self.random.randrange(3_600)))
        self._connections = [Connections(self.url) for _ in range(2)]
        self.processes = [self._process(place) for place in range(2)]
        self._current = list(range(2))
        for _ in range(self.random.randint(2, 4)):
            await self._add_budget()

    async def aclose(self) -> None:
        for one in self._connections:
            await one.aclose()
        await self._admin.close()

    def _process(self, place: int) -> Budgets:
        self._names += 1
        return Budgets(
            self._connections[place], instance_id=f"i{self._names}", clock=self.clock.seconds
        )

    async def play(self, steps: int) -> None:
        choices = (
            [self._ask] * 10 + [self._end] * 7 + [self._pass] * 3
            + [self._kill, self._change, self._resume, self._correct, self._cross, self._burst]
        )  # fmt: skip
        for _ in range(steps):
            await self._see()
            await self.random.choice(choices)()
            await self._judge()
        for one in self.calls:
            if one.is_open:
                await self._settle(one)
        await self._judge()
        assert sum(one.held for one in self.processes) == 0

    async def _see(self) -> None:
        for one in self.processes:
            await one.refresh()
            if one.held:
                await one._renew_holds()
            await one.end_extras()
            if self.random.random() < 0.05:
                await one.forget_books()

    # Steps

    async def _add_budget(self) -> None:
        name = self.random.choice("mnopqr") + str(len(self.ledger.budgets))
        budget = random_budget(self.random, name, self._zone)
        self.steps.append(f"add {budget}")
        await self.processes[0].records.set(budget, by="test")
        self.ledger.budgets[name] = budget

    async def _change(self) -> None:
        if len(self.ledger.budgets) < 5 and not self.calls:
            await self._add_budget()
            return
        budget = self.random.choice(list(self.ledger.budgets.values()))
        changed = replace(budget, amount=self.random.choice((100, 300, 1_000)))
        self.steps.append(f"amount of {budget.name} {changed.amount}")
        await self.processes[0].records.set(changed, by="test")
        self.ledger.budgets[budget.name] = changed

    async def _resume(self) -> None:
        budget = self.random.choice(list(self.ledger.budgets.values()))
        scopes = {one.scope for one in self.ledger.of(budget, ())} | {
            one.scope for one in self.ledger.entries if one.budget == budget.name
        }
        if not scopes:
            return
        scope, extra = (
            self.random.choice(sorted(scopes, key=repr)),
            self.random.choice((0, 100, 400)),
        )
        self.steps.append(f"resume {budget.name} {scope} {extra}")
        text = scope_text(scope)
        with suppress(NotFound):  # of a scope whose book was deleted, as nothing was spent
            await self.processes[0].records.resume(budget.name, scope=text, extra=extra, by="test")
            self.ledger.resume(budget, scope, self.clock.at, extra)

    async def _pass(self) -> None:
        jump = self.random.choice((0.4, 1, 7, 40, 600, 3_000, 20_000))
        await self._to(self.clock.at + timedelta(seconds=jump * self.random.uniform(0.5, 1.5)))

    async def _cross(self) -> None:
        """Go to just before, to, or just after the end of a period."""
        budget = self.random.choice(list(self.ledger.budgets.values()))
        if budget.window_s is not None:
            await self._pass()
            return
        end = period_of(budget, self.clock.at)[1]
        if end - self.clock.at > timedelta(days=2):
            await self._to(self.clock.at + timedelta(days=1))
            return
        by = self.random.choice((-1, -0.001, 0, 0.001, 60))
        if (at := end + timedelta(seconds=by)) > self.clock.at:
            await self._to(at)

    async def _to(self, at: datetime) -> None:
        self.steps.append(f"time {at}")
        silent = at - self.clock.at
        await self.clock.set(at)
        if silent > SILENT and any(one.held for one in self.processes):
            for one in self.processes:  # both were alive meanwhile
                one._renewed_at = self.clock.seconds()
                await self._admin.execute(
                    "UPDATE budget_instances SET seen_at = $1 WHERE instance = $2",
                    at, one._instance_id,
                )  # fmt: skip
        await self.processes[0].end_extras()

    def _random_ask(self) -> Ask | None:
        """Return a call under budgets, which the process knows too; None if none applies to it."""
        random, process = self.random, self.random.randrange(2)
        call = {
            "tenant": random.choice(TENANTS),
            "key": random.choice(KEYS),
            "model": random.choice(MODELS),
            "subject": random.choice(PEOPLE),
        }
        most, tokens = random.choice((0, 1, 30, 60, 99, 100, 150, 299, 900)), random.randrange(400)
        cost = CallCost(most, tokens, random.randrange(most + 1), tokens // 2)
        if random.random() < 0.1:
            cost = replace(cost, most_micros=None, most_tokens=None, unknown="no price")
        binds = sorted(self.ledger.binding(call), key=lambda pair: pair[0].name)
        budgets, caller = self.processes[process], Caller(call["tenant"] or "", call["key"])
        bindings = budgets.binding(caller, call["model"] or "", call["subject"])
        found = [(one.budget.name, tuple(scope_values(one.scope))) for one in bindings]
        assert found == [(one.name, scope) for one, scope in binds]
        self.steps.append(f"ask of {process}: {call} {cost}")
        return Ask(process, cost, binds, bindings, new_id()) if binds else None

    async def _ask(self) -> None:
        if (ask := self._random_ask()) is not None:
            await self._asked(ask)
            if isinstance(ask.refused, QuotaExceeded):
                self._check_refusal(ask.refused, ask.binds, ask.needs, ask.process)
            self._take(ask)

    async def _asked(self, ask: Ask) -> None:
        try:
            budgets = self.processes[ask.process]
            ask.hold = await budgets.reserve(ask.bindings, ask.request_id, ask.cost)
        except BudgetUnbounded:
            assert ask.cost.most_micros is None
            assert any(one.doubt == "bound" for one, _ in ask.binds)
        except QuotaExceeded as refused:
            ask.refused = refused
            self.refused += 1

    def _take(self, ask: Ask) -> None:
        """Note what was reserved, which must have fitted."""
        self.steps.append(f"  {ask.hold or ask.refused}")
        if ask.hold is None:
            return
        at = self.clock.at
        self.admitted += 1
        assert ask.cost.most_micros is not None or all(
            one.doubt == "estimate" for one, _ in ask.binds
        )
        entries = [Entry(one.name, scope, ask.needs[one.name], at) for one, scope in ask.binds]
        self.ledger.entries += entries
        self.calls.append(Call(ask.hold, ask.request_id, ask.process, ask.cost, entries))
        for one, scope in ask.binds:
            assert (one.name, scope) not in self.ledger.paused
            used = self.ledger.spent(one, scope, at)[0] + self.ledger.held(one, scope, at)
            # A call of unknown bound, which may have ended meanwhile, may cost more than reserved.
            more = sum(
                max(0, (entry.paid or 0) - entry.need)
                for entry in self.ledger.of(one, scope)
                if entry.paid_at == at
            )
            assert used - more <= self.ledger.amount(one, scope, at), (one, scope)

    async def _burst(self) -> None:
        """Ask for many at once in both processes, while another call ends."""
        asks = [ask for _ in range(12) if (ask := self._random_ask()) is not None]
        running = [one for one in self.calls if one.is_open]
        ends = [self._settle(one) for one in running[:1]]
        await asyncio.gather(*map(self._asked, asks), *ends)
        for ask in asks:
            self._take(ask)
        for ask in asks:
            if ask.refused is None:
                continue
            (named,) = [pair for pair in ask.binds if pair[0].limit == ask.refused.limit]
            place = (named[0].name, named[1])
            if isinstance(ask.refused, BudgetPaused):
                self.ledger.paused.add(place)
                continue
            self._refusals[ask.process, *place] = self.clock.at
            assert any(self._may_lack(*pair, asks) for pair in ask.binds), ask

    def _may_lack(self, budget: Budget, scope: Scope, asks: Sequence[Ask]) -> bool:
        """Whether a budget had no room for one of these calls in some order of them."""
        at = self.clock.at
        needs = [
            one.needs[budget.name]
            for one in asks
            if one.hold is None and (budget, scope) in one.binds
        ]
        ended = sum(
            max(one.need, one.paid or 0) - (one.paid or 0)
            for one in self.ledger.of(budget, scope)
            if one.paid_at == at
        )
        used = self.ledger.spent(budget, scope, at)[0] + self.ledger.held(budget, scope, at)
        return used + ended + max(needs) > self.ledger.amount(budget, scope, at)

    def _check_refusal(
        self,
        refused: QuotaExceeded,
        binds: Sequence[tuple[Budget, Scope]],
        needs: dict[str, int],
        process: int,
    ) -> None:
        at, ledger = self.clock.at, self.ledger

        def lacks(when: datetime, *, held: bool) -> list[Budget]:
            return [
                one
                for one, scope in binds
                if ledger.spent(one, scope, when)[0]
                + (ledger.held(one, scope, when) if held else 0)
                + needs[one.name]
                > ledger.amount(one, scope, when)
            ]

        if isinstance(refused, BudgetPaused):
            used_up = [
                (one.name, scope)
                for one, scope in binds
                if one.at_end == "pause"
                and one in lacks(at, held=False)
                and 100 * ledger.spent(one, scope, at)[0] >= 99 * ledger.amount(one, scope, at)
            ]
            paused = [
                (one.name, scope) for one, scope in binds if (one.name, scope) in ledger.paused
            ]
            assert used_up or paused
            named = [one for one in used_up + paused if one[0] == refused.limit]
            assert named, (refused, used_up, paused)
            ledger.paused.add(named[0])
            return
        if isinstance(refused, BudgetReserved):
            assert lacks(at, held=True), refused
            assert not lacks(at, held=False), refused
            return
        assert isinstance(refused, BudgetExceeded)
        second_ago = at - timedelta(seconds=1)
        assert lacks(at, held=False) or (
            lacks(second_ago, held=False) and any(one.window_s for one, _ in binds)
        ), refused
        # A refusal that a process remembers for a minute names the budget that it knows to refuse.
        (scope,) = [scope for one, scope in binds if one.name == refused.limit]
        place = (process, refused.limit, scope)
        remembered = self._refusals.get(place)
        is_remembered = remembered is not None and at - remembered <= timedelta(seconds=60)
        self._refusals[place] = at
        if refused.retry_after_ms is None:
            assert any(needs[one.name] > one.amount for one, _ in binds), refused
            return
        then = at + timedelta(milliseconds=refused.retry_after_ms)
        if refused.retry_after_ms > 1_000:
            assert lacks(then - timedelta(seconds=1.1), held=False), (refused, then)
        late = lacks(then + timedelta(milliseconds=2), held=False)
        late = [one for one in late if needs[one.name] <= one.amount]  # else by an extra that ends
        assert not late or is_remembered, (refused, then)

    async def _end(self) -> None:
        running = [one for one in self.calls if one.is_open]
        if running:
            await self._settle(self.random.choice(running))

    async def _settle(self, call: Call) -> None:
        random, cost = self.random, call.cost
        state = random.choice((*[UsageState.TOLD] * 4, *UsageState))
        most, tokens = cost.most_micros, cost.most_tokens
        micros = random.choice((None, most or 50, random.randrange((most or 50) + 1)))
        used = random.randrange((tokens or 50) + 1)
        charge: Charge | None = Charge(state, Usage(output_tokens=used), None, micros)
        if random.random() < 0.1:
            charge = None
        if charge is not None and state is UsageState.NONE:
            charge = Charge()
        self.steps.append(f"settle {call.hold} {charge}")
        self.processes[call.process].settle(call.hold, charge)
        await self.processes[call.process].flush()
        if charge is None or charge.state is UsageState.NONE:
            self._charge(call, 0, 0, is_doubtful=False)
        else:
            doubtful = state is not UsageState.TOLD
            self._charge(call, micros, used, is_doubtful=doubtful)

    def _charge(
        self, call: Call, micros: int | None, tokens: int | None, *, is_doubtful: bool
    ) -> None:
        call.is_open = False
        for one in call.entries:
            budget = self.ledger.budgets[one.budget]
            given = micros if budget.unit == "usd" else tokens
            keeps = is_doubtful and budget.doubt == "bound"
            one.paid = max(one.need, given or 0) if keeps else one.need if given is None else given
            one.is_estimate, one.paid_at = is_doubtful, self.clock.at
            call.can_correct = call.can_correct or is_doubtful

    async def _correct(self) -> None:
        found = [one for one in self.calls if one.can_correct]
        if not found:
            return
        call, micros, tokens = self.random.choice(found), self.random.randrange(60), 7
        call.can_correct = False
        self.steps.append(f"correct {call.hold} {micros}")
        await self.processes[0].records.correct(call.request_id, micros=micros, tokens=tokens)
        for one in call.entries:
            budget = self.ledger.budgets[one.budget]
            one.paid = micros if budget.unit == "usd" else tokens
            one.is_estimate = False

    async def _kill(self) -> None:
        place = self.random.randrange(2)
        lost = [one for one in self.calls if one.is_open and one.process == place]
        self.steps.append(f"kill {place} with {len(lost)}")
        was = self.processes[place]
        self.processes[place] = self._process(place)
        await self.processes[place].refresh()
        # Not before its time is over.
        await self.processes[1 - place].charge_orphans()
        await self._judge()
        await self._to(self.clock.at + timedelta(seconds=29))
        await self.processes[0].end_extras()
        await self._admin.execute(
            "UPDATE budget_instances SET seen_at = $1 WHERE instance = $2",
            self.clock.at - timedelta(seconds=29), was._instance_id,
        )  # fmt: skip
        await self.processes[1 - place].charge_orphans()
        await self._judge()
        at = self.clock.at + timedelta(seconds=2)
        await self.clock.set(at)
        await self._see()
        for one in self.processes:
            await one.charge_orphans()
        for call in lost:
            self._charge(call, None, None, is_doubtful=True)
        if self.random.random() < 0.3:  # it was only silent
            late = self.random.choice(lost) if lost else None
            if late is not None:
                self.steps.append(f"late {late.hold}")
                was.settle(late.hold, Charge(UsageState.TOLD, Usage(output_tokens=3), None, 5))
                await was.flush()
                late.can_correct = False
                for entry in late.entries:
                    budget = self.ledger.budgets[entry.budget]
                    entry.paid = 5 if budget.unit == "usd" else 3
                    entry.is_estimate = False

    # Judgement

    async def _judge(self) -> None:
        at = self.clock.at
        found = {
            (one.budget, tuple(scope_values(one.scope))): one
            for one in await self.processes[0].records.books()
        }
        keys = {(one.budget, one.scope) for one in self.ledger.entries}
        for name, scope in sorted(keys, key=repr):
            budget = self.ledger.budgets[name]
            spent, estimated = self.ledger.spent(budget, scope, at)
            held = self.ledger.held(budget, scope, at)
            amount = self.ledger.amount(budget, scope, at)
            book = found.get((name, scope))
            if book is None:
                assert (name, scope) not in self.ledger.paused
                assert (spent, held) == (0, 0), (budget, scope, spent, held)
                continue
            assert (book.spent, book.estimated, book.held, book.amount) == (
                spent, estimated, held, amount,
            ), (budget, scope, book, spent, estimated, held, amount)  # fmt: skip
            if budget.window_s is None:
                assert book.reset_at == period_of(budget, at)[1], budget
            assert (book.paused_since is not None) == ((name, scope) in self.ledger.paused)
