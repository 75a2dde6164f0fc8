"""Verification of the promises on this installation: its Valkey, PostgreSQL and network.

It uses pools and a tenant of its own; the provider is the emulator on loopback.

Invariant: when `verify` returns or is interrupted, its processes have ended and its keys and rows
are gone; the report names what could not be removed.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from platform import node, python_version
from secrets import token_hex

from tidegate.call import Kind
from tidegate.emulator.server import run_emulator
from tidegate.emulator.settings import Behaviour, EmulatorSettings
from tidegate.errors import TidegateError
from tidegate.limiter import PoolPolicy
from tidegate.rehearse.report import Table
from tidegate.settings import Config
from tidegate.supervisor.services import Ground, migrate, prepared
from tidegate.verify.plan import (
    KIND,
    Plan,
    Report,
    Result,
    Say,
    Verdict,
    VerifiedPool,
    plan_of,
)
from tidegate.verify.promises import AT_ONCE, JobVerification, LimiterVerification

_JOB_MS = 250


@dataclass(frozen=True, slots=True)
class Wishes:
    """Options of the operator.

    provider_limit: concurrent calls that the emulated provider allows, by default the pool's limit.
    restart_command: a command that restarts Valkey without its data.
    """

    quick: bool = False
    provider_limit: int | None = None
    restart_command: str | None = None


def verify(config: Config, wishes: Wishes, say: Say) -> Report:
    """Check the promises against the servers in `config`, or against bundled ones.

    A promise that a busy machine may have broken is tested again. `say` is called with each step.
    Raises TidegateError if Valkey or PostgreSQL is unavailable.
    """
    plan = plan_of(config, quick=wishes.quick)
    with prepared(config, only={"postgres", "valkey"}) as ground:
        if ground.embedded:  # as `tidegate up` would
            migrate(ground.config, say)
        report = asyncio.run(_verify(ground, plan, wishes, say))
        if report.in_doubt:
            for one in report.in_doubt:
                say(f"not kept, and tried once more: {one.promise} ({one.measured})")
            report = report.repeated(asyncio.run(_verify(ground, plan, wishes, say)))
        return report


async def _verify(ground: Ground, plan: Plan, wishes: Wishes, say: Say) -> Report:
    report, pool, began = Report(), f"tidegate-verify-{token_hex(4)}", time.monotonic()
    report.about = {
        "Tidegate": version("tidegate"),
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "from": f"{node()}, Python {python_version()}",
        "Valkey and PostgreSQL": "bundled" if ground.embedded else "yours",
        "pool and tenant": f"{pool}, made for this and removed",
        "load": f"at most {plan.calls_per_s:.0f} calls a second, to the emulator on loopback; "
        f"{plan.jobs} jobs",
        "lease": f"{plan.lease_ms} ms",
    }
    policy, redis = plan.policy(ground.config), ground.config.redis_url
    assert redis is not None
    concurrency = {KIND: wishes.provider_limit or plan.limit}
    limits = _emulator(plan.call_ms, concurrency)
    async with (
        run_emulator(limits) as for_limits,
        run_emulator(_emulator(_JOB_MS, {})) as for_jobs,
    ):
        limiter_pool = VerifiedPool(pool, policy, plan, for_limits.control, report, say)
        job_pool = replace(
            limiter_pool,
            name=f"{pool}-jobs",
            policy=PoolPolicy({Kind.TEXT_ONLY.limit: AT_ONCE}, lease_ms=plan.lease_ms),
            upstream=for_jobs.control,
        )
        url = redis.get_secret_value()
        limiting = LimiterVerification(limiter_pool, url, wishes.restart_command)
        working = JobVerification(job_pool, ground)
        try:
            await _both(limiting, working)
        except asyncio.CancelledError:  # no report follows
            for what in report.left:
                say(f"left: {what}")
            raise
    report.about["took"] = f"{time.monotonic() - began:.0f} s"
    return report


async def _both(limiting: LimiterVerification, working: JobVerification) -> None:
    """Run both concurrently. Each cleans up, however the other ends."""

    async def work() -> None:
        await limiting.measured.wait()
        await working.run()

    tasks = [asyncio.create_task(limiting.run()), asyncio.create_task(work())]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # a second cancellation would interrupt its clean-up
                task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception) and not isinstance(ended, TidegateError):
                raise ended


def _emulator(call_ms: int, concurrency: dict[str, int]) -> EmulatorSettings:
    behaviour = Behaviour().changed(
        {"first_byte_ms": call_ms, "chunks": 1, "concurrency": concurrency}
    )
    return EmulatorSettings("127.0.0.1", 0, behaviour)


_COLUMNS = ("promise", "bar", "measured", "")


def table_of(report: Report) -> Table:
    """Return the table of results, broken promises first."""
    order = [Verdict.BROKEN, Verdict.KEPT, Verdict.MEASURED, Verdict.SKIPPED]
    results = sorted(report.results, key=lambda one: order.index(one.verdict))
    return Table("", _COLUMNS, [_row(one) for one in results], right_from=len(_COLUMNS))


def sentence_of(report: Report) -> str:
    """Return a summary in one sentence."""
    counts = dict.fromkeys(Verdict, 0)
    for one in report.results:
        counts[one.verdict] += 1
    kept = counts[Verdict.KEPT]
    parts = [f"{kept} promise{'' if kept == 1 else 's'} kept"]
    if counts[Verdict.BROKEN]:
        parts.append(f"{counts[Verdict.BROKEN]} BROKEN")
    if counts[Verdict.SKIPPED]:
        parts.append(f"{counts[Verdict.SKIPPED]} skipped")
    left = "nothing is left behind"
    if report.left:
        left = f"could not be removed: {'; '.join(report.left)}"
    return f"{', '.join(parts)}; {left}."


def markdown_of(report: Report) -> str:
    """Return a section for a runbook."""
    lines = ["# Tidegate: promises verified", "", sentence_of(report), ""]
    lines += [f"- {name}: {text}" for name, text in report.about.items()]
    lines += ["", f"| {' | '.join(_COLUMNS)} |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table_of(report).rows]
    return "\n".join([*lines, ""])


def _row(one: Result) -> tuple[str, ...]:
    if one.verdict is Verdict.SKIPPED:
        return one.promise, "", one.why, "skipped"
    measured = f"{one.measured} ({one.why})" if one.why else one.measured
    verdict = "" if one.verdict is Verdict.MEASURED else one.verdict.value
    return one.promise, one.bar, measured, verdict.upper() if verdict == "broken" else verdict


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
