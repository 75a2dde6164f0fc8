"""Who has spent what its tenant may: asked before each call, without I/O where that is known.

What a tenant has spent are the totals on record, read every second for those that have a budget
and call, and what this process has spent that may not be in them yet. Invariant: nobody is let in
by totals of another day; so a budget is exceeded by no more than what was in flight, and what
other processes have recorded since the last look or not recorded yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

from tidegate.call import NO_BUDGETS, Caller, Charge
from tidegate.errors import BudgetExceeded, StoreUnavailable
from tidegate.store.spending import Spending
from tidegate.store.usage import Spent, UsageTotals
from tidegate.telemetry import Log, get_logger

LOOK_EVERY_S = 1.0
_WATCHED_FOR_S = 600.0
_NOTHING = Spent()

log = get_logger()


@dataclass(slots=True)
class _Watched:
    """A tenant with a budget: its totals of `day` and the month it is in; None while not read."""

    asked_at: float
    spent: Spent = field(default_factory=Spent)
    day: date | None = None


class BudgetGate:
    """One per API process."""

    def __init__(
        self,
        totals: UsageTotals,
        spending: Spending,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._totals = totals
        self._spending = spending
        self._now = now
        self._watched: dict[str, _Watched] = {}
        self._reading = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<BudgetGate watched={len(self._watched)}>"

    async def let_in(self, caller: Caller) -> None:
        """Raises BudgetExceeded, or StoreUnavailable where what was spent is not known at all."""
        if (spent := await self.spent(caller)) is not None:
            raise spent

    async def spent(self, caller: Caller) -> BudgetExceeded | None:
        """Why the caller may not ask for anything new. Raises StoreUnavailable."""
        if caller.budgets is NO_BUDGETS:
            return None
        now = self._now()
        watched = self._watched.get(caller.tenant_id)
        if watched is None or watched.day != now.date():
            watched = await self._first_look(caller.tenant_id, now)
        watched.asked_at = time.monotonic()
        micros, tokens = self._spending.of(caller.tenant_id)
        spent, budgets = watched.spent, caller.budgets
        for limit, most, used in (
            ("budget_day_money", budgets.day_micros, spent.day_micros + micros),
            ("budget_day_tokens", budgets.day_tokens, spent.day_tokens + tokens),
            ("budget_month_money", budgets.month_micros, spent.month_micros + micros),
            ("budget_month_tokens", budgets.month_tokens, spent.month_tokens + tokens),
        ):
            if most is not None and used >= most:
                return _exceeded(caller.tenant_id, limit, most, used, now)
        return None

    def note(self, caller: Caller, request_id: UUID, charge: Charge) -> None:
        """What a call of this process is charged, until it is in the totals."""
        if caller.budgets is not NO_BUDGETS:
            self._spending.note(request_id, caller.tenant_id, charge)

    async def run(self) -> None:
        """Look every second, for ever."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            try:
                await self.refresh()
            except StoreUnavailable as away:  # what was spent before, and since by us, counts
                log.debug(Log.STORE_AWAY, detail=away.message)
            except Exception:  # the top of a task: logged, and it goes on
                log.exception(Log.INTERNAL_ERROR, where="budgets")

    async def refresh(self) -> None:
        """Read the totals of all who asked lately. Raises StoreUnavailable."""
        async with self._reading:
            oldest = time.monotonic() - _WATCHED_FOR_S
            self._watched = {
                name: one for name, one in self._watched.items() if one.asked_at >= oldest
            }
            await self._read()

    async def _first_look(self, tenant_id: str, now: datetime) -> _Watched:
        async with self._reading:
            watched = self._watched.get(tenant_id)
            if watched is None:
                watched = self._watched[tenant_id] = _Watched(time.monotonic())
            if watched.day != now.date():  # else another has asked meanwhile
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


def _exceeded(tenant_id: str, limit: str, most: int, used: int, now: datetime) -> BudgetExceeded:
    _, period, unit = limit.split("_")
    ends = _end_of(period, now)
    figures = [f"{one / 1e6:.6f}" if unit == "money" else str(one) for one in (most, used)]
    what = "" if unit == "money" else " LLM tokens"
    return BudgetExceeded(
        f"tenant {tenant_id} has spent its budget of the {period}: {figures[1]} of "
        f"{figures[0]}{what}; the next {period} begins at {ends:%Y-%m-%d %H:%M} UTC",
        limit=limit,
        allowed=f"{figures[0]}{what} in a {period} of UTC",
        retry_after_ms=max(1_000, round((ends - now).total_seconds() * 1000)),
    )


def _end_of(period: str, now: datetime) -> datetime:
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return midnight + timedelta(days=1)
    return (midnight.replace(day=1) + timedelta(days=32)).replace(day=1)
