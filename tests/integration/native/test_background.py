"""Responses in the background: counted until the provider says they have ended, charged once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from functools import partial
from os import urandom
from pathlib import Path
from typing import Any, Self

import openai
import orjson
import pytest
from aiohttp import web
from google.genai import Client
from google.genai.types import HttpOptions
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener, gateway
from tests.integration.tenants.asking import key_of
from tests.loglines import Lines, lines
from tests.waiting import wait_until
from tidegate.embedded.servers import ValkeyServer
from tidegate.jobs import background
from tidegate.policy.format import edit
from tidegate.prices.budgets import Budget
from tidegate.store.retention import Whose

__all__ = ["lines"]

MODEL = "gpt-5-mini"
SLOW = {"first_byte_ms": 1_500}


def tokens_of(row: Any) -> int:
    return sum(row[name] or 0 for name in ("input_tokens", "output_tokens", "thoughts_tokens"))


class Stage:
    """A gateway with a worker and one slot for texts, and the SDK as a tenant of it."""

    def __init__(self, gateway: Gateway, sdk: AsyncOpenAI) -> None:
        self.gateway, self.sdk = gateway, sdk

    async def ended(self, response_id: str) -> Any:
        async def row() -> Any:
            return await self.gateway.database.fetchrow(
                "SELECT * FROM audit WHERE response_id = $1 AND endpoint = '/v1/responses'",
                response_id,
            )

        return await wait_until(row, 20, "its record")

    async def counts(self, calls: int) -> None:
        """Return when so many are counted: a permit is returned with the next message."""

        async def counted() -> bool:
            snapshot = await self.gateway.services.limiter.snapshot()
            return bool(snapshot.limits["kind:text_only"].used == calls)

        await wait_until(counted, 10, f"{calls} counted")


@pytest.fixture
async def stage(open_gateway: Opener) -> AsyncIterator[Stage]:
    async with AsyncExitStack() as stack:
        gateway = await open_gateway(
            auth="on", rate_limits={"text_only": 1}, background_poll_ms=100, stream_wait_ms=20_000
        )
        header = (await key_of(gateway, "acme"))["Authorization"]
        sdk = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key=header.split()[1], max_retries=0)
        yield Stage(gateway, await stack.enter_async_context(sdk))


async def test_it_is_counted_until_it_has_ended_and_charged_once(stage: Stage) -> None:
    gateway, sdk = stage.gateway, stage.sdk
    budget = Budget(name="acme", unit="tokens", amount=1_000_000, period="day", tenant="acme")
    await gateway.services.store.budgets.records.set(budget, by="test")
    await gateway.services.store.budgets.refresh()
    await gateway.upstream.set_behaviour(**SLOW)
    begun = await sdk.responses.create(
        model=MODEL, input="Think", background=True, max_output_tokens=1_000
    )
    assert begun.status == "queued"
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    assert gateway.held == 0, "no process holds it"
    await stage.counts(1)
    with pytest.raises(openai.ConflictError, match="cancel it, or repeat"):
        await sdk.responses.delete(begun.id)
    (book,) = await gateway.services.store.budgets.records.books("acme")
    assert book.held > 0
    after = await sdk.responses.create(model=MODEL, input="Say hello", max_output_tokens=100)
    assert (await gateway.upstream.stats()).max_in_flight == 1
    whole = await sdk.responses.retrieve(begun.id)
    row = await stage.ended(begun.id)
    assert whole.usage is not None
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    told = (whole.usage.input_tokens, whole.usage.output_tokens)
    thoughts = row["thoughts_tokens"] or 0
    assert (row["input_tokens"], row["output_tokens"] + thoughts) == told
    assert row["tenant_id"] == "acme"
    other = await stage.ended(after.id)
    await gateway.services.store.budgets.flush()
    (book,) = await gateway.services.store.budgets.records.books("acme")
    assert (book.held, book.spent) == (0, tokens_of(row) + tokens_of(other))
    await stage.counts(0)
    await sdk.responses.delete(begun.id)


async def test_it_is_counted_under_the_limit_of_its_user_until_it_has_ended(stage: Stage) -> None:
    gateway, sdk = stage.gateway, stage.sdk
    limits = {"kind:text_only": 5, "user:acme/ann": 1}
    await gateway.services.keeper.change(edit(limits), set_by="test")
    ann, bob = (
        {"x-tidegate-subject": one, "x-tidegate-deadline-ms": "500"} for one in ("ann", "bob")
    )
    say = partial(sdk.responses.create, model=MODEL, input="Say hello", max_output_tokens=100)
    await gateway.upstream.set_behaviour(first_byte_ms=60_000)
    begun = await say(background=True, extra_headers=ann)
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    with pytest.raises(openai.RateLimitError) as refused:
        await say(extra_headers=ann)
    assert isinstance(refused.value.body, dict)
    assert refused.value.body["limit"] == "user:acme/ann"
    assert (await say(extra_headers=bob)).status == "completed"
    await sdk.responses.cancel(begun.id)
    await stage.ended(begun.id)
    await stage.counts(0)
    assert (await say(extra_headers=ann)).status == "completed"


async def test_a_cancelled_one_ends_when_the_provider_says_so(stage: Stage) -> None:
    await stage.gateway.upstream.set_behaviour(first_byte_ms=60_000)
    begun = await stage.sdk.responses.create(model=MODEL, input="Think", background=True)
    assert (await stage.sdk.responses.cancel(begun.id)).status == "cancelled"

    async def on_record() -> Any:
        return await stage.gateway.database.fetchrow(
            "SELECT * FROM audit WHERE endpoint = '/v1/responses' AND status = 'cancelled'"
        )

    row = await wait_until(on_record, 20, "its record")
    assert row["usage_state"] == "estimated"
    await stage.counts(0)


async def test_a_cancelled_one_pays_for_what_it_continues(stage: Stage) -> None:
    before = await stage.sdk.responses.create(model=MODEL, input="a long word " * 5_000)
    assert before.usage is not None
    await stage.ended(before.id)
    await stage.gateway.upstream.set_behaviour(first_byte_ms=60_000)
    begun = await stage.sdk.responses.create(
        model=MODEL, input="Go on", background=True, previous_response_id=before.id
    )
    await stage.sdk.responses.cancel(begun.id)
    row = await stage.ended(begun.id)
    assert (row["status"], row["usage_state"]) == ("cancelled", "estimated")
    assert row["input_tokens"] >= before.usage.input_tokens > 10_000


@pytest.mark.parametrize("instructions", ["Briefly.", "Briefly. " * 60_000], ids=["", "long"])
async def test_a_stream_may_be_left_and_is_seen_to_its_end(stage: Stage, instructions: str) -> None:
    """Whatever its first event repeats."""
    await stage.gateway.upstream.set_behaviour(**SLOW)
    stream = await stage.sdk.responses.create(
        model=MODEL, input="Think", instructions=instructions, background=True, stream=True
    )
    first = await anext(aiter(stream))
    await stream.close()
    response_id = first.response.id
    await stage.counts(1)
    again = await stage.sdk.responses.retrieve(response_id, stream=True, starting_after=0)
    events = [event.type async for event in again]
    assert events[-1] == "response.completed"
    row = await stage.gateway.audit(stream.response.headers["x-tidegate-request-id"])
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")


async def test_a_client_that_leaves_does_not_end_the_hand_over(stage: Stage) -> None:
    """It leaves while the provider has the call, and its answer is still to come."""
    gateway = stage.gateway
    await gateway.upstream.set_behaviour(**SLOW)
    await gateway.upstream.set_fault("slow_first_token", match="Think", delay_ms=700)
    asking = asyncio.create_task(
        stage.sdk.responses.create(model=MODEL, input="Think", background=True)
    )
    await gateway.in_flight(1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)

    async def on_record() -> Any:
        return await gateway.database.fetch("SELECT * FROM audit")

    (row,) = await wait_until(on_record, 20, "its record")
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    await stage.counts(0)


async def test_a_repeat_under_a_key_whose_client_left_is_the_same_response(stage: Stage) -> None:
    """A client that lost its connection sends the request again: the first one is being made."""
    gateway = stage.gateway
    await gateway.upstream.set_behaviour(**SLOW)
    await gateway.upstream.set_fault("slow_first_token", match="Think", delay_ms=700)

    def ask() -> Any:
        key = {"Idempotency-Key": "left"}
        return stage.sdk.responses.create(
            model=MODEL, input="Think", background=True, extra_headers=key
        )

    asking = asyncio.create_task(ask())
    await gateway.in_flight(1)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    again = await ask()
    row = await stage.ended(again.id)
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    assert len(await gateway.calls("Think")) == 1
    assert (await ask()).id == again.id


async def test_of_an_erased_subject_neither_answer_nor_response_is_kept(stage: Stage) -> None:
    gateway, text = stage.gateway, urandom(20_000).hex()  # too long for a row
    erase = partial(gateway.services.store.retention.erase, Whose(None, "patient-1"))
    create = partial(
        stage.sdk.responses.create,
        model=MODEL,
        input=text,
        extra_headers={"x-tidegate-subject": "patient-1"},
    )
    await gateway.upstream.set_behaviour(first_byte_ms=600)
    running = asyncio.create_task(create())
    await gateway.in_flight(1)
    await erase()
    with pytest.raises(openai.NotFoundError):
        await stage.sdk.responses.retrieve((await running).id)
    begun = await create(background=True)
    await erase()

    async def is_over() -> bool:
        left = await gateway.database.fetch("SELECT state FROM background_calls")
        return all(row["state"] == "ended" for row in left)

    await wait_until(is_over, 20, "the end of the call")
    with pytest.raises(openai.NotFoundError):
        await stage.sdk.responses.retrieve(begun.id)
    for kept_there in (
        *("audit WHERE subject IS NOT NULL", "provider_resources"),
        "bodies WHERE blob_key IS NOT NULL OR size_bytes > 10000",
    ):
        assert await gateway.database.fetchval(f"SELECT count(*) FROM {kept_there}") == 0
    blobs = gateway.services.store.retention.blobs
    kept = [key for day in await blobs.days() async for keys in blobs.keys_of(day) for key in keys]
    assert kept == []
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    since = await create()
    assert (await stage.sdk.responses.retrieve(since.id)).id == since.id


async def test_what_is_refused_is_neither_counted_nor_kept(stage: Stage) -> None:
    await stage.gateway.upstream.set_behaviour(strict_models=True)
    with pytest.raises(openai.NotFoundError):
        await stage.sdk.responses.create(model="gpt-none", input="Think", background=True)
    await stage.counts(0)
    assert await stage.gateway.database.fetchval("SELECT count(*) FROM background_calls") == 0
    for wrong in ({"deferred": True}, {"background": "yes"}):
        with pytest.raises(openai.BadRequestError):
            await stage.sdk.responses.create(model=MODEL, input="Think", extra_body=wrong)


async def test_an_interaction_is_counted_until_it_has_ended_and_charged_once(stage: Stage) -> None:
    gateway = stage.gateway
    options = HttpOptions(base_url=gateway.url)
    client = Client(api_key=stage.sdk.api_key, http_options=options)
    sdk: Any = client.aio
    await gateway.upstream.set_behaviour(**SLOW)
    begun = await sdk.interactions.create(agent="deep-research", input="Think", background=True)
    assert begun.status == "in_progress"
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    assert gateway.held == 0, "no process holds it"
    await stage.counts(1)
    after = await sdk.interactions.create(model=MODEL, input="Say hello")
    assert after.status == "completed"
    assert (await gateway.upstream.stats()).max_in_flight == 1
    query = "SELECT * FROM audit WHERE response_id = $1 AND endpoint = '/v1/interactions'"
    rows = await wait_until(lambda: gateway.database.fetch(query, begun.id), 20, "its record")
    ended = await sdk.interactions.get(begun.id)
    assert ended.status == "completed"
    (row,) = [dict(row) for row in rows]
    assert (row["status"], row["model"]) == ("succeeded", "deep-research")
    assert (row["input_tokens"], row["output_tokens"]) == (
        ended.usage.total_input_tokens,
        ended.usage.total_output_tokens,
    )
    await gateway.upstream.set_behaviour(first_byte_ms=60_000)
    begun = await sdk.interactions.create(agent="deep-research", input="Stop", background=True)
    assert (await sdk.interactions.cancel(begun.id)).status == "cancelled"
    rows = await wait_until(lambda: gateway.database.fetch(query, begun.id), 20, "its record")
    assert [row["status"] for row in rows] == ["cancelled"]
    await stage.counts(0)
    await client.aio.aclose()
    client.close()


async def test_a_deferred_completion_is_read_once_at_the_provider(stage: Stage) -> None:
    gateway = stage.gateway
    url, theirs = f"{gateway.url}/v1/chat", await key_of(gateway, "other")
    mine = {"Authorization": f"Bearer {stage.sdk.api_key}"}
    await gateway.upstream.set_behaviour(first_byte_ms=700)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Think"}], "deferred": True}
    async with gateway.http.post(f"{url}/completions", json=body, headers=mine) as begun:
        assert begun.status == 200
        request_id = (await begun.json())["request_id"]
    assert gateway.held == 0, "no process holds it"
    await stage.counts(1)

    async def read(headers: dict[str, str]) -> tuple[int, bytes]:
        result = f"{url}/deferred-completion/{request_id}"
        async with gateway.http.get(result, headers=headers) as answer:
            return answer.status, await answer.read()

    assert await read(mine) == (202, b"")
    assert (await read(theirs))[0] == 404

    async def ready() -> Any:
        status, answer = await read(mine)
        return answer if status == 200 else None

    first = await wait_until(ready, 20, "its result")
    assert await read(mine) == (200, first), "it stays here"
    assert (await read(theirs))[0] == 404
    await stage.counts(0)
    row = await gateway.database.fetchrow("SELECT * FROM audit WHERE endpoint LIKE '%completions'")
    whole = orjson.loads(first)
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    assert row["input_tokens"] == whole["usage"]["prompt_tokens"]
    assert row["response_id"] == whole["id"]


@pytest.mark.parametrize("state", ["running", "sending"])
async def test_it_is_counted_by_who_starts_where_nobody_was_left_that_knew_of_it(
    own_valkey: ValkeyServer, database_url: str, tmp_path: Path, state: str
) -> None:
    """All processes were gone when Valkey lost its data, as when a machine starts again."""
    given: Any = {"redis_url": own_valkey.url, "database_url": database_url, "worker": False}
    given["rate_limits"] = {"text_only": 1}
    say = {"model": "gemini-2.5-flash", "input": "Think", "store": False}
    async with gateway(tmp_path / "data", **given) as before:
        url = f"{before.url}/v1/responses"
        await before.upstream.set_behaviour(first_byte_ms=60_000)
        async with before.http.post(url, json=say | {"background": True}) as begun:
            assert (await begun.json())["status"] == "queued"
        await before.database.execute("UPDATE background_calls SET state = $1", state)
    own_valkey.stop()
    own_valkey.start()
    async with gateway(tmp_path / "data", **given) as after:
        limiter = after.services.limiter

        async def counted() -> bool:
            seen = await limiter.snapshot()
            return bool(seen.limits["kind:text_only"].used == 1 and not seen.recovering_ms)

        await wait_until(counted, 20, "its permit")
        headers = {"x-tidegate-deadline-ms": "300"}
        url = f"{after.url}/v1/responses"
        async with after.http.post(url, json=say, headers=headers) as refused:
            assert refused.status == 429


MADE = {"id": "resp_1", "object": "response", "status": "queued", "model": MODEL, "output": []}
DONE = MADE | {"status": "completed", "usage": {"input_tokens": 7, "output_tokens": 9}}
FORGETFUL = """
[upstreams.forgetful]
base_url = "{url}/v1"
dialect = "openai"
models = ["gpt-*"]
[upstreams.forgetful.limits]
"kind:text_only" = 1
"""


@dataclass
class Forgetful:
    """A provider that answers 404 to what reads a response, until it is found again."""

    url: str = ""
    reads: int = 0
    found_after: int = 10**6
    made: int = 0
    cancelled: int = 0
    never_ends: bool = False
    hanging: int = 0
    goes_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.BaseRequest) -> web.Response:
        await request.read()
        if request.path.endswith("/cancel"):
            self.cancelled += 1
            return web.json_response(MADE)
        if request.method == "POST":
            self.made += 1
            return web.json_response(MADE | {"id": f"resp_{self.made}"})
        if "hanging" in request.path:
            self.hanging += 1
            await self.goes_on.wait()
        self.reads += 1
        if self.never_ends:
            return web.json_response(MADE)
        if self.reads <= self.found_after:
            return web.json_response({"error": {"message": "not found"}}, status=404)
        return web.json_response(DONE)


@pytest.fixture
async def forgetful() -> AsyncIterator[Forgetful]:
    provider = Forgetful()
    runner = web.ServerRunner(web.Server(provider.answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    provider.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield provider
    provider.goes_on.set()
    await runner.cleanup()


@pytest.mark.parametrize("is_found", [True, False])
async def test_a_response_is_lost_once_its_provider_has_not_known_it_for_a_while(
    open_gateway: Opener,
    forgetful: Forgetful,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_found: bool,
) -> None:
    policy = tmp_path / "tidegate.toml"
    policy.write_text(FORGETFUL.format(url=forgetful.url))
    monkeypatch.setattr(background, "LOST_AFTER_S", 60.0 if is_found else 0.5)
    forgetful.found_after = 5 if is_found else forgetful.found_after
    gateway = await open_gateway(tidegate_policy=policy, background_poll_ms=100)
    body = {"model": MODEL, "input": "Think", "background": True}
    async with gateway.http.post(f"{gateway.url}/v1/responses", json=body) as response:
        assert (response.status, (await response.json())["status"]) == (200, "queued")
        row = await gateway.audit(response.headers["x-tidegate-request-id"])
    assert forgetful.reads > 1
    if is_found:
        assert (row["status"], row["usage_state"], row["output_tokens"]) == ("succeeded", "told", 9)
    else:
        assert (row["status"], row["failure"]["code"]) == ("failed", "background_lost")
        assert row["usage_state"] == "estimated"


async def test_a_response_that_its_provider_never_ends_is_given_up_some_time_after_its_cancellation(
    open_gateway: Opener, forgetful: Forgetful, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It kept its permit for as long as the provider said that it went on."""
    policy = tmp_path / "tidegate.toml"
    timeout = "[upstreams.forgetful]\ntotal_timeout_ms = 1000"
    text = FORGETFUL.format(url=forgetful.url)
    policy.write_text(text.replace("[upstreams.forgetful]", timeout, 1))
    monkeypatch.setattr(background, "GRACE_MS", 1_000)
    forgetful.never_ends = True
    gateway = await open_gateway(tidegate_policy=policy, background_poll_ms=100)
    body = {"model": MODEL, "input": "Think", "background": True}
    async with gateway.http.post(f"{gateway.url}/v1/responses", json=body) as response:
        assert (response.status, (await response.json())["status"]) == (200, "queued")
        row = await gateway.audit(response.headers["x-tidegate-request-id"])
    assert (row["status"], row["failure"]["code"]) == ("failed", "background_lost")
    assert "reported no end" in row["failure"]["message"]
    assert (row["usage_state"], forgetful.cancelled) == ("estimated", 1)
    limiter = gateway.services.spine.health["forgetful"].limiter

    async def is_free() -> bool:
        return (await limiter.snapshot()).limits["kind:text_only"].used == 0

    await wait_until(is_free, 10, "its permit")


HANGS = """
[upstreams.forgetful]
base_url = "{url}/v1"
dialect = "openai"
models = ["gpt-*"]
[upstreams.hanging]
base_url = "{url}/hanging/v1"
dialect = "openai"
models = ["slow-*"]
"""


async def test_an_upstream_that_hangs_holds_up_the_looks_at_no_other(
    open_gateway: Opener, forgetful: Forgetful, tmp_path: Path
) -> None:
    """Looks at it had all places until the first byte had taken too long, ten minutes as usual."""
    policy = tmp_path / "tidegate.toml"
    policy.write_text(HANGS.format(url=forgetful.url))
    forgetful.found_after = 0
    given: Any = {"tidegate_policy": policy, "background_poll_ms": 100}
    gateway = await open_gateway(
        **given, rate_limits={"text_only": 50}, first_byte_timeout_ms=60_000
    )

    async def begun(model: str) -> str:
        body = {"model": model, "input": "Think", "background": True}
        async with gateway.http.post(f"{gateway.url}/v1/responses", json=body) as response:
            assert response.status == 200
            return response.headers["x-tidegate-request-id"]

    await asyncio.gather(*(begun("slow-1") for _ in range(20)))
    await wait_until(lambda: forgetful.hanging >= 8, 20, "looks that hang")
    row = await gateway.audit(await begun(MODEL))
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    forgetful.goes_on.set()
    query = "SELECT count(*) FROM audit WHERE status = 'succeeded'"

    async def all_ended() -> bool:
        return bool(await gateway.database.fetchval(query) == 21)

    await wait_until(all_ended, 20, "the end of all")


async def test_what_ends_while_valkey_is_away_fills_no_log_with_traces(
    open_gateway: Opener,
    forgetful: Forgetful,
    own_valkey: ValkeyServer,
    lines: Lines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One for each call that had ended, every ten seconds."""
    monkeypatch.setattr(background, "_GONE_AFTER_MS", 100.0)
    monkeypatch.setattr(background, "_TROUBLE_WAIT_MS", 100.0)
    policy = tmp_path / "tidegate.toml"
    policy.write_text(HANGS.format(url=forgetful.url))
    forgetful.found_after = 0
    given: Any = {"tidegate_policy": policy, "background_poll_ms": 100}
    gateway = await open_gateway(**given, redis_url=own_valkey.url)
    body = {"model": "slow-1", "input": "Think", "background": True}
    async with gateway.http.post(f"{gateway.url}/v1/responses", json=body) as response:
        assert response.status == 200
    await wait_until(lambda: forgetful.hanging, 20, "a look")
    own_valkey.stop()
    forgetful.goes_on.set()

    async def looked_again() -> bool:
        query = "SELECT looks FROM background_calls WHERE state = 'ended'"
        return bool((await gateway.database.fetchval(query) or 0) >= 3)

    await wait_until(looked_again, 20, "looks at what has ended")
    own_valkey.start()

    async def forgotten() -> bool:
        query = "SELECT count(*) FROM background_calls"
        return bool(await gateway.database.fetchval(query) == 0)

    await wait_until(forgotten, 20, "its end")
    assert [line for line in lines() if line["event"] == "worker_loop_failed"] == []


async def test_a_worker_whose_clock_was_set_ends_no_call_before_its_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Set(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(days=2)

    monkeypatch.setattr(background, "datetime", Set)
    await stage.gateway.upstream.set_behaviour(**SLOW)
    made = await stage.sdk.responses.create(model=MODEL, input="Think", background=True)
    row = await stage.ended(made.id)
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
