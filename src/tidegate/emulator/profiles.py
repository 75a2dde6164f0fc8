"""Profiles of providers: what an account limits, how each counts it, which headers it sends.

The facts and their sources are in `docs/decisions/0018-how-providers-count.md`. Invariant: an
`AccountSpec` is sound and never changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, Self, get_args
from zoneinfo import ZoneInfo

from tidegate.emulator.checks import known_fields, number, whole
from tidegate.emulator.counting import (
    WEIGHTS,
    CountingRule,
    Mode,
    Reserve,
    Settle,
    TokenWeights,
    Unit,
)
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

# The dialects in which each provider is called; calls in others are not of its accounts.
DIALECTS: Mapping[Provider, tuple[str, ...]] = {
    "openai": ("openai",),
    "anthropic": ("anthropic",),
    "gemini": ("gemini", "openai"),
    "azure": ("openai",),
    "bedrock": ("openai", "anthropic"),
    "groq": ("openai",),
}
# Fields of a limit by provider and unit, `*` for all units; a limit's own fields come before them.
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
# Providers that count a request also where it fails or is refused.
COUNTS_FAILED: tuple[Provider, ...] = ("openai",)


@dataclass(frozen=True, slots=True)
class AccountLimit:
    """A limit of an account: at most `bound` of `unit` in `window_s`, for all models that match.

    `pace_s` checks the same rate in so short a span too; `growth` is `{percent, start, per_s}`: no
    faster rise above `start` a minute. The rest is as in `counting.CountingRule`.
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
        """From JSON; raises InvalidRequest naming the field."""
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
    """An account with a provider: its limits, and what befalls it.

    `cache` is the share of each call's input that comes from the provider's prompt cache, or
    `prefix`: as much as begins an earlier conversation of the same model, if it has
    `cache_min_tokens`; None caches nothing. `others_share` is the part of each limit that another
    consumer of the account uses. `tier` multiplies all bounds. `clock_scale` is how much faster
    than the real clock its windows, times to wait and days pass. `workspaces` are the shares of the
    bounds that workspaces are allowed, listed by the rate-limit API and not enforced.
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
        """From JSON: a provider's name, an object with at least `provider`, or null.

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
        """With some fields replaced; raises InvalidRequest, as `parse` does."""
        made = self.parse({**self.to_json(), **changes})
        assert made is not None  # `changes` have a provider, or this has one
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
