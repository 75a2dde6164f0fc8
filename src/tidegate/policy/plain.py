"""A pool's policy as plain values, as `tidegate.toml`, the record and the admin endpoint have it.

Pure. Invariant: `of_plain(to_plain(policy))` is the policy again; what is as usual is left out, so
that a later version with more options writes the same for the same policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from tidegate.errors import ConfigError
from tidegate.limiter.limits import (
    DEFAULT_BANDS,
    UNITS,
    Adaptive,
    Band,
    Concurrency,
    Limit,
    PoolPolicy,
    Quota,
    Rate,
    as_limit,
)
from tidegate.policy.scopes import MEASURES, check_id

Plain = dict[str, Any]

_CHOICES = {
    "when_away": ("closed", "local"),
    "on_lost": ("finish", "cancel"),
    "on_expiry": ("reuse", "hold"),
}
_POOL_TYPES: dict[str, type] = {
    "lease_ms": int,
    "when_away": str,
    "on_lost": str,
    "on_expiry": str,
    "queue_per_tenant": int,
    "reap_closed_ms": int,
    "hand_off": bool,
}
_POOL_DEFAULTS = {one.name: one.default for one in fields(PoolPolicy) if one.name in _POOL_TYPES}
assert MISSING not in _POOL_DEFAULTS.values()
SECTIONS = ("limits", "weights", "bands", "pool")
_SORTS = ("concurrency", "rate", "quota")
_KEYS: dict[str, dict[str, type]] = {
    "concurrency": {"bound": int, "shadow": bool, "adaptive": dict},
    "rate": {"bound": int, "shadow": bool, "unit": str, "window_ms": int, "slack_ms": int},
    "quota": {"bound": int, "shadow": bool, "unit": str, "zone": str},
}
_WORDS = {int: "a whole number", bool: "true or false", str: "a text", dict: "a table"}


def to_plain(policy: PoolPolicy) -> Plain:
    """The policy without its revision."""
    found: Plain = {
        "limits": {name: plain_limit(name, policy.limits[name]) for name in sorted(policy.limits)}
    }
    if policy.weights:
        found["weights"] = {tenant: policy.weights[tenant] for tenant in sorted(policy.weights)}
    if policy.bands != DEFAULT_BANDS:
        found["bands"] = [_plain_band(band) for band in policy.bands]
    pool = {
        name: getattr(policy, name)
        for name, usual in _POOL_DEFAULTS.items()
        if getattr(policy, name) != usual
    }
    return {**found, "pool": pool} if pool else found


def of_plain(plain: Mapping[str, Any], *, revision: int = 1, strict: bool = True) -> PoolPolicy:
    """The policy that `plain` describes.

    `strict` refuses unknown keys, and limits that no call can fall under; without it they are left
    out or kept: a record may be of a later version. Raises ConfigError with the path of the key.
    """
    if strict:
        check_keys("", plain, SECTIONS)
    limits = {
        str(name): limit_of(str(name), value, strict=strict)
        for name, value in _table("limits", plain.get("limits", {})).items()
    }
    weights = _table("weights", plain.get("weights", {}))
    for tenant, weight in weights.items():
        _typed(f"weights.{tenant}", weight, int)
    return _built(
        limits=limits,
        weights=dict(weights),
        bands=_bands(plain.get("bands"), strict),
        revision=revision,
        **_pool(_table("pool", plain.get("pool", {})), strict),
    )


def digest(plain: Mapping[str, Any]) -> str:
    """The same for the same policy, whatever its order and revision."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def plain_limit(limit_id: str, limit: int | Limit) -> int | Plain:
    """A limit as a number where the rest is as its scope says, else as a table."""
    limit = as_limit(limit)
    measure = MEASURES.get(limit_id.partition(":")[0])
    found: Plain = {"bound": limit.bound}
    if _sort_of(limit_id) != (sort := _sort(limit)):
        found["type"] = sort
    if limit.shadow:
        found["shadow"] = True
    if isinstance(limit, Concurrency):
        if limit.adaptive is not None:
            found["adaptive"] = {"minimum": limit.adaptive.minimum}
        return found if len(found) > 1 else limit.bound
    if limit.unit != (measure.unit if measure else "requests"):
        found["unit"] = limit.unit
    if isinstance(limit, Quota):
        if limit.zone != Quota.__dataclass_fields__["zone"].default:
            found["zone"] = limit.zone
    else:
        if measure is None or limit.window_ms != measure.window_ms:
            found["window_ms"] = limit.window_ms
        if limit.slack_ms is not None:
            found["slack_ms"] = limit.slack_ms
    return found if len(found) > 1 else limit.bound


def limit_of(limit_id: str, value: object, *, strict: bool = True) -> int | Limit:
    """The inverse of `plain_limit`. Raises ConfigError with the path of the key."""
    path = f"limits.{limit_id}"
    if strict:
        check_id(limit_id)
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bound": value}
    elif not isinstance(value, Mapping):
        raise ConfigError(path, _shown(value), "must be a whole number or a table")
    sort = value.get("type", _sort_of(limit_id))
    if sort not in _SORTS:
        raise ConfigError(f"{path}.type", _shown(sort), f"must be one of {', '.join(_SORTS)}")
    if "bound" not in value:
        raise ConfigError(f"{path}.bound", "(not set)", "must be a whole number")
    if strict:
        check_keys(path, value, ("type", *_KEYS[sort]))
    given = {
        key: _typed(f"{path}.{key}", value[key], kind)
        for key, kind in _KEYS[sort].items()
        if key in value
    }
    limit = _limit(sort, limit_id, given, strict)
    if isinstance(limit, Concurrency) and not limit.shadow and limit.adaptive is None:
        return limit.bound
    return limit


def _limit(sort: str, limit_id: str, given: Plain, strict: bool) -> Limit:
    path = f"limits.{limit_id}"
    if sort == "concurrency":
        adaptive = given.pop("adaptive", None)
        if adaptive is None:
            return Concurrency(**given)
        if strict:
            check_keys(f"{path}.adaptive", adaptive, ("minimum",))
        minimum = _typed(f"{path}.adaptive.minimum", adaptive.get("minimum", 1), int)
        return Concurrency(**given, adaptive=Adaptive(minimum))
    measure = MEASURES.get(limit_id.partition(":")[0])
    given.setdefault("unit", measure.unit if measure else "requests")
    if given["unit"] not in UNITS:
        raise ConfigError(f"{path}.unit", given["unit"], f"must be one of {', '.join(UNITS)}")
    if sort == "quota":
        return Quota(**given)
    given.setdefault("window_ms", measure.window_ms if measure else None)
    if given["window_ms"] is None:
        raise ConfigError(f"{path}.window_ms", "(not set)", "must be a whole number")
    return Rate(**given)


def _sort_of(limit_id: str) -> str:
    measure = MEASURES.get(limit_id.partition(":")[0])
    if measure is None:
        return "concurrency"
    return "quota" if measure.window_ms is None else "rate"


def _sort(limit: Limit) -> str:
    if isinstance(limit, Concurrency):
        return "concurrency"
    return "rate" if isinstance(limit, Rate) else "quota"


def _plain_band(band: Band) -> Plain:
    found: Plain = {"name": band.name}
    if band.min_share:
        found["min_share"] = band.min_share
    if band.headroom:
        found["headroom"] = band.headroom
    return found


def _bands(value: object, strict: bool) -> tuple[Band, ...]:
    if value is None:
        return DEFAULT_BANDS
    if not isinstance(value, list):
        raise ConfigError("bands", _shown(value), "must be a list of tables, [[bands]]")
    found = []
    for place, band in enumerate(value):
        path = f"bands[{place}]"
        table = _table(path, band)
        if strict:
            check_keys(path, table, ("name", "min_share", "headroom"))
        name = _typed(f"{path}.name", table.get("name", ""), str)
        if not name:
            raise ConfigError(f"{path}.name", "(not set)", "must be a text")
        shares = {}
        for key in ("min_share", "headroom"):
            share = table.get(key, 0.0)
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise ConfigError(f"{path}.{key}", _shown(share), "must be a number from 0 to 0.9")
            shares[key] = float(share)
        found.append(Band(name, **shares))
    return tuple(found)


def _pool(table: Mapping[str, Any], strict: bool) -> Plain:
    if strict:
        check_keys("pool", table, tuple(_POOL_TYPES))
    found = {}
    for name, kind in _POOL_TYPES.items():
        if name in table:
            found[name] = _typed(f"pool.{name}", table[name], kind)
            if name in _CHOICES and table[name] not in _CHOICES[name]:
                allowed = f"must be one of {', '.join(_CHOICES[name])}"
                raise ConfigError(f"pool.{name}", table[name], allowed)
    return found


def _built(**named: Any) -> PoolPolicy:
    """A PoolPolicy; its own complaints get the path that they have in the file."""
    make: Callable[..., PoolPolicy] = PoolPolicy
    try:
        return make(**named)
    except ConfigError as wrong:
        key = wrong.variable
        if ":" in key:
            key = f"limits.{key}"
        elif key in _POOL_TYPES:
            key = f"pool.{key}"
        raise ConfigError(key, wrong.value, wrong.allowed) from None


def _table(path: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(path, _shown(value), "must be a table")
    return value


def check_keys(path: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raises ConfigError, naming all that are known, for a key that is not."""
    for key in table:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(where, _shown(table[key]), f"is not known; known: {', '.join(known)}")


def _typed(path: str, value: object, kind: type) -> Any:
    if not isinstance(value, kind) and not (kind is dict and isinstance(value, Mapping)):
        raise ConfigError(path, _shown(value), f"must be {_WORDS[kind]}")
    if isinstance(value, bool) and kind is not bool:
        raise ConfigError(path, _shown(value), f"must be {_WORDS[kind]}")
    return value


def _shown(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."
