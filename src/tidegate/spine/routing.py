"""Routing: the upstreams of a request in the order of attempts, and their health.

    OPEN -- `FAULTS` consecutive faults --> CLOSED
    CLOSED -- `FIRST_MS` later one call of all processes probes -- success --> OPEN,
        else CLOSED for twice as long, up to `LONGEST_MS`; for `DEAD_KEY_MS` after a refused key

A drained upstream is out of service too, until an operator resumes or removes it: it takes no new
call, waiting calls move to other upstreams, and resources that live there stay reachable.

The gate, a circuit breaker, is a pause of the limit `upstream:NAME` in the pool
(`Limiter.close_gate`): calls wait at it within their deadlines, and one at a time is admitted as a
probe. A 429 is no fault, nor is a timeout of the gateway's own. Faults that a request may have
provoked count once per request and at most `MOST_OF_ONE` per tenant.

Invariants: the same request has the same targets in every process, equal ones cheapest first, and
in random order by weight where prices do not decide; an upstream is out for all processes or for
none; one request never puts an upstream out or keeps it out.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from random import Random
from types import TracebackType
from typing import Any, Literal

from tidegate.admission.charges import price_ranks
from tidegate.admission.demand import CallDemand, model_limit, pause_after
from tidegate.call import Kind, Status
from tidegate.dialects import Passthrough
from tidegate.dialects.prompts import Files, dialect_for
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    DeadlineExceeded,
    InvalidRequest,
    LimiterUnavailable,
    NotFound,
    QuotaExceeded,
    TidegateError,
    UpstreamDrained,
    UpstreamError,
    UpstreamGarbled,
    UpstreamMissing,
    UpstreamOut,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamUnpaid,
)
from tidegate.limiter import MAX_BOUND, Acquisition, Concurrency, Limiter, Permit, limit_paused
from tidegate.policy.deployment import Deployment, Upstream
from tidegate.policy.format import plain_model
from tidegate.policy.providers import serving
from tidegate.settings import Config
from tidegate.spine.learning import Announced
from tidegate.store.requests import Whereabouts
from tidegate.telemetry.logging import Log, get_logger

_REMAINING_FRESH_S = 1.0
# The number and the age of the limits in use whose capacity is read.
_MOST_REMEMBERED, _REMEMBERED_S = 500, 60.0


class RemainingCapacity:
    """Remaining capacity of one pool's limits for the response header, at most a second old. Only
    limits that calls used in the last minute are read, however many the pool has."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._left: dict[str, int] = {}
        self._requested: dict[str, float] = {}  # least recently used first
        self._texts: dict[tuple[str, ...], bytes] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def of(self, limits: tuple[str, ...]) -> bytes:
        """Return `kind:text_only=3, rpm:m=57`: the limits whose value is known; empty for none."""
        now = time.monotonic()
        for name in limits:
            self._requested.pop(name, None)
            self._requested[name] = now
        if now - self._read_at > _REMAINING_FRESH_S and self._reading is None:
            self._read_at = now
            self._reading = asyncio.create_task(self._read())
        text = self._texts.get(limits)
        if text is None:
            known = [f"{one}={self._left[one]}" for one in limits if one in self._left]
            text = self._texts[limits] = ", ".join(known).encode()
        return text

    async def _read(self) -> None:
        since = time.monotonic() - _REMEMBERED_S
        recent = [name for name, at in self._requested.items() if at >= since][-_MOST_REMEMBERED:]
        self._requested = {name: self._requested[name] for name in recent}
        try:
            snapshot = await self._limiter.snapshot(limits=recent)
        except TidegateError as failed:
            log.debug(Log.STORE_AWAY, detail=failed.message)
            self._left = {}
        else:
            self._left = {
                name: max(0, view.current - view.used)
                for name, view in snapshot.limits.items()
                if view.bound < MAX_BOUND  # a limit that no policy names has no bound
            }
        finally:
            self._texts = {}
            self._reading = None


FAULTS = 5
MOST_OF_ONE = FAULTS - 1
FAULTS_OF_ONE = 20
# The part of calls that may be retried, and the retries that may accumulate.
RETRY_SHARE = 0.2
RETRIES_AT_ONCE = 10.0


@dataclass(frozen=True, slots=True)
class Suspect:
    """A request that may itself have caused a fault. tenant: None without API keys. request: a
    hash, equal for equal requests. is_other: a path known only by `passthrough`, whose faults say
    nothing about other paths. kind: its path, below the base URL."""

    tenant: str | None
    request: int
    is_other: bool = False
    kind: str = ""


@dataclass(slots=True)
class Faults:
    """The consecutive faults of one upstream that this process has seen."""

    count: int = 0
    _plain: int = field(default=0)  # faults that no request can have caused
    _suspects: set[Suspect] = field(default_factory=set)

    def clear(self) -> None:
        """Reset the faults after a successful call."""
        self.count = self._plain = 0
        self._suspects.clear()

    def add(self, suspect: Suspect | None) -> bool:
        """Count a fault, which `suspect` may have caused, None if no request can have. Return False
        if the same request is already counted."""
        self.count += 1
        if suspect is None:
            self._plain += 1
            return True
        if suspect in self._suspects:
            return False
        if len(self._suspects) >= FAULTS_OF_ONE:
            self._suspects.clear()
        self._suspects.add(suspect)
        return True

    @property
    def are_enough(self) -> bool:
        """Whether the faults suffice to put the upstream out of service."""
        if len(self._suspects) >= FAULTS_OF_ONE:
            return True
        of_each = Counter(one.tenant for one in self._suspects)
        counted = sum(
            count if tenant is None else min(count, MOST_OF_ONE)
            for tenant, count in of_each.items()
        )
        return self._plain + counted >= FAULTS


@dataclass(slots=True)
class RetryBudget:
    """A token bucket of retries, refilled by a share of a retry per call."""

    saved: float = RETRIES_AT_ONCE

    def earn(self) -> None:
        self.saved = min(RETRIES_AT_ONCE, self.saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Take a retry from the budget; False if it is empty."""
        if self.saved < 1:
            return False
        self.saved -= 1
        return True


FIRST_MS = 1_000
# Short, as a probe costs only one request; a refused key must be replaced by a person.
LONGEST_MS = 8_000
DEAD_KEY_MS = 60_000
PROBE_S = 30.0  # a probe without an answer after this time no longer blocks the next
# Paused models that no limit of the policy names; twice as many for models that have answered.
MOST_PAUSED = 100
# Pauses of a model whose 429 states no time, and the shortest pause of a rate: each is twice as
# long as the last, until a minute passes without one.
FIRST_PAUSE_MS, LONGEST_PAUSE_MS, FORGOTTEN_S = 500, 8_000, 60.0
_MOST_STRIKES = 12
_LATER_MS = 50  # tolerance between two readings of the clock
# The retry time of a client or a job that needs a drained upstream.
DRAINED_MS = 10_000
DRAINED = "an operator has drained it"
# While an upstream is out, a fault that a request may have caused is not blamed on the request, for
# this long at most: if there is no other upstream to try it at, the request must end at some time.
LONGEST_DOUBT_S = 86_400.0
_REASON_CHARS = 200
_KEY = re.compile(r"\bkey ([0-9a-f]{8}|none): ")

State = Literal["ok", "out", "trying"]

log = get_logger()


class Gate:
    """One upstream's health and circuit breaker, as this process sees and sets them."""

    def __init__(
        self,
        upstream: str,
        limiter: Limiter,
        key: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`key`: the upstream's API key. A gate that was closed for another key is ignored."""
        self.upstream = upstream
        self.limiter = limiter
        self.limit = f"upstream:{upstream}"
        self._digest = sha256(key.encode()).hexdigest()[:8] if key else "none"
        self._clock = clock
        self._faults = Faults()
        self.announced = Announced()
        self._closed_since: float | None = None
        self._fault = ("", "")  # the fault, in full for operators; and in short
        self._strikes: dict[str, tuple[int, float]] = {}  # how many in a row, and their end
        self._logged_until: dict[str, float] = {}  # the ends of the pauses that are in the log
        self._opening: asyncio.Task[None] | None = None
        self._opened = 0  # successful probes of this process
        self._drained = False
        self._successor: Gate | None = None

    def has_same_key(self, other: Gate) -> bool:
        """Whether a gate that is closed for one's key is closed for the other's."""
        return self._digest == other._digest

    @property
    def drained(self) -> bool:
        """Whether the upstream takes no new call."""
        return self._drained or (self._successor is not None and self._successor.drained)

    def renewed(self, successor: Gate) -> Gate:
        """Return the gate to use from now on: this one if the key is unchanged. Otherwise calls
        that wait at this gate follow the drain state of `successor`."""
        if self.has_same_key(successor):
            return self
        self._successor, successor.announced = successor, self.announced
        return successor

    def drain(self, drained: bool) -> None:
        """Take no new calls, or take them again, and notify the waiting calls."""
        if drained is not self._drained:
            self._drained = drained
            self.limiter.notify_watchers()

    # -- state, without I/O

    def closed(self) -> tuple[int, str] | None:
        """Return None while calls may pass, else the ms until a call may probe, and the reason."""
        return (DRAINED_MS, DRAINED) if self.drained else self._shut()

    def _shut(self) -> tuple[int, str] | None:
        """Return the same for faults only, without drains."""
        found = self.limiter.gate(self.limit)
        if found is None:
            return None
        other = _KEY.search(found[1])
        if other is not None and other[1] != self._digest:
            self._open_for_the_new_key()
            return None
        return found

    @property
    def faults(self) -> int:
        """Consecutive faults that this process has seen."""
        return self._faults.count

    @property
    def state(self) -> State:
        found = self.closed()
        if found is None:
            return "ok"
        return "out" if found[0] else "trying"

    @property
    def key_dead(self) -> bool:
        """Whether the provider refuses the key, or the account has no credit."""
        found = self.closed()
        return found is not None and _KEY.search(found[1]) is not None

    @property
    def unpaid(self) -> bool:
        """Whether the account has no credit while its key is valid."""
        return self.key_dead and self.in_short == UpstreamUnpaid.in_short

    @property
    def why(self) -> str:
        """The last fault, or why the gate was closed, for operators; in the provider's words if
        this process received that fault. Empty without a fault."""
        (words, of), short = self._fault, self.in_short
        return words if words and (not short or of.endswith(short)) else short

    @property
    def in_short(self) -> str:
        """The reason without the provider's words, which may quote one tenant's request."""
        found = self.closed()
        return "" if found is None else found[1].rpartition(": ")[2]

    @property
    def may_hold(self) -> bool:
        """Whether anything beside the limits of the policy may delay or reject a call."""
        return self.drained or self.limiter.has_pauses

    @property
    def has_doubts(self) -> bool:
        """Whether a success would change the state: there are faults or recent pauses."""
        return bool(self._faults.count or self._strikes)

    def ready_in_ms(self, model: str | None = None, limits: Iterable[str] = ()) -> int:
        """Return the ms until a call of `model` under `limits` may be made, 0 for now."""
        found = self.closed()
        back_ms = 0 if found is None else found[0]
        if not self.limiter.has_pauses:
            return back_ms
        names = [*limits, *(() if model is None else (model_limit(model),))]
        if found is None and self.limiter.gate(self.limit) is None:
            names.append(self.limit)
        return max(back_ms, self.limiter.paused_ms(names))

    def binding(self, model: str) -> tuple[str, ...]:
        """Return the paused limits that apply to a call of `model` beside those of the policy,
        usually none."""
        if not self.limiter.has_pauses:
            return ()
        names = self.limiter.paused_of((self.limit, model_limit(model)))
        if self.limit in names and self._shut() is None and self.limiter.gate(self.limit):
            return tuple(name for name in names if name != self.limit)
        return names

    def bind(self, demand: CallDemand, model: str, *, follows: bool = False) -> CallDemand:
        """Return the demand with the pauses of now. follows: the call is about a resource there."""
        if follows and self.drained:
            demand = replace(demand, is_follow_up=True)
        if not self.limiter.has_pauses or not (more := self.binding(model)):
            return demand
        missing = tuple(name for name in more if name not in demand.limits)
        return replace(demand, limits=demand.limits + missing) if missing else demand

    def binds_more(self, demand: CallDemand, model: str) -> bool:
        """Whether a pause or drain began after the demand was made: the demand is out of date."""
        if self.drained and not demand.is_follow_up:
            return True
        return self.limiter.has_pauses and self.bind(demand, model) is not demand

    def is_try(self, demand: CallDemand) -> bool:
        """Whether a call that was admitted with this demand is the upstream's probe."""
        return self.limit in demand.limits and self._shut() is not None

    def late(self, demand: CallDemand, left_ms: float) -> DeadlineExceeded | UpstreamOut | None:
        """Return why a call that may wait for `left_ms` should not do so; None if it should."""
        if self.drained and not demand.is_follow_up:
            return self.out()
        if self.limiter.paused_ms(demand.limits) <= left_ms:
            return None
        limits = self.limiter.limits_of(demand.to_admit(None, 1))
        paused_ms = self.limiter.paused_ms(limits)
        if paused_ms <= left_ms:
            return None
        if (out := self.out()) is not None and (out.retry_after_ms or 0) >= paused_ms - _LATER_MS:
            return out
        last = max(limits, key=lambda one: self.limiter.paused_ms((one,)))
        return limit_paused(last, paused_ms)

    def out(self) -> UpstreamOut | None:
        """Return the error of a call to an upstream that is out of service; None if it is not."""
        if self.drained:
            message = f"no upstream takes calls now: {DRAINED}"
            return UpstreamDrained(message, retry_after_ms=DRAINED_MS)
        found = self.closed()
        if found is None:
            return None
        message = f"no upstream takes calls now; the last failure: {self.in_short}"
        return UpstreamOut(message, retry_after_ms=max(FIRST_MS, found[0]))

    # -- outcomes of calls

    async def worked(self, model: str, *, tried: bool) -> None:
        """Record a success. `tried`: the call was a probe, so the gate opens."""
        if self._faults.count:
            self._faults.clear()
            self._fault, self._closed_since = ("", ""), None
        if self._strikes:  # and the pauses of the account, which has capacity
            self._strikes.pop(model_limit(model), None)
            self._strikes.pop(self.limit, None)
        if tried:
            await self.open()

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Context of a probe: after `PROBE_S` without an answer the next one may pass. A probe that
        is answered may last longer, and no longer affects the gate."""
        passing_on = asyncio.create_task(self._pass_on(self._opened))
        try:
            yield
        finally:
            passing_on.cancel()

    async def _pass_on(self, opened: int) -> None:
        await asyncio.sleep(PROBE_S)
        ms, close = FIRST_MS, self.limiter.close_gate
        while opened == self._opened and (shut := self._shut()) is not None:
            with suppress(LimiterUnavailable):
                if await close(self.limit, for_ms=ms, most_ms=ms, tried=True, by=shut[1]):
                    return
            await asyncio.sleep(ms / 1000)

    async def open(self) -> None:
        """Open the gate for all calls of all processes."""
        self._opened += 1
        self._faults.clear()
        self._fault, self._closed_since = ("", ""), None
        try:
            opened = await self.limiter.open_gate(self.limit)
        except LimiterUnavailable as error:
            log.debug(Log.UPSTREAM_BACK, upstream=self.upstream, detail=error.message)
            return
        if opened:
            log.warning(Log.UPSTREAM_BACK, upstream=self.upstream)

    async def failed(
        self, error: UpstreamError, model: str, *, suspect: Suspect, tried: bool
    ) -> None:
        """Count a failure in the upstream's health, before the call's permit is released."""
        if error.is_answer or isinstance(error, UpstreamThrottled):
            await self.worked_but(model, tried=tried)
            return
        is_slow = isinstance(error, UpstreamTimeout) and error.phase != "connect"
        if not tried and (is_slow or suspect.is_other):
            error.in_outage = self._is_in_outage()
            return  # the gateway's own timeout: other calls may be answered sooner
        dead = isinstance(error, UpstreamUnauthorized) and error.of_key and not suspect.is_other
        self._fault = error.message, _in_short(error)
        if isinstance(error, UpstreamGarbled) and error.is_empty and suspect.tenant is None:
            # One kind of call counts as one tenant: the server may answer all others.
            suspect = replace(suspect, tenant=f"{suspect.kind} {model}")
        is_new = self._faults.add(None if error.of_upstream else suspect)
        if dead or (is_new if tried else self._faults.are_enough):
            await self._close(error, dead=dead, tried=tried)
        error.in_outage = self._is_in_outage() or dead  # the gate may be open again by now

    def _is_in_outage(self) -> bool:
        """Whether the upstream is out: a call's fault is then blamed on it, not on the request."""
        if self.closed() is None:
            self._closed_since = None
            return False
        now = self._clock()
        self._closed_since = now if self._closed_since is None else self._closed_since
        return now - self._closed_since < LONGEST_DOUBT_S

    async def _close(self, error: UpstreamError, *, dead: bool, tried: bool) -> None:
        first_ms, most_ms = (DEAD_KEY_MS, DEAD_KEY_MS) if dead else (FIRST_MS, LONGEST_MS)
        reason = f"key {self._digest}: {_in_short(error)}" if dead else _in_short(error)
        was_dead = self.key_dead
        try:
            closed = await self.limiter.close_gate(
                self.limit,
                for_ms=first_ms,
                most_ms=most_ms,
                tried=tried,
                reason=reason,
                by=self.upstream,
            )
        except LimiterUnavailable as unavailable:
            log.debug(Log.UPSTREAM_OUT, upstream=self.upstream, detail=unavailable.message)
            return
        if closed and (not tried or (dead and not was_dead)):
            event = Log.UPSTREAM_KEY_DEAD if dead else Log.UPSTREAM_OUT
            log.error(event, upstream=self.upstream, detail=error.message)

    async def worked_but(self, model: str, *, tried: bool) -> None:
        """Record a working upstream that refused one call: the pauses of the model still count."""
        strikes, self._strikes = self._strikes, {}
        await self.worked(model, tried=tried)
        self._strikes = strikes

    async def throttled(self, error: UpstreamThrottled, model: str, demand: CallDemand) -> int:
        """Pause the limit that a 429 concerns, in all processes, before the call's permit is
        released. Return for how many ms, 0 if nothing was paused."""
        limiter = self.limiter
        whole = self.limit if error.of_account else None
        pause = pause_after(
            error, demand.limits, model, limiter.policy, datetime.now(UTC), account=whole
        )
        if pause is None or self._is_too_much(pause.limit, model):
            return 0
        rate = pause.limit if pause.of_rate else ""
        self.announced.refuse(rate, model, error.stated, error.retry_after_ms)
        for_ms = pause.for_ms
        if not for_ms and pause.limit not in self._strikes and self._has_learned(demand):
            self._strikes[pause.limit] = 1, self._clock()
            error.lowered_limit = True
            return 0
        if not for_ms or pause.of_rate:
            for_ms = self._strike(pause.limit, for_ms, pause.first_ms)
        why = {"by": self.upstream, "reason": error.message[:_REASON_CHARS]}
        ends_at = self._clock() + for_ms / 1000
        try:
            paused = await limiter.penalise(
                pause.limit, for_ms=for_ms, ramp_ms=pause.ramp_ms or for_ms, **why
            )
        except LimiterUnavailable as unavailable:
            log.debug(Log.LIMIT_PAUSED, limit=pause.limit, detail=unavailable.message)
            return 0
        if paused and self._is_news(pause.limit, for_ms, ends_at):
            log.warning(Log.LIMIT_PAUSED, limit=pause.limit, for_ms=for_ms, **why)
        return for_ms

    def _is_news(self, limit: str, for_ms: int, ends_at: float) -> bool:
        """Whether a pause is not one that is logged, which each of several calls that are refused
        together prolongs a little."""
        until = self._logged_until.pop(limit, float("-inf"))
        while len(self._logged_until) >= MOST_PAUSED:
            del self._logged_until[next(iter(self._logged_until))]
        is_news = ends_at - until > for_ms / 2000
        self._logged_until[limit] = ends_at if is_news else until
        return is_news

    def _has_learned(self, demand: CallDemand) -> bool:
        """Whether an adaptive limit of the call has learned from a refusal that states no time. A
        pause as well would leave the limit unused while the provider answers other calls."""
        limits = (self.limiter.policy.limits.get(one) for one in demand.limits)
        return any(isinstance(one, Concurrency) and one.adaptive is not None for one in limits)

    def _strike(self, limit: str, reported_ms: int, first_ms: int) -> int:
        """Return the length of a pause for which the provider stated no time, or a short one: it
        doubles each time. Refused calls that were in flight when it began do not prolong it."""
        count, until = self._strikes.pop(limit, (0, 0.0))
        now = self._clock()
        count = 0 if now > until + FORGOTTEN_S else count
        # Several calls are refused together, before the limiter reports the first one's pause.
        left_ms = max(self.limiter.paused_ms((limit,)), round((until - now) * 1000))
        if left_ms > 0:
            if count:
                self._strikes[limit] = count, until
            return max(left_ms, reported_ms)
        while len(self._strikes) >= MOST_PAUSED:
            self._strikes.pop(next(iter(self._strikes)))
        for_ms = max(reported_ms, min(LONGEST_PAUSE_MS, max(FIRST_PAUSE_MS, first_ms) << count))
        self._strikes[limit] = min(count + 1, _MOST_STRIKES), now + for_ms / 1000
        return for_ms

    def _is_too_much(self, limit: str, model: str) -> bool:
        """Whether a pause would exceed the bound on paused models, whose names clients choose."""
        pauses, named = self.limiter.pauses(), {self.limit, *self.limiter.policy.limits}
        most = 2 * MOST_PAUSED if model in self.announced else MOST_PAUSED
        is_one_more = limit not in pauses and limit not in named
        return is_one_more and len([1 for one in pauses if one not in named]) >= most

    def _open_for_the_new_key(self) -> None:
        if self._opening is None or self._opening.done():
            self._opening = asyncio.ensure_future(self._open_quietly())

    async def _open_quietly(self) -> None:
        with suppress(LimiterUnavailable):
            await self.limiter.open_gate(self.limit)


class Gates(dict[str, Gate]):
    """The gates of all upstreams of a process, by name."""

    def ready_in_ms(
        self, upstreams: Iterable[str], *, model: str | None = None, limits: Iterable[str] = ()
    ) -> int:
        """Return the ms until the first of these upstreams may be called, 0 for now.

        Without I/O, from the state that this process last received, moments ago. Pauses of `model`
        and of `limits` (such as `kind:text_only`) count too. While an upstream is out of service
        this is the time until the next probe; then one call of all processes is admitted, and the
        others wait at the gate.
        """
        names = list(limits)
        found = (self[one].ready_in_ms(model, names) for one in upstreams)
        return min(found, default=0)


def _in_short(error: UpstreamError) -> str:
    """Return the fault without the provider's words, which may quote a request or the key."""
    if isinstance(error, UpstreamUnauthorized) and error.of_key:
        return error.in_short
    return error.message if error.status is None else f"the provider answered {error.status}"


_MODELS_KEPT = 1_000
_PATTERN = frozenset("*?[")  # the wildcards of fnmatch
_MOST_NAMED = 8  # upstreams, and patterns per upstream, in an error


@dataclass(frozen=True, slots=True)
class Target:
    """An upstream, and the model's name there. dearer: the rank of its price among equal ones."""

    upstream: Upstream
    model: str
    dearer: int = field(default=0, compare=False)


class Targets:
    """Targets of models, one object per process. Drained upstreams are a last resort."""

    def __init__(self, deployment: Deployment, random: Random | None = None) -> None:
        self._random = random or Random()
        self.replace(deployment)

    def replace(self, deployment: Deployment) -> None:
        """Use these upstreams and routes from now on. Raises ConfigError, changing nothing."""
        self.passthrough = Passthrough(deployment)
        self.upstreams = {one.name: one for one in deployment.upstreams}
        self.drained, self.deployment = deployment.drained, deployment
        self._routes = deployment.routes
        # The targets of each model, and whether they are drawn by weight.
        self._known: dict[tuple[Dialect, str], tuple[list[Target], bool]] = {}
        self._for_prompts: dict[str, tuple[list[Target], bool]] = {}

    def of(self, dialect: Dialect, model: str) -> list[Target]:
        """Return the targets of a model in order. Raises NotFound and UpstreamMissing."""
        known = self._known.get((dialect, model))
        if known is None:
            plain = model.removeprefix("models/")
            routed = self._routed(plain)
            if routed is not None:
                matching = [one for one in routed if dialect in one.upstream.base_urls]
                known = (self._undrained(matching), False)
            elif plain:
                serving = self._best(plain, self.in_service(dialect))
                serving = serving or self._best(plain, self.upstreams_of(dialect))
                known = (_ranked(serving), True)
            else:
                known = (self._without_model(dialect), True)
            self._check_there(plain, known[0])
            if not known[0]:
                raise NotFound(self._unserved(dialect, plain), field="model")
            if len(self._known) >= _MODELS_KEPT:  # clients may send any number of names
                del self._known[next(iter(self._known))]
            self._known[dialect, model] = known
        found, by_lot = known
        return self._drawn(found) if by_lot else list(found)

    def _check_there(self, model: str, found: Sequence[Target]) -> None:
        """Raises UpstreamMissing if this process could not set up the model's upstreams."""
        now = self.deployment
        if now.missing and not any(one.upstream.fit(model) > 1 for one in found):
            route = next((one for one in now.routes if fnmatchcase(model, one.model)), None)
            names = now.missing if route else serving(model, now.tables, now.missing, found)
            if names and not (route and found):
                of = f"the model {model!r}"
                raise UpstreamMissing(of, {one: now.missing[one].variable for one in names})

    def _unserved(self, dialect: Dialect, model: str) -> str:
        if not model:
            return f"no upstream takes a call without a model in the {dialect} dialect"
        serving = self._routed(model) or self._best(model, self.upstreams.values())
        others = sorted({other for one in serving for other in one.upstream.base_urls})
        but = f", but in: {', '.join(others)} (calls are not translated)" if others else ""
        return f"no upstream serves the model {model!r} in the {dialect} dialect{but}"

    def are_equivalent(self, dialect: Dialect, model: str) -> bool:
        """Whether the targets of a model are equal ones, drawn by weight."""
        known = self._known.get((dialect, model))
        return known is not None and known[1]

    def upstreams_of(self, dialect: Dialect) -> list[Upstream]:
        """Return all upstreams of a dialect, in the order of the file."""
        return [one for one in self.upstreams.values() if dialect in one.base_urls]

    def in_service(self, dialect: Dialect) -> list[Upstream]:
        """Return the upstreams of a dialect that are not drained; all if each one is."""
        upstreams = self.upstreams_of(dialect)
        return [one for one in upstreams if one.name not in self.drained] or upstreams

    def _undrained(self, targets: list[Target]) -> list[Target]:
        """Return the targets that are not drained; all if each one is."""
        if not self.drained:
            return targets
        return [one for one in targets if one.upstream.name not in self.drained] or targets

    def named_by_routes(self, dialect: Dialect) -> dict[str, Target]:
        """Return the models that only exist as names of routes, each with its first target. Routes
        with wildcards are left out."""
        found: dict[str, Target] = {}
        for route in self._routes:
            if not _PATTERN.intersection(route.model):
                targets = self._routed(route.model) or []
                matching = (one for one in targets if dialect in one.upstream.base_urls)
                if (first := next(matching, None)) is not None:
                    found[route.model] = first
        return found

    def of_prompt(self, model: str, kind: Kind | None = None, files: Files = ()) -> list[Target]:
        """Return the targets that take a prompt in one of their dialects, in order. Raises
        InvalidRequest if there is none, and UpstreamMissing."""
        known = self._for_prompts.get(model)
        if known is None:
            plain = model.removeprefix("models/")
            routed = self._routed(plain)
            found = _ranked(self._any(plain)) if routed is None else self._undrained(routed)
            known = (found, routed is None)
            self._check_there(plain, known[0])
            if known[0] and len(self._for_prompts) < _MODELS_KEPT:
                self._for_prompts[model] = known
        found, by_lot = known
        able = [
            one
            for one in found
            if (Dialect.GEMINI in one.upstream.base_urls and "claude" not in one.model.lower())
            or dialect_for(one.upstream.base_urls, one.model, kind, files)[0]
        ]
        if able:
            return self._drawn(able) if by_lot else able
        if not found:
            message = f"no upstream serves the model {model!r}"
            raise InvalidRequest("model", message, allowed=_served(self.upstreams.values()))
        _, why = dialect_for(found[0].upstream.base_urls, found[0].model, kind, files)
        assert why is not None
        message = f"the upstream {found[0].upstream.name!r} of the model {model!r} {why.reason}"
        raise InvalidRequest(why.field, message, allowed=why.allowed)

    def _any(self, model: str) -> list[Target]:
        """Return the upstreams that name a model; if there are none, those that take any model, and
        among these only those with Gemini's dialect, if any: default prompt models are Gemini's."""
        serving = [one for one in self.upstreams.values() if one.name not in self.drained]
        found = self._best(model, serving) or self._best(model, self.upstreams.values())
        if any(one.upstream.fit(model) > 1 for one in found):
            return found
        return [one for one in found if Dialect.GEMINI in one.upstream.base_urls] or found

    def pools_for(self, model: str) -> list[str]:
        """Return the pools whose limits apply to a model, by its name at the provider."""
        found = {one.upstream.pool for one in self._best(model, self.upstreams.values())}
        for route in self._routes:
            of_route = (route.model,) if not _PATTERN.intersection(route.model) else ()
            for target in (one for named in of_route for one in self._routed(named) or ()):
                found |= {target.upstream.pool} if target.model == model else set()
        found |= {one.pool for one in self.upstreams.values() if model in one.aliases.values()}
        return [one.pool for one in self.upstreams.values() if one.pool in found]

    def places_of(self, job: Whereabouts, config: Config) -> list[Whereabouts]:
        """Return a job once for each pool and model whose limits apply to it, or to its current
        call: the jobs of all models wait in the queue of one pool."""
        if job.status is Status.RUNNING and job.upstream is not None:
            return [replace(job, pool=job.upstream)]
        model = job.model or config.model_for(job.kind or "")
        model = plain_model(config.classifier_model if job.kind is None else model)
        targets = self._routed(model)
        found = self._any(model) if targets is None else self._undrained(targets)
        return [replace(job, pool=one.upstream.pool, model=one.model) for one in found] or [job]

    def _routed(self, model: str) -> list[Target] | None:
        for route in self._routes:
            if fnmatchcase(model, route.model):
                named = ((self.upstreams[name], of_it) for name, of_it in route.targets)
                return [
                    Target(upstream, of_it or upstream.aliases.get(model, model))
                    for upstream, of_it in named
                ]
        return None

    def _without_model(self, dialect: Dialect) -> list[Target]:
        """Return the targets of a call that names no model, so that the provider decides: upstreams
        whose first dialect it is and that take any model are preferred."""
        upstreams = self.in_service(dialect)
        own = [one for one in upstreams if _first_dialect(one) is dialect] or upstreams
        return [Target(one, "") for one in [one for one in own if one.fit("")] or own]

    def _best(self, model: str, upstreams: Iterable[Upstream]) -> list[Target]:
        """Return the upstreams that name the model; if there are none, those that take any."""
        fits = [(one.fit(model), one) for one in upstreams]
        named = [one for fit, one in fits if fit > 1] or [one for fit, one in fits if fit]
        return [Target(one, one.aliases.get(model, model)) for one in named]

    def _drawn(self, targets: Sequence[Target]) -> list[Target]:
        """Return the targets, cheapest first, those of one price in random order by weight."""
        if len(targets) < 2:
            return list(targets)
        # Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
        keys = [
            (-target.dearer, self._random.random() ** (1 / target.upstream.weight), place)
            for place, target in enumerate(targets)
        ]
        return [targets[place] for *_, place in sorted(keys, reverse=True)]


def _ranked(targets: list[Target]) -> list[Target]:
    """Return equal targets with the ranks of their prices, unless the operator's weights decide."""
    if len(targets) < 2 or any(one.upstream.weight != 1 for one in targets):
        return targets
    ranks = price_ranks([(one.upstream, one.model) for one in targets])
    return [replace(one, dearer=rank) for one, rank in zip(targets, ranks, strict=True)]


def _first_dialect(upstream: Upstream) -> Dialect:
    return Dialect(next(iter(upstream.base_urls)))


def _served(upstreams: Iterable[Upstream]) -> str:
    """Describe the available models in an error."""
    first = list(upstreams)[:_MOST_NAMED]
    return "; ".join(f"{one.name}: {', '.join(one.models[:_MOST_NAMED])}" for one in first)


class NotWorthWaiting(Exception):
    """A limit of the waiting call was paused: for longer than the call may wait, or so that the
    call needs a new demand."""


WatchBudgets = Callable[[Callable[[QuotaExceeded], None]], Callable[[], None]]


class PatientAdmission:
    """An admission that ends once a pause outlasts the call's deadline or a budget of the call is
    spent.

    Entering it then raises NotWorthWaiting or BudgetExceeded, otherwise what the admission raises.
    It also raises NotWorthWaiting if another limit of the call was paused just before the
    admission; the permit has then spent nothing. If cancelled, it leaves the queue, as the
    admission does.
    """

    __slots__ = ("_admission", "_demand", "_gate", "_model", "_until", "_watch")

    def __init__(
        self,
        admission: Acquisition,
        gate: Gate,
        demand: CallDemand,
        model: str,
        left_ms: float,
        watch: WatchBudgets | None = None,
    ) -> None:
        """watch: observes the call's budgets; None if it has none."""
        self._admission = admission
        self._gate = gate
        self._demand = demand
        self._model = model
        self._until = time.monotonic() + left_ms / 1000
        self._watch = watch

    async def __aenter__(self) -> Permit:
        limiter, admission = self._gate.limiter, self._admission
        paused, end = self._paused, None
        limiter.watch_pauses(paused)
        if self._watch is not None:
            end = self._watch(admission.leave)
        try:
            permit = await admission.__aenter__()
        finally:
            limiter.unwatch_pauses(paused)
            if end is not None:
                end()
        if not self._gate.may_hold or not self._gate.binds_more(self._demand, self._model):
            return permit
        permit.settle_unused()
        await admission.__aexit__(None, None, None)
        raise NotWorthWaiting

    def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> Coroutine[Any, Any, None]:
        return self._admission.__aexit__(kind, error, trace)

    def _paused(self) -> None:
        gate, left_ms = self._gate, (self._until - time.monotonic()) * 1000
        if gate.late(gate.bind(self._demand, self._model), max(0.0, left_ms)) is not None:
            self._admission.leave(NotWorthWaiting())
