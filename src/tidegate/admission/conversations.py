"""Prediction of the input that a provider's prompt cache has of a call. Pure: the clock is passed.

A conversation is known by its tools, its system prompt and its first message. Its next call sends
what the last one sent and a little more; the cache holds what the last one read and wrote. The
first call of another conversation with the same tools and system prompt finds what the first calls
of others found, and no less of its input than nearly all first calls lately. What is predicted of
a conversation is scaled by how it has come true lately, for each tenant and model.

Invariants: nothing is predicted before predictions have come true; what a tenant's calls teach
changes nothing for another; the memory is bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

# Providers keep what is cached for five minutes at least since its last use.
CACHE_MS = 300_000
MOST_CALLS = 4_096
MOST_OF_A_TENANT = 512
_REMEMBERED, _ENOUGH = 64, 4
# One prediction in so many may have been too high.
_ONE_IN = 20
# First calls of conversations that are known before their share of cached input is relied on.
_ENOUGH_FIRST = 20
# On what a conversation has grown by, which is guessed from its letters.
_MARGIN, _MARGIN_TOKENS = 1.3, 64


class ConversationKey(NamedTuple):
    """Digests of what a conversation's calls have in common: its tools and system prompt, and these
    with its first message."""

    opening: int
    conversation: int


@dataclass(slots=True)
class LastCall:
    """What the last call of a conversation used, in tokens; `guessed` is what its letters came to.
    `cached`: what the provider read from its cache and wrote to it."""

    at_ms: float
    guessed: int
    input: int
    cached: int


@dataclass(slots=True)
class _ModelRatios:
    """What calls of one tenant and model have shown. ratios: how predictions came true, actual over
    predicted, at most 1. first: input that was not in the cache over its letters' guess, of first
    calls of conversations."""

    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    first: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    first_at_ms: float = -CACHE_MS

    def factor(self) -> float:
        """What is kept of a prediction."""
        if len(self.ratios) < _ENOUGH:
            return 0.0
        return sorted(self.ratios)[len(self.ratios) // _ONE_IN]

    def first_uncached(self, guessed: int, now_ms: float) -> int | None:
        """Uncached input of a conversation's first call; None while too little is known."""
        if len(self.first) < _ENOUGH_FIRST or now_ms - self.first_at_ms > CACHE_MS:
            return None
        rarely_more = sorted(self.first)[-1 - len(self.first) // _ONE_IN]
        return ceil(guessed * rarely_more)


class ExpectedInput(NamedTuple):
    """Of a call. `uncached`: input tokens that the cache will not have; `cached`: those that it
    would have if all came true."""

    uncached: int
    cached: int


class Conversations:
    """One per process and upstream."""

    def __init__(self, now_ms: Callable[[], float]) -> None:
        self._now_ms = now_ms
        self._calls: OrderedDict[str, OrderedDict[tuple[str, int], LastCall]] = OrderedDict()
        self._count = 0
        self._models: OrderedDict[tuple[str, str], _ModelRatios] = OrderedDict()

    def expect(
        self, tenant: str, model: str, key: ConversationKey, guessed: int, input_tokens: int
    ) -> ExpectedInput:
        """For a call whose letters come to `guessed` and that will have `input_tokens` at most."""
        known = self._models.get((tenant, model))
        last = self._last(tenant, model, key.conversation)
        first = None
        if last is not None and last.guessed <= guessed:
            ratio = last.input / max(1, last.guessed)
            grown = ceil((guessed - last.guessed) * ratio * _MARGIN) + _MARGIN_TOKENS
            cached, whole = last.cached, min(input_tokens, last.input + grown)
        else:
            if known is not None:
                first = known.first_uncached(guessed, self._now_ms())
            last = self._last(tenant, model, key.opening)
            cached, whole = 0 if last is None else last.cached, input_tokens
        kept = 0 if known is None else int(cached * known.factor())
        uncached = input_tokens if not kept else max(0, whole - kept)
        return ExpectedInput(uncached if first is None else min(uncached, first), cached)

    def learn(
        self,
        tenant: str,
        model: str,
        key: ConversationKey,
        expected: ExpectedInput,
        call: LastCall,
        read: int,
    ) -> None:
        """From a finished call, of whose input the provider `read` so much from its cache."""
        known = self._models.setdefault((tenant, model), _ModelRatios())
        self._models.move_to_end((tenant, model))
        if len(self._models) > MOST_CALLS:
            self._models.popitem(last=False)
        if expected.cached:
            known.ratios.append(min(1.0, read / expected.cached))
        is_first = self._last(tenant, model, key.conversation) is None
        if is_first:
            known.first.append((call.input - read) / max(1, call.guessed))
            known.first_at_ms = call.at_ms
        self._keep(tenant, (model, key.conversation), call)
        if read and is_first:
            opening = self._last(tenant, model, key.opening)
            shared = read if opening is None else min(read, opening.cached)
            common = LastCall(call.at_ms, call.guessed, call.input, shared)
            self._keep(tenant, (model, key.opening), common)

    def _last(self, tenant: str, model: str, digest: int) -> LastCall | None:
        own = self._calls.get(tenant)
        last = None if own is None else own.get((model, digest))
        if last is None or self._now_ms() - last.at_ms > CACHE_MS:
            return None
        return last

    def _keep(self, tenant: str, name: tuple[str, int], call: LastCall) -> None:
        own = self._calls.setdefault(tenant, OrderedDict())
        self._calls.move_to_end(tenant)
        self._count += name not in own
        own[name] = call
        own.move_to_end(name)
        if len(own) > MOST_OF_A_TENANT:
            own.popitem(last=False)
            self._count -= 1
        while self._count > MOST_CALLS:
            self._count -= len(self._calls.popitem(last=False)[1])
