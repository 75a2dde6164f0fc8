"""Usage: totals on record, what this process has spent since, and the budgets of tenants.

A budget is checked before a call waits and again at its admission, without I/O. What a tenant has
spent are the totals on record, read every second for those that have a budget and call, what this
process has spent that may not be in them yet, and for an admission what it reserves for calls in
progress.

Invariants: charges count from when they are noted until totals that hold them are read; no call is
admitted by totals of another day. So a budget is exceeded by no more than what calls cost beyond
their estimates, and what other processes have in progress, have recorded since the last look or not
recorded yet.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from typing import Any
from uuid import UUID

import asyncpg
import orjson

from tidegate.call import NO_BUDGETS, Budgets, Caller, Charge, UsageState
from tidegate.errors import BudgetExceeded, BudgetReserved, StoreUnavailable
from tidegate.prices.reconciliation import DoubtfulCall, ModelDay, ModelFinding, UsageSum
from tidegate.store.database import Connections, sql
from tidegate.store.records import Json, dumps, record_of
from tidegate.store.tenants import Tenants
from tidegate.telemetry.logging import Log, get_logger

LOOK_EVERY_S = 1.0
_WATCHED_FOR_S = 600.0
_RESERVED_RETRY_MS = 1_000
_NONE = (0, 0)

log = get_logger()

MOST_ROWS = 10_000
_SUMMED = ("input_tokens", "output_tokens", "cached_tokens", "thoughts_tokens", "images")
_UNKNOWN = UsageState.UNKNOWN.value
_DOUBTFUL = frozenset((UsageState.PARTIAL.value, UsageState.ESTIMATED.value, _UNKNOWN))
# What `summed` reads of a row of the audit.
READ = (
    *("tenant_id", "pool", "model", "finished_at", *_SUMMED, "cost_micros", "usage_state"),
    "usage_details",
)


@dataclass(frozen=True, slots=True)
class Total:
    """A sum. What is None was not requested apart. unpriced: requests whose tokens are known,
    but no price for them; they add nothing to the cost. partial, estimated, unknown: how many
    requests are charged so; the rest is as the provider reported it."""

    tenant: str | None
    model: str | None
    day: date | None
    requests: int
    input_tokens: int
    output_tokens: int
    cached_tokens: int
    thoughts_tokens: int
    images: int
    cost_micros: int
    unpriced: int
    partial: int
    estimated: int
    unknown: int
    cache_write_tokens: int
    input_audio_tokens: int
    input_image_tokens: int
    input_video_tokens: int
    output_audio_tokens: int
    output_image_tokens: int
    output_video_tokens: int
    searches: int
    provider_cost_micros: int


COUNTS = tuple(one.name for one in fields(Total) if one.name not in ("tenant", "model", "day"))


@dataclass(frozen=True, slots=True)
class Spent:
    """By one tenant, in a day and in the month that it is in."""

    day_micros: int = 0
    month_micros: int = 0
    day_tokens: int = 0
    month_tokens: int = 0


class UsageTotals:
    """Sums on record. Raises StoreUnavailable."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def totals(
        self, by: Iterable[str], since: date, until: date, tenant_id: str | None = None
    ) -> list[Total]:
        """Sums of the days from `since` to `until`, both included, apart `by` tenant, model, day;
        the first `MOST_ROWS` in their order."""
        apart = set(by)
        wanted = [name in apart for name in ("tenant", "model", "day")]
        sums = await self._connections.rows(
            "get_usage", *wanted, since, until, tenant_id, MOST_ROWS
        )
        return [record_of(Total, row) for row in sums]

    async def spent(self, tenants: Sequence[str], today: date) -> dict[str, Spent]:
        """What each has spent so far; nothing of those that have not."""
        found = await self._connections.rows(
            "get_spent", list(tenants), today.replace(day=1), today
        )
        return {row["tenant_id"]: record_of(Spent, row) for row in found}


async def add_usage(connection: asyncpg.Connection, audit: Iterable[Mapping[str, Any]]) -> None:
    """Add rows of the audit that this transaction inserts, `READ` of each. The last thing that it
    does: the totals of a day are locked by it."""
    sums = summed(audit)
    if sums:
        await connection.execute(sql("add_usage"), dumps(sums))


def summed(audit: Iterable[Mapping[str, Any]]) -> list[Json]:
    """The rows of the totals that rows of the audit come to."""
    sums: dict[tuple[str, date, str, str], dict[str, int]] = {}
    for row in audit:
        key = (row["tenant_id"], day_of(row["finished_at"]), row["model"] or "", row["pool"])
        total = sums.get(key)
        if total is None:
            total = sums[key] = dict.fromkeys(COUNTS, 0)
        total["requests"] += 1
        for name in _SUMMED:
            if amount := row[name]:
                total[name] += amount
        cost, state = row["cost_micros"], row["usage_state"]
        if cost:
            total["cost_micros"] += cost
        # Not there in what an earlier version has spilled.
        if details := row.get("usage_details"):
            _add_details(total, details)
        if state in _DOUBTFUL:
            total[state] += 1
        if cost is None and state != _UNKNOWN:
            total["unpriced"] += 1
    names = ("tenant_id", "day", "model", "pool")
    return [dict(zip(names, key, strict=True)) | total for key, total in sums.items()]


def _add_details(total: dict[str, int], details: str | Json) -> None:
    found = orjson.loads(details) if isinstance(details, str) else details
    for name, amount in found.items():
        if name in total:  # the two parts of what was written to a cache are not summed apart
            total[name] += amount


def day_of(at: datetime | str) -> date:
    """The day of UTC of a time; a text is as it was spilled."""
    moment = moment_of(at)
    return moment.date() if moment.tzinfo is UTC else moment.astimezone(UTC).date()


def moment_of(at: datetime | str) -> datetime:
    return datetime.fromisoformat(at) if isinstance(at, str) else at


MOST_OPEN = 100_000
_One = tuple[str, int, int]  # tenant, micros, tokens


class _Sums:
    """Millionths of money and tokens by tenant."""

    def __init__(self) -> None:
        self._by_tenant: dict[str, tuple[int, int]] = {}

    def of(self, tenant_id: str) -> tuple[int, int]:
        return self._by_tenant.get(tenant_id, (0, 0))

    def add(self, one: _One, sign: int) -> None:
        tenant_id, micros, tokens = one
        before = self.of(tenant_id)
        now = (before[0] + sign * micros, before[1] + sign * tokens)
        if any(now):
            self._by_tenant[tenant_id] = now
        else:
            self._by_tenant.pop(tenant_id, None)


class Spending:
    """One per process. A refresh is `begin`, reading the totals, then `end`."""

    def __init__(self) -> None:
        self._open: dict[UUID, _One] = {}  # noted, not yet written
        self._sums = _Sums()
        self._recent: list[_One] = []  # written since the last refresh began
        self._settling: list[_One] = []  # written before it began
        self._reserved: dict[UUID, _One] = {}
        self._reserved_sums = _Sums()

    def __repr__(self) -> str:
        return (
            f"<Spending reserved={len(self._reserved)} open={len(self._open)}"
            f" written={len(self._recent)}>"
        )

    def of(self, tenant_id: str) -> tuple[int, int]:
        """Millionths of money, and tokens."""
        return self._sums.of(tenant_id)

    def reserved(self, tenant_id: str) -> tuple[int, int]:
        """The same for its calls under way."""
        return self._reserved_sums.of(tenant_id)

    def reserve(self, request_id: UUID, tenant_id: str, micros: int, tokens: int) -> None:
        """A call is about to be made, which will cost about so much."""
        self._release(request_id)
        one = self._reserved[request_id] = (tenant_id, micros, tokens)
        self._reserved_sums.add(one, 1)

    def settle(self, request_id: UUID, tenant_id: str, charge: Charge) -> None:
        """The call is over: what it is charged counts instead of what was reserved."""
        self._release(request_id)
        self.forget(request_id)
        one = (tenant_id, charge.cost_micros or 0, charge.tokens)
        if not any(one[1:]) or len(self._open) >= MOST_OPEN:
            return
        self._open[request_id] = one
        self._sums.add(one, 1)

    def forget(self, request_id: UUID) -> None:
        """What was noted of a request is not charged: another try of it follows."""
        if (one := self._open.pop(request_id, None)) is not None:
            self._sums.add(one, -1)

    def written(self, ids: Iterable[UUID | str]) -> None:
        """These are committed; others than those noted here are passed over."""
        if not self._open:
            return
        for given in ids:
            one = self._open.pop(given if isinstance(given, UUID) else UUID(given), None)
            if one is not None:
                self._recent.append(one)

    def begin(self) -> None:
        """The totals are about to be read."""
        self._settling += self._recent
        self._recent = []

    def end(self) -> None:
        """They were read: what was written before `begin` is in them."""
        for one in self._settling:
            self._sums.add(one, -1)
        self._settling = []

    def _release(self, request_id: UUID) -> None:
        if (one := self._reserved.pop(request_id, None)) is not None:
            self._reserved_sums.add(one, -1)


_NOTHING = Spent()


@dataclass(slots=True)
class _Watched:
    """A tenant with a budget: its totals of `day` and the month it is in; None while not read.

    waiting: calls in a queue, notified when the budget is spent. room: of calls that were refused
    since all that was left is reserved; the first goes on when something of that is settled.
    """

    asked_at: float
    spent: Spent = field(default_factory=Spent)
    day: date | None = None
    waiting: dict[object, tuple[Caller, Callable[[BudgetExceeded], None]]] = field(
        default_factory=dict
    )
    room: deque[asyncio.Future[None]] = field(default_factory=deque)


class BudgetGate:
    """One per process."""

    def __init__(
        self,
        totals: UsageTotals,
        spending: Spending,
        tenants: Tenants,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._totals = totals
        self._spending = spending
        self._tenants = tenants
        # Of tenants whose jobs and batches this process runs: last use, and their budgets.
        self._payers: dict[str, tuple[float, Budgets]] = {}
        self._now = now
        self._watched: dict[str, _Watched] = {}
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<BudgetGate watched={len(self._watched)}>"

    async def check(self, caller: Caller) -> None:
        """Raises BudgetExceeded, or StoreUnavailable where what was spent is not known at all."""
        if (spent := await self.spent(caller)) is not None:
            raise spent

    async def budgets_of(self, tenant_id: str) -> Budgets:
        """The budgets of a tenant whose key is not known here, as of a second ago. Raises
        StoreUnavailable where they are not known at all."""
        known = self._payers.get(tenant_id)
        if known is None:
            found = await self._tenants.budgets([tenant_id])
            known = (0.0, found.get(tenant_id, NO_BUDGETS))
        self._payers[tenant_id] = (time.monotonic(), known[1])
        return known[1]

    async def spent(self, caller: Caller) -> BudgetExceeded | None:
        """Why the caller may not submit anything new. Raises StoreUnavailable."""
        if caller.budgets is NO_BUDGETS:
            return None
        now = self._now()
        watched = await self._known(caller.tenant_id, now)
        return self._exceeded(caller, watched, now)

    async def reserve(self, caller: Caller, request_id: UUID, micros: int, tokens: int) -> None:
        """Reserve what an admitted call will cost, before it is made; `settle` must follow.

        Raises BudgetExceeded where all is spent; BudgetReserved where calls under way may spend
        what is left; StoreUnavailable.
        """
        now = self._now()
        watched = await self._known(caller.tenant_id, now)
        if (spent := self._exceeded(caller, watched, now)) is not None:
            raise spent
        for limit, most, used in self._used(caller, watched, reserved=True):
            if used >= most:
                raise _reserved(caller.tenant_id, limit, most)
        self._spending.reserve(request_id, caller.tenant_id, micros, tokens)

    def settle(self, caller: Caller, request_id: UUID, charge: Charge) -> None:
        """The call is over, and is charged so: that counts until it is in the totals."""
        self._spending.settle(request_id, caller.tenant_id, charge)
        if (watched := self._watched.get(caller.tenant_id)) is not None:
            self._look_after(watched)

    @asynccontextmanager
    async def held(
        self, caller: Caller, request_id: UUID, price: tuple[int, int], charge: Callable[[], Charge]
    ) -> AsyncIterator[None]:
        """Reserve `price` for what is done inside, and settle it by `charge`. Raises what
        `reserve` raises."""
        if caller.budgets is NO_BUDGETS:
            yield
            return
        await self.reserve(caller, request_id, *price)
        try:
            yield
        finally:
            self.settle(caller, request_id, charge())

    def forget(self, request_id: UUID) -> None:
        """A call that was settled will not be recorded, since another try follows."""
        self._spending.forget(request_id)

    async def room(self, caller: Caller, within_s: float) -> None:
        """Wait until something that was reserved is settled, or for about a second."""
        watched = await self._known(caller.tenant_id, self._now())
        future = asyncio.get_running_loop().create_future()
        watched.room.append(future)
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(min(within_s, LOOK_EVERY_S)):
                    await future
        finally:
            if future in watched.room:
                watched.room.remove(future)

    def waits(self, caller: Caller, notify: Callable[[BudgetExceeded], None]) -> Callable[[], None]:
        """Call `notify` once the budget is spent; the function that is returned ends that."""
        watched, key = self._watched.get(caller.tenant_id), object()
        if watched is None:  # the budget is checked again at admission
            return lambda: None
        watched.waiting[key] = (caller, notify)

        def end() -> None:
            watched.waiting.pop(key, None)

        return end

    def _look_after(self, watched: _Watched) -> None:
        """Notify waiting calls of the last figures."""
        if watched.waiting:  # all of one tenant: what holds for the first holds for all
            caller, _ = next(iter(watched.waiting.values()))
            if (spent := self._exceeded(caller, watched, self._now())) is not None:
                for _, notify in list(watched.waiting.values()):
                    notify(spent)
        while watched.room:
            future = watched.room.popleft()
            if not future.done():
                future.set_result(None)
                return

    async def _known(self, tenant_id: str, now: datetime) -> _Watched:
        watched = self._watched.get(tenant_id)
        if watched is None or watched.day != now.date():
            watched = await self._first_look(tenant_id, now)
        watched.asked_at = time.monotonic()
        return watched

    def _exceeded(self, caller: Caller, watched: _Watched, now: datetime) -> BudgetExceeded | None:
        for limit, most, used in self._used(caller, watched, reserved=False):
            if used >= most:
                return _exceeded(caller.tenant_id, limit, most, used, now)
        return None

    def _used(
        self, caller: Caller, watched: _Watched, *, reserved: bool
    ) -> list[tuple[str, int, int]]:
        """Each budget of a caller by its name, how much it is, and what of it is used."""
        micros, tokens = self._spending.of(caller.tenant_id)
        held_micros, held_tokens = self._spending.reserved(caller.tenant_id) if reserved else _NONE
        spent, budgets = watched.spent, caller.budgets
        micros, tokens = micros + held_micros, tokens + held_tokens
        return [
            (limit, most, used)
            for limit, most, used in (
                ("budget_day_money", budgets.day_micros, spent.day_micros + micros),
                ("budget_day_tokens", budgets.day_tokens, spent.day_tokens + tokens),
                ("budget_month_money", budgets.month_micros, spent.month_micros + micros),
                ("budget_month_tokens", budgets.month_tokens, spent.month_tokens + tokens),
            )
            if most is not None
        ]

    async def run(self) -> None:
        """Look every second, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.refresh()
            except StoreUnavailable as away:  # what was spent before, and since by us, counts
                log.debug(Log.STORE_AWAY, detail=away.message)
            except Exception:  # the top of a task: logged, and it goes on
                log.exception(Log.INTERNAL_ERROR, component="budgets")

    async def refresh(self) -> None:
        """Read the totals of all tenants that called lately. Raises StoreUnavailable."""
        async with self._reading:
            oldest = time.monotonic() - _WATCHED_FOR_S
            self._watched = {
                name: one
                for name, one in self._watched.items()
                if one.asked_at >= oldest or one.waiting or one.room
            }
            await self._read()
            await self._read_payers(oldest)
        for watched in self._watched.values():
            self._look_after(watched)

    async def _read_payers(self, oldest: float) -> None:
        self._payers = {name: one for name, one in self._payers.items() if one[0] >= oldest}
        if self._payers:
            found = await self._tenants.budgets(list(self._payers))
            for name, (asked_at, _) in list(self._payers.items()):
                self._payers[name] = (asked_at, found.get(name, NO_BUDGETS))

    async def _first_look(self, tenant_id: str, now: datetime) -> _Watched:
        async with self._reading:
            watched = self._watched.get(tenant_id)
            if watched is None:
                watched = self._watched[tenant_id] = _Watched(time.monotonic())
            if watched.day != now.date():  # else another call has read them meanwhile
                await self._read()
            return watched

    async def _read(self) -> None:
        if not self._watched:
            self._spending.begin()
            self._spending.end()
            return
        today = self._now().date()
        self._spending.begin()
        found = await self._totals.spent(list(self._watched), today)
        self._spending.end()
        for name, one in self._watched.items():
            one.spent, one.day = found.get(name, _NOTHING), today


_BUDGETS = {
    "budget_day_money": "daily cost",
    "budget_day_tokens": "daily token",
    "budget_month_money": "monthly cost",
    "budget_month_tokens": "monthly token",
}


def _reserved(tenant_id: str, limit: str, most: int) -> BudgetReserved:
    _, period, unit = limit.split("_")
    figure, what = (f"{most / 1e6:.6f}", "") if unit == "money" else (str(most), " tokens")
    return BudgetReserved(
        f"what is left of the {_BUDGETS[limit]} budget of tenant {tenant_id} is reserved for its "
        "calls in progress",
        limit=limit,
        allowed=f"{figure}{what} a {period} (UTC)",
        retry_after_ms=_RESERVED_RETRY_MS,
    )


def _exceeded(tenant_id: str, limit: str, most: int, used: int, now: datetime) -> BudgetExceeded:
    _, period, unit = limit.split("_")
    ends = _end_of(period, now)
    figures = [f"{one / 1e6:,.6f}" if unit == "money" else f"{one:,}" for one in (most, used)]
    what = "" if unit == "money" else " tokens"
    return BudgetExceeded(
        f"the {_BUDGETS[limit]} budget of tenant {tenant_id} is exceeded ({figures[1]} of "
        f"{figures[0]}); it resets at {ends:%Y-%m-%d %H:%M} UTC",
        limit=limit,
        allowed=f"{figures[0]}{what} a {period} (UTC)",
        retry_after_ms=max(1_000, round((ends - now).total_seconds() * 1000)),
    )


def _end_of(period: str, now: datetime) -> datetime:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return midnight + timedelta(days=1)
    return (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)


MOST_DOUBTFUL = 10_000
MOST_FOUND = 10_000
_MOST_NAMED = 100  # calls that a finding keeps


@dataclass(frozen=True, slots=True)
class Reconciled:
    """What the last comparison of an upstream, day and model found. calls: of those that explain
    a difference, the first hundred: id, state, and the cost before and after."""

    upstream: str
    day: date
    model: str
    provider: str
    ours_micros: int
    theirs_micros: int
    verdict: str
    reason: str
    calls: Sequence[Mapping[str, Any]]
    reconciled_at: datetime

    @property
    def difference_micros(self) -> int:
        return self.theirs_micros - self.ours_micros


class Reconciliations:
    """Our side of a day, its corrections, and what comparisons with providers found. Raises
    StoreUnavailable.

    A charge and the totals that hold it are corrected in one transaction, and only where the charge
    is still the one that was compared.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    async def ours(self, pool: str, day: date) -> dict[str, ModelDay]:
        """The record of a day of UTC by the model that answered, else the one requested."""
        begin, end = _day_bounds(day)
        told = await self._connections.rows("get_told_usage", pool, begin, end)
        rows = await self._connections.rows("get_doubtful_calls", pool, begin, end, MOST_DOUBTFUL)
        doubtful: defaultdict[str, list[DoubtfulCall]] = defaultdict(list)
        for row in rows:
            values = dict(row)
            doubtful[values.pop("model")].append(DoubtfulCall(**values))
        found: dict[str, ModelDay] = {}
        for row in told:
            values = dict(row)
            model, unpriced = values.pop("model"), values.pop("unpriced")
            calls = tuple(doubtful.pop(model, ()))
            found[model] = ModelDay(UsageSum(**values), calls, unpriced)
        for model, calls_alone in doubtful.items():
            found[model] = ModelDay(doubtful=tuple(calls_alone))
        return found

    async def keep(
        self, upstream: str, provider: str, day: date, findings: Sequence[ModelFinding]
    ) -> int:
        """Correct the charges that the findings explain, and keep the findings; how many charges
        were corrected."""

        async def work(connection: asyncpg.Connection) -> int:
            corrected = 0
            for finding in findings:
                corrected += await _correct_charges(connection, day, finding)
                calls = orjson.dumps(_explaining_calls(finding)).decode()
                await connection.execute(
                    sql("put_reconciliation"),
                    upstream,
                    day,
                    finding.model,
                    provider,
                    finding.ours_micros,
                    finding.theirs.cost_micros,
                    finding.verdict,
                    finding.reason,
                    calls,
                )
            return corrected

        return await self._connections.run(work)

    async def found(self, first: date, last: date) -> list[Reconciled]:
        """What was found for the days from `first` to `last`, both included, the newest first."""
        rows = await self._connections.rows("get_reconciliations", first, last, MOST_FOUND)
        return [Reconciled(**dict(row) | {"calls": orjson.loads(row["calls"])}) for row in rows]

    async def is_done(self, upstream: str, day: date) -> bool:
        """Whether a day was compared."""
        return await self._connections.row("reconciled_since", upstream, day) is not None


async def _correct_charges(connection: asyncpg.Connection, day: date, finding: ModelFinding) -> int:
    begin, end = _day_bounds(day)
    corrected = 0
    for one in finding.corrections:
        if not one.delta_micros:
            continue
        charged = one.call.charged_micros
        # A call that was made again is charged for its last attempt already.
        before = one.call.weight if one.call.state == "repeated" else charged
        row = await connection.fetchrow(
            sql("correct_charge"), one.call.request_id, begin, end, one.delta_micros, before
        )
        if row is None:
            continue
        corrected += 1
        key = (row["tenant_id"], row["day"], row["model"], row["pool"])
        await connection.execute(sql("correct_usage"), *key, one.delta_micros)
    return corrected


def _explaining_calls(finding: ModelFinding) -> list[dict[str, Any]]:
    return [
        {
            "request_id": str(one.call.request_id),
            "state": one.call.state,
            "charged_micros": one.call.cost_micros,
            "cost_micros": one.cost_micros,
        }
        for one in finding.corrections[:_MOST_NAMED]
    ]


def _day_bounds(day: date) -> tuple[datetime, datetime]:
    begin = datetime.combine(day, time_of_day(), UTC)
    return begin, begin + timedelta(days=1)
