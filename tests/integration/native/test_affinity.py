"""Conversations over several upstreams: they stay where their prompt cache is."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway import Gateway, Opener
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.limiter import Limiter
from tidegate.spine.affinity import GUESSED_US_PER_TOKEN

FILE = """
[upstreams.gemini]
models = ["gemini-*"]
[upstreams.second]
dialects = {{ gemini = "{url}" }}
key = "SECOND_KEY"
models = ["gemini-*"]
[upstreams.second.limits]
"pool:total" = 1
"""
ACCOUNT = {"provider": "gemini", "limits": [], "cache": "prefix", "cache_min_tokens": 16}
MODEL = "gemini-2.5-flash"
LONG = "Of all that is said here, this is repeated each time. " * 40


@pytest.fixture
async def second(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Emulator]:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    async with run_emulator() as running:
        await running.control.set_behaviour(account=ACCOUNT)
        yield running


@pytest.fixture
def policy(tmp_path: Path, second: Emulator) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(FILE.format(url=second.url))
    return path


async def say(gateway: Gateway, turns: list[str], talk: str = "") -> str:
    """A call of a conversation; the upstream that answered."""
    return (await answer_to(gateway, turns, talk))["x-tidegate-upstream"]


async def answer_to(
    gateway: Gateway, turns: list[str], talk: str, method: str = "generateContent"
) -> dict[str, str]:
    """The headers of an answer."""
    url = f"{gateway.url}/v1beta/models/{MODEL}:{method}"
    contents = [
        {"role": "model" if number % 2 else "user", "parts": [{"text": turn}]}
        for number, turn in enumerate(turns)
    ]
    headers = {"x-tidegate-conversation": talk} if talk else {}
    async with gateway.http.post(url, json={"contents": contents}, headers=headers) as answer:
        text = await answer.text()
        assert answer.status == 200, text
        return {name.lower(): value for name, value in answer.headers.items()}


async def at_second(gateway: Gateway) -> str:
    """The name of a conversation that the second upstream has answered."""
    names = (f"talk-{number}" for number in itertools.count())

    async def found() -> str | None:
        name = next(names)
        return name if await say(gateway, [LONG], name) == "second" else None

    return str(await wait_until(found, 20, "a conversation at the second upstream"))


async def test_turns_of_a_conversation_go_where_the_first_went(
    open_gateway: Opener, policy: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    await gateway.upstream.set_behaviour(account=ACCOUNT)
    await at_second(gateway)  # both are up
    went: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for turn in range(4):
        for talk in range(10):
            turns = [f"{talk} {LONG}", *["and then?"] * 2 * turn]
            went[talk][await say(gateway, turns)] += 1
    assert [len(names) for names in went.values()] == [1] * 10
    assert len({name for names in went.values() for name in names}) == 2


@pytest.mark.parametrize("per_1000", [0, 60_000])
async def test_a_cache_is_waited_for_as_long_as_it_is_worth(
    open_gateway: Opener, policy: Path, second: Emulator, per_1000: int
) -> None:
    gateway = await open_gateway(
        worker=False, tidegate_policy=policy, cache_wait_us_per_token=per_1000
    )
    talk = await at_second(gateway)
    assert await say(gateway, [LONG, "yes", "and?"], talk) == "second"
    await second.control.set_fault("hang", match="hold it")
    holding = asyncio.create_task(say(gateway, ["hold it"], talk))
    await wait_until(lambda: in_flight(second), 10, "the call that holds the permit")
    next_one = asyncio.create_task(say(gateway, [LONG, "yes", "and?", "no", "why?"], talk))
    if per_1000 == 0:
        assert await next_one == "gemini"
    else:
        limiter = gateway.services.spine.health["second"].limiter
        await wait_until(lambda: waits(limiter), 10, "the call that waits")
        assert not next_one.done()
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    if per_1000:
        assert await next_one == "second"


async def test_a_cache_that_is_worth_little_is_left_and_the_wait_is_on_record(
    open_gateway: Opener, policy: Path, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy, cache_wait_us_per_token=400)
    talk = await at_second(gateway)
    assert await say(gateway, [LONG, "yes", "and?"], talk) == "second"
    await second.control.set_fault("hang", match="hold it")
    holding = asyncio.create_task(say(gateway, ["hold it"], talk))
    await wait_until(lambda: in_flight(second), 10, "the call that holds the permit")
    answer = await answer_to(gateway, [LONG, "yes", "and?", "no", "why?"], talk)
    assert answer["x-tidegate-upstream"] == "gemini"
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)
    row = await gateway.audit(answer["x-tidegate-request-id"])
    assert row["upstream"] == "gemini"
    assert float(answer["x-tidegate-queue-ms"]) == pytest.approx(row["queue_ms"], abs=1)


async def test_streamed_answers_measure_what_a_cached_token_saves(
    open_gateway: Opener, policy: Path
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy)
    affinity = gateway.services.spine.affinity

    async def ms_per_token(method: str) -> float:
        for times in (1, 4):
            answer = await answer_to(gateway, [LONG * times], f"{times} {method}", method)
        row = await gateway.audit(answer["x-tidegate-request-id"])
        return affinity.ms_per_token((row["tenant_id"], MODEL))

    guessed_ms = GUESSED_US_PER_TOKEN / 1000
    assert await ms_per_token("generateContent") == pytest.approx(guessed_ms)
    assert await ms_per_token("streamGenerateContent") != pytest.approx(guessed_ms, rel=1e-6)


async def in_flight(emulator: Emulator) -> bool:
    return (await emulator.control.stats()).in_flight == 1


async def waits(limiter: Limiter) -> bool:
    snapshot = await limiter.snapshot()
    return any(limit.waiting for limit in snapshot.limits.values())
