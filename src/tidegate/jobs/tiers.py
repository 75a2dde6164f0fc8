"""Processing tiers of jobs: which are available, and the cheapest that meets a deadline.

    batch ── its end comes near to the deadline ──► flex ── only live is safe ──► live

A job waits in a cheaper tier only as long as the live tier would still meet the deadline at the
limits in force, after all earlier jobs of the same kind. Unknown times count as the longest that
the provider announces: a batch without known times is only tried if half of its window fits before
that moment.

Invariants: a tier that is not allowed, has no known price, or costs more than the live tier is
never chosen; if no cheaper tier is safe, the live tier is; a tier is offered only if every upstream
that the job may go to has a price for it. The live tier's time is estimated at the limits of the
job's first upstream, with all open jobs of its kind that come before it (`store/statistics.py`,
`OpenJobs`). `choose` of `admission/charges.py` makes the choice.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from math import inf
from random import uniform

from tidegate.admission.charges import (
    CallSamples,
    FlexCalls,
    LiveRoom,
    TierChoice,
    TierOffer,
    TierTimes,
    choose,
)
from tidegate.admission.demand import NO_TAGS, CallTags
from tidegate.call import DEFAULT_TENANT, Kind, Tier
from tidegate.dialects.spec import Dialect
from tidegate.errors import TidegateError, UpstreamRejected, UpstreamTierBusy, UpstreamTimeout
from tidegate.jobs.calls import key_of
from tidegate.jobs.outages import Key
from tidegate.record import CallRecord
from tidegate.settings import Config
from tidegate.spine.routing import Target
from tidegate.spine.run import UpstreamAccount
from tidegate.store.records import ClaimedJob
from tidegate.store.statistics import OpenJobs

_LEAST_BATCHES = 3
_BATCHES_FRESH_S = 10.0
_MOST_MODELS = 1_000
_CLAIMED_A_S = 200.0  # of jobs or lines that wait for flex capacity
_NO_END = datetime.max.replace(tzinfo=UTC)


# Of an upstream's batches of a model: the ms within which nearly all have ended, and their number;
# None for no batch.
UsualBatches = Callable[[str, str], Awaitable[tuple[float, int] | None]]


class TierOffers:
    """Offers processing tiers to the jobs of one worker. targets_of: the targets of a job; lane_of:
    the account of a target. taken_in: the dialect of the batch API that can take a job."""

    def __init__(
        self,
        config: Config,
        ahead: OpenJobs,
        targets_of: Callable[[ClaimedJob], Sequence[Target]],
        lane_of: Callable[[Target], UpstreamAccount],
        taken_in: Callable[[ClaimedJob], Dialect | None],
        usual_batches: UsualBatches,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._now = now
        self._ahead = ahead
        self._targets_of = targets_of
        self._account_of = lane_of
        self._taken_in = taken_in
        self._usual_batches = usual_batches
        self._times = TierTimes.of(config)
        self._recent_calls: dict[Kind, CallSamples] = {kind: CallSamples() for kind in Kind}
        self.flex = FlexCalls(clock)
        self._clock = clock
        self._batch_times: dict[Key, tuple[float, float | None]] = {}

    def __repr__(self) -> str:
        return f"<TierOffers {self.flex!r}>"

    async def choice(
        self, job: ClaimedJob, kind: Kind, tried: Collection[Tier] = (), *, is_line: bool = False
    ) -> TierChoice | None:
        """Return the tier of a job now, None if only the live tier is allowed. tried: tiers that
        have refused the job. is_line: it is a batch line, which all jobs precede. Raises
        StoreUnavailable."""
        if not job.tiers_allowed:
            return None
        targets = self._targets_of(job)
        offers = []
        for tier in job.tiers_allowed:
            if tier not in tried and (offer := await self._offer(job, tier, targets)) is not None:
                offers.append(offer)
        room = LiveRoom()
        if offers and targets:
            tags = (job.key_id, job.subject, job.conversation)
            due, lines = job.deadline_at, 0
            if is_line:
                lines = await self._ahead.lines(due)
            room = await self._room(kind, targets[0], job.tenant_id, due, tags, lines)
        return choose(offers, room, now=self._now(), due=job.deadline_at, times=self._times)

    async def _offer(
        self, job: ClaimedJob, tier: Tier, targets: Sequence[Target]
    ) -> TierOffer | None:
        shares = [
            self._account_of(target).demands.prices.share(target.model, tier) for target in targets
        ]
        known = [share for share in shares if share is not None]
        if not known or len(known) < len(shares):
            return None
        if tier is Tier.FLEX:
            if self.flex.is_refused(job.request_id):
                return None
            keys = [key_of(target) for target in targets]
            usual = [one for one in map(self.flex.usual_ms, keys) if one is not None]
            slowest = max(usual) if len(usual) == len(keys) else None
            return TierOffer(tier, max(known), slowest, min(map(self.flex.busy_ms, keys)))
        if (dialect := self._taken_in(job)) is None:
            return None
        usual_ms = [await self._usual_batch_ms(key_of(target)) for target in targets]
        ended = [one for one in usual_ms if one is not None]
        slowest = max(ended) if len(ended) == len(usual_ms) else None
        # A cancelled batch returns the answers it has, except Gemini's.
        keeps_results = dialect is not Dialect.GEMINI
        return TierOffer(tier, max(known), slowest, keeps_results=keeps_results)

    async def leaves_at(self, kind: Kind, target: Target, due: datetime) -> datetime | None:
        """Return when a batch at a provider must be cancelled so that its jobs with this deadline
        are called in time, with as many jobs as are open now; None if they could not be. Raises
        StoreUnavailable."""
        room = await self._room(kind, target, DEFAULT_TENANT, due)
        if room.is_late((due - self._now()).total_seconds() * 1000):
            return None
        needs_ms = room.reserve_ms + self._times.cancel_ms
        return None if needs_ms == inf else due - timedelta(milliseconds=needs_ms)

    async def _usual_batch_ms(self, key: Key) -> float | None:
        """Return within which time a model's batches end; None after too few."""
        now = self._clock()
        until, usual_ms = self._batch_times.get(key, (now, None))
        if until <= now:
            usual = await self._usual_batches(*key)
            usual_ms = usual[0] if usual is not None and usual[1] >= _LEAST_BATCHES else None
            if len(self._batch_times) >= _MOST_MODELS:
                self._batch_times.clear()
            self._batch_times[key] = now + _BATCHES_FRESH_S, usual_ms
        return usual_ms

    async def _room(
        self,
        kind: Kind,
        target: Target,
        tenant: str,
        due: datetime | None,
        tags: CallTags = NO_TAGS,
        lines: int = 0,
    ) -> LiveRoom:
        account = self._account_of(target)
        policy = account.limiter.policy
        images = int(kind is Kind.IMAGE_GENERATION)
        limits = account.demands.limits(policy, kind, target.model, tenant, images, tags=tags)
        ahead = await self._ahead.of(kind, due) + lines - 1
        return self._recent_calls[kind].room(map(policy.binding, limits), ahead)

    def ended(self, job: ClaimedJob, record: CallRecord, error: TidegateError | None) -> int | None:
        """Record the end of a job's call in its tier. Return the ms to wait if the tier, and not
        the call, refused it, which uses up no attempt; else None."""
        key, kind = (record.upstream or "", record.model or ""), job.classification.kind
        took_ms = record.upstream_ms or 0.0
        if error is None and kind is not None:
            self._recent_calls[kind].sizes.add(record.answer.usage)
            if job.tier is Tier.FLEX:
                self.flex.answered(key, took_ms)
            else:
                self._recent_calls[kind].times.last_ms.append(took_ms)
        elif isinstance(error, UpstreamTierBusy):
            if error.status is not None:  # without a status, the job has left the tier by itself
                self.flex.was_busy(key, error.pause_ms)
            return self.put_off_ms(key)
        elif job.tier is Tier.FLEX and isinstance(error, UpstreamRejected | UpstreamTimeout):
            self.flex.refuse(job.request_id)
            return 0
        return None

    def put_off_ms(self, *keys: Key) -> int:
        """Return how long a job waits for flex capacity: until the next call there, plus a random
        time."""
        busy_ms = min(map(self.flex.busy_ms, keys), default=0.0)
        return round(busy_ms * uniform(1, 1.5))

    async def wait_ms(self, job: ClaimedJob, kind: Kind, *keys: Key, is_line: bool = False) -> int:
        """Return how long a job or batch line waits for flex capacity, 0 if it may be called:
        longer with many others, so that few a second are claimed in vain, but not past the review
        of its tier. Raises StoreUnavailable."""
        if not (busy_ms := self.put_off_ms(*keys)):
            return 0
        others = await (self._ahead.lines(None) if is_line else self._ahead.of(kind, _NO_END))
        busy_ms += round(uniform(0, 1_000 * others / _CLAIMED_A_S))
        if job.revisit_at is None:
            return busy_ms
        left_ms = (job.revisit_at - self._now()).total_seconds() * 1_000
        return max(1, round(min(busy_ms, left_ms)))
