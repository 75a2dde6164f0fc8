"""Tenants as people see and change them: their record and their part of the policy.

Invariant: a change is checked before any of it is made. It has two steps, first the policy's, then
the record's; repeating a change that was interrupted between them completes it.
"""

from __future__ import annotations

import hmac
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

from tidegate.call import OperatorRole
from tidegate.errors import ConfigError, NotFound, PolicyChanged
from tidegate.limiter import check_tenant
from tidegate.policy.format import MEASURES, Edit, Plain, caller_of, is_of, to_plain
from tidegate.policy.inspection import Control
from tidegate.policy.rollout import PolicyKeeper, edit_record
from tidegate.store.tenants import Key, Tenant, Tenants, check_changes

_WEBHOOK_PREFIX = "whsec_"
_OF_SHARE = ("weight", "limits")  # the parts of a tenant that are in the policy


@dataclass(frozen=True, slots=True)
class ShownTenant:
    """A tenant with its weight and its limits in the pool."""

    tenant: Tenant
    weight: int
    limits: dict[str, Any]


@dataclass(frozen=True, slots=True)
class TenantChange:
    """A change of a tenant; None leaves a field unchanged. `changes`: see `store.tenants.SETTABLE`.

    limits: by id; None removes one. expected: values that must be in force now, so that no one
    overwrites a change that they have not seen.
    """

    changes: Mapping[str, Any]
    weight: int | None = None
    limits: Mapping[str, Any] | None = None
    disabled: bool | None = None
    expected: Mapping[str, Any] = field(default_factory=dict[str, Any])


async def list_tenants(control: Control) -> list[ShownTenant]:
    """Return all tenants. Raises StoreUnavailable."""
    share = shares_of(to_plain(control.limiter.policy))
    found = await control.tenants.list_tenants()
    shares = [share(one.tenant_id) for one in found]
    return [
        ShownTenant(tenant, own.weight, own.limits)
        for tenant, own in zip(found, shares, strict=True)
    ]


async def show_tenant(control: Control, tenant_id: str) -> ShownTenant:
    """Return a tenant. Raises ConfigError for an invalid name, NotFound and StoreUnavailable."""
    check_name(tenant_id)
    return _shown(await control.tenants.get(tenant_id), to_plain(control.limiter.policy))


async def set_tenant(
    control: Control, tenant_id: str, change: TenantChange, *, by: str, reason: str = ""
) -> ShownTenant:
    """Create or change a tenant. Raises ConfigError, PolicyChanged and StoreUnavailable."""
    check_name(tenant_id)
    try:
        check_new_name(tenant_id)
    except ConfigError:  # tenants from before this check stay changeable
        if not await control.tenants.knows(tenant_id):
            raise
    check_changes(change.changes)
    edit = share_edit(tenant_id, weight=change.weight, limits=change.limits)
    of_share = {name: change.expected[name] for name in _OF_SHARE if name in change.expected}
    expected = {name: one for name, one in change.expected.items() if name not in _OF_SHARE}
    await control.tenants.check(tenant_id, expected)

    def checked(plain: Plain) -> Plain:
        PolicyChanged.check(asdict(share_of(plain, tenant_id)), of_share)
        return plain if edit is None else edit(plain)

    if edit is None:
        checked(to_plain(control.limiter.policy))
    else:  # the record counts: this process may not have it in force yet
        await control.keeper.change(checked, set_by=by, reason=reason or f"tenant {tenant_id}")
    tenant = await control.tenants.set(
        tenant_id, change.changes, by=by, disabled=change.disabled, expected=expected
    )
    return _shown(tenant, to_plain(control.limiter.policy))


async def remove_tenant(
    tenants: Tenants,
    keepers: Iterable[PolicyKeeper],
    tenant_id: str,
    *,
    by: str,
    reason: str = "",
) -> None:
    """Remove a tenant, its keys, and its weight and limits in all pools.

    That includes limits of its keys, users and conversations, and pools whose upstream was removed.
    Its requests stay on record. `keepers`: of all pools that have one.

    Raises ConfigError for an invalid name, NotFound if there was nothing to remove, and
    StoreUnavailable.
    """
    check_name(tenant_id)
    every = list(keepers)
    keys = {one.prefix for one in await tenants.all_keys(tenant_id)}
    naming = [one for one in every if _is_named(tenant_id, keys, to_plain(one.limiter.policy))]
    on_record = await tenants.policies.in_force()
    others = on_record.keys() - {one.limiter.pool for one in every}
    left = sorted(pool for pool in others if _is_named(tenant_id, keys, on_record[pool]))
    try:
        await tenants.remove(tenant_id, by=by)
    except NotFound:
        if not naming and not left:
            raise
    reason = reason or f"tenant {tenant_id} removed"
    for keeper in naming:
        await keeper.change(without(tenant_id, keys), set_by=by, reason=reason)
    for pool in left:
        edit = without(tenant_id, keys)
        await edit_record(tenants.policies, pool, edit, set_by=by, reason=reason)


def _is_named(tenant_id: str, keys: Collection[str], plain: Plain) -> bool:
    is_limited = any(is_within(one, tenant_id, keys) for one in plain.get("limits", {}))
    return is_limited or tenant_id in plain.get("weights", {})


def check_name(tenant_id: str) -> None:
    """Raise ConfigError for a name that a tenant cannot have."""
    check_tenant(tenant_id)
    if not tenant_id.isprintable():
        raise ConfigError("tenant", ascii(tenant_id), "must be printable")


def check_new_name(tenant_id: str) -> None:
    """Raise ConfigError as `check_name`, and for a name whose API path clients would shorten."""
    check_name(tenant_id)
    if {".", ".."} & set(tenant_id.split("/")):
        raise ConfigError("tenant", tenant_id, "must have no part that is . or ..")


def webhook_secret_of(deployments: str, tenant_id: str) -> str:
    """Return the secret that signs a tenant's webhooks, as `whsec_` and base64; of two the
    newer.
    """
    return f"{_WEBHOOK_PREFIX}{b64encode(webhook_keys(deployments, tenant_id)[0]).decode()}"


def webhook_keys(deployments: str, tenant_id: str | None = None) -> list[bytes]:
    """Return the keys that sign a tenant's webhooks; without a tenant, the deployment's own.

    They are derived from the deployment's secrets (WEBHOOK_SECRET, the newest first), so that a
    receiver that can verify its own webhooks cannot sign those of other tenants.
    """
    texts = (one.strip().removeprefix(_WEBHOOK_PREFIX) for one in deployments.split(","))
    keys = [b64decode(one) for one in texts]
    if tenant_id is None:
        return keys
    whose = b"tidegate webhooks of " + tenant_id.encode()
    return [hmac.digest(key, whose, sha256) for key in keys]


def _shown(tenant: Tenant, plain: Plain) -> ShownTenant:
    share = share_of(plain, tenant.tenant_id)
    return ShownTenant(tenant, share.weight, share.limits)


def plain_tenant(view: ShownTenant) -> dict[str, Any]:
    """Return a tenant as plain values, by the names in the API and in `--json`."""
    values = asdict(view.tenant)
    name = values.pop("tenant_id")
    return {"tenant": name, "weight": view.weight, "limits": view.limits, **values}


def plain_key(key: Key) -> dict[str, Any]:
    """Return an API key as plain values, without the key itself."""
    values = asdict(key)
    role = OperatorRole.of(key.scopes)
    return {"tenant": values.pop("tenant_id"), **values, "role": role, "state": key.state}


MOST_WEIGHT = 1_000


@dataclass(frozen=True, slots=True)
class Share:
    """A tenant's part of the policy. Tenants that the policy does not name have `weight` 1."""

    weight: int
    limits: dict[str, Any]


def share_of(plain: Mapping[str, Any], tenant: str) -> Share:
    limits = plain.get("limits", {})
    own = {name: value for name, value in limits.items() if is_of(name, tenant)}
    return Share(plain.get("weights", {}).get(tenant, 1), own)


def shares_of(plain: Mapping[str, Any]) -> Callable[[str], Share]:
    """Return `share_of` this policy for many tenants, with one pass over its limits."""
    own: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for limit_id, value in plain.get("limits", {}).items():
        scope, _, name = limit_id.partition(":")
        if scope == "tenant":
            own[name][limit_id] = value
        elif scope in MEASURES and name.startswith("tenant/"):
            own[name.removeprefix("tenant/")][limit_id] = value
    weights = plain.get("weights", {})
    return lambda tenant: Share(weights.get(tenant, 1), own.get(tenant, {}))


def share_edit(
    tenant: str,
    *,
    weight: int | None = None,
    limits: Mapping[str, Any] | None = None,
    remove: Iterable[str] = (),
) -> Edit | None:
    """Return the change that these arguments describe, None for none; a limit of None is removed.

    A limit to remove need not exist. Raises ConfigError for a limit that is not this tenant's;
    values are validated when the policy is read."""
    set_ = {name: value for name, value in (limits or {}).items() if value is not None}
    dropped = [*remove, *(name for name, value in (limits or {}).items() if value is None)]
    for name in (*set_, *dropped):
        if not is_of(name, tenant):
            allowed = f"must be tenant:{tenant} or a rate such as rpm:tenant/{tenant}"
            raise ConfigError(f"limits.{name}", None, allowed)
    if weight is not None and not 1 <= weight <= MOST_WEIGHT:
        allowed = f"must be a whole number from 1 to {MOST_WEIGHT}"
        raise ConfigError(f"weights.{tenant}", str(weight), allowed)
    if weight is None and not set_ and not dropped:
        return None

    def change(plain: Plain) -> Plain:
        others = {name: one for name, one in plain.get("limits", {}).items() if name not in dropped}
        changed = {**plain, "limits": others | set_}
        if weight is not None:
            changed["weights"] = {**plain.get("weights", {}), tenant: weight}
        return changed

    return change


def is_within(limit_id: str, tenant: str, keys: Collection[str] = ()) -> bool:
    """Return whether a limit applies to this tenant alone, or to one of its `keys`, users or
    conversations."""
    match caller_of(limit_id):
        case "key", prefix:
            return prefix in keys
        case _, whose, _:
            return whose == tenant
    return is_of(limit_id, tenant)


def without(tenant: str, keys: Collection[str] = ()) -> Edit:
    """Return the change that removes all limits and weights of a tenant and its `keys`."""

    def change(plain: Plain) -> Plain:
        limits = plain.get("limits", {})
        weights = plain.get("weights", {})
        return {
            **plain,
            "limits": {
                name: one for name, one in limits.items() if not is_within(name, tenant, keys)
            },
            "weights": {name: one for name, one in weights.items() if name != tenant},
        }

    return change
