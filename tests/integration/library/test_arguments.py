"""Arguments of the limiter that programs give it by mistake: of one call, and felt by no other."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from tidegate.errors import ConfigError
from tidegate.limiter import Demand, Limiter, Observer, PoolPolicy, Rate, State, Tokens

POLICY = PoolPolicy({"openai": 1, "tpm:x": Rate.per_minute(1_000, unit="tokens")})
MEMORY = "memory://"
MILLION_YEARS_MS = 10**30


@pytest.mark.parametrize(
    "demand",
    [
        {"hard_ms": 60 * 1e3},
        {"hard_ms": 2.5},
        {"hard_ms": MILLION_YEARS_MS},
        {"deadline_ms": 2_000.5},
        {"deadline_ms": MILLION_YEARS_MS},
    ],
    ids=str,
)
async def test_a_time_that_is_no_whole_number_holds_up_no_other_call(
    demand: dict[str, Any], valkey_url: str, pool: str
) -> None:
    """What it was asked for could not be sent or read: the process was away to all its calls."""
    for url in (MEMORY, valkey_url):
        states = States()
        options: dict[str, Any] = {"pool": pool, "policy": POLICY, "observer": states}
        async with Limiter.from_url(url, **options) as limiter:
            await limiter.joined()
            asked = Demand(("tpm:x",), tokens=Tokens(1), **demand)
            async with asyncio.timeout(10):
                async with limiter.acquire("tpm:x", tokens=1, **demand):
                    pass
                async with limiter.acquire_for(asked):
                    pass
                async with limiter.acquire("openai"):
                    pass
        assert "away" not in states.seen


class States(Observer):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def state_changed(self, old: State, new: State) -> None:
        self.seen.append(new)


async def test_a_pause_takes_the_seconds_of_a_header_in_milliseconds(
    valkey_url: str, pool: str
) -> None:
    """As `float(headers["retry-after"]) * 1000` is: half of the pause was done, without an end."""
    for url in (MEMORY, valkey_url):
        async with Limiter.from_url(url, pool=pool, policy=POLICY) as limiter:
            assert await limiter.penalise("openai", for_ms=60.5 * 1000)
            left_ms = (await limiter.snapshot()).limits["openai"].paused_ms
            assert 50_000 < left_ms <= 60_500
            assert await limiter.resume("openai")
            assert await limiter.penalise("openai", for_ms=MILLION_YEARS_MS)
            assert await limiter.resume("openai")
            async with limiter.acquire("openai", timeout=10):
                pass


@pytest.mark.parametrize(
    ("limits", "options", "why"),
    [
        ((["openai"],), {}, 'a name, as in acquire("openai"'),
        ((["openai"], "tpm:x"), {}, 'a name, as in acquire("openai"'),
        (("openai",), {"timeout": "5"}, "number of seconds"),
        (("openai",), {"timeout": None, "deadline_ms": "5"}, "number of milliseconds"),
        (("openai",), {"hard_ms": "5"}, "number of milliseconds"),
        (("openai",), {"hard_ms": float("nan")}, "number of milliseconds"),
        (("openai",), {"tenant": 5}, "tenant=5: 1 to 200 characters"),
        (("openai",), {"tenant": ["acme"]}, 'a name, as in acquire("openai"'),
        (("openai",), {"tenant": "half \ud83d"}, "1 to 200 characters"),
        (("openai",), {"tenant": "\ud83d"}, "1 to 200 characters"),
    ],
    ids=ascii,
)
async def test_what_is_no_name_and_no_time_is_refused_and_holds_up_no_other_call(
    limits: Any, options: dict[str, Any], why: str, valkey_url: str, pool: str
) -> None:
    for url in (MEMORY, valkey_url):
        async with Limiter.from_url(url, pool=pool, policy=POLICY) as limiter:
            with pytest.raises((TypeError, ValueError, ConfigError), match=re.escape(why)):
                async with limiter.acquire(*limits, **({"timeout": 5} | options)):
                    pass
            async with limiter.acquire("openai", timeout=10):
                assert limiter.state == "up"


async def test_a_demand_without_its_comma_and_a_policy_of_a_mapping_are_explained(
    pool: str,
) -> None:
    async with Limiter.from_url(MEMORY, pool=pool, policy=POLICY) as limiter:
        limits: Any = "openai"
        with pytest.raises(TypeError, match=r"a tuple: \('openai',\)"):
            async with limiter.acquire_for(Demand(limits)):
                pass
        policy: Any = {"openai": 3}
        with pytest.raises(TypeError, match="PoolPolicy of a higher revision"):
            await limiter.set_policy(policy)
