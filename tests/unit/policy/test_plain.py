"""Policies as plain values: what may be written, what is said of a mistake, and back again."""

from __future__ import annotations

import json
import tomllib
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.errors import ConfigError
from tidegate.limiter import (
    MEASURES_OF_SHARES,
    RESERVES,
    SHAPES_OF_RATES,
    UNITS,
    USUAL_WEIGHTS,
    Adaptive,
    Band,
    Concurrency,
    Limit,
    PoolPolicy,
    Quota,
    Ramp,
    Rate,
    Unit,
    Weights,
)
from tidegate.policy.format import MEASURES, digest, of_plain, to_plain

EVERYTHING = """
[limits]
"pool:total" = { bound = 50, adaptive = { minimum = 2 } }
"model:qwen" = { bound = 64, adaptive = { by = "latency" } }
"tif:llama" = 64_000
"model:llama" = { bound = 900, shadow = true, unit = "tokens_in_flight", reserve = "bound" }
"kind:text_only" = 5
"model:gemini-2.5-flash" = { bound = 20, shadow = true }
"tenant:acme" = 3
"rpm:gemini-2.5-flash" = 60
"tpm:gemini-2.5-flash" = { bound = 1_000_000, slack_ms = 250 }
"itpm:total" = 500_000
"ipm:kind/image_generation" = 10
"rpd:tenant/acme" = { bound = 10_000, zone = "Europe/Berlin", shadow = true }

[weights]
acme = 4

[[bands]]
name = "high"
headroom = 0.1

[[bands]]
name = "normal"
min_share = 0.2

[pool]
lease_ms = 2000
when_away = "local"
on_lost = "cancel"
on_expiry = "hold"
queue_per_tenant = 500
reap_closed_ms = 300
hand_off = false
fair_by = "cost"
"""


def test_everything_that_may_be_written_is_read() -> None:
    assert of_plain(tomllib.loads(EVERYTHING)) == PoolPolicy(
        limits={
            "pool:total": Concurrency(50, adaptive=Adaptive(2)),
            "kind:text_only": 5,
            "model:gemini-2.5-flash": Concurrency(20, shadow=True),
            "tenant:acme": 3,
            "model:qwen": Concurrency(64, adaptive=Adaptive(1, "latency")),
            "tif:llama": Concurrency(64_000, unit="tokens_in_flight"),
            "model:llama": Concurrency(900, True, None, "tokens_in_flight", "bound"),
            "rpm:gemini-2.5-flash": Rate(60, 60_000),
            "tpm:gemini-2.5-flash": Rate(1_000_000, 60_000, "tokens", slack_ms=250),
            "itpm:total": Rate(500_000, 60_000, "input_tokens"),
            "ipm:kind/image_generation": Rate(10, 60_000, "images"),
            "rpd:tenant/acme": Quota(10_000, zone="Europe/Berlin", shadow=True),
        },
        weights={"acme": 4},
        bands=(Band("high", headroom=0.1), Band("normal", min_share=0.2)),
        lease_ms=2000,
        when_away="local",
        on_lost="cancel",
        on_expiry="hold",
        queue_per_tenant=500,
        reap_closed_ms=300,
        hand_off=False,
        fair_by="cost",
    )


@pytest.mark.parametrize("scope", sorted(set(MEASURES) - {"tif"}))
def test_the_scope_of_a_rate_says_what_it_counts_and_for_how_long(scope: str) -> None:
    limit = of_plain({"limits": {f"{scope}:total": 7}}).limit(f"{scope}:total")
    measure = MEASURES[scope]
    bound = 7_000_000 if measure.unit == "usd" else 7
    if scope.endswith("d"):
        assert limit == Quota(bound, cast(Unit, measure.unit))
    else:
        window_ms = {"s": 1_000, "m": 60_000, "h": 3_600_000}[scope[-1]]
        assert limit == Rate(bound, window_ms, cast(Unit, measure.unit))


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"limit": {}}, "limit", "limits, weights, bands, pool"),
    ({"limits": 5}, "limits", "a table"),
    ({"limits": {"kind:text_only": "5"}}, "limits.kind:text_only", "a whole number or a table"),
    ({"limits": {"kind:text_only": True}}, "limits.kind:text_only", "a whole number or a table"),
    ({"limits": {"kind:text_only": 1.5}}, "limits.kind:text_only", "a whole number or a table"),
    ({"limits": {"kind:text_only": -1}}, "limits.kind:text_only", "from 0 to"),
    ({"limits": {"kind:text_only": {}}}, "limits.kind:text_only.bound", "a whole number"),
    ({"limits": {"kind:text_only": {"bound": "5"}}}, "limits.kind:text_only.bound", "whole number"),
    (
        {"limits": {"kind:text_only": {"bound": 5, "window_ms": 5}}},
        "limits.kind:text_only.window_ms",
        "known: type, bound, shadow, adaptive",
    ),
    ({"limits": {"kind:poems": 5}}, "limits.kind:poems", "text_only"),
    ({"limits": {"pool:all": 5}}, "limits.pool:all", "pool:total"),
    ({"limits": {"models:x": 5}}, "limits.models:x", "pool, kind, model, tenant"),
    ({"limits": {"model:": 5}}, "limits.model:", "a name"),
    ({"limits": {"rpm:": 5}}, "limits.rpm:", "must name a model"),
    ({"limits": {"rpm:kind/poems": 5}}, "limits.rpm:kind/poems", "text_only"),
    ({"limits": {"rpm:tenant/": 5}}, "limits.rpm:tenant/", "tenant/<tenant>"),
    ({"limits": {"rpm:key/": 5}}, "limits.rpm:key/", "key/<prefix>"),
    ({"limits": {"key:": 5}}, "limits.key:", "a name"),
    ({"limits": {"key:tg_abcdefghij": 5}}, "limits.key:tg_abcdefghij", "without tg_"),
    ({"limits": {"rpm:key/tg_a_b": 5}}, "limits.rpm:key/tg_a_b", "without tg_"),
    ({"limits": {"rpm:user/ann": 5}}, "limits.rpm:user/ann", "user/<tenant>/<user>"),
    ({"limits": {"rpm:user/acme/": 5}}, "limits.rpm:user/acme/", "user/<tenant>/<user>"),
    ({"limits": {"user:/ann": 5}}, "limits.user:/ann", "user:<tenant>/<user>"),
    ({"limits": {"conversation:c1": 5}}, "limits.conversation:c1", "<tenant>/<conversation>"),
    ({"limits": {"rpm:user/acme/*": 5}}, "limits.rpm:user/acme/*", "budget with `each`"),
    ({"limits": {"key:*": 5}}, "limits.key:*", "budget with `each`"),
    ({"limits": {"rpm:key/a,b": 5}}, "limits.rpm:key/a,b", "%2C"),
    ({"limits": {"rpm:user/acme/a b": 5}}, "limits.rpm:user/acme/a b", "%20"),
    ({"limits": {"model:key/x": 5}}, "limits.model:key/x", "tenant:<tenant>"),
    ({"limits": {"rpm:models/user/a/b": 5}}, "limits.rpm:models/user/a/b", "must name a model"),
    ({"limits": {"text_only": 5}}, "limits.text_only", "scope"),
    ({"limits": {"model:a b": 5}}, "limit", "scope:name"),
    ({"limits": {"rpm:x": {"bound": 5, "unit": "calls"}}}, "limits.rpm:x.unit", "requests"),
    ({"limits": {"rpm:x": {"bound": 5, "slack_ms": -1}}}, "limits.rpm:x.slack_ms", "from 0"),
    ({"limits": {"rpm:x": {"bound": 5, "window_ms": 1}}}, "limits.rpm:x.window_ms", "from 100"),
    ({"limits": {"rpm:x": {"bound": 5, "zone": "UTC"}}}, "limits.rpm:x.zone", "known: "),
    ({"limits": {"rpm:x": {"bound": 5, "shadow": 1}}}, "limits.rpm:x.shadow", "true or false"),
    ({"limits": {"tpm:x": {"bound": 5, "reserve": "most"}}}, "limits.tpm:x.reserve", "bound"),
    (
        {"limits": {"tpm:x": {"bound": 5, "weights": {"in": 1}}}},
        "limits.tpm:x.weights.in",
        "cached",
    ),
    ({"limits": {"rpm:x": {"bound": 5, "weights": {}}}}, "limits.rpm:x.weights", "tokens"),
    (
        {"limits": {"rpm:x": {"bound": 5, "ramp": {"start": 1}}}},
        "limits.rpm:x.ramp.percent_per_minute",
        "whole",
    ),
    ({"limits": {"rpm:x": {"bound": 5, "pace_ms": 0}}}, "limits.rpm:x.pace_ms", "from 1"),
    ({"limits": {"rpm:x": {"bound": 5, "shape": "leaky"}}}, "limits.rpm:x.shape", "window, bucket"),
    ({"limits": {"rpd:x": {"bound": 5, "shape": "bucket"}}}, "limits.rpd:x.shape", "known: "),
    ({"limits": {"usdpm:x": -1}}, "limits.usdpm:x.bound", "dollars"),
    ({"limits": {"rpd:x": {"bound": 5, "zone": "Mars/Base"}}}, "limits.rpd:x.zone", "time zone"),
    ({"limits": {"rpd:x": {"bound": 5, "type": "bucket"}}}, "limits.rpd:x.type", "quota"),
    ({"limits": {"model:x": {"bound": 5, "type": "rate"}}}, "limits.model:x.window_ms", "whole"),
    (
        {"limits": {"model:x": {"bound": 5, "adaptive": {"minimum": 9}}}},
        "limits.model:x.adaptive.minimum",
        "from 1 to 5",
    ),
    (
        {"limits": {"model:x": {"bound": 5, "adaptive": {"least": 1}}}},
        "limits.model:x.adaptive.least",
        "known: minimum",
    ),
    ({"limits": {"model:x": {"bound": 5, "adaptive": 2}}}, "limits.model:x.adaptive", "a table"),
    (
        {"limits": {"model:x": {"bound": 5, "adaptive": {"by": "speed"}}}},
        "limits.model:x.adaptive.by",
        "refusals, latency",
    ),
    ({"limits": {"model:total": 5}}, "limits.model:total", "pool:total"),
    ({"limits": {"model:kind/image": 5}}, "limits.model:kind/image", "kind:<kind>"),
    ({"limits": {"model:tenant/x": 5}}, "limits.model:tenant/x", "tenant:<tenant>"),
    ({"limits": {"rpm:models/tenant/x": 5}}, "limits.rpm:models/tenant/x", "must name a model"),
    ({"limits": {"rpm:models/total": 5}}, "limits.rpm:models/total", "must name a model"),
    ({"limits": {"rpm:models/": 5}}, "limits.rpm:models/", "must name models only"),
    ({"limits": {"rpm:a,,b": 5}}, "limits.rpm:a,,b", "must name models only"),
    ({"limits": {"model:a,": 5}}, "limits.model:a,", "must name models only"),
    ({"limits": {"rpm:a,total": 5}}, "limits.rpm:a,total", "not 'total'"),
    ({"limits": {"tpm:a,tenant/x": 5}}, "limits.tpm:a,tenant/x", "not 'tenant/x'"),
    (
        {"limits": {f"rpm:{'a' * 201}": 5}},
        f"limits.rpm:{'a' * 56}...",
        "must have at most 200 characters after rpm:, not 201",
    ),
    (
        {"limits": {f"user:acme/{'a' * 200}": 5}},
        f"limits.user:acme/{'a' * 50}...",
        "must have at most 200 characters after user:, not 205",
    ),
    (
        {"limits": {"tif:x": {"bound": 5, "unit": "tokens"}}},
        "limits.tif:x.unit",
        "tokens_in_flight",
    ),
    ({"limits": {"rpm:x": {"bund": 5}}}, "limits.rpm:x.bund", "did you mean bound?"),
    ({"weights": {"acme": 0}}, "weights.acme", "from 1 to 1000"),
    ({"weights": {"acme": "4"}}, "weights.acme", "a whole number"),
    ({"weights": [4]}, "weights", "a table"),
    ({"weights": {"a b": 4}}, "tenant", "without spaces"),
    ({"bands": {"high": {}}}, "bands", "[[bands]]"),
    ({"bands": ["high"]}, "bands[0]", "a table"),
    ({"bands": [{"min_share": 0.1}]}, "bands[0].name", "a text"),
    ({"bands": [{"name": "high", "share": 1}]}, "bands[0].share", "known: name"),
    ({"bands": [{"name": "high", "headroom": "a"}]}, "bands[0].headroom", "from 0 to 0.9"),
    ({"bands": [{"name": "high", "headroom": 2}]}, "bands.high.headroom", "from 0 to 0.9"),
    ({"bands": [{"name": "high"}] * 2}, "bands", "different names"),
    ({"bands": []}, "bands", "1 to 8 bands"),
    ({"pool": {"lease": 3}}, "pool.lease", "known: lease_ms"),
    ({"pool": {"lease_ms": 3}}, "pool.lease_ms", "200 to"),
    ({"pool": {"lease_ms": "3s"}}, "pool.lease_ms", "a whole number"),
    ({"pool": {"on_lost": "panic"}}, "pool.on_lost", "finish, cancel"),
    ({"pool": {"fair_by": "money"}}, "pool.fair_by", "seconds, calls, cost"),
    ({"pool": {"hand_off": 1}}, "pool.hand_off", "true or false"),
    ({"pool": {"queue_per_tenant": 0}}, "pool.queue_per_tenant", "from 1"),
    ({"pool": {"reap_closed_ms": -5}}, "pool.reap_closed_ms", "from 0"),
]


@pytest.mark.parametrize(("plain", "path", "allowed"), WRONG)
def test_a_mistake_is_told_with_its_path_and_what_is_allowed(
    plain: dict[str, Any], path: str, allowed: str
) -> None:
    with pytest.raises(ConfigError) as wrong:
        of_plain(plain)
    assert wrong.value.variable == path
    assert allowed in wrong.value.allowed
    assert "\n" not in str(wrong.value)


def test_of_a_later_versions_record_what_is_not_known_is_left_out() -> None:
    plain = {
        "limits": {"kind:text_only": {"bound": 5, "burst": 9}, "new:thing": 3},
        "bands": [{"name": "high", "colour": "red"}],
        "pool": {"lease_ms": 900, "later": 1},
        "later": {},
    }
    policy = of_plain(plain, revision=7, strict=False)
    assert policy == PoolPolicy(
        {"kind:text_only": 5, "new:thing": 3}, bands=(Band("high"),), lease_ms=900, revision=7
    )


names = st.from_regex(r"[a-z0-9./-]{1,12}", fullmatch=True)
units = st.sampled_from(UNITS)
bounds = st.integers(1, 10**9)
limits: st.SearchStrategy[int | Limit] = st.one_of(
    bounds,
    st.builds(Concurrency, bounds, st.booleans(), st.none() | st.just(Adaptive(1))),
    st.builds(
        Rate,
        bounds,
        st.integers(1_000, 10**7),
        units,
        st.none() | st.integers(0, 900),
        st.booleans(),
        reserve=st.sampled_from(RESERVES),
        settles=st.booleans(),
        pace_ms=st.none() | st.integers(1, 1_000),
        ramp=st.none() | st.builds(Ramp, st.integers(1, 900), st.integers(1, 900)),
        shape=st.sampled_from(SHAPES_OF_RATES),
    ),
    st.builds(
        Rate,
        bounds,
        st.integers(1_000, 10**7),
        st.sampled_from(sorted(USUAL_WEIGHTS)),
        weights=st.builds(Weights, *[st.sampled_from([0, 0.1, 1, 5])] * 3, st.just(7)),
    ),
    st.builds(Quota, bounds, units, st.sampled_from(["UTC", "America/Los_Angeles"]), st.booleans()),
)
policies = st.builds(
    PoolPolicy,
    limits=st.dictionaries(
        st.builds(
            "{}:{}".format, st.sampled_from(["model", "tenant", "x", *sorted(MEASURES)]), names
        ),
        limits,
        max_size=6,
    ),
    lease_ms=st.integers(200, 9_000),
    when_away=st.sampled_from(["closed", "local"]),
    on_lost=st.sampled_from(["finish", "cancel"]),
    on_expiry=st.sampled_from(["reuse", "hold"]),
    revision=st.integers(1, 99),
    weights=st.dictionaries(names, st.integers(1, 1000), max_size=4),
    bands=st.sampled_from([(Band("normal"),), (Band("a", 0.1, 0.2), Band("b", 0.3))]),
    queue_per_tenant=st.integers(1, 10**6),
    reap_closed_ms=st.integers(0, 9_000),
    hand_off=st.booleans(),
    fair_by=st.sampled_from(MEASURES_OF_SHARES),
)


@given(policies)
def test_a_policy_survives_the_way_to_json_and_back(policy: PoolPolicy) -> None:
    plain = json.loads(json.dumps(to_plain(policy)))
    back = of_plain(plain, revision=policy.revision, strict=False)
    # A number and a Concurrency of nothing but a bound are the same limit.
    assert {name: back.limit(name) for name in back.limits} == {
        name: policy.limit(name) for name in policy.limits
    }
    assert back.pack() == policy.pack()
    assert to_plain(back) == plain
    assert digest(plain) == digest(to_plain(policy))


def test_the_digest_depends_on_the_policy_alone() -> None:
    one = of_plain({"limits": {"model:a": 1, "model:b": {"bound": 2}}}, revision=1)
    two = of_plain({"limits": {"model:b": 2, "model:a": 1}, "pool": {"lease_ms": 3000}}, revision=9)
    other = of_plain({"limits": {"model:b": 2, "model:a": 2}})
    assert digest(to_plain(one)) == digest(to_plain(two))
    assert digest(to_plain(one)) != digest(to_plain(other))


def test_what_is_as_usual_is_left_out() -> None:
    assert to_plain(PoolPolicy({"kind:text_only": Concurrency(5)})) == {
        "limits": {"kind:text_only": 5}
    }
