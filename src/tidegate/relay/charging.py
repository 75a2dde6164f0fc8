"""What a native call is charged for, from what its answer told or from what of it came. Pure.

Invariant: what the provider told of a whole answer stands as it was told; nothing that we estimate
is more than was reserved.
"""

from __future__ import annotations

import re
from dataclasses import replace

import orjson

from tidegate.call import NO_CHARGE, UNKNOWN_CHARGE, Charge, UsageState
from tidegate.demand import Demand, Demands
from tidegate.demand.cost import (
    came_tokens,
    charge_of,
    cost_micros,
    estimated_charge,
    is_unknown,
)
from tidegate.demand.estimator import Estimate
from tidegate.relay.asked import Asked
from tidegate.relay.call import Life, NativeCall
from tidegate.relay.paths import Dialect
from tidegate.relay.usage import pictures_in

_READ_BYTES = 2_000_000
# The fields in which the three dialects put what a model says, thinks, or calls tools with.
_SAID = re.compile(
    rb'"(?:content|text|delta|thinking|reasoning_content|arguments|partial_json)"\s*:\s*'
    rb'("(?:[^"\\]|\\.)*")'
)


def native_charge(
    call: NativeCall,
    asked: Asked | None,
    life: Life,
    demands: Demands,
    demand: Demand,
    *,
    whole: bool,
    images: int | None,
) -> Charge:
    """Of a call that an upstream has begun to answer, or may have. `images`: None where they were
    not counted."""
    if asked is None or life.target is None or not call.endpoint.is_counted:
        return NO_CHARGE
    usage, model = life.told.usage, life.target.model
    rates = demands.prices.of(model)
    dialect = call.endpoint.dialect
    if images is None and asked.images and life.streams and dialect is Dialect.GEMINI:
        images = pictures_in(dialect, life.answer) if life.pieces else 0
    if not is_unknown(usage) or images:
        charge = charge_of(rates, usage, images, whole=whole)
        if whole or dialect is not Dialect.ANTHROPIC:
            return charge
        # What is told at the start of its streams holds no more than the first token of output.
        came = came_tokens(text_in(life.answer))
        most = min(came, _reserved(demands, demand, asked, model).output_tokens)
        usage = replace(usage, output_tokens=max(usage.output_tokens or 0, most), total_tokens=None)
        return Charge(UsageState.PARTIAL, usage, images, cost_micros(rates, usage, images))
    if not life.pieces:
        return UNKNOWN_CHARGE
    text, pictures = text_in(life.answer), pictures_in(dialect, life.answer)
    if not text and not pictures:
        return UNKNOWN_CHARGE
    return estimated_charge(rates, _reserved(demands, demand, asked, model), text, pictures)


def _reserved(demands: Demands, demand: Demand, asked: Asked, model: str) -> Estimate:
    if demand.estimate is not None:
        return demand.estimate
    return demands.estimator.of_pieces(
        model,
        asked.kind.value,
        asked.pieces,
        images=asked.images,
        max_output_tokens=asked.max_output_tokens,
    )


def text_in(answer: bytes) -> str:
    """What a model has said in an answer, whole or cut, stream or not; of a long one its start."""
    said = []
    for found in _SAID.finditer(answer, 0, _READ_BYTES):
        try:
            said.append(str(orjson.loads(found[1])))
        except orjson.JSONDecodeError:  # half of a surrogate pair, or of nobody's protocol
            said.append(found[1][1:-1].decode("utf-8", "replace"))
    return "".join(said)
