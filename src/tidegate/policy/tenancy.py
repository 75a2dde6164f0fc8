"""What of a pool's policy is one tenant's: its weight, and the limits that bind it alone. Pure.

Invariant: a change for one tenant touches nothing of another's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tidegate.errors import ConfigError
from tidegate.policy.edits import Edit
from tidegate.policy.plain import Plain
from tidegate.policy.scopes import MEASURES

MOST_WEIGHT = 1_000


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's part of the policy. `weight` 1 is what tenants have that are not named."""

    weight: int
    limits: dict[str, Any]


def share_of(plain: Mapping[str, Any], tenant: str) -> Share:
    limits = plain.get("limits", {})
    own = {name: value for name, value in limits.items() if is_of(name, tenant)}
    return Share(plain.get("weights", {}).get(tenant, 1), own)


def is_of(limit_id: str, tenant: str) -> bool:
    """Whether a limit binds this tenant: `tenant:acme`, or a rate such as `rpm:tenant/acme`."""
    scope, _, name = limit_id.partition(":")
    return limit_id == f"tenant:{tenant}" or (scope in MEASURES and name == f"tenant/{tenant}")


def apart_from_tenants(plain: Plain) -> Plain:
    """A policy without weights and without limits that bind one tenant alone."""
    limits = {name: one for name, one in plain.get("limits", {}).items() if not _is_of_one(name)}
    return {**{key: one for key, one in plain.items() if key != "weights"}, "limits": limits}


def with_tenants(wanted: Plain, now: Plain) -> Plain:
    """`wanted`, and what tenants have now that it does not name."""
    own = {name: one for name, one in now.get("limits", {}).items() if _is_of_one(name)}
    both = {**wanted, "limits": own | wanted.get("limits", {})}
    if weights := now.get("weights", {}) | wanted.get("weights", {}):
        both["weights"] = weights
    return both


def _is_of_one(limit_id: str) -> bool:
    scope, _, name = limit_id.partition(":")
    return scope == "tenant" or (scope in MEASURES and name.startswith("tenant/"))


def share_edit(
    tenant: str,
    *,
    weight: int | None = None,
    limits: Mapping[str, Any] | None = None,
    remove: Iterable[str] = (),
) -> Edit | None:
    """The change of what is given, None where nothing is; a limit of None is removed.

    A limit that is removed need not be there. Raises ConfigError for a limit that is not of this
    tenant; whether its value is sound is seen when the policy is read.
    """
    set_ = {name: value for name, value in (limits or {}).items() if value is not None}
    gone = [*remove, *(name for name, value in (limits or {}).items() if value is None)]
    for name in (*set_, *gone):
        if not is_of(name, tenant):
            allowed = f"must be tenant:{tenant} or a rate such as rpm:tenant/{tenant}"
            raise ConfigError(f"limits.{name}", name, allowed)
    if weight is not None and not 1 <= weight <= MOST_WEIGHT:
        allowed = f"must be a whole number from 1 to {MOST_WEIGHT}"
        raise ConfigError(f"weights.{tenant}", str(weight), allowed)
    if weight is None and not set_ and not gone:
        return None

    def change(plain: Plain) -> Plain:
        kept = {name: one for name, one in plain.get("limits", {}).items() if name not in gone}
        changed = {**plain, "limits": kept | set_}
        if weight is not None:
            changed["weights"] = {**plain.get("weights", {}), tenant: weight}
        return changed

    return change


def without(tenant: str) -> Edit:
    """The change that takes all of a tenant away."""

    def change(plain: Plain) -> Plain:
        limits = plain.get("limits", {})
        weights = plain.get("weights", {})
        return {
            **plain,
            "limits": {name: one for name, one in limits.items() if not is_of(name, tenant)},
            "weights": {name: one for name, one in weights.items() if name != tenant},
        }

    return change
