"""The names of everything a pool keeps in Valkey, with shape and lifetime.

Invariant: all keys of a pool share one hash tag, so that a script works in one slot of a cluster.
Within a layout fields are only added and unknown ones are ignored; a change of shape is a new
`LAYOUT`, and a pool refuses a process of another layout while it has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LAYOUT = 2


@dataclass(frozen=True, slots=True)
class KeyShape:
    """One kind of key. `ttl` says how long it lives, or why it has no end."""

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
             "queue_max hand_off reap_ms policy parked timed_at starving reap_at sessions roster "
             "fresh empty vouched; per limit d: definition, u: used, "
             "w: waits:virtual time:credit of each band, and under a rate from:passed in "
             "microseconds, between which it is owed its share, and held:used in ms, when it "
             "found no room and took some; p: pause, g: gate, a: adapted, "
             "x: shadowed, e: how long calls take, b: spent as asserted in this epoch, s: spent "
             "as of its last change, which are numbered by `changes`; per tenant t: weight, "
             "n: waiting|last stamp while it waits",
             "none: the record of the pool, with its policy", False),
    KeyShape("layout", "string", "the layout's number", "none: guards `meta`", False),
    KeyShape("history", "list", "the last policies: revision, ms, who, blob",
             "none: who changed what, 100 at most", False),
    KeyShape("sessions", "zset", "session by expiry in ms", POOL_KEEP, True),
    KeyShape("lapsing", "zset", "ticket|session|lane by hard deadline in ms",
             "1 h after the last hard deadline in it", True),
    KeyShape("timed", "zset", "limit by the ms at which it has room again", POOL_KEEP, True),
    KeyShape("spending", "zset", "limit by the number of the last change of what is spent of it",
             "none: as `meta`, whose s: fields it puts in order", False),
    KeyShape("paused", "zset", "limit by the ms at which nothing is left of its pause",
             "none: as `meta`, whose p: fields it puts in order", False),
    KeyShape("starving", "zset", "session|flow that was sent to and fro, by sequence",
             POOL_KEEP, True),
    KeyShape("seen", "zset", "session by the version of the roster that it knows", POOL_KEEP, True),
    KeyShape("fresh", "zset", "session that not all others know yet by its probation's end in ms",
             POOL_KEEP, True),
    KeyShape("expected", "zset", "session that is to come back after an empty restart", POOL_KEEP,
             True),
    KeyShape("park:", "zset", "per limit|band: waiting tenant by start tag", SESSION_KEEP, True),
    KeyShape("line:", "zset", "per limit|band|tenant: session|flow by its first ticket's stamp",
             SESSION_KEEP, True),
    KeyShape("past:", "zset", "per limit|band: tenant that waits no more by start tag", POOL_KEEP,
             True),
    KeyShape("log:", "list", "per limit: ms of each admission in the window", "the window", True),
    KeyShape("rate:", "hash", "per limit: amount by the end of its bucket in ms", "two windows",
             True),
    KeyShape("quota:", "hash", "per limit: used reset_at", "1 h after its reset", True),
    KeyShape("session:", "hash", "gen batch sent acked blocked name closed_at since; at:flow -> "
             "limit|bounces|stamp; h:ticket -> seq|hard deadline in ms|cost_ms|charges|flow",
             SESSION_KEEP, True),
    KeyShape("note:", "string", "per session: what its process tells the others, as bytes",
             "seconds: it is told again and again", True),
    KeyShape("owed:", "hash", "ticket -> charges|lane, of calls whose usage is still to be told",
             SESSION_KEEP, True),
    KeyShape("queue:", "zset", "per session|flow: ticket|hard_ms|cost_ms|amounts by stamp",
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
