"""Affinity of conversations to the upstream that has their beginning in its prompt cache.

Equal upstreams of a model and of one price are chosen at random, except for conversations: a
provider's prompt cache belongs to one account. A conversation is identified by its name, by
`prompt_cache_key`, or else by its tools, its system prompt and its first message. Its first call is
placed by weighted rendezvous hashing (Thaler and Ravishankar, 1998; weights as -w / ln h), on which
all processes agree without a message. Later calls go where this process last saw its answers, and
wait there for longer than they would elsewhere by as much as the tokens that answers read from the
cache are worth. That is the total excess of all its calls, times a random share drawn for each
stay: a conversation moves once it has waited for about what the move costs, and of several
conversations that wait for one another, one moves first (randomized ski rental; Karlin, Manasse,
McGeoch, Owicki, "Competitive Randomized Algorithms for Nonuniform Problems", 1994). A move is
notified to the other processes.

What a cached token saves is measured: the time to the first byte of streamed answers, by how many
tokens their upstreams had to read. What a tenant's calls of a model usually wait at each upstream
is measured too. Where all upstreams have
queues, a stay costs only what is above that of the others, and a conversation that has used up its
patience still waits where it is, unless its queue is longer by more than chance.

Invariants: no call waits for an upstream that is out or paused; a tenant's conversation moves no
call of another tenant, nor do waits and answers of another tenant; memory is bounded; the order of
a route is kept.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import e, inf, log
from random import random
from typing import Any, NamedTuple

from tidegate.admission.demand import CACHE_MS
from tidegate.call import Usage
from tidegate.dialects.requests import opening_of
from tidegate.limiter import SPARE_MS, Permit
from tidegate.record import Lineage
from tidegate.spine.routing import Target
from tidegate.store.provider.resources import ResourceOwner

MOST_CONVERSATIONS = 4_096
# A permit that another process has released, and keeps for a next call, arrives within this time.
HANDOVER_MS = 4 * SPARE_MS
# Usual waits at upstreams: of how many calls at least and at most, and how many are remembered.
_LEAST_CALLS, _MOST_CALLS, MOST_WAITS = 3, 16, 4_096
# A usual wait of this many times another's is longer by more than chance, as is a single wait.
_LONGER, _LONGER_ONCE = 1.5, 4
_NO_WAITS = (0.0, 0, -inf)
# The time that a cached token saves: before anything is measured, and at least, since it also costs
# less.
GUESSED_US_PER_TOKEN, LEAST_US_PER_TOKEN = 200, 20
# Answers that a measured time is of, as numbers of calls and of squared tokens.
_MOST_ANSWERS, _MOST_SPREAD = 64, 16 * 10_000.0**2
_DIGEST_BYTES = 16
_OPENING_BYTES = 12
_LONGEST_NAME = 200  # of a conversation

Whose = tuple[str, str]  # a tenant and a model


class _Warm(NamedTuple):
    """The upstream that last answered a conversation. cached_tokens: read from its cache, or
    written to it. excess_ms: how much longer its calls have waited than elsewhere since the
    conversation moved there; patience: the share of the cache's worth that they do."""

    upstream: str
    cached_tokens: int
    at_ms: float
    excess_ms: float
    patience: float


@dataclass(slots=True)
class Home:
    """The preferred upstream of one conversation. is_known: it has answered lately. wait_ms: how
    long its cache is worth waiting for now; excess_ms: how much longer than elsewhere the
    conversation's calls have waited for it. whose: the tenant and model; elsewhere_ms: what their
    calls usually wait at the others."""

    key: bytes
    target: Target
    is_known: bool = False
    wait_ms: float = 0.0
    excess_ms: float = 0.0
    patience: float | None = None
    whose: Whose = ("", "")
    elsewhere_ms: float = 0.0

    def places(self, targets: Sequence[Target]) -> Iterator[int]:
        """Yield the indexes of targets in order of preference: the home first, then by rendezvous
        rank."""
        own = next((at for at, one in enumerate(targets) if one == self.target), None)
        if own is not None:
            yield own
        others = (at for at in range(len(targets)) if at != own)
        yield from sorted(others, key=lambda at: _rank(self.key, targets[at]), reverse=True)


@dataclass(slots=True)
class _ReadingTime:
    """The time that an upstream takes to read one token that is not cached: a Bayesian regression
    of the times to the first byte on the tokens that had to be read. The guess is the mean of the
    prior and its standard deviation. tokens, first_ms: means; spread, common: sums of squared
    deviations and of their products; noise: the variance of the times that tokens do not explain.
    """

    calls: int = 0
    tokens: float = 0.0
    first_ms: float = 0.0
    spread: float = 0.0
    common: float = 0.0
    noise: float = 1_000.0**2

    def ms_per_token(self) -> float:
        guess_ms = GUESSED_US_PER_TOKEN / 1000
        doubt = self.noise / guess_ms**2
        measured_ms = (self.common + doubt * guess_ms) / (self.spread + doubt)
        return max(LEAST_US_PER_TOKEN / 1000, measured_ms)

    def add(self, tokens: int, first_ms: float) -> None:
        off_tokens, off_ms = tokens - self.tokens, first_ms - self.first_ms
        unexplained_ms = off_ms - self.ms_per_token() * off_tokens
        self.calls = min(self.calls, _MOST_ANSWERS - 1) + 1
        share = 1 / self.calls
        self.tokens += share * off_tokens
        self.first_ms += share * off_ms
        self.spread += (1 - share) * off_tokens**2
        self.common += (1 - share) * off_tokens * off_ms
        self.noise += ((1 - share) * unexplained_ms**2 - self.noise) / (self.calls + 1)
        if self.spread > _MOST_SPREAD:  # later answers count for more
            self.common *= _MOST_SPREAD / self.spread
            self.spread = _MOST_SPREAD


class Affinity:
    """Upstreams that last answered each conversation. One per process. wait_us_per_token: how long
    a cached token is worth waiting for; None for the time that it saves, as measured."""

    def __init__(
        self,
        wait_us_per_token: float | None,
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
        draw: Callable[[], float] = random,
    ) -> None:
        self._draw = draw
        self._wait_ms_per_token = None if wait_us_per_token is None else wait_us_per_token / 1000
        self._now_ms = now_ms
        self._warm: OrderedDict[bytes, _Warm] = OrderedDict()
        # The usual wait at an upstream, of how many calls it is, and when the last one ended.
        self._waits: OrderedDict[tuple[Whose, str], tuple[float, int, float]] = OrderedDict()
        self._reading: OrderedDict[Whose, _ReadingTime] = OrderedDict()
        # When a conversation last came to an upstream or left it: waits until then say nothing.
        self._changed_ms: dict[str, float] = {}
        # Called with a conversation's key, its new upstream and the number of tokens cached there.
        self.on_move: Callable[[bytes, str, int], None] | None = None

    def home(
        self, key: bytes | None, targets: Sequence[Target], whose: Whose = ("", "")
    ) -> Home | None:
        """Return the home of a conversation, among two or more targets; None without a
        conversation. whose: its tenant and model."""
        if key is None:
            return None
        warm = self._warm.get(key)
        if warm is not None and self._now_ms() - warm.at_ms <= CACHE_MS:
            for target in targets:
                if target.upstream.name == warm.upstream:
                    elsewhere_ms = self._elsewhere_ms(whose, target, targets)
                    worth_ms = warm.cached_tokens * self.ms_per_token(whose)
                    left_ms = worth_ms * warm.patience - warm.excess_ms
                    own_ms = self.usual_ms(whose, target)
                    is_usual = own_ms is not None and own_ms <= _LONGER * elsewhere_ms
                    wait_ms = 0.0
                    if worth_ms and (left_ms > 0 or is_usual):
                        wait_ms = max(0.0, left_ms) + _LONGER_ONCE * elsewhere_ms
                    of_stay = (warm.excess_ms, warm.patience, whose, elsewhere_ms)
                    return Home(key, target, True, wait_ms, *of_stay)
        first = max(targets, key=lambda one: _rank(key, one))
        handover_ms = 0.0 if self._wait_ms_per_token == 0 else HANDOVER_MS
        return Home(key, first, wait_ms=handover_ms, whose=whose)

    def ms_per_token(self, whose: Whose) -> float:
        """Return how long a cached token is worth waiting for."""
        if self._wait_ms_per_token is not None:
            return self._wait_ms_per_token
        reading = self._reading.get(whose)
        return GUESSED_US_PER_TOKEN / 1000 if reading is None else reading.ms_per_token()

    def usual_ms(self, whose: Whose, target: Target) -> float | None:
        """Return the usual wait at an upstream, None if nothing is known of it now."""
        name = target.upstream.name
        usual_ms, calls, at_ms = self._waits.get((whose, name), _NO_WAITS)
        return usual_ms if calls >= _LEAST_CALLS and self._is_new(name, at_ms) else None

    def _is_new(self, upstream: str, at_ms: float) -> bool:
        return at_ms > max(self._now_ms() - CACHE_MS, self._changed_ms.get(upstream, -inf))

    def _elsewhere_ms(self, whose: Whose, home: Target, targets: Sequence[Target]) -> float:
        """Return the usual wait at the other upstreams, 0 for one of which nothing is known."""
        if not self._waits:
            return 0.0
        others = [self.usual_ms(whose, one) or 0.0 for one in targets if one != home]
        return sum(others) / len(others)

    def waited(self, home: Home, target: Target, wait_ms: float) -> None:
        """Record the wait of a call of the conversation at an upstream, until it was admitted or
        left the queue."""
        place = (home.whose, target.upstream.name)
        usual_ms, calls, at_ms = self._waits.get(place, _NO_WAITS)
        calls = min(calls, _MOST_CALLS - 1) + 1 if self._is_new(place[1], at_ms) else 1
        self._waits[place] = usual_ms + (wait_ms - usual_ms) / calls, calls, self._now_ms()
        self._waits.move_to_end(place)
        if len(self._waits) > MOST_WAITS:
            self._waits.popitem(last=False)
        if target == home.target:
            home.excess_ms = max(0.0, home.excess_ms + wait_ms - home.elsewhere_ms)

    def note(
        self,
        home: Home,
        target: Target,
        usage: Usage,
        permit: Permit | None = None,
        first_ms: float | None = None,
    ) -> None:
        """Record the upstream that answered a call of the conversation, the call's wait there, and
        the tokens in its cache. first_ms: the time to the first byte of a streamed answer."""
        if permit is not None:
            self.waited(home, target, permit.waited_ms)
        self._learn(home.whose, usage, first_ms)
        read, details = usage.cached_tokens or 0, usage.details
        written = 0 if details is None else details.cache_write_tokens or 0
        name, tokens, warm = target.upstream.name, read + written, self._warm.get(home.key)
        # A notification of a move may have arrived since the call began.
        has_moved = name != (home.target.upstream.name if warm is None else warm.upstream)
        excess_ms, patience = (0.0, None) if has_moved else (home.excess_ms, home.patience)
        self._keep(home.key, name, tokens, excess_ms, patience)
        if has_moved and tokens and self.on_move is not None:
            self.on_move(home.key, name, tokens)

    def _learn(self, whose: Whose, usage: Usage, first_ms: float | None) -> None:
        if first_ms is None or usage.input_tokens is None:
            return
        read_tokens = max(0, usage.input_tokens - (usage.cached_tokens or 0))
        reading = self._reading.setdefault(whose, _ReadingTime())
        reading.add(read_tokens, first_ms)
        self._reading.move_to_end(whose)
        if len(self._reading) > MOST_WAITS:
            self._reading.popitem(last=False)

    def moved(self, key: bytes, upstream: str, cached_tokens: int) -> None:
        """Record a move that another process notified; the later of two moves counts."""
        warm = self._warm.get(key)
        if warm is None or warm.upstream != upstream:
            self._keep(key, upstream, cached_tokens, 0.0, None)

    def _keep(
        self, key: bytes, upstream: str, tokens: int, excess_ms: float, patience: float | None
    ) -> None:
        now_ms = self._now_ms()
        if patience is None:
            patience = log(1 + self._draw() * (e - 1))
            if (warm := self._warm.get(key)) is not None:
                self._changed_ms |= {warm.upstream: now_ms, upstream: now_ms}
        self._warm[key] = _Warm(upstream, tokens, now_ms, excess_ms, patience)
        self._warm.move_to_end(key)
        if len(self._warm) > MOST_CONVERSATIONS:
            self._warm.popitem(last=False)


def _rank(key: bytes, target: Target) -> tuple[int, float]:
    name = target.upstream.name.encode()
    drawn = int.from_bytes(blake2b(key + name, digest_size=8).digest())
    return -target.dearer, -target.upstream.weight / log((drawn + 1) / (2**64 + 1))


def conversation_key(model: str, tenant: str, conversation: str | None) -> bytes | None:
    """Return a digest, equal for all calls of a conversation in every process; None without one."""
    if conversation is None:
        return None
    whose = f"{model}\0{tenant}\0{conversation}".encode("utf-8", "replace")
    return blake2b(whose, digest_size=_DIGEST_BYTES).digest()


def lineage_in(
    body: Mapping[str, Any], sent: Lineage, before: ResourceOwner | None = None
) -> Lineage:
    """Return the lineage of a call from its body and its headers (`sent`). before: the owner of the
    answer that the call continues."""
    digest = _digest_of(opening) if (opening := opening_of(body)) else None
    name = sent.conversation or _name_in(body) or (before and before.conversation)
    if not name and digest is not None:
        name = f"opening-{digest}"
    parent_id = None if before is None else before.request_id
    return Lineage(name or None, digest, parent_id, sent.trace_id, sent.parent_span)


# Digests of long openings, which agents repeat in each call: by length and hash. A client cannot
# choose the hash, which depends on a secret of the process.
_DIGESTS: dict[tuple[int, int], str] = {}
_LONG_OPENING_BYTES = 2_048
_MOST_DIGESTS = 4_096


def _digest_of(opening: bytes) -> str:
    if len(opening) < _LONG_OPENING_BYTES:
        return blake2b(opening, digest_size=_OPENING_BYTES).hexdigest()
    known = len(opening), hash(opening)
    digest = _DIGESTS.get(known)
    if digest is None:
        if len(_DIGESTS) >= _MOST_DIGESTS:
            _DIGESTS.clear()
        digest = blake2b(opening, digest_size=_OPENING_BYTES).hexdigest()
        _DIGESTS[known] = digest
    return digest


_NAMING = frozenset(("conversation", "prompt_cache_key"))


def _name_in(body: Mapping[str, Any]) -> str | None:
    """Return the name of the conversation in a request's body: one at the provider, or the key of
    its prompt cache."""
    if _NAMING.isdisjoint(body):
        return None
    conversation = body.get("conversation")
    named = conversation.get("id") if isinstance(conversation, Mapping) else conversation
    for one in (named, body.get("prompt_cache_key")):
        if isinstance(one, str) and one and one.isprintable():
            return one[:_LONGEST_NAME]
    return None
