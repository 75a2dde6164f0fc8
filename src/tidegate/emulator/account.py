"""Account at an emulated provider: profile, limits, prompt cache, other consumers, ledger.

The limits of an account, how each provider counts them, and which headers it sends, are described
in `docs/decisions/0018-how-providers-count.md`, with the sources.

A call is admitted by all limits of its model, or spends nothing; its count is later corrected as
its provider does. The clock is an argument and may be scaled. Invariants: `counted` of a limit is
the total count of its calls; the use of another consumer is in `others` only; a changed bound keeps
the use so far; an `AccountSpec` is valid and never changes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from hashlib import sha256
from math import ceil
from typing import Any, Literal, Self, get_args
from zoneinfo import ZoneInfo

from tidegate.emulator.counting import (
    WEIGHTS,
    CallSize,
    CountedAmount,
    Counter,
    CountingRule,
    Growth,
    Mode,
    Reserve,
    Settle,
    TokenWeights,
    Unit,
    counter_of,
)
from tidegate.emulator.gpu import known_fields, number, whole
from tidegate.errors import InvalidRequest

Provider = Literal["openai", "anthropic", "gemini", "azure", "bedrock", "groq"]
HeaderFamily = Literal[
    "none",
    "openai",
    "anthropic",
    "azure",
    "groq",
    "mistral",
    "cerebras",
    "openrouter",
    "together",
]
DAY_S = 86_400
_MOST = 10**12
_PARTS = ("uncached", "cached", "cache_write", "output")

# The dialects in which each provider is called; calls in other dialects do not count for its
# accounts.
DIALECTS: Mapping[Provider, tuple[str, ...]] = {
    "openai": ("openai",),
    "anthropic": ("anthropic",),
    "gemini": ("gemini", "openai"),
    "azure": ("openai",),
    "bedrock": ("bedrock", "openai", "anthropic"),
    "groq": ("openai",),
}
# Default fields of a limit by provider and unit, `*` for all units; a limit's own fields take
# precedence.
COUNTING: Mapping[Provider, Mapping[str, Mapping[str, Any]]] = {
    "openai": {"tokens": {"reserve": "max", "settle": "never"}},
    "anthropic": {"output_tokens": {"settle": "as_made"}},
    "gemini": {"*": {"mode": "fixed_window"}},
    "azure": {
        "*": {"mode": "fixed_window"},
        "requests": {"window_s": 10},
        "tokens": {"reserve": "max", "settle": "never"},
    },
    "bedrock": {
        "*": {"mode": "fixed_window"},
        "tokens": {"reserve": "sum", "weights": {"cached": 0, "output": 5}},
    },
    "groq": {"tokens": {"weights": {"cached": 0}}},
}
_DAY: Mapping[Provider, Mapping[str, Any]] = {
    "gemini": {"mode": "calendar_day", "zone": "America/Los_Angeles"},
}


def _limits(models: str, **bounds: int) -> list[dict[str, Any]]:
    return [{"models": models, "unit": unit, "bound": bound} for unit, bound in bounds.items()]


def _day(models: str, requests: int) -> list[dict[str, Any]]:
    return [{"models": models, "unit": "requests", "bound": requests, "window_s": DAY_S}]


LIMITS: Mapping[Provider, list[dict[str, Any]]] = {
    "openai": [
        *_limits("gpt-4o", requests=500, tokens=30_000),
        *_limits("gpt-4o-mini*", requests=500, tokens=200_000),
        *_limits("gpt-5*", requests=500, tokens=500_000),
        *_limits("gpt-image-*", requests=50, images=20),
        *_limits("text-embedding-*", requests=3_000, tokens=1_000_000),
        *_day("gpt-4o-mini*", 10_000),
    ],
    "anthropic": [
        *_limits(
            "claude-opus-*", requests=1_000, uncached_input_tokens=500_000, output_tokens=80_000
        ),
        *_limits(
            "claude-sonnet-*", requests=1_000, uncached_input_tokens=450_000, output_tokens=90_000
        ),
        *_limits(
            "claude-haiku-*", requests=1_000, uncached_input_tokens=450_000, output_tokens=90_000
        ),
    ],
    "gemini": [
        *_limits("gemini-2.5-flash", requests=1_000, input_tokens=1_000_000),
        *_limits("gemini-2.5-flash-image", requests=500, input_tokens=500_000, images=500),
        *_limits("gemini-2.5-pro", requests=150, input_tokens=2_000_000),
        *_day("gemini-2.5-flash", 10_000),
        *_day("gemini-2.5-flash-image", 2_000),
        *_day("gemini-2.5-pro", 10_000),
    ],
    "azure": _limits("*", requests=120, tokens=120_000),
    "bedrock": _limits("*", requests=200, tokens=200_000),
    "groq": [*_limits("*", requests=30, tokens=12_000), *_day("*", 14_400)],
}
HEADERS: Mapping[Provider, HeaderFamily] = {
    "openai": "openai",
    "anthropic": "anthropic",
    "gemini": "none",
    "azure": "azure",
    "bedrock": "none",
    "groq": "groq",
}
# Providers that also count failed and refused requests.
COUNTS_FAILED: tuple[Provider, ...] = ("openai",)


@dataclass(frozen=True, slots=True)
class AccountLimit:
    """A limit of an account: at most `bound` of `unit` in `window_s`, for all matching models
    together.

    `pace_s` enforces the same rate also in this shorter time; `growth` is `{percent, start,
    per_s}`: no faster rise above `start` a minute. The other fields are those of
    `counting.CountingRule`.
    """

    unit: Unit
    bound: int
    models: str = "*"
    window_s: float = 60.0
    mode: Mode = "token_bucket"
    reserve: Reserve = "input"
    settle: Settle = "end"
    weights: TokenWeights = field(default_factory=TokenWeights)
    zone: str | None = None
    pace_s: float | None = None
    growth: Mapping[str, int] | None = None

    @property
    def name(self) -> str:
        return f"{self.unit}:{self.models}:{self.window_s:g}s"

    @property
    def rule(self) -> CountingRule:
        return CountingRule(self.unit, self.reserve, self.settle, self.weights)

    def binds(self, model: str) -> bool:
        return fnmatchcase(model.removeprefix("models/"), self.models)

    @classmethod
    def parse(cls, provider: Provider, value: Any) -> Self:
        """Parse JSON. Raises InvalidRequest naming the field."""
        if isinstance(value, cls):
            return value
        known_fields("account.limits", value, tuple(item.name for item in fields(cls)))
        unit = _one_of("account.limits.unit", value.get("unit"), get_args(Unit))
        counting = COUNTING[provider]
        given = {**counting.get("*", {}), **counting.get(unit, {})}
        if value.get("window_s", 0) == DAY_S:
            given |= _DAY.get(provider, {})
        given |= value
        for name, allowed in (("mode", Mode), ("reserve", Reserve), ("settle", Settle)):
            if name in given:
                _one_of(f"account.limits.{name}", given[name], get_args(allowed))
        given["bound"] = whole("account.limits.bound", given.get("bound"), 0, _MOST)
        number("account.limits.window_s", given.get("window_s", 60), 0.001, 31 * DAY_S)
        if given.get("pace_s") is not None:
            number("account.limits.pace_s", given["pace_s"], 0.001, 31 * DAY_S)
        given["weights"] = _weights(unit, given.get("weights", {}))
        if given.get("growth") is not None:
            given["growth"] = _growth(given["growth"])
        if given.get("zone") is not None:
            _zone(given["zone"])
        if not isinstance(given.get("models", "*"), str):
            raise InvalidRequest("account.limits.models", "a limit's models are a pattern")
        return cls(**given)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequest(name, f"{name}: {value!r} is none of {', '.join(allowed)}")
    return value


def _weights(unit: str, value: Any) -> TokenWeights:
    if isinstance(value, TokenWeights):
        return value
    known_fields("account.limits.weights", value, _PARTS)
    changes = {part: whole("account.limits.weights", item, 0, 1000) for part, item in value.items()}
    usual = next((weights for name, weights in WEIGHTS.items() if name == unit), TokenWeights())
    return replace(usual, **changes)


def _growth(value: Any) -> dict[str, int]:
    allowed = ("percent", "start", "per_s")
    known_fields("account.limits.growth", value, allowed)
    if "start" not in value:
        raise InvalidRequest("account.limits.growth", "growth needs a `start`")
    usual = {"percent": 50, "per_s": 60}
    return {
        name: whole(f"account.limits.growth.{name}", item, 1, _MOST)
        for name, item in (usual | value).items()
    }


def _zone(value: Any) -> None:
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, TypeError, OSError):
        raise InvalidRequest("account.limits.zone", f"{value!r} is no time zone") from None


@dataclass(frozen=True, slots=True)
class AccountSpec:
    """An account with a provider: its limits, and other influences on it.

    `cache` is the share of each call's input that is read from the provider's prompt cache, or
    `prefix`: the part that an earlier conversation of the same model begins with, if it has
    `cache_min_tokens`; None caches nothing. `others_share` is the part of each limit that another
    consumer of the account uses. `tier` multiplies all bounds. `clock_scale` is the speed of its
    clock, by which windows, waits and days pass. `workspaces` are the shares of the bounds that
    workspaces are allowed, listed by the rate-limit API and not enforced.
    """

    provider: Provider
    limits: tuple[AccountLimit, ...]
    headers: HeaderFamily
    counts_failed: bool
    cache: float | Literal["prefix"] | None = None
    cache_min_tokens: int = 1024
    others_share: float = 0.0
    tier: float = 1.0
    clock_scale: float = 1.0
    workspaces: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any) -> Self | None:
        """Parse JSON: a provider's name, an object with at least `provider`, or null.

        Raises InvalidRequest naming the field.
        """
        if value is None or isinstance(value, cls):
            return value
        if isinstance(value, str):
            value = {"provider": value}
        known_fields("account", value, tuple(item.name for item in fields(cls)))
        name = _one_of("account.provider", value.get("provider"), get_args(Provider))
        provider: Provider = next(known for known in DIALECTS if known == name)
        limits = value.get("limits", LIMITS[provider])
        if not isinstance(limits, list | tuple):
            raise InvalidRequest("account.limits", "`limits` must be a list of objects")
        family = value.get("headers", HEADERS[provider])
        _one_of("account.headers", family, get_args(HeaderFamily))
        counts_failed = value.get("counts_failed", provider in COUNTS_FAILED)
        if not isinstance(counts_failed, bool):
            raise InvalidRequest("account.counts_failed", "`counts_failed` must be true or false")
        cache = value.get("cache")
        if cache not in (None, "prefix"):
            cache = number("account.cache", cache, 0, 1)
        shares = value.get("workspaces", {})
        if not isinstance(shares, Mapping):
            raise InvalidRequest("account.workspaces", "`workspaces` must be an object of shares")
        return cls(
            provider=provider,
            limits=tuple(AccountLimit.parse(provider, item) for item in limits),
            headers=family,
            counts_failed=counts_failed,
            cache=cache,
            cache_min_tokens=whole(
                "account.cache_min_tokens", value.get("cache_min_tokens", 1024), 0, _MOST
            ),
            others_share=number("account.others_share", value.get("others_share", 0), 0, 1),
            tier=number("account.tier", value.get("tier", 1), 0.001, 1000),
            clock_scale=number("account.clock_scale", value.get("clock_scale", 1), 0.01, 10_000),
            workspaces={
                name: number(f"account.workspaces.{name}", share, 0, 1)
                for name, share in shares.items()
            },
        )

    def changed(self, changes: Mapping[str, Any]) -> Self:
        """Return the spec with some fields replaced. Raises InvalidRequest, as `parse` does."""
        made = self.parse({**self.to_json(), **changes})
        assert made is not None  # `changes` or this spec have a provider
        return made

    def bound_of(self, limit: AccountLimit) -> int:
        return round(limit.bound * self.tier)

    def to_json(self) -> dict[str, Any]:
        return {
            item.name: [limit.to_json() for limit in self.limits]
            if item.name == "limits"
            else getattr(self, item.name)
            for item in fields(self)
        }


MOST_REFUSALS = 1_000  # refused calls whose numbers are kept
MOST_PREFIXES = 50_000
CACHE_NS = 300 * 10**9
# Steps per window in which another consumer takes its share.
STEPS_OF_OTHERS = 20
_PARTS_OF_ONE = 1_000_000
SECOND_NS = 10**9

RefusedFor = Literal["used_up", "too_large", "growth"]


@dataclass(frozen=True, slots=True)
class AccountRefusal:
    """The limit that refused a call, with its use, the requested amount, and the wait until it
    fits."""

    reason: RefusedFor
    limit: AccountLimit
    bound: int
    used: int
    requested: int
    wait_ns: int


@dataclass(frozen=True, slots=True)
class LimitReading:
    """The current state of a limit; `charged` is the count of the call for which it is read."""

    limit: AccountLimit
    bound: int
    remaining: int
    full_ns: int
    charged: int


class AccountLimitReached(Exception):
    """An account has no capacity for a call."""

    def __init__(self, refusal: AccountRefusal, model: str) -> None:
        super().__init__(refusal.limit.name)
        self.refusal = refusal
        self.model = model


class LimitBook:
    """The state of a limit of an account: its counters, and its totals.

    shorter: the state of the limit with a shorter window that counts the same amounts of the same
    models, if any: another consumer's use of that limit also counts for this one.
    """

    shorter: LimitBook | None = None

    def __init__(self, limit: AccountLimit, bound: int, others_share: float, now_ns: int) -> None:
        self.limit = limit
        self.rule = limit.rule
        self.refused = 0
        self.counted = 0
        self.others = 0
        self.others_refused = 0
        self._bound = bound
        self._window_ns = round(limit.window_s * 1e9)
        self._main = counter_of(limit.mode, bound, self._window_ns, limit.zone)
        self._pace = None if limit.pace_s is None else self._paced(limit.pace_s)
        self._growth = None
        if (growth := limit.growth) is not None:
            per_ns = growth["per_s"] * SECOND_NS
            self._growth = Growth(growth["start"], growth["percent"], per_ns)
        self._others_parts = round(others_share * _PARTS_OF_ONE)
        self._others_ns = now_ns
        self._others_due = 0
        self._others_followed = 0

    def _paced(self, pace_s: float) -> Counter:
        mode: Mode = "token_bucket" if self.limit.mode == "token_bucket" else "fixed_window"
        return counter_of(mode, self._pace_bound(pace_s), round(pace_s * 1e9))

    def _pace_bound(self, pace_s: float) -> int:
        return max(int(self._bound * pace_s / self.limit.window_s), 1)

    def refusal(self, size: CallSize, now_ns: int) -> AccountRefusal | None:
        """Return why the call does not fit now; None if it does."""
        requested = self.rule.at_start(size)
        # Tokens that are counted as they are made require capacity for at least one.
        least = max(requested, 1) if self.rule.settle == "as_made" else requested
        if requested > self._bound:
            return self._refused("too_large", requested, 0, now_ns)
        counters = [self._main] if self._pace is None else [self._main, self._pace]
        if least and (wait_ns := max(one.wait_ns(least, now_ns) for one in counters)):
            return self._refused("used_up", requested, wait_ns, now_ns)
        if self._growth is not None and (wait_ns := self._growth.wait_ns(requested, now_ns)):
            return self._refused("growth", requested, wait_ns, now_ns)
        return None

    def _refused(
        self, reason: RefusedFor, requested: int, wait_ns: int, now_ns: int
    ) -> AccountRefusal:
        used = self._bound - self._main.remaining(now_ns)
        return AccountRefusal(reason, self.limit, self._bound, used, requested, wait_ns)

    def take(self, size: CallSize, now_ns: int) -> CountedAmount:
        amount = self.rule.at_start(size)
        if self._pace is not None:
            self._pace.take(amount, now_ns)
        if self._growth is not None:
            self._growth.take(amount, now_ns)
        self.counted += amount
        return self._main.take(amount, now_ns)

    def correct(self, taken: CountedAmount, total: int, now_ns: int) -> None:
        if total != taken.total:
            self.counted += total - taken.total
            self._main.correct(taken, total, now_ns)

    def count_failed(self, now_ns: int) -> None:
        """Count a request that failed or was refused, as far as there is capacity."""
        if self.limit.unit == "requests" and self._main.remaining(now_ns):
            self.take(CallSize(), now_ns)

    def let_others_use(self, now_ns: int) -> None:
        """Count the use of another consumer since the last call, in steps; use that does not fit is
        refused to that consumer."""
        if self.shorter is not None:
            self.shorter.let_others_use(now_ns)
            self._take_for_others(self.shorter.others - self._others_followed, now_ns)
            self._others_followed = self.shorter.others
        if self.shorter is not None or not self._others_parts:
            self._others_ns = now_ns
            return
        # Older use is outside of every counter's window.
        self._others_ns = max(self._others_ns, now_ns - 2 * self._window_ns)
        step_ns = max(self._window_ns // STEPS_OF_OTHERS, 1)
        while self._others_ns < now_ns:
            at_ns = min(now_ns, self._others_ns + step_ns)
            self._others_due += (at_ns - self._others_ns) * self._bound * self._others_parts
            self._others_ns = at_ns
            whole, self._others_due = divmod(self._others_due, self._window_ns * _PARTS_OF_ONE)
            self._take_for_others(whole, at_ns)

    def _take_for_others(self, whole: int, at_ns: int) -> None:
        fits = min(whole, self._main.remaining(at_ns))
        if fits:
            self._main.take(fits, at_ns)
        self.others += fits
        self.others_refused += whole - fits

    def change(self, bound: int, others_share: float, now_ns: int) -> None:
        self._bound = bound
        self._main.resize(bound, now_ns)
        if self._pace is not None and self.limit.pace_s is not None:
            self._pace.resize(self._pace_bound(self.limit.pace_s), now_ns)
        self._others_parts = round(others_share * _PARTS_OF_ONE)

    def view(self, now_ns: int, charged: int = 0) -> LimitReading:
        remaining = min(self._main.remaining(now_ns), self._bound)
        return LimitReading(self.limit, self._bound, remaining, self._main.full_ns(now_ns), charged)

    def to_json(self, now_ns: int) -> dict[str, Any]:
        return {
            "name": self.limit.name,
            "unit": self.limit.unit,
            "models": self.limit.models,
            "window_s": self.limit.window_s,
            "mode": self.limit.mode,
            "bound": self._bound,
            "remaining": self._main.remaining(now_ns),
            "counted": self.counted,
            "refused": self.refused,
            "others": self.others,
            "others_refused": self.others_refused,
        }


@dataclass(slots=True)
class AccountCharge:
    """The counts of an admitted call so far, for each of its limits."""

    size: CallSize
    taken: list[tuple[LimitBook, CountedAmount]] = field(default_factory=list)
    output_tokens: int = 0


class PromptCache:
    """Prefixes of conversations that a provider keeps for five minutes after their last use."""

    def __init__(self, least_tokens: int) -> None:
        self._least = least_tokens
        self._until_ns: OrderedDict[bytes, int] = OrderedDict()

    def read(self, model: str, texts: Sequence[str], now_ns: int) -> int:
        """Return the LLM tokens of the longest cached prefix of a conversation."""
        found = 0
        for key, tokens in self._prefixes(model, texts):
            if self._until_ns.get(key, 0) > now_ns:
                found = tokens
        return found

    def keep(self, model: str, texts: Sequence[str], now_ns: int) -> None:
        for key, _ in self._prefixes(model, texts):
            self._until_ns[key] = now_ns + CACHE_NS
            self._until_ns.move_to_end(key)
        while len(self._until_ns) > MOST_PREFIXES:
            self._until_ns.popitem(last=False)

    def _prefixes(self, model: str, texts: Sequence[str]) -> Iterator[tuple[bytes, int]]:
        digest, chars = sha256(model.encode("utf-8", "replace")), 0
        for text in texts:
            digest.update(sha256(text.encode("utf-8", "surrogatepass")).digest())
            chars += len(text)
            if (tokens := ceil(chars / 4)) >= self._least:
                yield digest.digest(), tokens


class ProviderAccount:
    """An account in use. `clock_ns` is the real clock; its times are those of its scaled clock."""

    def __init__(self, spec: AccountSpec, clock_ns: Callable[[], int]) -> None:
        self.spec = spec
        self._clock_ns = clock_ns
        self._origin_ns = clock_ns()
        self.calls = 0
        self.refused = 0
        self._first_refusals: list[int] = []
        now_ns = self.now_ns()
        self._books = [
            LimitBook(limit, spec.bound_of(limit), spec.others_share, now_ns)
            for limit in spec.limits
        ]
        for book in self._books:
            book.shorter = self._shorter(book.limit)
        self._cache = PromptCache(spec.cache_min_tokens)

    def _shorter(self, limit: AccountLimit) -> LimitBook | None:
        """Return the state of the like limit with the shortest window, if that is shorter than the
        limit's."""
        similar = [
            one
            for one in self._books
            if (one.limit.unit, one.limit.models) == (limit.unit, limit.models)
        ]
        least = min(similar, key=lambda one: one.limit.window_s)
        return least if least.limit.window_s < limit.window_s else None

    def now_ns(self) -> int:
        passed = self._clock_ns() - self._origin_ns
        return self._origin_ns + round(passed * self.spec.clock_scale)

    def governs(self, dialect: str) -> bool:
        """Return whether calls in this dialect count for this account."""
        return dialect in DIALECTS[self.spec.provider]

    def change(self, spec: AccountSpec) -> bool:
        """Replace the spec and keep the use so far. Return False, unchanged, if the provider, the
        limits, the clock's speed or `cache_min_tokens` differ."""
        same = ("provider", "limits", "clock_scale", "cache_min_tokens")
        if any(getattr(spec, name) != getattr(self.spec, name) for name in same):
            return False
        now_ns = self.now_ns()
        for book in self._books:
            book.let_others_use(now_ns)
            book.change(spec.bound_of(book.limit), spec.others_share, now_ns)
        self.spec = spec
        return True

    def cached_tokens(self, model: str, texts: Sequence[str], input_tokens: int) -> int:
        """Return the LLM tokens of a call's input that are read from the prompt cache."""
        match self.spec.cache:
            case None:
                return 0
            case "prefix":
                return min(self._cache.read(model, texts, self.now_ns()), input_tokens)
            case share:
                return int(input_tokens * share)

    def keep_prompt(self, model: str, texts: Sequence[str]) -> None:
        if self.spec.cache == "prefix":
            self._cache.keep(model, texts, self.now_ns())

    def admit(self, model: str, size: CallSize) -> AccountCharge:
        """Count a call for each of its limits. Raises AccountLimitReached, then counting at most a
        failed request, for providers that count those."""
        now_ns = self.now_ns()
        books = [book for book in self._books if book.limit.binds(model)]
        self.calls += 1
        for book in books:
            book.let_others_use(now_ns)
        for book in books:
            if (refusal := book.refusal(size, now_ns)) is not None:
                book.refused += 1
                self.refused += 1
                if len(self._first_refusals) < MOST_REFUSALS:
                    self._first_refusals.append(self.calls)
                if self.spec.counts_failed:
                    self._count_failed(books, now_ns)
                raise AccountLimitReached(refusal, model)
        charge = AccountCharge(size)
        charge.taken = [(book, book.take(size, now_ns)) for book in books]
        return charge

    @staticmethod
    def _count_failed(books: Sequence[LimitBook], now_ns: int) -> None:
        for book in books:
            book.count_failed(now_ns)

    def count_failed(self, model: str) -> None:
        """Count a call that the API itself refused, for providers that count those."""
        if self.spec.counts_failed:
            books = [book for book in self._books if book.limit.binds(model)]
            self._count_failed(books, self.now_ns())

    def made(self, charge: AccountCharge, output_tokens: int) -> None:
        """Note the output of a call so far, and count it for limits that count output as it is
        made."""
        charge.output_tokens = output_tokens
        now_ns = self.now_ns()
        for book, taken in charge.taken:
            if book.rule.settle == "as_made":
                book.correct(taken, book.rule.in_all(charge.size, output_tokens), now_ns)

    def end(self, charge: AccountCharge, *, answered: bool) -> None:
        """Settle an ended call: by its output, or as nothing if it got no answer."""
        now_ns = self.now_ns()
        for book, taken in charge.taken:
            if answered:
                total = book.rule.in_all(charge.size, charge.output_tokens)
            elif self.spec.counts_failed:
                total = taken.total
            else:
                total = 0
            book.correct(taken, total, now_ns)

    def views(self, model: str, charge: AccountCharge | None = None) -> list[LimitReading]:
        """Return the current state of the limits of a model."""
        now_ns = self.now_ns()
        charged = {} if charge is None else {id(book): taken for book, taken in charge.taken}
        views = []
        for book in self._books:
            if book.limit.binds(model):
                book.let_others_use(now_ns)
                taken = charged.get(id(book))
                views.append(book.view(now_ns, 0 if taken is None else taken.total))
        return views

    def to_json(self) -> dict[str, Any]:
        """Return the state as JSON: calls, refusals (with the numbers of the first thousand refused
        calls), and each limit."""
        now_ns = self.now_ns()
        for book in self._books:
            book.let_others_use(now_ns)
        return {
            "provider": self.spec.provider,
            "now_ns": now_ns,
            "calls": self.calls,
            "refused": self.refused,
            "refused_calls": self._first_refusals,
            "limits": [book.to_json(now_ns) for book in self._books],
        }
