"""Which limit to pause, and for how long, when the provider says 429. Pure.

Invariant: it is one of the limits that the call had taken, and never for longer than the provider
could mean: to the next midnight for a day's quota, else ten minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

from tidegate.demand.reach import plain_model, whom_it_binds
from tidegate.errors import UpstreamThrottled
from tidegate.limiter.limits import PoolPolicy, Quota, Rate

LONGEST_MS = 600_000
USUAL_RAMP_MS = 10_000
_PROVIDERS_ZONE = "America/Los_Angeles"


@dataclass(frozen=True, slots=True)
class Pause:
    """After `for_ms` calls come back one by one, over `ramp_ms`."""

    limit: str
    for_ms: int
    ramp_ms: int


def pause_after(
    error: UpstreamThrottled,
    limits: tuple[str, ...],
    model: str,
    policy: PoolPolicy,
    now: datetime,
) -> Pause | None:
    """The pause that a 429 asks for; None where it says neither how long nor that a day is over.

    `limits`: those of the call, that of its kind first. `now` is aware of its zone.
    """
    if not error.day_quota and not error.retry_after_ms:
        return None
    limit_id = _blamed(error, limits, plain_model(model), policy)
    if error.day_quota:
        limit = policy.limit(limit_id)
        zone = limit.zone if isinstance(limit, Quota) else _PROVIDERS_ZONE
        for_ms = _to_midnight_ms(now, ZoneInfo(zone))
    else:
        for_ms = min(LONGEST_MS, error.retry_after_ms or 0)
    return Pause(limit_id, for_ms, min(USUAL_RAMP_MS, for_ms))


def _blamed(
    error: UpstreamThrottled, limits: tuple[str, ...], model: str, policy: PoolPolicy
) -> str:
    """The model's own rate of that unit, else its limit on calls at once, else that of the kind."""
    of_model = [limit_id for limit_id in limits if whom_it_binds(limit_id) == model]
    unit = error.unit or "requests"
    for limit_id in of_model:
        limit = policy.limit(limit_id)
        fits = isinstance(limit, Quota if error.day_quota else Rate)
        if fits and isinstance(limit, Rate | Quota) and unit in limit.unit:
            return limit_id
    return next((one for one in of_model if one.startswith("model:")), limits[0])


def _to_midnight_ms(now: datetime, zone: ZoneInfo) -> int:
    local = now.astimezone(zone)
    midnight = datetime.combine(local.date() + timedelta(days=1), time(), zone)
    # As points in time: a day on which the clocks change has 23 or 25 hours.
    return max(1, round((midnight.timestamp() - now.timestamp()) * 1000))
