"""Plan, report and clean-up of a verification, which is bounded in time and load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from inspect import isawaitable
from typing import Any

from tidegate.emulator.client import EmulatorControl
from tidegate.errors import TidegateError
from tidegate.limiter import PoolPolicy
from tidegate.rehearse.report import Waits, waits_of
from tidegate.settings import Config

KIND = "text_only"
LIMIT = f"kind:{KIND}"
WEIGHTS = {"light": 1, "heavy": 3}
# Measures how soon a released permit reaches a waiter in another process.
BATON = "kind:classifier"


@dataclass(frozen=True, slots=True)
class Plan:
    """The size of a verification.

    probes: processes that request permits, each with `tasks` per tenant. limit: the number of
    permits; each is held for a call of `call_ms`. load_s: how long shares and use are measured.
    fair: the tolerance of shares in so short a time. rounds: measurements of each latency. jobs:
    how many are submitted. workers: processes that run them. kills_worker: whether one is killed,
    which takes as long as a claim lease.
    """

    probes: int
    tasks: int
    limit: int
    call_ms: int
    load_s: float
    fair: float
    rounds: int
    jobs: int
    workers: int
    kills_worker: bool
    lease_ms: int
    claim_lease_ms: int

    @property
    def calls_per_s(self) -> float:
        """The most calls per second, all to the emulator."""
        return self.limit * 1000 / self.call_ms

    def policy(self, config: Config) -> PoolPolicy:
        """Return a policy with the verification's limits and the deployment's failure settings."""
        return PoolPolicy(
            {LIMIT: self.limit, BATON: 1},
            lease_ms=self.lease_ms,
            when_away=config.when_valkey_away,
            on_lost=config.on_lost,
            on_expiry=config.on_expiry,
            weights=WEIGHTS,
            queue_per_tenant=1_000,
        )


def plan_of(config: Config, *, quick: bool) -> Plan:
    """Return a plan that takes about 15 s if `quick`, else about a minute."""
    if quick:
        return Plan(
            probes=2,
            tasks=6,
            limit=6,
            call_ms=120,
            load_s=4.0,
            fair=0.25,
            rounds=60,
            jobs=8,
            workers=1,
            kills_worker=False,
            lease_ms=min(config.lease_ms, 1_000),
            claim_lease_ms=config.claim_lease_ms,
        )
    return Plan(
        probes=3,
        tasks=8,
        limit=8,
        call_ms=150,
        load_s=12.0,
        fair=0.1,
        rounds=300,
        jobs=40,
        workers=2,
        kills_worker=config.claim_lease_ms <= 20_000,
        lease_ms=config.lease_ms,
        claim_lease_ms=config.claim_lease_ms,
    )


# Called at the start of each step.
Say = Callable[[str], None]


class Verdict(StrEnum):
    """Whether a promise was kept."""

    KEPT = "kept"
    BROKEN = "broken"
    SKIPPED = "skipped"
    MEASURED = "measured"  # a figure without a promise


@dataclass(frozen=True, slots=True)
class Result:
    """The result of one promise.

    why: the reason if skipped, the observation if broken. lasting: a busy machine cannot explain
    the observation.
    """

    promise: str
    bar: str
    measured: str
    verdict: Verdict
    why: str = ""
    lasting: bool = False


@dataclass(slots=True)
class Report:
    """All results in order.

    about: the circumstances, such as versions, load and duration. left: what could not be removed.
    """

    about: dict[str, str] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def kept(
        self,
        promise: str,
        bar: str,
        measured: str,
        is_kept: bool,
        why: str = "",
        *,
        lasting: bool = False,
    ) -> None:
        """Record a promise that was tested."""
        verdict = Verdict.KEPT if is_kept else Verdict.BROKEN
        result = Result(promise, bar, measured, verdict, "" if is_kept else why, lasting)
        self.results.append(result)

    def within(self, promise: str, took_s: float | None, bar_s: float) -> None:
        """Record a promise about a duration; `took_s` is None if the event was not seen."""
        is_kept = took_s is not None and took_s <= bar_s
        self.kept(promise, f"<= {bar_s:.1f} s", seconds(took_s), is_kept)

    def median(self, promise: str, took_ms: Iterable[float], bar_ms: float) -> None:
        """Record a promise about a median latency."""
        waits = waits_of(took_ms)
        assert waits.p50_ms is not None
        measured = f"p50 / p99 {milliseconds(waits)}"
        self.kept(promise, f"p50 <= {bar_ms:.1f} ms", measured, waits.p50_ms <= bar_ms)

    def measured(self, what: str, figure: str) -> None:
        self.results.append(Result(what, "", figure, Verdict.MEASURED))

    def skipped(self, promise: str, why: str) -> None:
        self.results.append(Result(promise, "", "", Verdict.SKIPPED, why))

    @property
    def broken(self) -> list[Result]:
        return [one for one in self.results if one.verdict is Verdict.BROKEN]

    @property
    def in_doubt(self) -> list[Result]:
        """Broken promises that load on the machine may explain; these are tested again."""
        return [one for one in self.broken if not one.lasting]

    def repeated(self, again: Report) -> Report:
        """Return the report after a second run.

        For promises that were in doubt, or not reached in the first run, the second result counts;
        for all others the first, unless the second run broke them in a way that load cannot
        explain.
        """
        doubtful = {one.promise for one in self.in_doubt}
        second = {one.promise: one for one in again.results}
        lasting = {one.promise for one in again.broken if one.lasting}
        results = []
        for one in self.results:
            new = second.get(one.promise)
            if one.promise not in doubtful:
                results.append(second[one.promise] if one.promise in lasting else one)
            elif new is not None:
                note = f"at the second try; at the first {one.measured}"
                results.append(replace(new, why=f"{new.why}, {note}" if new.why else note))
        known = {one.promise for one in self.results}
        results += [one for one in again.results if one.promise not in known]
        return Report({**again.about}, results, [*self.left, *again.left])

    @property
    def is_sound(self) -> bool:
        """Whether no promise is broken and nothing is left behind."""
        return not (self.broken or self.left)


@dataclass(frozen=True, slots=True)
class VerifiedPool:
    """A pool created for the verification: its policy, its provider and its report."""

    name: str
    policy: PoolPolicy
    plan: Plan
    upstream: EmulatorControl
    report: Report
    say: Say


def seconds(took_s: float | None) -> str:
    return "not seen" if took_s is None else f"{took_s:.2f} s"


def milliseconds(waits: Waits) -> str:
    """Return the median and the 99th percentile as text."""
    texts = ("-" if one is None else f"{one:.1f}" for one in (waits.p50_ms, waits.p99_ms))
    return " / ".join(texts) + " ms"


_WITHIN_S = 15.0
_PAUSE_S = 0.2


async def finish(work: Coroutine[Any, Any, object]) -> None:
    """Run `work` to its end; a cancellation in the meantime is raised afterwards."""
    task = asyncio.create_task(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await task
        raise


async def clean_pool(remove: Callable[[], Awaitable[object]], pool: str, report: Report) -> None:
    """Call `remove` until it succeeds, for at most 15 s; then report what is left."""
    end_s = time.monotonic() + _WITHIN_S
    while True:
        try:
            await remove()
            return
        except TidegateError as failed:
            if time.monotonic() > end_s:
                report.left.append(f"keys of the pool {pool}: {failed.message}")
                return
        await asyncio.sleep(_PAUSE_S)


_POLL_S = 0.02


async def until(condition: Callable[[], bool | Awaitable[bool]], within_s: float) -> bool:
    """Return whether the condition came true within `within_s`."""
    end_s = time.monotonic() + within_s
    while True:
        holds = condition()
        if isawaitable(holds):
            holds = await holds
        if holds or time.monotonic() > end_s:
            return bool(holds)
        await asyncio.sleep(_POLL_S)
