"""Rehearsal: a load under a policy, simulated in virtual time.

The command and the operators' route use the same functions to read the record, vary the policy and
compare. A gateway rehearses in a child process, because a simulation takes seconds of CPU time.

Invariants: one rehearsal runs at a time in a gateway's process; its child does not outlive it.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from tidegate.errors import ConfigError, QuotaExceeded, StoreUnavailable

if TYPE_CHECKING:
    from tidegate.admission.charges import TierTimes
    from tidegate.limiter import PoolPolicy
    from tidegate.policy.deployment import Preempt, Upstream
    from tidegate.prices.budgets import Budget
    from tidegate.rehearse.budgets import TierTerms
    from tidegate.rehearse.load import Arrival, Usual
    from tidegate.rehearse.report import Findings
    from tidegate.rehearse.simulation import Setting
    from tidegate.store.database import Connections
    from tidegate.store.statistics import PastCall

AS_IT_IS = "as it is"
_PREEMPT = "preempt"
# The bound for a gateway's process; the command takes as many calls as the record has.
MOST_RECORDED_CALLS = 50_000
_RETRY_AFTER_MS = 2_000
_PROGRAM = "from tidegate.rehearse import answer; answer()"


@dataclass(frozen=True, slots=True)
class ChartCurve:
    """A named curve: its values at the moments of a drawing."""

    name: str
    values: Sequence[float]


@dataclass(frozen=True, slots=True)
class TierCase:
    """The jobs that ran in a processing tier, how many were answered late, and their cost."""

    tier: str
    jobs: int
    late: int
    cost_micros: int


@dataclass(frozen=True, slots=True)
class RehearsedCase:
    """The results of one policy, for a page.

    at_ms: moments of the curves, from the first arrival. waiting: calls by tenant. used: fractions
    of limits, as in a Drawing. refused: reason -> count. gave_way: how often calls gave way to
    calls of a higher band. tiers: of the jobs that allowed tiers.
    """

    name: str
    queued: int
    refused: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None
    binding: list[str]
    at_ms: list[float]
    waiting: list[ChartCurve]
    used: list[ChartCurve]
    gave_way: int = 0
    tiers: list[TierCase] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TenantCase:
    """The calls of one tenant under one policy."""

    queued: int
    refused: int
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class ComparedTenant:
    """One tenant, or all (with an empty name): recorded waits, then the waits under each policy."""

    tenant: str
    calls: int
    recorded_p50_ms: float | None
    recorded_p99_ms: float | None
    cases: list[TenantCase]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Recorded calls under a policy as it is and with changes, for a page.

    sentence: what the change would have done. since: when the first call was submitted. end_ms:
    when the last call of any case had ended. tenants: all together, then those that wait longest.
    more_tenants: how many others there are. cases: empty if no call is on record.
    """

    calls: int
    since: datetime
    end_ms: float
    sentence: str
    cases: list[RehearsedCase]
    tenants: list[ComparedTenant]
    more_tenants: int


@dataclass(frozen=True, slots=True)
class RecordedLoad:
    """Recorded calls as arrivals, the time of the first, and each call's recorded wait."""

    arrivals: list[Arrival]
    since: datetime
    waits_ms: list[tuple[str, float]]


async def recorded_load(
    connections: Connections,
    pool: str,
    span: tuple[datetime, datetime],
    usual: Usual,
    terms: TierTerms,
    most: int | None = None,
) -> RecordedLoad | None:
    """Return the calls of a pool that were submitted in a span; None if there are none.

    Jobs that ran in a cheaper tier are converted to the usual tier by `terms`. Raises
    StoreUnavailable, and ConfigError, which names `record`, if there are more than `most`.
    """
    from tidegate.rehearse.load import from_zero
    from tidegate.store.statistics import MOST_CALLS, past_calls

    calls = await past_calls(
        connections, pool, *span, most=MOST_CALLS if most is None else most + 1
    )
    if not calls:
        return None
    if most is not None and len(calls) > most:
        allowed = f"must have at most {most:,} calls: choose fewer hours, or run the command"
        raise ConfigError("record", f"(more than {most:,} calls)", allowed)
    since = calls[0].submitted_at
    rows = [_row_of(call, since, terms) for call in calls]
    arrivals = from_zero(usual.arrival("the record", row) for row in rows)
    waits_ms = [(call.tenant_id, call.waited_ms) for call in calls if call.tier != "batch"]
    return RecordedLoad(arrivals, since, waits_ms)


def _row_of(call: PastCall, since: datetime, terms: TierTerms) -> dict[str, Any]:
    """Return a recorded call as a row of a trace, whose calls are all of the usual tier.

    The duration of a call that was in a provider's batch is derived from its tokens.
    """
    from tidegate.call import Tier
    from tidegate.rehearse.load import MOST_MS

    row: dict[str, Any] = {
        "time_ms": (call.submitted_at - since).total_seconds() * 1000,
        "tenant": call.tenant_id,
        "kind": call.kind,
        "model": call.model,
        "duration_ms": call.upstream_ms,
        "input_tokens": call.input_tokens,
        "output_tokens": call.output_tokens,
        "images": call.images,
        "priority": call.priority,
        "cached_tokens": call.cached_tokens,
        "cache_write_tokens": call.cache_write_tokens,
        "cost_usd": call.cost_micros / 1_000_000,
        "key": call.key_id,
        "subject": call.subject,
        "gives_way": call.gives_way,
    }
    tiers = {*(call.tiers or ()), *([call.tier] if call.tier else ())} & {*Tier}
    if tiers - {Tier.LIVE}:
        row["tiers"] = sorted(tiers)
        if call.due_ms is not None:
            row["deadline_ms"] = min(max(0.0, call.due_ms), MOST_MS)
    if call.tier in (Tier.FLEX, Tier.BATCH):
        row["cost_usd"] /= terms.share(call.model or "", Tier(call.tier)) or 1.0
        row["duration_ms"] /= terms.flex_times
    if call.tier == Tier.BATCH:
        del row["duration_ms"]
    return row


def terms_at(upstream: Upstream | None, times: TierTimes) -> TierTerms:
    """Return the terms of an upstream's processing tiers, by its prices."""
    from tidegate.admission.charges import Prices
    from tidegate.rehearse.budgets import TierTerms

    return TierTerms(share=Prices(upstream).share, times=times)


def cost_at(upstream: Upstream | None) -> Callable[[Arrival, str], int | None]:
    """Return a function for the cost of calls at an upstream: as in the trace, or by its prices."""
    from tidegate.admission.charges import Prices
    from tidegate.call import Usage, UsageDetails
    from tidegate.prices.rates import cost_micros

    prices = Prices(upstream)

    def cost(arrival: Arrival, model: str) -> int | None:
        if arrival.cost_usd and model == arrival.model:
            return arrival.use.cost_micros
        usage = Usage(arrival.input_tokens, arrival.output_tokens)
        usage = replace(usage, cached_tokens=arrival.cached_tokens)
        if arrival.cache_write_tokens:
            details = UsageDetails(cache_write_tokens=arrival.cache_write_tokens)
            usage = replace(usage, details=details)
        return cost_micros(prices.of(model), usage, arrival.images)

    return cost


def name_of(changes: Mapping[str, Any]) -> str:
    """Return changes as `limits set` writes them: `kind:text_only=8; weights.acme=4`."""
    return "; ".join(f"{key}={_value_text(value)}" for key, value in changes.items())


def _value_text(value: object) -> str:
    if isinstance(value, Mapping) and "bound" in value:
        value = value["bound"]
    return value if isinstance(value, str) else orjson.dumps(value).decode()


class Variants(NamedTuple):
    """The variants to compare, each by the name of its changes."""

    policies: dict[str, PoolPolicy]
    budgets: dict[str, tuple[Budget, ...]]
    preempts: dict[str, Preempt | None]

    def compare(
        self, arrivals: Sequence[Arrival], setting: Setting, *, plays: int = 1, seed: int = 1
    ) -> list[Findings]:
        """Return the findings of each variant for a trace; arguments as of
        `simulation.rehearse`.
        """
        from tidegate.rehearse.simulation import compare

        return compare(
            arrivals,
            self.policies,
            setting,
            budgets=self.budgets,
            preempts=self.preempts,
            plays=plays,
            seed=seed,
        )


def variants(
    policy: PoolPolicy,
    budgets: tuple[Budget, ...],
    preempt: Preempt | None,
    changes: Mapping[str, Mapping[str, Any]],
) -> Variants:
    """Return the policy, budgets and preemption rule as they are, then with each set of changes.

    Raises ConfigError, which names the key.
    """
    from tidegate.policy.format import edit, of_plain, to_plain
    from tidegate.rehearse.budgets import PREFIX, changed

    made = Variants({AS_IT_IS: policy}, {AS_IT_IS: budgets}, {AS_IT_IS: preempt})
    for name, given in changes.items():
        of_budgets = {key: value for key, value in given.items() if key.startswith(PREFIX)}
        made.policies[name] = of_plain(edit(_of_limits(given))(to_plain(policy)))
        made.budgets[name] = changed(budgets, of_budgets) if of_budgets else budgets
        made.preempts[name] = _preempt_changed(preempt, given)
    return made


def _preempt_changed(rule: Preempt | None, changes: Mapping[str, Any]) -> Preempt | None:
    """Return the rule changed by `preempt` (true, false or a table) or by its parts.

    A part is a key such as `preempt.after_ms`.
    """
    from tidegate.policy.deployment import Preempt, preempt_of

    value = changes.get(_PREEMPT, rule is not None)
    parts = {
        key.removeprefix(f"{_PREEMPT}."): one
        for key, one in changes.items()
        if key.startswith(f"{_PREEMPT}.")
    }
    if value is True or (parts and value is False and _PREEMPT not in changes):
        value = asdict(rule or Preempt())
    if parts and isinstance(value, Mapping):
        value = {**value, **parts}
    return preempt_of(_PREEMPT, value)


@dataclass(frozen=True, slots=True)
class RecordRehearsal:
    """A rehearsal for a child process: recorded calls under a policy as it is and with `changes`.

    record: a span or a day as `--from-record` takes it. models: by kind, for calls whose model is
    not on record. upstream: without its key, for its prices and its preemption rule. tier_times:
    the durations of tiers that the gateway assumes.
    """

    database_url: str
    pool: str
    record: str
    policy: Mapping[str, Any]
    changes: Mapping[str, Any]
    models: Mapping[str, str]
    upstream: Upstream | None
    kinds_optional: bool
    tier_times: TierTimes
    most: int = MOST_RECORDED_CALLS

    async def run(self, now: datetime) -> Comparison:
        """Run the rehearsal. Raises ConfigError, which names the field, and StoreUnavailable."""
        from tidegate.policy.format import of_plain
        from tidegate.rehearse.budgets import priced
        from tidegate.rehearse.charts import comparison_of
        from tidegate.rehearse.load import TokenPace, Usual, record_span
        from tidegate.rehearse.simulation import Setting
        from tidegate.store.budgets import BudgetRecords
        from tidegate.store.database import Connections

        span = record_span("record", self.record, now)
        policy = of_plain(self.policy, strict=False)
        sets = {name_of(self.changes): self.changes} if self.changes else {}
        preempt = None if self.upstream is None else self.upstream.preempt
        variants(policy, (), preempt, {name: _without_budgets(one) for name, one in sets.items()})
        usual, terms = Usual(self.models, TokenPace()), terms_at(self.upstream, self.tier_times)
        connections = Connections(self.database_url, size=1)
        connections.start()
        try:
            load = await recorded_load(connections, self.pool, span, usual, terms, self.most)
            _, budgets = await BudgetRecords(connections).all()
        finally:
            await connections.aclose()
        made = variants(policy, tuple(budgets), preempt, sets)
        if load is None:
            return comparison_of([], (), span[0])
        cost = cost_at(self.upstream)
        setting = Setting(
            kinds_optional=self.kinds_optional, starts_at=load.since, cost=cost, tiers=terms
        )
        found = made.compare(priced(load.arrivals, cost), setting)
        return comparison_of(found, load.waits_ms, load.since)


def _without_budgets(changes: Mapping[str, Any]) -> dict[str, Any]:
    from tidegate.rehearse.budgets import PREFIX

    return {key: value for key, value in changes.items() if not key.startswith(PREFIX)}


def _of_limits(changes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value
        for key, value in _without_budgets(changes).items()
        if key.partition(".")[0] != _PREEMPT
    }


class Rehearsals:
    """The rehearsals of a gateway's process: one runs and one more may wait."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._there = 0

    @property
    def waiting(self) -> int:
        """How many rehearsals wait for the running one."""
        return max(0, self._there - 1)

    async def run(self, order: RecordRehearsal) -> bytes:
        """Return a Comparison as JSON. A cancellation ends the child process.

        Raises QuotaExceeded if another rehearsal already waits, ConfigError and StoreUnavailable.
        """
        if self._there > 1:
            raise QuotaExceeded(
                "a rehearsal is running in this process, and another one is waiting",
                limit="rehearsals",
                allowed="one rehearsal at a time in each process, and one that waits",
                retry_after_ms=_RETRY_AFTER_MS,
            )
        self._there += 1
        try:
            async with self._turn:
                return await _answered(order)
        finally:
            self._there -= 1


async def _answered(order: RecordRehearsal) -> bytes:
    # -P: do not search the working directory for modules.
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        "-c",
        _PROGRAM,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        answer, _ = await child.communicate(pickle.dumps(order))
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode:
        raise RuntimeError(f"the process of a rehearsal ended with {child.returncode}")
    first, _, rest = answer.partition(b"\n")
    if first == b"config":
        raise ConfigError(*orjson.loads(rest))
    if first == b"away":
        raise StoreUnavailable(rest.decode())
    return rest


def answer() -> None:
    """Run the child: read a RecordRehearsal from stdin, write the outcome and the result.

    The first line of the output names the outcome. The parent ends the process, not the terminal.
    """
    import os
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "nice"):
        os.nice(10)  # so that the gateway's calls come first
    order: RecordRehearsal = pickle.loads(sys.stdin.buffer.read())
    try:
        output = b"found\n" + orjson.dumps(asyncio.run(order.run(datetime.now(UTC))))
    except ConfigError as invalid:
        output = b"config\n" + orjson.dumps((invalid.variable, invalid.value, invalid.allowed))
    except StoreUnavailable as unavailable:
        output = b"away\n" + unavailable.message.encode()
    sys.stdout.buffer.write(output)
