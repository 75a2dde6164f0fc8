"""What a request asks of the limiter, and which limit its 429 pauses.

Pure. Invariant: a request without a demand is sent without a permit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from tidegate.limiter import Demand

RequestT = TypeVar("RequestT")

# A demand of every request, or of each by what it is; None needs no permit.
Demanded = Demand | Callable[[RequestT], Demand | None]
# The limit that a 429 pauses, or by what was demanded; None pauses nothing.
Penalised = str | Callable[[Demand], str | None] | None


def demand_of(demanded: Demanded[RequestT], request: RequestT) -> Demand | None:
    """What `request` needs. Raises TypeError for limits that are one string."""
    demand = demanded if isinstance(demanded, Demand) else demanded(request)
    if demand is not None and not _is_tuple(demand.limits):
        raise TypeError(f"limits are a tuple: ({demand.limits!r},)")
    return demand


def _is_tuple(limits: object) -> bool:
    return isinstance(limits, tuple)


def penalised_by(penalised: Penalised, demand: Demand) -> str | None:
    """The limit to pause when the upstream says 429 to a call of `demand`."""
    return penalised(demand) if callable(penalised) else penalised
