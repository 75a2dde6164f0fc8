"""Budgets: amounts, scopes and periods, and the reason for rejecting a call. Pure.

A budget applies to the calls that match all dimensions it names. Each value of the dimensions in
its `each` has a book of its own with the whole amount. The books are stored by `store/budgets.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from fnmatch import fnmatchcase
from shlex import quote
from typing import Any, Literal, NamedTuple, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import orjson

from tidegate.call import CallCost
from tidegate.errors import (
    BudgetExceeded,
    BudgetPaused,
    BudgetReserved,
    BudgetUnbounded,
    ConfigError,
    QuotaExceeded,
)
from tidegate.prices.rates import dollars

Unit = Literal["usd", "tokens"]
Period = Literal["day", "week", "month", "rolling"]
Dimension = Literal["tenant", "key", "subject", "conversation"]

DIMENSIONS: tuple[Dimension, ...] = ("tenant", "key", "subject", "conversation")
MOST_AMOUNT = 10**15
_MORE_THAN_ANY = MOST_AMOUNT + 1  # so that sums of what clients' huge bounds need fit into bigint
LONGEST_WINDOW_S = 366 * 86_400
_RESERVED_RETRY_MS = 1_000
MOST_REMEMBERED = 10_000
BRIEFLY_S = 1.0
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")
_SHORT_NAME = re.compile(r".+/(?P<name>budget_(?:day|month)_(?:money|tokens))")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:/@+-]{0,199}")

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Budget:
    """An amount that the calls it applies to may spend in a period.

    tenant, key, subject, conversation: the one that it applies to, None for all. model: a pattern
    for the provider's model names. each: every value of these dimensions has the whole amount for
    itself; calls without such a value share one. amount: in micro-dollars or tokens. zone: the time
    zone of calendar periods. window_s: the length of a rolling period. at_end: what happens to a
    call that does not fit; `fall_back` calls the model `fallback` instead. doubt: `bound` rejects a
    call whose price or upper bound is unknown and charges a call that was cut off its bound;
    `estimate` charges both their estimated cost. alerts: percentages of the amount at which an
    alert is raised.
    """

    name: str
    unit: Unit
    amount: int
    period: Period
    tenant: str | None = None
    key: str | None = None
    model: str | None = None
    subject: str | None = None
    conversation: str | None = None
    each: tuple[Dimension, ...] = ()
    zone: str = "UTC"
    window_s: int | None = None
    at_end: Literal["refuse", "pause", "fall_back"] = "refuse"
    fallback: str | None = None
    doubt: Literal["bound", "estimate"] = "bound"
    alerts: tuple[int, ...] = ()
    created_at: datetime | None = None

    @property
    def limit(self) -> str:
        """The name in errors: for a tenant's own budget the name of the tenant's setting."""
        short = _SHORT_NAME.fullmatch(self.name)
        return self.name if short is None else short["name"]

    def shown(self, amount: int) -> str:
        return amount_text(self.unit, amount)

    def binds(self, tenant: str, key: str | None, model: str) -> bool:
        """Return whether the budget may apply to a call, as far as tenant, key and model decide."""
        return self.tenant in (None, tenant) and self.key in (None, key) and self.is_of_model(model)

    def is_of_model(self, model: str) -> bool:
        return self.model is None or fnmatchcase(model.removeprefix("models/"), self.model)

    def need(self, cost: CallCost) -> int:
        """Return the amount that a call takes at most, or an estimate.

        Raises BudgetUnbounded if the bound is unknown and `doubt` requires one.
        """
        bound, about = (
            (cost.most_micros, cost.likely_micros)
            if self.unit == "usd"
            else (cost.most_tokens, cost.likely_tokens)
        )
        if bound is not None:
            return min(bound, _MORE_THAN_ANY)
        if self.doubt == "bound":
            raise BudgetUnbounded(
                f"the budget {self.name} applies to this call, whose maximum cost is not known: "
                f"{cost.unknown}",
                limit=self.limit,
                allowed="a call with max_tokens, of a model whose price is known",
            )
        return min(about, _MORE_THAN_ANY)


Book = tuple[str, str]  # the name of a budget, and a scope
NEVER = datetime.max.replace(tzinfo=UTC)


class Binding(NamedTuple):
    """A budget that applies to a call, and the scope of the book that the call is charged to."""

    budget: Budget
    scope: str

    @property
    def book(self) -> Book:
        """Return what identifies that book."""
        return self.budget.name, self.scope


class Refusal(NamedTuple):
    """A book without enough left for a call.

    until: a time of this process's clock until which the refusal certainly holds. need: what the
    call needs; the time at which a rolling budget has room for it depends on that.
    """

    binding: Binding
    why: str
    amount: int
    spent: int
    held: int
    reset_at: datetime | None
    until: float
    need: int = 0

    def refuses(self, need: int) -> bool:
        """Return whether another call that needs that much is refused for the same reason and
        until the same time, while `until` has not come."""
        if self.why == "paused":
            return True
        is_known = self.binding.budget.period != "rolling" or need == self.need
        return is_known and self.spent + need > self.amount

    def ends_at(self, need: int) -> datetime:
        """Return when a call that needs that much may fit; the last of all times if never."""
        is_final = self.why == "paused" or need > self.binding.budget.amount
        return NEVER if is_final or self.reset_at is None else self.reset_at


@dataclass(eq=False, slots=True)
class BudgetWaiter:
    """A call in a queue, which leaves it once its reservation cannot succeed any more."""

    needs: tuple[tuple[Binding, int], ...]
    notify: Callable[[QuotaExceeded], None]

    @staticmethod
    def renew(waiters: Iterable[BudgetWaiter], budgets: Iterable[Budget]) -> None:
        """Bind waiting calls to the budgets that are in force now, as those may have another amount
        or end than when the calls began to wait. A budget that was removed binds none of them."""
        by_name = {one.name: one for one in budgets}
        for waiter in waiters:
            known = ((by_name.get(old.budget.name), old, need) for old, need in waiter.needs)
            waiter.needs = tuple(
                (Binding(budget, old.scope), need)
                for budget, old, need in known
                if budget and (budget.unit, budget.each) == (old.budget.unit, old.budget.each)
            )


class KnownRefusals:
    """Refusals that a process remembers, by the book that refuses. Bounded, since clients name
    subjects and conversations.

    Of several budgets that refuse a call the one that ends last does, so a remembered refusal
    counts only if each of the call's other budgets was found to refuse no call that needs as much
    until later, at most `BRIEFLY_S` before.
    """

    def __init__(self, wall: Callable[[], datetime]) -> None:
        """wall: PostgreSQL's time, to which the ends of periods belong."""
        self._wall = wall
        self.books: dict[Book, Refusal] = {}
        # Of a book that refuses and another one: the most that was needed there, and until when
        # it counts.
        self._others: dict[tuple[Book, Book], tuple[int, float]] = {}

    def add(self, refusal: Refusal, needs: Sequence[tuple[Binding, int]], now: float) -> None:
        """Remember the refusal of a call, whose needs are given, by one of its budgets."""
        book = refusal.binding.book
        _put(self.books, book, refusal)
        for other, need in needs:
            most, until = self._others.get((book, other.book), (-1, now))
            if other.book != book and (need >= most or until <= now):
                _put(self._others, (book, other.book), (need, now + BRIEFLY_S))

    def of(self, needs: Sequence[tuple[Binding, int]], now: float) -> QuotaExceeded | None:
        """Return why a call with these needs is refused; None if that is not known."""
        found: list[tuple[Refusal, int]] = []
        others: list[tuple[Binding, int]] = []
        for binding, need in needs:
            known = self.books.get(binding.book)
            if known is not None and now >= known.until:
                del self.books[binding.book]
                known = None
            if known is not None and known.refuses(need):
                found.append((known._replace(binding=binding), need))
            else:
                others.append((binding, need))
        # As in PostgreSQL, of several that end at a time the last one refuses.
        last = max(reversed(found), key=lambda one: one[0].ends_at(one[1]), default=None)
        if last is None:
            return None
        if last[0].ends_at(last[1]) != NEVER:
            for binding, need in others:
                pair = last[0].binding.book, binding.book
                most, until = self._others.get(pair, (-1, now))
                if need > most or now >= until:
                    return None
        return refused_by(*last, self._wall())

    def clear(self) -> None:
        """Forget all, since the budgets have changed."""
        self.books.clear()
        self._others.clear()


def _put(known: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    known.pop(key, None)
    if len(known) >= MOST_REMEMBERED:
        del known[next(iter(known))]  # the one that was put first
    known[key] = value


def amount_text(unit: Unit, amount: int) -> str:
    """Return an amount for people to read: `$0.79`, or `1,200 tokens`."""
    return dollars(amount) if unit == "usd" else f"{amount:,} tokens"


def _needed(unit: Unit, amount: int) -> str:
    """Return the amount rounded up to the digits shown, so that the text never understates it."""
    cents = -(-amount // 10_000) * 10_000 if unit == "usd" and amount >= 10_000 else amount
    return amount_text(unit, cents)


def _time_text(at: datetime, zone: str = "UTC") -> str:
    """Return a time in a zone, rounded up to seconds, which are left out if they are 0."""
    local = (at + timedelta(microseconds=-at.microsecond % 10**6)).astimezone(ZoneInfo(zone))
    return f"{local:%Y-%m-%d %H:%M}{f':{local:%S}' if local.second else ''} {zone}"


def is_used_up(spent: int, amount: int) -> bool:
    """Return whether a budget that pauses does so for all calls: at most 1 % of it is left.

    Before that, a call that needs more than what is left is rejected alone. The SQL function
    `reserve_budgets` applies the same rule.
    """
    return spent * 100 >= amount * 99


def check_budget(budget: Budget) -> None:
    """Raise ConfigError, which names the field, for a value that a budget cannot have."""
    if not _NAME.fullmatch(budget.name):
        raise ConfigError("name", budget.name, "1 to 200 letters, digits and _ . : / @ + -")
    for name in (*DIMENSIONS, "model", "fallback"):
        if getattr(budget, name) == "":  # it would match no call
            raise ConfigError(name, "", "a name of one character or more")
    if not 0 <= budget.amount <= MOST_AMOUNT:
        raise ConfigError("amount", str(budget.amount), f"a number from 0 to {MOST_AMOUNT}")
    if not _is_zone(budget.zone):
        raise ConfigError("zone", budget.zone, "a time zone such as Europe/Berlin")
    rolling = budget.period == "rolling"
    if rolling and not (budget.window_s and 1 <= budget.window_s <= LONGEST_WINDOW_S):
        raise ConfigError("window_s", str(budget.window_s), "1 second to 366 days, for rolling")
    if not rolling and budget.window_s is not None:
        raise ConfigError("window_s", str(budget.window_s), "none for a period of the calendar")
    if (budget.at_end == "fall_back") != (budget.fallback is not None):
        raise ConfigError("fallback", str(budget.fallback), "a model, where at_end is fall_back")
    for name in budget.each:
        if name not in DIMENSIONS or budget.each.count(name) > 1 or getattr(budget, name):
            raise ConfigError("each", name, f"each of {', '.join(DIMENSIONS)} that is not named")
    if any(not 1 <= share <= 100 for share in budget.alerts) or len(budget.alerts) > 10:
        raise ConfigError("alerts", str(budget.alerts), "up to 10 shares from 1 to 100 percent")


def _is_zone(name: str) -> bool:
    """Return whether a time zone has that name. `available_timezones` would open each zone's
    file."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return not name.startswith(("posix/", "right/")) and name not in ("posixrules", "localtime")


def budget_of(name: str, values: Mapping[str, Any], before: Budget | None = None) -> Budget:
    """Return the budget with these fields, the amount as `usd` or `tokens`.

    `before`: the existing budget of that name. Raises ConfigError.
    """
    fields = dict(values)
    usd, tokens = fields.pop("usd", None), fields.pop("tokens", None)
    if (usd is None) == (tokens is None):
        raise ConfigError("amount", "(not set)" if usd is None else str(usd), "usd or tokens")
    if usd is None:
        fields |= {"unit": "tokens", "amount": tokens}
    else:
        fields |= {"unit": "usd", "amount": _micros_of("usd", usd)}
    for several in ("each", "alerts"):
        fields[several] = tuple(fields.get(several) or ())
    budget = Budget(name=name, **fields)
    check_budget(budget)
    return budget if before is not None and before.each == budget.each else _by_tenant(budget)


def _by_tenant(budget: Budget) -> Budget:
    """Return the budget with one book per tenant if it has one per subject or conversation.

    Names of subjects and conversations belong to a tenant; two tenants may use the same name.
    """
    is_of_people = "subject" in budget.each or "conversation" in budget.each
    is_of_all = budget.tenant is budget.key is None and "tenant" not in budget.each
    return replace(budget, each=("tenant", *budget.each)) if is_of_people and is_of_all else budget


def _micros_of(field: str, usd: Decimal | str) -> int:
    """Return an amount of USD in micro-dollars. Raises ConfigError, which names the field."""
    most = MOST_AMOUNT // 10**6
    try:
        amount = Decimal(usd)
    except InvalidOperation:
        raise ConfigError(field, str(usd), "an amount in USD, such as 250 or 0.79") from None
    # Checked before the conversion: int() of 1e999999999 would exhaust memory.
    if not amount.is_finite() or not 0 <= amount <= most:
        raise ConfigError(field, str(usd), f"an amount in USD from 0 to {most}")
    micros = amount * 10**6
    if micros != int(micros):
        raise ConfigError(field, str(usd), "whole micro-dollars, such as 0.000001")
    return int(micros)


_CHANGEABLE = ("at_end", "fallback", "doubt", "alerts")


def with_changes(before: Budget | None, name: str, values: Mapping[str, Any]) -> Budget:
    """Return the budget with changed fields, stated as for `budget_of`.

    A new budget without a period has `month`. An existing one keeps the fields that `values` does
    not contain. Raises ConfigError.
    """
    if before is None:
        return budget_of(name, {"period": "month", **values})
    fields = plain_budget(before)
    amount = fields.pop("amount")
    for derived in ("name", "created_at", "unit"):
        del fields[derived]
    if "period" in values:
        fields["window_s"] = None
    if "at_end" in values:
        fields["fallback"] = None
    if not {"usd", "tokens"} & set(values):
        fields |= {"usd": Decimal(amount) / 10**6} if before.unit == "usd" else {"tokens": amount}
    return budget_of(name, {**fields, **values}, before)


def with_end_of(before: Budget, budget: Budget) -> Budget:
    """Return `budget` with the `at_end`, `fallback`, `doubt` and `alerts` of `before`."""
    return replace(budget, **{name: getattr(before, name) for name in _CHANGEABLE})


def extra_of(usd: Decimal | str, tokens: int) -> tuple[int, Unit | None]:
    """Return an additional allowance and its unit; the unit is None for no allowance.

    Raises ConfigError.
    """
    micros = _micros_of("extra_usd", usd)
    if not 0 <= tokens <= MOST_AMOUNT or (micros and tokens):
        allowed = f"up to {MOST_AMOUNT}, and not with extra_usd"
        raise ConfigError("extra_tokens", str(tokens), allowed)
    return micros or tokens, "usd" if micros else "tokens" if tokens else None


def check_extra(budget: str, unit: Unit, extra: Unit | None) -> None:
    """Raise ConfigError if an additional allowance has another unit than the budget."""
    if extra not in (None, unit):
        why = f"does not fit the budget {budget}, which is in {unit}: use extra_{unit}"
        raise ConfigError(f"extra_{extra}", None, why)


def plain_budget(budget: Budget) -> Json:
    """Return the budget as a JSON object."""
    return asdict(budget) | {"each": list(budget.each), "alerts": list(budget.alerts)}


def scope_values(scope: str) -> list[str | None]:
    found: list[str | None] = orjson.loads(scope) if scope else []
    return found


def scope_text(values: Sequence[str | None]) -> str:
    """Return the text that PostgreSQL writes for such a JSON array, ', ' between values; "" if
    empty.
    """
    return f"[{', '.join(orjson.dumps(one).decode() for one in values)}]" if values else ""


def tenants_budget(tenant: str, setting: str, amount: int) -> Budget:
    """Return the budget that a tenant's setting such as `budget_day_money` defines."""
    _, period, unit = setting.split("_")
    return Budget(
        name=f"{tenant}/{setting}",
        unit="usd" if unit == "money" else "tokens",
        amount=amount,
        period="day" if period == "day" else "month",
        tenant=tenant,
        doubt="estimate",
    )


def check_same(before: Budget, after: Budget) -> None:
    """Raise ConfigError if a change would alter which calls a budget applies to or what it
    counts.
    """
    for name in (*DIMENSIONS, "model", "each", "unit", "period", "zone", "window_s"):
        now = getattr(before, name)
        if getattr(after, name) != now:
            current = "not set" if now is None else now
            allowed = f"{current}, as it is: remove the budget first, or choose another name"
            raise ConfigError(name, str(getattr(after, name)), allowed)


def needs_of(bindings: Sequence[Binding], cost: CallCost) -> tuple[tuple[Binding, int], ...]:
    return tuple((one, one.budget.need(cost)) for one in bindings)


def scope_of(budget: Budget, values: Mapping[str, str | None]) -> str:
    return scope_text([values[one] for one in budget.each]) if budget.each else ""


def refused_by(refusal: Refusal, need: int | None, now: datetime) -> QuotaExceeded:
    """Return the error for a refusal.

    `need`: the most that the call takes; None before it is known, if nothing is left at all.
    now: PostgreSQL's time.
    """
    budget, scope = refusal.binding
    named = zip(budget.each, scope_values(scope), strict=False)
    whose = ", ".join(f"no {name}" if value is None else value for name, value in named)
    whose = f" of {whose}" if whose else ""
    spent, amount = budget.shown(refusal.spent), budget.shown(refusal.amount)
    used = f"{spent} of {amount} spent"
    allowed = f"{amount} a {budget.period} of {budget.zone}"
    if budget.period == "rolling":
        allowed = f"{amount} {window(budget)}"
    if refusal.why == "paused":
        return BudgetPaused(
            f"the budget {budget.name}{whose} is paused ({used}): a person must resume it",
            limit=budget.limit,
            allowed=allowed,
            retry_after_ms=None,
        )
    if need is None:
        need, lacks = 1, f"has nothing left: {used}"
    else:
        lacks = f"has no room for this call: {used}, up to {_needed(budget.unit, need)} needed"
    if refusal.why == "held":
        return BudgetReserved(
            f"the budget {budget.name}{whose} has no room for this call yet: {used}, "
            f"{budget.shown(refusal.held)} reserved for calls in progress, "
            f"up to {_needed(budget.unit, need)} needed",
            limit=budget.limit,
            allowed=allowed,
            retry_after_ms=_RESERVED_RETRY_MS,
        )
    reset_at, after_ms, when = refusal.reset_at, None, "it needs more than the whole budget"
    never_fits = need > budget.amount
    if never_fits:
        when = "it needs more than a whole period allows"
    elif reset_at is not None:
        left_s = (reset_at - now).total_seconds()
        after_ms = max(1_000, math.ceil(left_s * 1000))
        event = "it has room again" if budget.period == "rolling" else "it resets"
        when = f"{event} at {_time_text(reset_at, budget.zone)}"
    elif budget.period == "rolling":
        when = "there is room again as earlier spend leaves its window"
    return BudgetExceeded(
        f"the budget {budget.name}{whose} {lacks}; {when}",
        limit=budget.limit,
        allowed=allowed,
        retry_after_ms=after_ms,
        fallback=budget.fallback,
        resets_at=None if after_ms is None else reset_at,
        never_fits=never_fits,
    )


def whom(budget: Budget) -> list[str]:
    """Return in words which calls a budget applies to."""
    named = [
        f"{dimension} {value}"
        for dimension in ("tenant", "key", "model", "subject", "conversation")
        if (value := getattr(budget, dimension)) is not None
    ]
    return [*named, *(f"each {one}" for one in budget.each)]


def window(budget: Budget) -> str:
    """Return the budget's period in words."""
    if budget.period == "rolling":
        return f"in {_span(budget.window_s or 0)}"
    return f"a {budget.period}" + ("" if budget.zone == "UTC" else f" of {budget.zone}")


def _span(seconds: int) -> str:
    """Return `5 h` or `90 s`: in the largest unit that divides the time evenly."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds and seconds % size == 0:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def resume_command(name: str, scope: Sequence[str | None]) -> str:
    """Return the command that resumes a budget for one scope."""
    of = "".join(f" --of {quote(value or '')}" for value in scope)
    return f"tidegate budgets resume {quote(name)}{of}"


def budget_alert(
    kind: str, data: Mapping[str, Any], unit: Unit, fallback: str | None
) -> dict[str, Any]:
    """Return the body of an alert with its text; `data` as stored. fallback: the budget's cheaper
    model, if any."""
    found = {**data, "scope": scope_values(data["scope"]), "unit": unit}
    return found | {"text": _alert_text(kind, found, fallback)}


def _alert_text(kind: str, data: Mapping[str, Any], fallback: str | None) -> str:
    whose = ", ".join(one or "none" for one in data["scope"])
    whose = f" of {whose}" if whose else ""
    spent, amount = (amount_text(data["unit"], data[name]) for name in ("spent", "amount"))
    text = f"Budget {data['budget']}{whose}: {spent} of {amount} spent"
    if kind == "budget_share":
        return f"{text}, which is {data['share']} % or more."
    if kind == "budget_paused":
        command = resume_command(data["budget"], data["scope"])
        return f"{text}; it is paused until a person resumes it: {command}"
    then = f"was moved to {fallback}" if fallback else "was rejected"
    text = f"{text}; a call {then}, since there is no room for it."
    if reset_at := data.get("reset_at"):
        text += f" It resets at {_time_text(datetime.fromisoformat(reset_at))}."
    return text
