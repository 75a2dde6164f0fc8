"""Rollout of policies: which revision is in force, and its record.

A policy comes from a deployment (its file and environment) or was set live by a person. The
rules, in order:
- a policy that is in force but not on record is recorded;
- a live policy stays until another is set: it is kept over a deployment that was in force before
  it; a new deployment that differs is a conflict;
- a deployment's policy that was never in force becomes the next revision;
- one that was in force and was replaced belongs to an older deployment: a conflict without effect;
- changes for single tenants leave a deployment's policy the deployment's.

Invariants: a change is on record before it is in force; revisions only grow; two policies of one
revision are equal; while PostgreSQL is unavailable the policy in force stays.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property, partial
from typing import Any

from tidegate.errors import ConfigError, LimiterUnavailable, StoreUnavailable
from tidegate.limiter import Limiter, Observer, PoolPolicy, look_until
from tidegate.policy.format import (
    Plain,
    digest,
    of_plain,
    to_plain,
    with_tenants,
    without_tenants,
)
from tidegate.policy.providers import filled
from tidegate.settings import Config
from tidegate.store.records import PolicyRecord
from tidegate.store.tenants import Policies
from tidegate.telemetry.logging import Log, get_logger, lines_with


class Origin(StrEnum):
    """Where a policy comes from."""

    DEPLOYMENT = "deployment"
    LIVE = "live"


@dataclass(frozen=True)
class Revision:
    """A policy that is on record or to be recorded.

    asked: the digest of the policy that its deployment requests, if tenants were given more since;
    else empty.
    """

    number: int
    origin: Origin
    policy: Plain
    set_by: str
    reason: str = ""
    requested: str = ""

    @cached_property
    def digest(self) -> str:
        return digest(self.policy)

    @property
    def requested_digest(self) -> str:
        return self.requested or self.digest

    @cached_property
    def pool_policy(self) -> PoolPolicy:
        """The policy as a PoolPolicy. Raises ConfigError for an unreadable record of a later
        version.
        """
        return of_plain(self.policy, revision=self.number, strict=False)


class Conflict(StrEnum):
    """Why a deployment's policy is not in force. `KEPT` is no error: live changes stay."""

    KEPT = "the limits that were set live are kept"
    LIVE = "the policy in force was set live"
    OLDER = "this deployment's policy was in force before and has been replaced"


@dataclass(frozen=True, slots=True)
class Decision:
    """Revisions to record in order, `new`, and the one to put in force afterwards, `force`."""

    force: Revision
    new: tuple[Revision, ...] = ()
    conflict: Conflict | None = None


@dataclass(frozen=True)
class Found:
    """The policy that the limiter has in force, and who set it, if known."""

    policy: PoolPolicy
    set_by: str = ""

    @property
    def number(self) -> int:
        return self.policy.revision

    @cached_property
    def plain(self) -> Plain:
        return to_plain(self.policy)


def start(
    head: Revision | None,
    seen: bool,
    found: Found,
    stated: Plain,
    set_by: str,
    before: Plain | None = None,
) -> Decision:
    """Decide what a process does that starts with the policy `stated`.

    `head`: the newest on record. `seen`: whether `stated` ever was a deployment's policy. `before`:
    what the deployment of `head` requests, if that is on record.
    """
    own = Revision(found.number, Origin.DEPLOYMENT, stated, set_by)
    if head is None and found.plain == stated:
        return Decision(own, (own,))
    adopted = adopt(head, found)
    now = adopted or head
    assert now is not None
    new = (adopted,) if adopted else ()
    both = stated
    if now.requested_digest != now.digest:
        both = with_tenants(stated, now.policy, before)
    is_known = now.requested_digest == own.digest or now.origin is Origin.LIVE or seen
    if now.digest == digest(both) and is_known:
        conflict = None
    elif now.origin is Origin.LIVE:
        conflict = Conflict.KEPT if seen else Conflict.LIVE
    elif seen:
        conflict = Conflict.OLDER
    else:
        conflict = None
        added = _with_added(replace(own, number=max(now.number, found.number) + 1), both)
        now, new = added[-1], (*new, *added)
    return _enforced(now, new, found, conflict)


def _with_added(deployed: Revision, policy: Plain) -> tuple[Revision, ...]:
    """Return a deployment's policy, then the policy with live additions for tenants.

    The first revision lets the next deployment distinguish what the deployment stated from
    additions.
    """
    if policy == deployed.policy:
        return (deployed,)
    number, requested = deployed.number + 1, deployed.digest
    both = replace(deployed, number=number, policy=policy, reason=_KEPT, requested=requested)
    return deployed, both


def watch(head: Revision | None, found: Found) -> Decision:
    """Decide what a process does periodically: keep the record and the limiter the same."""
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
    deployed: Plain | None = None,
) -> Decision:
    """Decide what a person's change does; nothing if it changes nothing.

    `deployed`: what a deployment requests, if the change puts that in force. Raises what `edit`
    raises, and ConfigError for an invalid policy.
    """
    decided = watch(head, found)
    now = decided.force
    policy = to_plain(of_plain(edit(now.policy)))
    number = max(now.number, found.number) + 1
    changed = Revision(number, origin, policy, set_by, reason)
    is_same = changed.digest == now.digest and (origin is now.origin or origin is Origin.LIVE)
    if is_same and (deployed is None or digest(deployed) == now.requested_digest):
        return decided
    is_deployed = origin is Origin.LIVE and now.origin is Origin.DEPLOYMENT
    if is_deployed and without_tenants(policy) == without_tenants(now.policy):
        changed = replace(changed, origin=now.origin, requested=now.requested_digest)
    if deployed is None:
        return Decision(changed, (*decided.new, changed))
    added = _with_added(replace(changed, policy=deployed), policy)
    return Decision(added[-1], (*decided.new, *added))


def requested_before(records: Sequence[PolicyRecord]) -> Plain | None:
    """Return what the deployment of the newest record requests, if the records contain it."""
    requested = records[0].digest if records else ""
    found = (one.policy for one in reversed(records) if one.digest == requested)
    return next((policy for policy in found if digest(policy) == requested), None)


def adopt(head: Revision | None, found: Found) -> Revision | None:
    """Return a revision for a policy that is in force but not on record; None if it is recorded.

    It was set live, unless there is no record at all: then it is a deployment's from before records
    began.
    """
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
    """Return the decision to put `now` in force.

    It gets a higher number if the limiter has another policy under the same one.
    """
    is_other = now.number == found.number and found.plain != now.policy
    # Compared as this version reads the record: a later version may have added to it.
    if is_other and found.plain != to_plain(now.pool_policy):
        reason = f"revision {now.number} had another meaning in the limiter"
        now = replace(now, number=now.number + 1, reason=reason)
        new = (*new, now)
    return Decision(now, new, conflict)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return a line for each key that differs: `limits.kind:text_only: 5 -> 2`."""
    return [
        f"{key}: {_written(old)} -> {_written(new)}"
        for key, old, new in changed_keys(before, after)
    ]


def _written(value: object, *, inner: bool = False) -> str:
    """Return a value as a command accepts it: tables and lists as in TOML."""
    if isinstance(value, Mapping):
        pairs = [f"{name}={_written(one, inner=True)}" for name, one in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_written(one, inner=True) for one in value)}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and inner:
        return json.dumps(value)
    return "none" if value is None else str(value)


def changed_keys(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, object, object]]:
    """Return each key that differs with its two values, None where it is missing."""
    old, new = _flat(before), _flat(after)
    keys = sorted(old.keys() | new.keys())
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


def _flat(plain: Mapping[str, Any]) -> dict[str, object]:
    """Return each limit, weight, band and option of the pool by its path."""
    found: dict[str, object] = {}
    for section in ("limits", "weights", "pool"):
        found |= {f"{section}.{key}": value for key, value in plain.get(section, {}).items()}
    if "bands" in plain:
        found["bands"] = plain["bands"]
    return found


_WATCH_S = 10.0
_RETRY_S = 1.0
_DIFFERENCES_SHOWN = 20
_START_AGAIN_S, _LOOK_S = 0.2, 1.0
_KEPT = "what was given live is kept"

log = get_logger()


async def policy_to_start_with(
    policies: Policies,
    pool: str,
    stated: PoolPolicy,
    *,
    is_held: Callable[[], Awaitable[bool]] | None = None,
    within_s: float = 0.0,
) -> PoolPolicy:
    """Return the recorded policy in force; `stated` if there is none or it cannot be read.

    A Valkey that has just lost its data thus starts with the limits that were in force. is_held:
    returns whether Valkey has the policy in force, which then takes precedence. Without one, a
    PostgreSQL that does not answer is waited for `within_s`: a fleet that starts together makes it
    slow.
    """
    until = asyncio.get_running_loop().time() + within_s
    while True:
        try:
            record = await policies.newest(pool)
            return stated if record is None else revision_of(record).pool_policy
        except StoreUnavailable as error:
            log.debug(Log.STORE_AWAY, detail=error.message)
        except ConfigError as unreadable:
            why = f"the record can't be read: {unreadable.message}"
            log.warning(Log.LIMITS_CONFLICT, reason=why)
            return stated
        left_s = until - asyncio.get_running_loop().time()
        if left_s <= 0 or (is_held is not None and await is_held()):
            return stated
        await asyncio.sleep(min(_START_AGAIN_S, left_s))


async def _holds_policy(url: str, pool: str) -> bool:
    """Return whether Valkey has a policy of the pool; False while it is unavailable."""
    try:
        return (await look_until(url, pool, lambda _: True, _LOOK_S)).revision > 0
    except LimiterUnavailable:
        return False


async def edit_record(
    policies: Policies, pool: str, edit: Callable[[Plain], Plain], *, set_by: str, reason: str
) -> None:
    """Change the recorded policy of a pool without an upstream, for when one returns.

    Raises StoreUnavailable.
    """

    def edited(records: Sequence[PolicyRecord], _seen: bool) -> Sequence[PolicyRecord]:
        head = revision_of(records[0])
        policy = edit(head.policy)
        if policy == head.policy:
            return ()
        requested = head.requested_digest if head.origin is Origin.DEPLOYMENT else ""
        after = Revision(head.number + 1, head.origin, policy, set_by, reason, requested)
        return (record_of(after),)

    await policies.decide(pool, "", edited)


@asynccontextmanager
async def open_pool(
    config: Config,
    policies: Policies,
    instance_id: str,
    stated: PoolPolicy,
    pool: str,
    observer: Observer | None = None,
    provider: str | None = None,
    within_s: float = 0.0,
) -> AsyncIterator[PolicyKeeper]:
    """Open a pool's limiter with the recorded policy, and yield the keeper of its policy.

    `provider`: the provider whose preset completes live changes. within_s: how long to wait for
    PostgreSQL if Valkey has no policy of the pool.
    """
    assert config.redis_url is not None
    url = config.redis_url.get_secret_value()
    is_held = partial(_holds_policy, url, pool)
    limiter = Limiter.from_url(
        url,
        pool=pool,
        policy=await policy_to_start_with(
            policies, pool, stated, is_held=is_held, within_s=within_s
        ),
        instance_id=instance_id,
        observer=observer,
        on_conflict="keep",  # the keeper decides by the record
    )
    async with AsyncExitStack() as stack:
        with lines_with(pool=pool):
            await stack.enter_async_context(limiter)
        yield PolicyKeeper(
            limiter, policies, stated=stated, set_by=instance_id, provider=provider or ""
        )


class PolicyKeeper:
    """The keeper of a pool's policy, one per process beside its limiter.

    `stated` is the policy that this deployment requests.
    """

    def __init__(
        self,
        limiter: Limiter,
        policies: Policies,
        *,
        stated: PoolPolicy,
        set_by: str,
        provider: str = "",
    ) -> None:
        self.stated = stated
        self.settled = asyncio.Event()  # set once this deployment's policy has been decided on
        self.limiter = limiter
        self._policies = policies
        self._set_by = set_by
        self.provider = provider
        self._has_pauses = False

    async def run(self) -> None:
        """Put this deployment's policy in force if it is new, then watch for ever.

        Waits while Valkey or PostgreSQL is unavailable.
        """
        await self.limiter.joined()
        settle = self._start
        while True:
            pause_s = _WATCH_S
            try:
                await settle()
                await self.restore_pauses()
                settle = self._watch
                self.settled.set()
            except StoreUnavailable as error:
                log.debug(Log.STORE_AWAY, detail=error.message)
                pause_s = _RETRY_S
            except LimiterUnavailable:  # the limiter itself reports it
                pause_s = _RETRY_S
            except ConfigError as unreadable:
                log.warning(
                    Log.LIMITS_CONFLICT, reason=f"the record can't be read: {unreadable.message}"
                )
            except Exception:  # top of a task: log and continue
                log.exception(Log.INTERNAL_ERROR)
            await asyncio.sleep(pause_s)

    async def change(
        self,
        edit: Callable[[Plain], Plain],
        *,
        set_by: str,
        reason: str = "",
        origin: Origin = Origin.LIVE,
        deployed: Plain | None = None,
    ) -> Revision:
        """Record the policy that `edit` returns, put it in force, and return what is in force.

        It is in force everywhere as soon as Valkey has it. Raises what `edit` raises, ConfigError
        for an invalid policy, and StoreUnavailable; after the latter the change may be on record
        nevertheless, and the processes then put it in force within seconds.
        """
        found = await self._found()

        def whole(plain: Plain) -> Plain:
            edited = edit(plain)
            if origin is not Origin.LIVE or not self.provider:
                return edited
            limits = filled(edited["limits"], self.provider, plain["limits"])
            return {**edited, "limits": limits}

        return await self._decided(
            "",
            lambda head, *_: change(
                head, found, whole, set_by=set_by, reason=reason, origin=origin, deployed=deployed
            ),
            is_return=deployed is not None,
        )

    async def adopt_stated(self, *, set_by: str, reason: str = "") -> Revision:
        """Put this deployment's own policy in force, whatever was set live.

        Weights and limits of tenants that it does not name stay. Otherwise as `change`.
        """
        stated = to_plain(self.stated)
        return await self.change(
            partial(with_tenants, stated),
            set_by=set_by,
            reason=reason,
            origin=Origin.DEPLOYMENT,
            deployed=stated,
        )

    async def history(self, most: int) -> list[PolicyRecord]:
        """Return the policies that were in force, newest first. Raises StoreUnavailable."""
        return await self._policies.history(self.limiter.pool, most)

    async def removed_by_people(self, limits: Collection[str]) -> set[str]:
        """Return which of these limits are missing because a person removed them.

        `adopt_stated` removes none: what the deployment learns is its own. Raises StoreUnavailable.
        """
        return await self._policies.removed_by_people(self.limiter.pool, limits)

    async def restore_pauses(self) -> None:
        """Restore people's pauses once after the start of this process.

        Valkey may have lost them while no process ran. Does nothing while Valkey is unavailable.
        After StoreUnavailable and LimiterUnavailable, which it raises, it is due again.
        """
        limiter = self.limiter
        if self._has_pauses or limiter.state == "away":
            return
        on_record = await self._policies.pauses(limiter.pool)
        paused = [one for one in on_record if limiter.policy.binding(one.limit) is not None]
        for one in paused:
            await limiter.penalise(one.limit, for_ms=one.left_ms, reason=one.reason, by=one.by)
        # A person may have resumed a limit before it was paused here.
        still = (
            {one.limit for one in await self._policies.pauses(limiter.pool)} if paused else set()
        )
        for one in paused:
            if one.limit not in still:
                await limiter.resume(one.limit, by=self._set_by)
        self._has_pauses = True

    async def _start(self) -> None:
        found, stated = await self._found(), to_plain(self.stated)
        await self._decided(
            digest(stated),
            lambda head, seen, before: start(head, seen, found, stated, self._set_by, before),
        )

    async def _watch(self) -> None:
        newest = await self._policies.newest(self.limiter.pool)
        if newest is None or newest.revision != self.limiter.policy.revision:
            found = await self._found()
            await self._decided("", lambda head, *_: watch(head, found))

    async def _found(self) -> Found:
        """Return what the limiter has in force, and who set it, if Valkey knows."""
        try:
            changes = await self.limiter.history()
        except LimiterUnavailable:
            changes = []
        policy = self.limiter.policy
        by = next((one.by for one in changes if one.revision == policy.revision), "")
        return Found(policy, by)

    async def _decided(
        self,
        own_digest: str,
        decide: Callable[[Revision | None, bool, Plain | None], Decision],
        *,
        is_return: bool = False,
    ) -> Revision:
        decided: list[Decision] = []

        def under_lock(records: Sequence[PolicyRecord], seen: bool) -> Sequence[PolicyRecord]:
            head = revision_of(records[0]) if records else None
            decided[:] = [decide(head, seen, requested_before(records))]
            return [record_of(revision) for revision in decided[0].new]

        await self._policies.decide(self.limiter.pool, own_digest, under_lock, is_return=is_return)
        decision = decided[0]
        await self._put_in_force(decision)
        return decision.force

    async def _put_in_force(self, decision: Decision) -> None:
        force, before = decision.force, self.limiter.policy
        if force.number > before.revision:
            await self.limiter.set_policy(force.pool_policy, by=force.set_by)
            log.warning(
                Log.LIMITS_CHANGED,
                revision=force.number,
                origin=force.origin.value,
                set_by=force.set_by,
                changes=differences(to_plain(before), force.policy)[:_DIFFERENCES_SHOWN],
            )
        if decision.conflict is not None:
            self._log_conflict(decision.conflict, force)

    def _log_conflict(self, conflict: Conflict, force: Revision) -> None:
        """Log that this deployment's policy is not in force; keeping live changes is expected."""
        stated = to_plain(self.stated)
        about = {"revision": force.number, "set_by": force.set_by, "reason": conflict.value}
        if conflict is Conflict.KEPT:
            differing = differences(stated, force.policy)[:_DIFFERENCES_SHOWN]
            log.info(Log.LIVE_LIMITS_KEPT, **about, differs=differing)
        else:
            differing = differences(force.policy, stated)[:_DIFFERENCES_SHOWN]
            log.warning(Log.LIMITS_CONFLICT, **about, differs=differing)


def revision_of(record: PolicyRecord) -> Revision:
    return Revision(
        number=record.revision,
        origin=Origin(record.origin),
        policy=record.policy,
        set_by=record.set_by,
        reason=record.reason,
        requested=record.digest,
    )


def record_of(revision: Revision) -> PolicyRecord:
    return PolicyRecord(
        revision=revision.number,
        origin=revision.origin.value,
        digest=revision.requested_digest,
        policy=revision.policy,
        set_by=revision.set_by,
        reason=revision.reason,
    )
