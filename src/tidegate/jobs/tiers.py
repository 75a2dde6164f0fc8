"""Processing tiers of jobs: which are offered, and the choice of the cheapest that is in time.

    batch ── its end comes near to the deadline ──► flex ── only live is safe ──► live

A job waits in a cheaper tier only as long as the usual tier still makes its deadline at our limits,
with all jobs of the same need before it. What is not known counts for the worst that the provider
announces: a batch is tried without knowledge only where half of its window fits before that moment.

Invariants: a tier that is not allowed, has no known price, or costs more than the usual one is
never chosen; where no cheaper tier is safe the usual one is; a tier is offered only where every
upstream that the job may go to states a price for it. What the usual tier takes is counted at the
limits of the job's first upstream, with all open jobs of its kind that come before it
(`store/statistics.py`, `OpenJobs`).
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from math import ceil, inf
from random import uniform
from typing import Any
from uuid import UUID

from tidegate.admission.demand import NO_TAGS, CallTags
from tidegate.call import DEFAULT_TENANT, Kind, Tier, Usage, tokens_of
from tidegate.dialects.spec import Dialect
from tidegate.errors import TidegateError, UpstreamRejected, UpstreamTierBusy, UpstreamTimeout
from tidegate.jobs.calls import key_of
from tidegate.jobs.outages import Key
from tidegate.limiter import Concurrency, Limit, Rate
from tidegate.record import CallRecord
from tidegate.settings import Config
from tidegate.spine.detached import endpoint_named
from tidegate.spine.routing import Target
from tidegate.spine.run import Lane
from tidegate.store.records import ClaimedJob
from tidegate.store.statistics import OpenJobs

MARGIN = 1.5  # over what a tier usually takes
RESERVE = 1.25  # over what the usual tier takes at our limits
SLACK_MS = 5_000.0  # from the moment of a move to the next call: claims, marks, the queue
UNKNOWN_SHARE = 0.5  # of a batch's window that must fit where nothing is known of it
# Waits of our own limits above this send a job to a batch at the same price.
FREE_WITHIN_MS = 60_000.0
LEAST_SEEN = 5
_MOST_SEEN = 100
_USUAL = 0.95
_FIRST_BUSY_MS, _LONGEST_BUSY_MS = 1_000.0, 60_000.0
_MOST_KEPT = 10_000
_LONGEST_MS = 400 * 86_400_000.0


@dataclass(frozen=True, slots=True)
class TierTimes:
    """What the providers announce of their tiers. batch_ms: the window of a batch; cancel_ms: how
    long a batch takes to end once it is cancelled; flex_ms: how long an answer of flex may take."""

    batch_ms: float = 86_400_000.0
    cancel_ms: float = 600_000.0
    flex_ms: float = 900_000.0


@dataclass(frozen=True, slots=True)
class TierOffer:
    """A cheaper tier as it is offered for a job. share: its price over the usual one. usual_ms:
    within which nearly all calls, or batches, have ended lately; None where too few were seen.
    busy_ms: for how long it is not to be asked again, since it had no capacity. keeps_results:
    whether a batch that is cancelled gives the answers that it has by then."""

    tier: Tier
    share: float
    usual_ms: float | None = None
    busy_ms: float = 0.0
    keeps_results: bool = True


@dataclass(frozen=True, slots=True)
class LiveRoom:
    """What the usual tier takes at our limits. ahead: jobs of the same need that come before;
    per_second: how many our limits admit; call_ms: how long one call takes."""

    ahead: int = 0
    per_second: float = inf
    call_ms: float = 0.0

    @property
    def wait_ms(self) -> float:
        """Until the job is admitted."""
        if not self.ahead:
            return 0.0
        return inf if self.per_second <= 0 else 1_000 * self.ahead / self.per_second

    @property
    def reserve_ms(self) -> float:
        """Before a deadline, by when the job must be in the usual tier."""
        return RESERVE * (self.wait_ms + self.call_ms) + SLACK_MS

    def is_late(self, left_ms: float) -> bool:
        """Whether the usual tier answers later than in so long: then there is none to leave a
        slower one for. A limit of 0 is a person's: nothing passes by it."""
        return left_ms < self.wait_ms + self.call_ms < inf


@dataclass(frozen=True, slots=True)
class TierChoice:
    """revisit_at: until when the choice stands; by then the job is in a faster tier. None: for as
    long as it takes. why: a sentence for the caller."""

    tier: Tier
    revisit_at: datetime | None
    why: str


def choose(
    offers: Iterable[TierOffer],
    room: LiveRoom,
    *,
    now: datetime,
    due: datetime | None,
    times: TierTimes,
) -> TierChoice:
    """The cheapest of the usual tier and the `offers` in which the job makes its deadline."""
    left_ms = inf if due is None else (due - now).total_seconds() * 1_000
    live_is_late = room.is_late(left_ms)
    safe: list[tuple[TierOffer, float]] = []
    late: list[str] = []
    for offer in offers:
        if offer.share >= 1:
            continue
        stands_ms = left_ms
        if not live_is_late:
            stands_ms -= room.reserve_ms + (times.cancel_ms if offer.tier is Tier.BATCH else 0.0)
        takes_ms = _takes_ms(offer, room, times)
        if takes_ms <= stands_ms:
            safe.append((offer, stands_ms))
        else:
            late.append(f"{offer.tier} may take {spoken(takes_ms)}")
    free = [one for one in safe if not one[0].busy_ms] or safe
    if not free:
        return TierChoice(Tier.LIVE, None, _why_live(late, left_ms, room))
    offer, stands_ms = min(free, key=lambda one: _order(one[0], room))
    why = f"{offer.tier} costs {offer.share:.0%} of the usual price"
    if due is not None:
        why += f" and {spoken(left_ms)} are left; live "
        why += "is too late" if live_is_late else f"from {spoken(room.reserve_ms)} before it is due"
    return TierChoice(offer.tier, None if live_is_late else _after(now, stands_ms), why)


def _takes_ms(offer: TierOffer, room: LiveRoom, times: TierTimes) -> float:
    """Within which the tier answers, for all that is known."""
    if offer.tier is Tier.BATCH:
        if offer.usual_ms is None:
            # Its answers would be paid for and lost where it has to be cancelled.
            return (UNKNOWN_SHARE if offer.keeps_results else 1) * times.batch_ms
        return min(MARGIN * offer.usual_ms, times.batch_ms)
    usual_ms = times.flex_ms if offer.usual_ms is None else MARGIN * offer.usual_ms
    return offer.busy_ms + room.wait_ms + usual_ms


def _order(offer: TierOffer, room: LiveRoom) -> tuple[float, bool]:
    """By price; at the same price flex, which answers sooner, where our limits have room for it."""
    prefers_flex = room.wait_ms <= FREE_WITHIN_MS and not offer.busy_ms
    return offer.share, (offer.tier is Tier.FLEX) is not prefers_flex


def _why_live(late: Sequence[str], left_ms: float, room: LiveRoom) -> str:
    if not late:
        return "no cheaper tier is allowed and offered for its model"
    needs = f"live needs {spoken(room.reserve_ms)}"
    return f"{spoken(left_ms)} are left, of which {needs}: {' and '.join(late)}"


def _after(now: datetime, ms: float) -> datetime | None:
    return None if ms > _LONGEST_MS else now + timedelta(milliseconds=ms)


_UNITS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"))


def spoken(ms: float) -> str:
    """A time as people read it, to a tenth of its unit."""
    if ms == inf:
        return "any time"
    for unit_ms, name in _UNITS:
        if ms >= unit_ms:
            return f"{ms / unit_ms:.1f}".removesuffix(".0") + f" {name}"
    return f"{max(0, round(ms))} ms"


@dataclass(slots=True)
class SeenTimes:
    """How long the last calls of one sort took."""

    last_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_MOST_SEEN))

    def usual_ms(self, least: int = LEAST_SEEN) -> float | None:
        """What 95 % of them did not exceed; None while fewer than `least` were seen."""
        if len(self.last_ms) < least:
            return None
        return sorted(self.last_ms)[ceil(_USUAL * len(self.last_ms)) - 1]

    def mean_ms(self) -> float | None:
        return sum(self.last_ms) / len(self.last_ms) if self.last_ms else None


@dataclass(slots=True)
class _Busy:
    """Refusals of flex in a row, for want of capacity, and until when it is not asked again."""

    refusals: int = 0
    until: float = 0.0


class FlexCalls:
    """What this process has seen of flex, by upstream and model; and of which jobs it was refused
    for themselves. The clock is that of the event loop."""

    def __init__(self, clock: Callable[[], float], most_kept: int = _MOST_KEPT) -> None:
        self._clock = clock
        self._most_kept = most_kept
        self._times: OrderedDict[tuple[str, str], SeenTimes] = OrderedDict()
        self._busy: OrderedDict[tuple[str, str], _Busy] = OrderedDict()
        self._never: OrderedDict[UUID, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<FlexCalls {len(self._times)} models, {len(self._busy)} busy>"

    def usual_ms(self, key: tuple[str, str]) -> float | None:
        seen = self._times.get(key)
        return None if seen is None else seen.usual_ms()

    def busy_ms(self, key: tuple[str, str]) -> float:
        """Until it may be asked again; 0: now."""
        busy = self._busy.get(key)
        return 0.0 if busy is None else max(0.0, (busy.until - self._clock()) * 1_000)

    def answered(self, key: tuple[str, str], took_ms: float) -> None:
        self._times.setdefault(key, SeenTimes()).last_ms.append(took_ms)
        self._times.move_to_end(key)
        self._busy.pop(key, None)
        _bound(self._times, self._most_kept)

    def was_busy(self, key: tuple[str, str], told_ms: int | None) -> None:
        """It was refused for want of capacity: twice as long each time, or as the provider says."""
        busy = self._busy.setdefault(key, _Busy())
        if busy.until <= self._clock():  # others that were under way count with the first
            pause_ms = min(_LONGEST_BUSY_MS, _FIRST_BUSY_MS * 2.0**busy.refusals)
            busy.refusals = min(busy.refusals + 1, 10)
            busy.until = self._clock() + max(pause_ms, told_ms or 0) / 1_000
        _bound(self._busy, self._most_kept)

    def refuse(self, job: UUID) -> None:
        """Flex has refused the job itself: it is made in the usual tier, which decides."""
        self._never[job] = None
        _bound(self._never, self._most_kept)

    def is_refused(self, job: UUID) -> bool:
        return job in self._never


def _bound(kept: OrderedDict[Any, Any], most: int) -> None:
    while len(kept) > most:
        kept.popitem(last=False)


_UNKNOWN_CALL_MS = 10_000.0
_DAY_S = 86_400
_LEAST_BATCHES = 3
_BATCHES_FRESH_S = 10.0
_MOST_MODELS = 1_000
_SMOOTHING = 0.1


# Of an upstream's batches of a model: within how many ms nearly all have ended, and how many there
# were; None where there was none.
UsualBatches = Callable[[str, str], Awaitable[tuple[float, int] | None]]


@dataclass(slots=True)
class _Sizes:
    """Average LLM tokens of the calls of a kind; None until there was one."""

    input_tokens: float | None = None
    output_tokens: float | None = None

    def add(self, usage: Usage) -> None:
        taken, given = tokens_of(usage)
        self.input_tokens = _moved(self.input_tokens, taken)
        self.output_tokens = _moved(self.output_tokens, given)

    def of(self, unit: str) -> float | None:
        """What a call counts in a unit, about; None where that is not known."""
        taken, given = self.input_tokens, self.output_tokens
        match unit:
            case "requests" | "images":
                return 1.0
            case "input_tokens" | "uncached_input_tokens":
                return taken
            case "output_tokens":
                return given
            case "tokens" if taken is not None and given is not None:
                return taken + given
        return None


def _moved(average: float | None, value: int | None) -> float | None:
    if value is None or average is None:
        return average if value is None else float(value)
    return average + _SMOOTHING * (value - average)


class TierOffers:
    """One per worker. targets_of: where a job may go; lane_of: what this process has of one.
    takes: whether a provider's batch can take a job."""

    def __init__(
        self,
        config: Config,
        ahead: OpenJobs,
        targets_of: Callable[[ClaimedJob], Sequence[Target]],
        lane_of: Callable[[Target], Lane],
        takes: Callable[[ClaimedJob], bool],
        usual_batches: UsualBatches,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ahead = ahead
        self._targets_of = targets_of
        self._lane_of = lane_of
        self._takes = takes
        self._usual_batches = usual_batches
        self._times = TierTimes(
            float(config.provider_batch_window_ms),
            float(config.provider_batch_cancel_ms),
            float(config.flex_within_ms),
        )
        self._live: dict[Kind, SeenTimes] = {kind: SeenTimes() for kind in Kind}
        self._sizes: dict[Kind, _Sizes] = {kind: _Sizes() for kind in Kind}
        self.flex = FlexCalls(clock)
        self._clock = clock
        self._batch_times: dict[Key, tuple[float, float | None]] = {}

    def __repr__(self) -> str:
        return f"<TierOffers {self.flex!r}>"

    async def choice(
        self, job: ClaimedJob, kind: Kind, tried: Collection[Tier] = ()
    ) -> TierChoice | None:
        """The tier of a job now, None where it is allowed the usual one alone. tried: those that
        have refused it. Raises StoreUnavailable."""
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
            room = await self._room(kind, targets[0], job.tenant_id, job.deadline_at, tags)
        return choose(offers, room, now=datetime.now(UTC), due=job.deadline_at, times=self._times)

    async def _offer(
        self, job: ClaimedJob, tier: Tier, targets: Sequence[Target]
    ) -> TierOffer | None:
        shares = [
            self._lane_of(target).demands.prices.share(target.model, tier) for target in targets
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
        if not self._takes(job):
            return None
        seen = [await self._usual_batch_ms(key_of(target)) for target in targets]
        ended = [one for one in seen if one is not None]
        slowest = max(ended) if len(ended) == len(seen) else None
        return TierOffer(tier, max(known), slowest, keeps_results=_keeps_results(job))

    async def leaves_at(self, kind: Kind, target: Target, due: datetime) -> datetime | None:
        """When a batch at a provider must be cancelled for those of its jobs that are due
        then, as many as are open now; None where nothing could be called in its stead, in time.
        Raises StoreUnavailable."""
        room = await self._room(kind, target, DEFAULT_TENANT, due)
        if room.is_late((due - datetime.now(UTC)).total_seconds() * 1000):
            return None
        needs_ms = room.reserve_ms + self._times.cancel_ms
        return None if needs_ms == inf else due - timedelta(milliseconds=needs_ms)

    async def _usual_batch_ms(self, key: Key) -> float | None:
        """Within which the batches of a model end; None where too few did."""
        now = self._clock()
        until, usual_ms = self._batch_times.get(key, (now, None))
        if until <= now:
            seen = await self._usual_batches(*key)
            usual_ms = seen[0] if seen is not None and seen[1] >= _LEAST_BATCHES else None
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
    ) -> LiveRoom:
        lane = self._lane_of(target)
        policy = lane.limiter.policy
        seen = self._live[kind]
        mean_ms = seen.mean_ms() or _UNKNOWN_CALL_MS
        images = int(kind is Kind.IMAGE_GENERATION)
        limits = lane.demands.limits(policy, kind, target.model, tenant, images, tags=tags)
        sizes = self._sizes[kind]
        per_second = min(
            (admitted_per_second(policy.binding(one), mean_ms, sizes.of) for one in limits),
            default=inf,
        )
        ahead = await self._ahead.of(kind, due)
        return LiveRoom(max(0, ahead - 1), per_second, seen.usual_ms(least=1) or _UNKNOWN_CALL_MS)

    def ended(self, job: ClaimedJob, record: CallRecord, error: TidegateError | None) -> int | None:
        """A job was called in its tier. Returns for how many ms it waits where the tier, and not
        the call, has refused it, which uses up no attempt; else None."""
        key, kind = (record.upstream or "", record.model or ""), job.classification.kind
        took_ms = record.upstream_ms or 0.0
        if error is None and kind is not None:
            self._sizes[kind].add(record.answer.usage)
            if job.tier is Tier.FLEX:
                self.flex.answered(key, took_ms)
            else:
                self._live[kind].last_ms.append(took_ms)
        elif isinstance(error, UpstreamTierBusy):
            if error.status is not None:  # else the job gave it up by itself
                self.flex.was_busy(key, error.retry_after_ms)
            return self.put_off_ms(key)
        elif job.tier is Tier.FLEX and isinstance(error, UpstreamRejected | UpstreamTimeout):
            self.flex.refuse(job.request_id)
            return 0
        return None

    def put_off_ms(self, *keys: Key) -> int:
        """For how long a job waits for capacity of flex: until it is asked again, and a little."""
        busy_ms = min(map(self.flex.busy_ms, keys), default=0.0)
        return round(busy_ms * uniform(1, 1.5))


def _keeps_results(job: ClaimedJob) -> bool:
    """Gemini gives no answers of a batch that was cancelled, and a prompt may go there."""
    if job.endpoint is None:
        return False
    return endpoint_named(job.endpoint).dialect is not Dialect.GEMINI


def admitted_per_second(
    limit: Limit | None, call_ms: float, size_of: Callable[[str], float | None]
) -> float:
    """How many calls a limit admits, where nothing else holds them up; infinite where it is not
    known what a call takes of it."""
    if limit is None or limit.shadow:
        return inf
    if isinstance(limit, Concurrency):
        size = size_of("tokens") if limit.by_tokens else 1
        return limit.bound * 1_000 / max(1.0, call_ms) / size if size else inf
    size = size_of(limit.unit)
    if not size:
        return inf
    window_s = limit.window_ms / 1_000 if isinstance(limit, Rate) else _DAY_S
    return limit.bound / window_s / size
