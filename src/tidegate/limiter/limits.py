"""What a pool is held to: its limits, its lease, and what to do when things fail.

Pure. Invariant: a policy that exists is a valid one; two equal policies pack to the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import msgpack

from tidegate.errors import ConfigError

WhenAway = Literal["closed", "local"]
OnLost = Literal["finish", "cancel"]
OnExpiry = Literal["reuse", "hold"]

MIN_LEASE_MS = 200
MAX_LEASE_MS = 600_000
# In `hold`, a permit asked for without `hard_ms` counts for this long after its process died.
DEFAULT_HARD_MS = 600_000
_LIMIT_ID = re.compile(r"[a-z_]+:[^\s|{}]{1,200}")


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """The policy of a pool. The highest `revision` that any process brings is in force for all.

    limits: id (`scope:name`) -> permits at once, 0 or more.
    lease_ms: how long a process may be silent before its permits are taken back.
    when_away: what waiters get when Valkey is away for longer than the lease: `closed` lets
        nobody in, `local` lets each process use limit / last known sessions (rounded down, which
        may be 0).
    on_lost: what becomes of running calls when Valkey is away for longer than the lease.
    on_expiry: whether the permits of a dead or paused process are reused when its lease is over,
        or held until the hard deadline of its calls.
    Raises ConfigError for a value that is out of range.
    """

    limits: Mapping[str, int]
    lease_ms: int = 3000
    when_away: WhenAway = "closed"
    on_lost: OnLost = "finish"
    on_expiry: OnExpiry = "reuse"
    revision: int = 1

    def __post_init__(self) -> None:
        for limit, bound in self.limits.items():
            if not _LIMIT_ID.fullmatch(limit):
                raise ConfigError("limit", limit, "a limit's id is `scope:name`")
            if isinstance(bound, bool) or not isinstance(bound, int) or bound < 0:
                raise ConfigError(limit, str(bound), "a whole number of 0 or more")
        if not MIN_LEASE_MS <= self.lease_ms <= MAX_LEASE_MS:
            allowed = f"{MIN_LEASE_MS} to {MAX_LEASE_MS} ms"
            raise ConfigError("lease_ms", str(self.lease_ms), allowed)
        if self.revision < 1:
            raise ConfigError("revision", str(self.revision), "1 or more")

    def pack(self) -> bytes:
        """The same bytes for the same policy, whatever the order of its limits."""
        fields = [
            self.revision,
            self.lease_ms,
            self.when_away,
            self.on_lost,
            self.on_expiry,
            sorted(self.limits.items()),
        ]
        return cast(bytes, msgpack.packb(fields))

    @classmethod
    def unpack(cls, blob: bytes) -> PoolPolicy:
        """The inverse of `pack`. Fields that a later version added are ignored."""
        revision, lease_ms, when_away, on_lost, on_expiry, limits, *_ = msgpack.unpackb(blob)
        return cls(
            limits=dict(limits),
            lease_ms=lease_ms,
            when_away=when_away,
            on_lost=on_lost,
            on_expiry=on_expiry,
            revision=revision,
        )


def share_of(bound: int, sessions: int) -> int:
    """What one of `sessions` processes may use alone: rounded down, so the sum never exceeds."""
    return bound // sessions if sessions > 0 else 0
