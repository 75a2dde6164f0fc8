"""What the clients tell the limiter: several limits at once, tokens used, and pauses."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.integration.library.http_clients import Http
from tests.integration.library.makers import (
    LIMIT,
    OTHER,
    REQUESTS,
    TOKENS,
    MakeLimiter,
    MakeSync,
    ask,
    held,
    stream,
    until_free,
    until_used,
    whole,
)
from tests.integration.library.upstream import Upstream
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator
from tidegate.errors import DeadlineExceeded
from tidegate.limiter import Demand, Limiter, Tokens

MakeHttp = Callable[..., Http]
ALL = (LIMIT, OTHER, REQUESTS, TOKENS)


def upstreams_usage(body: bytes) -> int:
    total: int = json.loads(body)["usage"]["total_tokens"]
    return total


def geminis_usage(body: bytes) -> Tokens:
    used = json.loads(body)["usageMetadata"]
    return Tokens(used["promptTokenCount"], used["candidatesTokenCount"])


async def paused_ms(limiter: Limiter, limit: str) -> int:
    return (await limiter.snapshot()).limits[limit].paused_ms


async def test_a_request_takes_all_its_limits_or_none(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, Demand(ALL, tokens=Tokens(100, 50), deadline_ms=20_000))
    answer = await http.send("POST", stream(emulator.url), ask("all"))
    state = limiter.local_state()
    assert (state.held[LIMIT], state.held[OTHER]) == (1, 1)
    await answer.read()
    await until_used(limiter, OTHER, 0)
    # The limit below is used up: nothing of the others is spent.
    late = make_http(limiter, Demand(ALL, tokens=Tokens(100, 50), deadline_ms=30))
    async with limiter.acquire(LIMIT):
        with pytest.raises(DeadlineExceeded):
            await late.send("POST", stream(emulator.url), ask("late"))
    await until_used(limiter, REQUESTS, 1)
    await until_used(limiter, TOKENS, 150)


@pytest.mark.parametrize("path", ["whole", "zipped"])
async def test_the_usage_of_an_answer_settles_its_reservation(
    make_limiter: MakeLimiter, make_http: MakeHttp, upstream: Upstream, path: str
) -> None:
    limiter = await make_limiter()
    demand = Demand((LIMIT, TOKENS), tokens=Tokens(500))
    http = make_http(limiter, demand, usage=upstreams_usage)
    answer = await http.send("GET", f"{upstream.url}/{path}")
    assert upstreams_usage(await answer.read()) == 7
    await until_used(limiter, TOKENS, 7)
    await until_free(limiter)


async def test_the_usage_of_geminis_answers(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, Demand((LIMIT, TOKENS), tokens=Tokens(500)), usage=geminis_usage)
    answer = await http.send("POST", whole(emulator.url), ask("why is the sky blue"))
    used = geminis_usage(await answer.read())
    await until_used(limiter, TOKENS, used.total)


async def test_an_unknown_usage_keeps_the_reservation(
    make_limiter: MakeLimiter, make_http: MakeHttp, upstream: Upstream
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, Demand((LIMIT, TOKENS), tokens=Tokens(500)), usage=lambda _: None)
    answer = await http.send("GET", f"{upstream.url}/whole")
    await answer.read()
    await until_free(limiter)
    await until_used(limiter, LIMIT, 0)
    await until_used(limiter, TOKENS, 500)


async def test_a_429_with_retry_after_pauses_the_limit_for_all(
    make_limiter: MakeLimiter, make_http: MakeHttp, upstream: Upstream
) -> None:
    limiter, other = await make_limiter(), await make_limiter()
    http = make_http(limiter, Demand((LIMIT, REQUESTS)), penalise=REQUESTS)
    answer = await http.send("GET", f"{upstream.url}/throttled")
    assert (answer.status, await answer.read()) == (429, b"slow down")
    assert 25_000 < await paused_ms(other, REQUESTS) <= 30_000
    with pytest.raises(DeadlineExceeded):
        async with other.acquire(REQUESTS, deadline_ms=30):
            raise AssertionError("let in")
    await until_free(limiter)


async def test_googles_429_pauses_by_the_retry_info_of_its_body(
    make_limiter: MakeLimiter, make_http: MakeHttp, emulator: Emulator
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, Demand((LIMIT, REQUESTS)), penalise=lambda demand: demand.limits[-1])
    await emulator.control.set_fault("throttled", count=1, retry_after_s=20)
    answer = await http.send("POST", whole(emulator.url), ask("too much"))
    assert answer.status == 429
    assert b"RetryInfo" in await answer.read()
    assert 15_000 < await paused_ms(limiter, REQUESTS) <= 20_000


async def test_a_429_that_can_pause_no_limit_is_answered_and_says_so(
    make_limiter: MakeLimiter,
    make_http: MakeHttp,
    upstream: Upstream,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, Demand((LIMIT, REQUESTS)), penalise="rpm:flahs")
    answer = await http.send("GET", f"{upstream.url}/throttled")
    assert (answer.status, await answer.read()) == (429, b"slow down")
    assert "could not pause rpm:flahs: limit 'rpm:flahs' is not in the policy" in caplog.text
    await until_free(limiter)


async def test_a_429_pauses_nothing_unless_asked_to(
    make_limiter: MakeLimiter, make_http: MakeHttp, upstream: Upstream
) -> None:
    limiter = await make_limiter()
    http = make_http(limiter, Demand((LIMIT, REQUESTS)))
    answer = await http.send("GET", f"{upstream.url}/throttled")
    await answer.read()
    assert await paused_ms(limiter, REQUESTS) == 0


async def test_threads_try_pause_resume_and_settle(make_sync: MakeSync) -> None:
    limiter = make_sync()

    def used(limit: str) -> int:
        return limiter.snapshot().limits[limit].used

    with limiter.acquire(*ALL, tokens=Tokens(300, 100), tenant="acme", priority="high") as permit:
        assert set(permit.limits) == set(ALL)
        assert limiter.snapshot().limits[TOKENS].reserved == used(TOKENS) == 400
        with limiter.try_acquire(LIMIT) as second:
            assert second is None
        permit.settle(tokens=25)
    await wait_until(lambda: (used(LIMIT), used(TOKENS)) == (0, 25))
    assert limiter.snapshot().limits[TOKENS].reserved == 0
    with limiter.try_acquire(LIMIT) as free:
        assert free is not None
    assert limiter.penalise(REQUESTS, for_ms=60_000, reason="429", by="test")
    with limiter.try_acquire(REQUESTS) as paused:
        assert paused is None
    assert limiter.resume(REQUESTS, by="test")
    with limiter.acquire(REQUESTS, deadline_ms=20_000):
        assert held(limiter) == 0
    assert [change.revision for change in limiter.run(Limiter.history)] == [1]
