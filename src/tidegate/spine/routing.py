"""Whether an upstream may be asked now, in all processes together.

OPEN (asked) -- `FAULTS` real faults in a row --> CLOSED (asked by nobody)
CLOSED -- `FIRST_MS` later one call of all processes tries -- success --> OPEN, else CLOSED for
twice as long, up to `LONGEST_MS`; for `DEAD_KEY_MS` where the key was refused or money is gone

The gate is a pause of the limit `upstream:NAME` in the pool's record, see `Limiter.close_gate`.
Calls wait at it within their own deadlines; one at a time is admitted as a try. A 429 is no fault:
it says that the upstream works, and pauses the model that was asked for. Nor is it one where our
patience ends once the request is out. Most faults can be the doing of the request, or of a caller
who makes such requests: they count once for each request, and of one tenant's no more than
`MOST_OF_ONE`, until very many different ones have failed.
Once an upstream is out, such a fault is laid to the upstream too: it costs a job no attempt.

Invariants: faults are counted in each process, but an upstream is out for all or for none; one
request, however often it is made, neither puts it out nor keeps it out; what a client names reaches
the pool's record only while it is paused, and `MOST_PAUSED` names at most.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from typing import Literal

from tidegate.demand import Demand
from tidegate.demand.pause import model_limit, pause_after
from tidegate.errors import (
    DeadlineExceeded,
    LimiterUnavailable,
    UpstreamError,
    UpstreamOut,
    UpstreamThrottled,
    UpstreamTimeout,
    UpstreamUnauthorized,
)
from tidegate.limiter import Limiter
from tidegate.limiter.limits import Concurrency
from tidegate.limiter.outlook import paused
from tidegate.spine.announced import Announced
from tidegate.spine.faults import Faults, Suspect, can_be_provoked
from tidegate.telemetry import Log, get_logger

FIRST_MS = 1_000
# Short, as one request is all that it costs to see that an upstream is back; a key that was refused
# is replaced by a person.
LONGEST_MS = 8_000
DEAD_KEY_MS = 60_000
# Models that a pool may have paused without a limit in the policy, as this process knows them.
MOST_PAUSED = 100
# The pauses of a model whose 429 does not say for how long: each is twice as long as the last.
FIRST_PAUSE_MS = 500
LONGEST_PAUSE_MS = 8_000
_MOST_STRIKES = 12
_LATER_MS = 50  # between two looks at the clock
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
        self._said = ""  # by the provider, for operators
        self._strikes: dict[str, tuple[int, float]] = {}  # how many, and until when the last lasts
        self._opening: asyncio.Task[bool] | None = None

    # -- what is known, without I/O

    def closed(self) -> tuple[int, str] | None:
        """None while it is open; else for how many ms nobody may try, and why."""
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
    def why(self) -> str:
        """The last fault in the provider's words, for operators; empty where there was none."""
        return self._said or self.in_short

    @property
    def in_short(self) -> str:
        """The same without the provider's words, which may be about one tenant's request."""
        found = self.closed()
        return "" if found is None else found[1].rpartition(": ")[2]

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
        if self.limit in names and self.closed() is None and self.limiter.gate(self.limit):
            return tuple(name for name in names if name != self.limit)
        return names

    def bind(self, demand: Demand, model: str) -> Demand:
        """The demand with what binds it now."""
        more = self.binding(model)
        if not more:
            return demand
        missing = tuple(name for name in more if name not in demand.limits)
        return replace(demand, limits=demand.limits + missing) if missing else demand

    def binds_more(self, demand: Demand, model: str) -> bool:
        """Whether something was paused since the demand was made: it must be asked for again."""
        return self.limiter.has_pauses and self.bind(demand, model) is not demand

    def is_try(self, demand: Demand) -> bool:
        """Whether a call that was admitted for this demand tries whether the upstream is back."""
        return self.limit in demand.limits and self.closed() is not None

    def late(self, demand: Demand, left_ms: float) -> DeadlineExceeded | UpstreamOut | None:
        """Why a call that may wait for `left_ms` is not to wait at all; None where it is."""
        paused_ms = self.limiter.paused_ms(demand.limits)
        if paused_ms <= left_ms:
            return None
        if (out := self.out()) is not None and (out.retry_after_ms or 0) >= paused_ms - _LATER_MS:
            return out
        last = max(demand.limits, key=lambda one: self.limiter.paused_ms((one,)))
        return paused(last, paused_ms)

    def check(self, demand: Demand, left_ms: float) -> None:
        """Raises what `late` finds."""
        if (late := self.late(demand, left_ms)) is not None:
            raise late

    def out(self) -> UpstreamOut | None:
        """The error of a call that cannot be made since the upstream is out; None if it is not."""
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
            self._said, self._closed_since = "", None
        if self._strikes:  # those of the account too: it has room
            self._strikes.pop(model_limit(model), None)
            self._strikes.pop(self.limit, None)
        if tried:
            await self.open()

    async def open(self) -> None:
        """Let all calls pass again."""
        self._faults.clear()
        self._said, self._closed_since = "", None
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
        if not tried and isinstance(error, UpstreamTimeout) and error.phase != "connect":
            error.in_outage = self._is_in_outage()
            return  # we had no more patience: others may be answered sooner
        dead = isinstance(error, UpstreamUnauthorized) and error.of_key
        self._said = error.message
        is_new = self._faults.add(suspect if can_be_provoked(error) else None)
        if dead or (is_new if tried else self._faults.are_enough):
            await self._close(error, dead=dead, tried=tried)
        error.in_outage = self._is_in_outage()

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

    async def throttled(self, error: UpstreamThrottled, model: str, demand: Demand) -> int:
        """Pause what a 429 speaks of for all processes, before the call's own permit is released.
        Returns for how many ms, 0 where nothing was paused."""
        limiter = self.limiter
        whole = self.limit if error.of_account else None
        pause = pause_after(
            error, demand.limits, model, limiter.policy, datetime.now(UTC), account=whole
        )
        if pause is None:
            return 0
        if pause.limit not in limiter.policy.limits and self._is_too_much(pause.limit):
            return 0
        for_ms, ramp_ms = pause.for_ms, pause.ramp_ms
        if not for_ms:
            if pause.limit not in self._strikes and self._has_learned(demand):
                self._strikes[pause.limit] = 1, self._clock()
                error.lowered_limit = True
                return 0
            for_ms = self._strike(pause.limit)
            ramp_ms = for_ms
        try:
            paused = await limiter.penalise(
                pause.limit,
                for_ms=for_ms,
                ramp_ms=ramp_ms,
                reason=error.message[:_REASON_CHARS],
                by=self.upstream,
            )
        except LimiterUnavailable as away:
            log.debug(Log.LIMIT_PAUSED, limit=pause.limit, detail=away.message)
            return 0
        if paused:
            log.warning(Log.LIMIT_PAUSED, limit=pause.limit, for_ms=for_ms, by=self.upstream)
        return for_ms

    def _has_learned(self, demand: Demand) -> bool:
        """Whether a refusal without a time has lowered a limit of the call, which finds its own
        way: a pause as well, of a provider that answers others, would leave it unused."""
        limits = (self.limiter.policy.limits.get(one) for one in demand.limits)
        return any(isinstance(one, Concurrency) and one.adaptive is not None for one in limits)

    def _strike(self, limit: str) -> int:
        """How long a pause is that the provider did not put a time to. Calls that were under way
        when it began make it no longer."""
        count, until = self._strikes.pop(limit, (0, 0.0))
        now = self._clock()
        # Several are refused in one moment, before the limiter has said that the first paused it.
        left_ms = max(self.limiter.paused_ms((limit,)), round((until - now) * 1000))
        if left_ms > 0:
            if count:
                self._strikes[limit] = count, until
            return left_ms
        while len(self._strikes) >= MOST_PAUSED:
            self._strikes.pop(next(iter(self._strikes)))
        for_ms = min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS << count)
        self._strikes[limit] = min(count + 1, _MOST_STRIKES), now + for_ms / 1000
        return for_ms

    def _is_too_much(self, limit: str) -> bool:
        """Clients name models: a pool's record does not grow with what they think of."""
        pauses = self.limiter.pauses()
        named = self.limiter.policy.limits
        return limit not in pauses and len([1 for one in pauses if one not in named]) >= MOST_PAUSED

    def _open_for_the_new_key(self) -> None:
        if self._opening is None or self._opening.done():
            self._opening = asyncio.ensure_future(self._open_quietly())

    async def _open_quietly(self) -> bool:
        try:
            return await self.limiter.open_gate(self.limit)
        except LimiterUnavailable:
            return False


class Gates(Mapping[str, Gate]):
    """The gates of all upstreams, by name. One per process."""

    def __init__(self, gates: Mapping[str, Gate]) -> None:
        self._gates = gates

    def __getitem__(self, upstream: str) -> Gate:
        return self._gates[upstream]

    def __iter__(self) -> Iterator[str]:
        return iter(self._gates)

    def __len__(self) -> int:
        return len(self._gates)

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
        found = (self._gates[one].ready_in_ms(model, names) for one in upstreams)
        return min(found, default=0)


def _in_short(error: UpstreamError) -> str:
    """What others may hear: the provider's words can be about one tenant's request, or our key."""
    if isinstance(error, UpstreamUnauthorized) and error.of_key:
        return error.in_short
    return error.message if error.status is None else f"the provider answered {error.status}"
