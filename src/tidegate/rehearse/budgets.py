"""Budgets and processing tiers of a rehearsal: what budgets reject or pause, and when. Pure.

A call reserves its actual cost, since a trace does not contain the upper bound that the gateway
reserves; a budget whose calls have high bounds therefore rejects somewhat earlier in reality. Each
budget begins with nothing spent. The gateway's own code chooses the tier of a job; the durations of
flex and batches are assumed.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from math import inf
from random import Random
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from tidegate.admission.charges import CallSamples, FlexCalls, TierOffer, TierTimes, choose
from tidegate.call import Tier, Usage
from tidegate.errors import ConfigError
from tidegate.limiter import Limit
from tidegate.policy.format import ms_of
from tidegate.prices.budgets import (
    DIMENSIONS,
    Budget,
    budget_of,
    is_used_up,
    scope_of,
    whom,
    window,
)
from tidegate.rehearse.load import Arrival

Cost = Callable[[Arrival, str], int | None]
"""Returns the cost of a call with a model, in micro-dollars; None if unknown."""

PREFIX = "budgets."
_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)  # base for deadlines of jobs, unrelated to calendars
_TEXTS = ("period", "zone", "at_end", "fallback", "doubt", "model", *DIMENSIONS)
_LISTS = ("each", "alerts")
_FIELDS = ("usd", "tokens", *_TEXTS, *_LISTS, "window_s")
_OPTIONAL = ("fallback", "window_s", "model", *DIMENSIONS, *_LISTS)
_CHOICES = {
    "at_end": ("refuse", "pause", "fall_back"),
    "doubt": ("bound", "estimate"),
    "each": DIMENSIONS,
}


def cost_in_trace(arrival: Arrival, model: str) -> int | None:
    """Return the cost in the trace; None for any model but the call's own."""
    return arrival.use.cost_micros if model == arrival.model else None


def budget_in(name: str, table: Mapping[str, Any], before: Budget | None = None) -> Budget:
    """Return the budget that a TOML table states; `period` may be a time such as `5h`.

    `before`: the existing budget of that name. Raises ConfigError with the path of the key.
    """
    values = dict(table)
    for key, value in values.items():
        path = f"{PREFIX}{name}.{key}"
        if key not in _FIELDS:
            raise ConfigError(path, str(value), f"is not known; known: {', '.join(_FIELDS)}")
        is_valid = isinstance(value, str)
        if key in _LISTS:
            is_valid = isinstance(value, list)
        elif key not in _TEXTS:
            is_valid = isinstance(value, int | float | str) and not isinstance(value, bool)
        allowed = "a list" if key in _LISTS else "a text" if key in _TEXTS else "a number"
        if key in _CHOICES:
            given = value if isinstance(value, list) else [value]
            is_valid = is_valid and all(one in _CHOICES[key] for one in given)
            allowed = f"one of {', '.join(_CHOICES[key])}"
        if not is_valid:
            raise ConfigError(path, str(value), f"must be {allowed}")
    period = values.setdefault("period", "month")
    if period not in ("day", "week", "month", "rolling"):
        found_ms = ms_of(period)
        if not found_ms:
            allowed = "must be day, week, month, or a time such as 5h"
            raise ConfigError(f"{PREFIX}{name}.period", period, allowed)
        values |= {"period": "rolling", "window_s": max(1, round(found_ms / 1000))}
    if values.get("fallback") is not None:
        values.setdefault("at_end", "fall_back")
    try:
        usd = values.get("usd")
        return budget_of(name, values | ({} if usd is None else {"usd": str(usd)}), before)
    except ConfigError as invalid:
        raise ConfigError(
            f"{PREFIX}{name}.{invalid.variable}", invalid.value, invalid.allowed
        ) from None


def changed(budgets: Sequence[Budget], changes: Mapping[str, Any]) -> tuple[Budget, ...]:
    """Return the budgets with changes.

    A key is a field such as `budgets.acme.usd`, or `budgets.acme` for a whole table. The value
    "none" removes a budget, or an optional field of one. Raises ConfigError.
    """
    tables = {one.name: _table_of(one) for one in budgets}
    for key, value in changes.items():
        path = key.removeprefix(PREFIX)
        if isinstance(value, Mapping):
            tables[path] = dict(value)
            continue
        name, dot, part = path.rpartition(".")
        if value == "none" and (path in tables or name not in tables or part not in _OPTIONAL):
            if tables.pop(path, None) is None:
                raise ConfigError(key, "none", "must name an existing budget")
            continue
        if not dot or part not in _FIELDS:
            allowed = f'must be a table, "none", or of {PREFIX}NAME. and {", ".join(_FIELDS)}'
            raise ConfigError(key, str(value), allowed)
        stated = {one for one in _FIELDS if f"{PREFIX}{name}.{one}" in changes}
        _change(tables.setdefault(name, {}), part, value, stated)
    before = {one.name: one for one in budgets}
    return tuple(budget_in(name, table, before.get(name)) for name, table in tables.items())


def _change(table: dict[str, Any], part: str, value: Any, stated: Container[str]) -> None:
    """Set one field, or remove it for "none".

    Fields that depend on it are adjusted unless a change states them, as `budgets set` does.
    """
    is_none = value == "none" and part in _OPTIONAL
    implied: dict[str, Any] = {}
    if part in ("usd", "tokens"):
        implied = {"tokens" if part == "usd" else "usd": None}
    elif part == "period" and value != "rolling":
        implied = {"window_s": None}
    elif part == "at_end" and value != "fall_back":
        implied = {"fallback": None}
    elif part == "fallback":
        implied = {"at_end": None if is_none else "fall_back"}
    table[part] = value
    unset = [part] if is_none else []
    for key, one in implied.items():
        if key not in stated:
            table[key] = one
            unset += [key] if one is None else []
    for key in unset:
        del table[key]


def _table_of(budget: Budget) -> dict[str, Any]:
    values = {key: value for key, value in asdict(budget).items() if key in _FIELDS}
    table = {key: value for key, value in values.items() if value not in (None, ())}
    table |= {key: list(values[key]) for key in _LISTS if values[key]}
    amount = budget.amount
    return table | ({"usd": amount / 10**6} if budget.unit == "usd" else {"tokens": amount})


@dataclass(slots=True)
class BudgetOutcome:
    """The outcome of one budget.

    Amounts are micro-dollars or tokens. Times are ms from the start, None if the event did not
    occur. spent: over all its periods and books. fullest: the most in one book. fell_back: calls
    that used the cheaper model.
    """

    budget: str
    words: str
    unit: str
    amount: int
    spent: int = 0
    fullest: int = 0
    refused: int = 0
    fell_back: int = 0
    first_ms: float | None = None
    paused: int = 0
    paused_ms: float | None = None


class BudgetRefusal(NamedTuple):
    """A refusal of a call: the budget and the code of the error."""

    budget: str
    code: str


@dataclass(slots=True)
class _RehearsedBook:
    """The book of one budget and scope in one period.

    spans: amounts spent, by spans of a rolling period.
    """

    scope: str
    spent: int = 0
    spans: deque[list[int]] = field(default_factory=deque)


class RehearsedBudgets:
    """The budgets of one play. Times are ms from its start, which is `starts_at`."""

    def __init__(self, budgets: Sequence[Budget], starts_at: datetime, cost: Cost) -> None:
        self._budgets = budgets
        self._starts_at = starts_at
        self._cost = cost
        self._books: dict[tuple[str, str, str], _RehearsedBook] = {}
        self._paused: set[tuple[str, str]] = set()
        words = {one.name: ", ".join([*whom(one), window(one)]) for one in budgets}
        self.uses = {
            one.name: BudgetOutcome(one.name, words[one.name], one.unit, one.amount)
            for one in budgets
        }

    def decide(self, arrival: Arrival, at_ms: float, *, spends: bool) -> BudgetRefusal | str:
        """Return the model with which a call is made, or its refusal.

        Called on arrival, and again with `spends` on admission.
        """
        if not self._budgets:
            return arrival.model
        model, tried = arrival.model, set[str]()
        while True:
            tried.add(model)
            bound = [
                (one, self._book(one, arrival, at_ms), self._need(one, arrival, model))
                for one in self._budgets
                if one.binds(arrival.tenant, arrival.key, model)
                and one.subject in (None, arrival.subject)
                and one.conversation in (None, arrival.conversation)
            ]
            full = next((one for one in bound if not self._has_room(*one)), None)
            if full is None:
                break
            budget, book, need = full
            use = self.uses[budget.name]
            if use.first_ms is None:
                use.first_ms = at_ms
            if budget.fallback is None or budget.fallback in tried or need is None:
                return self._refused(budget, book, need, use, at_ms)
            use.fell_back += spends
            model = budget.fallback
        if spends:
            for budget, book, need in bound:
                self._spend(budget, book, need or 0, at_ms)
        return model

    def as_made(self, arrival: Arrival, model: str) -> Arrival:
        """Return the call with another model, at that model's cost."""
        if model == arrival.model:
            return arrival
        return replace(arrival, model=model, cost_usd=(self._cost(arrival, model) or 0) / 10**6)

    def _refused(
        self,
        budget: Budget,
        book: _RehearsedBook,
        need: int | None,
        use: BudgetOutcome,
        at_ms: float,
    ) -> BudgetRefusal:
        use.refused += 1
        if need is None:
            return BudgetRefusal(budget.name, "budget_unbounded")
        is_paused = (budget.name, book.scope) in self._paused
        if budget.at_end != "pause" or not (is_paused or is_used_up(book.spent, budget.amount)):
            return BudgetRefusal(budget.name, "budget_exceeded")
        if not is_paused:
            self._paused.add((budget.name, book.scope))
            use.paused += 1
            use.paused_ms = at_ms if use.paused_ms is None else use.paused_ms
        return BudgetRefusal(budget.name, "budget_paused")

    def _has_room(self, budget: Budget, book: _RehearsedBook, need: int | None) -> bool:
        # A pause outlasts the period: only a person ends it, and a rehearsal has none.
        is_paused = (budget.name, book.scope) in self._paused
        return need is not None and not is_paused and book.spent + need <= budget.amount

    def _need(self, budget: Budget, arrival: Arrival, model: str) -> int | None:
        if budget.unit == "tokens":
            return arrival.input_tokens + arrival.output_tokens
        cost = self._cost(arrival, model)
        return 0 if cost is None and budget.doubt == "estimate" else cost

    def _spend(self, budget: Budget, book: _RehearsedBook, amount: int, at_ms: float) -> None:
        book.spent += amount
        if budget.window_s is not None:
            span = self._span(budget.window_s, at_ms)
            if not book.spans or book.spans[-1][0] != span:
                book.spans.append([span, 0])
            book.spans[-1][1] += amount
        use = self.uses[budget.name]
        use.spent += amount
        use.fullest = max(use.fullest, book.spent)

    def _book(self, budget: Budget, arrival: Arrival, at_ms: float) -> _RehearsedBook:
        values: dict[str, str | None] = {one: getattr(arrival, one) for one in DIMENSIONS}
        scope = scope_of(budget, values)
        key = (budget.name, scope, self._period(budget, at_ms))
        book = self._books.setdefault(key, _RehearsedBook(scope))
        if budget.window_s is not None:
            oldest = self._span(budget.window_s, at_ms - budget.window_s * 1000)
            while book.spans and book.spans[0][0] < oldest:
                book.spent -= book.spans.popleft()[1]
        return book

    def _period(self, budget: Budget, at_ms: float) -> str:
        at = (self._starts_at + timedelta(milliseconds=at_ms)).astimezone(ZoneInfo(budget.zone))
        if budget.period == "day":
            return f"{at:%Y-%m-%d}"
        if budget.period == "week":
            return f"{at:%G-%V}"
        return f"{at:%Y-%m}" if budget.period == "month" else "rolling"

    def _span(self, window_s: int, at_ms: float) -> int:
        """Return the span of a moment: a sixtieth of the window, as in the gateway's books."""
        at = self._starts_at.astimezone(UTC).timestamp() + at_ms / 1000
        return int(at // max(1, window_s // 60))


def priced(arrivals: Sequence[Arrival], cost: Cost) -> list[Arrival]:
    """Return the calls with costs added where the trace has none and a price is known."""
    return [
        one
        if one.cost_usd or not (micros := cost(one, one.model))
        else replace(one, cost_usd=micros / 10**6)
        for one in arrivals
    ]


def _no_share(_model: str, _tier: Tier) -> float | None:
    return None


@dataclass(frozen=True, slots=True)
class TierTerms:
    """Assumptions about processing tiers.

    share: a model's price in a tier over its usual price; None if not stated, so that the tier is
    not offered. flex_times: the duration of a call in flex over its usual one. flex_refused: the
    fraction of calls for which flex has no capacity. batch_ms: the duration of a provider's batch,
    known from the start. times: the durations that the gateway assumes.
    """

    share: Callable[[str, Tier], float | None] = _no_share
    flex_times: float = 2.0
    flex_refused: float = 0.0
    batch_ms: float = 3_600_000.0
    times: TierTimes = field(default_factory=TierTimes)


class RehearsedTiers:
    """The tiers of one play. Times are ms of its clock."""

    def __init__(self, terms: TierTerms, clock: Callable[[], float]) -> None:
        self.terms = terms
        self._clock = clock
        self._flex = FlexCalls(lambda: clock() / 1000)
        self._chance = Random("flex")
        self._recent_calls: defaultdict[str, CallSamples] = defaultdict(CallSamples)
        # By kind: how many jobs wait under the configured limits, and when jobs in batches are due.
        self._waiting: Counter[str] = Counter()
        self._dues: defaultdict[str, list[float]] = defaultdict(list)

    def choose(
        self, arrival: Arrival, limits: Iterable[Limit | None], due_ms: float | None
    ) -> tuple[Tier, float | None]:
        """Return the tier of a job now, and when it leaves that tier for a faster one."""
        offers = [
            offer
            for tier in map(Tier, arrival.tiers.split(","))
            if (offer := self._offer(arrival.model, tier)) is not None
        ]
        ahead = self._waiting[arrival.kind]
        if due_ms is not None:
            ahead += bisect_right(self._dues[arrival.kind], due_ms)
        room = self._recent_calls[arrival.kind].room(limits, ahead)
        now = _EPOCH + timedelta(milliseconds=self._clock())
        due = None if due_ms is None else _EPOCH + timedelta(milliseconds=due_ms)
        choice = choose(offers, room, now=now, due=due, times=self.terms.times)
        if choice.revisit_at is None:
            return choice.tier, None
        return choice.tier, (choice.revisit_at - _EPOCH) / timedelta(milliseconds=1)

    def _offer(self, model: str, tier: Tier) -> TierOffer | None:
        share, key = self.terms.share(model, tier), ("", model)
        if share is None:
            return None
        if tier is Tier.FLEX:
            return TierOffer(tier, share, self._flex.usual_ms(key), self._flex.busy_ms(key))
        return TierOffer(tier, share, self.terms.batch_ms)

    def as_made(self, arrival: Arrival, tier: Tier | None) -> Arrival:
        """Return a job as it runs in a tier: with the tier's price and duration."""
        if tier in (None, Tier.LIVE):
            return arrival
        assert tier is not None
        cost_usd = arrival.cost_usd * (self.terms.share(arrival.model, tier) or 1.0)
        takes_ms = self.terms.batch_ms
        if tier is Tier.FLEX:
            takes_ms = arrival.duration_ms * self.terms.flex_times
        return replace(arrival, cost_usd=cost_usd, duration_ms=takes_ms)

    def lacks_capacity(self, model: str) -> bool:
        """Return whether flex refuses a call of a model now."""
        refused = self._chance.random() < self.terms.flex_refused
        if refused:
            self._flex.was_busy(("", model), None)
        return refused

    def put_off_ms(self, model: str) -> float:
        """Return how long a job waits for flex to have capacity, with jitter."""
        return self._flex.busy_ms(("", model)) * self._chance.uniform(1, 1.5)

    def wait(self, kind: str, jobs: int) -> None:
        """Change the number of jobs that wait under the configured limits by `jobs`."""
        self._waiting[kind] += jobs

    def put(self, kind: str, due_ms: float | None) -> None:
        """Note that a job has joined a batch."""
        insort(self._dues[kind], inf if due_ms is None else due_ms)

    def take_out(self, kind: str, due_ms: float | None) -> None:
        """Note that the batch of a job has ended."""
        dues = self._dues[kind]
        del dues[bisect_left(dues, inf if due_ms is None else due_ms)]

    def ended(self, arrival: Arrival, tier: Tier, took_ms: float) -> None:
        """Note that a job was answered under the configured limits."""
        recent = self._recent_calls[arrival.kind]
        recent.sizes.add(Usage(arrival.input_tokens, arrival.output_tokens))
        if tier is Tier.FLEX:
            self._flex.answered(("", arrival.model), took_ms)
        else:
            recent.times.last_ms.append(took_ms)
