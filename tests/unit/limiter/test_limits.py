"""Policies: what is refused, how they are packed, what a share is."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter import PoolPolicy
from tidegate.limiter.limits import share_of
from tidegate.limiter.link import read_facts


@pytest.mark.parametrize(
    "wrong",
    [
        {"limits": {"kind:a": -1}},
        {"limits": {"kind:a": True}},
        {"limits": {"text_only": 1}},
        {"limits": {"kind:a|b": 1}},
        {"limits": {}, "lease_ms": 10},
        {"limits": {}, "revision": 0},
    ],
)
def test_a_wrong_policy_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PoolPolicy(**wrong)


def test_equal_policies_pack_to_the_same_bytes_and_back() -> None:
    one = PoolPolicy({"kind:a": 1, "kind:b": 2}, on_expiry="hold", revision=7)
    two = PoolPolicy({"kind:b": 2, "kind:a": 1}, on_expiry="hold", revision=7)
    assert one.pack() == two.pack()
    assert PoolPolicy.unpack(one.pack()) == one


@pytest.mark.parametrize("sessions", range(1, 20))
def test_shares_never_add_up_to_more_than_the_limit(sessions: int) -> None:
    assert share_of(7, sessions) * sessions <= 7
    assert share_of(7, 0) == 0


def test_only_a_server_that_may_really_evict_is_refused() -> None:
    info = "run_id:abc\r\nuptime_in_seconds:3\r\nmaxmemory:{}\r\nmaxmemory_policy:allkeys-lru\r\n"
    assert read_facts(info.format(0).encode()).uptime_ms == 3000
    with pytest.raises(ConfigError, match="noeviction"):
        read_facts(info.format(1).encode())
