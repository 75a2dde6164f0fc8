"""Formats of a policy: TOML, JSON, edits by key, ids of limits, text for a terminal. Pure.

    pool:total  kind:text_only  model:gemini-2.5-flash  tenant:acme        concurrent calls
    key:3fk9x2m1qa  user:acme/ann  conversation:acme/chat-1                 concurrent calls
    tif:llama-3.3-70b  tif:total                                            tokens in flight
    rpm:gemini-2.5-flash  tpm:total  rpd:kind/text_only  ipm:tenant/acme   a rate or a day's quota

The scope of a rate combines what it counts (`r` requests, `t` tokens, `it` input tokens, `uit`
input tokens that the provider did not read from its cache, `ot` output tokens, `i` images, `as`
seconds of audio, `usd` dollars) and its window (`ps` second, `pm` minute, `ph` hour, `pd` day,
which ends at midnight). Its name is a model, a pattern such as `claude-opus-4*`, or several with
commas (`gpt-4o,gpt-4o-2*`) whose models share the limit, `total`, `kind/<kind>`, `tenant/<tenant>`,
`key/<prefix>`, `user/<tenant>/<user>` or `conversation/<tenant>/<conversation>`. Users and
conversations belong to a tenant. Characters that an id can't have are escaped as in URLs: in names
of keys, users and conversations a space, | { } * , and %, and in their tenant's name / too.

Invariants: `of_plain(to_plain(policy))` is the policy; defaults are left out; a change for one
tenant does not affect another's.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

from tidegate.call import BATCH_KIND, CLASSIFIER_LIMIT, OTHER_KIND, REALTIME_KIND, Kind
from tidegate.errors import ConfigError, NotFound, PolicyChanged
from tidegate.limiter import (
    ADAPTS_BY,
    DEFAULT_BANDS,
    MAX_BOUND,
    MEASURES_OF_SHARES,
    RESERVES,
    SHAPES_OF_RATES,
    SOURCES,
    UNITS,
    UNITS_IN_FLIGHT,
    USUAL_WEIGHTS,
    Adaptive,
    Band,
    Concurrency,
    Limit,
    LimitView,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
    Unit,
    UnitInFlight,
    Weights,
    as_limit,
    format_amount,
    format_pause,
    format_span,
    format_unit,
    format_window,
)

# Limits on callers, with the form of their names.
_CALLERS = {
    "key": "<prefix>",
    "user": "<tenant>/<user>",
    "conversation": "<tenant>/<conversation>",
}
AT_ONCE = ("pool", "kind", "model", "tenant", *_CALLERS)
TOTAL = "total"
KIND_NAMES = (
    *(kind.value for kind in Kind),
    CLASSIFIER_LIMIT.partition(":")[2],
    OTHER_KIND,
    BATCH_KIND,
    REALTIME_KIND,
)
_MEASURES: dict[str, Unit] = {
    "r": "requests",
    "t": "tokens",
    "it": "input_tokens",
    "uit": "uncached_input_tokens",
    "ot": "output_tokens",
    "i": "images",
    "as": "audio_seconds",
    "usd": "usd",
}
_WINDOWS_MS = {"ps": 1_000, "pm": 60_000, "ph": 3_600_000}
_DAY = "pd"


@dataclass(frozen=True, slots=True)
class Measure:
    """What a scope counts. `window_ms` is None for a calendar day and for tokens in flight."""

    unit: Unit | UnitInFlight
    window_ms: int | None

    @property
    def sort(self) -> str:
        """The type of its limits."""
        if self.unit == "tokens_in_flight":
            return "concurrency"
        return "quota" if self.window_ms is None else "rate"


MEASURES = {
    f"{what}{how_long}": Measure(unit, window_ms)
    for what, unit in _MEASURES.items()
    for how_long, window_ms in (*_WINDOWS_MS.items(), (_DAY, None))
} | {"tif": Measure("tokens_in_flight", None)}


def subject_of(limit_id: str) -> str | None:
    """Return what a limit applies to: a model, `kind/<kind>`, `tenant/<tenant>`, `key/<prefix>`,
    `user/<tenant>/<user>`, `conversation/<tenant>/<conversation>` or `total`; None if to no call.
    """
    scope, _, name = limit_id.partition(":")
    if scope in MEASURES or scope == "model":
        return ",".join(map(plain_model, name.split(",")))
    if scope == "pool":
        return TOTAL if name == TOTAL else None
    return f"{scope}/{name}" if scope in AT_ONCE else None


def is_of_models(subject: str) -> bool:
    """Return whether `subject` is a model or several, rather than all calls, or those of a type,
    tenant, key, user or conversation. A client may name its model like one of these."""
    return subject != TOTAL and not subject.startswith(_NO_MODELS)


_OF_TENANTS = ("tenant/", *(f"{one}/" for one in _CALLERS))
_NO_MODELS = ("kind/", *_OF_TENANTS)
CallerName = tuple[str, ...]


def caller_of(limit_id: str) -> CallerName | None:
    """Return `("key", prefix)`, `("user", tenant, name)` or `("conversation", tenant, name)` for a
    limit on a key, user or conversation, unescaped; None for any other."""
    scope, _, name = limit_id.partition(":")
    kind, _, which = (name if scope in MEASURES else f"{scope}/{name}").partition("/")
    if kind not in _CALLERS:
        return None
    if kind == "key":
        return kind, unquote(which)
    tenant, _, own = which.partition("/")
    return kind, unquote(tenant), unquote(own)


def is_pattern(subject: str) -> bool:
    """Return whether a limit applies to a group of models: all that match `subject`."""
    return ("*" in subject or "," in subject) and is_of_models(subject)


def binds_model(subject: str | None, model: str) -> bool:
    """Return whether a limit on `subject` applies to a model, by its name or as one of a group."""
    if subject is None or not is_of_models(subject):
        return False
    return subject == model or (is_pattern(subject) and is_in_group(model, subject))


def is_in_group(model: str, subject: str) -> bool:
    """Return whether a model matches a pattern, or one of several separated by commas."""
    return any(fnmatchcase(model, one) for one in subject.split(","))


def can_be_limited(model: str) -> bool:
    """Return whether a limit's id can name this model alone: ids have no spaces, | { or }."""
    is_one = is_of_models(model) and not is_pattern(model)
    return is_one and _NO_LIMITS.binding(f"model:{model}") is not None


_NO_LIMITS = PoolPolicy({})


def plain_model(model: str) -> str:
    """Return a model's name without the prefix under which Gemini's API lists it."""
    return model.removeprefix("models/")


def check_id(limit_id: str) -> None:
    """Raise ConfigError for an id that no call of the product can fall under."""
    scope, _, name = limit_id.partition(":")
    if len(name) > _MOST_NAME_CHARS and (scope in MEASURES or scope in AT_ONCE):
        short = f"limits.{limit_id[:_SHOWN_CHARS]}..."
        allowed = f"must have at most {_MOST_NAME_CHARS} characters after {scope}:, not {len(name)}"
        raise ConfigError(short, None, allowed)
    if scope in MEASURES:
        _check_rate_name(limit_id, name)
    elif scope not in AT_ONCE:
        known = ", ".join((*AT_ONCE, "tif", "rpm", "tpm", "rpd"))
        raise ConfigError(
            f"limits.{limit_id}", None, f"has an unknown scope; known: {known} and the other rates"
        )
    elif scope == "pool" and name != TOTAL:
        raise ConfigError(f"limits.{limit_id}", None, f"is unknown; did you mean pool:{TOTAL}?")
    elif scope == "kind":
        _check_kind(limit_id, name)
    elif not name:
        raise ConfigError(f"limits.{limit_id}", None, f"must have a name after {scope}:")
    elif scope == "model" and not is_of_models(plain_model(name)):
        others = ", ".join(f"{one}:{named}" for one, named in _CALLERS.items())
        allowed = f"must name a model; others are pool:{TOTAL}, kind:<kind>, tenant:<tenant>, "
        raise ConfigError(f"limits.{limit_id}", None, f"{allowed}{others}")
    elif scope in _CALLERS:
        _check_caller(limit_id, scope, name, ":")
    if (subject := subject_of(limit_id)) is not None and is_of_models(subject):
        _check_models(limit_id, name)


_MOST_NAME_CHARS = 200  # the limiter's own bound
_SHOWN_CHARS = 60


def _check_models(limit_id: str, names: str) -> None:
    """Raise ConfigError if one of several names is empty or no model's."""
    for name in map(plain_model, names.split(",")):
        if not name or not is_of_models(name):
            allowed = f"must name models only, separated by commas, not {name!r}"
            raise ConfigError(f"limits.{limit_id}", None, allowed)


def _check_rate_name(limit_id: str, name: str) -> None:
    scope, slash, which = name.partition("/")
    is_folder_of_none = name.startswith("models/") and not is_of_models(plain_model(name))
    if not name or is_folder_of_none or (name.startswith(_NO_MODELS) and not which):
        others = ", ".join(f"{one}/{named}" for one, named in _CALLERS.items())
        allowed = f"must name a model, {TOTAL}, kind/<kind>, tenant/<tenant>, {others}"
        raise ConfigError(f"limits.{limit_id}", None, allowed)
    if slash and scope == "kind":
        _check_kind(limit_id, which)
    elif slash and scope in _CALLERS:
        _check_caller(limit_id, scope, which, "/")


_ESCAPED = re.compile(r"[\s|{},*]")


def _check_caller(limit_id: str, scope: str, name: str, mark: str) -> None:
    """Raise ConfigError for a name that is not one key, user or conversation."""
    path, (tenant, _, own) = f"limits.{limit_id}", name.partition("/")
    if scope == "key" and name.startswith("tg_"):
        raise ConfigError(path, None, "must name a key by its prefix alone, without tg_")
    if scope != "key" and not (tenant and own):
        raise ConfigError(path, None, f"must be {scope}{mark}{_CALLERS[scope]}")
    if name.endswith("*"):
        allowed = f"must name one {scope}; a budget with `each` bounds the cost of every one. One "
        raise ConfigError(path, None, f"{allowed}whose name has a *: %2A")
    if (found := _ESCAPED.search(name)) is not None:
        letter = f"%{ord(found[0]):02X}" if found[0].isascii() else "escaped"
        raise ConfigError(path, None, f"must name one {scope}, with {found[0]!r} written {letter}")


def check_tenants(limits: Iterable[str]) -> None:
    """Raise ConfigError for a limit, of a file or a person's change, that names several tenants: it
    would apply to one tenant of that literal name. Such a tenant's existing limits are no mistake.
    """
    for limit_id in limits:
        scope, _, name = limit_id.partition(":")
        tenant = name if scope == "tenant" else name.removeprefix("tenant/")
        is_of_one = scope == "tenant" or (scope in MEASURES and tenant != name)
        if is_of_one and ("*" in tenant or "," in tenant):
            allowed = (
                "must name one tenant, since each has a limit of its own (tenant:acme, "
                "rpm:tenant/acme); [weights] share what all use, and a budget with `each` bounds "
                f"every tenant's cost. One that is called {tenant}: tidegate tenants set"
            )
            raise ConfigError(f"limits.{limit_id}", None, allowed)


def _check_kind(limit_id: str, name: str) -> None:
    if name not in KIND_NAMES:
        allowed = f"has an unknown type {name!r}; known: {', '.join(KIND_NAMES)}"
        raise ConfigError(f"limits.{limit_id}", None, allowed)


Plain = dict[str, Any]

_CHOICES = {
    "when_away": ("closed", "local"),
    "on_lost": ("finish", "cancel"),
    "on_expiry": ("reuse", "hold"),
    "fair_by": MEASURES_OF_SHARES,
}
_POOL_TYPES: dict[str, type] = {
    "lease_ms": int,
    "when_away": str,
    "on_lost": str,
    "on_expiry": str,
    "queue_per_tenant": int,
    "reap_closed_ms": int,
    "hand_off": bool,
    "fair_by": str,
}
_POOL_DEFAULTS = {one.name: one.default for one in fields(PoolPolicy) if one.name in _POOL_TYPES}
assert MISSING not in _POOL_DEFAULTS.values()
SECTIONS = ("limits", "weights", "bands", "pool")
_SORTS = ("concurrency", "rate", "quota")
_COUNTED: dict[str, type] = {
    "bound": int,
    "shadow": bool,
    "unit": str,
    "weights": dict,
    "reserve": str,
    "settles": bool,
    "source": str,
}
_KEYS: dict[str, dict[str, type]] = {
    "concurrency": {"bound": int, "shadow": bool, "adaptive": dict, "unit": str, "reserve": str},
    "rate": _COUNTED
    | {"window_ms": int, "slack_ms": int, "pace_ms": int, "ramp": dict, "shape": str},
    "quota": _COUNTED | {"zone": str},
}
_MOST_USD = MAX_BOUND // 1_000_000
_PARTS = tuple(one.name for one in fields(Weights))
_WORDS = {int: "a whole number", bool: "true or false", str: "a text", dict: "a table"}


def to_plain(policy: PoolPolicy) -> Plain:
    """Return the policy as plain values, without its revision."""
    found: Plain = {
        "limits": {name: plain_limit(name, policy.rules[name]) for name in sorted(policy.rules)}
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
    """Return the policy that `plain` describes.

    `strict` rejects unknown keys and limits that no call can fall under; otherwise such keys are
    ignored and such limits kept, since a record may be of a later version. Raises ConfigError."""
    if strict:
        check_keys("", plain, SECTIONS)
    limits = {
        str(name): limit_of(str(name), value, strict=strict)
        for name, value in table_at("limits", plain.get("limits", {})).items()
    }
    weights = table_at("weights", plain.get("weights", {}))
    for tenant, weight in weights.items():
        _typed(f"weights.{tenant}", weight, int)
    return _built(
        limits=limits,
        weights=dict(weights),
        bands=_bands(plain.get("bands"), strict),
        revision=revision,
        **_pool(table_at("pool", plain.get("pool", {})), strict),
    )


def digest(plain: Mapping[str, Any]) -> str:
    """Return a digest that is equal for equal policies, whatever their order and revision."""
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def plain_limit(limit_id: str, limit: int | Limit) -> int | float | Plain:
    """Return a limit as a number if its scope implies all else, otherwise as a table."""
    if isinstance(limit, int):
        limit = Concurrency(limit)
    measure = MEASURES.get(limit_id.partition(":")[0])
    found: Plain = {"bound": limit.bound}
    if limit.unit == "usd":
        found["bound"] = _dollars(limit.bound)
    if _sort_of(limit_id) != (sort := _sort(limit)):
        found["type"] = sort
    if limit.shadow:
        found["shadow"] = True
    if isinstance(limit, Concurrency):
        if limit.adaptive is not None:
            found["adaptive"] = {"minimum": limit.adaptive.minimum}
            if limit.adaptive.by != "refusals":
                found["adaptive"]["by"] = limit.adaptive.by
        if limit.unit != _unit_in_flight(limit_id):
            found["unit"] = limit.unit
        if limit.reserve != "predicted":
            found["reserve"] = limit.reserve
        return found if len(found) > 1 else limit.bound
    if limit.unit != (measure.unit if measure else "requests"):
        found["unit"] = limit.unit
    found |= _plain_counting(limit)
    if isinstance(limit, Quota):
        if limit.zone != Quota.__dataclass_fields__["zone"].default:
            found["zone"] = limit.zone
    else:
        if measure is None or limit.window_ms != measure.window_ms:
            found["window_ms"] = limit.window_ms
        if limit.slack_ms is not None:
            found["slack_ms"] = limit.slack_ms
        if limit.pace_ms is not None:
            found["pace_ms"] = limit.pace_ms
        if limit.ramp is not None:
            found["ramp"] = asdict(limit.ramp)
        if limit.shape != "window":
            found["shape"] = limit.shape
    return found if len(found) > 1 else found["bound"]


def _plain_counting(limit: Rate | Quota) -> Plain:
    found: Plain = {}
    if limit.weights is not None and limit.weights != (usual := USUAL_WEIGHTS[limit.unit]):
        found["weights"] = {
            part: weight
            for part in _PARTS
            if (weight := getattr(limit.weights, part)) != getattr(usual, part)
        }
    if limit.reserve != "predicted":
        found["reserve"] = limit.reserve
    if not limit.settles:
        found["settles"] = False
    if limit.source != "set":
        found["source"] = limit.source
    return found


def limit_of(limit_id: str, value: object, *, strict: bool = True) -> int | Limit:
    """Return the limit: the inverse of `plain_limit`. Raises ConfigError with the path of the
    key."""
    path = f"limits.{limit_id}"
    if strict:
        check_id(limit_id)
    is_money = _unit_of(limit_id) == "usd" and isinstance(value, float)
    if (isinstance(value, int) and not isinstance(value, bool)) or is_money:
        value = {"bound": value}
    elif not isinstance(value, Mapping):
        raise ConfigError(path, _short(value), "must be a whole number or a table")
    sort = value.get("type", _sort_of(limit_id))
    if sort not in _SORTS:
        raise ConfigError(f"{path}.type", _short(sort), f"must be one of {', '.join(_SORTS)}")
    if strict:
        check_keys(path, value, ("type", *_KEYS[sort]))
    if "bound" not in value:
        raise ConfigError(f"{path}.bound", "(not set)", "must be a whole number")
    if sort != "concurrency" and value.get("unit", _unit_of(limit_id)) == "usd":
        value = {**value, "bound": _micros(f"{path}.bound", value["bound"])}
    values = {
        key: _typed(f"{path}.{key}", value[key], kind)
        for key, kind in _KEYS[sort].items()
        if key in value
    }
    limit = _limit(sort, limit_id, values, strict)
    return limit.bound if limit == Concurrency(limit.bound) else limit


def _limit(sort: str, limit_id: str, values: Plain, strict: bool) -> Limit:
    path = f"limits.{limit_id}"
    if sort == "concurrency":
        values.setdefault("unit", _unit_in_flight(limit_id))
        adaptive = values.pop("adaptive", None)
        if adaptive is None:
            return Concurrency(**values)
        if strict:
            check_keys(f"{path}.adaptive", adaptive, ("minimum", "by"))
        minimum = _typed(f"{path}.adaptive.minimum", adaptive.get("minimum", 1), int)
        by = adaptive.get("by", ADAPTS_BY[0])
        if by not in ADAPTS_BY:
            allowed = f"must be one of {', '.join(ADAPTS_BY)}"
            raise ConfigError(f"{path}.adaptive.by", _short(by), allowed)
        return Concurrency(**values, adaptive=Adaptive(minimum, by))
    measure = MEASURES.get(limit_id.partition(":")[0])
    values.setdefault("unit", measure.unit if measure else "requests")
    if values["unit"] not in UNITS:
        raise ConfigError(f"{path}.unit", values["unit"], f"must be one of {', '.join(UNITS)}")
    if values.get("reserve", RESERVES[0]) not in RESERVES:
        allowed = f"must be one of {', '.join(RESERVES)}"
        raise ConfigError(f"{path}.reserve", values["reserve"], allowed)
    if values.get("source", SOURCES[0]) not in SOURCES:
        allowed = f"must be one of {', '.join(SOURCES)}"
        raise ConfigError(f"{path}.source", values["source"], allowed)
    if "weights" in values:
        values["weights"] = _weights(f"{path}.weights", values["unit"], values["weights"], strict)
    if sort == "quota":
        return Quota(**values)
    if values.get("shape", SHAPES_OF_RATES[0]) not in SHAPES_OF_RATES:
        allowed = f"must be one of {', '.join(SHAPES_OF_RATES)}"
        raise ConfigError(f"{path}.shape", values["shape"], allowed)
    if "ramp" in values:
        values["ramp"] = _ramp(f"{path}.ramp", values["ramp"], strict)
    values.setdefault("window_ms", measure.window_ms if measure else None)
    if values["window_ms"] is None:
        raise ConfigError(f"{path}.window_ms", "(not set)", "must be a whole number")
    return Rate(**values)


def _unit_in_flight(limit_id: str) -> UnitInFlight:
    """Return what a concurrency limit counts if it does not state that itself."""
    unit = _unit_of(limit_id)
    return unit if unit == "tokens_in_flight" else UNITS_IN_FLIGHT[0]


def _unit_of(limit_id: str) -> Unit | UnitInFlight | None:
    measure = MEASURES.get(limit_id.partition(":")[0])
    return measure.unit if measure else None


def _micros(path: str, value: object) -> int:
    """Return dollars as whole millionths."""
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if not sound or not 0 <= value <= _MOST_USD:  # type: ignore[operator]
        allowed = f"must be a number of dollars from 0 to {_MOST_USD}"
        raise ConfigError(path, _short(value), allowed)
    return round(value * 1_000_000)  # type: ignore[operator]


def _dollars(micros: int) -> int | float:
    whole, rest = divmod(micros, 1_000_000)
    return micros / 1_000_000 if rest else whole


def _weights(path: str, unit: str, table: Plain, strict: bool) -> Weights | None:
    """Return the weights of a unit as changed by `table`; None if they are the usual ones."""
    usual = USUAL_WEIGHTS.get(unit)
    if usual is None:
        raise ConfigError(path, unit, f"only where `unit` is one of {', '.join(USUAL_WEIGHTS)}")
    if strict:
        check_keys(path, table, _PARTS)
    changed = replace(usual, **{part: table[part] for part in _PARTS if part in table})
    return None if changed == usual else changed


def _ramp(path: str, table: Plain, strict: bool) -> Ramp:
    names = tuple(one.name for one in fields(Ramp))
    if strict:
        check_keys(path, table, names)
    for name in names:
        _typed(f"{path}.{name}", table.get(name, "(not set)"), int)
    return Ramp(**{name: table[name] for name in names})


def _sort_of(limit_id: str) -> str:
    measure = MEASURES.get(limit_id.partition(":")[0])
    return "concurrency" if measure is None else measure.sort


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
        raise ConfigError("bands", _short(value), "must be a list of tables, [[bands]]")
    found = []
    for place, band in enumerate(value):
        path = f"bands[{place}]"
        table = table_at(path, band)
        if strict:
            check_keys(path, table, ("name", "min_share", "headroom"))
        name = _typed(f"{path}.name", table.get("name", ""), str)
        if not name:
            raise ConfigError(f"{path}.name", "(not set)", "must be a text")
        shares = {}
        for key in ("min_share", "headroom"):
            share = table.get(key, 0.0)
            if isinstance(share, bool) or not isinstance(share, int | float):
                raise ConfigError(f"{path}.{key}", _short(share), "must be a number from 0 to 0.9")
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
    """Return a PoolPolicy; its errors get the path of the key in the file."""
    make: Callable[..., PoolPolicy] = PoolPolicy
    try:
        return make(**named)
    except ConfigError as error:
        key = error.variable
        if ":" in key:
            key = f"limits.{key}"
        elif key in _POOL_TYPES:
            key = f"pool.{key}"
        raise ConfigError(key, error.value, error.allowed) from None


def table_at(path: str, value: object) -> Mapping[str, Any]:
    """Return `value`, which must be a table. Raises ConfigError with its path."""
    if not isinstance(value, Mapping):
        raise ConfigError(path, _short(value), "must be a table")
    return value


def check_keys(path: str, table: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Raise ConfigError, which lists the known keys, for a key that is not among them."""
    for key in table:
        if key not in known:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(where, None, unknown(str(key), known))


def unknown(name: str, known: Collection[str]) -> str:
    """Return the end of an error about an unknown name: the closest known one, then all of them."""
    close = get_close_matches(name, known, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"is unknown; {meant}known: {', '.join(known)}"


def _typed(path: str, value: object, kind: type) -> Any:
    if not isinstance(value, kind) and not (kind is dict and isinstance(value, Mapping)):
        raise ConfigError(path, _short(value), f"must be {_WORDS[kind]}")
    if isinstance(value, bool) and kind is not bool:
        raise ConfigError(path, _short(value), f"must be {_WORDS[kind]}")
    return value


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


_SECTIONS = ("limits", "weights", "pool")
Edit = Callable[[Plain], Plain]


def edit(
    set_: Mapping[str, Any], remove: Iterable[str] = (), expected: Mapping[str, Any] | None = None
) -> Edit:
    """Return a change that sets and removes keys, if the policy has the `expected` values.

    Called on a policy, it raises PolicyChanged if an expected value differs, NotFound for a key to
    remove that does not exist, and ConfigError for an invalid key, one named twice, or the removal
    of a kind's limit, which every call needs. Values are validated when the policy is read. An
    imported or learned limit becomes the person's, unless the change gives it another source."""
    removed = list(remove)

    def change(plain: Plain) -> Plain:
        named = Counter(
            key if key == "bands" else ".".join(_place(key)) for key in (*set_, *removed)
        )
        for key, times in named.items():
            if times > 1:
                raise ConfigError(
                    key, None, "must be named once: it is set to one value, or removed"
                )
        _check(plain, expected or {})
        changed = deepcopy(plain)
        for key in removed:
            section, name = _place(key)
            if name.startswith("kind:"):
                allowed = "can't be removed: each type needs a limit; 0 admits no calls"
                raise ConfigError(key, None, allowed)
            if name not in changed.get(section, {}):
                raise NotFound(f"there is no {section}.{name}")
            del changed[section][name]
        for key, value in set_.items():
            if key == "bands":
                changed["bands"] = value
                continue
            section, name = _place(key)
            if section == "limits" and name not in plain.get(section, {}):
                check_tenants([name])
            before = plain.get(section, {}).get(name)
            changed.setdefault(section, {})[name] = _of_a_person(value, before)
        return changed

    return change


def _of_a_person(value: Any, before: object) -> Any:
    """Return `value` without its source if that only repeats the source of the limit `before`."""
    if not isinstance(value, Mapping) or not isinstance(before, Mapping) or value == before:
        return value
    if value.get("source") != before.get("source"):
        return value
    return {key: one for key, one in value.items() if key != "source"}


def _check(plain: Plain, expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        section, name = _place(key)
        if (now := plain.get(section, {}).get(name)) != value:
            raise PolicyChanged(f"{section}.{name}", now)


def _place(key: str) -> tuple[str, str]:
    """Return the section of a key and the name in it."""
    if ":" in key.partition(".")[0]:
        return "limits", key
    section, _, name = key.partition(".")
    if section not in _SECTIONS or not name:
        allowed = "must be a limit's id, weights.<tenant>, pool.<option> or bands"
        raise ConfigError(key, None, allowed)
    return section, name


__all__ = ["format_pause", "format_span", "in_words", "ms_of"]

_SPAN = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>ms|s|m|h|d)")
_UNITS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def in_words(limit: int | Limit) -> str:
    """Return a text such as `60 requests a minute` or `1,000,000 input tokens a day (UTC)`."""
    limit = as_limit(limit)
    if isinstance(limit, Concurrency) and limit.by_tokens:
        text = _amount(limit)
        if limit.reserve == "bound":
            text += ", all that it may use at the start"
    elif isinstance(limit, Concurrency):
        text = f"{limit.bound:,} concurrent"
        if limit.adaptive is not None:
            text += f", adapts itself from {limit.adaptive.minimum}"
            text += " by the time to first tokens" if limit.by_latency else ""
    else:
        text = f"{_amount(limit)} {format_window(limit)}"
        if isinstance(limit, Quota):
            text += f" ({limit.zone})"
        text = ", ".join((text, *_counting_in_words(limit)))
    return f"{text}, only counted" if limit.shadow else text


def _amount(limit: Limit) -> str:
    is_money = limit.unit == "usd"
    return (
        format_amount(limit, limit.bound) if is_money else f"{limit.bound:,} {format_unit(limit)}"
    )


def pause_in_words(paused_by: str, paused_ms: float) -> str:
    """Return text such as `paused by ann, for 10 min more`. A refusal's pause is by the provider's
    message, which may end with a full stop."""
    name = paused_by.rstrip(".,;: \n")
    return f"paused{f' by {name},' if name else ''} {left_in_words(paused_ms)}"


def left_in_words(paused_ms: float) -> str:
    """Return text such as `for 10 min more`; an expired pause lasts until a probe is answered."""
    return "until a call there is answered" if paused_ms <= 1 else format_pause(paused_ms)


def usage_in_words(view: LimitView) -> str:
    """Return text such as `rpm:m: 1,000 of 1,000 are spent, room in 3 s`."""
    if view.sort == "c":
        return f"{view.limit}: {view.used:,} of {view.current:,} are in use"
    spent, bound = f"{view.used:,}", f"{view.bound:,}"
    measure = MEASURES.get(view.limit.partition(":")[0])
    if measure is not None and measure.unit == "usd":
        spent, bound = (f"${amount / 1_000_000:,.2f}" for amount in (view.used, view.bound))
    room = f", room in {format_span(view.room_in_ms)}" if view.room_in_ms else ""
    return f"{view.limit}: {spent} of {bound} are spent{room}"


def _counting_in_words(limit: Rate | Quota) -> Iterator[str]:
    if limit.weights is not None:
        usual = USUAL_WEIGHTS[limit.unit]
        for part in _PARTS:
            weight = getattr(limit.weights, part)
            if weight != getattr(usual, part):
                yield f"{part.replace('_', ' ')} x {weight:g}"
    if limit.reserve == "bound":
        yield "all that it may use at the start"
    elif limit.reserve == "max_tokens":
        yield "max_tokens at the start"
    elif limit.reserve == "larger":
        yield "input or max_tokens at the start"
    if not limit.settles:
        yield "nothing returned"
    if isinstance(limit, Rate) and limit.shape == "bucket":
        yield "refilled evenly"
    if isinstance(limit, Rate) and limit.pace_ms is not None:
        yield f"evenly over {format_span(limit.pace_ms)}"
    if isinstance(limit, Rate) and limit.ramp is not None:
        ramp = limit.ramp
        yield f"from {ramp.start} up by {ramp.percent_per_minute} % a minute"


def ms_of(text: str) -> float | None:
    """Return `500ms`, `30s`, `10m`, `2h` or `1d` in milliseconds; None for anything else."""
    found = _SPAN.fullmatch(text.strip())
    return None if found is None else float(found["number"]) * _UNITS_MS[found["unit"]]


def is_of(limit_id: str, tenant: str) -> bool:
    """Return whether a limit is this tenant's: `tenant:acme`, or a rate such as
    `rpm:tenant/acme`."""
    scope, _, name = limit_id.partition(":")
    return limit_id == f"tenant:{tenant}" or (scope in MEASURES and name == f"tenant/{tenant}")


def source_of(value: object) -> str:
    """Return the source of a limit: `set` by a person, `imported` or `learned`."""
    return str(value.get("source", SOURCES[0])) if isinstance(value, Mapping) else SOURCES[0]


def without_tenants(plain: Plain) -> Plain:
    """Return a policy without weights, without limits on one tenant, key, user or conversation, and
    without limits that no person set."""
    limits = {
        name: one for name, one in plain.get("limits", {}).items() if not _is_independent(name, one)
    }
    return {**{key: one for key, one in plain.items() if key != "weights"}, "limits": limits}


def with_tenants(policy: Plain, now: Plain, before: Plain | None = None) -> Plain:
    """Return `policy` with tenants' limits and weights, and imported or learned limits, from `now`
    that it does not name. `before`: the deployment in force; what equals it was set by no one else.
    """
    known = (before or {}).get("limits", {})
    own = {
        name: one
        for name, one in now.get("limits", {}).items()
        if _is_independent(name, one) and known.get(name) != one
    }
    both = {**policy, "limits": own | policy.get("limits", {})}
    known = (before or {}).get("weights", {})
    extra = {name: one for name, one in now.get("weights", {}).items() if known.get(name) != one}
    if weights := extra | policy.get("weights", {}):
        both["weights"] = weights
    return both


def _is_independent(limit_id: str, value: object) -> bool:
    """Return whether a limit is independent of deployments: one on a tenant, key, user or
    conversation, or one that no person set."""
    return source_of(value) != SOURCES[0] or is_of_tenant(limit_id)


def is_of_tenant(limit_id: str) -> bool:
    """Return whether a limit is on a tenant, or on a key, user or conversation."""
    scope, _, name = limit_id.partition(":")
    is_rate_of_one = scope in MEASURES and name.startswith(_OF_TENANTS)
    return scope == "tenant" or scope in _CALLERS or is_rate_of_one
