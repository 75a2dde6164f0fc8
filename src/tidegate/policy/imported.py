"""Import of a provider's account limits, and acceptance of learned ones, as policy changes.

A class of models with common limits becomes one limit per scope. Its name is a pattern such as
`claude-opus-4*` if one matches the class and no other model of the account, else the names of the
models separated by commas. Limits that a person set are kept unless they are to be replaced; limits
of an earlier import that the account no longer has are removed.

Pure. Invariant: two imports of the same limits make the same change, whatever their order.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidegate.errors import ConfigError, NotFound
from tidegate.limiter import Unit
from tidegate.policy.format import (
    MEASURES,
    Edit,
    Plain,
    is_in_group,
    limit_of,
    plain_limit,
    source_of,
    subject_of,
)
from tidegate.policy.learned import AZURE_SPANS, LearnedLimit
from tidegate.policy.providers import filled

_LONGEST_NAME = 200
# The date of a snapshot: gpt-4o-2024-08-06, claude-haiku-4-5-20251001.
_DATE = re.compile(r"-2\d{3}-?\d\d-?\d\d$")
# A pattern must name at least a family, such as claude-opus.
_LEAST_PARTS = 2
_EQUIVALENT: Mapping[str, str] = {"uncached_input_tokens": "input_tokens"}


@dataclass(frozen=True, slots=True)
class ModelClass:
    """Models of an account with common limits.

    bounds: by the scope of a limit, such as `rpm`. units: of scopes that count an unusual unit.
    pattern: the name of the class; "" if it is to be derived.
    """

    models: tuple[str, ...]
    bounds: Mapping[str, int]
    units: Mapping[str, Unit] = field(default_factory=dict)
    pattern: str = ""


@dataclass(frozen=True, slots=True)
class LimitImport:
    """The changes of an import.

    kept: limits that a person set, with the bound that the provider reports.
    """

    set: Mapping[str, Plain]
    remove: tuple[str, ...]
    kept: Mapping[str, int]

    @property
    def edit(self) -> Edit:
        def change(plain: Plain) -> Plain:
            limits = {
                name: value
                for name, value in plain.get("limits", {}).items()
                if name not in self.remove
            }
            return {**plain, "limits": limits | dict(self.set)}

        return change


def one_class_each(classes: Iterable[ModelClass], shared: Sequence[str]) -> list[ModelClass]:
    """Return `classes` with those joined that share limits.

    Snapshots with equal limits join their model. All models that match one of the patterns `shared`
    are one class, with the lowest bound of each scope. Raises ConfigError for a pattern without
    models.
    """
    found: dict[tuple[str, Any], ModelClass] = {}
    matched: set[str] = set()
    for one in classes:
        pattern = next((each for each in shared if _all_match(one.models, each)), "")
        if pattern:
            matched.add(pattern)
        stem = _DATE.sub("", one.models[0]) if len(one.models) == 1 else one.models[0]
        key = (pattern, None) if pattern else (stem, tuple(sorted(one.bounds.items())))
        found[key] = joined_class(found[key], one) if key in found else _named(one, pattern)
    for pattern in shared:
        if pattern not in matched:
            raise ConfigError("--shared", pattern, "must match models of the account")
    return list(found.values())


def _all_match(models: Iterable[str], pattern: str) -> bool:
    return all(is_in_group(model, pattern) for model in models)


def _named(one: ModelClass, pattern: str) -> ModelClass:
    return ModelClass(one.models, one.bounds, one.units, pattern or one.pattern)


def joined_class(one: ModelClass, other: ModelClass) -> ModelClass:
    """Return a class of the models of both, with the lower bound of each scope."""
    bounds = dict(one.bounds)
    for scope, bound in other.bounds.items():
        bounds[scope] = min(bound, bounds.get(scope, bound))
    models = tuple(dict.fromkeys((*one.models, *other.models)))
    return ModelClass(models, bounds, {**other.units, **one.units}, one.pattern)


def limits_of(classes: Sequence[ModelClass], provider: str) -> dict[str, Plain]:
    """Return limits by id, as the provider counts them.

    Classes without bounds have none; their models are matched by no pattern of another class. Of a
    class that the provider lists twice the lower bound counts.
    Raises ConfigError for a class with more names than an id can have.
    """
    all_models = {model for one in classes for model in one.models}
    found: dict[str, Any] = {}
    for one in (each for each in classes if each.bounds):
        name = one.pattern or class_name(one.models, all_models.difference(one.models))
        for scope, bound in one.bounds.items():
            limit_id = f"{scope}:{name}"
            if limit_id in found and found[limit_id]["bound"] <= bound:
                continue
            value = filled({limit_id: {"bound": bound, "source": "imported"}}, provider)[limit_id]
            found[limit_id] = {
                **value,
                **({"unit": one.units[scope]} if scope in one.units else {}),
            }
    return found


def class_name(models: Sequence[str], others: Iterable[str]) -> str:
    """Return a model, a pattern of all `models` that no other matches, or comma-separated names."""
    others = tuple(others)
    if len(models) == 1:
        return models[0]
    pattern = _common_pattern(models)
    if pattern and not any(is_in_group(other, pattern) for other in others):
        return pattern
    names: dict[str, None] = {}
    for model in sorted(models):
        stem = _DATE.sub("", model)
        snapshots = f"{stem}-2*"
        is_one_of_several = stem != model and not any(is_in_group(o, snapshots) for o in others)
        names[snapshots if is_one_of_several else model] = None
    name = ",".join(names)
    if len(name) > _LONGEST_NAME:
        allowed = f"is a class of {len(models)} models: name it by --shared PATTERN"
        raise ConfigError("import", models[0], allowed)
    return name


def _common_pattern(models: Sequence[str]) -> str:
    """Return a pattern of the hyphenated parts that all names begin with; "" if too few."""
    parts = [model.split("-") for model in models]
    common = []
    for at in zip(*parts, strict=False):
        if len(set(at)) > 1:
            break
        common.append(at[0])
    if len(common) < _LEAST_PARTS:
        return ""
    prefix = "-".join(common)
    is_prefix = all(model.startswith(f"{prefix}-") for model in models)
    return f"{prefix}-*" if is_prefix else f"{prefix}*"


def import_of(
    imported: Mapping[str, Plain], now: Mapping[str, Any], *, replace: bool = False
) -> LimitImport:
    """Return the change from the limits `now` to those that the provider reported.

    `replace`: replace limits that a person set too.
    """
    of_people = {_measured(name): name for name, value in now.items() if source_of(value) == "set"}
    set_: dict[str, Plain] = {}
    unchanged, remove = {}, []
    for name, value in imported.items():
        own = of_people.get(_measured(name))
        if own is None or replace:
            if now.get(name) != plain_limit(name, limit_of(name, value)):
                set_[name] = value
            if own is not None and own != name:
                remove.append(own)
        else:
            unchanged[own] = value["bound"]
    remove += [
        name
        for name, value in now.items()
        if source_of(value) == "imported" and name not in imported
    ]
    return LimitImport(set_, tuple(remove), unchanged)


def _measured(limit_id: str) -> tuple[str | None, str, int | None]:
    """Return whom a limit applies to, what it counts and for how long; cached input is input."""
    measure = MEASURES.get(limit_id.partition(":")[0])
    if measure is None:
        return limit_id, "", None
    return subject_of(limit_id), _EQUIVALENT.get(measure.unit, measure.unit), measure.window_ms


def acceptance(found: Iterable[LearnedLimit], names: Collection[str], provider: str) -> Edit:
    """Return the change that puts learned bounds in force.

    It is of the limits `names`, or of all that differ if there are none. The other options of a
    limit in force stay. Raises NotFound for a limit that was not learned, and if none differs.
    """
    known = {one.limit: one for one in found}
    for name in names:
        if name not in known:
            raise NotFound(f"nothing was learned about a limit {name}")
    chosen = [one for one in known.values() if one.limit in names or not names]
    differing = [one for one in chosen if one.drift != "same"]
    if not differing:
        raise NotFound("no limit in force differs from the learned one")
    return lambda plain: {**plain, "limits": _with_learned(plain["limits"], differing, provider)}


def _with_learned(limits: Plain, found: Iterable[LearnedLimit], provider: str) -> Plain:
    changed = dict(limits)
    for one in found:
        now = changed.get(one.limit)
        if isinstance(now, Mapping):
            changed[one.limit] = {**now, "bound": one.bound}
        elif now is not None:
            changed[one.limit] = one.bound
        elif one.in_force is None:  # else it was removed meanwhile
            spans = AZURE_SPANS if provider == "azure" and one.limit.startswith("rpm:") else 1
            value = {"bound": one.bound * spans, "source": "learned"}
            changed |= filled({one.limit: value}, provider)
    return changed
