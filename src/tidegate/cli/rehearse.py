"""Command `tidegate rehearse`: simulates limits under a load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import DEFAULT_POOL
from tidegate.cli.terminal import (
    AnyPool,
    Json,
    choose_pool,
    chosen_pool,
    command_config,
    in_pool,
    show_json,
)
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.limiter import PoolPolicy
    from tidegate.policy.deployment import Upstream
    from tidegate.policy.inspection import Control
    from tidegate.prices.budgets import Budget
    from tidegate.rehearse.budgets import TierTerms
    from tidegate.rehearse.load import Arrival, Usual
    from tidegate.rehearse.report import Findings
    from tidegate.settings import Config
    from tidegate.store.database import Connections

_LONGEST_BYTES = 500_000_000

LoadFile = Annotated[
    str | None,
    typer.Argument(
        help="A description of a load (.toml), or a trace (CSV, JSON lines); - is stdin."
    ),
]
FromRecord = Annotated[
    str | None,
    typer.Option(
        help="Instead of a file: recorded calls of the last 30m, 1h or 1d, of a day (UTC), "
        "such as 2026-11-24, or of hours of it: 2026-11-24T09-17.",
        metavar="SPAN|DAY",
    ),
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="A tidegate.toml. Default: the deployment's own.")
]
InForce = Annotated[
    bool, typer.Option("--in-force", help="Use the policy in force in the running pool.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Compare with changes: KEY=VALUE as in `limits set`, separated by ;, also "
        "budgets.NAME.usd=5 or preempt=true. Repeat it for another comparison.",
        metavar="CHANGES",
    ),
]
Times = Annotated[
    float,
    typer.Option(
        min=0.001, max=1000, help="Multiply the number of calls in the same time by this."
    ),
]
Processes = Annotated[
    int, typer.Option(min=1, max=64, help="The number of processes that share the load.")
]
Plays = Annotated[
    int,
    typer.Option(
        min=1,
        max=100,
        help="Repeat the simulation with small random shifts of each call, to show how waits vary.",
    ),
]
RoundTrip = Annotated[
    float, typer.Option(min=0.01, max=1000, help="Round trip of one request to Valkey.")
]
HoldMs = Annotated[
    float,
    typer.Option(min=0, help="Time for which a call holds its permit beyond its own duration."),
]
FlexTimes = Annotated[
    float, typer.Option(min=0.1, max=1000, help="Factor by which a job takes longer in flex.")
]
FlexRefused = Annotated[
    float, typer.Option(min=0, max=1, help="Share of calls for which flex has no capacity.")
]
BatchTime = Annotated[
    str, typer.Option(help="Duration of a provider's batch, such as 30m.", metavar="SPAN")
]
TokensPerSecond = Annotated[
    float, typer.Option(min=0.1, help="Speed of answers, for traces without durations.")
]
TraceFile = Annotated[
    Path | None, typer.Option(help="Write the simulated calls to this file, as CSV.")
]


def rehearse(
    load: LoadFile = None,
    from_record: FromRecord = None,
    policy: PolicyFile = None,
    in_force: InForce = False,
    set_: Set = None,
    times: Times = 1.0,
    processes: Processes = 2,
    plays: Plays = 1,
    seed: Annotated[int, typer.Option(help="Seed of all random numbers.")] = 1,
    round_trip_ms: RoundTrip = 0.6,
    hold_ms: HoldMs = 1.0,
    flex_times: FlexTimes = 2.0,
    flex_refused: FlexRefused = 0.0,
    batch_time: BatchTime = "1h",
    tokens_per_second: TokensPerSecond = 150.0,
    first_token_ms: Annotated[
        float, typer.Option(min=0, help="Time to the first token, for traces without durations.")
    ] = 400.0,
    svg: Annotated[Path | None, typer.Option(help="Write the chart to this file.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with chart and tables to this file.")
    ] = None,
    trace: TraceFile = None,
    json: Json = False,
    pool: AnyPool = None,
) -> None:
    """Simulate a load under a policy: waits, shares, rejections, the bottleneck, and what budgets
    reject or pause, and when.

    Changes nothing: the simulation runs the limiter's executable specification.
    """
    from tidegate.rehearse import cost_at, variants
    from tidegate.rehearse.budgets import priced
    from tidegate.rehearse.load import TokenPace, Usual, multiplied, write_trace
    from tidegate.rehearse.simulation import Setting

    choose_pool(pool)
    pool = chosen_pool(config := command_config("rehearse"))
    pace = TokenPace(first_token_ms, tokens_per_second)
    usual = Usual({kind: config.model_for(kind) for kind in config.rate_limits}, pace)
    configured = _policy(config, policy, in_force=in_force, pool=pool)
    upstream = _upstream_in(config, pool)
    cost = cost_at(upstream)
    terms = _terms(config, upstream, flex_times, flex_refused, batch_time)
    drawn, budgets, starts_at = _arrivals(config, load, from_record, usual, terms, seed, pool)
    if in_force:
        budgets = _budgets_in_force(config)
    arrivals = priced(multiplied(drawn, times, seed), cost)
    preempt = None if upstream is None else upstream.preempt
    made = variants(configured, budgets, preempt, _changes(set_))
    is_further = pool != DEFAULT_POOL
    setting = Setting(processes, round_trip_ms, hold_ms, is_further, starts_at, cost, tiers=terms)
    if trace is not None:
        _write(trace, write_trace(arrivals))
    found = made.compare(arrivals, setting, plays=plays, seed=seed)
    _print_findings(found, svg, html, json=json)


def _terms(
    config: Config,
    upstream: Upstream | None,
    flex_times: float,
    flex_refused: float,
    batch_time: str,
) -> TierTerms:
    """Return the properties of processing tiers. Raises ConfigError for an invalid time."""
    from tidegate.admission.charges import TierTimes
    from tidegate.rehearse import terms_at
    from tidegate.rehearse.load import span_ms

    return replace(
        terms_at(upstream, TierTimes.of(config)),
        flex_times=flex_times,
        flex_refused=flex_refused,
        batch_ms=span_ms("--batch-time", batch_time),
    )


def _arrivals(
    config: Config,
    load: str | None,
    from_record: str | None,
    usual: Usual,
    terms: TierTerms,
    seed: int,
    pool: str,
) -> tuple[list[Arrival], tuple[Budget, ...], datetime]:
    """Return the load, its budgets, and its beginning; for a load from the record, the deployment's
    budgets."""
    from tidegate.rehearse.budgets import budget_in
    from tidegate.rehearse.load import load_of, read_trace, record_span, table_in
    from tidegate.rehearse.simulation import Setting

    starts_at = Setting().starts_at
    if from_record is not None and from_record.startswith("-"):
        must = "must be a span or a day itself, such as --from-record 1h"
        raise ConfigError("--from-record", from_record, must)
    if (load is None) == (from_record is None):
        raise ConfigError("rehearse", None, "needs either a file or --from-record")
    if from_record is not None:
        span = record_span("--from-record", from_record, datetime.now(UTC))
        found, since = _from_record(config, from_record, span, usual, terms, pool)
        return found, _budgets_in_force(config), since
    assert load is not None
    text = _read(load)
    if load.endswith(".toml"):
        described = _toml(load, text)
        tables = table_in("budgets", described.get("budgets", {}))
        budgets = tuple(
            budget_in(name, table_in(f"budgets.{name}", one)) for name, one in tables.items()
        )
        return load_of(described).draw(usual, seed), budgets, starts_at
    return read_trace(load, text, usual), (), starts_at


def _budgets_in_force(config: Config) -> tuple[Budget, ...]:
    from tidegate.store.budgets import BudgetRecords
    from tidegate.supervisor.services import with_record

    async def read(connections: Connections) -> tuple[Budget, ...]:
        _, found = await BudgetRecords(connections).all()
        return tuple(found)

    return with_record(config, read)


def _upstream_in(config: Config, pool: str) -> Upstream | None:
    """Return the upstream of a pool, for its prices and when its calls give way; None if it is not
    configured. Raises ConfigError for a file with invalid upstreams."""
    from tidegate.policy.deployment import stated_by

    upstreams = stated_by(config).upstreams_without_access()
    return next((one for one in upstreams if one.pool == pool), None)


def _from_record(
    config: Config,
    value: str,
    span: tuple[datetime, datetime],
    usual: Usual,
    terms: TierTerms,
    pool: str,
) -> tuple[list[Arrival], datetime]:
    """Return the calls, and when the first of them was submitted."""
    from tidegate.rehearse import recorded_load
    from tidegate.supervisor.services import with_record

    load = with_record(
        config, lambda connections: recorded_load(connections, pool, span, usual, terms)
    )
    if load is None:
        raise ConfigError(
            "--from-record", value, f"no call of pool {pool} is on record for that time"
        )
    return load.arrivals, load.since


def _policy(config: Config, file: Path | None, *, in_force: bool, pool: str) -> PoolPolicy:
    from tidegate.policy.deployment import from_file
    from tidegate.supervisor.services import policy_of

    if file is not None and in_force:
        raise ConfigError("--policy", str(file), "give a file or --in-force, not both")
    if file is not None:
        return from_file(file, config)
    if not in_force:
        return policy_of(config, pool)

    async def policy_in_force(control: Control) -> PoolPolicy:
        return control.limiter.policy

    return in_pool(policy_in_force)


def _changes(sets: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Return each set of changes by its name."""
    from tidegate.cli.limits import parsed

    found = {}
    for changes in sets or ():
        each = [change.strip() for change in changes.split(";") if change.strip()] or [changes]
        found["; ".join(each)] = parsed(each, "--set")
    return found


def _print_findings(
    found: list[Findings], svg: Path | None, html: Path | None, *, json: bool
) -> None:
    from tidegate.cli.terminal import console, show_chart, show_figures
    from tidegate.rehearse.charts import chart_of, drawing_of, page_of, svg_of
    from tidegate.rehearse.report import difference_of, sentence_of, tables_of, title_of

    drawings, tables = [drawing_of(one) for one in found], tables_of(found)
    sentences = [sentence_of(found[0]), *(difference_of(found[0], one) for one in found[1:])]
    sentence = " ".join(sentences)
    if svg is not None or html is not None:
        picture = svg_of(title_of(found[0]), drawings)
        if svg is not None:
            _write(svg, picture)
        if html is not None:
            _write(html, page_of("Rehearsal", sentence, picture, tables))
    if json:
        show_json(found if len(found) > 1 else found[0])
        return
    out = console()
    for one in sentences:
        out.print(one, soft_wrap=False)
    for table in tables:
        out.print()
        show_figures(table, out, {"binds": "bold yellow"})
    out.print()
    show_chart(chart_of(drawings, out.width), out)


def _read(name: str) -> str:
    import sys

    try:
        data = sys.stdin.buffer.read(_LONGEST_BYTES + 1) if name == "-" else Path(name).read_bytes()
        if len(data) > _LONGEST_BYTES:
            raise ConfigError(name, f"({len(data)} bytes)", f"at most {_LONGEST_BYTES} bytes")
        return data.decode("utf-8-sig")
    except OSError as unreadable:
        raise ConfigError(name, "(file)", f"must be readable: {unreadable.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(name, "(file)", "must be UTF-8 text") from None


def _toml(name: str, text: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as broken:
        raise ConfigError(name, "(file)", f"must be TOML: {broken}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as refused:
        raise ConfigError(str(path), "(file)", f"can't be written: {refused.strerror}") from None
