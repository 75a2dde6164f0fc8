"""Which revision of a pool's policy is in force, and when there is a new one. Pure.

A policy comes from a *deployment* (its file and environment) or was set *live* (by a person).
Every one that was in force is kept. The rules, in order:

- what is in force without being on record is put on record;
- a policy set live stays until somebody sets another one: it is kept over a deployment that was in
  force before it, and a new deployment that differs is a conflict;
- a deployment's policy that was never in force before becomes the next revision;
- one that was in force before and was replaced is an older deployment's: a conflict, nothing more;
- what was set for a tenant alone leaves a deployment's policy the deployment's: the next one keeps
  what tenants were given so and it does not name.

So two deployments that differ can't fight: each policy wins once. Invariant: revisions only grow,
and two that are in force with the same number are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from tidegate.limiter.limits import PoolPolicy
from tidegate.policy.plain import Plain, digest, of_plain, to_plain
from tidegate.policy.tenancy import apart_from_tenants, with_tenants


class Origin(StrEnum):
    """Where a policy comes from."""

    DEPLOYMENT = "deployment"
    LIVE = "live"


@dataclass(frozen=True, slots=True)
class Revision:
    """One policy as it is on record, or is to be put there. asked: the digest of what its
    deployment asks for, where tenants were given more since; else empty."""

    number: int
    origin: Origin
    policy: Plain
    set_by: str
    reason: str = ""
    asked: str = ""

    @property
    def digest(self) -> str:
        return digest(self.policy)

    @property
    def asked_digest(self) -> str:
        return self.asked or self.digest

    @property
    def pool_policy(self) -> PoolPolicy:
        """Raises ConfigError for a record of a later version that can't be read."""
        return of_plain(self.policy, revision=self.number, strict=False)


class Conflict(StrEnum):
    """Why a deployment's policy is not in force. `KEPT` is no fault: what was set live goes on."""

    KEPT = "the limits that were set live are kept"
    LIVE = "the policy in force was set live"
    OLDER = "this deployment's policy was in force before and has been replaced"


@dataclass(frozen=True, slots=True)
class Decision:
    """`new` are to be put on record, in order; `force` is to be in force after that."""

    force: Revision
    new: tuple[Revision, ...] = ()
    conflict: Conflict | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What the limiter has in force, and who put it there as far as it knows."""

    policy: PoolPolicy
    set_by: str = ""

    @property
    def number(self) -> int:
        return self.policy.revision

    @property
    def plain(self) -> Plain:
        return to_plain(self.policy)


def start(head: Revision | None, seen: bool, found: Found, wanted: Plain, set_by: str) -> Decision:
    """What a process that starts with the policy `wanted` does.

    `head`: the newest on record. `seen`: whether `wanted` was a deployment's at any time.
    """
    ours = Revision(found.number, Origin.DEPLOYMENT, wanted, set_by)
    if head is None and found.plain == wanted:
        return Decision(ours, (ours,))
    adopted = adopt(head, found)
    now = adopted or head
    assert now is not None
    new = (adopted,) if adopted else ()
    if now.asked_digest != now.digest:
        both = with_tenants(wanted, now.policy)
        ours = Revision(found.number, Origin.DEPLOYMENT, both, set_by, asked=digest(wanted))
    if now.digest == ours.digest:
        conflict = None
    elif now.origin is Origin.LIVE:
        conflict = Conflict.KEPT if seen else Conflict.LIVE
    elif seen:
        conflict = Conflict.OLDER
    else:
        conflict = None
        now = replace(ours, number=max(now.number, found.number) + 1)
        new = (*new, now)
    return _enforced(now, new, found, conflict)


def watch(head: Revision | None, found: Found) -> Decision:
    """What a process does now and then: the record and the limiter have the same in force."""
    adopted = adopt(head, found)
    now = adopted or head
    assert now is not None
    return _enforced(now, (adopted,) if adopted else (), found, None)


def change(
    head: Revision | None,
    found: Found,
    edit: Callable[[Plain], Plain],
    *,
    set_by: str,
    reason: str,
    origin: Origin = Origin.LIVE,
    asked: str = "",
) -> Decision:
    """What a person's change does; nothing where it changes nothing. `asked`: see `Revision`.

    Raises what `edit` raises, and ConfigError for a policy that is not sound.
    """
    decided = watch(head, found)
    now = decided.force
    policy = to_plain(of_plain(edit(now.policy)))
    if digest(policy) == now.digest and (origin is now.origin or origin is Origin.LIVE):
        return decided
    is_deployed = origin is Origin.LIVE and now.origin is Origin.DEPLOYMENT
    if is_deployed and apart_from_tenants(policy) == apart_from_tenants(now.policy):
        origin, asked = now.origin, now.asked_digest
    number = max(now.number, found.number) + 1
    changed = Revision(number, origin, policy, set_by, reason, asked)
    return Decision(changed, (*decided.new, changed))


def adopt(head: Revision | None, found: Found) -> Revision | None:
    """What is in force but not on record. It was set live, unless there is no record at all: then
    it is from before there were records, and a deployment's."""
    if head is None:
        reason = "in force before there was a record"
        return Revision(found.number, Origin.DEPLOYMENT, found.plain, _who(found), reason)
    if found.number <= head.number:
        return None
    policy = found.plain
    if digest(policy) == head.digest:
        return replace(head, number=found.number, set_by=_who(found), reason="found in force")
    return Revision(found.number, Origin.LIVE, policy, _who(found), "found in force")


def _who(found: Found) -> str:
    return found.set_by or "unknown"


def _enforced(
    now: Revision, new: tuple[Revision, ...], found: Found, conflict: Conflict | None
) -> Decision:
    """`now` as it is to be in force: with a higher number, where the limiter has another one."""
    # As this version reads the record: a later one may have put more into it.
    if now.number == found.number and found.plain != to_plain(now.pool_policy):
        reason = f"revision {now.number} had another meaning in the limiter"
        now = replace(now, number=now.number + 1, reason=reason)
        new = (*new, now)
    return Decision(now, new, conflict)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What changes from one to the other, a line for each key: `limits.kind:text_only: 5 -> 2`."""
    old, new = _flat(before), _flat(after)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {old.get(key, 'none')} -> {new.get(key, 'none')}")
    return lines


def _flat(plain: Mapping[str, Any]) -> dict[str, object]:
    """Each limit, weight, band and option of the pool under its path."""
    found: dict[str, object] = {}
    for section in ("limits", "weights", "pool"):
        found |= {f"{section}.{key}": value for key, value in plain.get(section, {}).items()}
    if "bands" in plain:
        found["bands"] = plain["bands"]
    return found
