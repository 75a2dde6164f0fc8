"""Policy of a pool: limits, weights, bands and lease, and the behaviour in an outage. Pure.

Before its first join a process compares the policy of its program with the one in force. An empty
pool, or one with a lower revision, takes the program's. An equal policy runs under the revision in
force. A policy that was never in force replaces one that a program wrote. Anything else is a
conflict.

Invariant: every policy that exists is valid; equal policies pack to the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from math import ceil, isfinite
from operator import index
from typing import Any, Literal, Self, TypedDict, Unpack, cast, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgpack

from tidegate.errors import ConfigError, PolicyConflict

WhenAway = Literal["closed", "local"]
OnLost = Literal["finish", "cancel"]
OnExpiry = Literal["reuse", "hold"]
FairBy = Literal["seconds", "calls", "cost"]
Unit = Literal[
    "requests",
    "tokens",
    "input_tokens",
    "uncached_input_tokens",
    "output_tokens",
    "images",
    "audio_seconds",
    "usd",
]
UnitInFlight = Literal["calls", "tokens_in_flight"]
Reserve = Literal["predicted", "bound", "max_tokens", "larger"]
Source = Literal["set", "imported", "learned"]
RateShape = Literal["window", "bucket"]
AdaptsBy = Literal["refusals", "latency"]

UNITS: tuple[Unit, ...] = get_args(Unit)
UNITS_IN_FLIGHT: tuple[UnitInFlight, ...] = get_args(UnitInFlight)
RESERVES: tuple[Reserve, ...] = get_args(Reserve)
RESERVES_IN_FLIGHT: tuple[Reserve, ...] = ("predicted", "bound")
SOURCES: tuple[Source, ...] = get_args(Source)
ADAPTS_BY: tuple[AdaptsBy, ...] = get_args(AdaptsBy)
SHAPES_OF_RATES: tuple[RateShape, ...] = get_args(RateShape)
MEASURES_OF_SHARES: tuple[FairBy, ...] = get_args(FairBy)
MOST_WEIGHT = 1_000.0
MIN_LEASE_MS = 200
MAX_LEASE_MS = 600_000
MAX_BOUND = 10_000_000_000
MAX_REVISION = 2**53 - 1  # numbers of Lua are exact up to it
# A pause without an end lasts a hundred years.
FOR_EVER_MS = 100 * 365 * 86_400_000
# With `hold`, a permit without `hard_ms` counts for this long after its process died.
DEFAULT_HARD_MS = 600_000
# A window with more requests than this is counted in buckets instead of an exact log.
MAX_LOG = 10_000
# Number of parts in which a window is counted, for a bucket and for any other rate. Use counts to
# the end of its part, so coarser parts leave more of a window unused.
BUCKETS, WINDOW_BUCKETS = 60, 120
# Use of a call if shares are measured in calls: as much as a second.
CALL_USE = 1_000
# Use of a call if shares are measured in cost, in micro-dollars: at least, so that free calls do
# not starve others; at most; and if neither a price nor tokens are known.
LEAST_USE, MOST_USE, UNKNOWN_USE = 10, 1_000_000_000, 1_000
ARRIVAL_SLACK_MS = 500
# A limit with such a scope that is not in the policy is unbounded: it only carries pauses.
IMPLICIT_SCOPES = ("model:", "upstream:")
# Lone surrogates are excluded too, since they cannot be encoded.
_LIMIT_ID = re.compile(r"[a-z_]+:[^\s|{}\ud800-\udfff]{1,200}|[^\s|{}:\ud800-\udfff]{1,200}")
TENANT_NAME = re.compile(r"[^\s|{}\ud800-\udfff]{1,200}")


@dataclass(frozen=True, slots=True)
class Adaptive:
    """Adaptation of a concurrency limit between `minimum` and its bound.

    by: `refusals`: the limit rises by one for each full round of successes while it is used up, and
    falls by one for each call that is dropped then. `latency`: times to first tokens, where known,
    decide instead of successes, so that few calls queue in a server that rejects none."""

    minimum: int = 1
    by: AdaptsBy = "refusals"


@dataclass(frozen=True, slots=True)
class Concurrency:
    """At most `bound` calls concurrently. In `shadow` it only counts what it would have delayed.

    unit: `calls`, or `tokens_in_flight`: the tokens of all calls in flight, such as those that a
    server's cache has room for. reserve: what a call takes until it ends: its input and its
    probable output (`predicted`), or its input and all output that it may have (`bound`)."""

    bound: int
    shadow: bool = False
    adaptive: Adaptive | None = None
    unit: UnitInFlight = "calls"
    reserve: Reserve = "predicted"

    @property
    def by_tokens(self) -> bool:
        """Whether a call takes its tokens instead of 1."""
        return self.unit == "tokens_in_flight"

    @property
    def by_latency(self) -> bool:
        """Whether times to first tokens decide how many calls it admits."""
        return self.adaptive is not None and self.adaptive.by == "latency"


@dataclass(frozen=True, slots=True)
class Weights:
    """How much one LLM token of each part of a call counts.

    `cached`: input that the provider read from its cache. `cache_write`: input that it wrote to
    one. `input`: the rest of the input."""

    input: float
    cached: float
    cache_write: float
    output: float


USUAL_WEIGHTS: Mapping[str, Weights] = {
    "tokens": Weights(1, 1, 1, 1),
    "input_tokens": Weights(1, 1, 1, 0),
    "uncached_input_tokens": Weights(1, 0, 1, 0),
    "output_tokens": Weights(0, 0, 0, 1),
}


@dataclass(frozen=True, slots=True)
class Ramp:
    """How fast use may grow.

    A window may take at most `start`, or the given percentage per minute more than it took before.
    Some providers reject a steeper rise even within the limits."""

    percent_per_minute: int
    start: int


class RateOptions(TypedDict, total=False):
    """The keywords of `Rate` except for its window."""

    unit: Unit
    slack_ms: int | None
    shadow: bool
    weights: Weights | None
    reserve: Reserve
    settles: bool
    pace_ms: int | None
    ramp: Ramp | None
    source: Source
    shape: RateShape


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `bound` of `unit` in any sliding window of arrivals, or a token bucket.

    slack_ms: how much later than admitted a call may arrive at the provider; the window is longer
    by it. By default 500 ms, or a twentieth of a window shorter than 10 s.
    weights: of the parts of a call, for a unit of tokens; `USUAL_WEIGHTS` by default.
    reserve: what a call takes at its admission. `predicted`: what it probably uses. `bound`: the
    most that it may use. `max_tokens`: its input and its bound on the output, each token of which
    counts once whatever its weight, or its probable use if that is more. `larger`: the larger of
    its input by characters and its bound on the output.
    settles: whether a call that used less returns the rest.
    pace_ms: smoothing: a burst takes at most what an even flow gives in this time, or one larger
    call; further calls wait until the flow has caught up. None: no smoothing.
    source: where it comes from: a person (`set`), a provider's API, or headers of its answers.
    shape: `window`, or `bucket`: at most `bound` in a burst, all of which refills evenly in a
    window; its use is what has not refilled yet."""

    bound: int
    window_ms: int
    unit: Unit = "requests"
    slack_ms: int | None = None
    shadow: bool = False
    weights: Weights | None = None
    reserve: Reserve = "predicted"
    settles: bool = True
    pace_ms: int | None = None
    ramp: Ramp | None = None
    source: Source = "set"
    shape: RateShape = "window"

    @classmethod
    def per_second(cls, bound: int, **options: Unpack[RateOptions]) -> Self:
        """Return a rate of at most `bound` in any second; the keywords are those of `Rate`."""
        return cls(bound, 1_000, **options)

    @classmethod
    def per_minute(cls, bound: int, **options: Unpack[RateOptions]) -> Self:
        """Return a rate of at most `bound` in any 60 s: `Rate.per_minute(60)`, or with
        `unit="tokens"`."""
        return cls(bound, 60_000, **options)

    @classmethod
    def per_hour(cls, bound: int, **options: Unpack[RateOptions]) -> Self:
        """Return a rate of at most `bound` in any 60 min."""
        return cls(bound, 3_600_000, **options)

    @classmethod
    def per_day(cls, bound: int, **options: Unpack[RateOptions]) -> Self:
        """Return a rate of at most `bound` in any 24 h; a `Quota` resets at midnight instead."""
        return cls(bound, 86_400_000, **options)

    @property
    def slack(self) -> int:
        if self.slack_ms is not None:
            return self.slack_ms
        return min(ARRIVAL_SLACK_MS, self.window_ms // 20)

    @property
    def buckets(self) -> int:
        """The number of parts in which a window is counted, unless each admission is logged."""
        return BUCKETS if self.shape == "bucket" else WINDOW_BUCKETS

    @property
    def exact(self) -> bool:
        """True if each admission is logged, False if the window is counted in buckets."""
        return self.shape == "window" and self.unit == "requests" and self.bound <= MAX_LOG


@dataclass(frozen=True, slots=True)
class Quota:
    """At most `bound` of `unit` per calendar day, which begins at midnight in `zone`.

    The other fields are as of a `Rate`."""

    bound: int
    unit: Unit = "requests"
    zone: str = "America/Los_Angeles"
    shadow: bool = False
    weights: Weights | None = None
    reserve: Reserve = "predicted"
    settles: bool = True
    source: Source = "set"


Limit = Concurrency | Rate | Quota


@dataclass(frozen=True, slots=True)
class Band:
    """A priority.

    min_share: the share of admissions, or of what a rate gives, that it gets while it waits,
    whatever waits above. headroom: the share of every concurrency limit that is kept free of the
    bands below."""

    name: str
    min_share: float = 0.0
    headroom: float = 0.0


DEFAULT_BANDS = (Band("high"), Band("normal", min_share=0.1), Band("low", min_share=0.05))
DEFAULT_PRIORITY = "normal"


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """The policy of a pool. The highest `revision` that any process brings is in force for all.

    limits: id (`name` or `scope:name`) -> a limit; a number n is `Concurrency(n)`. A bound of 0
        admits no call.
    weights: tenant -> its share against others, 1 to 1000; 1 for those not named.
    bands: priorities, highest first.
    queue_per_tenant: the most waiters of one tenant over all processes.
    lease_ms: how long a process may be silent before its permits are revoked.
    when_away: what happens to waiters if Valkey is unavailable for longer than the lease: `closed`
        admits no call, `local` lets each process use limit / last known sessions (rounded down,
        which may be 0).
    on_lost: what happens to running calls if Valkey is unavailable for longer than the lease.
    on_expiry: whether the permits of a dead or paused process are reused when its lease is over,
        or held until the hard deadline of its calls.
    reap_closed_ms: revoke a process's permits this soon after its connection closed, without
        waiting for the lease; 0 never does. Safe only without network partitions.
    hand_off: whether a process may pass a freed permit to its own next waiter if that one is
        among the next in the pool's order; off makes the order of waiters exact.
    fair_by: the measure of tenants' shares: time of use of permits, admitted calls, or cost.
    Raises ConfigError for a value that is out of range."""

    limits: Mapping[str, int | Limit]
    lease_ms: int = 3000
    when_away: WhenAway = "closed"
    on_lost: OnLost = "finish"
    on_expiry: OnExpiry = "reuse"
    revision: int = 1
    weights: Mapping[str, int] = field(default_factory=dict)
    bands: tuple[Band, ...] = DEFAULT_BANDS
    queue_per_tenant: int = 100_000
    reap_closed_ms: int = 0
    hand_off: bool = True
    fair_by: FairBy = "seconds"
    # `limits` with numbers converted to limits.
    rules: Mapping[str, Limit] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rules = {name: as_limit(limit) for name, limit in self.limits.items()}
        object.__setattr__(self, "rules", rules)
        for name, limit in rules.items():
            if not isinstance(name, str) or not _LIMIT_ID.fullmatch(name):
                allowed = (
                    "a limit's id is `name` or `scope:name`, each name of 1 to 200 characters, "
                )
                allowed += "without spaces, | { or }"
                raise ConfigError("limit", str(name), allowed)
            _check_limit(name, limit)
        if not MIN_LEASE_MS <= self.lease_ms <= MAX_LEASE_MS:
            allowed = f"{MIN_LEASE_MS} to {MAX_LEASE_MS} ms"
            raise ConfigError("lease_ms", str(self.lease_ms), allowed)
        _check_whole("revision", self.revision, 1, MAX_REVISION)
        for tenant, weight in self.weights.items():
            check_tenant(tenant)
            _check_whole(f"weights.{tenant}", weight, 1, 1000)
        _check_whole("queue_per_tenant", self.queue_per_tenant, 1, 10_000_000)
        _check_whole("reap_closed_ms", self.reap_closed_ms, 0, MAX_LEASE_MS)
        _check_bands(self.bands)
        _check_among("when_away", self.when_away, get_args(WhenAway))
        _check_among("on_lost", self.on_lost, get_args(OnLost))
        _check_among("on_expiry", self.on_expiry, get_args(OnExpiry))
        _check_among("fair_by", self.fair_by, MEASURES_OF_SHARES)

    def limit(self, name: str) -> Limit | None:
        """Return the limit with that id, or None."""
        return self.rules.get(name)

    def binding(self, name: str) -> Limit | None:
        """Return the limit with that id, or an implicit one, or None."""
        return self.rules.get(name) or implicit_limit(name)

    def bound(self, name: str) -> int:
        """Return the bound of a limit; 0 if there is none."""
        found = self.rules.get(name)
        return 0 if found is None else found.bound

    def bound_in_force(self, name: str) -> int:
        """Return the bound of a limit, explicit or implicit; 0 if there is none."""
        limit = self.binding(name)
        return 0 if limit is None else limit.bound

    def band(self, priority: str) -> int:
        """Return the number of a band, 0 for the highest. Raises ConfigError for an unknown one."""
        for number, band in enumerate(self.bands):
            if band.name == priority:
                return number
        names = ", ".join(band.name for band in self.bands)
        raise ConfigError("priority", priority, f"one of {names}")

    def pack(self) -> bytes:
        """Return the policy as bytes, which are equal for equal policies."""
        fields: list[Any] = [
            self.revision,
            self.lease_ms,
            self.when_away,
            self.on_lost,
            self.on_expiry,
            sorted((name, _pack_limit(limit)) for name, limit in self.rules.items()),
            sorted(self.weights.items()),
            [(band.name, band.min_share, band.headroom) for band in self.bands],
            self.queue_per_tenant,
            self.reap_closed_ms,
            self.hand_off,
            self.fair_by,
        ]
        return cast(bytes, msgpack.packb(fields))

    @classmethod
    def unpack(cls, blob: bytes) -> PoolPolicy:
        """Return the packed policy. Fields that a later version added are ignored."""
        revision, lease_ms, when_away, on_lost, on_expiry, limits, *rest = msgpack.unpackb(blob)
        weights, bands, queue_per_tenant, reap_closed_ms, hand_off, *more = rest
        return cls(
            limits={name: _unpack_limit(packed) for name, packed in limits},
            lease_ms=lease_ms,
            when_away=when_away,
            on_lost=on_lost,
            on_expiry=on_expiry,
            revision=revision,
            weights=dict(weights),
            bands=tuple(Band(*band[:3]) for band in bands),
            queue_per_tenant=queue_per_tenant,
            reap_closed_ms=reap_closed_ms,
            hand_off=hand_off,
            fair_by=more[0] if more else "seconds",
        )


def as_policy(policy: PoolPolicy | Mapping[str, int | Limit]) -> PoolPolicy:
    """Return a policy; a mapping is one of these limits. Raises TypeError for anything else."""
    if isinstance(policy, PoolPolicy):
        return policy
    if not isinstance(policy, Mapping):
        raise TypeError(f"a policy is a PoolPolicy or a mapping of limits, not {policy!r}")
    return PoolPolicy(policy)


def as_limit(limit: int | Limit) -> Limit:
    """Return a limit; a number is a concurrency limit."""
    return Concurrency(limit) if isinstance(limit, int) else limit


@lru_cache(maxsize=1_000)
def implicit_limit(name: str) -> Concurrency | None:
    """Return the unbounded limit of an implicit scope; None if the policy must name the limit."""
    implicit = name.startswith(IMPLICIT_SCOPES) and _LIMIT_ID.fullmatch(name) is not None
    return _UNBOUNDED if implicit else None


_UNBOUNDED = Concurrency(MAX_BOUND)


def check_name(kind: str, name: str) -> None:
    """Raise ConfigError for a name that a tenant, or a pool, can't have."""
    if not isinstance(name, str) or not TENANT_NAME.fullmatch(name):
        printable = name if isinstance(name, str) and name.isprintable() else ascii(name)
        raise ConfigError(kind, printable, "1 to 200 characters without spaces, | { or }")


check_tenant = partial(check_name, "tenant")


def share_of(bound: int, sessions: int) -> int:
    """Return what each of `sessions` processes may use alone; rounded down, so the sum fits."""
    return bound // sessions if sessions > 0 else 0


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(name, str(value), f"a whole number from {least} to {most}")


def _check_among(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ConfigError(name, str(value), f"one of {', '.join(options)}")


def _check_limit(name: str, limit: Limit) -> None:
    if not isinstance(limit, Concurrency | Rate | Quota):
        raise ConfigError(name, str(limit), "a number, Concurrency, Rate or Quota")
    _check_whole(name, limit.bound, 0, MAX_BOUND)
    if isinstance(limit, Concurrency):
        _check_concurrency(name, limit)
        return
    _check_among(f"{name}.unit", limit.unit, UNITS)
    _check_counting(name, limit)
    if isinstance(limit, Rate):
        _check_whole(f"{name}.window_ms", limit.window_ms, 100, 86_400_000)
        _check_whole(f"{name}.slack_ms", limit.slack, 0, limit.window_ms)
        _check_among(f"{name}.shape", limit.shape, SHAPES_OF_RATES)
        if limit.pace_ms is not None:
            _check_whole(f"{name}.pace_ms", limit.pace_ms, 1, limit.window_ms)
        if limit.ramp is not None:
            percent = limit.ramp.percent_per_minute
            _check_whole(f"{name}.ramp.percent_per_minute", percent, 1, 10_000)
            _check_whole(f"{name}.ramp.start", limit.ramp.start, 1, MAX_BOUND)
        return
    try:
        ZoneInfo(limit.zone)
    except (ZoneInfoNotFoundError, ValueError):
        message = "the name of a time zone, such as America/Los_Angeles"
        raise ConfigError(f"{name}.zone", limit.zone, message) from None


def _check_concurrency(name: str, limit: Concurrency) -> None:
    _check_among(f"{name}.unit", limit.unit, UNITS_IN_FLIGHT)
    reserves = RESERVES_IN_FLIGHT if limit.by_tokens else RESERVES_IN_FLIGHT[:1]
    _check_among(f"{name}.reserve", limit.reserve, reserves)
    if limit.adaptive is None:
        return
    if limit.by_tokens:
        raise ConfigError(f"{name}.adaptive", limit.unit, "only for a limit that counts calls")
    _check_among(f"{name}.adaptive.by", limit.adaptive.by, ADAPTS_BY)
    _check_whole(f"{name}.adaptive.minimum", limit.adaptive.minimum, 1, max(1, limit.bound))


def _check_counting(name: str, limit: Rate | Quota) -> None:
    _check_among(f"{name}.reserve", limit.reserve, RESERVES)
    _check_among(f"{name}.source", limit.source, SOURCES)
    if limit.weights is None:
        return
    if limit.unit not in USUAL_WEIGHTS:
        allowed = f"only for a limit that counts one of {', '.join(USUAL_WEIGHTS)}"
        raise ConfigError(f"{name}.weights", limit.unit, allowed)
    for part in fields(Weights):
        weight = getattr(limit.weights, part.name)
        sound = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not sound or not 0 <= weight <= MOST_WEIGHT:
            allowed = f"a number from 0 to {MOST_WEIGHT:g}"
            raise ConfigError(f"{name}.weights.{part.name}", str(weight), allowed)


def _check_bands(bands: tuple[Band, ...]) -> None:
    names = [band.name for band in bands]
    if not 1 <= len(names) <= 8 or len(set(names)) != len(names):
        raise ConfigError("bands", ", ".join(names), "1 to 8 bands of different names")
    for band in bands:
        for name, share in (("min_share", band.min_share), ("headroom", band.headroom)):
            if not 0 <= share <= 0.9:
                raise ConfigError(f"bands.{band.name}.{name}", str(share), "a number from 0 to 0.9")
    if sum(band.min_share for band in bands) > 0.9 or sum(band.headroom for band in bands) > 0.9:
        raise ConfigError("bands", ", ".join(names), "all shares together at most 0.9")


def _pack_limit(limit: Limit) -> list[Any]:
    if isinstance(limit, Concurrency):
        least = limit.adaptive.minimum if limit.adaptive else 0
        own = ["c", limit.bound, limit.shadow, least]
        extra: list[str] = [limit.unit, limit.reserve]
        extra += [limit.adaptive.by] if limit.adaptive and limit.by_latency else []
        return own if extra == ["calls", "predicted"] else [*own, *extra]
    # Usual values are left out, so that the bytes equal those of earlier versions.
    usual = limit.weights is None or limit.weights == USUAL_WEIGHTS[limit.unit]
    weights = None if usual else astuple(cast(Weights, limit.weights))
    counting = [weights, limit.reserve, limit.settles]
    more = [] if counting == [None, "predicted", True] else counting
    if isinstance(limit, Rate):
        own = ["r", limit.bound, limit.shadow, limit.window_ms, limit.unit, limit.slack_ms]
        is_window = limit.shape == "window"
        if is_window and limit.pace_ms is None and limit.ramp is None and limit.source == "set":
            return [*own, *more]
        ramp = None if limit.ramp is None else astuple(limit.ramp)
        paced = [*own, *counting, limit.pace_ms, ramp]
        if not is_window:
            return [*paced, limit.source, limit.shape]
        return paced if limit.source == "set" else [*paced, limit.source]
    own = ["q", limit.bound, limit.shadow, limit.unit, limit.zone]
    return [*own, *more] if limit.source == "set" else [*own, *counting, limit.source]


def _unpack_limit(packed: list[Any]) -> int | Limit:
    sort, bound, shadow, *rest = packed
    if sort == "c" and not shadow and rest == [0]:
        return int(bound)
    if sort == "c":
        least, *counting = rest
        adaptive = Adaptive(least, *counting[2:3]) if least else None
        return Concurrency(bound, shadow, adaptive, *counting[:2])
    if sort == "r":
        window_ms, unit, slack_ms, *more = rest
        pace_ms, ramp, source, shape, *_ = [*more[3:], None, None, None, None]
        return Rate(
            bound,
            window_ms,
            unit,
            slack_ms,
            shadow,
            **_unpack_counting(more),
            pace_ms=pace_ms,
            ramp=None if ramp is None else Ramp(*ramp),
            source=source or "set",
            shape=shape or "window",
        )
    unit, zone, *more = rest
    (source, *_) = [*more[3:], "set"]
    return Quota(bound, unit, zone, shadow, **_unpack_counting(more), source=source)


def _unpack_counting(packed: list[Any]) -> dict[str, Any]:
    if not packed:
        return {}
    weights, reserve, settles, *_ = packed
    found = None if weights is None else Weights(*weights)
    return {"weights": found, "reserve": reserve, "settles": settles}


def next_midnight_ms(zone: str, now_ms: float) -> int:
    """Return the next midnight in a time zone, in ms since 1970."""
    local = datetime.fromtimestamp(now_ms / 1000, UTC).astimezone(ZoneInfo(zone))
    day = (local + timedelta(days=1)).date()
    midnight = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone))
    return int(midnight.timestamp() * 1000)


# How many limits an error about an unknown one names.
_KNOWN_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of a call: an estimate before it, or its usage.

    Parts of the input: `cached`, which the provider read from its cache, and `cache_write`, which
    it wrote to one."""

    input: int = 0
    output: int = 0
    cached: int = 0
    cache_write: int = 0

    @property
    def total(self) -> int:
        return self.input + self.output


def tokens_of(tokens: int | Tokens) -> Tokens:
    """Return tokens; a number is a total of unknown parts and counts as input.

    Raises TypeError for numbers that are not whole."""
    if not isinstance(tokens, Tokens):
        return Tokens(whole("tokens", tokens))
    for amount in (tokens.input, tokens.output, tokens.cached, tokens.cache_write):
        whole("tokens", amount)
    return tokens


def whole_ms(name: str, amount: float) -> int:
    """Return a time in whole ms, rounded up and at most FOR_EVER_MS.

    Raises TypeError for anything but a number, and ValueError for NaN: a single time that the
    server cannot read would block all calls of the process."""
    if not isinstance(amount, int | float):
        raise TypeError(f"{name} is a number of milliseconds, not {amount!r}")
    if amount != amount:
        raise ValueError(f"{name} is a number of milliseconds, not {amount!r}")
    return ceil(max(-FOR_EVER_MS, min(amount, FOR_EVER_MS)))


def whole(unit: str, amount: int) -> int:
    """Return a whole number. Raises TypeError for anything else, which the server could not
    count."""
    try:
        return index(amount)
    except TypeError:
        raise TypeError(f"{unit} are counted in whole numbers, not {amount!r}") from None


@dataclass(slots=True, unsafe_hash=True)  # not frozen, since frozen instances are slower to make
class CallUse:
    """What a call used or may use; None where unknown.

    `first_ms`: the time to the first token of its answer."""

    tokens: Tokens | None = None
    images: int | None = None
    audio_seconds: int | None = None
    cost_micros: int | None = None
    first_ms: float | None = None


def call_use(
    tokens: int | Tokens | None,
    images: int | None,
    audio_seconds: int | None,
    cost_micros: int | None,
    first_ms: float | None = None,
) -> CallUse:
    """Return what a call used. Raises TypeError or ValueError for what the server could not count.

    An error on the release of the permit would come too late, since the permit would stay held."""
    counted = None if tokens is None else tokens_of(tokens)
    counts = (("images", images), ("audio_seconds", audio_seconds), ("cost_micros", cost_micros))
    for unit, amount in counts:
        if amount is not None:
            whole(unit, amount)
    if first_ms is not None and not isfinite(first_ms):
        raise ValueError(f"first_ms is a number of ms, not {first_ms!r}")
    return CallUse(counted, images, audio_seconds, cost_micros, first_ms)


NOTHING = CallUse(Tokens(), 0, 0, 0)


def amount_of(limit: Rate | Quota, amounts: CallUse | Demand) -> int | None:
    """Return how much of what a limit counts a call takes or used; None if unknown."""
    unit = limit.unit
    if unit == "requests":
        return 1
    if unit == "images":
        return amounts.images
    if unit == "audio_seconds":
        return amounts.audio_seconds
    if unit == "usd":
        return amounts.cost_micros
    tokens = amounts.tokens
    return None if tokens is None else _tokens_counted(limit, tokens)


def use_by_cost(use: CallUse | Demand) -> int | None:
    """Return a call's use, if shares are measured in cost, in micro-dollars; None if unknown.

    A call without a price, or with a price of 0, counts its tokens at $1 per million."""
    tokens = use.tokens.total if use.tokens is not None else 0
    known = use.cost_micros or tokens
    if not known and (use.cost_micros is None or isinstance(use, Demand)):
        return None
    return round(min(max(known, LEAST_USE), MOST_USE))


def amount_in_flight(limit: Concurrency, demand: Demand) -> int | None:
    """Return how much a call takes of a concurrency limit until it ends; None if unknown."""
    if not limit.by_tokens:
        return 1
    if demand.tokens is None:
        return None
    amount = max(1, demand.tokens.total)
    if limit.reserve == "predicted" or demand.most is None:
        return amount
    return max(amount, demand.most.total)


def amount_to_reserve(limit: Rate | Quota, demand: Demand) -> int | None:
    """Return how much a call takes of a limit at its admission; None if unknown."""
    amount = amount_of(limit, demand)
    if limit.reserve == "predicted" or amount is None or limit.unit not in USUAL_WEIGHTS:
        return amount
    if limit.reserve == "larger":
        return amount if demand.larger_tokens is None else demand.larger_tokens
    if demand.most is None:
        return amount
    most = demand.most
    if limit.reserve == "max_tokens":
        input_only = Tokens(most.input, 0, most.cached, most.cache_write)
        return max(amount, _tokens_counted(limit, input_only) + most.output)
    return max(amount, _tokens_counted(limit, most))


def concerns(limit: Limit | None, amount: int | None) -> bool:
    """Return whether a call waits for a limit at all of which it takes `amount`: one that takes
    nothing of a rate does not, not even while the rate is paused."""
    return amount != 0 or not isinstance(limit, Rate | Quota)


def is_taken(limit: Limit | None, demand: Demand) -> bool:
    """Return whether a call with this demand waits for a limit at all; see `concerns`."""
    return not isinstance(limit, Rate | Quota) or concerns(limit, amount_to_reserve(limit, demand))


def _tokens_counted(limit: Rate | Quota, tokens: Tokens) -> int:
    weights = limit.weights
    if weights is None:
        if limit.unit == "tokens":
            return tokens.input + tokens.output
        if limit.unit == "output_tokens":
            return tokens.output
        return tokens.input - (tokens.cached if limit.unit == "uncached_input_tokens" else 0)
    plain = tokens.input - tokens.cached - tokens.cache_write
    counted = plain * weights.input + tokens.output * weights.output
    counted += tokens.cached * weights.cached + tokens.cache_write * weights.cache_write
    return ceil(counted)


def unknown_limit(name: str, policy: PoolPolicy, pool: str = "") -> str:
    """Return the message about a demand for a limit that is not in the policy."""
    known = sorted(policy.limits)
    more = f" and {len(known) - _KNOWN_SHOWN} more" if len(known) > _KNOWN_SHOWN else ""
    names = ", ".join(known[:_KNOWN_SHOWN]) + more
    where = f" of pool {pool!r}" if pool else ""
    return f"limit {name!r} is not in the policy{where} (known: {names})"


# Not frozen, unlike similar classes: one is created per call, and frozen ones cost more.
@dataclass(slots=True)
class Demand:
    """A request for permits of all `limits` together. Never changed.

    tenant: whose share the call counts in. priority: the name of a band, None for the usual one.
    tokens, images, audio_seconds, cost_micros: an estimate, for limits that count them. most,
    larger_tokens: for limits with such a `reserve`. deadline_ms: how long the call may wait, None
    without bound. Among its tenant's calls of a band the earliest deadline comes first, unless
    `has_usual_deadline`: then it is a default, not the caller's own. hard_ms: the longest that the
    call can last. once: take the first answer as final. by_estimate: also reject the call before
    its deadline if an estimate says by a clear margin that it would not be admitted in time;
    otherwise only if that is certain. implicit: allow limits of implicit scopes that the policy
    does not name; without this, so that a misspelt name is not an unbounded limit."""

    limits: tuple[str, ...]
    tenant: str = "default"
    priority: str | None = None
    tokens: Tokens | None = None
    images: int = 0
    deadline_ms: int | None = None
    hard_ms: int = DEFAULT_HARD_MS
    once: bool = False
    implicit: bool = False
    audio_seconds: int = 0
    cost_micros: int | None = None
    most: Tokens | None = None
    larger_tokens: int | None = None
    by_estimate: bool = False
    has_usual_deadline: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """A policy that was in force, one of the last hundred. `at_ms` since 1970."""

    revision: int
    at_ms: int
    by: str
    policy: PoolPolicy


def read_change(row: bytes) -> Change:
    """Return an entry of a pool's history."""
    revision, at_ms, by, blob = msgpack.unpackb(row, raw=True)[:4]
    return Change(revision, at_ms, by.decode(), PoolPolicy.unpack(blob))


OnConflict = Literal["raise", "replace", "keep"]


# Authors of a policy that a process brings when it joins: a program, which may replace its own
# policy; or a deployment that keeps what is in force, which no edit of a program's code replaces.
WRITTEN_BY, DEPLOYED_BY = "code", "deployment"

_SHOWN = 3

_FIELDS = (
    *("lease_ms", "when_away", "on_lost", "on_expiry"),
    *("bands", "queue_per_tenant", "reap_closed_ms", "hand_off", "fair_by"),
)


@dataclass(frozen=True, slots=True)
class WrittenPolicy:
    """The policy in a program's code, and what happens if it differs from the one in force."""

    pool: str
    policy: PoolPolicy
    on_conflict: OnConflict

    def is_in(self, policy: PoolPolicy) -> bool:
        """Return whether a policy has the same content, whatever its revision."""
        return _content(policy) == _content(self.policy)

    def among(self, history: Sequence[Change]) -> PoolPolicy:
        """Return the policy to join with.

        `history`: the policies that were in force, newest first. Raises PolicyConflict."""
        if not history or self.policy.revision > history[0].revision:
            return self.policy
        now = history[0]
        if self.is_in(now.policy):
            return replace(self.policy, revision=now.revision)
        was_in_force = any(self.is_in(change.policy) for change in history)
        if self.on_conflict == "raise" and (now.by != WRITTEN_BY or was_in_force):
            raise self._conflict(now)
        return replace(self.policy, revision=now.revision + 1)

    def _conflict(self, now: Change) -> PolicyConflict:
        differing = _differences(now.policy, self.policy)
        holds = [f"{name}={held}" for name, held, _ in differing]
        asks = [f"{name}={requested}" for name, _, requested in differing]
        whose = {WRITTEN_BY: "which replaced this policy", DEPLOYED_BY: "set by a deployment"}
        by = whose.get(now.by, f"set live by {now.by or 'a process'}")
        return PolicyConflict(
            f"pool {self.pool!r} holds {_list(holds)} (revision {now.revision}, {by}); this "
            f"process asks for {_list(asks)}: pass revision={now.revision + 1} in the policy or "
            "on_conflict='replace' to put it in force, or on_conflict='keep' to run under what "
            "is in force",
            pool=self.pool,
            limit=differing[0][0],
            in_force=differing[0][1],
            asked=differing[0][2],
        )


def _content(policy: PoolPolicy) -> bytes:
    return replace(policy, revision=1).pack()


def _differences(held: PoolPolicy, requested: PoolPolicy) -> list[tuple[str, str, str]]:
    """Return (name, value in force, requested value) for each limit, weight and field that
    differs."""
    before, after = _written_out(held), _written_out(requested)
    names = [*after, *(name for name in before if name not in after)]
    pairs = [(name, before.get(name, "none"), after.get(name, "none")) for name in names]
    return [(name, old, new) for name, old, new in pairs if old != new]


def _written_out(policy: PoolPolicy) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, written in policy.limits.items():
        limit = as_limit(written)
        plain = isinstance(limit, Concurrency) and limit == Concurrency(limit.bound)
        found[name] = str(limit.bound) if plain else repr(limit)
    found |= {f"weights.{tenant}": str(weight) for tenant, weight in policy.weights.items()}
    return found | {name: repr(getattr(policy, name)) for name in _FIELDS}


def _list(parts: list[str]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more
