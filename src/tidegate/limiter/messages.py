"""Messages between a process and its pool: requests, replies, keys, and the scripts' assembly.

Invariants: the fields of each type, in order, are those of the script's header; within a layout
fields are only added at the end and unknown ones are ignored, so that two versions work side by
side; all keys of a pool share one hash tag; a refusal names the limit that the call waits for and
the time at which it has room.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from hashlib import sha1
from importlib.resources import files
from itertools import chain
from typing import Any, Literal, NamedTuple, cast, get_args

import msgpack

from tidegate.errors import DeadlineExceeded, LimitPaused, LimitUsedUp
from tidegate.limiter.policy import (
    Band,
    Concurrency,
    Limit,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
)

_RESUMES = -2
_FOR_EVER_MS = 10 * 365 * 86_400_000
_WINDOWS = {1_000: "a second", 60_000: "a minute", 3_600_000: "an hour", 86_400_000: "in 24 h"}
_UNITS = {
    "input_tokens": "input tokens",
    "uncached_input_tokens": "uncached input tokens",
    "output_tokens": "output tokens",
    "audio_seconds": "seconds of audio",
    "tokens_in_flight": "tokens in flight",
}


class Barred(NamedTuple):
    """A ticket that could not be admitted before its deadline.

    room_ms: the time until `limit`, of which `used` is used, has room; `used` is -1 if it is
    paused, -2 if it resumes gradually after a pause. ahead: calls waiting there that come before
    it. is_estimate: it is uncertain whether
    they do, or how long they take.
    """

    ticket: int
    limit: str
    room_ms: int
    used: int
    ahead: int
    is_estimate: int


class Outlook(NamedTuple):
    """What `flow` waits for.

    room_ms: the time until there is room for its first ticket if nothing is returned, 0 if unknown.
    firm: there is certainly no room for any of its tickets before; 2 if that is as long as higher
    bands leave, so that it may take longer.
    """

    flow: int
    limit: str
    room_ms: int
    used: int
    firm: int


def too_early(
    name: str,
    limit: Limit | None,
    room_ms: float,
    used: int,
    amount: int = 1,
    *,
    ahead: int = 0,
    is_estimate: bool = False,
) -> DeadlineExceeded:
    """Return the error for a limit that has room only after the deadline.

    `used` is -1 if it is paused, -2 if it resumes after a pause. `ahead` calls come before.
    `is_estimate`: `room_ms` is uncertain.
    """
    after_ms = max(1, round(room_ms))
    before = "1 call comes" if ahead == 1 else f"{ahead} calls come"
    behind = f", and {before} before this one" if ahead else ""
    span, guess = format_span(after_ms), ""
    if is_estimate:
        span, guess = f"about {span}", ", which is an estimate"
    when = f"There is room in {span}{guess}."
    if used == _RESUMES:
        message = f"Limit {name} resumes gradually after a pause{behind}. {when}"
        resuming = LimitPaused(message, limit=name, retry_after_ms=after_ms)
        resuming.is_estimate = is_estimate
        return resuming
    if used < 0 or limit is None:
        return limit_paused(name, after_ms)
    if isinstance(limit, Concurrency) and not ahead:
        return limit_paused(name, after_ms)
    if isinstance(limit, Quota) and (not ahead or (ahead + 1) * amount <= limit.bound):
        when = f"It resets at 00:00 {limit.zone}, in {span}."
    daily = "Daily limit" if isinstance(limit, Quota) else "Limit"
    message = f"{daily} {name} {_fullness(limit, used, amount)}{behind}. {when}"
    error = LimitUsedUp(message, limit=name, retry_after_ms=after_ms)
    error.is_estimate = is_estimate
    return error


def _fullness(limit: Limit, used: int, amount: int) -> str:
    """Return text such as `is used up (60 of 60 requests a minute)`."""
    bound = limit.bound
    if isinstance(limit, Concurrency) and not limit.by_tokens:
        return f"is in use ({used} of {bound} calls)"
    most, spent = format_amount(limit, bound), _figure(limit, used)
    if used < bound:
        more = format_amount(limit, amount)
        more = more.removesuffix("s") if amount == 1 else more
        usage = f"({spent} of {_figure(limit, bound)} are used)"
        if isinstance(limit, Rate) and limit.pace_ms is not None and used + amount <= bound:
            return f"spreads what it admits evenly and has no room for {more} more now {usage}"
        return f"has no room for {more} more {usage}"
    window = f" {format_window(limit)}" if isinstance(limit, Rate) else ""
    return f"is used up ({spent} of {most}{window})"


def limit_paused(name: str, for_ms: int) -> LimitPaused:
    """Return the error for a limit that is paused for longer than a call may wait."""
    message = f"Limit {name} is paused {format_pause(for_ms)}, longer than this call may wait."
    known_ms = None if for_ms > _FOR_EVER_MS else for_ms
    return LimitPaused(message, limit=name, retry_after_ms=known_ms)


def too_late(
    name: str,
    limit: Limit | None,
    retry_ms: int,
    room_ms: float,
    used: int,
    amount: int,
    is_estimate: bool,
) -> DeadlineExceeded:
    """Return the error for a deadline that came while a call waited for a limit."""
    if room_ms >= 1:
        return too_early(name, limit, room_ms, used, amount, is_estimate=is_estimate)
    message = f"Limit {name} had no room for this call before its deadline."
    estimate = (
        f"Calls have waited about {format_span(retry_ms)} for it lately, which is an estimate."
    )
    error = DeadlineExceeded(f"{message} {estimate}", limit=name, retry_after_ms=retry_ms)
    error.is_estimate = True
    return error


def format_unit(limit: Limit) -> str:
    return _UNITS.get(limit.unit, limit.unit)


def format_amount(limit: Limit, amount: int) -> str:
    """Return text such as `200 requests` or `$0.79`."""
    if limit.unit == "usd":
        return _figure(limit, amount)
    return f"{amount} {format_unit(limit)}"


def _figure(limit: Limit, amount: int) -> str:
    if limit.unit != "usd":
        return str(amount)
    cents = f"{amount / 1_000_000:.2f}"
    return f"${cents if amount % 10_000 == 0 else f'{amount / 1_000_000:.6f}'.rstrip('0')}"


def format_window(limit: Limit) -> str:
    """Return text such as `a minute` or `in 90 s`; `at a time` without a window."""
    if isinstance(limit, Concurrency):
        return "at a time"
    if isinstance(limit, Quota):
        return "a day"
    return _WINDOWS.get(limit.window_ms, f"in {limit.window_ms / 1000:g} s")


def format_span(span_ms: float) -> str:
    """Return a duration as `850 ms`, `47 s`, `3 min 5 s`, `2 h 10 min` or `3 days`."""
    if span_ms < 1_000:
        return f"{round(span_ms)} ms"
    seconds = round(span_ms / 1000)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s" if seconds else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days"


def format_pause(left_ms: float) -> str:
    """Return `for 47 s more`, or `until it is resumed` for a pause without an end."""
    if left_ms > _FOR_EVER_MS:
        return "until it is resumed"
    return f"for {format_span(left_ms)} more"


# In order: processed; repeat by `tend`; the pool has another epoch; the session does not exist; a
# later batch overtook this one; a process of another layout uses the pool.
Status = Literal["ok", "tend", "epoch", "gone", "stale", "layout"]

# Added to an outcome if the usage is reported after the release.
USAGE_LATER = 10
OUTCOMES = {"success": 0, "ignored": 1, "dropped": 2}


def pack(value: object) -> bytes:
    """Return a value packed for Lua's cmsgpack, which has no `bin` type."""
    return cast(bytes, msgpack.packb(value, use_bin_type=False))


def definition(limit: int | Limit) -> str:
    """Return a limit as the scripts read it: sort|bound|shadow and three numbers.

    The numbers of a concurrency limit are its least bound, 1 if it counts tokens in flight, and 1
    if it adapts by latency; those of a rate its window, its slack and 1 if it is exact. A rate with
    a pace or a ramp, or a bucket, has three more: pace_ms, percent_per_minute and start, 0 for
    none. A bucket has a `b` after these.
    """
    if isinstance(limit, int):
        return f"c|{limit}|0|0|0|0"
    shadow = int(limit.shadow)
    if isinstance(limit, Concurrency):
        adaptive, by_tokens = limit.adaptive, limit.unit == "tokens_in_flight"
        least, by_latency = (adaptive.minimum, adaptive.by == "latency") if adaptive else (0, False)
        return f"c|{limit.bound}|{shadow}|{least}|{int(by_tokens)}|{int(by_latency)}"
    if isinstance(limit, Rate):
        exact = int(limit.exact)
        text = f"r|{limit.bound}|{shadow}|{limit.window_ms}|{limit.slack}|{exact}"
        if limit.pace_ms is None and limit.ramp is None and limit.shape == "window":
            return text
        ramp = limit.ramp or Ramp(0, 0)
        paced = f"{text}|{limit.pace_ms or 0}|{ramp.percent_per_minute}|{ramp.start}"
        return paced if limit.shape == "window" else f"{paced}|b"
    return f"q|{limit.bound}|{shadow}|0|0|0"


def band_shares(bands: tuple[Band, ...]) -> str:
    """Return per band, in thousandths: its least share, and what is kept free for higher bands."""
    parts, above = [], 0
    for band in bands:
        parts.append(f"{round(band.min_share * 1000)}:{above}")
        above += round(band.headroom * 1000)
    return ",".join(parts)


def lane_of(flow: str) -> str:
    """Return the limits of a flow as one string."""
    return flow.split("|", 2)[2]


@dataclass(frozen=True, slots=True)
class Join:
    """What a process reports when it joins a pool, for the first time or again.

    policy: the newest policy that it knows; by: its author. name: the process, for people. held:
    (ticket, flow, seq, hard_ms, use, amounts, 1 if this request releases it) of every call.
    lapsing: (member, left_ms, charges) of permits held over for dead sessions, as last seen. spent:
    (limit, amount as last seen, the last sequence that it includes or 0, what was admitted here
    since: sequence or 0, and amount, alternating). pauses: (limit, left_ms, ramp_ms, reason).
    roster: the sessions of the pool, if this process can vouch for them. own: (limit, amount that
    still counts, total) of what its local share has admitted, as far as no join reported it; the
    total is that of all time. base: the policy that was in force before, if known.
    """

    policy: PoolPolicy
    by: str
    name: str
    held: list[tuple[int, int, int, int, int, str, int]]
    lapsing: list[tuple[str, int, str]]
    spent: list[tuple[str, int, int, list[int]]] = field(default_factory=list)
    pauses: list[tuple[str, int, int, str]] = field(default_factory=list)
    roster: list[str] = field(default_factory=list)
    own: list[tuple[str, int, int]] = field(default_factory=list)
    base: PoolPolicy | None = None

    def as_fields(self) -> dict[str, Any]:
        blob = self.policy.pack()
        policy = {
            "revision": self.policy.revision,
            # Packed on their own: only a server without this revision unpacks them.
            "limits": _flat(self.policy.rules),
            "weights": pack(dict(self.policy.weights)),
            "digest": _digest(blob),
            "base": _digest(self.base.pack()) if self.base else "",
            "changes": _changes(self.base, self.policy) if self.base else b"",
            "bands": band_shares(self.policy.bands),
            "queue_max": self.policy.queue_per_tenant,
            "lease_ms": self.policy.lease_ms,
            "hold": self.policy.on_expiry == "hold",
            "hand_off": self.policy.hand_off,
            "fair_by": self.policy.fair_by,
            "by_tokens": _by_tokens(self.policy),
            "reap_ms": self.policy.reap_closed_ms,
            "by": self.by,
            "blob": blob,
        }
        return {
            "policy": policy,
            "name": self.name,
            "held": self.held,
            "lapsing": self.lapsing,
            "spent": self.spent,
            "pauses": self.pauses,
            "roster": self.roster,
            "own": self.own,
        }


def _by_tokens(policy: PoolPolicy) -> str:
    """Return the limits that count tokens in flight, with a space after each."""
    limits = policy.rules.items()
    names = sorted(name for name, one in limits if one.unit == "tokens_in_flight")
    return "".join(f"{name} " for name in names)


def _digest(blob: bytes) -> str:
    return sha1(blob, usedforsecurity=False).hexdigest()


def _flat(limits: Mapping[str, int | Limit]) -> bytes:
    """Return fields of the record and definitions, alternating."""
    fields = ((f"d:{name}", definition(limit)) for name, limit in limits.items())
    return cast(bytes, msgpack.packb(list(chain.from_iterable(fields)), use_bin_type=False))


def _changes(base: PoolPolicy, policy: PoolPolicy) -> bytes:
    """Return the limits and weights that differ from `base`; False for those removed."""
    limits: dict[str, str | Literal[False]] = {
        n: False for n in base.rules if n not in policy.rules
    }
    for name, limit in policy.rules.items():
        if base.rules.get(name) != limit:
            limits[name] = definition(limit)
    weights: dict[str, int | Literal[False]] = {
        n: False for n in base.weights if n not in policy.weights
    }
    weights |= {n: of for n, of in policy.weights.items() if base.weights.get(n) != of}
    return pack({"limits": limits, "weights": weights})


@dataclass(frozen=True, slots=True)
class Renewal:
    """Request of `renew`."""

    sid: str
    gen: int
    epoch: int
    run: str

    def pack(self) -> bytes:
        return pack(asdict(self))


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Request of `sync` and `tend`. The comments of the Lua fragments describe the order of
    entries.

    `flows` contains the flows that entries refer to by number, from 1; 0 is none.

    transfers: from, to, seq, hard_ms, flow, member, outcome, took_ms. releases: ticket, flow,
    outcome, took_ms, actual amounts. settles: ticket, actual amounts. cancels: ticket, flow,
    member. enqueues: flow, member. wants: flow, cost_ms, use. A member is
    ticket|hard_ms|use|amounts. looks: flows under whose limits a call might be admitted.
    told, pages: which parts of `Whole` were read before. asks: tickets that may have been admitted.
    lefts: ms that each enqueue may wait, 0 if unknown, negative if no estimate may refuse it
    before. firm: limits of which nothing is returned. uses: ticket, micro-dollars, of ended calls
    of known cost, if shares are in cost. dues: ms to the deadline that puts each enqueue before
    others of its tenant, 0 for none. firsts: ticket, ms to the first token, tokens that had to be
    read for it, of ended calls under a limit that adapts by latency. stamps: the stamp that each
    enqueue had before its session joined again, 0 for a new one.

    `use` is in the measure of shares: ms, micro-dollars, or CALL_USE.
    """

    sid: str
    gen: int
    epoch: int
    run: str
    uptime_ms: int
    lease_ms: int
    revision: int
    batch: int
    ack: int = 0
    roster: int = 0
    full: bool = False
    leave: bool = False
    flows: list[str] = field(default_factory=list)
    wants: list[tuple[int, int, int]] = field(default_factory=list)
    resets: dict[str, int] = field(default_factory=dict)
    join: Join | None = None
    transfers: list[tuple[int, int, int, int, int, str, int, int]] = field(default_factory=list)
    releases: list[tuple[int, int, int, int, str]] = field(default_factory=list)
    settles: list[tuple[int, str]] = field(default_factory=list)
    cancels: list[tuple[int, int, str]] = field(default_factory=list)
    enqueues: list[tuple[int, str]] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)
    told: int = 0
    pages: dict[str, tuple[str, int]] = field(default_factory=dict)
    asks: list[int] = field(default_factory=list)
    lefts: list[int] = field(default_factory=list)
    firm: list[str] = field(default_factory=list)
    uses: list[tuple[int, int]] = field(default_factory=list)
    dues: list[int] = field(default_factory=list)
    firsts: list[tuple[int, int, int]] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)


class Whole(NamedTuple):
    """The additional reply to a `full` request.

    held: (ticket, seq, end of the hard limit by the server's clock) of tickets asked after.
    lapsing: (member, left_ms, charges). spent: (limit, amount), of changes after the request's
    `told` up to this `told`. pauses: (limit, left_ms, ramp_ms, reason). policy: None if the process
    has the one in force. roster: the version of the list of sessions, and the list if the process
    does not have it. pages: where incomplete lists continue. seq: the last sequence number of an
    admission, which `spent` includes.
    """

    now_ms: int
    held: list[tuple[int, int, int]]
    lapsing: list[tuple[str, int, str]]
    next_event_ms: int
    conflict: int
    spent: list[tuple[str, int]]
    pauses: list[tuple[str, int, int, str]]
    policy: bytes | None
    roster: tuple[int, list[str] | None]
    told: int = 0
    pages: Mapping[str, tuple[str, int]] = {}
    seq: int = 0


class Hint(NamedTuple):
    """A permission to admit waiters of `flow` up to the stamp `horizon` by permits freed here.

    A waiter of stamp s has the virtual start `tag + (s - head) * step`.
    """

    flow: int
    horizon: int
    tag: int
    head: int
    step: int


class SyncReply(NamedTuple):
    """Reply of `sync` and `tend`.

    stamps: of the enqueues, 0 for those admitted or refused. timed_ms: time until something may be
    admitted that only time frees, 0 for never.
    """

    status: Status
    epoch: int
    gen: int
    lease_ms: int
    recovering_ms: int
    revision: int
    sessions: int
    sent: int
    more: int
    parked: int
    timed_ms: int
    grants: list[tuple[int, int]]
    stamps: list[float]
    refused: list[int]
    hints: list[Hint]
    whole: Whole | None
    barred: list[Barred]
    outlook: list[Outlook]


class RenewReply(NamedTuple):
    """Reply of `renew`."""

    status: Status
    epoch: int
    lease_ms: int
    recovering_ms: int
    revision: int

    @classmethod
    def unpack(cls, raw: bytes) -> RenewReply:
        return cls(*msgpack.unpackb(raw)[:5])


class Push(NamedTuple):
    """A message on a session's channel.

    sent: the number of grants pushed to the session up to this message. at_ms: the server's time.
    """

    epoch: int
    gen: int
    sent: int
    grants: list[tuple[int, int]]
    at_ms: int

    @classmethod
    def unpack(cls, raw: bytes) -> Push:
        epoch, gen, sent, grants, at_ms, *_ = msgpack.unpackb(raw)
        return cls(epoch, gen, sent, [row[:2] for row in grants], at_ms)


class InspectReply(NamedTuple):
    """Reply of `inspect`, a part of the pool; the script's header describes the rows of the lists.

    place: where the next part begins, None after the last.
    """

    now_ms: int
    epoch: int
    recovering_ms: int
    revision: int
    parked: int
    seq: int
    sessions: list[Any]
    limits: list[Any]
    tenants: list[Any]
    permits: list[Any]
    queues: list[Any]
    counts: list[Any]
    place: tuple[int, str, str] | None

    @classmethod
    def unpack(cls, raw: bytes) -> InspectReply:
        values = msgpack.unpackb(raw)
        lists = (list(value or ()) for value in values[6:12])
        return cls._make([*values[:6], *lists, tuple(values[12]) if values[12] else None])


LAYOUT = 2


@dataclass(frozen=True, slots=True)
class KeyShape:
    """One kind of key. `ttl` says how long it lives, or why it does not expire."""

    name: str
    type: Literal["string", "hash", "zset", "list"]
    fields: str
    ttl: str
    expires: bool


POOL_KEEP = "1 h after the last sync of anybody"
SESSION_KEEP = "2 h after its session's last sync; gone with the session"

SHAPES = (
    KeyShape("meta", "hash",
             "run epoch began recover_until clock seq changes revision lease_ms hold bands "
             "queue_max hand_off fair_by by_tokens reap_ms policy parked timed_at starving reap_at "
             "sessions roster fresh empty vouched kept; per limit d: definition, u: used, "
             "w: waits:virtual time:credit of each band, and under a rate from:passed in "
             "microseconds, between which it accrues its share, and held:used in ms, when it "
             "last found no room and last used the limit, and taken:before, how much in that "
             "window of the clock and the one before; p: pause, g: gate, a: adapted, and by "
             "latency what `latency` has seen, "
             "x: shadowed, e: how long calls take, b: usage as asserted in this epoch, f: even "
             "in microseconds|level|since of a pace and a ramp, k: units|ends|window|bound|before|"
             "until of a rate that refills, s: usage as of its last change, "
             "which are numbered by `changes`; per tenant t: weight, "
             "n: waiting|last stamp while it waits, and |band=ms of its last deadlines",
             "none: the record of the pool, with its policy", False),
    KeyShape("layout", "string", "the layout's number", "none: guards `meta`", False),
    KeyShape("history", "list", "the last policies: revision, ms, who, blob",
             "none: the changes with their authors, 100 at most", False),
    KeyShape("sessions", "zset", "session by expiry in ms", POOL_KEEP, True),
    KeyShape("lapsing", "zset", "ticket|session|lane by hard deadline in ms",
             "1 h after the last hard deadline in it", True),
    KeyShape("carried", "hash", "charges of a permit, by its member in `lapsing`",
             "as `lapsing`", True),
    KeyShape("timed", "zset", "limit by the ms at which it has room again", POOL_KEEP, True),
    KeyShape("spending", "zset", "limit by the number of the last change of its usage",
             "none: as `meta`, whose s: fields it puts in order", False),
    KeyShape("restored", "hash", "per limit: what sessions reported of its usage after a loss: "
             "epoch|seq|usage up to it|seq=amount of admissions after it|session=amount of those "
             "without a seq", POOL_KEEP, True),
    KeyShape("local", "hash", "per session: each limit, and the total of what its process has "
             "admitted of it by its local share, as last reported", POOL_KEEP, True),
    KeyShape("paused", "zset", "limit by the ms at which its pause and ramp are over",
             "none: as `meta`, whose p: fields it puts in order", False),
    KeyShape("starving", "zset", "session|flow that moved too often, by sequence",
             POOL_KEEP, True),
    KeyShape("seen", "zset", "session by the version of the roster that it knows", POOL_KEEP, True),
    KeyShape("fresh", "zset", "session that not all others know yet by its probation's end in ms",
             POOL_KEEP, True),
    KeyShape("expected", "zset", "session that is expected after an empty restart", POOL_KEEP,
             True),
    KeyShape("park:", "zset", "per limit|band: waiting tenant by start tag", SESSION_KEEP, True),
    KeyShape("line:", "zset", "per limit|band|tenant: session|flow by its first ticket's stamp",
             SESSION_KEEP, True),
    KeyShape("order:", "zset", "per band|tenant with deadlines: stamp of a last ticket by the ms "
             "at which it is due", SESSION_KEEP, True),
    KeyShape("past:", "zset", "per limit|band: tenant without waiters by start tag", POOL_KEEP,
             True),
    KeyShape("log:", "list", "per limit: ms of each admission in the window", "the window", True),
    KeyShape("rate:", "hash", "per limit: amount by the end of its bucket in ms", "two windows",
             True),
    KeyShape("quota:", "hash", "per limit: used reset_at", "1 h after its reset", True),
    KeyShape("charged:", "hash", "per limit: amount that was charged beside its bound, by the end "
             "of the part of a window, or day, that it counts in",
             "two windows, or 1 h after the day", True),
    KeyShape("session:", "hash", "gen batch sent acked blocked name closed_at since revision; "
             "full: ms|rate at which its waiters keep their turn until it acknowledges; at:flow -> "
             "limit|bounces|stamp; h:ticket -> seq|hard deadline in ms|use|charges|flow",
             SESSION_KEEP, True),
    KeyShape("stalled:", "zset", "per session: its session|flow whose session accepts no grants",
             SESSION_KEEP, True),
    KeyShape("progress:", "list", "per limit|band: ms|virtual time|cost_ms while calls wait",
             "1 min and two leases", True),
    KeyShape("note:", "string", "per session: its process's note for the others, as bytes",
             "seconds: it is sent repeatedly", True),
    KeyShape("claim:", "string", "per claimed name: the session that claimed it first",
             "seconds: as long as the claim holds", True),
    KeyShape("owed:", "hash", "ticket -> charges|lane, of calls whose usage is still to come",
             SESSION_KEEP, True),
    KeyShape("queue:", "zset", "per session|flow: ticket|hard_ms|use|amounts by stamp",
             SESSION_KEEP, True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Keyspace:
    """The key names of one pool."""

    pool: str

    @property
    def prefix(self) -> str:
        return f"tg:{LAYOUT}:{{{self.pool}}}:"

    @property
    def meta(self) -> str:
        return f"{self.prefix}meta"

    @property
    def layout(self) -> str:
        """The one key name that is the same in every layout."""
        return f"tg:{{{self.pool}}}:layout"

    def channel(self, sid: str) -> str:
        return f"{self.prefix}grants:{sid}"

    def shape_of(self, key: str) -> KeyShape | None:
        """Return the declared shape of a key of this pool, or None if it is not declared."""
        if key == self.layout:
            return next(shape for shape in SHAPES if shape.name == "layout")
        if not key.startswith(self.prefix):
            return None
        rest = key.removeprefix(self.prefix)
        for shape in SHAPES:
            if rest == shape.name or (shape.name.endswith(":") and rest.startswith(shape.name)):
                return shape
        return None


ScriptName = Literal["sync", "tend", "renew", "inspect", "position", "admin", "acl", "notes"]

# Releases must work when the server is out of memory, so that no permit leaks.
_FLAGS = "#!lua flags=allow-oom\n"

# Creating a function costs more than calling it, so functions that ordinary requests do not need
# are created when the first of them is used.
_LATER = """T.later = { %s }
setmetatable(T, { __index = function(_, name)
  while #T.later > 0 do
    table.remove(T.later, 1)()
    local found = rawget(T, name)
    if found ~= nil then return found end
  end
end })"""


@dataclass(frozen=True, slots=True)
class Script:
    """A script ready to be sent. `header` maps each word of the header to its text."""

    name: str
    source: bytes
    sha: str
    header: Mapping[str, str]


@cache
def fragment(name: str) -> str:
    """Return the text of a script in `lua/`, or of one of its parts in `lua/lib/`."""
    scripts = files(__package__).joinpath("lua")
    folder = scripts if name in get_args(ScriptName) else scripts.joinpath("lib")
    return folder.joinpath(f"{name}.lua").read_text(encoding="utf-8")


def read_header(source: str) -> dict[str, str]:
    """Return the `-- word: text` lines at the top of a fragment."""
    header: dict[str, str] = {}
    for line in source.splitlines():
        word, colon, text = line.removeprefix("-- ").partition(":")
        if not line.startswith("-- ") or not colon or not word.isidentifier():
            break
        header[word] = text.strip()
    return header


@cache
def load(name: ScriptName, *, clock: str | None = None) -> Script:
    """Return an assembled script. `clock` replaces the clock fragment, for tests."""
    main = fragment(name)
    header = read_header(main)
    parts = [
        clock if clock is not None and part == "clock" else fragment(part)
        for part in header["uses"].split()
    ]
    later = [f"function()\n{fragment(part)}\nend" for part in header.get("later", "").split()]
    if later:
        parts.append(_LATER % ",\n".join(later))
    source = (_FLAGS + "\n".join([*parts, main])).encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest(), header)
