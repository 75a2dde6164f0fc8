"""The library as Python programs write it, on a pool in memory."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from copy import copy, deepcopy
from datetime import timedelta
from math import inf, nan
from typing import Any, Protocol, cast

import pytest

from tidegate.errors import ConfigError, DeadlineExceeded, DemandImpossible, LeaseLost
from tidegate.limiter import Concurrency, Limiter, PoolPolicy, Rate, SyncLimiter
from tidegate.limiter.limiter import deadline_of
from tidegate.limiter.permit import Acquisition
from tidegate.limiter.session import Clock, now_ms

POLICY = {"openai": 1}


@pytest.fixture
async def limiter() -> AsyncIterator[Limiter]:
    async with Limiter.from_url("memory://", policy=POLICY) as opened:
        yield opened


@pytest.mark.parametrize("timeout", [0.03, timedelta(milliseconds=30)])
async def test_a_timeout_is_in_seconds(limiter: Limiter, timeout: float | timedelta) -> None:
    async with limiter.acquire("openai", timeout=inf):
        with pytest.raises(DeadlineExceeded) as refused:
            async with limiter.acquire("openai", timeout=timeout):
                pass
    assert refused.value.limit == "openai"


@pytest.mark.parametrize(
    ("timeout", "deadline_ms", "expected"),
    [
        (None, None, None),
        (None, 7, 7),
        (1.5, None, 1500),
        (0.0001, None, 1),
        (0, None, 0),
        (-1, None, 0),
        (timedelta(minutes=1), None, 60_000),
        (inf, None, None),
    ],
)
def test_a_timeout_is_a_deadline(
    timeout: float | timedelta | None, deadline_ms: int | None, expected: int | None
) -> None:
    assert deadline_of(timeout, deadline_ms) == expected


def test_a_timeout_beside_a_deadline_is_refused(limiter: Limiter) -> None:
    with pytest.raises(TypeError, match="not both"):
        limiter.acquire("openai", timeout=1, deadline_ms=1000)


def test_rates_are_named_by_their_window() -> None:
    assert Rate.per_second(3) == Rate(3, 1_000)
    assert Rate.per_minute(60) == Rate(60, window_ms=60_000)
    assert Rate.per_hour(9, unit="tokens") == Rate(9, 3_600_000, "tokens")
    assert Rate.per_day(5, pace_ms=10) == Rate(5, 86_400_000, pace_ms=10)


async def test_a_mapping_is_a_policy_and_a_pool_has_a_name(limiter: Limiter) -> None:
    assert limiter.policy == PoolPolicy(POLICY)
    assert limiter.pool == "default"


@pytest.mark.parametrize("policy", [[("openai", 1)], 5, None])
def test_anything_else_is_no_policy(policy: Any) -> None:
    with pytest.raises(TypeError, match="a PoolPolicy or a mapping of limits"):
        Limiter.from_url("memory://", policy=policy)


@pytest.mark.parametrize("name", ["openai", "gpt-5.2", "OpenAI/prod", "model:x", "rpm:a:b"])
def test_a_limit_may_have_a_plain_name(name: str) -> None:
    assert PoolPolicy({name: 2}).limit(name) == Concurrency(2)


@pytest.mark.parametrize("name", ["", "a b", "a|b", "{a}", "Model:x", ":x", 5])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="scope:name"):
        PoolPolicy({name: 2})


async def test_a_plain_name_that_is_unknown_is_named(limiter: Limiter) -> None:
    with pytest.raises(DemandImpossible, match=r"limit 'opena' .*\(known: openai\)"):
        async with limiter.acquire("opena"):
            pass


class _Blocks(Protocol):
    def __enter__(self) -> object: ...
    def __exit__(self, *_: object) -> None: ...


class _AsyncBlocks(Protocol):
    async def __aenter__(self) -> object: ...
    async def __aexit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    "take",
    [lambda one: one.acquire("openai"), lambda one: one.try_acquire("openai"), lambda one: one],
    ids=["acquire", "try_acquire", "limiter"],
)
async def test_a_plain_with_says_what_to_write(
    limiter: Limiter, take: Callable[[Limiter], _Blocks]
) -> None:
    with pytest.raises(TypeError, match=r"use `async with.*SyncLimiter"), take(limiter):
        pass


@pytest.mark.parametrize("name", ["acquire", "try_acquire"])
async def test_an_await_says_what_to_write(limiter: Limiter, name: str) -> None:
    with pytest.raises(TypeError, match=rf"use `async with limiter.{name}\(\.\.\.\)"):
        await getattr(limiter, name)("openai")


async def test_an_async_with_on_a_limiter_for_threads_says_what_to_write() -> None:
    opened = SyncLimiter.from_url("memory://", policy=POLICY)
    for wrong in (opened, opened.acquire("openai")):
        with pytest.raises(TypeError, match="use `with` on a SyncLimiter"):
            async with cast(_AsyncBlocks, wrong):
                pass


async def test_a_decorator_without_limits_says_what_to_write(limiter: Limiter) -> None:
    async def ask() -> None:
        pass

    for_threads = SyncLimiter.from_url("memory://", policy=POLICY)
    wrong: Any
    for wrong in (limiter.limited, for_threads.limited):
        with pytest.raises(TypeError, match=r"@limiter\.limited\("):
            wrong(ask)
        with pytest.raises(TypeError, match=r"@limiter\.limited\("):
            wrong()


class LateClock(Clock):
    """A clock that can be set forward, as time goes by for a process that was suspended."""

    def __init__(self) -> None:
        self.ahead_ms = 0
        self.now_ms = lambda: now_ms() + self.ahead_ms


async def test_entering_confirms_the_permit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was suspended between its admission and its block does not run the block."""
    clock, wait = LateClock(), Acquisition._wait

    async def suspended(*arguments: Any) -> Any:
        holding = await wait(*arguments)
        clock.ahead_ms += 10_000
        return holding

    async with Limiter.from_url("memory://", policy=POLICY, clock=clock) as limiter:
        await limiter.joined()
        with monkeypatch.context() as patch:
            patch.setattr(Acquisition, "_wait", suspended)
            ran = False
            with pytest.raises(LeaseLost):
                async with limiter.acquire("openai", timeout=5):
                    ran = True
        assert not ran
        assert limiter.permits_held == 0
        async with limiter.acquire("openai", timeout=5):
            pass


async def test_a_decorated_function_waits_in_seconds(limiter: Limiter) -> None:
    at_once = 0

    @limiter.limited("openai", timeout=5)
    async def ask() -> int:
        nonlocal at_once
        at_once += 1
        await asyncio.sleep(0)
        most, at_once = at_once, at_once - 1
        return most

    assert [*await asyncio.gather(ask(), ask(), ask())] == [1, 1, 1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timeout": nan}, "timeout is a number of seconds"),
        ({"images": "5"}, "images are counted in whole numbers"),
        ({"images": None}, "images are counted in whole numbers"),
        ({"images": 1.5}, "images are counted in whole numbers"),
    ],
)
async def test_an_argument_of_the_wrong_kind_is_named(
    limiter: Limiter, options: Any, named: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=named):
        limiter.acquire("openai", **options)
    if "images" in options:
        with pytest.raises(TypeError, match=named):
            limiter.try_acquire("openai", **options)


@pytest.mark.parametrize("name", [5, None, b"openai"])
async def test_a_limit_that_is_no_name_is_explained(limiter: Limiter, name: Any) -> None:
    for limits in ((name,), (name, "openai")):
        with pytest.raises(TypeError, match=r"a limit( or a tenant)? is a name"):
            async with limiter.acquire(*limits):
                pass


@pytest.mark.parametrize("make", [Limiter.from_url, SyncLimiter.from_url])
@pytest.mark.parametrize(
    ("url", "options", "named"),
    [
        (None, {}, "url=NoneType: a URL such as redis://localhost:6379"),
        (b"redis://localhost", {}, "url=bytes: a URL such as redis://localhost:6379"),
        ("memory://", {"on_conflict": "replce"}, "on_conflict=replce: one of raise, replace, keep"),
        ("memory://", {"pool": ""}, "pool=: 1 to 200 characters without"),
        ("memory://", {"pool": "a}b"}, "pool=a}b: 1 to 200 characters without"),
        ("memory://", {"pool": None}, "pool=None: 1 to 200 characters without"),
    ],
)
def test_an_option_of_a_limiter_that_cannot_work_is_named(
    make: Callable[..., object], url: Any, options: Any, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        make(url, policy=POLICY, **options)


@pytest.mark.parametrize("make", [Limiter.from_url, SyncLimiter.from_url])
@pytest.mark.parametrize("copied", [copy, deepcopy, pickle.dumps])
def test_a_limiter_is_not_copied_with_its_session(
    make: Callable[..., object], copied: Callable[[object], object]
) -> None:
    with pytest.raises(TypeError, match="can't be copied or pickled: make one in each process"):
        copied(make("memory://", policy=POLICY))
