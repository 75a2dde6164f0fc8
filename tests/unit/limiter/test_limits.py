"""Policies: what is refused, how they are packed and said to the scripts, what a share is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgpack
import pytest

from tidegate.errors import ConfigError
from tidegate.limiter.connection import read_facts
from tidegate.limiter.flow import flow_of
from tidegate.limiter.messages import band_shares, definition, lane_of
from tidegate.limiter.policy import (
    MAX_LOG,
    Adaptive,
    Band,
    Concurrency,
    PoolPolicy,
    Quota,
    Rate,
    share_of,
)

FULL = PoolPolicy(
    {
        "kind:a": 5,
        "kind:shadow": Concurrency(5, shadow=True),
        "kind:adaptive": Concurrency(50, adaptive=Adaptive(2)),
        "rpm:x": Rate(60, 60_000),
        "tpm:x": Rate(1_000_000, 60_000, "input_tokens", slack_ms=0, shadow=True),
        "rpd:x": Quota(10_000, "images", "Asia/Kolkata"),
    },
    weights={"acme": 4},
    bands=(Band("high", headroom=0.1), Band("low", min_share=0.05)),
    queue_per_tenant=7,
    lease_ms=5000,
    when_away="local",
    on_lost="cancel",
    on_expiry="hold",
    reap_closed_ms=500,
    hand_off=False,
    fair_by="cost",
    revision=9,
)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"limits": {"kind:a": -1}}, "kind:a"),
        ({"limits": {"kind:a": True}}, "kind:a"),
        ({"limits": {"kind:a": 1.5}}, "kind:a"),
        ({"limits": {"kind:a": "5"}}, "kind:a"),
        ({"limits": {"text only": 1}}, "limit"),
        ({"limits": {"kind:a|b": 1}}, "limit"),
        ({"limits": {"kind:a b": 1}}, "limit"),
        ({"limits": {"kind:{a}": 1}}, "limit"),
        ({"limits": {"kind:a": Concurrency(1, adaptive=Adaptive(2))}}, "minimum"),
        ({"limits": {"rpm:x": Rate(5, 10)}}, "window_ms"),
        ({"limits": {"rpm:x": Rate(5, 1000, slack_ms=2000)}}, "slack_ms"),
        ({"limits": {"rpm:x": Rate(5, 1000, "pounds")}}, "unit"),  # type: ignore[arg-type]
        ({"limits": {"rpd:x": Quota(5, zone="Mars/Olympus")}}, "zone"),
        ({"limits": {}, "lease_ms": 10}, "lease_ms"),
        ({"limits": {}, "revision": 0}, "revision"),
        ({"limits": {}, "weights": {"a": 0}}, "weights.a"),
        ({"limits": {}, "weights": {"a|b": 1}}, "tenant"),
        ({"limits": {}, "queue_per_tenant": 0}, "queue_per_tenant"),
        ({"limits": {}, "reap_closed_ms": -1}, "reap_closed_ms"),
        ({"limits": {}, "fair_by": "luck"}, "fair_by"),
        ({"limits": {}, "when_away": "open"}, "when_away"),
        ({"limits": {}, "on_lost": "canceled"}, "on_lost"),
        ({"limits": {}, "on_expiry": "Hold"}, "on_expiry"),
        ({"limits": {}, "revision": 1.5}, "revision"),
        ({"limits": {}, "revision": "2"}, "revision"),
        ({"limits": {}, "bands": ()}, "bands"),
        ({"limits": {}, "bands": (Band("a"), Band("a"))}, "bands"),
        ({"limits": {}, "bands": (Band("a", min_share=0.95),)}, "bands.a.min_share"),
        ({"limits": {}, "bands": (Band("a", headroom=0.5), Band("b", headroom=0.5))}, "bands"),
    ],
)
def test_a_wrong_policy_is_refused_by_the_name_of_what_is_wrong(
    wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        PoolPolicy(**wrong)
    assert named in str(raised.value)


def test_equal_policies_pack_to_the_same_bytes() -> None:
    one = PoolPolicy({"kind:a": 1, "kind:b": 2}, weights={"x": 2, "y": 3}, revision=7)
    two = PoolPolicy({"kind:b": 2, "kind:a": 1}, weights={"y": 3, "x": 2}, revision=7)
    assert one.pack() == two.pack()


def test_a_policy_survives_being_packed() -> None:
    assert PoolPolicy.unpack(FULL.pack()) == FULL


def test_a_policy_of_an_earlier_version_is_fair_by_seconds() -> None:
    earlier = msgpack.packb(msgpack.unpackb(FULL.pack())[:11])
    assert PoolPolicy.unpack(earlier) == replace(FULL, fair_by="seconds")


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (Concurrency(5), "c|5|0|0|0|0"),
        (Concurrency(5, shadow=True, adaptive=Adaptive(2)), "c|5|1|2|0|0"),
        (Rate(60, 60_000), "r|60|0|60000|500|1"),
        (Rate(60, 1000), "r|60|0|1000|50|1"),
        (Rate(MAX_LOG, 60_000, slack_ms=0), "r|10000|0|60000|0|1"),
        (Rate(MAX_LOG + 1, 60_000), "r|10001|0|60000|500|0"),
        (Rate(60, 60_000, "tokens"), "r|60|0|60000|500|0"),
        (Quota(10, shadow=True), "q|10|1|0|0|0"),
    ],
)
def test_a_limit_is_said_as_the_scripts_read_it(
    limit: Concurrency | Rate | Quota, said: str
) -> None:
    assert definition(limit) == said


def test_headroom_is_kept_free_of_all_bands_below() -> None:
    bands = (Band("a", headroom=0.1), Band("b", min_share=0.2, headroom=0.2), Band("c"))
    assert band_shares(bands) == "0:0,200:100,0:300"


@pytest.mark.parametrize("name", ["", "rpm:", "a b", "x" * 201, f"rpm:{'x' * 201}"])
def test_an_id_that_is_none_is_refused_with_its_length(name: str) -> None:
    assert PoolPolicy(limits={f"rpm:{'x' * 200}": 3}).rules
    with pytest.raises(ConfigError, match="name of 1 to 200 characters, without spaces"):
        PoolPolicy(limits={name: 3})


def test_bands_are_found_by_name() -> None:
    assert [FULL.band(name) for name in ("high", "low")] == [0, 1]
    with pytest.raises(ConfigError, match="one of high, low"):
        FULL.band("normal")


def test_the_lane_of_a_flow_is_what_it_was_made_of() -> None:
    assert lane_of(flow_of(2, "acme", ("kind:a", "pool:all"))) == "kind:a pool:all"


def test_a_limit_that_is_not_there_is_one_of_nothing() -> None:
    assert (FULL.bound("kind:a"), FULL.bound("rpm:x"), FULL.bound("kind:z")) == (5, 60, 0)
    assert FULL.limit("kind:z") is None
    assert FULL.limit("kind:a") == Concurrency(5)


@pytest.mark.parametrize("sessions", range(1, 20))
def test_shares_never_add_up_to_more_than_the_limit(sessions: int) -> None:
    assert share_of(7, sessions) * sessions <= 7
    assert share_of(7, 0) == 0


def test_only_a_server_that_may_really_evict_is_refused() -> None:
    info = "run_id:abc\r\nuptime_in_seconds:3\r\nmaxmemory:{}\r\nmaxmemory_policy:allkeys-lru\r\n"
    assert read_facts(info.format(0).encode()).uptime_ms == 3000
    with pytest.raises(ConfigError, match="noeviction"):
        read_facts(info.format(1).encode())
