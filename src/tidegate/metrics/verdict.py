"""Verdict on a deployment: healthy, degraded or down, with its causes in the order to act on.

The dashboard, `/health/dependencies` and `tidegate status` share it. Invariants: `judge` is pure;
waiting requests are normal, and degrade a deployment only if their wait is long; a part that does
not answer is a cause itself, and the others are judged without it; at most `MOST_CAUSES` causes are
listed, the worst first.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Literal, get_args

from tidegate.errors import LimiterUnavailable, StoreUnavailable
from tidegate.limiter import (
    Limit,
    LimitView,
    PoolPolicy,
    Quota,
    Rate,
    Snapshot,
    format_pause,
    format_span,
)
from tidegate.metrics.process import READ_WITHIN_S, Board, Note, Recent, UpstreamFound
from tidegate.policy.format import in_words
from tidegate.policy.inspection import adapted_from, admitted_per_s, is_full
from tidegate.policy.learned import LearnedLimit, shared_limits
from tidegate.policy.rollout import PolicyKeeper
from tidegate.prices.budgets import Budget, resume_command, scope_values
from tidegate.spine.routing import DRAINED
from tidegate.store.budgets import BudgetBook
from tidegate.store.database import NO_WRITES
from tidegate.store.jobs import MOST_STUCK, StuckCounts
from tidegate.store.store import Store
from tidegate.telemetry.logging import Log, get_logger

Health = Literal["healthy", "degraded", "down"]
CauseKind = Literal[
    "valkey_away",
    "upstreams_out",
    "postgresql_away",
    "recovering",
    "key_refused",
    "upstream_out",
    "bottleneck",
    "limit_paused",
    "limit_closed",
    "budget_paused",
    "budget_spent",
    "no_workers",
    "dead_jobs",
    "webhooks_given_up",
    "alerts_given_up",
    "drift",
]
LONG_WAIT_MS = 60_000
SHORT_PAUSE_MS = 10_000  # such as after a provider's 429: it ends before a person could act
MOST_CAUSES = 12
FRESH_S = 1.0
RECORD_FRESH_S = 2.0
_RECORD_MS = 1_000
_ENDS = ".,;: \n"  # of a provider's message
_MOST_TENANTS = 3
_GATE = "upstream:"  # the limit that a process pauses when its upstream is out
_LEVELS: Mapping[Health, int] = {"down": 0, "degraded": 1, "healthy": 2}
_ORDER: Mapping[str, int] = {kind: place for place, kind in enumerate(get_args(CauseKind))}

log = get_logger()


@dataclass(frozen=True, slots=True)
class Cause:
    """One reason for the state of a deployment.

    level: the state that this cause alone produces; a cause with `healthy` is for information.
    subject: the limit, upstream or budget. command: acts on the cause.
    """

    kind: CauseKind
    level: Health
    words: str
    detail: str = ""
    pool: str | None = None
    subject: str | None = None
    waiting: int = 0
    command: str = ""


@dataclass(frozen=True, slots=True)
class DeploymentVerdict:
    """The state of a deployment, as a level and a sentence. waiting: calls and claimed jobs that
    wait at a limit. queued: jobs that no worker has claimed, or that wait for a retry, each up to
    `MOST_STUCK`. more: causes that are not listed."""

    health: Health
    sentence: str
    waiting: int
    in_flight: int
    causes: tuple[Cause, ...]
    more: int = 0
    queued: int = 0


@dataclass(frozen=True, slots=True)
class PoolReading:
    """A pool at one moment. snapshot: None if Valkey does not answer, for the reason `problem`."""

    pool: str
    policy: PoolPolicy
    snapshot: Snapshot | None
    learned: Sequence[LearnedLimit] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class RecordReading:
    """Recent state of PostgreSQL that needs an operator."""

    stuck: StuckCounts
    budgets: Sequence[Budget] = ()
    books: Sequence[BudgetBook] = ()


@dataclass(frozen=True, slots=True)
class DeploymentReading:
    """A deployment at one moment. record: None if PostgreSQL is unavailable, for the reason
    `problem`."""

    pools: Sequence[PoolReading]
    notes: Sequence[Note]
    upstreams: Collection[str]
    record: RecordReading | None
    problem: str = ""


class Standing:
    """Reads the state of the deployment. One per process."""

    def __init__(self, keepers: Mapping[str, PolicyKeeper], board: Board, store: Store) -> None:
        self._keepers = keepers
        self._board = board
        self._store = store
        self._record = Recent(RECORD_FRESH_S, self._read_record)
        self._verdict = Recent(FRESH_S, self._judge)

    async def look(self) -> DeploymentReading:
        """Read every pool from Valkey, and PostgreSQL unless it was read a moment ago."""
        keepers = list(self._keepers.items())
        notes, found, pools = await asyncio.gather(
            self._board.notes(),
            self._record.get(),
            asyncio.gather(*(_pool(name, keeper) for name, keeper in keepers)),
        )
        record, problem = (None, found) if isinstance(found, str) else (found, "")
        names = self._board.own().upstreams.keys()
        return DeploymentReading(pools, notes.notes, names, record, problem)

    async def verdict(self) -> DeploymentVerdict:
        """Return the recent verdict, computed once for all callers."""
        return await self._verdict.get()

    async def _judge(self) -> DeploymentVerdict:
        return judge(await self.look())

    async def _read_record(self) -> RecordReading | str:
        """Return what PostgreSQL has, or why it is unavailable."""
        try:
            await self._store.connections.check_writes(_RECORD_MS)
            stuck = await self._store.stuck.counts()
            _, budgets = await self._store.budgets.records.all()
            books = await self._store.budgets.records.books() if budgets else []
        except StoreUnavailable as error:
            log.debug(Log.STORE_AWAY, detail=error.message)
            return error.message
        return RecordReading(stuck, budgets, books)


async def _pool(name: str, keeper: PolicyKeeper) -> PoolReading:
    limiter = keeper.limiter
    try:
        async with asyncio.timeout(READ_WITHIN_S):
            snapshot, learned = await asyncio.gather(
                limiter.snapshot(), shared_limits(limiter, keeper.provider)
            )
    except LimiterUnavailable as error:
        return PoolReading(name, limiter.policy, None, problem=error.message)
    except TimeoutError:
        problem = f"no answer within {READ_WITHIN_S * 1000:.0f} ms"
        return PoolReading(name, limiter.policy, None, problem=problem)
    return PoolReading(name, limiter.policy, snapshot, learned)


def judge(reading: DeploymentReading) -> DeploymentVerdict:
    """Return the state of a deployment and its causes."""
    causes = causes_of(reading)
    levels = [one.level for one in causes]
    health: Health = min(levels, key=_LEVELS.__getitem__) if levels else "healthy"
    snapshots = [one.snapshot for one in reading.pools if one.snapshot is not None]
    waiting = sum(one.waiting for pool in snapshots for one in pool.tenants)
    held = sum(one.held for pool in snapshots for one in pool.processes)
    stuck = None if reading.record is None else reading.record.stuck
    listed = tuple(causes[:MOST_CAUSES])
    return DeploymentVerdict(
        health,
        _sentence(health, causes, waiting, stuck),
        waiting,
        held,
        listed,
        len(causes) - len(listed),
        0 if stuck is None else stuck.ready + stuck.retrying,
    )


def causes_of(reading: DeploymentReading) -> list[Cause]:
    """Return all causes of the state of a deployment, the worst first."""
    return sorted(
        (
            *_of_stores(reading),
            *_of_upstreams(reading),
            *_of_limits(reading),
            *_of_record(reading.record),
        ),
        key=lambda one: (_LEVELS[one.level], _ORDER[one.kind], -one.waiting, one.subject or ""),
    )


def _sentence(
    health: Health, causes: Sequence[Cause], waiting: int, stuck: StuckCounts | None
) -> str:
    waits = _counted(waiting, "request") + (" waits" if waiting == 1 else " wait")
    queued = "" if stuck is None else _queued(stuck, is_more=waiting > 0)
    if health == "healthy":
        waits = f"{waits} for a turn" if waiting else waits
    what = ", ".join(part for part in (waits if waiting else "", queued) if part) or "nothing waits"
    if health == "degraded":
        problems = _counted(sum(one.level == "degraded" for one in causes), "problem")
        return f"Degraded: {problems}, {what}."
    if health == "down":
        return f"Down: no call is served, {what}."
    return f"Healthy: {what}."


def _queued(stuck: StuckCounts, *, is_more: bool) -> str:
    """Return text such as `74 more jobs are queued`; empty without such jobs."""
    jobs = stuck.ready + stuck.retrying
    if not jobs:
        return ""
    is_cut = MOST_STUCK in (stuck.ready, stuck.retrying)
    more = " more" if is_more else ""
    amount = f"{jobs:,}{' or more' if is_cut else ''}{more} {'job is' if jobs == 1 else 'jobs are'}"
    retries = " for a retry" if not stuck.ready else ""
    return f"{amount} queued{retries}"


def _counted(amount: int, noun: str) -> str:
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def _of_stores(reading: DeploymentReading) -> Iterator[Cause]:
    unavailable = [one for one in reading.pools if one.snapshot is None]
    if unavailable:
        is_all = len(unavailable) == len(reading.pools)
        where = "" if is_all else f" for {', '.join(one.pool for one in unavailable)}"
        words = f"Valkey does not answer{where}: no call is admitted."
        level: Health = "down" if is_all else "degraded"
        yield Cause("valkey_away", level, words, unavailable[0].problem, command="tidegate doctor")
    if reading.record is None:
        what = NO_WRITES if reading.problem.startswith(NO_WRITES) else "PostgreSQL does not answer"
        words = f"{what}: jobs are rejected, streams and native calls continue."
        yield Cause(
            "postgresql_away", "degraded", words, reading.problem, command="tidegate doctor"
        )
    for one in reading.pools:
        if one.snapshot is not None and one.snapshot.recovering_ms > 0:
            left = format_span(one.snapshot.recovering_ms)
            words = f"Valkey lost the data of {one.pool}: calls are admitted again in {left}."
            yield Cause("recovering", "degraded", words, pool=one.pool)


def found_by(upstream: str, notes: Iterable[Note]) -> list[tuple[str, UpstreamFound]]:
    """Return the state of an upstream in each process, the worst first."""
    found = [(one.process, one.upstreams[upstream]) for one in notes if upstream in one.upstreams]
    return sorted(found, key=lambda one: _badness(one[1]), reverse=True)


def _badness(found: UpstreamFound) -> tuple[bool, int, int]:
    return found.key_refused, ("ok", "trying", "out").index(found.state), found.faults


def _of_upstreams(reading: DeploymentReading) -> Iterator[Cause]:
    """Yield the causes of upstreams. A probed one is a problem while jobs wait for a retry, so
    that the state of one that stays out does not change with each probe."""
    is_retried = reading.record is not None and reading.record.stuck.retrying > 0
    causes = list[Cause]()
    for upstream in reading.upstreams:
        found = found_by(upstream, reading.notes)
        cause = _of_upstream(upstream, found, reading.pools) or _probed(upstream, found, is_retried)
        if cause is not None:
            causes.append(cause)
    if causes and all(_is_out_everywhere(one, reading.notes) for one in reading.upstreams):
        several = len(causes) > 1
        words = "No upstream takes calls." if several else "The only upstream takes no calls."
        yield Cause("upstreams_out", "down", words, command="tidegate upstreams list")
    yield from causes


def _is_out_everywhere(upstream: str, notes: Iterable[Note]) -> bool:
    found = [one for _, one in found_by(upstream, notes)]
    return bool(found) and all(one.state == "out" or one.key_refused for one in found)


def _of_upstream(
    upstream: str, found: Sequence[tuple[str, UpstreamFound]], pools: Sequence[PoolReading]
) -> Cause | None:
    refused = [one for _, one in found if one.key_refused]
    out = [one for _, one in found if one.state == "out"]
    waiting, waiters = _waiting_at_gate(upstream, pools)
    command = f"tidegate upstreams test {upstream}"
    kind: CauseKind = "upstream_out"
    level: Health = "degraded"
    if drained := [one for one in out if one.why.endswith(DRAINED)]:
        words, why, level = f"Upstream {upstream} is drained.", drained[0].why, "healthy"
        command = f"tidegate upstreams resume {upstream}"
    elif refused:
        why = refused[0].why
        words = f"Upstream {upstream} rejects its API key."
        if refused[0].unpaid:
            words = f"The account of upstream {upstream} has no credit left."
        kind = "key_refused"
    elif out:
        of = f" in {len(out)} of {len(found)} processes" if len(found) > 1 else ""
        words, why = f"Upstream {upstream} takes no calls{of}.", out[0].why
    else:
        return None
    detail = f"{why[:1].upper()}{why[1:].rstrip('.')}." if why else ""
    return Cause(
        kind,
        level,
        words,
        " ".join(part for part in (detail, waiters) if part),
        subject=upstream,
        waiting=waiting,
        command=command,
    )


def _probed(
    upstream: str, found: Sequence[tuple[str, UpstreamFound]], is_retried: bool
) -> Cause | None:
    """Return the cause of an upstream that no process calls normally, though none is out."""
    failed = [one for _, one in found if one.faults]
    if not failed or any(one.state != "trying" for _, one in found):
        return None
    why = next((one.why for one in failed if one.why), "")
    return Cause(
        "upstream_out",
        "degraded" if is_retried else "healthy",
        f"Upstream {upstream} is being probed: its last call failed.",
        f"{why[:1].upper()}{why[1:].rstrip('.')}." if why else "",
        subject=upstream,
        command=f"tidegate upstreams test {upstream}",
    )


def _waiting_at_gate(upstream: str, pools: Sequence[PoolReading]) -> tuple[int, str]:
    """Return how many calls wait until an upstream is tried again, and of which tenants."""
    gate, waiting = f"{_GATE}{upstream}", 0
    tenants: Counter[str] = Counter()
    for one in pools:
        if one.snapshot is not None and (view := one.snapshot.limits.get(gate)) is not None:
            waiting += view.waiting
            tenants += waiting_by_limit(one.snapshot)[gate]
    return waiting, _who_waits(waiting, tenants)


def _of_limits(reading: DeploymentReading) -> Iterator[Cause]:
    for one in reading.pools:
        if one.snapshot is None:
            continue
        held_up = waiting_by_limit(one.snapshot)
        for view in one.snapshot.limits.values():
            if _is_gate(view.limit, reading):  # reported with its upstream
                continue
            if view.paused_ms > SHORT_PAUSE_MS:
                yield _paused(one.pool, view, held_up.get(view.limit, Counter()))
            elif view.bound == 0 and view.waiting:
                words = f"{view.limit} is closed: a limit of 0 admits no calls."
                command = f"tidegate limits set {quote(f'{view.limit}=N')} --pool {one.pool}"
                yield Cause(
                    "limit_closed",
                    "degraded",
                    words,
                    pool=one.pool,
                    subject=view.limit,
                    waiting=view.waiting,
                    command=command,
                )
        narrow = [
            each
            for each in one.snapshot.limits.values()
            if each.waiting
            and each.bound
            and not each.paused_ms
            and not each.limit.startswith(_GATE)
        ]
        most = max(narrow, key=lambda each: (each.waiting, each.limit), default=None)
        for view in narrow:
            cause = _bottleneck(one, view, held_up.get(view.limit, Counter()), view is most)
            if view is most or cause.level == "degraded":
                yield cause
        yield from _drifts(one)


def _is_gate(limit: str, reading: DeploymentReading) -> bool:
    """Return whether a pause is due to an upstream's outage or removal."""
    upstream = limit.removeprefix(_GATE)
    if upstream == limit or upstream not in reading.upstreams:
        return upstream != limit
    return any(one.state != "ok" for _, one in found_by(upstream, reading.notes))


def waiting_by_limit(snapshot: Snapshot) -> defaultdict[str, Counter[str]]:
    """Return per limit the tenants with calls that it blocks, and their number."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for queue in snapshot.queues:
        if queue.held_up_by is not None:
            found[queue.held_up_by][queue.tenant] += queue.waiting
    return found


def _paused(pool: str, view: LimitView, tenants: Counter[str]) -> Cause:
    lasting = format_pause(view.paused_ms)
    by = f"By {view.paused_by.rstrip(_ENDS)}." if view.paused_by else ""
    return Cause(
        "limit_paused",
        "degraded",
        f"{view.limit} is paused {lasting}.",
        " ".join(part for part in (by, _who_waits(view.waiting, tenants)) if part),
        pool=pool,
        subject=view.limit,
        waiting=view.waiting,
        command=f"tidegate limits resume {quote(view.limit)} --pool {pool}",
    )


def _bottleneck(
    reading: PoolReading, view: LimitView, tenants: Counter[str], is_most: bool
) -> Cause:
    """Return the cause of a limit that blocks calls, with the estimated wait of the last one."""
    per_s = admitted_per_s(view, reading.policy.limit(view.limit))
    wait_ms = view.waiting * 1_000 / per_s if per_s else float(view.room_in_ms)
    parts = [_fullness(view, reading.policy.limit(view.limit))]
    if (wide := adapted_from(view)) is not None:
        parts.append(f"Adapted from {wide:,} to {view.current:,} after 429s.")
    if wait_ms >= 1_000:
        parts.append(f"The last waiting call waits about {format_span(wait_ms)}.")
    parts.append(_who_waits(view.waiting, tenants))
    return Cause(
        "bottleneck",
        "degraded" if wait_ms > LONG_WAIT_MS else "healthy",
        f"{view.limit} is {'the' if is_most else 'a'} bottleneck: {view.waiting:,} waiting.",
        " ".join(part for part in parts if part),
        pool=reading.pool,
        subject=view.limit,
        waiting=view.waiting,
        command=f"tidegate limits show --pool {reading.pool}",
    )


def _fullness(view: LimitView, limit: Limit | None) -> str:
    if not is_full(view):
        return ""
    if isinstance(limit, Rate | Quota) and limit.unit == "usd":
        return f"Full: all of {in_words(limit)} is used."
    return f"Full: {view.used:,} of {view.current if view.sort == 'c' else view.bound:,} used."


def _who_waits(waiting: int, tenants: Counter[str]) -> str:
    """Return text such as `Waiting: acme 130, globex 20 and 2 more tenants.`"""
    if not waiting or not tenants:
        return ""
    named = ", ".join(f"{name} {count:,}" for name, count in tenants.most_common(_MOST_TENANTS))
    more = len(tenants) - _MOST_TENANTS
    others = f" and {more} more {'tenant' if more == 1 else 'tenants'}" if more > 0 else ""
    return f"Waiting: {named}{others}."


def _drifts(reading: PoolReading) -> Iterator[Cause]:
    for one in reading.learned:
        if one.drift == "same":
            continue
        now = "none" if one.in_force is None else f"{one.in_force:,}"
        yield Cause(
            "drift",
            "degraded" if one.drift == "fell" else "healthy",
            f"{one.limit}: the provider reports {one.bound:,}, {now} is in force.",
            pool=reading.pool,
            subject=one.limit,
            command=f"tidegate limits accept {quote(one.limit)} --pool {reading.pool}",
        )


def _of_record(record: RecordReading | None) -> Iterator[Cause]:
    if record is None:
        return
    budgets = {one.name: one for one in record.budgets}
    for book in record.books:
        if (budget := budgets.get(book.budget)) is not None:
            cause = _of_budget(budget, book)
            if cause is not None:
                yield cause
    stuck = record.stuck
    if stuck.ready and not stuck.workers:
        words = f"No worker is alive: {_counted(stuck.ready, 'job')} cannot start."
        detail = "No worker has reported within CLAIM_LEASE_MS: it is stopped, hung or cut off."
        yield Cause("no_workers", "degraded", words, detail, command="tidegate worker")
    if stuck.jobs:
        words = f"{_counted(stuck.jobs, 'job')} died with their workers."
        words = words if stuck.jobs > 1 else "1 job died with its workers."
        detail = "Requeue them when the cause is fixed, or discard them."
        since = "24h" if stuck.dead_since is None else f"{stuck.dead_since:%Y-%m-%dT%H:%M}"
        command = f"tidegate requeue --status dead --since {since}"
        yield Cause("dead_jobs", "degraded", words, detail, command=command)
    if stuck.webhooks:
        words = f"{_counted(stuck.webhooks, 'webhook')} could not be delivered."
        yield Cause("webhooks_given_up", "degraded", words, "Send them again from Attention.")
    if stuck.alerts:
        words = f"{_counted(stuck.alerts, 'alert')} could not be posted, and none since."
        detail = (
            "ALERT_WEBHOOK_URL does not accept them. Send a test or post them again from Alerts."
        )
        yield Cause("alerts_given_up", "degraded", words, detail)


def _of_budget(budget: Budget, book: BudgetBook) -> Cause | None:
    scope = scope_values(book.scope)
    whose = ", ".join(value or "none" for value in scope)
    name = f"{budget.name} ({whose})" if whose else budget.name
    command = resume_command(budget.name, scope)
    if book.paused_since is not None:
        words = f"Budget {name} is paused: its calls are rejected."
        return Cause("budget_paused", "degraded", words, subject=budget.name, command=command)
    if book.spent < book.amount:
        return None
    then = f"its calls use {budget.fallback}" if budget.fallback else "its calls are rejected"
    level: Health = "healthy" if budget.fallback else "degraded"
    words = f"Budget {name} is used up: {then}."
    return Cause("budget_spent", level, words, subject=budget.name, command=command)
