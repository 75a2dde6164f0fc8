"""Command `tidegate rehearse`: simulates limits under a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.call import DEFAULT_POOL
from tidegate.cli.terminal import AnyPool, Json, choose_pool, chosen_pool, in_pool, show_json
from tidegate.errors import ConfigError

if TYPE_CHECKING:
    from tidegate.limiter import PoolPolicy
    from tidegate.policy.inspection import Control
    from tidegate.prices.budgets import Budget
    from tidegate.rehearse.budgets import Cost
    from tidegate.rehearse.load import Arrival, Usual
    from tidegate.rehearse.report import Findings
    from tidegate.settings import Config
    from tidegate.store.database import Connections

_AS_IT_IS = "as it is"
_LONGEST_BYTES = 500_000_000

FromRecord = Annotated[
    str | None,
    typer.Option(
        help="Instead of a file the calls on record of the last 30m, 1h, 1d, or of a day (UTC), "
        "such as 2026-11-24.",
        metavar="SPAN|DAY",
    ),
]
PolicyFile = Annotated[
    Path | None, typer.Option("--policy", help="A tidegate.toml. Usual: the deployment's own.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Compare with changed limits: KEY=VALUE as `limits set` takes it, several with ; "
        "between, or with budgets: budgets.NAME.usd=5. Again for one more to compare.",
        metavar="CHANGES",
    ),
]
Times = Annotated[
    float, typer.Option(min=0.001, max=1000, help="So many times as many calls in the same time.")
]
Processes = Annotated[int, typer.Option(min=1, max=64, help="How many share the load.")]
Plays = Annotated[
    int,
    typer.Option(
        min=1,
        max=100,
        help="Play it so often, each call moved a little: how far apart the waits come out.",
    ),
]
RoundTrip = Annotated[float, typer.Option(min=0.01, max=1000, help="Of one question to Valkey.")]
HoldMs = Annotated[
    float, typer.Option(min=0, help="How much longer than it is open a call holds its permit.")
]
TokensPerSecond = Annotated[float, typer.Option(min=0.1, help="For traces that know no durations.")]
TraceFile = Annotated[
    Path | None, typer.Option(help="Write the calls that were played there, as CSV.")
]


def rehearse(
    load: Annotated[
        str | None,
        typer.Argument(help="A described load (.toml), or a trace (CSV, JSON lines); - is stdin."),
    ] = None,
    from_record: FromRecord = None,
    policy: PolicyFile = None,
    in_force: Annotated[
        bool, typer.Option("--in-force", help="The policy that the running pool has now.")
    ] = False,
    set_: Set = None,
    times: Times = 1.0,
    processes: Processes = 2,
    plays: Plays = 1,
    seed: Annotated[int, typer.Option(help="Of the chance in a load, and in plays.")] = 1,
    round_trip_ms: RoundTrip = 0.6,
    hold_ms: HoldMs = 1.0,
    tokens_per_second: TokensPerSecond = 150.0,
    first_token_ms: Annotated[float, typer.Option(min=0, help="Likewise.")] = 400.0,
    svg: Annotated[Path | None, typer.Option(help="Write the picture there.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with picture and tables.")] = None,
    trace: TraceFile = None,
    json: Json = False,
    pool: AnyPool = None,
) -> None:
    """Simulate what a policy does to a load: waits, shares, refusals, and which limit binds; and
    what budgets refuse or pause, and when.

    Touches nothing: what is simulated is the limiter's executable specification.
    """
    from tidegate.rehearse.budgets import priced
    from tidegate.rehearse.load import TokenPace, Usual, write_trace
    from tidegate.rehearse.simulation import Setting, compare
    from tidegate.settings import load as load_config

    choose_pool(pool)
    config = load_config()
    pool = chosen_pool(config)
    models = {kind: config.model_for(kind) for kind in config.rate_limits}
    usual = Usual(models, TokenPace(first_token_ms, tokens_per_second))
    cost = _cost_in(config, pool)
    drawn, budgets, starts_at = _arrivals(config, load, from_record, usual, seed, pool)
    if in_force:
        budgets = _budgets_in_force(config)
    arrivals = priced(_sooner(drawn, times), cost)
    kept = _policy(config, policy, in_force=in_force, pool=pool)
    policies, bound = _variants(kept, budgets, set_ or [])
    setting = Setting(
        processes=processes,
        round_trip_ms=round_trip_ms,
        hold_ms=hold_ms,
        kinds_optional=pool != DEFAULT_POOL,
        starts_at=starts_at,
        cost=cost,
    )
    if trace is not None:
        _write(trace, write_trace(arrivals))
    found = compare(arrivals, policies, setting, budgets=bound, plays=plays, seed=seed)
    _tell(found, svg, html, json=json)


def _arrivals(
    config: Config, load: str | None, from_record: str | None, usual: Usual, seed: int, pool: str
) -> tuple[list[Arrival], tuple[Budget, ...], datetime]:
    """The load, the budgets that come with it, and when it begins: those of the record with the
    budgets of the deployment."""
    from tidegate.rehearse.budgets import budget_in
    from tidegate.rehearse.load import load_of, read_trace, record_span, table_in
    from tidegate.rehearse.simulation import Setting

    starts_at = Setting().starts_at
    if (load is None) == (from_record is None):
        raise ConfigError("rehearse", None, "needs either a file or --from-record")
    if from_record is not None:
        span = record_span("--from-record", from_record, datetime.now(UTC))
        found, since = _from_record(config, from_record, span, usual, pool)
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


def _cost_in(config: Config, pool: str) -> Cost:
    """What calls cost at the upstream of a pool: as the trace has it, or by its prices."""
    from tidegate.admission.charges import Prices
    from tidegate.call import Usage
    from tidegate.policy.deployment import deployed_upstreams
    from tidegate.prices.rates import cost_micros

    try:
        upstreams = deployed_upstreams(config).upstreams
    except ConfigError:  # a rehearsal needs no upstream: without one no price is known
        upstreams = ()
    prices = Prices(next((one for one in upstreams if one.pool == pool), None))

    def cost(arrival: Arrival, model: str) -> int | None:
        if arrival.cost_usd and model == arrival.model:
            return arrival.use.cost_micros
        usage = Usage(arrival.input_tokens, arrival.output_tokens)
        usage = replace(usage, cached_tokens=arrival.cached_tokens)
        return cost_micros(prices.of(model), usage, arrival.images)

    return cost


def _from_record(
    config: Config, said: str, span: tuple[datetime, datetime], usual: Usual, pool: str
) -> tuple[list[Arrival], datetime]:
    """The calls, and when the first of them was submitted."""
    from tidegate.rehearse.load import from_zero
    from tidegate.store.statistics import past_calls
    from tidegate.supervisor.services import with_record

    calls = with_record(config, lambda connections: past_calls(connections, pool, *span))
    if not calls:
        raise ConfigError("--from-record", said, f"no call of pool {pool} is on record then")
    since = calls[0].submitted_at
    rows: list[dict[str, Any]] = [
        {
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
        }
        for call in calls
    ]
    return from_zero(usual.arrival("the record", row) for row in rows), since


def _sooner(arrivals: list[Arrival], times: float) -> list[Arrival]:
    if times == 1.0:
        return arrivals
    return [replace(one, time_ms=one.time_ms / times) for one in arrivals]


def _policy(config: Config, file: Path | None, *, in_force: bool, pool: str) -> PoolPolicy:
    from tidegate.policy.deployment import from_file
    from tidegate.supervisor.services import policy_of

    if file is not None and in_force:
        raise ConfigError("--policy", str(file), "give a file or --in-force, not both")
    if file is not None:
        return from_file(file, config)
    if not in_force:
        return policy_of(config, pool)

    async def look(control: Control) -> PoolPolicy:
        return control.limiter.policy

    return in_pool(look)


def _variants(
    policy: PoolPolicy, budgets: tuple[Budget, ...], sets: Sequence[str]
) -> tuple[Mapping[str, PoolPolicy], Mapping[str, tuple[Budget, ...]]]:
    """The policy and the budgets as they are, then with each set of changes."""
    from tidegate.cli.limits import parsed
    from tidegate.policy.format import edit, of_plain, to_plain
    from tidegate.rehearse.budgets import PREFIX, changed

    found, bound = {_AS_IT_IS: policy}, {_AS_IT_IS: budgets}
    for changes in sets:
        each = [change.strip() for change in changes.split(";") if change.strip()]
        wanted = dict(parsed(change, "--set") for change in each)
        of_budgets = {key: wanted.pop(key) for key in list(wanted) if key.startswith(PREFIX)}
        found["; ".join(each)] = of_plain(edit(wanted)(to_plain(policy)))
        bound["; ".join(each)] = changed(budgets, of_budgets) if of_budgets else budgets
    return found, bound


def _tell(found: list[Findings], svg: Path | None, html: Path | None, *, json: bool) -> None:
    from tidegate.cli.terminal import console, show_chart, show_figures
    from tidegate.rehearse.charts import chart_of, drawing_of, page_of, svg_of
    from tidegate.rehearse.report import sentence_of, tables_of, title_of

    drawings, tables = [drawing_of(one) for one in found], tables_of(found)
    sentence = sentence_of(found[0])
    if svg is not None or html is not None:
        picture = svg_of(title_of(found[0]), drawings)
        if svg is not None:
            _write(svg, picture)
        if html is not None:
            _write(html, page_of("Rehearsal", sentence, picture, tables))
    if json:
        show_json(found if len(found) > 1 else found[0])
        return
    shown = console()
    shown.print(sentence, soft_wrap=False)
    for table in tables:
        shown.print()
        show_figures(table, shown, {"binds": "bold yellow"})
    shown.print()
    show_chart(chart_of(drawings, shown.width), shown)


def _read(name: str) -> str:
    import sys

    try:
        data = sys.stdin.buffer.read(_LONGEST_BYTES + 1) if name == "-" else Path(name).read_bytes()
        if len(data) > _LONGEST_BYTES:
            raise ConfigError(name, f"({len(data)} bytes)", f"at most {_LONGEST_BYTES} bytes")
        return data.decode()
    except OSError as unreadable:
        raise ConfigError(name, "(file)", f"must be readable: {unreadable.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(name, "(file)", "must be UTF-8 text") from None


def _toml(name: str, text: str) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as broken:
        raise ConfigError(name, "(file)", f"must be TOML: {broken}") from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as refused:
        raise ConfigError(str(path), "(file)", f"can't be written: {refused.strerror}") from None
