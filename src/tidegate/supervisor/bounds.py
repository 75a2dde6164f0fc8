"""How many calls may run at once, as the start-up page tells it: what is in force, which may be
other than what this deployment asks for.
"""

from __future__ import annotations

from collections.abc import Mapping

from tidegate.call import DEFAULT_POOL, Kind
from tidegate.errors import ConfigError, LimiterUnavailable
from tidegate.limiter import PoolPolicy, Snapshot
from tidegate.limiter.checkup import look_until

_WITHIN_S = 1.0


async def bounds_in_force(
    url: str, wanted: PoolPolicy, *, within_s: float = _WITHIN_S
) -> Mapping[Kind, int] | None:
    """By kind. None where Valkey does not say so in time.

    A deployment whose policy is new puts it in force within a moment of its start: as long as
    others are in force, we look again.
    """

    def as_wanted(pool: Snapshot) -> bool:
        return _bounds(pool) == {kind: wanted.bound(kind.limit) for kind in Kind}

    try:
        return _bounds(await look_until(url, DEFAULT_POOL, as_wanted, within_s)) or None
    except (LimiterUnavailable, ConfigError):  # the page says so
        return None


def _bounds(pool: Snapshot) -> dict[Kind, int]:
    """Nothing where nobody has joined it yet."""
    if any(kind.limit not in pool.limits for kind in Kind):
        return {}
    return {kind: pool.limits[kind.limit].bound for kind in Kind}
