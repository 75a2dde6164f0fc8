"""Several upstreams: who is asked, who stands in for whom, and what is tried again."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.security.hostile import one_try
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.spine.routing import FAULTS

__all__ = ["one_try"]

BODY = {"contents": [{"parts": [{"text": "Say hello"}]}]}
FILE = """
[upstreams.gemini]
models = ["gemini-*"]
{own}
[upstreams.second]
dialects = {{ gemini = "{url}" }}
key = "SECOND_KEY"
models = ["gemini-*", "only-second"]
aliases = {{ quick = "gemini-2.5-flash-lite" }}
{more}
[upstreams.second.limits]
"pool:total" = {bound}
"""
WriteFile = Callable[..., Path]


@pytest.fixture
async def second() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


@pytest.fixture
def policy(tmp_path: Path, second: Emulator, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")

    def write(*, bound: int = 4, own: str = "", more: str = "", end: str = "") -> Path:
        path = tmp_path / "policy.toml"
        path.write_text(FILE.format(url=second.url, bound=bound, own=own, more=more) + end)
        return path

    return write


async def ask(
    gateway: Gateway, model: str = "gemini-2.5-flash", do: str = "generateContent", **headers: str
) -> tuple[int, dict[str, str], Any]:
    url = f"{gateway.url}/v1beta/models/{model}:{do}"
    async with gateway.http.post(url, json=BODY, headers=headers) as response:
        body = await response.read()
        return response.status, {k.lower(): v for k, v in response.headers.items()}, body


async def in_flight(upstream: Emulator, count: int) -> None:
    async def reached() -> bool:
        return (await upstream.control.stats()).in_flight == count

    await wait_until(reached, 20, f"{count} calls in flight")


def in_pools(gateway: Gateway) -> tuple[int, int]:
    """How many calls hold permits of all pools, and how many wait for one."""
    states = [limiter.local_state() for limiter in gateway.services.limiters.values()]
    held = sum(sum(state.held.values()) for state in states)
    return held, sum(sum(state.waiting.values()) for state in states)


async def warm(gateway: Gateway) -> None:
    """Until the first upstream's pool, which is new, lets calls in at once."""

    async def first() -> bool:
        return (await ask(gateway))[1]["x-tidegate-upstream"] == "gemini"

    await wait_until(first, 20, "the first upstream")
    await gateway.upstream.reset()


async def test_an_upstream_has_the_time_that_it_is_given(
    open_gateway: Opener, policy: WriteFile, second: Emulator, one_try: None
) -> None:
    more = "first_byte_timeout_ms = 150"
    gateway = await open_gateway(worker=False, tidegate_policy=policy(more=more, end=ONLY))
    await second.control.set_behaviour(first_byte_ms=1_000)
    await gateway.upstream.set_behaviour(first_byte_ms=1_000)
    status, _, body = await ask(gateway, "only-second")
    assert (status, b"longer than 150 ms" in body) == (504, True)
    assert gateway.services.spine.health["second"].faults == 0
    assert (await ask(gateway))[0] == 200, "the others have theirs"


ONLY = '[[routes]]\nmodel = "only-second"\ntry = ["second"]\n'
CHAIN = '[[routes]]\nmodel = "*"\ntry = ["gemini", "second"]\n'


async def test_a_model_goes_to_who_serves_it_under_that_pools_limits(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy(bound=2))
    await second.control.set_fault("hang")
    first = [asyncio.create_task(ask(gateway, "only-second")) for _ in range(3)]
    await wait_until(lambda: in_pools(gateway) == (2, 1), what="a full pool")
    await in_flight(second, 2)
    await second.control.clear_faults()
    for task in first:
        task.cancel()
    answers = await asyncio.gather(*(ask(gateway, "only-second") for _ in range(8)))
    assert {status for status, _, _ in answers} == {200}
    assert {headers["x-tidegate-upstream"] for _, headers, _ in answers} == {"second"}
    stats = await second.control.stats()
    assert stats.max_in_flight == 2
    assert await gateway.calls() == []


async def test_an_alias_is_another_name_for_a_model(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy())
    assert (await ask(gateway, "quick"))[0] == 200
    (call,) = await second.control.calls()
    assert call.model == "gemini-2.5-flash-lite"


async def test_a_model_that_nobody_serves_is_not_found(
    open_gateway: Opener, policy: WriteFile
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy())
    status, _, body = await ask(gateway, "claude-9")
    assert status == 404
    assert b"claude-9" in body


async def test_equals_share_by_weight(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    file = policy(bound=100, more="weight = 3")
    gateway = await open_gateway(worker=False, tidegate_policy=file, rate_limits={"text_only": 100})
    talks = (f"talk-{number}" for number in itertools.count())  # the turns of one go to one
    answers = [
        answer
        for _ in range(10)
        for answer in await asyncio.gather(
            *(ask(gateway, **{"x-tidegate-conversation": next(talks)}) for _ in range(20))
        )
    ]
    seen = Counter(headers["x-tidegate-upstream"] for _, headers, _ in answers)
    assert 0.6 < seen["second"] / 200 < 0.9


async def test_what_finds_no_room_here_goes_to_who_has_some(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    gateway = await open_gateway(
        worker=False,
        tidegate_policy=policy(bound=3, end=ONLY + CHAIN),
        rate_limits={"text_only": 2},
    )
    await warm(gateway)
    assert (await ask(gateway, "only-second"))[0] == 200
    await second.control.reset()
    for upstream in (gateway.upstream, second.control):
        await upstream.set_fault("hang")
    asked = [asyncio.create_task(ask(gateway)) for _ in range(10)]
    await wait_until(lambda: in_pools(gateway) == (5, 5), what="two full pools")
    await gateway.in_flight(2)
    await in_flight(second, 3)
    assert (await gateway.upstream.stats()).max_in_flight == 2
    assert (await second.control.stats()).max_in_flight == 3
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)


@pytest.mark.parametrize("fault", ["unavailable", "throttled", "cut"])
async def test_another_stands_in_before_anything_has_gone_out(
    open_gateway: Opener, policy: WriteFile, second: Emulator, fault: str
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy(end=CHAIN))
    await warm(gateway)
    await gateway.upstream.set_fault(fault)

    async def stood_in() -> bool:
        status, headers, _ = await ask(gateway)
        assert (status, headers["x-tidegate-upstream"]) == (200, "second")
        row = await gateway.audit(headers["x-tidegate-request-id"])
        assert row["pool"] == "second"
        return bool(row["attempts"] == 2)  # not where the first could not let it in at once

    await wait_until(stood_in, what="a call that the first was asked before the second")
    assert gateway.held == 0


async def test_nobody_stands_in_once_something_has_gone_out(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy(end=CHAIN))
    await warm(gateway)
    await second.control.reset()
    await gateway.upstream.set_fault("cut_mid_stream")
    url = f"{gateway.url}/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse"
    async with gateway.http.post(url, json=BODY) as response:
        assert response.status == 200
        seen = await response.content.read()
    assert b'"error"' in seen
    assert await second.control.calls() == []


async def test_one_that_is_out_is_left_out_and_comes_back(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy(end=CHAIN))
    await warm(gateway)
    await gateway.upstream.set_fault("unavailable")
    for _ in range(FAULTS):
        assert (await ask(gateway))[0] == 200
    before = len(await gateway.calls())
    assert (await ask(gateway))[0] == 200
    assert len(await gateway.calls()) == before
    await gateway.upstream.clear_faults()

    async def back() -> bool:
        return (await ask(gateway))[1]["x-tidegate-upstream"] == "gemini"

    await wait_until(back, 20, "the first upstream again")
    assert gateway.services.spine.health["gemini"].state == "ok"


async def test_a_refused_key_is_not_told_to_clients_as_theirs(
    open_gateway: Opener, policy: WriteFile
) -> None:
    gateway = await open_gateway(worker=False, gemini_api_key="invalid-key")
    status, headers, body = await ask(gateway)
    assert status == 502
    assert b"this gateway's API key" in body
    assert gateway.services.spine.health["gemini"].key_dead
    assert (await gateway.audit(headers["x-tidegate-request-id"]))["failure"]["code"] == (
        "upstream_unauthorized"
    )
    assert (await ask(gateway))[0] == 503  # and nobody was asked
    assert len(await gateway.upstream.calls()) <= 1


async def test_a_file_that_is_not_there_takes_no_upstream_out(open_gateway: Opener) -> None:
    # Gemini says 403, and not 404. Were it taken for a word on the key, one client's wrong name
    # would shut everybody out for a minute.
    gateway = await open_gateway(worker=False)
    async with gateway.http.get(f"{gateway.url}/v1beta/files/none") as response:
        body = await response.json()
        assert (response.status, body["error"]["status"]) == (403, "PERMISSION_DENIED")
    assert gateway.services.spine.health["gemini"].state == "ok"
    assert (await ask(gateway))[0] == 200


async def test_a_throttled_call_is_tried_again_after_the_time_that_was_said(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("throttled", count=1, retry_after_s=0.3)
    status, headers, _ = await ask(gateway)
    assert status == 200
    assert (await gateway.audit(headers["x-tidegate-request-id"]))["attempts"] == 2
    outcomes = [call.outcome for call in await gateway.calls()]
    assert outcomes[-1] == "finished"
    assert len(outcomes) == 2


async def test_a_refusal_is_passed_on_in_the_providers_own_words(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("throttled", retry_after_s=120)
    status, headers, body = await ask(gateway, **{"x-tidegate-deadline-ms": "20000"})
    assert status == 429
    assert b"RESOURCE_EXHAUSTED" in body
    assert b"RetryInfo" in body
    assert headers["retry-after"] == "120"
    row = await gateway.audit(headers["x-tidegate-request-id"])
    assert (row["http_status"], row["response"]) == (429, body.decode())
    assert len(await gateway.calls()) == 1


async def test_retries_are_a_part_of_the_traffic(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 50})
    gateway.services.spine.retries.saved = 0.0
    await gateway.upstream.set_fault("unavailable")
    monkeypatch.setattr("tidegate.spine.routing.FAULTS", 1_000_000)  # it is never out
    await asyncio.gather(*(ask(gateway) for _ in range(50)))
    assert 50 <= len(await gateway.calls()) <= 60


async def test_the_list_of_models_is_that_of_all_who_serve_some(
    open_gateway: Opener, policy: WriteFile
) -> None:
    smart = '[[routes]]\nmodel = "smart"\ntry = ["second/only-second", "gemini/gemini-2.5-pro"]\n'
    gateway = await open_gateway(
        worker=False, tidegate_policy=policy(end=smart + CHAIN.replace("*", "gemini-*"))
    )
    _, body = await gateway.get("/v1beta/models")
    names = [model["name"] for model in body["models"]]
    assert "models/quick" in names
    assert "models/smart" in names  # a route's own name; a pattern is none
    assert not [name for name in names if "*" in name]
    assert "models/gemini-2.5-flash" in names
    assert len(names) == len(set(names))
    status, one = await gateway.get("/v1beta/models/gemini-2.5-pro")
    assert (status, one["name"]) == (200, "models/gemini-2.5-pro")
    assert (await gateway.get("/v1beta/models/claude-9"))[0] == 404


async def test_one_that_gives_no_list_spoils_nobody_elses(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    gateway = await open_gateway(worker=False, tidegate_policy=policy())
    await second.control.set_fault("unavailable", kind="other")
    status, body = await gateway.get("/v1beta/models")
    assert status == 200
    assert "models/gemini-2.5-flash" in [model["name"] for model in body["models"]]
    await gateway.upstream.set_fault("unavailable", kind="other")
    gateway.services.relay._models._lists.clear()
    assert (await gateway.get("/v1beta/models"))[0] == 503


async def test_prompts_use_every_upstream_of_geminis_dialect(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> None:
    """As native calls do: by routes and aliases, under that pool's limits, and in failover."""
    gateway = await open_gateway(tidegate_policy=policy(end=ONLY + CHAIN))
    await warm(gateway)
    await gateway.upstream.set_fault("unavailable")
    job = await gateway.submit(text="Explain the tide")
    streamed = await gateway.stream(text="Explain the ebb")
    assert streamed.names[-1] == "done"
    ended = await gateway.end_of(job)
    assert ended["status"] == "succeeded"
    assert [one["outcome"] for one in await gateway.attempts(job)] == ["failed", "succeeded"]
    audit = await gateway.audit(streamed.request_id)
    assert (audit["status"], audit["attempts"]) == ("succeeded", 2)
    await gateway.upstream.reset()
    named = await gateway.stream(text="Explain the flood", model="only-second")
    assert named.names[-1] == "done"
    models = Counter(call.model for call in await second.control.calls())
    assert models == {gateway.config.text_model: 2, "only-second": 1}
