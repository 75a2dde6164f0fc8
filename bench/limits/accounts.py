"""Accounts that are measured: what each provider limits, and the same limits in our policy.

Bounds are chosen so that of each class of models one limit binds: of some the requests, of others
tokens. A provider's minute lasts `window_s`, in the emulator and in the policy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.limits.figures import DAY_S

Limits = list[dict[str, Any]]
# Bounds of ten seconds, which about 20 calls a second use up in all, far from what two cores can
# relay; a longer window has as many calls a second. `PLENTY` never binds.
REQUESTS = 75
TOKENS = 100_000
OUTPUT = 5_000
PLENTY = 100_000_000
BASE_S = 10


@dataclass(frozen=True, slots=True)
class MeasuredProvider:
    """A provider, the models of the load's mix, its limits, and our policy's limits for them.

    `first_policy` says them as 0.1.0 could, where that is not the same but for the provider's name.
    """

    name: str
    dialect: str
    models: Sequence[str]
    limits: Callable[[float], Limits]
    policy: Callable[[int], Mapping[str, Any]]
    first_policy: Callable[[int], Mapping[str, Any]] | None = None

    def account(self, window_s: float, **fields: Any) -> dict[str, Any]:
        return {"provider": self.name, "limits": self.limits(window_s), **fields}

    def binding(self, window_s: float) -> dict[str, str]:
        """The account's name of each limit that binds a class of models, by that of our policy."""
        plenty = PLENTY / BASE_S
        theirs = [
            one
            for one in self.limits(window_s)
            if one["window_s"] <= window_s and one["bound"] / one["window_s"] < plenty
        ]
        names = [f"{one['unit']}:{one['models']}:{one['window_s']:g}s" for one in theirs]
        return dict(zip(self.policy(round(window_s * 1000)), names, strict=True))

    def toml(self, window_s: float, upstream_url: str, *, at_first: bool = False) -> str:
        """The policy: one upstream with its limits; `at_first` as 0.1.0 has them."""
        policy = (self.first_policy or self.policy) if at_first else self.policy
        lines = [
            "[upstreams.measured]",
            *([] if at_first else [f'provider = "{self.name}"']),
            f'base_url = "{upstream_url}"',
            f'dialect = "{self.dialect}"',
            f'key = "{KEY_VARIABLE}"',
            'models = ["*"]',
            "",
            "[upstreams.measured.limits]",
            f'"pool:total" = {AT_ONCE}',
        ]
        for name, value in policy(round(window_s * 1000)).items():
            lines.append(f'"{name}" = {_inline(value)}')
        return "\n".join(lines) + "\n"


KEY_VARIABLE = "MEASURED_KEY"
AT_ONCE = 200  # calls in flight, which binds none of the limits that are measured


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_inline(item)}" for key, item in value.items()) + " }"
    return json.dumps(value)


def _limit(models: str, unit: str, bound: int, window_s: float) -> dict[str, Any]:
    whole = round(bound * window_s / BASE_S)
    return {"models": models, "unit": unit, "bound": whole, "window_s": window_s}


def _for(models: Sequence[str], rates: Mapping[str, int], window_ms: int) -> dict[str, Any]:
    """The same rates for each of some models."""
    return {
        f"{rate}:{model}": {
            "bound": round(bound * window_ms / 1000 / BASE_S),
            "window_ms": window_ms,
        }
        for model in models
        for rate, bound in rates.items()
    }


@dataclass(frozen=True, slots=True)
class TwoClasses:
    """An account with two classes of models: tokens bind the calls of `large`, requests those of
    `small`.

    tokens, unit, rate: the bound of the former, as the account and as our policy count it. checked:
    into how many parts the window of requests is cut. patterns: of the account, for both. a_day: of
    requests of `small`, which binds none.
    """

    large: str
    small: str
    tokens: int = TOKENS
    unit: str = "tokens"
    rate: str = "tpm"
    checked: int = 1
    patterns: tuple[str, str] | None = None
    a_day: int = 0

    def limits(self, window_s: float) -> Limits:
        large, small = self.patterns or (self.large, self.small)
        requests_s = window_s / self.checked
        of_day = {"models": small, "unit": "requests", "bound": self.a_day, "window_s": DAY_S}
        return [
            *([of_day] if self.a_day else []),
            _limit(large, "requests", PLENTY, requests_s),
            _limit(large, self.unit, self.tokens, window_s),
            _limit(small, "requests", REQUESTS, requests_s),
            _limit(small, self.unit, PLENTY, window_s),
        ]

    def policy(self, window_ms: int) -> Mapping[str, Any]:
        return {
            **_for([self.large], {self.rate: self.tokens}, window_ms),
            **_for([self.small], {"rpm": REQUESTS}, window_ms // self.checked),
        }


_OPENAI = TwoClasses("gpt-5", "gpt-5-mini")
_GEMINI = TwoClasses("gemini-2.5-pro", "gemini-2.5-flash", unit="input_tokens", rate="itpm")
# As the preset makes it of requests a minute: a sixth of them in 10 s.
_AZURE = replace(_OPENAI, checked=6)
_BEDROCK = TwoClasses(
    "anthropic.claude-opus-4-5",
    "anthropic.claude-haiku-4-5",
    patterns=("anthropic.claude-opus*", "anthropic.claude-haiku*"),
)
# Its headers tell of a day's requests alone, of which there are 480 times those of a minute.
_GROQ = TwoClasses("llama-70b", "llama-8b", tokens=TOKENS // 5, a_day=480 * 6 * REQUESTS)

OPUS = ("claude-opus-4-5", "claude-opus-4-6")


def _anthropic_limits(window_s: float) -> Limits:
    return [
        _limit("claude-opus-4*", "requests", PLENTY, window_s),
        _limit("claude-opus-4*", "uncached_input_tokens", TOKENS // 10, window_s),
        _limit("claude-opus-4*", "output_tokens", PLENTY, window_s),
        _limit("claude-haiku-*", "requests", PLENTY, window_s),
        _limit("claude-haiku-*", "uncached_input_tokens", PLENTY, window_s),
        _limit("claude-haiku-*", "output_tokens", OUTPUT, window_s),
    ]


def _anthropic_policy(window_ms: int) -> Mapping[str, Any]:
    return {
        **_for(["claude-opus-4*"], {"itpm": TOKENS // 10}, window_ms),
        **_for(["claude-haiku-*"], {"otpm": OUTPUT}, window_ms),
    }


def _first_anthropic_policy(window_ms: int) -> Mapping[str, Any]:
    """A class of models had no limit of its own: each model gets its part of the bound."""
    return {
        **_for(OPUS, {"itpm": TOKENS // 10 // len(OPUS)}, window_ms),
        **_for(["claude-haiku-4-5"], {"otpm": OUTPUT}, window_ms),
    }


def _of_two(
    name: str, dialect: str, account: TwoClasses, first: TwoClasses | None = None
) -> MeasuredProvider:
    models, at_first = (account.large, account.small), None if first is None else first.policy
    return MeasuredProvider(name, dialect, models, account.limits, account.policy, at_first)


PROVIDERS = (
    _of_two("openai", "openai", _OPENAI),
    MeasuredProvider(
        "anthropic",
        "anthropic",
        (*OPUS, "claude-haiku-4-5"),
        _anthropic_limits,
        _anthropic_policy,
        _first_anthropic_policy,
    ),
    _of_two("gemini", "gemini", _GEMINI),
    _of_two("azure", "openai", _AZURE, first=_OPENAI),
    _of_two("bedrock", "anthropic", _BEDROCK),
    _of_two("groq", "openai", _GROQ),
)

AGENT = "claude-opus-4-6"
AGENTS_TOKENS = 60_000


def _agent_limits(window_s: float) -> Limits:
    return [
        _limit("claude-opus-4*", "requests", PLENTY, window_s),
        _limit("claude-opus-4*", "uncached_input_tokens", AGENTS_TOKENS, window_s),
        _limit("claude-opus-4*", "output_tokens", PLENTY, window_s),
    ]


def _agent_policy(window_ms: int) -> Mapping[str, Any]:
    return _for([AGENT], {"itpm": AGENTS_TOKENS}, window_ms)


def _listed_limits(window_s: float) -> Limits:
    """The same, of the models that the emulated API names in its list of limits."""
    return [
        {**limit, "models": limit["models"].replace("opus-4*", "opus-5*")}
        for limit in _anthropic_limits(window_s)
    ]


def _unlimited(provider: MeasuredProvider, **fields: Any) -> MeasuredProvider:
    """The same account, of whose limits our policy knows none."""
    return replace(provider, policy=lambda _window_ms: {}, **fields)


_OPENAIS, _ANTHROPICS = PROVIDERS[:2]
# Accounts whose limits an API of the provider reports.
IMPORTED = (
    _unlimited(_OPENAIS),
    _unlimited(_ANTHROPICS, models=("claude-opus-5-5", "claude-haiku-5-5"), limits=_listed_limits),
)
CONVERSATION = MeasuredProvider("anthropic", "anthropic", (AGENT,), _agent_limits, _agent_policy)
