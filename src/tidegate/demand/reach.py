"""Which limits of a policy a call falls under, and its place among the priorities. Pure.

Invariant: a call takes the limit of its kind, which is there or refuses it, unless the pool is one
whose kinds need no limit; of the others those that the policy has.
"""

from __future__ import annotations

from collections import defaultdict

from tidegate.call import OTHER_KIND
from tidegate.limiter.limits import DEFAULT_PRIORITY, Band, Limit, PoolPolicy, Quota, Rate
from tidegate.policy.scopes import MEASURES, TOTAL, plain_model, whom_it_binds

MOST_PRIORITY = 100
# Of the calls whose limits were looked for: models and tenants are named by clients.
_MOST_KEPT = 1_000


class Reach:
    """The limits of one policy by whom they bind; made anew when the policy is another one."""

    def __init__(self, policy: PoolPolicy, *, kinds_optional: bool = False) -> None:
        self.policy = policy
        self.counts_tokens = any(_counts_tokens(policy.limit(one)) for one in policy.limits)
        self._kinds_optional = kinds_optional
        self._found: dict[tuple[str, str, str, bool], tuple[str, ...]] = {}
        self._bands: dict[int, str] = {}
        self._bound: defaultdict[str, list[tuple[str, bool]]] = defaultdict(list)
        for limit_id in sorted(policy.limits, key=_usual_order):
            whom = whom_it_binds(limit_id)
            if whom is not None:
                self._bound[whom].append((limit_id, counts_images(policy.limit(limit_id))))

    def limits(self, kind: str, model: str, tenant: str, images: int) -> tuple[str, ...]:
        """The ids of all limits that a call falls under, that of its kind first.

        `images`: how many it makes; without any, limits on images are none of its own.
        """
        call = (kind, model, tenant, images > 0)
        found = self._found.get(call)
        if found is None:
            found = self._look_for(kind, model, tenant, images)
            if len(self._found) < _MOST_KEPT:
                self._found[call] = found
        return found

    def band(self, priority: int) -> str:
        """See `band_of`."""
        band = self._bands.get(priority)
        if band is None:
            band = self._bands[priority] = band_of(priority, self.policy.bands)
        return band

    def _look_for(self, kind: str, model: str, tenant: str, images: int) -> tuple[str, ...]:
        first = f"kind:{kind}"
        required = not self._kinds_optional and kind != OTHER_KIND
        found = [first] if required or first in self.policy.limits else []
        for whom in (f"kind/{kind}", plain_model(model), f"tenant/{tenant}", TOTAL):
            if whom in self._bound:
                found += [
                    limit_id
                    for limit_id, of_images in self._bound[whom]
                    if limit_id != first and (images or not of_images)
                ]
        return tuple(found)


def counts_images(limit: Limit | None) -> bool:
    return isinstance(limit, Rate | Quota) and limit.unit == "images"


def _counts_tokens(limit: Limit | None) -> bool:
    return isinstance(limit, Rate | Quota) and "tokens" in limit.unit


def band_of(priority: int, bands: tuple[Band, ...]) -> str:
    """The band of a request's priority from -100 to 100: 0 is `normal`, or the middle one, and
    the rest is spread evenly over the bands above and below."""
    names = [band.name for band in bands]
    usual = names.index(DEFAULT_PRIORITY) if DEFAULT_PRIORITY in names else len(names) // 2
    steps = min(abs(priority), MOST_PRIORITY)
    if not steps:
        return names[usual]
    room = usual if priority > 0 else len(names) - 1 - usual
    away = min(room, 1 + (steps - 1) * room // MOST_PRIORITY)
    return names[usual - away if priority > 0 else usual + away]


def _usual_order(limit_id: str) -> tuple[bool, str]:
    return limit_id.partition(":")[0] in MEASURES, limit_id
