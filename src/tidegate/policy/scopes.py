"""What the id of a limit, `scope:name`, says: whom it binds, and what it counts. Pure.

    pool:total  kind:text_only  model:gemini-2.5-flash  tenant:acme      calls at once
    rpm:gemini-2.5-flash  tpm:total  rpd:kind/text_only  ipm:tenant/acme  a rate or a day's quota

The scope of a rate is what it counts (`r` requests, `t` LLM tokens, `it` of them input, `ot`
output, `i` images) and for how long (`ps` a second, `pm` a minute, `ph` an hour, `pd` a day, which
ends at midnight). Its name is a model, `total`, `kind/<kind>` or `tenant/<tenant>`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidegate.call import CLASSIFIER_LIMIT, OTHER_KIND, Kind
from tidegate.errors import ConfigError
from tidegate.limiter.limits import Unit

AT_ONCE = ("pool", "kind", "model", "tenant")
TOTAL = "total"
KIND_NAMES = (*(kind.value for kind in Kind), CLASSIFIER_LIMIT.partition(":")[2], OTHER_KIND)
_MEASURES: dict[str, Unit] = {
    "r": "requests",
    "t": "tokens",
    "it": "input_tokens",
    "ot": "output_tokens",
    "i": "images",
}
_WINDOWS_MS = {"ps": 1_000, "pm": 60_000, "ph": 3_600_000}
_DAY = "pd"


@dataclass(frozen=True, slots=True)
class Measure:
    """What a rate's scope stands for; `window_ms` is None for a day of the calendar."""

    unit: Unit
    window_ms: int | None


MEASURES = {
    f"{what}{how_long}": Measure(unit, window_ms)
    for what, unit in _MEASURES.items()
    for how_long, window_ms in (*_WINDOWS_MS.items(), (_DAY, None))
}


def whom_it_binds(limit_id: str) -> str | None:
    """A model, `kind/<kind>`, `tenant/<tenant>` or `total`; None for what no call falls under."""
    scope, _, name = limit_id.partition(":")
    if scope in MEASURES or scope == "model":
        return plain_model(name)
    if scope == "pool":
        return TOTAL if name == TOTAL else None
    return f"{scope}/{name}" if scope in AT_ONCE else None


def plain_model(model: str) -> str:
    """A model's name without the folder that Gemini's API lists it in."""
    return model.removeprefix("models/")


def check_id(limit_id: str) -> None:
    """Raises ConfigError for an id that no call of the product can fall under."""
    scope, _, name = limit_id.partition(":")
    if scope in MEASURES:
        _check_rate_name(limit_id, name)
    elif scope not in AT_ONCE:
        known = ", ".join((*AT_ONCE, "rpm", "tpm", "rpd"))
        raise ConfigError(
            f"limits.{limit_id}", limit_id, f"its scope must be one of {known} and the like"
        )
    elif scope == "pool" and name != TOTAL:
        raise ConfigError(f"limits.{limit_id}", limit_id, f"the pool's own limit is pool:{TOTAL}")
    elif scope == "kind":
        _check_kind(limit_id, name)
    elif not name:
        raise ConfigError(f"limits.{limit_id}", limit_id, f"{scope}: must be followed by a name")


def _check_rate_name(limit_id: str, name: str) -> None:
    what, slash, which = name.partition("/")
    if not name or (slash and what in ("kind", "tenant") and not which):
        allowed = f"must name a model, {TOTAL}, kind/<kind> or tenant/<tenant>"
        raise ConfigError(f"limits.{limit_id}", limit_id, allowed)
    if slash and what == "kind":
        _check_kind(limit_id, which)


def _check_kind(limit_id: str, name: str) -> None:
    if name not in KIND_NAMES:
        allowed = f"its kind must be one of {', '.join(KIND_NAMES)}"
        raise ConfigError(f"limits.{limit_id}", limit_id, allowed)
