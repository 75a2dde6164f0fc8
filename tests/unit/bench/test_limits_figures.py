"""The arithmetic of the limits' benchmark, and its load: a wrong figure would be believed."""

from __future__ import annotations

import itertools
import tomllib
from typing import Any

import pytest

from bench.limits.accounts import CONVERSATION, KEY_VARIABLE, PROVIDERS, MeasuredProvider
from bench.limits.bars import ITPM_OF_BOUND_AT_FIRST, verdicts
from bench.limits.figures import DAY_S, LimitUse, binding, limit_uses, refusals
from bench.limits.load import drawn, mix
from bench.limits.notice import SeenLimit, Watch
from bench.verdicts import MISSED
from tidegate.emulator.account import AccountSpec
from tidegate.policy.deployment import deployment_of
from tidegate.settings import Config

SECOND = 10**9


def book(now_s: float, **limit: Any) -> dict[str, Any]:
    whole = {
        "name": "tokens:m:10s",
        "bound": 100,
        "window_s": 10.0,
        "counted": 0,
    }
    return {"now_ns": round(now_s * SECOND), "limits": [whole | limit]}


@pytest.mark.parametrize("burst_at_s", [0.5, 4.5, 9.9])
def test_a_burst_at_the_edge_of_a_measurement_is_neither_lost_nor_won(burst_at_s: float) -> None:
    """One hundred in each window of ten seconds, all in its second after `burst_at_s`."""

    def counted(now_s: float) -> int:
        whole, part = divmod(now_s - burst_at_s, 10)
        return round(100 * (whole + min(max(part, 0), 1)))

    for windows in (1, 3):
        count = (windows + 1) * 20 + 1
        readings = [
            book(100 + number / 2, counted=counted(100 + number / 2)) for number in range(count)
        ]
        (use,) = limit_uses(readings, windows)
        assert use.given == pytest.approx(100 * windows)
        assert use.share == pytest.approx(1)


def test_what_a_gateway_leaves_of_a_window_is_no_use() -> None:
    readings = [book(100 + number / 2, counted=4 * number) for number in range(41)]
    (use,) = limit_uses(readings, 1)
    assert use == LimitUse("tokens:m:10s", 80, 100)


def test_refusals_of_the_first_fifty_calls_are_apart() -> None:
    counted = refusals({"calls": 1_050, "refused": 5, "refused_calls": [3, 50, 51, 700, 701]})
    assert (counted.first, counted.later) == (2, 3)
    assert counted.per_thousand == 3.0


def test_the_binding_limit_of_a_class_is_the_one_used_most() -> None:
    uses = [
        LimitUse("requests:a:60s", 1, 100),
        LimitUse("tokens:a:60s", 90, 100),
        LimitUse("requests:b:60s", 50, 100),
        LimitUse("requests:b:86400s", 50, 10),
    ]
    assert {models: use.name for models, use in binding(uses).items()} == {
        "a": "tokens:a:60s",
        "b": "requests:b:60s",
    }


GOOD: dict[str, Any] = {
    "first": 3,
    "per_thousand": 1.0,
    "used": {"tokens:m:60s": 0.97, "requests:m:10s": 0.9},
}
REFUSED = {"by": "rate", "waiting": 0, "p99_ms": 19.9, "true": 1.0, "wrong": "0"}
RATIOS = {
    "limits of usual units: Valkey CPU, us a permit": 1.1,
    "limits of usual units: clients' CPU, us a permit": 0.9,
    "limits of all units, against usual ones: Valkey CPU, us a permit": 1.5,
}
NOTICED: dict[str, float | None] = {"after_s": 59.9, "refused_after_s": None}
CHANGE = {"first": 9, "later": 1.0, "noticed": {"tpm:m": NOTICED}}
ALL_GOOD: dict[str, dict[str, Any]] = {
    "mix openai": GOOD,
    "conversation": {**GOOD, "itpm_of_bound": 8 * ITPM_OF_BOUND_AT_FIRST},
    "import openai": {"took_s": 4.9, "refused": 0, "calls": 900},
    "changes openai": dict.fromkeys(("others", "tier"), CHANGE),
    "durability": {
        "costs": [
            {"budgets": name, "at_once": 1, "p50_ms": 0.2, "p99_ms": 0.5}
            for name in ("a commit of one row", "0", "1")
        ]
    },
    "books": {"budgets": "1 passed in 30 s", "books": "1 passed in 30 s"},
    "waits": {"true": {"one tenant": 0.9}, "told": {"one tenant": 300}},
    "refusals": {"rows": [REFUSED]},
    "tiers": {name: {"late": 0, "share": 0.55} for name in ("24 h", "1 h", "1 min")},
    "admission": {"ratios": RATIOS},
}


def changed(after_s: float | None, refused_after_s: float) -> dict[str, Any]:
    """One limit of two is noticed so late, of an account of which others come."""
    late = {"after_s": after_s, "refused_after_s": refused_after_s}
    return {"others": CHANGE | {"noticed": {"tpm:m": NOTICED, "rpm:n": late}}, "tier": CHANGE}


def missed(found: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{one.figure}: {one.ours}" for one in verdicts(found) if one.verdict == MISSED]


def test_figures_within_their_bars_miss_none() -> None:
    assert {one.verdict for one in verdicts(ALL_GOOD)} == {"ok"}


def test_what_was_not_measured_is_not_ok() -> None:
    assert {one.verdict for one in verdicts({})} == {"not measured"}


@pytest.mark.parametrize(
    ("name", "figures", "words"),
    [
        ("import openai", {"took_s": 5.1, "refused": 0, "calls": 9}, "openai 5.10 s"),
        ("import openai", {"took_s": 1.0, "refused": 1, "calls": 9}, "openai 1 of 9"),
        ("mix groq", {**GOOD, "first": 4}, "openai 3, groq 4, agents 3"),
        ("mix groq", {**GOOD, "per_thousand": 1.1}, "openai 1, groq 1.1"),
        ("mix groq", {**GOOD, "used": {"tokens:m:60s": 0.96}}, "groq 96.0%"),
        ("mix azure", {**GOOD, "used": {"requests:m:10s": 0.89}}, "azure 89.0%"),
        ("conversation", {**GOOD, "itpm_of_bound": 1.96}, "2.0 x"),
        (
            "changes groq",
            {"others": CHANGE | {"later": 2.0}, "tier": CHANGE | {"later": 0.0}},
            "openai others 1.0, openai tier 1.0, groq others 2.0, groq tier 0.0",
        ),
        ("changes groq", changed(70.0, 69.0), "groq others 70, groq tier 60"),
        ("changes groq", changed(None, 69.0), "groq others never"),
        ("books", {"budgets": "failed: 1 over", "books": "1 passed"}, "failed: 1 over"),
        (
            "waits",
            {
                "true": {"one tenant": 0.95, "two bands": 0.89},
                "told": {"one tenant": 300, "two bands": 217},
            },
            "two bands 89.0% of 217",
        ),
        ("refusals", {"rows": [REFUSED | {"p99_ms": 20.1}]}, "p99 20.1 ms"),
        ("refusals", {"rows": [REFUSED | {"true": 0.999}]}, "rate: 99.9%"),
        (
            "refusals",
            {"rows": [REFUSED | {"waiting": 2, "wrong": "1 x 503"}]},
            "rate behind 2: 100.0%",
        ),
        ("tiers", ALL_GOOD["tiers"] | {"1 h": {"late": 1, "share": 0.5}}, "1 h 1"),
        ("tiers", ALL_GOOD["tiers"] | {"24 h": {"late": 0, "share": 0.56}}, "56.0%"),
        ("admission", {"ratios": RATIOS | {[*RATIOS][1]: 1.2}}, "clients' 1.20 x"),
        ("admission", {"ratios": RATIOS | {[*RATIOS][2]: 1.6}}, "Valkey 1.60 x"),
    ],
)
def test_a_bar_that_is_missed_is_named(name: str, figures: dict[str, Any], words: str) -> None:
    (line,) = missed({**ALL_GOOD, name: figures})
    assert words in line


@pytest.mark.parametrize("name", [name for name in ALL_GOOD if name != "mix openai"])
def test_a_measurement_that_failed_misses_its_bars(name: str) -> None:
    lines = missed({**ALL_GOOD, name: {"failed": "NotStarted: x"}})
    assert lines
    assert all("NotStarted: x" in line for line in lines)


@pytest.mark.parametrize("at_first", [True, False])
@pytest.mark.parametrize("window_s", [10.0, 60.0])
@pytest.mark.parametrize("provider", [*PROVIDERS, CONVERSATION], ids=lambda one: one.name)
def test_the_account_and_the_policy_are_sound(
    provider: MeasuredProvider, window_s: float, at_first: bool
) -> None:
    spec = AccountSpec.parse(provider.account(window_s, cache=0.9))
    assert spec is not None
    for model in provider.models:
        assert [limit for limit in spec.limits if limit.binds(model)]
    stated = tomllib.loads(provider.toml(window_s, "http://127.0.0.1:1", at_first=at_first))
    config = Config.model_validate(
        {"redis_url": "redis://127.0.0.1:1/0", "database_url": "postgresql://127.0.0.1:1/x"}
    )
    deployment = deployment_of(stated, config, {KEY_VARIABLE: "k"}.__getitem__)
    (upstream,) = deployment.upstreams
    limits = deployment.policies[upstream.name].limits
    assert len(limits) > len(provider.policy(10_000))


UNITS = {
    "rpm": ("requests",),
    "tpm": ("tokens",),
    "itpm": ("input_tokens", "uncached_input_tokens"),
    "otpm": ("output_tokens",),
}


@pytest.mark.parametrize("window_s", [10.2, 60.0])
@pytest.mark.parametrize("provider", [*PROVIDERS, CONVERSATION], ids=lambda one: one.name)
def test_the_policy_has_the_accounts_bounds(provider: MeasuredProvider, window_s: float) -> None:
    spec = AccountSpec.parse(provider.account(window_s))
    assert spec is not None
    for name, limit in provider.policy(round(window_s * 1000)).items():
        rate, _, models = name.partition(":")
        (meant,) = [
            one
            for one in spec.limits
            if one.unit in UNITS[rate] and (models == one.models or one.binds(models))
            if one.window_s < DAY_S
        ]
        assert meant.name == provider.binding(window_s)[name]
        assert limit["bound"] == pytest.approx(meant.bound, abs=1)
        assert limit["window_ms"] == pytest.approx(meant.window_s * 1000, abs=1)


@pytest.mark.parametrize(
    ("before", "seen", "shows"),
    [
        (SeenLimit(), SeenLimit(1.0, 0.05), True),
        (SeenLimit(), SeenLimit(1.0, 0.04), False),
        (SeenLimit(1.0, 0.3), SeenLimit(1.0, 0.33), False),
        (SeenLimit(1.0, 0.3), SeenLimit(None, 0.5), True),
        (SeenLimit(1.0, 0.3), SeenLimit(0.5, 0.0), True),
        (SeenLimit(0.5), SeenLimit(0.5), False),
        (SeenLimit(1.0, 0.3), SeenLimit(), False),
    ],
)
def test_a_change_shows_by_the_bound_or_the_share_of_others(
    before: SeenLimit, seen: SeenLimit, shows: bool
) -> None:
    assert seen.shows_less(before) == shows


def test_of_each_limit_the_first_sight_and_the_first_refusal_are_kept() -> None:
    refused = {"tokens:m:60s": 2, "requests:n:60s": 0}

    def book_of(**more: int) -> dict[str, Any]:
        limits = [
            {"name": name, "refused": count + more.get(name[:1], 0)}
            for name, count in refused.items()
        ]
        return {"limits": limits}

    watch = Watch(dict(zip(("tpm:m", "rpm:n"), refused, strict=True)), {}, refused)
    watch.look({}, book_of())
    nothing = {"after_s": None, "refused_after_s": None, "refused": ()}
    assert watch.found() == {"tpm:m": nothing, "rpm:n": nothing}
    watch.look({"tpm:m": SeenLimit(1.0, 0.2)}, book_of(t=1))
    first = watch.found()
    assert first["rpm:n"] == nothing
    assert None not in first["tpm:m"].values()
    watch.look({"tpm:m": SeenLimit(0.5, 0.3)}, book_of(t=5, r=1))
    last = watch.found()["tpm:m"]
    assert [count for _, count in last["refused"]] == [1, 4]
    assert first["tpm:m"] == last | {"refused": last["refused"][:1]}
    assert watch.found()["rpm:n"]["refused_after_s"] is not None


@pytest.mark.parametrize("dialect", ["openai", "anthropic", "gemini"])
def test_the_mix_is_the_same_for_a_seed_and_mixed(dialect: str) -> None:
    first = list(itertools.islice(mix(dialect, ["a", "b"], 7), 200))
    assert first == list(itertools.islice(mix(dialect, ["a", "b"], 7), 200))
    if dialect == "gemini":
        assert {call.path.split("/")[-1].split(":")[0] for call in first} == {"a", "b"}
        assert len({call.path for call in first}) == 4
    else:
        assert {call.body["model"] for call in first} == {"a", "b"}
        assert {call.body["stream"] for call in first} == {True, False}
    bounds = {call.body.get("max_tokens") for call in first}
    assert (None in bounds) == (dialect != "anthropic")


def test_a_conversation_alternates_and_keeps_its_system_prompt() -> None:
    call = drawn("anthropic", "m", ["q", "a", "q2"], 10, streamed=True, system="s")
    assert [item["role"] for item in call.body["messages"]] == ["user", "assistant", "user"]
    assert (call.path, call.body["system"]) == ("/v1/messages", "s")
