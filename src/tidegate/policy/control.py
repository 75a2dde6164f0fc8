"""What people see of a running pool and do to it, as plain values: for commands and `/admin`.

Invariant: what is shown is whole even while PostgreSQL is away, which then says so; what is done
leaves a line in the log with who did it and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from tidegate.errors import NotFound, StoreUnavailable
from tidegate.limiter import LimitView, PermitView, QueueView, SessionView, TenantView
from tidegate.limiter.limiter import Limiter
from tidegate.limiter.limits import MAX_BOUND, Limit
from tidegate.policy.keeper import PolicyKeeper
from tidegate.policy.plain import to_plain
from tidegate.policy.words import in_words
from tidegate.store.running import Running, RunningCall
from tidegate.store.tenants import Tenants
from tidegate.telemetry import Log, get_logger

log = get_logger()


@dataclass(frozen=True, slots=True)
class InForce:
    """The revision in force. Who, why and since when are None while the record is not there."""

    revision: int
    origin: str | None = None
    set_by: str | None = None
    reason: str | None = None
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class ShownLimit:
    """A limit with what it comes to in words. For the other fields see `LimitView`; `bound` is
    that of the policy in force, `current` what an adaptive limit has found."""

    limit: str
    words: str
    bound: int
    current: int
    used: int
    waiting: int
    lapsing: int
    shadowed: int
    paused_ms: int
    paused_by: str
    room_in_ms: int


@dataclass(frozen=True, slots=True)
class Overview:
    """A pool. `recovering_ms`: nobody is let in for so long, after Valkey lost its data."""

    pool: str
    in_force: InForce
    recovering_ms: int
    limits: list[ShownLimit]
    processes: list[SessionView]
    tenants: list[TenantView]
    queues: list[QueueView]
    policy: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ShownPermit:
    """A permit in use. Request and time of admission are known of jobs; None else."""

    process: str
    session: str
    ticket: int
    tenant: str
    limits: tuple[str, ...]
    hard_deadline_ms: int
    request_id: UUID | None = None
    since: datetime | None = None


class Control:
    """One pool, through this process's limiter. Raises LimiterUnavailable while Valkey is away.

    `tenants` are those on record; what they weigh and their limits are part of the pool's policy.
    """

    def __init__(
        self, limiter: Limiter, keeper: PolicyKeeper, running: Running, tenants: Tenants
    ) -> None:
        self.limiter = limiter
        self.keeper = keeper
        self.running = running
        self.tenants = tenants

    async def overview(self, *, without_us: bool = False) -> Overview:
        """`without_us`: this process is only there to look."""
        snapshot = await self.limiter.snapshot()
        policy = self.limiter.policy
        return Overview(
            pool=self.limiter.pool,
            in_force=await self._in_force(snapshot.revision),
            recovering_ms=snapshot.recovering_ms,
            limits=[self._shown(view) for view in snapshot.limits.values()],
            processes=[
                one
                for one in snapshot.processes
                if not without_us or one.sid != self.limiter.session
            ],
            tenants=list(snapshot.tenants),
            queues=list(snapshot.queues),
            policy=to_plain(policy),
        )

    async def permits(self) -> list[ShownPermit]:
        """Every permit in use."""
        held = await self.limiter.permits()
        return shown_permits(held, await self.calls())

    async def calls(self) -> Mapping[tuple[str, int], RunningCall]:
        """Whose the permits are, as far as the record knows; nothing while it is away."""
        try:
            return await self.running.calls(self.limiter.pool)
        except StoreUnavailable as away:
            log.debug(Log.STORE_AWAY, detail=away.message)
            return {}

    async def pause(self, limit: str, for_ms: int | None, *, by: str, reason: str = "") -> bool:
        """Let nobody in under a limit for a time, or until it is resumed. False where a pause
        that lasts longer stays. Raises NotFound."""
        self._check_there(limit)
        length = {} if for_ms is None else {"for_ms": for_ms}
        paused = await self.limiter.penalise(limit, reason=reason, by=by, **length)
        if paused:
            log.warning(Log.LIMIT_PAUSED, limit=limit, for_ms=for_ms, by=by, reason=reason)
        return paused

    async def resume(self, limit: str, *, by: str) -> bool:
        """End a pause; False if there was none. Raises NotFound."""
        self._check_there(limit)
        resumed = await self.limiter.resume(limit, by=by)
        if resumed:
            log.warning(Log.LIMIT_RESUMED, limit=limit, by=by)
        return resumed

    async def revoke(self, process: str, *, by: str) -> int:
        """Take back all that a process holds whose death is certain. Raises NotFound."""
        ended = await self.limiter.revoke(process)
        if not ended:
            raise NotFound(f"no process {process} is in the pool")
        log.warning(Log.SESSION_REVOKED, session=process, by=by)
        return ended

    async def _in_force(self, revision: int) -> InForce:
        try:
            newest = (await self.keeper.history(1))[:1]
        except StoreUnavailable as away:
            log.debug(Log.STORE_AWAY, detail=away.message)
            newest = []
        for record in newest:
            if record.revision == revision:
                return InForce(
                    revision, record.origin, record.set_by, record.reason, record.created_at
                )
        return InForce(revision)

    def _shown(self, view: LimitView) -> ShownLimit:
        limit = self.limiter.policy.limit(view.limit)
        return ShownLimit(
            limit=view.limit,
            words=_words_of(view, limit),
            bound=view.bound,
            current=view.current,
            used=view.used,
            waiting=view.waiting,
            lapsing=view.lapsing,
            shadowed=view.shadowed,
            paused_ms=view.paused_ms,
            paused_by=view.paused_by,
            room_in_ms=view.room_in_ms,
        )

    def _check_there(self, limit: str) -> None:
        if self.limiter.policy.binding(limit) is None:
            raise NotFound(f"there is no limit {limit}")


def _words_of(view: LimitView, limit: Limit | None) -> str:
    if limit is not None:
        return in_words(limit)
    return f"{view.bound}" if view.bound < MAX_BOUND else "no limit of its own"


def shown_permits(
    held: tuple[PermitView, ...], calls: Mapping[tuple[str, int], RunningCall]
) -> list[ShownPermit]:
    found = []
    for permit in held:
        call = calls.get((permit.process, permit.seq))
        found.append(
            ShownPermit(
                process=permit.process,
                session=permit.sid,
                ticket=permit.ticket,
                tenant=permit.tenant,
                limits=permit.limits,
                hard_deadline_ms=permit.left_ms,
                request_id=None if call is None else call.request_id,
                since=None if call is None else call.admitted_at,
            )
        )
    return found
