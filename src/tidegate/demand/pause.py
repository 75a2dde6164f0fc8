"""Which limit to pause, and for how long, when the provider says 429. Pure.

Invariant: it is a limit of the model that was asked for, or of the account where the provider names
that: never the kind of the call, nor what binds other models. Never for longer than the provider
could mean: to the next midnight for a day's quota, else ten minutes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, time, timedelta
from hashlib import sha256
from zoneinfo import ZoneInfo

from tidegate.errors import UpstreamThrottled
from tidegate.limiter.limits import PoolPolicy, Quota, Rate
from tidegate.policy.scopes import plain_model, whom_it_binds

LONGEST_MS = 600_000
USUAL_RAMP_MS = 10_000
_PROVIDERS_ZONE = "America/Los_Angeles"
# Clients name models: what is not a plain name is told by a digest.
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@+-]{0,127}")


@dataclass(frozen=True, slots=True)
class Pause:
    """After `for_ms` calls come back one by one, over `ramp_ms`. 0: nobody said for how long."""

    limit: str
    for_ms: int
    ramp_ms: int


def pause_after(
    error: UpstreamThrottled,
    limits: tuple[str, ...],
    model: str,
    policy: PoolPolicy,
    now: datetime,
    *,
    account: str | None = None,
) -> Pause | None:
    """The pause that a 429 asks for; None where it speaks of no model.

    `limits`: those of the call. `now` is aware of its zone. `account`: the limit that stands for
    the whole account, where the 429 names that.
    """
    limit_id = account or _blamed(error, limits, plain_model(model), policy)
    if limit_id is None:
        return None
    if error.day_quota:
        limit = policy.limit(limit_id)
        zone = limit.zone if isinstance(limit, Quota) else _PROVIDERS_ZONE
        for_ms = _to_midnight_ms(now, ZoneInfo(zone))
    else:
        for_ms = min(LONGEST_MS, error.retry_after_ms or 0)
    # An error that says a time of nothing does not say for how long.
    return Pause(limit_id, for_ms, min(USUAL_RAMP_MS, for_ms))


def _blamed(
    error: UpstreamThrottled, limits: tuple[str, ...], model: str, policy: PoolPolicy
) -> str | None:
    """The model's own rate of that unit, else its limit on calls at once, which need not be in the
    policy; None where no model was asked for."""
    if not model:
        return None
    of_model = [limit_id for limit_id in limits if whom_it_binds(limit_id) == model]
    window = Quota if error.per_day else Rate
    unit = error.unit or "requests"
    # A limit on all tokens counts those of the input too, and not the other way round.
    for wanted in (unit, "tokens") if unit.endswith("_tokens") else (unit,):
        for limit_id in of_model:
            limit = policy.limit(limit_id)
            if isinstance(limit, window) and limit.unit == wanted:
                return limit_id
    return next((one for one in of_model if one.startswith("model:")), model_limit(model))


def model_limit(model: str) -> str:
    """The limit on a model's calls at once, which has no bound where no policy names it."""
    name = plain_model(model)
    if _PLAIN_NAME.fullmatch(name) is None:
        name = f"~{sha256(name.encode('utf-8', 'replace')).hexdigest()[:16]}"
    return f"model:{name}"


def _to_midnight_ms(now: datetime, zone: ZoneInfo) -> int:
    local = now.astimezone(zone)
    midnight = datetime.combine(local.date() + timedelta(days=1), time(), zone)
    # As points in time: a day on which the clocks change has 23 or 25 hours.
    return max(1, round((midnight.timestamp() - now.timestamp()) * 1000))
