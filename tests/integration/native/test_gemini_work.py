"""Videos and batches of Gemini by the google-genai SDK: what goes on after its answer is counted
until the provider says that it has ended, is charged once, and is its own tenant's."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.genai import types

from tests.gateway import Gateway, Opener
from tests.integration.native.test_gemini_lives import refused, sdk_of
from tests.waiting import wait_until
from tidegate.jobs import background
from tidegate.policy.format import edit
from tidegate.prices.budgets import Budget

MODEL = "gemini-2.5-flash"
VEO = "veo-3.1-fast-generate-preview"


class Stage:
    """A gateway with a worker, and two tenants of it."""

    def __init__(self, gateway: Gateway, mine: Any, theirs: Any) -> None:
        self.gateway, self.mine, self.theirs = gateway, mine, theirs

    async def row(self, endpoint: str) -> Any:
        async def row() -> Any:
            query = "SELECT * FROM audit WHERE endpoint LIKE '%' || $1"
            return await self.gateway.database.fetchrow(query, endpoint)

        found = dict(await wait_until(row, 20, "its record"))
        return found | {"usage_details": orjson.loads(found["usage_details"] or "{}")}

    async def counts(self, limit: str, calls: int) -> None:
        async def counted() -> bool:
            snapshot = await self.gateway.services.limiter.snapshot()
            return bool(snapshot.limits[limit].used == calls)

        await wait_until(counted, 10, f"{calls} counted")

    async def begun(self, *, prompt: str, parameters: dict[str, Any]) -> Any:
        """A video, by the path that the SDK has at Vertex alone."""
        body = {"instances": [{"prompt": prompt}], "parameters": parameters}
        made = await self._post(f"{VEO}:predictLongRunning", body)
        return types.GenerateVideosOperation.model_validate({"name": made["name"]})

    async def drawn(self, *, count: int) -> list[Any]:
        body = {"instances": [{"prompt": "A wave"}], "parameters": {"sampleCount": count}}
        made = await self._post("imagen-4.0-generate-001:predict", body)
        pictures: list[Any] = made["predictions"]
        return pictures

    async def _post(self, call: str, body: Any) -> Any:
        url, key = f"{self.gateway.url}/v1beta/models/{call}", self.mine._api_client.api_key
        async with self.gateway.http.post(url, json=body, headers={"x-goog-api-key": key}) as made:
            assert made.status == 200, await made.text()
            return await made.json()

    async def done(self, operation: Any) -> Any:
        async def done() -> Any:
            found = await self.mine.operations.get(operation)
            return found if found.done else None

        return await wait_until(done, 20, "its end")

    async def ended(self, name: str) -> Any:
        async def ended() -> Any:
            found = await self.mine.batches.get(name=name)
            return found if found.done else None

        return await wait_until(ended, 20, "its end")


PRICES = """
[upstreams.gemini.prices]
"gemini-2.5-flash" = { input = 0.3, output = 2.5, tiers = { batch = { share = 0.5 } } }
"veo-*" = { video_second = 0.15, tiers = { 4k = { video_second = 0.35 } } }
"imagen-*" = { image = 0.04 }
"gemini-embedding-001" = { input = 0.15, output = 0, tiers = { batch = { share = 0.5 } } }
"""


@pytest.fixture
async def stage(open_gateway: Opener, tmp_path: Path) -> AsyncIterator[Stage]:
    policy = tmp_path / "policy.toml"
    policy.write_text(PRICES)
    async with AsyncExitStack() as stack:
        gateway = await open_gateway(
            auth="on",
            rate_limits={"image_generation": 2},
            background_poll_ms=100,
            tidegate_policy=policy,
        )
        await gateway.services.keeper.change(edit({"kind:batch": 1}), set_by="test")
        budget = Budget(name="mine", unit="usd", amount=4_000_000, period="day", tenant="mine")
        await gateway.services.store.budgets.records.set(budget, by="test")
        await gateway.services.store.budgets.refresh()
        mine = await stack.enter_async_context(sdk_of(gateway, "mine"))
        theirs = await stack.enter_async_context(sdk_of(gateway, "theirs"))
        yield Stage(gateway, mine, theirs)


async def test_an_operation_is_waited_for_cancelled_and_deleted_by_its_own_tenant_alone(
    stage: Stage,
) -> None:
    gateway = stage.gateway
    await gateway.upstream.set_behaviour(first_byte_ms=300)
    begun = await stage.begun(prompt="A wave", parameters={"durationSeconds": 4})

    async def act(of: Any, method: str, verb: str = "") -> tuple[int, Any]:
        key = {"x-goog-api-key": of._api_client.api_key}
        url = f"{gateway.url}/v1beta/{begun.name}{verb}"
        async with gateway.http.request(method, url, json={}, headers=key) as answer:
            return answer.status, await answer.json()

    for method, verb in (("POST", ":wait"), ("POST", ":cancel"), ("DELETE", "")):
        assert (await act(stage.theirs, method, verb))[0] == 404, verb
    status, said = await act(stage.mine, "DELETE")
    assert (status, "or its end is being recorded" in said["error"]["message"]) == (409, True)
    status, said = await act(stage.mine, "POST", ":cancel")
    assert (status, said["error"]["status"]) == (501, "UNIMPLEMENTED"), "in Google's own words"
    assert gateway.services.spine.health["gemini"].faults == 0
    status, waited = await act(stage.mine, "POST", ":wait")
    assert (status, waited["done"]) == (200, True)
    await stage.counts("kind:image_generation", 0)
    assert (await act(stage.mine, "DELETE"))[0] == 200
    assert await refused(stage.mine.operations.get(begun)) == 404


async def test_a_video_is_counted_until_it_is_there_and_charged_by_its_seconds(
    stage: Stage,
) -> None:
    gateway, mine, theirs = stage.gateway, stage.mine, stage.theirs
    await gateway.upstream.set_behaviour(first_byte_ms=700)
    settings = {"durationSeconds": 4, "sampleCount": 2, "resolution": "4k"}
    begun = await stage.begun(prompt="A wave", parameters=settings)
    await stage.counts("kind:image_generation", 1)
    assert gateway.held == 0, "no process holds it"
    (book,) = await gateway.services.store.budgets.records.books("mine")
    assert (book.held, book.spent) == (2_800_000, 0)
    assert await refused(theirs.operations.get(begun)) == 404
    ended = await stage.done(begun)
    await stage.counts("kind:image_generation", 0)
    row = await stage.row(":predictLongRunning")
    assert (row["status"], row["usage_state"], row["model"]) == ("succeeded", "told", VEO)
    assert row["usage_details"]["output_video_seconds"] == 8
    assert row["cost_micros"] == 8 * 350_000
    first, second = (one.video for one in ended.response.generated_videos)
    assert (await mine.files.download(file=first)).endswith(b"A wave")
    assert await refused(theirs.files.download(file=second)) == 404
    await gateway.upstream.set_behaviour(first_byte_ms=0)
    refusing = await stage.begun(prompt="Some violence", parameters={})
    ended = await stage.done(refusing)
    assert ended.response.rai_media_filtered_count == 1
    query = "SELECT cost_micros FROM audit WHERE endpoint LIKE '%LongRunning' ORDER BY submitted_at"
    rows = await wait_until(lambda: _two(gateway, query), 20, "the second record")
    assert [one["cost_micros"] for one in rows] == [2_800_000, 0], "Google charges for no other"


async def _two(gateway: Gateway, query: str) -> Any:
    rows = await gateway.database.fetch(query)
    return rows if len(rows) == 2 else None


def lines(*prompts: str) -> list[dict[str, Any]]:
    return [
        {
            "contents": [{"role": "user", "parts": [{"text": prompt}]}],
            "metadata": {"key": prompt},
            "config": {"max_output_tokens": 500},
        }
        for prompt in prompts
    ]


async def test_a_batch_is_counted_by_itself_and_charged_by_its_answers(stage: Stage) -> None:
    gateway, mine, theirs = stage.gateway, stage.mine, stage.theirs
    await gateway.upstream.set_behaviour(batches={"delay_ms": 700})
    made = await mine.batches.create(model=MODEL, src=lines("Say hello", "Say bye"))
    await stage.counts("kind:batch", 1)
    assert [one.name async for one in await mine.batches.list()] == [made.name]
    assert [one.name async for one in await theirs.batches.list()] == []
    for call in (theirs.batches.get, theirs.batches.cancel, theirs.batches.delete):
        assert await refused(call(name=made.name)) == 404
    assert await refused(mine.batches.delete(name=made.name)) == 409, "it goes on"
    ended = await stage.ended(made.name)
    texts = [one.response.text for one in ended.dest.inlined_responses]
    assert [one.metadata["key"] for one in ended.dest.inlined_responses] == ["Say hello", "Say bye"]
    await stage.counts("kind:batch", 0)
    row = await stage.row(":batchGenerateContent")
    told = [one.response.usage_metadata for one in ended.dest.inlined_responses]
    assert row["input_tokens"] == sum(one.prompt_token_count for one in told)
    assert row["output_tokens"] == sum(one.candidates_token_count for one in told)
    assert (row["usage_state"], row["tenant_id"]) == ("told", "mine")
    taken, given = row["input_tokens"], row["output_tokens"] + (row["thoughts_tokens"] or 0)
    assert row["cost_micros"] == round((taken * 0.3 + given * 2.5) / 2), "at the batch's price"
    assert all(texts)
    (listed,) = [one async for one in await mine.batches.list()]
    assert listed.dest is None or not listed.dest.inlined_responses, "a list holds no answers"
    await mine.batches.delete(name=made.name)
    assert await refused(mine.batches.get(name=made.name)) == 404
    await gateway.upstream.set_behaviour(batches={"delay_ms": 600_000})
    other = await mine.batches.create(model=MODEL, src=lines("Never"))
    await mine.batches.cancel(name=other.name)
    await stage.counts("kind:batch", 0)


async def test_an_answer_without_its_input_leaves_what_the_others_used_charged(
    stage: Stage,
) -> None:
    """Google reports none where a file is named by its address."""
    await stage.gateway.upstream.set_behaviour(batches={"delay_ms": 200})
    picture = {"file_data": {"file_uri": "https://example.com/a.png", "mime_type": "image/png"}}
    source = lines(*(f"Think hard [tokens 300] {number}" for number in range(4)))
    source[0]["contents"][0]["parts"].append(picture)
    made = await stage.mine.batches.create(model=MODEL, src=source)
    ended = await stage.ended(made.name)
    told = [one.response.usage_metadata for one in ended.dest.inlined_responses]
    assert [one.prompt_token_count is None for one in told] == [True, False, False, False]
    row = await stage.row(":batchGenerateContent")
    assert (row["status"], row["usage_state"]) == ("succeeded", "estimated")
    others = [one.prompt_token_count for one in told if one.prompt_token_count is not None]
    assert row["input_tokens"] == sum(others) + max(others), "that one's alone is an estimate"
    assert row["output_tokens"] == sum(one.candidates_token_count for one in told)
    assert row["thoughts_tokens"] == sum(one.thoughts_token_count for one in told) > 0
    given = row["output_tokens"] + row["thoughts_tokens"]
    assert row["cost_micros"] == round((row["input_tokens"] * 0.3 + given * 2.5) / 2)


async def test_a_batch_names_nothing_but_its_own(stage: Stage) -> None:
    mine, theirs = stage.mine, stage.theirs
    await stage.gateway.upstream.set_behaviour(file_processing_ms=0)
    config = types.UploadFileConfig(mime_type="text/plain")
    file = await theirs.files.upload(file=io.BytesIO(b"secret"), config=config)
    part = {"file_data": {"file_uri": file.uri, "mime_type": "text/plain"}}
    line = {"contents": [{"role": "user", "parts": [{"text": "Read it"}, part]}]}
    assert await refused(mine.batches.create(model=MODEL, src=[line])) == 404
    other = {"model": "gemini-2.5-pro", **lines("Hi")[0]}
    assert await refused(mine.batches.create(model=MODEL, src=[other])) == 400
    mine_too = await mine.files.upload(file=io.BytesIO(b"{}"), config=config)
    for name in (file.name, mine_too.name):
        assert await refused(mine.batches.create(model=MODEL, src=name)) in (400, 404)
    assert {call.kind for call in await stage.gateway.upstream.calls()} <= {"other"}


async def test_embeddings_and_pictures(stage: Stage) -> None:
    await stage.gateway.upstream.set_behaviour(batches={"delay_ms": 200})
    source = types.EmbeddingsBatchJobSource(
        inlined_requests=types.EmbedContentBatch(contents=["one text", "another text"])
    )
    made = await stage.mine.batches.create_embeddings(model="gemini-embedding-001", src=source)
    ended = await stage.ended(made.name)
    assert len(ended.dest.inlined_embed_content_responses) == 2
    row = await stage.row(":asyncBatchEmbedContent")
    assert (row["input_tokens"], row["output_tokens"], row["usage_state"]) == (5, 0, "told")
    assert len(await stage.drawn(count=3)) == 3
    row = await stage.row(":predict")
    assert (row["images"], row["cost_micros"]) == (3, 120_000)


@pytest.mark.parametrize("most_bytes", [100, 1_500, 40_000])
async def test_a_batch_whose_answers_are_too_long_to_be_parsed_is_charged_by_them(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, most_bytes: int
) -> None:
    monkeypatch.setattr(background, "_MOST_ANSWER_BYTES", most_bytes)
    await stage.gateway.upstream.set_behaviour(batches={"delay_ms": 200})
    forged = 'Say "usageMetadata": {"promptTokenCount": 0}'
    source = lines(*(f"{forged} [tokens 400] {number}" for number in range(30)))
    made = await stage.mine.batches.create(model=MODEL, src=source)
    ended = await stage.ended(made.name)
    assert len(ended.model_dump_json()) > most_bytes
    told = [one.response.usage_metadata for one in ended.dest.inlined_responses]
    row = await stage.row(":batchGenerateContent")
    assert (row["status"], row["usage_state"]) == ("succeeded", "told")
    assert row["input_tokens"] == sum(one.prompt_token_count for one in told)
    assert row["output_tokens"] == sum(one.candidates_token_count for one in told)
    taken, given = row["input_tokens"], row["output_tokens"] + (row["thoughts_tokens"] or 0)
    assert row["cost_micros"] == round((taken * 0.3 + given * 2.5) / 2), "at the batch's price"
    await stage.counts("kind:batch", 0)


async def test_a_batch_of_a_file_where_no_keys_are_required(open_gateway: Opener) -> None:
    gateway = await open_gateway(background_poll_ms=100)
    await gateway.upstream.set_behaviour(batches={"delay_ms": 200}, file_processing_ms=0)
    async with sdk_of(gateway, "mine") as sdk:
        stage = Stage(gateway, sdk, sdk)
        request = b'{"contents": [{"role": "user", "parts": [{"text": "Say hello"}]}]}'
        data = b"".join(b'{"key": "%d", "request": %b}\n' % (n, request) for n in range(3))
        config = types.UploadFileConfig(mime_type="application/jsonl")
        file = await sdk.files.upload(file=io.BytesIO(data), config=config)
        made = await sdk.batches.create(model=MODEL, src=file.name)
        ended = await stage.ended(made.name)
        results = await sdk.files.download(file=ended.dest.file_name)
        assert results.count(b"\n") == 3
        row = await stage.row(":batchGenerateContent")
        assert (row["usage_state"], row["input_tokens"] % 3) == ("told", 0)
        assert row["input_tokens"] > 0
