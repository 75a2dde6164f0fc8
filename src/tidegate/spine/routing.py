"""Routing: the upstreams of a request in the order of attempts, and their health.

    OPEN -- `FAULTS` consecutive faults --> CLOSED
    CLOSED -- `FIRST_MS` later one call of all processes tries -- success --> OPEN,
        else CLOSED for twice as long, up to `LONGEST_MS`; for `DEAD_KEY_MS` after a refused key

A drained upstream is out as well, until an operator resumes or removes it: it takes no new call,
those that wait for it go elsewhere, and what lives there can be reached.

The gate is a pause of the limit `upstream:NAME` in the pool (`Limiter.close_gate`): calls wait at
it within their deadlines, one at a time is admitted as a try. A 429 is no fault, nor is a timeout
of ours. Faults that a request may have provoked count once per request and at most `MOST_OF_ONE`
per tenant.

Invariants: the same request has the same targets in every process, equals in random order by
weight; an upstream is out for all processes or for none; one request never puts an upstream out
or keeps it out.
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

from tidegate.admission.demand import CallDemand, model_limit, pause_after
from tidegate.call import Kind, Status
from tidegate.dialects import check_passthrough, is_known
from tidegate.dialects.prompts import Files, dialect_for
from tidegate.dialects.spec import Dialect, Endpoint, Operation
from tidegate.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    LimiterUnavailable,
    NotFound,
    QuotaExceeded,
    TidegateError,
    UpstreamDrained,
    UpstreamError,
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
# Of so many limits that calls have come under lately.
_MOST_REMEMBERED, _REMEMBERED_S = 500, 60.0


class RemainingCapacity:
    """Remaining capacity of one pool's limits, a second old at most, as a header names it. Read of
    the limits that calls came under in the last minute, however many the pool has."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._left: dict[str, int] = {}
        self._asked: dict[str, float] = {}  # the last one at the end
        self._texts: dict[tuple[str, ...], bytes] = {}
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def of(self, limits: tuple[str, ...]) -> bytes:
        """`kind:text_only=3, rpm:m=57`, as far as is known; empty while nothing is."""
        now = time.monotonic()
        for name in limits:
            self._asked.pop(name, None)
            self._asked[name] = now
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
        lately = [name for name, at in self._asked.items() if at >= since][-_MOST_REMEMBERED:]
        self._asked = {name: self._asked[name] for name in lately}
        try:
            snapshot = await self._limiter.snapshot(limits=lately)
        except TidegateError as failed:
            log.debug(Log.STORE_AWAY, detail=failed.message)
            self._left = {}
        else:
            self._left = {
                name: max(0, view.current - view.used)
                for name, view in snapshot.limits.items()
                if view.bound < MAX_BOUND  # one that no policy names has none
            }
        finally:
            self._texts = {}
            self._reading = None


FAULTS = 5
MOST_OF_ONE = FAULTS - 1
FAULTS_OF_ONE = 20
# Of the traffic may be tried again, and so many in a burst after a quiet time.
RETRY_SHARE = 0.2
RETRIES_AT_ONCE = 10.0


@dataclass(frozen=True, slots=True)
class Suspect:
    """A request that may have brought its fault upon itself. tenant: None where clients show no
    keys. request: the same for the same request. is_other: of a path that only an upstream names,
    whose fault says nothing of other paths."""

    tenant: str | None
    request: int
    is_other: bool = False


@dataclass(slots=True)
class Faults:
    """The faults in a row that this process has seen of one upstream."""

    count: int = 0
    _plain: int = field(default=0)  # faults that no request can have provoked
    _suspects: set[Suspect] = field(default_factory=set)

    def clear(self) -> None:
        """It answered as it should."""
        self.count = self._plain = 0
        self._suspects.clear()

    def add(self, suspect: Suspect | None) -> bool:
        """Note a real fault, or one that may be the doing of `suspect`; True if it is another one
        than those before in this row."""
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
        """Whether the upstream is to be out."""
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
    """A bucket that each request fills by a share of a retry."""

    saved: float = RETRIES_AT_ONCE

    def earn(self) -> None:
        self.saved = min(RETRIES_AT_ONCE, self.saved + RETRY_SHARE)

    def spend(self) -> bool:
        """Whether one more may be tried again."""
        if self.saved < 1:
            return False
        self.saved -= 1
        return True


FIRST_MS = 1_000
# Short, as one request is all that it costs to see that an upstream is back; a key that was refused
# is replaced by a person.
LONGEST_MS = 8_000
DEAD_KEY_MS = 60_000
PROBE_S = 30.0  # a try without an answer for longer has another one beside it
# Models that are paused without a limit in the policy; as many more of those that have answered.
MOST_PAUSED = 100
# The pauses of a model whose 429 does not say for how long, and the shortest of a rate: each is
# twice as long as the last, until a minute passes without one.
FIRST_PAUSE_MS, LONGEST_PAUSE_MS, FORGOTTEN_S = 500, 8_000, 60.0
_MOST_STRIKES = 12
_LATER_MS = 50  # between two looks at the clock
# When a client or a job asks again that needs a drained upstream.
DRAINED_MS = 10_000
DRAINED = "an operator has drained it"
# For how long a fault that a request can bring upon itself is none of its own while its upstream is
# out. There may be nothing else left to try it with, and then it must end at some time.
LONGEST_DOUBT_S = 86_400.0
_REASON_CHARS = 200
_KEY = re.compile(r"\bkey ([0-9a-f]{8}): ")

State = Literal["ok", "out", "trying"]

log = get_logger()


class Gate:
    """What this process knows of one upstream, and does to it for all processes."""

    def __init__(
        self,
        upstream: str,
        limiter: Limiter,
        key: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`key` is the upstream's: a gate that another key closed does not bind this process."""
        self.upstream = upstream
        self.limiter = limiter
        self.limit = f"upstream:{upstream}"
        self._digest = sha256(key.encode()).hexdigest()[:8]
        self._clock = clock
        self._faults = Faults()
        self.announced = Announced()
        self._closed_since: float | None = None
        self._said = ("", "")  # by the provider, for operators; and in short
        self._strikes: dict[str, tuple[int, float]] = {}  # how many, and until when the last lasts
        self._opening: asyncio.Task[None] | None = None
        self._opened = 0  # how often a try of this process was answered
        self._drained = False
        self._successor: Gate | None = None

    def has_same_key(self, other: Gate) -> bool:
        """Whether what closed one binds the other."""
        return self._digest == other._digest

    @property
    def drained(self) -> bool:
        """Whether it takes no new call."""
        return self._drained or (self._successor is not None and self._successor.drained)

    def renewed(self, successor: Gate) -> Gate:
        """The gate from now on: this one where the key is the same. Calls that wait at one with an
        earlier key are drained with the new one."""
        if self.has_same_key(successor):
            return self
        self._successor, successor.announced = successor, self.announced
        return successor

    def drain(self, drained: bool) -> None:
        """Take no new call from now on, or take calls again. Waiting calls learn of it."""
        if drained is not self._drained:
            self._drained = drained
            self.limiter.tell_all()

    # -- what is known, without I/O

    def closed(self) -> tuple[int, str] | None:
        """None while it is open; else for how many ms nobody may try, and why."""
        return (DRAINED_MS, DRAINED) if self.drained else self._shut()

    def _shut(self) -> tuple[int, str] | None:
        """As `closed`, by faults alone."""
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
        """Those in a row that this process has seen."""
        return self._faults.count

    @property
    def state(self) -> State:
        found = self.closed()
        if found is None:
            return "ok"
        return "out" if found[0] else "trying"

    @property
    def key_dead(self) -> bool:
        """Whether the provider refuses the key, or there is no money left."""
        found = self.closed()
        return found is not None and _KEY.search(found[1]) is not None

    @property
    def unpaid(self) -> bool:
        """Whether `key_dead` is for want of money: the key is sound."""
        return self.key_dead and self.in_short == UpstreamUnpaid.in_short

    @property
    def why(self) -> str:
        """The last fault, or what closed the gate, for operators; in the provider's words where
        this process heard that one. Empty where there was none."""
        (words, of), short = self._said, self.in_short
        return words if words and (not short or of.endswith(short)) else short

    @property
    def in_short(self) -> str:
        """The same without the provider's words, which may be about one tenant's request."""
        found = self.closed()
        return "" if found is None else found[1].rpartition(": ")[2]

    @property
    def may_hold(self) -> bool:
        """Whether a call may be held up, or refused, beside the limits of the policy."""
        return self.drained or self.limiter.has_pauses

    @property
    def has_doubts(self) -> bool:
        """Whether a good answer would be news."""
        return bool(self._faults.count or self._strikes)

    def ready_in_ms(self, model: str | None = None, limits: Iterable[str] = ()) -> int:
        """0 where a call may be asked for now, else when: of `model`, and under `limits`."""
        found = self.closed()
        back_ms = 0 if found is None else found[0]
        if not self.limiter.has_pauses:
            return back_ms
        names = [*limits, *(() if model is None else (model_limit(model),))]
        if found is None and self.limiter.gate(self.limit) is None:
            names.append(self.limit)
        return max(back_ms, self.limiter.paused_ms(names))

    def binding(self, model: str) -> tuple[str, ...]:
        """The limits beside those of the policy that bind a call of `model` now: nearly always
        none."""
        if not self.limiter.has_pauses:
            return ()
        names = self.limiter.paused_of((self.limit, model_limit(model)))
        if self.limit in names and self._shut() is None and self.limiter.gate(self.limit):
            return tuple(name for name in names if name != self.limit)
        return names

    def bind(self, demand: CallDemand, model: str, *, follows: bool = False) -> CallDemand:
        """The demand with what binds it now. follows: it concerns what lives at the upstream."""
        if follows and self.drained:
            demand = replace(demand, is_follow_up=True)
        if not self.limiter.has_pauses or not (more := self.binding(model)):
            return demand
        missing = tuple(name for name in more if name not in demand.limits)
        return replace(demand, limits=demand.limits + missing) if missing else demand

    def binds_more(self, demand: CallDemand, model: str) -> bool:
        """Whether something was paused since the demand was made: it must be asked for again."""
        if self.drained and not demand.is_follow_up:
            return True
        return self.limiter.has_pauses and self.bind(demand, model) is not demand

    def is_try(self, demand: CallDemand) -> bool:
        """Whether a call that was admitted for this demand tries whether the upstream is back."""
        return self.limit in demand.limits and self._shut() is not None

    def late(self, demand: CallDemand, left_ms: float) -> DeadlineExceeded | UpstreamOut | None:
        """Why a call that may wait for `left_ms` is not to wait at all; None where it is."""
        if self.drained and not demand.is_follow_up:
            return self.out()
        paused_ms = self.limiter.paused_ms(demand.limits)
        if paused_ms <= left_ms:
            return None
        if (out := self.out()) is not None and (out.retry_after_ms or 0) >= paused_ms - _LATER_MS:
            return out
        last = max(demand.limits, key=lambda one: self.limiter.paused_ms((one,)))
        return limit_paused(last, paused_ms)

    def out(self) -> UpstreamOut | None:
        """The error of a call that cannot be made since the upstream is out; None if it is not."""
        if self.drained:
            said = f"no upstream can be asked now: {DRAINED}"
            return UpstreamDrained(said, retry_after_ms=DRAINED_MS)
        found = self.closed()
        if found is None:
            return None
        said = f"no upstream can be asked now; the last fault: {self.in_short}"
        return UpstreamOut(said, retry_after_ms=max(FIRST_MS, found[0]))

    # -- what became of a call

    async def worked(self, model: str, *, tried: bool) -> None:
        """It answered as it should. `tried`: the call was a try."""
        if self._faults.count:
            self._faults.clear()
            self._said, self._closed_since = ("", ""), None
        if self._strikes:  # those of the account too: it has room
            self._strikes.pop(model_limit(model), None)
            self._strikes.pop(self.limit, None)
        if tried:
            await self.open()

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Of a try: after `PROBE_S` without an answer it holds up no other. One that is answered
        may last for longer, and has no part in an outage after that."""
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
        """Let all calls pass again."""
        self._opened += 1
        self._faults.clear()
        self._said, self._closed_since = ("", ""), None
        try:
            opened = await self.limiter.open_gate(self.limit)
        except LimiterUnavailable as away:
            log.debug(Log.UPSTREAM_BACK, upstream=self.upstream, detail=away.message)
            return
        if opened:
            log.warning(Log.UPSTREAM_BACK, upstream=self.upstream)

    async def failed(
        self, error: UpstreamError, model: str, *, suspect: Suspect, tried: bool
    ) -> None:
        """Note what a failure says of the upstream, before its permit is released."""
        if error.is_answer or isinstance(error, UpstreamThrottled):
            await self.worked_but(model, tried=tried)
            return
        is_slow = isinstance(error, UpstreamTimeout) and error.phase != "connect"
        if not tried and (is_slow or suspect.is_other):
            error.in_outage = self._is_in_outage()
            return  # we had no more patience: others may be answered sooner
        dead = isinstance(error, UpstreamUnauthorized) and error.of_key and not suspect.is_other
        self._said = error.message, _in_short(error)
        is_new = self._faults.add(None if error.of_upstream else suspect)
        if dead or (is_new if tried else self._faults.are_enough):
            await self._close(error, dead=dead, tried=tried)
        error.in_outage = self._is_in_outage() or dead  # it may be open again by now

    def _is_in_outage(self) -> bool:
        """Whether a fault is laid to the upstream whatever it is, as others fail there too."""
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
        except LimiterUnavailable as away:
            log.debug(Log.UPSTREAM_OUT, upstream=self.upstream, detail=away.message)
            return
        if closed and (not tried or (dead and not was_dead)):
            event = Log.UPSTREAM_KEY_DEAD if dead else Log.UPSTREAM_OUT
            log.error(event, upstream=self.upstream, detail=error.message)

    async def worked_but(self, model: str, *, tried: bool) -> None:
        """It refused one call, and works: strikes of the model stay."""
        strikes, self._strikes = self._strikes, {}
        await self.worked(model, tried=tried)
        self._strikes = strikes

    async def throttled(self, error: UpstreamThrottled, model: str, demand: CallDemand) -> int:
        """Pause what a 429 speaks of for all processes, before the call's own permit is released.
        Returns for how many ms, 0 where nothing was paused."""
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
        try:
            paused = await limiter.penalise(
                pause.limit,
                for_ms=for_ms,
                ramp_ms=pause.ramp_ms or for_ms,
                reason=error.message[:_REASON_CHARS],
                by=self.upstream,
            )
        except LimiterUnavailable as away:
            log.debug(Log.LIMIT_PAUSED, limit=pause.limit, detail=away.message)
            return 0
        if paused:
            log.warning(Log.LIMIT_PAUSED, limit=pause.limit, for_ms=for_ms, by=self.upstream)
        return for_ms

    def _has_learned(self, demand: CallDemand) -> bool:
        """Whether a refusal without a time has lowered a limit of the call, which finds its own
        way: a pause as well, of a provider that answers others, would leave it unused."""
        limits = (self.limiter.policy.limits.get(one) for one in demand.limits)
        return any(isinstance(one, Concurrency) and one.adaptive is not None for one in limits)

    def _strike(self, limit: str, told_ms: int, first_ms: int) -> int:
        """How long a pause is that the provider did not put a time to, or a short one. Calls that
        were under way when it began make it no longer."""
        count, until = self._strikes.pop(limit, (0, 0.0))
        now = self._clock()
        count = 0 if now > until + FORGOTTEN_S else count
        # Several are refused in one moment, before the limiter has said that the first paused it.
        left_ms = max(self.limiter.paused_ms((limit,)), round((until - now) * 1000))
        if left_ms > 0:
            if count:
                self._strikes[limit] = count, until
            return max(left_ms, told_ms)
        while len(self._strikes) >= MOST_PAUSED:
            self._strikes.pop(next(iter(self._strikes)))
        for_ms = max(told_ms, min(LONGEST_PAUSE_MS, max(FIRST_PAUSE_MS, first_ms) << count))
        self._strikes[limit] = min(count + 1, _MOST_STRIKES), now + for_ms / 1000
        return for_ms

    def _is_too_much(self, limit: str, model: str) -> bool:
        """Clients name models: a pool's record does not grow with what they think of."""
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
    """The gates of all upstreams, by name. One per process."""

    def ready_in_ms(
        self, upstreams: Iterable[str], *, model: str | None = None, limits: Iterable[str] = ()
    ) -> int:
        """0 where one of these upstreams may be asked now, else the ms until the first may be.

        Cheap and without I/O: what this process last heard, which is a moment old. `model` and
        `limits` (such as `kind:text_only`) are asked about too: a pause of them counts as well.
        While an upstream is out this is the time until the next try is due; then one call of all
        processes is admitted, and the others wait at the gate.
        """
        names = list(limits)
        found = (self[one].ready_in_ms(model, names) for one in upstreams)
        return min(found, default=0)


def _in_short(error: UpstreamError) -> str:
    """What others may hear: the provider's words can be about one tenant's request, or our key."""
    if isinstance(error, UpstreamUnauthorized) and error.of_key:
        return error.in_short
    return error.message if error.status is None else f"the provider answered {error.status}"


_MODELS_KEPT = 1_000
_PATTERN = frozenset("*?[")  # as fnmatch reads them
_MOST_NAMED = 8  # upstreams, and patterns of each, in a refusal


@dataclass(frozen=True, slots=True)
class Target:
    """An upstream, and the model's name there."""

    upstream: Upstream
    model: str


# Each part begins with a letter, a digit or an underscore: none leads elsewhere.
_PLAIN_PATH = re.compile(r"(?:/\w[\w.:@-]*)+", re.ASCII)


class Targets:
    """One per process. A drained upstream is a target only where no other one would be."""

    def __init__(self, deployment: Deployment, random: Random | None = None) -> None:
        self._random = random or Random()
        self.replace(deployment)

    def replace(self, deployment: Deployment) -> None:
        """Have these upstreams and routes from now on. Raises ConfigError, and changes nothing."""
        check_passthrough(deployment.upstreams)
        self.upstreams = {one.name: one for one in deployment.upstreams}
        self.drained, self.deployment = deployment.drained, deployment
        self._routes = deployment.routes
        # The targets of a model, and whether their order is drawn.
        self._known: dict[tuple[Dialect, str], tuple[list[Target], bool]] = {}
        self._for_prompts: dict[str, tuple[list[Target], bool]] = {}
        ordered = sorted(deployment.upstreams, key=lambda one: one.name in self.drained)
        self._passthrough = [(pattern, one) for one in ordered for pattern in one.passthrough]

    def passthrough(self, path: str, spoken: Dialect) -> Endpoint | None:
        """The endpoint of a path that `passthrough` names, by its caller's dialect where two do."""
        if not self._passthrough or _PLAIN_PATH.fullmatch(path) is None or is_known(path):
            return None
        found = []
        for pattern, upstream in self._passthrough:
            stem = pattern.removesuffix("/*")
            if path == stem or (stem != pattern and path.startswith(f"{stem}/")):
                found.append(upstream)
        if not found:
            return None
        dialects = [_first_dialect(one) for one in found]
        dialect = spoken if spoken in dialects else dialects[0]
        names = [one.name for one, its in zip(found, dialects, strict=True) if its is dialect]
        below = path.removeprefix("/v1") if dialect is Dialect.OPENAI else path
        return Endpoint(dialect, Operation.OTHER, below, upstreams=tuple(dict.fromkeys(names)))

    def passing(self, endpoint: Endpoint, tenant_id: str) -> Upstream:
        """Where a tenant's call of such a path goes. Raises Forbidden and NotFound."""
        left = [self.upstreams[name] for name in endpoint.upstreams if name in self.upstreams]
        if not left:
            raise NotFound("the upstream of this path is not configured any more")
        for upstream in left:
            if not upstream.passthrough_tenants or tenant_id in upstream.passthrough_tenants:
                return upstream
        raise Forbidden(f"this path is not open to the tenant {tenant_id}")

    def of(self, dialect: Dialect, model: str) -> list[Target]:
        """The chain for a model. Raises NotFound where nobody serves it so, and UpstreamMissing."""
        known = self._known.get((dialect, model))
        if known is None:
            plain = model.removeprefix("models/")
            routed = self._routed(plain)
            if routed is not None:
                speaking = [one for one in routed if dialect in one.upstream.base_urls]
                known = (self._undrained(speaking), False)
            elif plain:
                serving = self._best(plain, self.in_service(dialect))
                known = (serving or self._best(plain, self.speaking(dialect)), True)
            else:
                known = (self._without_model(dialect), True)
            self._check_there(plain, known[0])
            if not known[0]:
                raise NotFound(self._unserved(dialect, plain), field="model")
            if len(self._known) >= _MODELS_KEPT:  # clients think of names without end
                del self._known[next(iter(self._known))]
            self._known[dialect, model] = known
        found, by_lot = known
        return self._drawn(found) if by_lot else list(found)

    def _check_there(self, model: str, found: Sequence[Target]) -> None:
        """Raises UpstreamMissing for a model of upstreams that this process can't make."""
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

    def are_alike(self, dialect: Dialect, model: str) -> bool:
        """Whether the order of the targets that `of` has found for a model is drawn by lot."""
        known = self._known.get((dialect, model))
        return known is not None and known[1]

    def speaking(self, dialect: Dialect) -> list[Upstream]:
        """All upstreams of a dialect, in the order of the file."""
        return [one for one in self.upstreams.values() if dialect in one.base_urls]

    def in_service(self, dialect: Dialect) -> list[Upstream]:
        """Those of a dialect that take new calls; all where none does."""
        speaking = self.speaking(dialect)
        return [one for one in speaking if one.name not in self.drained] or speaking

    def _undrained(self, targets: list[Target]) -> list[Target]:
        """Those that take new calls; all where none does."""
        if not self.drained:
            return targets
        return [one for one in targets if one.upstream.name not in self.drained] or targets

    def named_by_routes(self, dialect: Dialect) -> dict[str, Target]:
        """The models that have a name by a route alone, and who is asked first for each. Routes
        that are patterns name none."""
        found: dict[str, Target] = {}
        for route in self._routes:
            if not _PATTERN.intersection(route.model):
                targets = self._routed(route.model) or []
                speaking = (one for one in targets if dialect in one.upstream.base_urls)
                if (first := next(speaking, None)) is not None:
                    found[route.model] = first
        return found

    def of_prompt(self, model: str, kind: Kind | None = None, files: Files = ()) -> list[Target]:
        """The chain for a prompt, which is of no dialect: those that can take it in one of theirs.
        Raises InvalidRequest where none can, and UpstreamMissing."""
        known = self._for_prompts.get(model)
        if known is None:
            plain = model.removeprefix("models/")
            routed = self._routed(plain)
            found = self._any(plain) if routed is None else self._undrained(routed)
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
            said = f"no upstream serves the model {model!r}"
            raise InvalidRequest("model", said, allowed=_served(self.upstreams.values()))
        _, why = dialect_for(found[0].upstream.base_urls, found[0].model, kind, files)
        assert why is not None
        said = f"the upstream {found[0].upstream.name!r} of the model {model!r} {why.reason}"
        raise InvalidRequest(why.field, said, allowed=why.allowed)

    def _any(self, model: str) -> list[Target]:
        """Those that name a model; where nobody does, those that take any, and of these the ones of
        Gemini's dialect, where there are some: the usual models of prompts are Gemini's."""
        serving = [one for one in self.upstreams.values() if one.name not in self.drained]
        found = self._best(model, serving) or self._best(model, self.upstreams.values())
        if any(one.upstream.fit(model) > 1 for one in found):
            return found
        return [one for one in found if Dialect.GEMINI in one.upstream.base_urls] or found

    def pools_for(self, model: str) -> list[str]:
        """The pools whose limits a model meets, by its name at the provider."""
        found = {one.upstream.pool for one in self._best(model, self.upstreams.values())}
        for route in self._routes:
            of_route = (route.model,) if not _PATTERN.intersection(route.model) else ()
            for target in (one for named in of_route for one in self._routed(named) or ()):
                found |= {target.upstream.pool} if target.model == model else set()
        found |= {one.pool for one in self.upstreams.values() if model in one.aliases.values()}
        return [one.pool for one in self.upstreams.values() if one.pool in found]

    def places_of(self, job: Whereabouts, config: Config) -> list[Whereabouts]:
        """A job with each pool and model by whose limits it is called, or was last: jobs of all
        models are in the queue of one pool."""
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
        """For a call that leaves its model to the provider: those whose own dialect it is, and that
        take any model, come first."""
        speaking = self.in_service(dialect)
        own = [one for one in speaking if _first_dialect(one) is dialect] or speaking
        return [Target(one, "") for one in [one for one in own if one.fit("")] or own]

    def _best(self, model: str, upstreams: Iterable[Upstream]) -> list[Target]:
        """Those that name the model; those that take any only where nobody does."""
        fits = [(one.fit(model), one) for one in upstreams]
        named = [one for fit, one in fits if fit > 1] or [one for fit, one in fits if fit]
        return [Target(one, one.aliases.get(model, model)) for one in named]

    def _drawn(self, targets: Sequence[Target]) -> list[Target]:
        """By lot, each place by weight among those that are left."""
        if len(targets) < 2:
            return list(targets)
        # Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
        keys = [
            (self._random.random() ** (1 / target.upstream.weight), place)
            for place, target in enumerate(targets)
        ]
        return [targets[place] for _, place in sorted(keys, reverse=True)]


def _first_dialect(upstream: Upstream) -> Dialect:
    return Dialect(next(iter(upstream.base_urls)))


def _served(upstreams: Iterable[Upstream]) -> str:
    """Which models there are, for people."""
    first = list(upstreams)[:_MOST_NAMED]
    return "; ".join(f"{one.name}: {', '.join(one.models[:_MOST_NAMED])}" for one in first)


class NotWorthWaiting(Exception):
    """What the call needs was paused while it waited: for longer than it may wait, or so that it
    must be asked for again."""


WatchBudgets = Callable[[Callable[[QuotaExceeded], None]], Callable[[], None]]


class PatientAdmission:
    """An admission that is left as soon as a pause outlasts the call's deadline, or a budget that
    binds it is spent.

    Entering it raises NotWorthWaiting or BudgetExceeded then, beside what the admission raises; and
    NotWorthWaiting also where the call was admitted after something else that binds it was paused:
    the permit has spent nothing. Cancelled, it leaves the queue, as the admission does.
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
        """watch: of the budgets that bind the call, where any do."""
        self._admission = admission
        self._gate = gate
        self._demand = demand
        self._model = model
        self._until = time.monotonic() + left_ms / 1000
        self._watch = watch

    async def __aenter__(self) -> Permit:
        limiter, admission = self._gate.limiter, self._admission
        paused, end = self._paused, None
        limiter.tell_of_pauses(paused)
        if self._watch is not None:
            end = self._watch(admission.leave)
        try:
            permit = await admission.__aenter__()
        finally:
            limiter.tell_no_more(paused)
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
