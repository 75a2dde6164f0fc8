"""How long to wait after a 429, whatever words say it, and who is waited for meanwhile."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.native.conftest import MODEL
from tests.integration.security.hostile import Hostile, hostile
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator

__all__ = ["hostile"]

BODY = {"contents": [{"parts": [{"text": "Say hello"}]}]}
CHAIN = """
[upstreams.second]
dialects = {{ gemini = "{url}" }}
key = "SECOND_KEY"

[upstreams.second.limits]
"pool:total" = 1

[[routes]]
model = "only-second"
try = ["second/{model}"]

[[routes]]
model = "*"
try = ["gemini", "second"]
"""
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
async def second() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
def chain(tmp_path: Path, second: Emulator, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    path = tmp_path / "policy.toml"
    path.write_text(CHAIN.format(url=second.url, model=MODEL))
    return path


@pytest.fixture
def short_queue(chain: Path) -> Path:
    """One waiter at the first upstream."""
    chain.write_text("[pool]\nqueue_per_tenant = 1\n" + chain.read_text())
    return chain


async def ask(
    gateway: Gateway, model: str = MODEL, do: str = "generateContent", **headers: str
) -> Answer:
    url = f"{gateway.url}/v1beta/models/{model}:{do}"
    async with gateway.http.post(url, json=BODY, headers=headers) as response:
        named = {name.lower(): value for name, value in response.headers.items()}
        return response.status, named, await response.read()


def no_more(*lines: bytes) -> bytes:
    head = (b"HTTP/1.1 429 Too Many Requests", b"content-length: 2", *lines)
    return b"\r\n".join(head) + b"\r\n\r\n{}"


@pytest.mark.parametrize("said", [b"retry-after: 0", b"retry-after-ms: 0", b"retry-after: soon"])
async def test_a_time_of_nothing_is_no_leave_to_ask_again_at_once(
    open_gateway: Opener, hostile: Hostile, said: bytes
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    hostile.answer = no_more(said)
    assert (await ask(gateway, **{"x-tidegate-deadline-ms": "150"}))[0] == 429
    assert len(hostile.seen) <= 1  # none where that was over before it came in


async def test_what_falls_under_no_limit_waits_as_long_as_it_was_told_too(
    open_gateway: Opener, hostile: Hostile
) -> None:
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    hostile.answer = no_more(b"retry-after: 1")
    headers = {"x-tidegate-deadline-ms": "900"}
    assert (await ask(gateway, do="countTokens", **headers))[0] == 429
    assert len(hostile.seen) == 1


async def test_a_refusal_that_breaks_off_is_the_refusal_that_it_was(
    open_gateway: Opener, hostile: Hostile
) -> None:
    """Its status and headers have come: they say what it is and how long to wait."""
    gateway = await open_gateway(worker=False, gemini_base_url=hostile.url)
    head = b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 9\r\ntransfer-encoding: chunked\r\n"
    text = b'{"error": "' + b"0123456789" * 20
    packed = gzip.compress(text)[:-8]
    for more, came in (
        (b"\r\n", b""),
        (b"\r\nff\r\n" + text, text),
        (b"content-encoding: gzip\r\n\r\nff\r\n" + packed, text),
        (b"content-encoding: br\r\n\r\nff\r\n" + packed, b""),
    ):
        hostile.answer, hostile.seen = head + more, []
        status, headers, body = await ask(
            gateway, do="countTokens", **{"x-tidegate-deadline-ms": "900"}
        )
        assert (status, headers.get("retry-after"), body) == (429, "9", came)
        assert len(hostile.seen) == 1
        limit = f"model:{MODEL}"
        assert gateway.services.limiter.paused_ms([limit]) > 5_000, "others wait as long"
        await gateway.services.limiter.resume(limit)
        await wait_until(lambda: not gateway.services.limiter.has_pauses, 20, "its end")


async def test_a_days_quota_parks_the_model_and_nobody_waits_in_vain(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("day_quota", count=1, retry_after_s=0.1)
    status, _, body = await ask(gateway)
    assert (status, b"PerDay" in body) == (429, True), "in the provider's words, and at once"
    status, headers, body = await ask(gateway)
    assert (status, b"paused" in body) == (429, True)
    assert 1 < int(headers["retry-after"]) <= 86_400
    assert len(await gateway.calls()) == 1
    await gateway.services.limiter.resume(f"model:{MODEL}")
    assert (await ask(gateway))[0] == 200


async def test_who_is_parked_is_not_waited_for_while_another_is_only_busy(
    open_gateway: Opener, chain: Path, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=chain)
    await wait_until(lambda: _is_answered(gateway, "only-second"), 20, "the second")
    await gateway.upstream.set_fault("day_quota", count=1)
    assert (await ask(gateway))[1]["x-tidegate-upstream"] == "second"
    await second.control.set_fault("hang", count=1)
    holding = asyncio.create_task(ask(gateway))

    async def holds() -> bool:
        return (await second.control.stats()).in_flight == 1

    await wait_until(holds, 20, "the second's only place")
    waits = asyncio.create_task(ask(gateway))
    limiter = gateway.services.limiters["second"]
    await wait_until(lambda: limiter.local_state().waiting["pool:total"] == 1, 20, "the queue")
    holding.cancel()
    status, headers, _ = await waits
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")


async def _waits(gateway: Gateway, pool: str, limit: str) -> None:
    limiter = gateway.services.limiters[pool]
    await wait_until(lambda: limiter.local_state().waiting.get(limit) == 1, what=f"{pool}'s queue")


async def _take_both_places(gateway: Gateway, second: Emulator) -> list[asyncio.Task[Answer]]:
    """By a call of the first upstream that hangs, and one of the second."""
    await gateway.upstream.set_fault("hang")
    await second.control.set_fault("hang", count=1)
    holding = [asyncio.create_task(ask(gateway, name)) for name in (MODEL, "only-second")]
    await wait_until(lambda: gateway.held == 1, what="the first's only place")

    async def holds() -> bool:
        return (await second.control.stats()).in_flight == 1

    await wait_until(holds, what="the second's only place")
    return holding


async def test_who_waits_for_one_that_is_parked_meanwhile_goes_over_to_another(
    open_gateway: Opener, chain: Path, second: Emulator
) -> None:
    one: dict[str, Any] = {"text_only": 1}
    gateway = await open_gateway(worker=False, tidegate_policy=chain, rate_limits=one)
    await wait_until(lambda: _is_answered(gateway, "only-second"), 20, "the second")
    await wait_until(lambda: _is_answered(gateway, MODEL), 20, "the first")
    holding = await _take_both_places(gateway, second)
    waits = asyncio.create_task(ask(gateway))
    await _waits(gateway, "gemini", "kind:text_only")
    await gateway.services.limiter.penalise("kind:text_only", for_ms=3_600_000)
    await _waits(gateway, "second", "pool:total")
    holding[1].cancel()
    status, headers, _ = await waits
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")
    assert gateway.waiting == 0
    holding[0].cancel()


async def test_a_call_for_which_one_queue_is_full_waits_in_the_next(
    open_gateway: Opener, short_queue: Path, second: Emulator
) -> None:
    one: dict[str, Any] = {"text_only": 1}
    gateway = await open_gateway(worker=False, tidegate_policy=short_queue, rate_limits=one)
    await wait_until(lambda: _is_answered(gateway, "only-second"), 20, "the second")
    holding = await _take_both_places(gateway, second)
    first = asyncio.create_task(ask(gateway))
    await _waits(gateway, "gemini", "kind:text_only")
    waits = asyncio.create_task(ask(gateway))
    await _waits(gateway, "second", "pool:total")
    holding[1].cancel()
    status, headers, _ = await waits
    assert (status, headers["x-tidegate-upstream"]) == (200, "second")
    for task in (holding[0], first):
        task.cancel()


async def test_who_waits_is_told_of_a_pause_that_outlasts_its_deadline_in_whichever_process(
    open_gateway: Opener,
) -> None:
    one: dict[str, Any] = {"text_only": 1}
    gateways = [await open_gateway(worker=False, rate_limits=one) for _ in range(2)]
    await gateways[0].upstream.set_fault("hang")
    holding = asyncio.create_task(ask(gateways[0]))
    await gateways[0].in_flight(1)
    waits = [asyncio.create_task(ask(gateway)) for gateway in gateways]
    for gateway in gateways:
        await _waits(gateway, "gemini", "kind:text_only")
    limiter = gateways[0].services.limiter
    await limiter.penalise("kind:text_only", for_ms=5_000)  # they may wait for 30 s
    assert (await limiter.snapshot()).limits["kind:text_only"].waiting == 2
    await limiter.penalise("kind:text_only", for_ms=3_600_000)
    for status, headers, body in await asyncio.gather(*waits):
        assert (status, b"longer than this call may wait" in body) == (429, True)
        assert int(headers["retry-after"]) > 3_000
    await wait_until(lambda: not any(gateway.waiting for gateway in gateways))
    holding.cancel()


async def test_one_that_can_never_serve_a_call_is_not_waited_for(
    open_gateway: Opener, chain: Path, second: Emulator
) -> None:
    none: dict[str, Any] = {"text_only": 0}
    gateway = await open_gateway(worker=False, tidegate_policy=chain, rate_limits=none)
    await wait_until(lambda: _is_answered(gateway, "only-second"), 20, "the second")
    await second.control.set_behaviour(first_byte_ms=100)
    answers = await asyncio.gather(*(ask(gateway) for _ in range(3)))
    assert {(status, named["x-tidegate-upstream"]) for status, named, _ in answers} == {
        (200, "second")
    }


async def _is_answered(gateway: Gateway, model: str) -> bool:
    return (await ask(gateway, model))[0] == 200
