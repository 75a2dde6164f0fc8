"""What goes over the wire between a process and its pool, packed by msgpack.

Invariant: the fields of each type, in order, are those of the script's header.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, cast

import msgpack

from tidegate.limiter.limits import PoolPolicy

# ok; the pool began a new epoch; the session is not there; a later batch overtook this one;
# a process of another layout has the pool.
Status = Literal["ok", "epoch", "gone", "stale", "layout"]


def pack(value: object) -> bytes:
    """As Lua's cmsgpack reads it: it knows no `bin` type."""
    return cast(bytes, msgpack.packb(value, use_bin_type=False))


@dataclass(frozen=True, slots=True)
class Join:
    """What a process says when it enters a pool, for the first time or again.

    policy: the newest policy it knows. held: (ticket, limit, seq, hard_ms) of every call that it
    holds open. lapsing: (member, left_ms) of permits held over for dead sessions, as last seen.
    """

    policy: PoolPolicy
    held: list[tuple[int, str, int, int]]
    lapsing: list[tuple[str, int]]

    def as_fields(self) -> dict[str, Any]:
        policy = {
            "revision": self.policy.revision,
            "limits": dict(self.policy.limits),
            "lease_ms": self.policy.lease_ms,
            "hold": self.policy.on_expiry == "hold",
            "blob": self.policy.pack(),
        }
        return {"policy": policy, "held": self.held, "lapsing": self.lapsing}


@dataclass(frozen=True, slots=True)
class Renewal:
    """Request of `renew`."""

    sid: str
    gen: int
    epoch: int
    run: str
    uptime_ms: int
    lease_ms: int

    def pack(self) -> bytes:
        return pack(asdict(self))


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Request of `sync`. Entries are lists in the order that the fragments' comments give."""

    sid: str
    gen: int
    epoch: int
    run: str
    uptime_ms: int
    lease_ms: int
    revision: int
    batch: int
    ack: int = 0
    full: bool = False
    leave: bool = False
    join: Join | None = None
    transfers: list[tuple[int, int, str, int, int]] = field(default_factory=list)
    releases: list[tuple[int, str, str, int]] = field(default_factory=list)
    cancels: list[int] = field(default_factory=list)
    enqueues: list[tuple[int, str, int, int]] = field(default_factory=list)

    def pack(self) -> bytes:
        values = ((name, getattr(self, name)) for name in _SYNC_FIELDS)
        request = {name: value for name, value in values if value}
        if self.join is not None:
            request["join"] = self.join.as_fields()
        return pack(request)


_SYNC_FIELDS = tuple(f.name for f in fields(SyncRequest))


class SyncReply(NamedTuple):
    """Reply of `sync`. `held`, `lapsing` and `policy` are None where they were not asked for."""

    status: Status
    epoch: int
    gen: int
    lease_ms: int
    recovering_ms: int
    revision: int
    sessions: int
    sent: int
    more: int
    conflict: int
    grants: list[tuple[int, int]]
    held: list[tuple[int, int]] | None
    lapsing: list[tuple[str, int]] | None
    next_event_ms: int
    policy: bytes | None

    @classmethod
    def unpack(cls, raw: bytes) -> SyncReply:
        values = msgpack.unpackb(raw, raw=True)
        values[0] = values[0].decode()
        for index in (11, 12, 14):
            if values[index] is False:
                values[index] = None
        reply = cls(*values[:15])
        if reply.lapsing is None:
            return reply
        return reply._replace(
            lapsing=[(cast(Any, member).decode(), left) for member, left in reply.lapsing]
        )


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
    """A message on a session's channel. `sent` counts the grants pushed to it up to this one."""

    epoch: int
    gen: int
    sent: int
    grants: list[tuple[int, int]]

    @classmethod
    def unpack(cls, raw: bytes) -> Push:
        return cls(*msgpack.unpackb(raw)[:4])


class InspectReply(NamedTuple):
    """Reply of `inspect`; `limits` holds (limit, bound, used, waiting, lapsing)."""

    epoch: int
    recovering_ms: int
    revision: int
    sessions: int
    limits: list[tuple[str, int, int, int, int]]

    @classmethod
    def unpack(cls, raw: bytes) -> InspectReply:
        return cls(*msgpack.unpackb(raw)[:5])
