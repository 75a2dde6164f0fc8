"""`make bench-limits`, or `python -m bench.limits --only anthropic --scenario mix`.

Measures our limits against providers that count as the real ones do, through two API processes and
two workers: what the provider refuses, what of its quota is used, how much of an agent's cached
conversation passes, and what happens when the account changes. A provider's minute lasts `--window`
seconds here, in the emulator and in the policy. Then comes what the limits promise besides
(`bench/limits/promises.py`), and one table of all bars; `--write` puts it into
`docs/benchmarks.md`.

Accounts are measured `--beside` one another, each with a fleet of its own, which takes a tenth of
two cores. What is measured of processor time comes after them, alone. Parts that were measured
apart, of one commit and with `--json`, become one table by `python -m bench.limits --of FILE...`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from bench import budgets, grid, machine, verdicts
from bench.limits import bars, promises
from bench.limits.accounts import CONVERSATION, IMPORTED, PROVIDERS, MeasuredProvider
from bench.limits.figures import LEARNING_CALLS, Book, binding, limit_uses, refusals
from bench.limits.load import AgentLoad, MixedLoad
from bench.limits.notice import Watch, refused_of, seen_limits
from bench.limits.parts import Part, run_beside
from bench.limits.stage import ANSWER_MS, LimitsStage, NotStarted, standing
from tidegate.embedded.servers import ServerFailed
from tidegate.emulator.client import EmulatorControl

Figures = dict[str, Any]
HIT_RATE = 0.9
OTHERS_SHARE, NEW_TIER = 0.3, 0.5
SCENARIOS = ("mix", "conversation", "changes", "import", *promises.MEASURED)
ADMIN_KEY = "sk-admin-measured"
_LEARN_WINDOWS = 6  # so long at most until the first calls have been answered
_POLL_S = 0.2
_LOOK_S = 1.0  # at what the gateway shows of limits
_READINGS = 20  # of a window
_ENDING = (signal.SIGTERM, signal.SIGINT)
_ABOUT = "about"  # in a file of figures, where they come from


async def _until_learned(control: EmulatorControl, window_s: float) -> None:
    """A window at least, and until the first calls have come."""
    began_s = time.monotonic()
    while (passed_s := time.monotonic() - began_s) < _LEARN_WINDOWS * window_s:
        if passed_s > window_s and (await control.account())["calls"] >= LEARNING_CALLS:
            return
        await asyncio.sleep(_POLL_S)


async def measure_mix(
    stage: LimitsStage, provider: MeasuredProvider, window_s: float, windows: int
) -> Figures:
    load = MixedLoad(stage.gateway_url, provider.dialect, provider.models, stage.clients)
    async with EmulatorControl(stage.provider_url) as control, load:
        await _until_learned(control, window_s)
        readings = await _readings(control, window_s, windows)
    return _figures(readings, windows, load.statuses)


async def _readings(control: EmulatorControl, window_s: float, windows: int) -> list[Book]:
    """The account's book, evenly over so many windows and one more."""
    began_s = time.monotonic()
    found: list[Book] = []
    for number in range((windows + 1) * _READINGS + 1):
        await asyncio.sleep(max(began_s + number * window_s / _READINGS - time.monotonic(), 0))
        found.append(await control.account())
    return found


def _figures(readings: Sequence[Book], windows: int, statuses: Counter[str]) -> Figures:
    counted = refusals(readings[-1])
    uses = binding(limit_uses(readings, windows))
    return {
        "calls": counted.calls,
        "first": counted.first,
        "per_thousand": counted.per_thousand,
        "used": {use.name: use.share for use in uses.values()},
        "statuses": dict(statuses),
    }


async def measure_conversation(
    stage: LimitsStage, provider: MeasuredProvider, window_s: float, windows: int
) -> Figures:
    """Input of all agents over the bound of what is not cached, by the provider's own book."""
    load = AgentLoad(stage.gateway_url, provider.models[0])
    async with EmulatorControl(stage.provider_url) as control, load:
        await _until_learned(control, window_s)
        billed = (await control.stats()).billed().input_tokens
        readings = await _readings(control, window_s, windows)
        later = (await control.stats()).billed().input_tokens
    before, after = readings[0], readings[-1]
    total = later - billed
    (uncached,) = [
        use for use in limit_uses(readings, windows) if use.name.startswith("uncached_input_tokens")
    ]
    passed_s = (after["now_ns"] - before["now_ns"]) / 1e9
    bound = next(
        limit["bound"] for limit in after["limits"] if limit["unit"] == "uncached_input_tokens"
    )
    return {
        **_figures(readings, windows, load.statuses),
        "itpm_of_bound": total / (bound * passed_s / window_s),
        "cached": 1 - uncached.used / total if total else 0.0,
    }


async def measure_changes(
    stage: LimitsStage, provider: MeasuredProvider, window_s: float, windows: int
) -> Figures:
    """Refusals in the first window after another consumer comes, and a tier falls, and per window
    after that; and when each limit that binds shows it. No header tells of anything at Gemini and
    Bedrock, and of requests a minute at Groq, but there of a day's.
    """
    load = MixedLoad(stage.gateway_url, provider.dialect, provider.models, stage.clients)
    found: Figures = {}
    changes = {"others": {"others_share": OTHERS_SHARE}, "tier": {"tier": NEW_TIER}}
    async with (
        EmulatorControl(stage.provider_url) as control,
        load,
        aiohttp.ClientSession() as session,
    ):

        async def watched(watch: Watch, for_s: float) -> Book:
            until_s = time.monotonic() + for_s
            while True:
                book = await control.account()
                watch.look(await seen_limits(session, stage.gateway_url), book)
                if (left_s := until_s - time.monotonic()) <= 0:
                    return book
                await asyncio.sleep(min(_LOOK_S, left_s))

        await _until_learned(control, window_s)
        for name, change in changes.items():
            before = await seen_limits(session, stage.gateway_url)
            start = await control.set_account(**change)
            watch = Watch(provider.binding(window_s), before, refused_of(start))
            first = await watched(watch, window_s)
            end = await watched(watch, windows * window_s)
            found[name] = {
                "first": first["refused"] - start["refused"],
                "later": (end["refused"] - first["refused"]) / windows,
                "noticed": watch.found(),
            }
    found["statuses"] = dict(load.statuses)
    return found


async def measure_import(
    stage: LimitsStage, provider: MeasuredProvider, window_s: float, windows: int
) -> Figures:
    """The command that sets the account's own limits, and what is refused from then on."""
    admin_key = {f"{provider.name.upper()}_ADMIN_KEY": ADMIN_KEY}
    took_s = await asyncio.to_thread(
        partial(stage.command, "limits", "import", provider.name, "--apply", **admin_key)
    )
    load = MixedLoad(stage.gateway_url, provider.dialect, provider.models, stage.clients)
    async with EmulatorControl(stage.provider_url) as control, load:
        await asyncio.sleep((windows + 1) * window_s)
        book = await control.account()
    return {"took_s": took_s, "refused": book["refused"], "calls": book["calls"]}


Measure = Callable[[LimitsStage, MeasuredProvider, float, int], Coroutine[Any, Any, Figures]]


def run(
    provider: MeasuredProvider, measure: Measure, options: argparse.Namespace, **account: Any
) -> Figures:
    try:
        how = {"answer_ms": options.answer_ms, "at_first": options.at_first}
        with standing(provider, options.window, **how, **account) as stage:
            return asyncio.run(measure(stage, provider, options.window, options.windows))
    except (NotStarted, ServerFailed, OSError) as failed:
        return {"failed": f"{type(failed).__name__}: {failed}"}


def promised(measure: Callable[[], Figures]) -> Figures:
    try:
        return measure()
    except (NotStarted, ServerFailed, OSError, TimeoutError, AssertionError) as failed:
        return {"failed": f"{type(failed).__name__}: {failed}"}


def _mix_row(name: str, found: Figures) -> list[str]:
    if "failed" in found:
        return [name, found["failed"], "", "", ""]
    used = ", ".join(f"{limit} {share:.0%}" for limit, share in found["used"].items())
    return [
        name,
        str(found["calls"]),
        str(found["first"]),
        f"{found['per_thousand']:.1f}",
        used,
    ]


def _change_rows(account: str, changes: Figures) -> list[list[str]]:
    if "failed" in changes:
        return [[account, changes["failed"], *[""] * 4]]
    rows = []
    for name in ("others", "tier"):
        one = changes[name]
        times = [
            ", ".join(f"{limit} {_seconds(said[key])}" for limit, said in one["noticed"].items())
            for key in ("after_s", "refused_after_s")
        ]
        rows.append([account, name, str(one["first"]), f"{one['later']:.1f}", *times])
    return rows


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}"


def _tables(found: dict[str, Figures]) -> list[grid.Grid]:
    tables: list[grid.Grid] = []
    headers: Sequence[str]
    mixes = {name.removeprefix("mix "): figures for name, figures in found.items() if "mix" in name}
    if mixes:
        headers = ("rules of", "calls", "refused of the first 50", "per 1,000 after", "quota used")
        rows = [_mix_row(name, figures) for name, figures in mixes.items()]
        tables.append(grid.Grid("Full backlog, mixed models, 90 % cache hits", headers, rows))
    if (agents := found.get("conversation")) is not None:
        row = [agents.get("failed", "")]
        if "failed" not in agents:
            row = [
                f"{agents['itpm_of_bound']:.2f}",
                f"{agents['cached']:.0%}",
                f"{agents['per_thousand']:.1f}",
            ]
        headers = ("input over the bound", "of it cached", "refused per 1,000")
        tables.append(grid.Grid("Agents' conversations, ITPM without cache reads", headers, [row]))
    if (spent := found.get("durability")) is not None:
        costs = [budgets.Cost(**one) for one in spent.get("costs", ())]
        rows = [budgets.row_of(one) for one in costs] or [[spent["failed"], *[""] * 5]]
        tables.append(grid.Grid("What durability costs an admission", budgets.HEADERS, rows))
    rows = [
        [name.partition(" ")[2], figures.get("failed") or f"{figures['took_s']:.2f}"]
        + [str(figures.get(key, "")) for key in ("calls", "refused")]
        for name, figures in found.items()
        if name.startswith("import")
    ]
    if rows:
        headers = ("account", "seconds", "calls after", "of them refused")
        tables.append(grid.Grid("`tidegate limits import --apply`", headers, rows))
    rows = []
    for measured, changes in found.items():
        if measured.startswith("changes"):
            rows += _change_rows(measured.partition(" ")[2], changes)
    if rows:
        headers = ("account", "change", "refused in its first window", "per window after")
        times = ("noticed after s", "first refused after s")
        tables.append(grid.Grid("An account that changes", (*headers, *times), rows))
    return tables


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.limits", description=__doc__)
    names = [provider.name for provider in PROVIDERS]
    parser.add_argument("--only", action="append", choices=names, default=[])
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, default=[])
    parser.add_argument("--window", type=float, default=60.0, help="seconds of a provider's minute")
    parser.add_argument("--windows", type=int, default=3, help="measured of each")
    parser.add_argument("--answer-ms", type=float, default=ANSWER_MS, help="until an answer begins")
    parser.add_argument("--beside", type=int, default=3, help="accounts measured concurrently")
    parser.add_argument(
        "--at-first", action="store_true", help="with the limits that a policy of 0.1.0 can have"
    )
    parser.add_argument("--check", action="store_true", help="end with 1 when a bar is missed")
    parser.add_argument("--json", type=Path, help="put every figure into this file")
    parser.add_argument("--write", action="store_true", help="put the tables into the document")
    parser.add_argument("--of", type=Path, nargs="+", help="only show the figures of such files")
    return parser.parse_args()


def _stop(_signal: int, _frame: object) -> None:
    """Leave the blocks that have started processes; a second signal would break that off."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(1)


def accounts_measured(options: argparse.Namespace) -> dict[str, Part]:
    """What is wanted of the accounts: each by itself needs a fleet of its own and little of it."""
    wanted = options.scenario or SCENARIOS
    minutes = argparse.Namespace(**{**vars(options), "window": bars.MINUTE_S, "windows": 1})
    parts: dict[str, Part] = {}

    def part(scenario: str, provider: MeasuredProvider, measure: Measure, cache: Any) -> None:
        name = scenario if scenario == "conversation" else f"{scenario} {provider.name}"
        of = minutes if scenario == "import" else options
        only = () if scenario == "conversation" else ("--only", provider.name)
        parts[name] = Part(
            ("--scenario", scenario, *only), partial(run, provider, measure, of, cache=cache)
        )

    for provider in PROVIDERS:
        if "mix" in wanted and (not options.only or provider.name in options.only):
            part("mix", provider, measure_mix, HIT_RATE)
    if "conversation" in wanted and not options.only:
        part("conversation", CONVERSATION, measure_conversation, "prefix")
    for provider in PROVIDERS:
        if "changes" in wanted and (not options.only or provider.name in options.only):
            part("changes", provider, measure_changes, HIT_RATE)
    for provider in IMPORTED:
        if "import" in wanted and (not options.only or provider.name in options.only):
            part("import", provider, measure_import, HIT_RATE)
    return parts


def measured(options: argparse.Namespace, about: list[str]) -> dict[str, Figures]:
    """All that is wanted, printed and written down as it comes."""
    wanted = options.scenario or SCENARIOS
    found: dict[str, Figures] = {}

    def keep(name: str, figures: Figures) -> None:
        found[name] = figures
        print(f"{name}: {figures.get('failed') or figures.get('statuses', 'measured')}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps({_ABOUT: about, **found}, indent=1))

    parts = accounts_measured(options)
    windows = ("--window", str(options.window), "--windows", str(options.windows))
    at_first = ("--at-first",) if options.at_first else ()
    general = (*windows, "--answer-ms", str(options.answer_ms), *at_first)
    for name, figures in run_beside(parts, options.beside, general):
        keep(name, figures)
    found.update({name: found.pop(name) for name in parts})
    for name, measure in promises.MEASURED.items():
        if name in wanted and not options.only:
            keep(name, promised(measure))
    return found


def read(files: Sequence[Path]) -> tuple[list[str], dict[str, Figures]]:
    """Where the figures of some files come from, and all of them."""
    about: list[str] = []
    found: dict[str, Figures] = {}
    for file in files:
        figures = json.loads(file.read_text())
        about += [line for line in figures.pop(_ABOUT) if line not in about]
        found |= figures
    return about, found


def main() -> int:
    for number in _ENDING:
        signal.signal(number, _stop)
    options = _arguments()
    if options.of:
        about, found = read(options.of)
    else:
        command = ["python -m bench.limits", *sys.argv[1:]]
        about = machine.describe("the emulator's accounts", command)
        found = measured(options, about)
    judged = bars.verdicts(found)
    tables = [verdicts.table("Our limits against their bars", judged), *_tables(found)]
    print("\n".join(about))
    grid.show(tables)
    if options.write:
        grid.write("limits", tables, about)
    failed = any("failed" in figures for figures in found.values())
    missed = any(one.verdict == verdicts.MISSED for one in judged)
    return int(failed or (options.check and missed))


if __name__ == "__main__":
    sys.exit(main())
