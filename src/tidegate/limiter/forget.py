"""Removing all that a pool keeps in Valkey, as an empty restart would.

For pools made for a trial: whoever still lives in one joins again, as after a loss. Keys are named,
not searched for, so that nothing but the limiter's own rights is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from tidegate.errors import LimiterUnavailable
from tidegate.limiter.keys import SHAPES, Keyspace
from tidegate.limiter.limits import PoolPolicy
from tidegate.limiter.link import Link, LinkDown
from tidegate.limiter.wire import flow_of

_DEADLINE_S = 2.0


async def forget_pool(
    url: str, pool: str, policy: PoolPolicy, *, sids: Iterable[str], tenants: Iterable[str]
) -> int:
    """Remove every key of a pool whose waiters need one limit each: those of its limits, and of
    these sessions and tenants. Returns how many there were. Raises LimiterUnavailable."""
    keys = Keyspace(pool)
    link = Link(url, keys.meta)
    names = sorted(_names(keys, policy, list(sids), list(tenants)))
    try:
        return int(await link.command(("UNLINK", *names), _DEADLINE_S))
    except LinkDown as away:
        raise LimiterUnavailable(str(away), limit="", retry_after_ms=1000) from away
    finally:
        await link.aclose()


def _names(keys: Keyspace, policy: PoolPolicy, sids: list[str], tenants: list[str]) -> set[str]:
    """All names that the shapes of `keys.py` can take."""
    bands = range(1, len(policy.bands) + 1)
    of_band = [f"{limit}|{band}" for limit, band in product(policy.limits, bands)]
    flows = [flow_of(band, tenant, (limit,))
             for band, tenant, limit in product(bands, tenants, policy.limits)]  # fmt: skip
    endings: dict[str, Iterable[str]] = {
        "park:": of_band,
        "past:": of_band,
        "line:": [f"{one}|{tenant}" for one, tenant in product(of_band, tenants)],
        **dict.fromkeys(("log:", "rate:", "quota:"), policy.limits),
        **dict.fromkeys(("session:", "owed:", "note:"), sids),
        "queue:": [f"{sid}|{flow}" for sid, flow in product(sids, flows)],
    }
    found = {keys.layout}
    for shape in SHAPES:
        if shape.name != "layout":
            found |= {f"{keys.prefix}{shape.name}{end}" for end in endings.get(shape.name, ("",))}
    return found
