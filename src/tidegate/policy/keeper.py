"""Keeps the limiter and the record of policies at one: what is on record last is in force.

Invariant: a change is on record before it is in force, so that an empty restart of Valkey can't
forget it; while PostgreSQL is away what is in force stays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from tidegate.errors import ConfigError, LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter, PoolPolicy
from tidegate.policy import revisions
from tidegate.policy.plain import Plain, digest, to_plain
from tidegate.policy.revisions import Conflict, Decision, Found, Origin, Revision, differences
from tidegate.policy.tenancy import with_tenants
from tidegate.store.policies import Policies
from tidegate.store.records import PolicyRecord
from tidegate.telemetry import Log, get_logger

_WATCH_S = 10.0
_RETRY_S = 1.0
_DIFFERENCES_SHOWN = 20

log = get_logger()


async def policy_to_start_with(policies: Policies, pool: str, wanted: PoolPolicy) -> PoolPolicy:
    """What is on record as in force; `wanted` while nothing is, or it can't be read.

    A Valkey that has just lost everything thus starts with the limits that were in force.
    """
    try:
        record = await policies.newest(pool)
        if record is not None:
            return revision_of(record).pool_policy
    except StoreUnavailable as away:
        log.debug(Log.STORE_AWAY, detail=away.message)
    except ConfigError as unreadable:
        log.warning(Log.LIMITS_CONFLICT, reason=f"the record can't be read: {unreadable.message}")
    return wanted


class PolicyKeeper:
    """One per process, beside its limiter. `wanted` is what this deployment asks for."""

    def __init__(
        self, limiter: Limiter, policies: Policies, *, wanted: PoolPolicy, set_by: str
    ) -> None:
        self.wanted = wanted
        self.settled = asyncio.Event()  # what becomes of this deployment's policy is decided
        self._limiter = limiter
        self._policies = policies
        self._set_by = set_by

    async def run(self) -> None:
        """Put this deployment's policy in force if it is new; then watch, for ever.

        Waits for Valkey and PostgreSQL where they are away.
        """
        await self._limiter.joined()
        settle = self._start
        while True:
            pause_s = _WATCH_S
            try:
                await settle()
                settle = self._watch
                self.settled.set()
            except StoreUnavailable as away:
                log.debug(Log.STORE_AWAY, detail=away.message)
                pause_s = _RETRY_S
            except ConfigError as unreadable:
                log.warning(
                    Log.LIMITS_CONFLICT, reason=f"the record can't be read: {unreadable.message}"
                )
            except Exception:  # the top of a task: logged, and it goes on
                log.exception(Log.INTERNAL_ERROR)
            await asyncio.sleep(pause_s)

    async def change(
        self,
        edit: Callable[[Plain], Plain],
        *,
        set_by: str,
        reason: str = "",
        origin: Origin = Origin.LIVE,
        asked: str = "",
    ) -> Revision:
        """Put what `edit` makes of the policy on record and in force; returns what is in force.

        In force everywhere as soon as Valkey knows it. Raises what `edit` raises, ConfigError for
        a policy that is not sound, and StoreUnavailable, after which it may be on record
        nevertheless: the processes then put it in force within some seconds.
        """
        found = await self._found()
        return await self._decided(
            "",
            lambda head, _: revisions.change(
                head, found, edit, set_by=set_by, reason=reason, origin=origin, asked=asked
            ),
        )

    async def adopt_wanted(self, *, set_by: str, reason: str = "") -> Revision:
        """Put this deployment's own policy in force, whatever was set live; but what tenants were
        given, and it does not name, stays. As `change` else."""
        wanted = to_plain(self.wanted)
        return await self.change(
            partial(with_tenants, wanted),
            set_by=set_by,
            reason=reason,
            origin=Origin.DEPLOYMENT,
            asked=digest(wanted),
        )

    async def history(self, most: int) -> list[PolicyRecord]:
        """What was in force, the newest first. Raises StoreUnavailable."""
        return await self._policies.history(self._limiter.pool, most)

    async def _start(self) -> None:
        found, wanted = await self._found(), to_plain(self.wanted)
        await self._decided(
            digest(wanted),
            lambda head, seen: revisions.start(head, seen, found, wanted, self._set_by),
        )

    async def _watch(self) -> None:
        newest = await self._policies.newest(self._limiter.pool)
        if newest is None or newest.revision != self._limiter.policy.revision:
            found = await self._found()
            await self._decided("", lambda head, _: revisions.watch(head, found))

    async def _found(self) -> Found:
        """What the limiter has in force, with who put it there where Valkey can say so."""
        try:
            changes = await self._limiter.history()
        except LimiterUnavailable:
            changes = []
        policy = self._limiter.policy
        by = next((one.by for one in changes if one.revision == policy.revision), "")
        return Found(policy, by)

    async def _decided(
        self, seen_digest: str, decide: Callable[[Revision | None, bool], Decision]
    ) -> Revision:
        decided: list[Decision] = []

        def under_lock(newest: PolicyRecord | None, seen: bool) -> Sequence[PolicyRecord]:
            decided[:] = [decide(None if newest is None else revision_of(newest), seen)]
            return [record_of(revision) for revision in decided[0].new]

        await self._policies.decide(self._limiter.pool, seen_digest, under_lock)
        decision = decided[0]
        await self._put_in_force(decision)
        return decision.force

    async def _put_in_force(self, decision: Decision) -> None:
        force, before = decision.force, self._limiter.policy
        if force.number > before.revision:
            await self._limiter.set_policy(force.pool_policy, by=force.set_by)
            log.warning(
                Log.LIMITS_CHANGED,
                revision=force.number,
                origin=force.origin.value,
                set_by=force.set_by,
                changes=differences(to_plain(before), force.policy)[:_DIFFERENCES_SHOWN],
            )
        if decision.conflict is not None:
            self._tell(decision.conflict, force)

    def _tell(self, conflict: Conflict, force: Revision) -> None:
        """That this deployment's policy is not in force. What was set live is expected to stay."""
        wanted = to_plain(self.wanted)
        about = {"revision": force.number, "set_by": force.set_by, "reason": conflict.value}
        if conflict is Conflict.KEPT:
            differing = differences(wanted, force.policy)[:_DIFFERENCES_SHOWN]
            log.info(Log.LIVE_LIMITS_KEPT, **about, differs=differing)
        else:
            differing = differences(force.policy, wanted)[:_DIFFERENCES_SHOWN]
            log.warning(Log.LIMITS_CONFLICT, **about, differs=differing)


def revision_of(record: PolicyRecord) -> Revision:
    return Revision(
        number=record.revision,
        origin=Origin(record.origin),
        policy=record.policy,
        set_by=record.set_by,
        reason=record.reason,
        asked=record.digest,
    )


def record_of(revision: Revision) -> PolicyRecord:
    return PolicyRecord(
        revision=revision.number,
        origin=revision.origin.value,
        digest=revision.asked_digest,
        policy=revision.policy,
        set_by=revision.set_by,
        reason=revision.reason,
    )
