"""Results of a provider's batch that can't be read: each is one line's own matter."""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from tests.gateway import Gateway, Opener
from tests.integration.batches.provider import (
    MODELS,
    SOON,
    asked,
    policy_of,
    put_into_batch,
    wrapped,
)
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.prices.budgets import budget_of
from tidegate.spine.batched import BatchedCalls
from tidegate.upstream import batch_api

RESULTS = ("/content", "/results", ":download")


@dataclass
class Distorting:
    """Before an emulated provider: passes all on, and changes the lines of results that speak of
    `word`. distort: what becomes of such a line; None takes it as it is."""

    emulator: Emulator
    http: aiohttp.ClientSession
    url: str = ""
    word: bytes = b"distorted"
    distort: Callable[[bytes], bytes] = field(default=bytes)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        headers = {name: value for name, value in request.headers.items() if name != "Host"}
        body = await request.read()
        url = f"{self.emulator.url}{request.path_qs}"
        async with self.http.request(request.method, url, data=body, headers=headers) as given:
            text = await given.read()
            more = {
                name: value.replace(self.emulator.url, self.url)
                for name, value in given.headers.items()
                if name.lower().startswith("x-goog-")
            }
        if request.path.endswith(RESULTS):
            lines = text.splitlines(keepends=True)
            text = b"".join(self.distort(one) if self.word in one else one for one in lines)
        more["Content-Type"] = given.headers["Content-Type"]
        return web.Response(status=given.status, body=text, headers=more)


@pytest.fixture
async def provider() -> AsyncIterator[Distorting]:
    async with run_emulator() as emulator, aiohttp.ClientSession() as http:
        found = Distorting(emulator, http)
        server = web.Server(found.answer)
        runner = web.ServerRunner(server)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield found
        await runner.cleanup()


@pytest.fixture
async def gateway(
    open_gateway: Opener, provider: Distorting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Gateway:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GOOGLE_KEY"):
        monkeypatch.setenv(name, f"key-of-{name.lower()}")
    policy = tmp_path / "policy.toml"
    policy.write_text(policy_of(provider.url))
    return await open_gateway(worker=False, tidegate_policy=policy, **SOON)


def half_a_character(line: bytes) -> bytes:
    """As of an answer that was cut within an emoji."""
    return line.replace(b"distorted", b"distorted \\ud83d")


def not_a_number(line: bytes) -> bytes:
    """As Python's own JSON writes it."""
    return line.replace(b"{", b'{"logprob": NaN, ', 1)


def no_object(line: bytes) -> bytes:
    return b"[]\n"


def long(line: bytes) -> bytes:
    return line.replace(b"distorted", b"distorted" + b" " * 200_000)


@pytest.mark.parametrize("dialect", MODELS)
@pytest.mark.parametrize("distort", [half_a_character, not_a_number, no_object, long])
async def test_a_result_that_cannot_be_read_holds_up_no_other_line(
    gateway: Gateway,
    provider: Distorting,
    monkeypatch: pytest.MonkeyPatch,
    dialect: str,
    distort: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr(batch_api, "MOST_LINE_BYTES", 150_000)
    provider.distort = distort
    texts = ["Say distorted", *(f"Say word {number}" for number in range(3))]
    ids = [await gateway.submit(**wrapped(dialect, text)) for text in texts]
    await put_into_batch(gateway, *ids)
    gateway.start_worker()
    ends = [await gateway.end_of(one) for one in ids]
    assert {end["status"] for end in ends} == {"succeeded"}
    once = {(text, "batch"): 1 for text in texts}
    again = {("Say distorted", ""): 1}  # in the usual tier, whose answer can be read
    assert await asked(provider.emulator.control, "Say") == once | again
    if distort is not no_object:  # which does not say whose it is
        first, *_ = await gateway.attempts(ids[0])
        assert "upstream_garbled" in first["failure"]


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_result_that_nests_deep_is_an_answer_and_holds_up_no_other_line(
    gateway: Gateway, provider: Distorting, dialect: str
) -> None:
    within = {"openai": b'"body"', "anthropic": b'"message"', "gemini": b'"response"'}[dialect]
    begins = re.compile(rb"(%b:\s*\{)" % within)
    nested = b'{"a":' * 400 + b"1" + b"}" * 400
    provider.distort = lambda line: begins.sub(rb'\1"deep":%b,' % nested, line, count=1)
    texts = ["Say distorted", "Say word"]
    ids = [await gateway.submit(**wrapped(dialect, text)) for text in texts]
    await put_into_batch(gateway, *ids)
    gateway.start_worker()
    ends = [await gateway.end_of(one) for one in ids]
    assert {end["status"] for end in ends} == {"succeeded"}
    assert nested in ends[0]["answer"].encode()
    assert await asked(provider.emulator.control, "Say") == {(text, "batch"): 1 for text in texts}


@pytest.mark.parametrize("step", ["of_native", "read"])
async def test_an_unforeseen_error_at_one_line_holds_up_no_other(
    gateway: Gateway, provider: Distorting, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Nobody knows an answer that makes one, or it would be foreseen."""
    works = getattr(BatchedCalls, step)

    def fails(calls: BatchedCalls, *given: Any) -> Any:
        if "distorted" in str(given):
            raise ValueError("what nobody has thought of")
        return works(calls, *given)

    monkeypatch.setattr(BatchedCalls, step, fails)
    texts = ["Say distorted", *(f"Say word {number}" for number in range(3))]
    ids = [await gateway.submit(**wrapped("openai", text)) for text in texts]
    await put_into_batch(gateway, *ids)
    gateway.start_worker()
    first, *others = [await gateway.end_of(one) for one in ids]
    assert {end["status"] for end in others} == {"succeeded"}
    assert await asked(provider.emulator.control, "Say word") == {
        (text, "batch"): 1 for text in texts[1:]
    }
    if step == "read":  # it was called, and nobody knows what that cost
        assert (first["status"], first["error"]["code"]) == ("failed", "internal")
        assert (await gateway.audit(ids[0]))["usage_state"] == "unknown"
    else:
        assert first["status"] == "succeeded"


async def test_an_answer_that_is_too_long_to_be_kept_is_charged(
    gateway: Gateway, provider: Distorting
) -> None:
    budget = budget_of("all", {"usd": "10", "period": "month"})
    await gateway.services.store.budgets.records.set(budget, by="test")
    provider.distort = lambda line: line.replace(b"distorted", b"distorted" + b" " * 16_000_000)
    job = await gateway.submit(**wrapped("openai", "Say distorted"))
    await put_into_batch(gateway, job)
    gateway.start_worker()
    end: dict[str, Any] = await gateway.end_of(job)
    assert (end["status"], end["error"]["code"]) == ("failed", "upstream_garbled")
    row = await gateway.audit(job)
    micros = (row["input_tokens"] * 0.15 + row["output_tokens"] * 0.60) / 2
    assert (row["usage_state"], row["cost_micros"]) == ("told", pytest.approx(micros, abs=1))
    assert row["cost_micros"] > 0
    await gateway.services.store.budgets.flush()
    (book,) = await gateway.services.store.budgets.records.books("all")
    assert book.spent == row["cost_micros"]


@pytest.mark.parametrize("dialect", MODELS)
async def test_a_long_result_is_read_beside_the_loop(
    gateway: Gateway, provider: Distorting, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tens of megabytes take a second, in which no heartbeat would be sent."""
    long, places = b"distorted " + b"x" * 600_000, set[tuple[str, bool]]()

    def noted(whose: Any, name: str) -> None:
        work = getattr(whose, name)

        def note(*given: Any, **named: Any) -> Any:
            if b"x" * 1_000 in repr((given, named)).encode():
                places.add((name, threading.current_thread() is threading.main_thread()))
            return work(*given, **named)

        monkeypatch.setattr(whose, name, note)

    noted(batch_api._ResultRow, "of")
    noted(BatchedCalls, "read")
    for api in (batch_api.OpenAIBatches, batch_api.AnthropicBatches, batch_api.GeminiBatches):
        noted(api, "_result")
    provider.distort = lambda line: line.replace(b"distorted", long)
    job = await gateway.submit(**wrapped(dialect, "Say distorted"))
    await put_into_batch(gateway, job)
    gateway.start_worker()
    assert (await gateway.end_of(job))["status"] == "succeeded"
    assert places == {("of", False), ("_result", False), ("read", False)}
