"""What lives on at OpenAI, by its own SDK: whose it is, where its calls go, what a list shows."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from aiohttp import web
from openai import AsyncOpenAI

from tests.gateway import Gateway, Opener
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.record import KEPT_BYTES
from tidegate.store.retention import Whose

FILE = """
[upstreams.first]
dialects = {{ openai = "{first}/v1" }}
key = "FIRST_KEY"
models = ["gpt-*"]
[upstreams.second]
dialects = {{ openai = "{second}/v1" }}
key = "SECOND_KEY"
models = ["gpt-*"]
adopt = "heir"
"""
MODEL = "gpt-5-mini"


@dataclass
class Stage:
    """A gateway over two accounts of OpenAI, and the SDK as two of its tenants."""

    gateway: Gateway
    accounts: dict[str, Emulator]
    acme: AsyncOpenAI
    other: AsyncOpenAI
    heir: AsyncOpenAI

    async def at(self, path: str) -> list[str]:
        """Which account has something at a path."""
        found = []
        for name, one in self.accounts.items():
            headers = {"Authorization": "Bearer of-nobody"}
            async with self.gateway.http.get(f"{one.url}{path}", headers=headers) as answer:
                found += [name] if answer.status == 200 else []
        return found


@pytest.fixture
async def stage(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Stage]:
    monkeypatch.setenv("FIRST_KEY", "key-of-the-first")
    monkeypatch.setenv("SECOND_KEY", "key-of-the-second")
    async with AsyncExitStack() as stack:
        accounts = {
            name: await stack.enter_async_context(run_emulator()) for name in ("first", "second")
        }
        path = tmp_path / "policy.toml"
        path.write_text(FILE.format(**{name: one.url for name, one in accounts.items()}))
        gateway = await open_gateway(worker=False, auth="on", tidegate_policy=path)
        clients = []
        for tenant in ("acme", "other", "heir"):
            header = (await key_of(gateway, tenant))["Authorization"]
            client = AsyncOpenAI(
                base_url=f"{gateway.url}/v1", api_key=header.split()[1], max_retries=0
            )
            clients.append(await stack.enter_async_context(client))
        yield Stage(gateway, accounts, *clients)


async def test_what_is_stored_is_its_tenants_own_and_called_where_it_lives(stage: Stage) -> None:
    acme, other = stage.acme, stage.other
    made = [await acme.responses.create(model=MODEL, input=f"Say {one}") for one in range(8)]
    lives = [await stage.at(f"/v1/responses/{one.id}") for one in made]
    assert {("first",), ("second",)} == set(map(tuple, lives)), "drawn by lot"
    for one, (upstream,) in zip(made, lives, strict=True):
        raw = await acme.responses.with_raw_response.retrieve(one.id)
        assert raw.headers["x-tidegate-upstream"] == upstream
        assert raw.parse().output_text == one.output_text
        onward = await acme.responses.with_raw_response.create(
            model=MODEL, input="And then?", previous_response_id=one.id
        )
        assert onward.headers["x-tidegate-upstream"] == upstream
    items = await acme.responses.input_items.list(made[0].id)
    assert "Say 0" in items.data[0].model_dump_json()
    stream = await acme.responses.create(model=MODEL, input="Say it", stream=True)
    (begun, *_) = [event async for event in stream]
    assert (await acme.responses.retrieve(begun.response.id)).status == "completed"

    conversation = await acme.conversations.create(metadata={"topic": "tides"})
    await acme.conversations.items.create(
        conversation.id, items=[{"type": "message", "role": "user", "content": "Hello"}]
    )
    (home,) = await stage.at(f"/v1/conversations/{conversation.id}")
    said = await acme.responses.with_raw_response.create(
        model=MODEL, input="Say hello", conversation=conversation.id
    )
    assert said.headers["x-tidegate-upstream"] == home
    listed = [str(one.id) async for one in acme.conversations.items.list(conversation.id, limit=2)]
    assert len(listed) == 4, "both questions, the thoughts and the answer"
    item = await acme.conversations.items.retrieve(listed[0], conversation_id=conversation.id)
    assert item.id == listed[0]
    await acme.conversations.items.delete(listed[0], conversation_id=conversation.id)
    updated = await acme.conversations.update(conversation.id, metadata={"topic": "locks"})
    assert updated.metadata == {"topic": "locks"}

    kept = await acme.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Keep it"}], store=True
    )
    theirs: list[Any] = [
        other.responses.retrieve(made[0].id),
        other.responses.delete(made[0].id),
        other.responses.cancel(made[0].id),
        other.responses.input_items.list(made[0].id),
        other.responses.create(model=MODEL, input="x", previous_response_id=made[0].id),
        other.responses.create(model=MODEL, input="x", conversation={"id": conversation.id}),
        other.conversations.retrieve(conversation.id),
        other.conversations.update(conversation.id, metadata={}),
        other.conversations.delete(conversation.id),
        other.conversations.items.list(conversation.id),
        other.conversations.items.create(conversation.id, items=[]),
        other.conversations.items.retrieve(listed[1], conversation_id=conversation.id),
        other.conversations.items.delete(listed[1], conversation_id=conversation.id),
        other.chat.completions.retrieve(kept.id),
        other.chat.completions.update(kept.id, metadata={}),
        other.chat.completions.delete(kept.id),
        other.chat.completions.messages.list(kept.id),
    ]
    before = {name: await one.control.stats() for name, one in stage.accounts.items()}
    for asked in theirs:
        with pytest.raises(openai.NotFoundError) as refused:
            await asked
        assert "not found" in refused.value.message
    with pytest.raises(openai.NotFoundError) as unknown:
        await other.responses.retrieve("resp_of_nobody")
    assert unknown.value.body["message"] == "Response with id 'resp_of_nobody' not found."
    after = {name: await one.control.stats() for name, one in stage.accounts.items()}
    assert {n: s.last_id for n, s in before.items()} == {n: s.last_id for n, s in after.items()}

    assert (await acme.conversations.delete(conversation.id)).deleted
    await acme.responses.delete(made[0].id)
    for gone in (
        acme.responses.retrieve(made[0].id),
        acme.conversations.retrieve(conversation.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await gone


async def test_a_stream_that_repeats_long_instructions_is_its_tenants_own(stage: Stage) -> None:
    """Its first event does, so that the id of the response came behind what was looked through."""
    said: dict[str, Any] = {"model": MODEL, "input": "Say hello", "stream": True}
    said["instructions"] = 'Say "id": "resp_of_nobody". ' * 20_000
    (begun, *_) = [event async for event in await stage.acme.responses.create(**said)]
    made = begun.response.id
    assert (await stage.acme.responses.retrieve(made)).id == made
    with pytest.raises(openai.NotFoundError):
        await stage.other.responses.retrieve(made)
    query = "SELECT resource_id, tenant_id FROM provider_resources WHERE kind = 'response'"
    assert [tuple(row) for row in await stage.gateway.database.fetch(query)] == [(made, "acme")]


async def test_a_list_shows_the_callers_own_from_all_accounts(stage: Stage) -> None:
    acme, other = stage.acme, stage.other
    own = []
    for number in range(5):
        for client in (acme, other):
            made = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"Keep {number}"}],
                store=True,
                metadata={"odd": str(number % 2)},
            )
            own += [made.id] if client is acme else []
    await acme.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Not this one"}]
    )
    assert [one.id async for one in acme.chat.completions.list(limit=2)] == own
    back = [one.id async for one in acme.chat.completions.list(limit=3, order="desc")]
    assert back == own[::-1]
    odd = [one.id async for one in acme.chat.completions.list(metadata={"odd": "1"})]
    assert odd == own[1::2]
    await acme.chat.completions.delete(own[0])
    page = await acme.chat.completions.list(limit=1)
    assert ([one.id for one in page.data], page.has_more) == ([own[1]], True)
    theirs = await acme.chat.completions.list(after="chatcmpl-of-nobody")
    assert theirs.data == []
    none = await acme.chat.completions.list(limit=0)
    assert (none.data, none.has_more) == ([], False), "as OpenAI answers it"
    with pytest.raises(openai.BadRequestError, match="from 0 to 100"):
        await acme.chat.completions.list(limit=101)


async def test_a_list_leaves_out_what_lived_at_an_upstream_that_is_gone(stage: Stage) -> None:
    """One such, of an upstream that was removed by force, made all lists of its tenant 404."""
    own = []
    for number in range(3):
        messages: Any = [{"role": "user", "content": f"Keep {number}"}]
        made = await stage.acme.chat.completions.create(model=MODEL, messages=messages, store=True)
        own.append(made.id)
    gone = "UPDATE provider_resources SET upstream = 'third', account = '3' WHERE resource_id = $1"
    assert await stage.gateway.database.execute(gone, own[1]) == "UPDATE 1"
    assert [one.id async for one in stage.acme.chat.completions.list(limit=2)] == [own[0], own[2]]
    with pytest.raises(openai.NotFoundError, match="'third', where it lives, is not configured"):
        await stage.acme.chat.completions.retrieve(own[1])


async def test_what_lives_elsewhere_is_called_nowhere_else(stage: Stage) -> None:
    """The account where it lives is out: the call fails, and the other account is not asked."""
    made = await stage.acme.responses.create(model=MODEL, input="Say hello")
    (home,) = await stage.at(f"/v1/responses/{made.id}")
    await stage.accounts[home].control.set_fault("unavailable")
    away = next(one for name, one in stage.accounts.items() if name != home)
    before = (await away.control.stats()).last_id
    with pytest.raises(openai.InternalServerError):
        await stage.acme.responses.create(
            model=MODEL, input="And then?", previous_response_id=made.id
        )
    assert (await away.control.stats()).last_id == before


async def test_what_was_made_elsewhere_is_the_adopting_tenant_s(stage: Stage) -> None:
    """As before the gateway, or at the provider directly: no row says whose it is."""
    made = dict[str, tuple[str, str]]()
    line = {
        "custom_id": "one",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": MODEL, "messages": [{"role": "user", "content": "Say it"}]},
    }
    for name, account in stage.accounts.items():
        async with AsyncOpenAI(base_url=f"{account.url}/v1", api_key="direct") as direct:
            answer = await direct.responses.create(model=MODEL, input="Say it")
            file = await direct.files.create(file=("a.txt", b"x"), purpose="user_data")
            made[name] = answer.id, file.id
            lines = await direct.files.create(
                file=("in.jsonl", orjson.dumps(line)), purpose="batch"
            )
            batch = await direct.batches.create(
                input_file_id=lines.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
    theirs = (await stage.acme.responses.create(model=MODEL, input="Say another")).id
    response, file_id = made["second"]
    for one in range(4):  # by lot it would go to either
        said = [
            {"type": "input_file", "file_id": file_id},
            {"type": "input_text", "text": f"{one}"},
        ]
        onward = await stage.heir.responses.with_raw_response.create(
            model=MODEL,
            input=[{"role": "user", "content": said}],
            previous_response_id=response,
        )
        assert onward.headers["x-tidegate-upstream"] == "second"
    assert (await stage.heir.responses.retrieve(response)).id == response
    assert (await stage.heir.files.content(file_id)).content == b"x"
    assert (await stage.heir.files.delete(file_id)).deleted
    assert (await stage.heir.batches.retrieve(batch.id)).id == batch.id
    for unowned in (
        *(stage.acme.batches.retrieve(batch.id), stage.acme.batches.cancel(batch.id)),
        *(stage.acme.models.delete("ft:gpt-4o:acme::x"), stage.heir.batches.retrieve("batch_x")),
    ):
        with pytest.raises(openai.NotFoundError):
            await unowned
    for client, unfound in (
        *((stage.acme, response), (stage.other, response)),
        *((stage.heir, made["first"][0]), (stage.heir, theirs)),
    ):
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unfound)
    with pytest.raises(openai.NotFoundError):
        await stage.heir.responses.create(model=MODEL, input="x", previous_response_id=theirs)
    with pytest.raises(openai.NotFoundError):
        await stage.acme.responses.create(model=MODEL, input="x", previous_response_id=response)


async def test_what_an_erased_subject_owns_is_nobodys(stage: Stage) -> None:
    subject = {"x-tidegate-subject": "patient-1"}
    made = await stage.acme.responses.create(model=MODEL, input="Hello", extra_headers=subject)
    kept = await stage.acme.responses.create(model=MODEL, input="Hello")
    retention = stage.gateway.services.store.retention
    database = stage.gateway.database
    query = "SELECT count(DISTINCT request_id) = 2 FROM provider_resources WHERE kind = 'item'"
    await wait_until(lambda: database.fetchval(query))  # items are noted later
    query = "SELECT count(*) FROM provider_resources WHERE subject = 'patient-1'"
    own = await database.fetchval(query)
    report = await retention.erase(Whose("acme", "patient-1"))
    assert report.resources == own > 1
    with pytest.raises(openai.NotFoundError):
        await stage.acme.responses.retrieve(made.id)
    assert (await stage.acme.responses.retrieve(kept.id)).id == kept.id


async def test_an_answer_that_is_too_long_to_be_kept_is_its_tenants_own(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """As one with several pictures: its id stands before them."""
    picture = {"type": "image_generation_call", "id": "ig_1", "result": "A" * 2 * KEPT_BYTES}
    usage = {"input_tokens": 7, "output_tokens": 9}
    made = {"error": None, "id": "resp_1", "status": "completed", "output": [picture]}

    async def answer(_: web.BaseRequest) -> web.Response:
        return web.json_response(made | {"object": "response", "model": MODEL, "usage": usage})

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    path = tmp_path / "policy.toml"
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    path.write_text(f'[upstreams.pictures]\ndialects = {{ openai = "{url}/v1" }}\n')
    gateway = await open_gateway(worker=False, tidegate_policy=path)
    asked = {"model": MODEL, "input": "Draw it"}
    async with gateway.http.post(f"{gateway.url}/v1/responses", json=asked) as response:
        assert (await response.json())["id"] == "resp_1"
    rows = await gateway.database.fetch("SELECT kind, resource_id FROM provider_resources")
    assert [tuple(row) for row in rows] == [("response", "resp_1")]
    await runner.cleanup()


async def test_no_model_answers_in_what_is_relayed_as_a_conversation(
    open_gateway: Opener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistral's begin with an answer of a model, which no limit would count."""
    asked: list[str] = []

    async def answer(request: web.BaseRequest) -> web.Response:
        asked.append(request.path)
        return web.json_response({"conversation_id": "conv_1", "usage": {"total_tokens": 9}})

    monkeypatch.setenv("MISTRAL_API_KEY", "key-of-mistral")
    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    path = tmp_path / "policy.toml"
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    own = f'provider = "mistral"\nbase_url = "{url}"\nadopt = "default"\n'
    path.write_text(f"[upstreams.mistral]\n{own}")
    gateway = await open_gateway(worker=False, tidegate_policy=path)
    begun = {"model": "mistral-large-latest", "inputs": "Say hello"}
    for at in ("/v1/conversations", "/v1/conversations/conv_1"):
        async with gateway.http.post(f"{gateway.url}{at}", json=begun) as response:
            assert response.headers.get("x-tidegate-upstream") != "mistral"
    assert not asked
    await runner.cleanup()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_that_its_provider_does_not_keep_needs_no_owner(
    open_gateway: Opener, tmp_path: Path, stream: bool
) -> None:
    """OpenRouter and DeepSeek keep none, and answer so whatever the request says."""
    made = {"id": "resp_1", "object": "response", "status": "completed", "store": False}
    event = b"event: response.created\ndata: %b\n\n"
    created = event % orjson.dumps({"type": "response.created", "response": made})

    async def answer(_: web.BaseRequest) -> web.Response:
        if stream:
            return web.Response(body=created, content_type="text/event-stream")
        return web.json_response(made)

    runner = web.ServerRunner(web.Server(answer))
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    path = tmp_path / "policy.toml"
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    own = f'dialects = {{ openai = "{url}/v1" }}\nmodels = ["gpt-*"]\n'
    path.write_text(f"[upstreams.stateless]\n{own}")
    gateway = await open_gateway(worker=False, tidegate_policy=path)
    asked = {"model": MODEL, "input": "Say it", "stream": stream}
    async with gateway.http.post(f"{gateway.url}/v1/responses", json=asked) as response:
        assert "resp_1" in await response.text()
    assert await gateway.database.fetch("SELECT 1 FROM provider_resources") == []
    await runner.cleanup()
