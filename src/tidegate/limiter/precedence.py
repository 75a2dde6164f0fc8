"""Precedence of the policy that a program is written with over the one that its pool has in force.

Pure. Decided once, before a process joins for the first time. The rules, in order:

- an empty pool takes the program's policy, and so does one with a lower revision;
- a policy that says the same as the one in force runs under that one's revision;
- a policy that was never in force replaces one that was written in a program, too;
- all else is a conflict: the policy was set live, it is that of a deployment of the gateway, or
  this one was in force and was replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tidegate.errors import PolicyConflict
from tidegate.limiter.limits import Concurrency, PoolPolicy, as_limit
from tidegate.limiter.snapshot import Change

OnConflict = Literal["raise", "replace", "keep"]

# Who a policy is by that a program brought when it joined; and that of one that keeps what is in
# force, such as the gateway, whose limits no edit of a program's code replaces.
WRITTEN_BY, DEPLOYED_BY = "code", "deployment"
_SHOWN = 3
_FIELDS = (
    *("lease_ms", "when_away", "on_lost", "on_expiry"),
    *("bands", "queue_per_tenant", "reap_closed_ms", "hand_off"),
)


@dataclass(frozen=True, slots=True)
class WrittenPolicy:
    """The policy in the code of a program, and what is done where it is not the one in force."""

    pool: str
    policy: PoolPolicy
    on_conflict: OnConflict

    def is_in(self, policy: PoolPolicy) -> bool:
        """Whether a policy says the same, whatever its revision."""
        return _content(policy) == _content(self.policy)

    def among(self, history: Sequence[Change]) -> PoolPolicy:
        """The policy to join with. `history`: what was in force, the newest first. Raises
        PolicyConflict."""
        if not history or self.policy.revision > history[0].revision:
            return self.policy
        now = history[0]
        if self.is_in(now.policy):
            return replace(self.policy, revision=now.revision)
        was_in_force = any(self.is_in(change.policy) for change in history)
        if self.on_conflict == "raise" and (now.by != WRITTEN_BY or was_in_force):
            raise self._conflict(now)
        return replace(self.policy, revision=now.revision + 1)

    def _conflict(self, now: Change) -> PolicyConflict:
        differing = _differences(now.policy, self.policy)
        holds = [f"{name}={held}" for name, held, _ in differing]
        asks = [f"{name}={asked}" for name, _, asked in differing]
        whose = {WRITTEN_BY: "which replaced this policy", DEPLOYED_BY: "set by a deployment"}
        who = whose.get(now.by, f"set live by {now.by or 'a process'}")
        return PolicyConflict(
            f"pool {self.pool!r} holds {_shown(holds)} (revision {now.revision}, {who}); this "
            f"process asks for {_shown(asks)}: pass revision={now.revision + 1} in the policy or "
            "on_conflict='replace' to put it in force, or on_conflict='keep' to run under what "
            "is in force",
            pool=self.pool,
            limit=differing[0][0],
            in_force=differing[0][1],
            asked=differing[0][2],
        )


def _content(policy: PoolPolicy) -> bytes:
    return replace(policy, revision=1).pack()


def _differences(held: PoolPolicy, asked: PoolPolicy) -> list[tuple[str, str, str]]:
    """(name, value in force, value asked for) of each limit, weight and field that differs."""
    before, after = _flat(held), _flat(asked)
    names = [*after, *(name for name in before if name not in after)]
    pairs = [(name, before.get(name, "none"), after.get(name, "none")) for name in names]
    return [(name, old, new) for name, old, new in pairs if old != new]


def _flat(policy: PoolPolicy) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, written in policy.limits.items():
        limit = as_limit(written)
        plain = isinstance(limit, Concurrency) and limit == Concurrency(limit.bound)
        found[name] = str(limit.bound) if plain else repr(limit)
    found |= {f"weights.{tenant}": str(weight) for tenant, weight in policy.weights.items()}
    return found | {name: repr(getattr(policy, name)) for name in _FIELDS}


def _shown(parts: list[str]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more
