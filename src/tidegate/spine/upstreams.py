"""Upstreams of a running process: opened, changed, drained and removed between calls.

    proposed ──► prepared: made, pool entered, credentials read ──► in force: swapped ──► old closed
                     └── a problem, reported to the proposer

Every process follows the revisions on record, by notifications and by polling every two seconds.
The process that received an operator's change proposes it, and puts it in force once every live
process has prepared it. A drain or a removal needs no preparation, so that no process can delay it.

Invariants: a call keeps the upstream that it began with; the swap is one step without a wait; a
process reports an upstream that it cannot set up, and does not call it; a removed upstream is
closed after its last call.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

from tidegate.admission.demand import Reach
from tidegate.call import DEFAULT_POOL
from tidegate.dialects import check_passthrough
from tidegate.dialects.spec import Dialect
from tidegate.errors import (
    ConfigError,
    LimiterUnavailable,
    NotFound,
    StoreUnavailable,
    UpstreamsChanged,
    UpstreamUnfit,
)
from tidegate.limiter import CallUse, Limiter, Observer, PoolPolicy, Quota, Tokens, amount_of
from tidegate.policy.deployment import CONNECT_TIMEOUT, Deployment, Stated, Upstream, check_adopted
from tidegate.policy.format import caller_of
from tidegate.policy.live import LiveChanges, LiveEdit, as_at, changed_lines, changes_of
from tidegate.policy.rollout import PolicyKeeper, open_pool
from tidegate.settings import Config
from tidegate.spine.learning import LimitLearner
from tidegate.spine.native import Relay
from tidegate.spine.run import timeouts_of
from tidegate.store.database import Connections
from tidegate.store.notifications import Notifications, next_beat_s
from tidegate.store.provider.upstreams import (
    SEEN_EVERY_MS,
    UpstreamProcess,
    UpstreamRevision,
    UpstreamRevisions,
)
from tidegate.store.statistics import RecordedUse, used_since
from tidegate.store.tenants import Policies
from tidegate.telemetry.logging import Log, get_logger
from tidegate.upstream.credentials import Signers, open_wire
from tidegate.upstream.fetch import UpstreamTest, tested
from tidegate.upstream.gemini import GeminiProcessor
from tidegate.upstream.server_load import ServerLoads
from tidegate.upstream.transport import Timeouts

PREPARED_WITHIN_S = 20.0
KNOWN_WITHIN_S = 5.0
TEST_MS = 10_000
_LOOK_EVERY_S = 0.03
_CLOSE_AFTER_S = 60.0  # longer than from the choice of an upstream to its permit
_START_WITHIN_S = 2.0
_RECORD_WITHIN_S = 10.0  # of a start, for the policies of all pools
_DAYS_WITHIN_S, _DAYS_EVERY_S = 10.0, 2.0

log = get_logger()

Share = Callable[[dict[str, Any]], Awaitable[None]]


class Pools:
    """This process's limiters and the keepers of their policies, by pool. `limiters` and `keepers`
    hold those in use, and change in place."""

    def __init__(
        self,
        config: Config,
        policies: Policies,
        instance_id: str,
        observer: Callable[[str], Observer],
        connections: Connections,
    ) -> None:
        self.limiters: dict[str, Limiter] = {}
        self.keepers: dict[str, PolicyKeeper] = {}
        self._config = config
        self._policies = policies
        self._instance_id = instance_id
        self._observer = observer
        self._connections = connections
        self._open: dict[str, tuple[PolicyKeeper, AsyncExitStack]] = {}
        self._record_by = time.monotonic() + _RECORD_WITHIN_S

    async def enter(self, pool: str, policy: PoolPolicy, provider: str | None) -> Limiter:
        """Enter a pool, or return to it, with its policy in force. Raises ConfigError."""
        known = self._open.get(pool)
        if known is not None:
            known[0].stated, known[0].provider = policy, provider or ""
        else:
            stack = AsyncExitStack()
            opening = open_pool(
                self._config,
                self._policies,
                self._instance_id,
                policy,
                pool,
                self._observer(pool),
                provider,
                within_s=max(0.0, self._record_by - time.monotonic()),
            )
            keeper = await stack.enter_async_context(opening)
            stack.callback(asyncio.create_task(keeper.run()).cancel)
            await self._count_days(keeper, stack)
            known = self._open[pool] = keeper, stack
        self.keepers[pool], self.limiters[pool] = known[0], known[0].limiter
        return known[0].limiter

    async def _count_days(self, keeper: PolicyKeeper, stack: AsyncExitStack) -> None:
        """Restore paused limits and charge day quotas from the record before a call is admitted. If
        a server is unavailable, or the day's record takes too long to read, that follows later."""
        days = RecordedDays(keeper.limiter, self._connections)
        with suppress(LimiterUnavailable, StoreUnavailable, TimeoutError):
            async with asyncio.timeout(_DAYS_WITHIN_S):
                await keeper.restore_pauses()
                await days.count()
        stack.callback(asyncio.create_task(days.run()).cancel)

    def leave(self, pool: str) -> None:
        """Remove a pool from those in use; calls that have begun keep its limiter."""
        self.keepers.pop(pool, None)
        self.limiters.pop(pool, None)

    def is_idle(self, pool: str) -> bool:
        """Whether no call of this process holds a permit of the pool or waits for one."""
        known = self._open.get(pool)
        return known is None or not (known[0].limiter.permits_held or known[0].limiter.waiters)

    async def close(self, pool: str) -> None:
        """Close a pool that `leave` has removed."""
        if pool not in self.limiters and (known := self._open.pop(pool, None)) is not None:
            await known[1].aclose()

    async def aclose(self) -> None:
        for pool in list(self._open):
            self.leave(pool)
            await self.close(pool)


class RecordedDays:
    """Charges the day quotas of one pool from the record, after Valkey lost its data while no
    process ran. Running processes report their own usage again. One per process.

    The recorded usage of the day is charged before this process admits a call. It includes what is
    already counted, so repeated charges do not add up. clock: seconds since 1970.
    """

    def __init__(
        self, limiter: Limiter, connections: Connections, clock: Callable[[], float] = time.time
    ) -> None:
        self._limiter = limiter
        self._connections = connections
        self._clock = clock
        self._epoch = 0  # the epoch that was charged
        self._is_start = True

    async def run(self) -> None:
        """Charge in each new epoch, and again after a server was unavailable, until cancelled."""
        while True:
            try:
                await self.count()
            except (LimiterUnavailable, StoreUnavailable) as error:
                log.debug(Log.STORE_AWAY, detail=error.message)
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.INTERNAL_ERROR, component="day_quotas")
            await asyncio.sleep(_DAYS_EVERY_S)

    async def count(self) -> None:
        """Charge the day quotas in force with the recorded usage of their day, in an epoch that was
        not charged yet; at the start only quotas with nothing counted. Does nothing while Valkey is
        unavailable. Raises LimiterUnavailable or StoreUnavailable; it is then due again.
        Cancellation may leave some quotas charged."""
        limiter, epoch = self._limiter, self._limiter.epoch
        is_start, self._is_start = self._is_start, False
        if epoch == self._epoch or limiter.state == "away":
            return
        quotas = _quotas_of(limiter)
        if quotas and is_start:
            snapshot = await limiter.snapshot(limits=list(quotas))
            counted = {name for name, view in snapshot.limits.items() if view.used}
            quotas = {name: one for name, one in quotas.items() if name not in counted}
        for zone in sorted({one.zone for one in quotas.values()}):
            of_zone = {name: one for name, one in quotas.items() if one.zone == zone}
            await self._count(zone, of_zone)
        self._epoch = epoch

    async def _count(self, zone: str, quotas: Mapping[str, Quota]) -> None:
        limiter, since = self._limiter, _midnight(zone, self._clock())
        callers = [one for one in map(caller_of, quotas) if one is not None]
        uses = await used_since(
            self._connections,
            limiter.pool,
            since,
            keys=[one[-1] for one in callers if one[0] == "key"],
            subjects=[one[-1] for one in callers if one[0] == "user"],
            conversations=[one[-1] for one in callers if one[0] == "conversation"],
        )
        for name, amount in _amounts(Reach(limiter.policy), quotas, uses).items():
            if await limiter.charge(name, amount, recorded=True) and amount:
                log.info(Log.RECORDED_DAY_COUNTED, limit=name, amount=amount, since=str(since))


def _quotas_of(limiter: Limiter) -> dict[str, Quota]:
    limits = {name: limiter.policy.limit(name) for name in limiter.policy.limits}
    return {name: one for name, one in limits.items() if isinstance(one, Quota)}


def _midnight(zone: str, now: float) -> datetime:
    """Return when the current day began in a time zone."""
    day = datetime.fromtimestamp(now, ZoneInfo(zone)).date()
    return datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone)).astimezone(UTC)


def _amounts(
    reach: Reach, quotas: Mapping[str, Quota], uses: Iterable[RecordedUse]
) -> dict[str, int]:
    """Return the recorded usage of each quota, in the quota's unit."""
    found: defaultdict[str, int] = defaultdict(int)
    for use in uses:
        tags = use.key_id, use.subject, use.conversation
        named = reach.named(use.tenant_id, tags)
        media = use.images > 0, use.audio_seconds > 0
        limits = reach.limits(use.kind, use.model, use.tenant_id, *media, named)
        for name in quotas.keys() & set(limits):
            found[name] += _amount(quotas[name], use)
    return dict(found)


def _amount(quota: Quota, use: RecordedUse) -> int:
    if quota.unit == "requests":
        return use.requests
    cached = use.cached_tokens
    written = min(use.cache_write_tokens, use.input_tokens - cached)
    tokens = Tokens(use.input_tokens, use.output_tokens, cached, written)
    return amount_of(quota, CallUse(tokens, use.images, use.audio_seconds, use.cost_micros)) or 0


@dataclass(frozen=True, slots=True)
class _Opened:
    """An upstream with its open clients, in this process."""

    upstream: Upstream
    processor: GeminiProcessor | None
    timeouts: Timeouts


@dataclass(slots=True)
class _Prepared:
    """A revision that is ready to be put in force. opened: its new or changed upstreams."""

    number: int
    deployment: Deployment
    opened: dict[str, _Opened] = field(default_factory=dict)


@dataclass(slots=True)
class _Left:
    """An upstream's clients that no new call uses. is_removed: its pool is closed too."""

    opened: _Opened
    since: float
    is_removed: bool


@dataclass(frozen=True, slots=True)
class UpstreamChange:
    """Result of a change. unreached: processes where it is not in force yet."""

    revision: int
    changes: list[str]
    took_ms: float = 0.0
    in_force_ms: float = 0.0
    processes: int = 0
    unreached: list[str] = field(default_factory=list)
    is_dry_run: bool = False


async def revision_to_start_with(record: UpstreamRevisions) -> UpstreamRevision:
    """Return the revision in force; number -1, with the file alone, while PostgreSQL is
    unavailable."""
    try:
        async with asyncio.timeout(_START_WITHIN_S):
            return await record.newest()
    except (StoreUnavailable, TimeoutError) as error:
        log.warning(Log.STORE_AWAY, detail=f"live changes to upstreams are not known: {error}")
        return UpstreamRevision(-1, {})


class LiveUpstreams:
    """The upstreams of one process, and their changes."""

    def __init__(
        self,
        *,
        config: Config,
        stated: Stated,
        start: UpstreamRevision,
        deployment: Deployment,
        record: UpstreamRevisions,
        process: UpstreamProcess,
        pools: Pools,
        relay: Relay,
        signers: Signers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """deployment: at the revision `start`. process: this process's id and role."""
        self.stated = stated
        self.deployment = deployment
        self.record = record
        self.revision = start.revision
        self.is_known = asyncio.Event()  # set once changes from before this start are known
        if start.revision >= 0:
            self.is_known.set()
        self._config = config
        self._process = process
        self.pools = pools
        self.relay = relay
        self.loads = ServerLoads(relay.wire, lambda: self.deployment.upstreams)
        # For prompts, by upstream; changed in place.
        self.processors: dict[str, GeminiProcessor] = {}
        self._spine = relay.spine
        self._signers = signers
        self._share: Share | None = None
        self._clock = clock
        self._opened: dict[str, _Opened] = {}
        self._learners: dict[str, asyncio.Task[None]] = {}
        self._prepared: _Prepared | None = None
        self._left: list[_Left] = []
        self._woken = asyncio.Event()

    # -- state of this process

    async def open(self, share: Share) -> None:
        """Open the upstreams of the deployment, whose pools and accounts exist. share: writes this
        process's notes into the default pool."""
        self._share = share
        for upstream in self.deployment.upstreams:
            self._enter(upstream, await self._open(upstream))
        self._log_problems()

    async def _open(self, upstream: Upstream) -> _Opened:
        await self._signers.open([upstream])
        processor, timeouts = None, timeouts_of(self._config, upstream)
        if Dialect.GEMINI in upstream.base_urls:
            processor = GeminiProcessor(
                api_key=upstream.key,
                base_url=upstream.base_urls[Dialect.GEMINI],
                timeouts=timeouts,
                access=upstream.access(Dialect.GEMINI),
                signers=self._signers,
            )
        return _Opened(upstream, processor, timeouts)

    def _enter(self, upstream: Upstream, opened: _Opened) -> None:
        """Have new calls use an upstream's clients."""
        name = upstream.name
        self._opened[name] = opened
        if opened.processor is None:
            self.processors.pop(name, None)
        else:
            self.processors[name] = opened.processor
        if (learner := self._learners.pop(name, None)) is not None:
            learner.cancel()
        if name in self._spine.health and upstream.pool in self.pools.keepers:
            share = self._share if upstream.pool == DEFAULT_POOL else None
            announced = self._spine.health[name].announced
            keeper = self.pools.keepers[upstream.pool]
            learning = LimitLearner(keeper, announced, upstream.learn, share=share)
            self._learners[name] = asyncio.create_task(learning.run())

    async def aclose(self) -> None:
        """Close all clients, and record that this process has ended."""
        with suppress(StoreUnavailable):
            await self.record.leave(self._process.instance_id)
        for learner in self._learners.values():
            learner.cancel()
        opened = [*self._opened.values(), *(one.opened for one in self._left)]
        if self._prepared is not None:
            opened += self._prepared.opened.values()
        for one in opened:
            await _close(one)

    def wake(self) -> None:
        """Have the record read soon."""
        self._woken.set()

    async def run(self) -> None:
        """Follow the record until cancelled."""
        while True:
            self._woken.clear()
            try:
                await self.look()
            except StoreUnavailable as error:
                log.debug(Log.STORE_AWAY, detail=error.message)
            except Exception:  # the top of a task: logged, and the loop continues
                log.exception(Log.INTERNAL_ERROR, component="upstreams")
            with suppress(TimeoutError):
                async with asyncio.timeout(next_beat_s(SEEN_EVERY_MS / 1000)):
                    await self._woken.wait()

    async def look(self) -> None:
        """Apply the revision in force, prepare a proposed one, close unused clients. Raises
        StoreUnavailable."""
        current = await self.record.see(self._state())
        if current.in_force != self.revision:
            await self._take_up(current.in_force)
            await self.record.see(self._state())
        elif current.proposed and current.proposed != self._prepared_number:
            await self._prepare(current.proposed)
            await self.record.see(self._state())
        elif not current.proposed:
            await self._discard()
        self.is_known.set()
        await self._close_left()

    @property
    def _prepared_number(self) -> int:
        return 0 if self._prepared is None else self._prepared.number

    def _state(self) -> UpstreamProcess:
        prepared = self._prepared
        return replace(
            self._process,
            revision=self.revision,
            prepared=self._prepared_number,
            problems=_problems(self.deployment),
            proposed_problems={} if prepared is None else _problems(prepared.deployment),
        )

    async def _prepare(self, number: int) -> None:
        await self._discard()
        revision = await self.record.get(number)
        if revision is not None:
            self._prepared = await self._made(number, changes_of(revision.upstreams))

    async def _made(self, number: int, live: LiveChanges) -> _Prepared:
        """Open all that a revision needs; an upstream that fails is listed as missing."""
        deployment = self.stated.deployment(live, self.deployment)
        missing, policies = dict(deployment.missing), deployment.policies
        found = _Prepared(number, deployment)
        for upstream in deployment.upstreams:
            if self._is_as_before(upstream):
                continue
            try:
                check_passthrough([upstream])
                if upstream.pool != DEFAULT_POOL:
                    policy = policies[upstream.name]
                    await self.pools.enter(upstream.pool, policy, upstream.provider)
                found.opened[upstream.name] = await self._open(upstream)
            except ConfigError as error:
                missing[upstream.name] = error
        usable = tuple(one for one in deployment.upstreams if one.name not in missing)
        found.deployment = replace(deployment, upstreams=usable, missing=missing)
        return found

    def _is_as_before(self, upstream: Upstream) -> bool:
        return upstream.name in self._opened and self.deployment.upstream(upstream.name) is upstream

    async def _discard(self) -> None:
        """Close what was prepared for a revision that will not be in force."""
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            return
        for name, opened in prepared.opened.items():
            if self.deployment.upstream(name) is None:
                self.pools.leave(name)
                ending = {one.opened.upstream.name for one in self._left if one.is_removed}
                if name not in ending:  # else closed after the last of its calls
                    await self.pools.close(name)
            await _close(opened)
        self._keep_credentials()

    def _keep_credentials(self) -> None:
        """Renew the credentials of upstreams in force, prepared, or still used by calls."""
        prepared = () if self._prepared is None else self._prepared.deployment.upstreams
        left = (one.opened.upstream for one in self._left)
        self._signers.keep((*self.deployment.upstreams, *prepared, *left))

    async def _take_up(self, number: int) -> None:
        """Put a revision in force in this process."""
        revision = await self.record.get(number) if number else UpstreamRevision(0, {})
        if revision is None:
            return
        prepared, self._prepared = self._prepared, None
        live = changes_of(revision.upstreams)
        if prepared is None or prepared.number != number:
            self._prepared = prepared
            await self._discard()
            prepared = await self._made(number, live)
        self._swap(prepared)
        log.warning(
            Log.UPSTREAMS_CHANGED,
            revision=number,
            set_by=revision.set_by,
            action=revision.action,
            reason=revision.reason,
        )
        self._log_problems()

    def _swap(self, prepared: _Prepared) -> None:
        """Swap without awaiting, so that no call sees half of the change."""
        before, now = self.deployment, prepared.deployment
        self._spine.targets.replace(now)
        self.deployment, self.revision = now, prepared.number
        for upstream in now.upstreams:
            if (opened := prepared.opened.get(upstream.name)) is None:
                continue
            if (old := self._opened.get(upstream.name)) is not None:
                self._left.append(_Left(old, self._clock(), is_removed=False))
            self._spine.install(upstream, self.pools.limiters[upstream.pool])
            self._enter(upstream, opened)
        for upstream in before.upstreams:
            if now.upstream(upstream.name) is None:
                self._withdraw(upstream.name)
        for name, gate in self._spine.health.items():
            gate.drain(name in now.drained)

    def _withdraw(self, name: str) -> None:
        self._spine.withdraw(name)
        if name != DEFAULT_POOL:
            self.pools.leave(name)
        if (learner := self._learners.pop(name, None)) is not None:
            learner.cancel()
        if (opened := self._opened.pop(name, None)) is not None:
            self._left.append(_Left(opened, self._clock(), is_removed=True))

    async def _close_left(self) -> None:
        """Close the clients that no call can use any more."""
        due = [one for one in self._left if self._clock() - one.since >= _CLOSE_AFTER_S]
        for one in due:
            name, processor = one.opened.upstream.name, one.opened.processor
            is_back = name in self._opened
            if (processor is not None and processor.open_calls) or (
                one.is_removed and not is_back and not self.pools.is_idle(name)
            ):
                continue
            self._left.remove(one)
            if one.is_removed and not is_back:
                self.processors.pop(name, None)
                self._spine.forget(name)
                await self.pools.close(name)
            await _close(one.opened)
        if due:
            self._keep_credentials()

    def _log_problems(self) -> None:
        for name, problem in _problems(self.deployment).items():
            log.error(Log.UPSTREAM_MISSING, upstream=name, reason=problem)
        for line in self.deployment.live.differing(self.stated.tables()):
            log.warning(Log.LIVE_UPSTREAMS_KEPT, differs=line)

    # -- changes, by this process for all

    async def change(
        self,
        action: str,
        edit: LiveEdit,
        *,
        by: str,
        reason: str = "",
        expected: int | None = None,
        is_dry_run: bool = False,
        needs_preparation: bool = True,
    ) -> UpstreamChange:
        """Put the result of `edit` in force in all processes.

        expected: the revision that must be in force. Raises ConfigError for an invalid change,
        UpstreamsChanged, UpstreamUnfit if a process cannot apply it, and StoreUnavailable.
        """
        began = time.perf_counter()
        base = self.stated.tables()
        lines: list[str] = []

        def propose(now: UpstreamRevision) -> Mapping[str, Any] | None:
            if expected is not None and now.revision != expected:
                message = f"revision {now.revision} is in force, not {expected}"
                raise UpstreamsChanged(message)
            live = changes_of(now.upstreams)
            new = edit(live, base)
            lines[:] = changed_lines(live, new)
            if new.plain() == live.plain():
                return None
            if needs_preparation:
                self._check(new, live)
            return new.plain()

        if is_dry_run:
            now = await self.record.newest()
            propose(now)
            return UpstreamChange(now.revision, lines, is_dry_run=True)
        revision = await self.record.propose(
            action, propose, set_by=by, reason=reason, in_force=not needs_preparation
        )
        self.wake()
        if lines and needs_preparation:
            await self._have_prepared(revision.revision)
            if not await self.record.decide(revision.revision):
                raise UpstreamsChanged("another change came first")
            self.wake()
        in_force = time.perf_counter()
        processes, unreached = await self._have_known(revision.revision)
        ended = time.perf_counter()
        return UpstreamChange(
            revision.revision,
            lines,
            round((ended - began) * 1000, 1),
            round((ended - in_force) * 1000, 1),
            processes,
            unreached,
        )

    def _check(self, new: LiveChanges, live: LiveChanges) -> None:
        """Raises ConfigError for a change that this process itself cannot apply."""
        deployment = self.stated.deployment(new, self.deployment)
        for name, error in deployment.missing.items():
            if new.of(name) != live.of(name):
                raise error
        check_passthrough(deployment.upstreams)
        check_adopted(deployment.upstreams)

    async def _have_prepared(self, number: int) -> None:
        """Return once every live process has prepared the revision. Raises UpstreamUnfit if one
        cannot, or does not report in time."""
        before = self.deployment.missing
        late = await self._wait_for(
            lambda one: max(one.prepared, one.revision) >= number, PREPARED_WITHIN_S
        )
        why = [f"{name} does not answer" for name in late]
        for one in await self.record.processes():
            if one.prepared == number:
                new = {
                    name: problem
                    for name, problem in one.proposed_problems.items()
                    if name not in one.problems and name not in before
                }
                why += [f"{one.instance_id}: {problem}" for problem in new.values()]
        if why:
            problem = "not put in force: " + "; ".join(why)
            await self.record.decide(number, problem)
            raise UpstreamUnfit(problem)

    async def _have_known(self, number: int) -> tuple[int, list[str]]:
        """Return the number of processes, and those where the revision is not in force in time."""
        late = await self._wait_for(lambda one: one.revision >= number, KNOWN_WITHIN_S)
        return len(await self.record.processes()), late

    async def _wait_for(
        self, is_done: Callable[[UpstreamProcess], bool], within_s: float
    ) -> list[str]:
        until, own = time.monotonic() + within_s, self._process.instance_id
        while True:
            processes = await self.record.processes()
            late = [one.instance_id for one in processes if not is_done(one)]
            if all(one.instance_id != own for one in processes):  # it has just started
                late.append(own)
            if not late or time.monotonic() > until:
                return late
            await asyncio.sleep(_LOOK_EVERY_S)

    async def roll_back(
        self, number: int, *, by: str, reason: str, expected: int | None, is_dry_run: bool
    ) -> UpstreamChange:
        """Put the changes of an earlier revision in force, 0 for none. Raises NotFound for a
        revision that was never in force, and what `change` raises."""
        then = UpstreamRevision(0, {}) if number == 0 else await self.record.get(number)
        if then is None or (number and then.in_force_at is None):
            raise NotFound(f"revision {number} is not on record", field="revision")
        return await self.change(
            f"rollback {number}",
            as_at(then.upstreams),
            by=by,
            reason=reason,
            expected=expected,
            is_dry_run=is_dry_run,
        )

    # -- tests of an upstream

    def candidate(self, edit: LiveEdit, name: str) -> Upstream:
        """Return the upstream that `edit` would make. Raises ConfigError."""
        live = edit(self.deployment.live, self.stated.tables())
        deployment = self.stated.deployment(live, self.deployment)
        if (error := deployment.missing.get(name)) is not None:
            raise error
        found = deployment.upstream(name)
        if found is None:
            raise ConfigError("name", name[:100], "must be an upstream")
        return found

    async def test(self, upstream: Upstream) -> list[UpstreamTest]:
        """List an upstream's models from this process, in each dialect, with its credentials and
        over its network. Never raises an error of the provider."""
        connect_ms = min(TEST_MS, timeouts_of(self._config, upstream).connect_ms)
        timeouts = Timeouts(connect_ms, TEST_MS, TEST_MS, TEST_MS)
        upstream = replace(upstream, timeouts={CONNECT_TIMEOUT: connect_ms})
        async with open_wire(timeouts, [upstream]) as wire:
            return [await tested(wire, upstream, dialect) for dialect in upstream.base_urls]


def check_tested(tests: Sequence[UpstreamTest]) -> None:
    """Raises UpstreamUnfit if a test failed."""
    failed = [f"{one.dialect} at {one.url}: {one.problem}" for one in tests if one.problem]
    if failed:
        raise UpstreamUnfit("the test failed: " + "; ".join(failed))


def _problems(deployment: Deployment) -> dict[str, str]:
    return {name: f"{error.variable} {error.allowed}" for name, error in deployment.missing.items()}


async def _close(opened: _Opened) -> None:
    if opened.processor is not None:
        await opened.processor.aclose()


@asynccontextmanager
async def following(upstreams: LiveUpstreams, notifications: Notifications) -> AsyncIterator[None]:
    """Context in which the upstreams follow the record, and conversations follow their moves in
    other processes."""
    wakers, affinity = notifications.on_upstreams, upstreams.relay.spine.affinity
    wakers.append(upstreams.wake)
    affinity.on_move = notifications.moved
    notifications.on_moved.append(affinity.moved)
    notifications.listen()
    task = asyncio.create_task(upstreams.run())
    try:
        yield
    finally:
        wakers.remove(upstreams.wake)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await upstreams.aclose()
