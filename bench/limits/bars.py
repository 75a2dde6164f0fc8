"""Bars of the limits: what a provider refuses, what of its quota is used, money, waits, tiers.

Pure. A figure of several measurements is that of the worst; one of which a measurement failed is
missed, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import inf
from typing import Any

from bench.verdicts import Bar, Judge, Verdict, judged

Figures = Mapping[str, Any]
Found = Mapping[str, Figures]

MINUTE_S = 60.0
# What passed of agents' cached conversations with the limits of 0.1.0, over the bound (`--at-first
# --window 60`, of the code before limits could say more).
ITPM_OF_BOUND_AT_FIRST = 0.98
_USUAL, _ALL = "limits of usual units", "limits of all units"


class _Failed(Exception):
    """A measurement of the figure failed; the message says how."""


def verdicts(found: Found) -> list[Verdict]:
    return judged(BARS, found)


def _those(found: Found, name: str) -> dict[str, Figures]:
    """The measurements of a scenario, by the rest of their names. Raises KeyError where none was
    made, _Failed where one failed."""
    mine = {
        key.removeprefix(name).strip(): figures
        for key, figures in found.items()
        if key.partition(" ")[0] == name
    }
    if not mine:
        raise KeyError(name)
    for key, figures in mine.items():
        if "failed" in figures:
            raise _Failed(f"{name} {key}: {figures['failed']}")
    return mine


def _honest(judge: Judge[Found]) -> Judge[Found]:
    def judged_or_failed(found: Found) -> tuple[str, bool]:
        try:
            return judge(found)
        except _Failed as failed:
            return str(failed)[:80], False

    return judged_or_failed


def _shown(values: Mapping[str, float], show: Callable[[float], str]) -> str:
    return ", ".join(f"{name} {show(value)}" for name, value in values.items())


def _refused(key: str, most: float) -> Judge[Found]:
    def judge(found: Found) -> tuple[str, bool]:
        values = {name: figures[key] for name, figures in _those(found, "mix").items()}
        if "conversation" in found:
            values["agents"] = _those(found, "conversation")[""][key]
        return _shown(values, lambda value: f"{value:.3g}"), max(values.values()) <= most

    return judge


def _used(least: float, *, whole_minutes: bool) -> Judge[Found]:
    def judge(found: Found) -> tuple[str, bool]:
        values = {}
        for name, figures in _those(found, "mix").items():
            shares = [
                share
                for limit, share in figures["used"].items()
                if (_window_s(limit) >= MINUTE_S) == whole_minutes
            ]
            if shares:
                values[name] = min(shares)
        if not values:
            raise KeyError("used")
        return _shown(values, lambda value: f"{value:.1%}"), min(values.values()) >= least

    return judge


def _window_s(limit: str) -> float:
    """Of a limit's name at the emulator, as `requests:gpt-5:60s`."""
    return float(limit.rpartition(":")[2].removesuffix("s"))


def _conversation(found: Found) -> tuple[str, bool]:
    gain = _those(found, "conversation")[""]["itpm_of_bound"] / ITPM_OF_BOUND_AT_FIRST
    return f"{gain:.1f} x", gain >= 8


def _import_s(found: Found) -> tuple[str, bool]:
    values = {name: figures["took_s"] for name, figures in _those(found, "import").items()}
    return _shown(values, lambda value: f"{value:.2f} s"), max(values.values()) < 5


def _import_refused(found: Found) -> tuple[str, bool]:
    mine = _those(found, "import")
    shown = ", ".join(f"{name} {one['refused']} of {one['calls']}" for name, one in mine.items())
    return shown, not any(figures["refused"] for figures in mine.values())


def _after_changes(found: Found) -> tuple[str, bool]:
    values = {
        f"{name} {change}".strip(): figures[change]["later"]
        for name, figures in _those(found, "changes").items()
        for change in ("others", "tier")
    }
    return _shown(values, lambda value: f"{value:.1f}"), max(values.values()) <= 1


def _noticed(found: Found) -> tuple[str, bool]:
    """Since a change came, of the limit that shows it last."""
    values = {}
    for name, figures in _those(found, "changes").items():
        for change in ("others", "tier"):
            each = [one["after_s"] for one in figures[change]["noticed"].values()]
            values[f"{name} {change}".strip()] = inf if None in each else max(each)
    shown = _shown(values, lambda value: f"{value:.0f}" if value < inf else "never")
    return shown, max(values.values()) < MINUTE_S


def _durability(found: Found) -> tuple[str, bool]:
    """Measured, without a bar."""
    costs = _those(found, "durability")[""]["costs"]
    ours = [one for one in costs if one["budgets"] == "1"]
    shown = [
        f"{one['at_once']} concurrent {one['p50_ms']:.1f} / {one['p99_ms']:.1f} ms" for one in ours
    ]
    return f"{', '.join(shown)}; a commit alone {costs[0]['p50_ms']:.1f} ms", True


def _tested(name: str) -> Judge[Found]:
    def judge(found: Found) -> tuple[str, bool]:
        said = _those(found, "books")[""][name]
        holds = not said.startswith("failed")
        return ("0" if holds else said), holds

    return judge


def _told(found: Found) -> tuple[str, bool]:
    waits = _those(found, "waits")[""]
    values, told = waits["true"], waits["told"]
    shown = ", ".join(f"{name} {true:.1%} of {told[name]}" for name, true in values.items())
    return shown, min(values.values()) >= 0.9


def _refusal_ms(found: Found) -> tuple[str, bool]:
    rows = _those(found, "refusals")[""]["rows"]
    shown = ", ".join(f"{_cause(one)}: p99 {one['p99_ms']:.1f} ms" for one in rows)
    return shown, all(one["p99_ms"] < 20 for one in rows)


def _cause(row: Figures) -> str:
    return f"{row['by']} behind {row['waiting']}" if row["waiting"] else str(row["by"])


def _retry_after(found: Found) -> tuple[str, bool]:
    rows = _those(found, "refusals")[""]["rows"]
    shown = ", ".join(f"{_cause(one)}: {one['true']:.1%}" for one in rows)
    return shown, all(one["true"] == 1 and one["wrong"] == "0" for one in rows)


def _late(found: Found) -> tuple[str, bool]:
    groups = _those(found, "tiers")[""]
    late = {name: float(group["late"]) for name, group in groups.items()}
    return _shown(late, lambda value: f"{value:.0f}"), not any(late.values())


def _tier_cost(found: Found) -> tuple[str, bool]:
    share = _those(found, "tiers")[""]["24 h"]["share"]
    return f"{share:.1%}", share <= 0.55


def _admission(units: str, most: float) -> Judge[Found]:
    def judge(found: Found) -> tuple[str, bool]:
        ratios = _those(found, "admission")[""]["ratios"]
        values = {
            said.partition(": ")[2].partition(" CPU")[0]: ratio
            for said, ratio in ratios.items()
            if said.startswith(units)
        }
        if not values:
            raise KeyError(units)
        return _shown(values, lambda value: f"{value:.2f} x"), max(values.values()) <= most

    return judge


def _bars() -> Iterator[Bar[Found]]:
    for figure, bar, judge in (
        ("refused by the provider, of the first 50 calls", "<= 3", _refused("first", 3)),
        ("the same, per 1,000 calls after", "<= 1", _refused("per_thousand", 1)),
        (
            "true quota used, windows of a minute or more",
            ">= 97 %",
            _used(0.97, whole_minutes=True),
        ),
        ("the same, shorter windows", ">= 90 %", _used(0.90, whole_minutes=False)),
        ("input of agents' conversations, 90 % cached, against 0.1.0", ">= 8 x", _conversation),
        ("`limits import --apply` of an empty policy", "< 5 s", _import_s),
        ("refused from then on", "0", _import_refused),
        (
            "refused a minute, from one minute after others or a lower tier appear",
            "<= 1",
            _after_changes,
        ),
        ("seconds until others or a lower tier are noticed", "< 60", _noticed),
        ("budgets: micro-dollars over, under any fault", "0", _tested("budgets")),
        ("what durability costs an admission, p50 / p99", "measured", _durability),
        ("records of a day with kills: unexplained differences", "0", _tested("books")),
        ("estimated waiting times within 25 % or 2 s", ">= 90 %", _told),
        ("refused early, by a rate, a day quota, a budget", "p99 < 20 ms", _refusal_ms),
        ("its Retry-After correct within 2 % or 1 s", "100 %", _retry_after),
        ("jobs late, of 1,000 due in a day, an hour, a minute", "0", _late),
        ("cost of those due in a day, over live", "<= 55 %", _tier_cost),
        (
            "CPU of an admission, usual limits, over that before units",
            "<= 1.10 x",
            _admission(_USUAL, 1.10),
        ),
        ("the same with all units", "<= 1.5 x", _admission(_ALL, 1.5)),
    ):
        yield Bar(figure, bar, _honest(judge))


BARS = tuple(_bars())
