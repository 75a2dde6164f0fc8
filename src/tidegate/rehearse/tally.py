"""What happened in a rehearsal, call by call and moment by moment. Pure.

Times are ms from the start of the load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tidegate.demand import Demand
from tidegate.limiter.entries import Waiter
from tidegate.limiter.flow import Tokens, amount_of
from tidegate.limiter.limits import Concurrency, PoolPolicy, as_limit
from tidegate.limiter.model import PoolModel
from tidegate.rehearse.trace import Arrival


@dataclass(slots=True, eq=False)
class Call:
    """One call. `refused` is the code of the refusal, `at` the limit that held it up then."""

    arrival: Arrival
    asked_ms: float
    limits: tuple[str, ...]
    demand: Demand | None = None
    waiter: Waiter | None = None
    began_ms: float | None = None
    ended_ms: float | None = None
    refused: str | None = None
    at: str | None = None

    @property
    def waited_ms(self) -> float:
        return 0.0 if self.began_ms is None else self.began_ms - self.asked_ms

    @property
    def queued(self) -> bool:
        """It found no room when it came."""
        return self.waiter is not None and self.waiter.stamp > 0


@dataclass(frozen=True, slots=True)
class Sample:
    """One moment: what is used of each limit, and how many wait, by tenant and by the limit that
    holds them up."""

    at_ms: float
    used: Mapping[str, int]
    waiting: Mapping[str, int]
    held_up: Mapping[str, int]


@dataclass(slots=True)
class Use:
    """Of one limit: `area` is calls at once times ms, or the amount that was used of a rate, while
    the load lasted."""

    open: int = 0
    peak: int = 0
    area: float = 0.0
    since_ms: float = 0.0


@dataclass(slots=True)
class Tally:
    policy: PoolPolicy
    span_ms: float = 0.0
    since_ms: float = 0.0
    end_ms: float = 0.0
    calls: list[Call] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    uses: dict[str, Use] = field(default_factory=dict)

    def begin(self, span_ms: float) -> None:
        """The load begins now, and lasts so long."""
        self.span_ms = span_ms
        self.uses = {name: Use() for name in self.policy.limits}

    def end(self, now_ms: float) -> None:
        self.end_ms = now_ms - self.since_ms
        for use in self.uses.values():
            self._to(use, self.end_ms)

    def asked(self, call: Call) -> None:
        call.asked_ms -= self.since_ms
        self.calls.append(call)

    def refused(self, call: Call, now_ms: float, code: str, at: str | None) -> None:
        call.refused, call.at = code, at
        call.ended_ms = now_ms - self.since_ms

    def began(self, call: Call, now_ms: float) -> None:
        call.began_ms = now_ms - self.since_ms
        arrival = call.arrival
        for name in call.limits:
            use, limit = self.uses[name], as_limit(self.policy.limits[name])
            if isinstance(limit, Concurrency):
                self._to(use, call.began_ms)
                use.open += 1
                use.peak = max(use.peak, use.open)
            elif call.began_ms <= self.span_ms:
                tokens = Tokens(arrival.input_tokens, arrival.output_tokens)
                use.area += amount_of(limit.unit, tokens, arrival.images) or 0

    def ended(self, call: Call, now_ms: float) -> None:
        call.ended_ms = now_ms - self.since_ms
        for name in call.limits:
            if isinstance(as_limit(self.policy.limits[name]), Concurrency):
                use = self.uses[name]
                self._to(use, call.ended_ms)
                use.open -= 1

    def look(self, now_ms: float, model: PoolModel, wall_ms: int) -> None:
        """Take a sample of the pool."""
        model.now = max(model.now, wall_ms)
        used, waiting, held_up = {}, Counter[str](), Counter[str]()
        for name in self.policy.limits:
            limit = model.limit(name)
            used[name] = model.spent(limit) if limit.is_rate else limit.used
            if limit.is_rate:
                use = self.uses[name]
                use.peak = max(use.peak, used[name])
        for session in model.sessions.values():
            for queue in session.queues.values():
                waiting[queue.flow.tenant] += len(queue.tickets)
                if queue.at is not None:
                    held_up[queue.at] += len(queue.tickets)
        self.samples.append(Sample(now_ms - self.since_ms, used, waiting, held_up))

    def _to(self, use: Use, at_ms: float) -> None:
        """Count what is open up to a moment, as far as the load lasts."""
        until_ms = min(at_ms, self.span_ms)
        if until_ms > use.since_ms:
            use.area += use.open * (until_ms - use.since_ms)
            use.since_ms = until_ms
