"""What a native call is charged for, from what its answer told or from what of it came. Pure.

Invariant: what the provider told of a whole answer stands as it was told. Every other charge is at
least the first guess of the input, once the request has gone out, and what visibly came.
"""

from __future__ import annotations

from typing import Any

import orjson

from tidegate.call import NO_CHARGE, Charge
from tidegate.demand import Demand, Demands
from tidegate.demand.cost import (
    CacheWrite,
    Rates,
    charge_of,
    cut_charge,
    estimated_charge,
    foreseen,
    is_unknown,
)
from tidegate.demand.estimator import Estimate
from tidegate.relay.asked import Asked
from tidegate.relay.call import Life, NativeCall
from tidegate.relay.came import came_in
from tidegate.relay.paths import Dialect
from tidegate.relay.usage import pictures_in


def native_charge(
    call: NativeCall,
    asked: Asked | None,
    life: Life,
    demands: Demands,
    demand: Demand,
    *,
    body: dict[str, Any],
    whole: bool,
    images: int | None,
) -> Charge:
    """Of a call that an upstream has begun to answer, or may have. `body`: as it was parsed.
    `images`: None where they were not counted."""
    if asked is None or life.target is None or not life.sent or not call.endpoint.is_counted:
        return NO_CHARGE
    usage, model = life.told.usage, life.target.model
    rates = demands.prices.of(model or life.told.model_version or "")
    dialect = call.endpoint.dialect
    if images is None and asked.images and life.streams and _tells_pictures(call):
        images = pictures_in(dialect, life.said)
    if whole and (images or not is_unknown(usage)):
        return charge_of(rates, usage, images, whole=True)
    came = came_in(dialect, life.said, life.said_bytes)
    estimate = _estimate(demands, demand, asked, model, call.caller.tenant_id)
    if is_unknown(usage):
        pictures = images or came.pictures
        writes = _cache_write(rates, body)
        return estimated_charge(rates, estimate, came.tokens, pictures, usage.details, writes)
    return cut_charge(rates, usage, estimate, came.tokens, images)


def _cache_write(rates: Rates | None, body: dict[str, Any]) -> CacheWrite | None:
    """To which cache a request asks its input to be written, where that has a price of its own: who
    leaves before the usage is told has it written all the same."""
    if rates is None or rates.cache_write == rates.cache_write_1h == rates.input:
        return None
    try:
        text = orjson.dumps(body)  # in which no name is escaped
    except orjson.JSONEncodeError:  # nested deeper than can be written
        return "1h"
    if b'"cache_control":' not in text:
        return None
    return "1h" if b'"ttl":"1h"' in text else "5m"


def _tells_pictures(call: NativeCall) -> bool:
    """Whether the pictures of a whole stream can be counted: others come in parts."""
    return call.endpoint.dialect is Dialect.GEMINI or call.endpoint.path == "/responses"


def price_of(
    call: NativeCall, asked: Asked | None, model: str, demands: Demands, demand: Demand
) -> tuple[int, int]:
    """What a call will cost, about: millionths of money, and LLM tokens."""
    if asked is None or not call.endpoint.is_counted:
        return 0, 0
    estimate = _estimate(demands, demand, asked, model, call.caller.tenant_id)
    return foreseen(demands.prices.of(model), estimate, asked.images)


def _estimate(demands: Demands, demand: Demand, asked: Asked, model: str, tenant: str) -> Estimate:
    if demand.estimate is not None:
        return demand.estimate
    return demands.estimator.of_pieces(
        model,
        asked.kind.value,
        asked.pieces,
        images=asked.images,
        max_output_tokens=asked.max_output_tokens,
        tenant=tenant,
    )
