"""Interactions, cached contents and files of Gemini by the google-genai SDK, between tenants."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from google.genai import Client, types

from tests.gateway import Gateway, Opener
from tests.integration.native.conftest import MODEL
from tests.integration.native.test_upstreams import WriteFile, policy, second
from tests.integration.tenants.asking import key_of
from tests.waiting import wait_until
from tidegate.emulator.server import Emulator
from tidegate.spine import resources

__all__ = ["policy", "second"]

TEXT = types.UploadFileConfig(mime_type="text/plain")
# The second upstream makes what names no model, since it speaks no other dialect.
ROUTES = """
[[routes]]
model = "only-second"
try = ["second"]
[[routes]]
model = "only-first"
try = ["gemini"]
"""


@dataclass
class Tenants:
    """Two tenants of one gateway by Google's SDK, and the emulator of its second upstream."""

    gateway: Gateway
    mine: Any
    theirs: Any
    second: Emulator

    async def rows(self) -> list[Any]:
        query = "SELECT kind, resource_id, tenant_id, upstream FROM provider_resources"
        return list(await self.gateway.database.fetch(query))


@pytest.fixture
async def tenants(
    open_gateway: Opener, policy: WriteFile, second: Emulator
) -> AsyncIterator[Tenants]:
    file = policy(end=ROUTES)
    gateway = await open_gateway(worker=False, auth="on", tidegate_policy=file)
    async with sdk_of(gateway, "mine") as mine, sdk_of(gateway, "theirs") as theirs:
        yield Tenants(gateway, mine, theirs, second)


@asynccontextmanager
async def sdk_of(gateway: Gateway, tenant: str) -> AsyncIterator[Any]:
    shown = await key_of(gateway, tenant)
    key = shown["Authorization"].removeprefix("Bearer ")
    client = Client(api_key=key, http_options=types.HttpOptions(base_url=gateway.url))
    yield client.aio
    await client.aio.aclose()
    client.close()


async def refused(call: Any) -> int:
    """The status of a call that must fail."""
    with pytest.raises(Exception) as failed:  # noqa: PT011  (the SDK has two trees of errors)
        await call
    found = getattr(failed.value, "code", None) or getattr(failed.value, "status_code", None)
    assert isinstance(found, int), failed.value
    return found


async def test_interactions(tenants: Tenants) -> None:
    mine, theirs, gateway = tenants.mine, tenants.theirs, tenants.gateway
    made = await mine.interactions.create(
        model="only-second", input="Say hello", generation_config={"max_output_tokens": 500}
    )
    assert made.status == "completed"
    assert "Say hello" in made.output_text
    (call,) = await tenants.second.control.calls()
    assert (call.kind, call.model) == ("text_only", "only-second")
    query = "SELECT request_id FROM audit"
    rows = await wait_until(lambda: gateway.database.fetch(query), 20, "an audit row")
    row = await gateway.audit(str(rows[0]["request_id"]))
    assert (row["model"], row["finish_reason"]) == ("only-second", "completed")
    assert row["input_tokens"] == made.usage.total_input_tokens
    assert row["output_tokens"] == made.usage.total_output_tokens
    assert (await mine.interactions.get(made.id)).id == made.id
    # What follows goes where it lives, whoever else serves the model; and is nobody else's.
    stream = await mine.interactions.create(
        model="only-second", input="And now?", previous_interaction_id=made.id, stream=True
    )
    events = [event async for event in stream]
    next_id = events[0].interaction.id
    assert events[-1].event_type == "interaction.completed"
    assert events[-1].interaction.usage.total_input_tokens > made.usage.total_input_tokens
    assert (await mine.interactions.get(next_id)).id == next_id
    for one in (made.id, next_id, "v1_of_nobody"):
        assert await refused(theirs.interactions.get(one)) == 404
        assert await refused(theirs.interactions.delete(one)) == 404
        assert await refused(theirs.interactions.cancel(one)) == 404
        more = {"input": "Tell me", "previous_interaction_id": one}
        assert await refused(theirs.interactions.create(model="only-second", **more)) == 404
    assert await refused(mine.interactions.cancel(made.id)) == 400, "it has ended"
    elsewhere = {"input": "Tell me", "previous_interaction_id": made.id}
    answer = await mine.interactions.create(model=MODEL, **elsewhere)
    assert answer.model == MODEL
    assert await gateway.calls() == [], "all that continues it goes where it lives"
    await mine.interactions.delete(made.id)
    assert await refused(mine.interactions.get(made.id)) == 404
    unkept = await mine.interactions.create(model="only-second", input="Forget it", store=False)
    assert {row["resource_id"] for row in await tenants.rows()} == {next_id, answer.id}
    assert unkept.status == "completed"


async def test_a_tenant_s_models_bind_what_is_stored_too(tenants: Tenants) -> None:
    await tenants.gateway.services.store.tenants.set("mine", {"models": ["gemini-*"]}, by="test")
    config = types.CreateCachedContentConfig(contents=["a story"])

    async def is_bound() -> bool:
        try:
            await tenants.mine.interactions.create(agent="deep-research", input="Hi")
        except Exception as failed:  # noqa: BLE001  (the SDK has two trees of errors)
            return getattr(failed, "status_code", 0) == 403
        return False

    await wait_until(is_bound, 20, "the tenant's models in force")
    assert (await tenants.mine.caches.create(model=MODEL, config=config)).name
    assert await refused(tenants.mine.caches.create(model="only-second", config=config)) == 403
    assert await refused(tenants.mine.interactions.create(model="only-second", input="Hi")) == 403
    assert (await tenants.mine.interactions.create(model=MODEL, input="Hi")).output_text


async def test_cached_contents(tenants: Tenants) -> None:
    mine, theirs = tenants.mine, tenants.theirs
    story = "It was a dark and stormy night. " * 200
    config = types.CreateCachedContentConfig(contents=[story], ttl="300s", display_name="story")
    made = await mine.caches.create(model="only-second", config=config)
    assert made.name.startswith("cachedContents/")
    audit = "SELECT model, input_tokens, output_tokens FROM audit"
    rows = await wait_until(lambda: tenants.gateway.database.fetch(audit), 20, "an audit row")
    assert tuple(rows[0]) == (*("only-second", made.usage_metadata.total_token_count, 0),)
    assert (await mine.caches.get(name=made.name)).name == made.name
    longer = types.UpdateCachedContentConfig(ttl="600s")
    changed = await mine.caches.update(name=made.name, config=longer)
    assert changed.expire_time > made.expire_time
    assert [one.name async for one in await mine.caches.list()] == [made.name]
    assert [one.name async for one in await theirs.caches.list()] == []
    using = types.GenerateContentConfig(cached_content=made.name)
    asked = {"model": "gemini-2.5-flash", "contents": "How was it?", "config": using}
    answer = await mine.models.generate_content(**asked)
    assert answer.usage_metadata.cached_content_token_count == made.usage_metadata.total_token_count
    assert await tenants.gateway.calls() == [], "the call goes where the content is cached"
    for call in (
        theirs.models.generate_content(**asked),
        theirs.caches.get(name=made.name),
        theirs.caches.update(name=made.name, config=longer),
        theirs.caches.delete(name=made.name),
    ):
        assert await refused(call) == 404
    await mine.caches.delete(name=made.name)
    assert [one.name async for one in await mine.caches.list()] == []


async def test_files(tenants: Tenants) -> None:
    mine, theirs = tenants.mine, tenants.theirs
    await tenants.second.control.set_behaviour(file_processing_ms=0)
    made = [
        await mine.files.upload(file=io.BytesIO(b"x" * size), config=TEXT) for size in (10, 20, 30)
    ]
    other = await theirs.files.upload(file=io.BytesIO(b"y"), config=TEXT)
    names = [file.name for file in made]
    page = await mine.files.list(config={"page_size": 2})
    assert [file.name async for file in page] == names
    assert [file.name async for file in await theirs.files.list()] == [other.name]
    answer = await mine.models.generate_content(model=MODEL, contents=["Sum it up", made[0]])
    assert answer.text
    assert await tenants.gateway.calls() == []
    for call in (
        theirs.files.get(name=names[0]),
        theirs.files.delete(name=names[0]),
        theirs.models.generate_content(model=MODEL, contents=["Sum it up", made[0]]),
        theirs.models.count_tokens(model=MODEL, contents=["Sum it up", made[0]]),
        theirs.interactions.create(
            model=MODEL,
            input=[{"type": "document", "uri": made[0].uri, "mime_type": "application/pdf"}],
        ),
        mine.models.generate_content(model="only-first", contents=["Sum it up", made[0]]),
    ):
        assert await refused(call) in (400, 404)
    made_calls = await tenants.second.control.calls()
    assert [call.outcome for call in made_calls if call.kind != "other"] == ["finished"]
    await mine.files.delete(name=names[1])
    assert [file.name async for file in await mine.files.list()] == [names[0], names[2]]
    assert await asyncio.gather(*map(refused, [mine.files.get(name=names[1])])) == [404]


async def test_a_list_leaves_out_what_is_gone_and_fails_with_a_dead_key(
    tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    await tenants.second.control.set_behaviour(file_processing_ms=0)
    made = [
        await tenants.mine.files.upload(file=io.BytesIO(b"x" * size), config=TEXT)
        for size in (10, 20)
    ]
    headers = {"x-goog-api-key": "key-of-the-second"}
    gone = f"{tenants.second.url}/v1beta/{made[0].name}"
    async with tenants.gateway.http.delete(gone, headers=headers) as deleted:
        assert deleted.status == 200, "at the provider itself"
    owned = sorted(one.name.removeprefix("files/") for one in made)
    for left in (owned, [made[1].name.removeprefix("files/")]):
        assert [file.name async for file in await tenants.mine.files.list()] == [made[1].name]
        assert sorted(row["resource_id"] for row in await tenants.rows()) == left
        monkeypatch.setattr(resources, "GONE_AFTER_S", 0.0)
    await tenants.second.control.set_fault("forbidden", kind="other")
    assert await refused(tenants.mine.files.list()) in (502, 503)


async def test_stores_of_file_search_are_their_tenant_s_with_all_that_is_in_them(
    tenants: Tenants,
) -> None:
    mine, theirs, gateway = tenants.mine, tenants.theirs, tenants.gateway
    stores = mine.file_search_stores
    await gateway.upstream.set_behaviour(first_byte_ms=0, between_ms=0)
    made = await stores.create(config={"display_name": "Tides"})
    other = await theirs.file_search_stores.create(config={"display_name": "Theirs"})
    begun = await stores.upload_to_file_search_store(
        file_search_store_name=made.name,
        file=io.BytesIO(b"high water at noon"),
        config={"mime_type": "text/plain", "display_name": "noon.txt"},
    )
    ended = await mine.operations.get(begun)
    assert (ended.done, ended.response.parent) == (True, made.name)
    file = await mine.files.upload(
        file=io.BytesIO(b"low water"), config={"mime_type": "text/plain"}
    )
    imported = await stores.import_file(file_search_store_name=made.name, file_name=file.name)
    assert (await mine.operations.get(imported)).done
    documents = [one async for one in await stores.documents.list(parent=made.name)]
    assert [one.display_name for one in documents][:1] == ["noon.txt"]
    first, second = (one.name for one in documents)
    assert (await stores.documents.get(name=first)).name == first
    assert [one.name async for one in await stores.list()] == [made.name]
    search = types.FileSearch(file_search_store_names=[made.name])
    config = types.GenerateContentConfig(tools=[types.Tool(file_search=search)])
    assert (await mine.models.generate_content(model=MODEL, contents="When?", config=config)).text
    tools: Any = [{"type": "file_search", "file_search_store_names": [made.name]}]
    for call in (
        theirs.models.generate_content(model=MODEL, contents="When?", config=config),
        theirs.interactions.create(model=MODEL, input="When?", tools=tools),
        theirs.file_search_stores.get(name=made.name),
        theirs.file_search_stores.delete(name=made.name),
        theirs.file_search_stores.documents.list(parent=made.name),
        theirs.file_search_stores.documents.get(name=first),
        theirs.file_search_stores.documents.delete(name=first),
        theirs.operations.get(begun),
        theirs.file_search_stores.import_file(
            file_search_store_name=other.name, file_name=file.name
        ),
        theirs.file_search_stores.upload_to_file_search_store(
            file_search_store_name=made.name,
            file=io.BytesIO(b"x"),
            config={"mime_type": "text/plain"},
        ),
    ):
        assert await refused(call) == 404
    # An upload that says that it has begun elsewhere has an owner to show all the same.
    url = f"{gateway.url}/upload/v1beta/{made.name}:uploadToFileSearchStore"
    headers = {
        "x-goog-api-key": theirs._api_client.api_key,
        "x-goog-upload-command": "start",
        "x-goog-upload-protocol": "resumable",
    }
    query = {"tidegate_upstream": "gemini"}
    async with gateway.http.post(url, params=query, json={}, headers=headers) as answer:
        assert answer.status == 404
    await stores.documents.delete(name=second)
    assert len([one async for one in await stores.documents.list(parent=made.name)]) == 1
    await stores.delete(name=made.name, config={"force": True})
    assert await refused(stores.get(name=made.name)) == 404
    assert [one.name async for one in await stores.list()] == []
