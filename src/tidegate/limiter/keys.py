"""The names of everything a pool keeps in Valkey, with shape and lifetime.

Invariant: all keys of a pool share one hash tag, so that a script works in one slot of a cluster.
Within a layout fields are only added and unknown ones are ignored; a change of shape is a new
`LAYOUT`, and a pool refuses a process of another layout while it has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LAYOUT = 1


@dataclass(frozen=True, slots=True)
class KeyShape:
    """One kind of key. `ttl` says how long it lives, or why it has no end."""

    name: str
    type: Literal["string", "hash", "zset"]
    fields: str
    ttl: str
    expires: bool


POOL_KEEP = "1 h after the last sync of anybody"
SESSION_KEEP = "2 h after its session's last sync; gone with the session"

SHAPES = (
    KeyShape("meta", "hash",
             "run epoch began recover_until clock seq revision lease_ms hold policy",
             "none: the record of the pool, with the revision of its policy", False),
    KeyShape("layout", "string", "the layout's number", "none: guards `meta`", False),
    KeyShape("limits", "hash", "limit -> how many", "none: part of the policy", False),
    KeyShape("used", "hash", "limit -> permits held or held over", POOL_KEEP, True),
    KeyShape("sessions", "zset", "session by expiry in ms", POOL_KEEP, True),
    KeyShape("lapsing", "zset", "ticket|session|limit by hard deadline in ms",
             "1 h after the last hard deadline in it", True),
    KeyShape("session:", "hash", "gen batch sent acked blocked lane:*", SESSION_KEEP, True),
    KeyShape("held:", "hash", "ticket -> seq|hard deadline in ms|limit", SESSION_KEEP, True),
    KeyShape("waiting:", "hash", "ticket -> deadline in ms|hard_ms|lane", SESSION_KEEP, True),
    KeyShape("queue:", "zset", "per lane and session: ticket by stamp", SESSION_KEEP, True),
    KeyShape("heads:", "zset", "per lane: session by the stamp of its first ticket",
             SESSION_KEEP, True),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Keyspace:
    """Names the keys of one pool."""

    pool: str

    @property
    def prefix(self) -> str:
        return f"tg:{LAYOUT}:{{{self.pool}}}:"

    @property
    def meta(self) -> str:
        return f"{self.prefix}meta"

    @property
    def layout(self) -> str:
        """The one name that is the same in every layout."""
        return f"tg:{{{self.pool}}}:layout"

    def channel(self, sid: str) -> str:
        return f"{self.prefix}grants:{sid}"

    def shape_of(self, key: str) -> KeyShape | None:
        """The declared shape of a key of this pool, or None if nobody declared it."""
        if key == self.layout:
            return next(shape for shape in SHAPES if shape.name == "layout")
        if not key.startswith(self.prefix):
            return None
        rest = key.removeprefix(self.prefix)
        for shape in SHAPES:
            if rest == shape.name or (shape.name.endswith(":") and rest.startswith(shape.name)):
                return shape
        return None
