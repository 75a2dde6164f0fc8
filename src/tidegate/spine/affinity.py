"""Affinity of conversations to the upstream whose prompt cache holds their beginning.

Upstreams that serve a model alike are chosen by lot, except for conversations: a provider's prompt
cache belongs to one account. A conversation is known by its name, by
`prompt_cache_key`, or else by its tools, its system prompt and its first message. Its first call
goes by weighted rendezvous hashing (Thaler and Ravishankar, 1998; weights as -w / ln h), on which
all processes agree without a message; later calls go where this process last saw its answers, and
wait there for as long as the tokens that answers read from the cache are worth.

Invariants: an upstream that is out or paused is not waited for; a conversation of one tenant moves
no call of another's; the memory is bounded; a route's order stands.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import log
from typing import NamedTuple

from tidegate.admission.conversations import CACHE_MS
from tidegate.call import Usage
from tidegate.spine.routing import Target

MOST_CONVERSATIONS = 4_096
_DIGEST_BYTES = 16


class _Warm(NamedTuple):
    """Where a conversation was answered last. cached_tokens: read from the cache, or written to
    it."""

    upstream: str
    cached_tokens: int
    at_ms: float


@dataclass(slots=True)
class Home:
    """The upstream of one conversation. is_known: it has answered there lately. wait_ms: how long
    its cache is worth waiting for."""

    key: bytes
    target: Target
    is_known: bool = False
    wait_ms: float = 0.0


class Affinity:
    """Where conversations were answered last. One per process."""

    def __init__(
        self,
        wait_us_per_token: float,
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._wait_ms_per_token = wait_us_per_token / 1000
        self._now_ms = now_ms
        self._warm: OrderedDict[bytes, _Warm] = OrderedDict()

    def home(self, key: bytes | None, targets: Sequence[Target]) -> Home | None:
        """Where a conversation goes first, of two targets or more; None for a call of none."""
        if key is None:
            return None
        warm = self._warm.get(key)
        if warm is not None and self._now_ms() - warm.at_ms <= CACHE_MS:
            for target in targets:
                if target.upstream.name == warm.upstream:
                    wait_ms = warm.cached_tokens * self._wait_ms_per_token
                    return Home(key, target, is_known=True, wait_ms=wait_ms)
        return Home(key, max(targets, key=lambda one: _rank(key, one)))

    def note(self, home: Home, target: Target, usage: Usage) -> None:
        """Remember where a call of the conversation was answered, and what its cache has."""
        read, details = usage.cached_tokens or 0, usage.details
        written = 0 if details is None else details.cache_write_tokens or 0
        self._warm[home.key] = _Warm(target.upstream.name, read + written, self._now_ms())
        self._warm.move_to_end(home.key)
        if len(self._warm) > MOST_CONVERSATIONS:
            self._warm.popitem(last=False)


def _rank(key: bytes, target: Target) -> float:
    name = target.upstream.name.encode()
    drawn = int.from_bytes(blake2b(key + name, digest_size=8).digest())
    return -target.upstream.weight / log((drawn + 1) / (2**64 + 1))


def conversation_key(model: str, tenant: str, conversation: str | None) -> bytes | None:
    """The same for all calls of one conversation, in every process; None where none is known."""
    if conversation is None:
        return None
    whose = f"{model}\0{tenant}\0{conversation}".encode("utf-8", "replace")
    return blake2b(whose, digest_size=_DIGEST_BYTES).digest()
