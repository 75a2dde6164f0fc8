"""What goes over the wire between a process and its pool, packed by msgpack.

Invariant: the fields of each type, in order, are those of the script's header. Within a layout
fields are only added at the end, and what is not known is ignored: two versions work side by side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha1
from itertools import chain
from typing import Any, Literal, NamedTuple, cast

import msgpack

from tidegate.limiter.limits import (
    BUCKETS,
    Band,
    Concurrency,
    Limit,
    PoolPolicy,
    Rate,
    as_limit,
)
from tidegate.limiter.outlook import Barred, Outlook

# ok; ask again by `tend`; the pool began a new epoch; the session is not there; a later batch
# overtook this one; a process of another layout has the pool.
Status = Literal["ok", "tend", "epoch", "gone", "stale", "layout"]

# Added to an outcome: the usage will be told after the release.
USAGE_LATER = 10
OUTCOMES = {"success": 0, "ignored": 1, "dropped": 2}


def pack(value: object) -> bytes:
    """As Lua's cmsgpack reads it: it knows no `bin` type."""
    return cast(bytes, msgpack.packb(value, use_bin_type=False))


def definition(limit: Limit) -> str:
    """A limit as the scripts read it: sort|bound|shadow and three numbers of the sort's own."""
    shadow = int(limit.shadow)
    if isinstance(limit, Concurrency):
        least = limit.adaptive.minimum if limit.adaptive else 0
        return f"c|{limit.bound}|{shadow}|{least}|0|0"
    if isinstance(limit, Rate):
        exact = int(limit.exact)
        return f"r|{limit.bound}|{shadow}|{limit.window_ms}|{limit.slack}|{exact}"
    return f"q|{limit.bound}|{shadow}|0|0|0"


def band_shares(bands: tuple[Band, ...]) -> str:
    """Per band, in thousandths: its least share, and what is kept free for the bands above it."""
    parts, above = [], 0
    for band in bands:
        parts.append(f"{round(band.min_share * 1000)}:{above}")
        above += round(band.headroom * 1000)
    return ",".join(parts)


def flow_of(band: int, tenant: str, limits: tuple[str, ...]) -> str:
    """The name of a flow; `band` counts from 1, the highest."""
    return f"{band}|{tenant}|{' '.join(limits)}"


def lane_of(flow: str) -> str:
    """The limits of a flow, as one string."""
    return flow.split("|", 2)[2]


@dataclass(frozen=True, slots=True)
class Join:
    """What a process says when it enters a pool, for the first time or again.

    policy: the newest policy it knows, and who made it. name: the process, for people. held:
    (ticket, flow, seq, hard_ms, cost_ms) of every call that it holds open. lapsing: (member,
    left_ms) of permits held over for dead sessions, as last seen. spent: (limit, spent as last
    seen, admitted here since). pauses: (limit, left_ms, ramp_ms, said). roster: the sessions
    that were there, if we can vouch for that. base: the policy that was in force before, if known.
    """

    policy: PoolPolicy
    by: str
    name: str
    held: list[tuple[int, int, int, int, int]]
    lapsing: list[tuple[str, int]]
    spent: list[tuple[str, int, int]] = field(default_factory=list)
    pauses: list[tuple[str, int, int, str]] = field(default_factory=list)
    roster: list[str] = field(default_factory=list)
    base: PoolPolicy | None = None

    def as_fields(self) -> dict[str, Any]:
        blob = self.policy.pack()
        policy = {
            "revision": self.policy.revision,
            # Packed once more: only a server that does not have this revision reads them.
            "limits": _flat(self.policy.limits),
            "weights": pack(dict(self.policy.weights)),
            "digest": _digest(blob),
            "base": _digest(self.base.pack()) if self.base else "",
            "changes": _changes(self.base, self.policy) if self.base else b"",
            "bands": band_shares(self.policy.bands),
            "queue_max": self.policy.queue_per_tenant,
            "lease_ms": self.policy.lease_ms,
            "hold": self.policy.on_expiry == "hold",
            "hand_off": self.policy.hand_off,
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
        }


def _digest(blob: bytes) -> str:
    return sha1(blob, usedforsecurity=False).hexdigest()


def _flat(limits: Mapping[str, int | Limit]) -> bytes:
    """Field of the record, definition, and so on."""
    fields = ((f"d:{name}", definition(as_limit(limit))) for name, limit in limits.items())
    return cast(bytes, msgpack.packb(list(chain.from_iterable(fields)), use_bin_type=False))


def _changes(base: PoolPolicy, policy: PoolPolicy) -> bytes:
    """The limits and the weights that a policy has otherwise than another one, False if no more."""
    limits: dict[str, str | Literal[False]] = {
        n: False for n in base.limits if n not in policy.limits
    }
    for name, limit in policy.limits.items():
        if base.limits.get(name) != limit:
            limits[name] = definition(as_limit(limit))
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
    """Request of `sync` and `tend`. Entries are lists in the order that the fragments' comments
    give; `flows` names the flows that they speak of, counted from 1, 0 for none.

    transfers: from, to, seq, hard_ms, flow, member, outcome, took_ms. releases: ticket, flow,
    outcome, took_ms, actual amounts. settles: ticket, actual amounts. cancels: ticket, flow,
    member. enqueues: flow, member. wants: flow, cost_ms. A member is
    ticket|hard_ms|cost_ms|amounts. looks: flows under whose limits somebody might be admitted.
    told, pages: what of `Whole` was read before. asks: tickets that may have been admitted. lefts:
    ms that each enqueue may wait, 0 where not told. firm: limits of which nothing is given back."""

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
    wants: list[tuple[int, int]] = field(default_factory=list)
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

    def pack(self) -> bytes:
        values = ((name, getattr(self, name)) for name in _SYNC_FIELDS)
        request = {name: value for name, value in values if value}
        for name in _FLAT:
            if name in request:
                request[name] = list(chain.from_iterable(request[name]))
        if self.join is not None:
            request["join"] = self.join.as_fields()
        return pack(request)


# Packed without lists of their own: a script takes longer to unpack many small ones.
_FLAT = ("transfers", "releases", "enqueues")
_SYNC_FIELDS = tuple(f.name for f in fields(SyncRequest))


class Whole(NamedTuple):
    """What a `full` request gets on top. `held` holds (ticket, seq, until_ms: when its hard limit
    ends by the server's clock) of those asked after, `spent` (limit, spent), `pauses` (limit,
    left_ms, ramp_ms, said); `policy` is None where ours is in force; `roster` is the version of the
    list of sessions, and the list where we do not have it. `spent` is of what changed after the
    change `told` of the request, up to this one; `pages` are the places at which the lists go on
    that are not whole."""

    now_ms: int
    held: list[tuple[int, int, int]]
    lapsing: list[tuple[str, int]]
    next_event_ms: int
    conflict: int
    spent: list[tuple[str, int]]
    pauses: list[tuple[str, int, int, str]]
    policy: bytes | None
    roster: tuple[int, list[str] | None]
    told: int = 0
    pages: Mapping[str, tuple[str, int]] = {}


class Hint(NamedTuple):
    """Waiters of `flow` up to the stamp `horizon` may be let in by permits that we free; one of
    stamp s has the virtual start `tag + (s - head) * step`."""

    flow: int
    horizon: int
    tag: int
    head: int
    step: int


class SyncReply(NamedTuple):
    """Reply of `sync` and `tend`. `stamps` belong to the enqueues, 0 for those let in or refused;
    `timed_ms` is when something may go that only time frees, 0 for never."""

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
    stamps: list[int]
    refused: list[int]
    hints: list[Hint]
    whole: Whole | None
    barred: list[Barred]
    outlook: list[Outlook]

    @classmethod
    def unpack(cls, raw: bytes) -> SyncReply:
        values = msgpack.unpackb(raw, raw=True, use_list=False)
        whole = values[15]
        return cls._make(
            (
                values[0].decode(),
                *values[1:11],
                _pairs(values[11]),
                _listed(values[12]),
                _listed(values[13]),
                [Hint(*hint[:5]) for hint in _listed(values[14])],
                _whole(whole) if whole else None,
                [Barred(row[0], row[1].decode(), *row[2:4]) for row in _listed(values[16])],
                [Outlook(row[0], row[1].decode(), *row[2:5]) for row in _listed(values[17])],
            )
        )


def _listed(value: Any) -> Any:
    """Lua has one type for lists and maps: an empty one may arrive as either."""
    return value or ()


def _pairs(rows: Any) -> Any:
    """A later version may say more in each row."""
    return tuple(row[:2] for row in _listed(rows))


def _whole(values: Any) -> Whole:
    now_ms, held, lapsing, next_event_ms, conflict, spent, pauses, policy, roster = values[:9]
    told, pages = values[9:11]
    return Whole(
        now_ms,
        [tuple(row[:3]) for row in _listed(held)],
        [(member.decode(), left_ms) for member, left_ms in _pairs(lapsing)],
        next_event_ms,
        conflict,
        [(name.decode(), amount) for name, amount in _pairs(spent)],
        [
            (name.decode(), *ms, said.decode())
            for name, *ms, said in (p[:4] for p in _listed(pauses))
        ],
        policy or None,
        _roster(*roster),
        told,
        {name.decode(): (place[0].decode(), place[1]) for name, place in pages.items()}
        if pages
        else {},
    )


def _roster(version: int, sids: Any, *_: Any) -> tuple[int, list[str] | None]:
    return version, None if sids is False else [sid.decode() for sid in _listed(sids)]


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
    """A message on a session's channel. `sent` counts the grants pushed to it up to this one;
    `at_ms` is the server's time."""

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
    """Reply of `inspect`: see its header for the rows of the lists."""

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

    @classmethod
    def unpack(cls, raw: bytes) -> InspectReply:
        values = msgpack.unpackb(raw)
        return cls._make([*values[:6], *(list(_listed(value)) for value in values[6:11])])


__all__ = [
    "BUCKETS",
    "OUTCOMES",
    "USAGE_LATER",
    "Hint",
    "InspectReply",
    "Join",
    "Push",
    "RenewReply",
    "Renewal",
    "Status",
    "SyncReply",
    "SyncRequest",
    "Whole",
    "band_shares",
    "definition",
    "flow_of",
    "lane_of",
    "pack",
]
