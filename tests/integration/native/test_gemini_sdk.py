"""The unmodified google-genai SDK through the gateway: only its base URL is another one."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest
from google.genai import Client, errors, types

from tests.gateway import KEY, PNG, Gateway, Opener
from tests.integration.native.conftest import MODEL, MakeSdk
from tests.integration.tenants.asking import key_of
from tidegate.dialects.spec import Dialect
from tidegate.http.guards import _signature
from tidegate.store.tenants import digest_of


async def test_a_whole_answer(gateway: Gateway, genai: MakeSdk) -> None:
    answer = await genai(gateway).aio.models.generate_content(model=MODEL, contents="Say hello")
    assert "Say hello" in (answer.text or "")
    assert answer.usage_metadata is not None
    (call,) = await gateway.calls()
    assert (call.kind, call.model, call.outcome) == ("text_only", MODEL, "finished")


async def test_the_synchronous_client(gateway: Gateway, genai: MakeSdk) -> None:
    client = genai(gateway)
    answer = await asyncio.to_thread(
        client.models.generate_content, model=MODEL, contents="Say hello"
    )
    assert answer.text


async def test_a_stream_comes_piece_by_piece(gateway: Gateway, genai: MakeSdk) -> None:
    await gateway.upstream.set_behaviour(chunks=4)
    chunks = [
        chunk
        async for chunk in await genai(gateway).aio.models.generate_content_stream(
            model=MODEL, contents="Tell me a story"
        )
    ]
    assert len(chunks) == 4
    assert chunks[-1].usage_metadata is not None


async def test_pictures_in_and_out(gateway: Gateway, genai: MakeSdk) -> None:
    client = genai(gateway)
    part = types.Part.from_bytes(data=PNG, mime_type="image/png")
    await client.aio.models.generate_content(model=MODEL, contents=["What is it?", part])
    made = await client.aio.models.generate_content(
        model="gemini-2.5-flash-image",
        contents="Draw a cat",
        config=types.GenerateContentConfig(response_modalities=["TEXT", "IMAGE"]),
    )
    assert any(part.inline_data for part in made.parts or [])
    kinds = [call.kind for call in await gateway.calls()]
    assert sorted(kinds) == ["image_generation", "multi_modal"]


async def test_structured_output(gateway: Gateway, genai: MakeSdk) -> None:
    answer = await genai(gateway).aio.models.generate_content(
        model=MODEL,
        contents="A colour",
        config=types.GenerateContentConfig(
            response_mime_type="application/json",
            response_json_schema={"type": "object", "properties": {"colour": {"type": "string"}}},
        ),
    )
    assert (answer.text or "").startswith("{")


async def test_counting_embedding_and_the_list_of_models(gateway: Gateway, genai: MakeSdk) -> None:
    client = genai(gateway)
    counted = await client.aio.models.count_tokens(model=MODEL, contents="a b c d")
    assert counted.total_tokens
    embedded = await client.aio.models.embed_content(
        model="gemini-embedding-001", contents=["one", "two"]
    )
    assert len(embedded.embeddings or []) == 2
    names = [model.name async for model in await client.aio.models.list()]
    assert f"models/{MODEL}" in names


async def test_files_are_uploaded_without_a_sight_of_the_key(
    gateway: Gateway, genai: MakeSdk
) -> None:
    await gateway.upstream.set_behaviour(file_processing_ms=0)
    client = genai(gateway)
    data = b"%PDF-1.4 " + b"x" * 300_000
    file = await client.aio.files.upload(
        file=io.BytesIO(data), config=types.UploadFileConfig(mime_type="application/pdf")
    )
    assert file.size_bytes == len(data)
    assert file.name
    assert file.uri == f"https://generativelanguage.googleapis.com/v1beta/{file.name}"
    answer = await client.aio.models.generate_content(model=MODEL, contents=["Sum it up", file])
    assert answer.text
    assert (await client.aio.files.get(name=file.name)).name == file.name
    await client.aio.files.delete(name=file.name)
    begin = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
    async with gateway.http.post(f"{gateway.url}/upload/v1beta/files", headers=begin) as response:
        own = response.headers["X-Goog-Upload-URL"]
    assert own.startswith(gateway.url)
    assert "key=" not in own
    begin |= {"X-Forwarded-Proto": "https"}  # behind a proxy that ends TLS
    async with gateway.http.post(f"{gateway.url}/upload/v1beta/files", headers=begin) as response:
        own = response.headers["X-Goog-Upload-URL"]
    assert own.startswith(gateway.url.replace("http://", "https://"))


async def test_a_stream_that_is_kept_alive_while_it_waits(
    open_gateway: Opener, genai: MakeSdk
) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 1}, keep_alive_after_ms=10)
    await gateway.upstream.set_fault("hang", match="hold it", count=1)
    client = genai(gateway).aio.models
    holding = asyncio.create_task(client.generate_content(model=MODEL, contents="hold it"))
    await gateway.in_flight(1)
    url = f"{gateway.url}/v1beta/models/{MODEL}:streamGenerateContent?alt=sse"
    body = {"contents": [{"parts": [{"text": "Hi"}]}]}
    async with gateway.http.post(url, json=body) as first:  # answered while the SDK waits
        assert (await first.content.readline()) == b"\n"
        stream = await client.generate_content_stream(model=MODEL, contents="Say hello")
        holding.cancel()
        assert "Say hello" in "".join([chunk.text or "" async for chunk in stream])


async def test_files_are_uploaded_where_keys_are_asked_for(open_gateway: Opener) -> None:
    # The SDK sends the bytes without its key, to the URL that it was told.
    gateway = await open_gateway(worker=False, auth="on")
    key = (await key_of(gateway, "acme"))["Authorization"].removeprefix("Bearer ")
    client = Client(api_key=key, http_options=types.HttpOptions(base_url=gateway.url))
    config = types.UploadFileConfig(mime_type="text/plain")
    file = await client.aio.files.upload(file=io.BytesIO(b"x" * 9_000), config=config)
    assert file.size_bytes == 9_000
    assert (await asyncio.to_thread(client.files.upload, file=io.BytesIO(b"y"), config=config)).name
    await client.aio.aclose()
    client.close()


async def test_an_uploads_pass_is_good_for_that_upload_and_while_its_key_works(
    open_gateway: Opener, tmp_path: Path
) -> None:
    policy = tmp_path / "tidegate.toml"
    dialects = ", ".join(f'{name} = "http://127.0.0.1:9"' for name in Dialect)
    other = f'[upstreams.other]\nauth = "none"\ndialects = {{ {dialects} }}\n'
    policy.write_text(f"[upstreams.gemini]\n{other}")
    gateway = await open_gateway(worker=False, auth="on", tidegate_policy=policy)
    acme = await key_of(gateway, "acme")
    key = acme["Authorization"].removeprefix("Bearer ")

    async def post(url: str, command: str, **headers: str) -> tuple[int, str]:
        said = {"X-Goog-Upload-Command": command, "X-Goog-Upload-Protocol": "resumable"}
        async with gateway.http.post(url, headers=said | headers, data=b"") as response:
            return response.status, response.headers.get("x-goog-upload-url", "")

    begun = [
        await post(f"{gateway.url}/upload/v1beta/files{query}", "start", **acme)
        for query in ("", "?tidegate_upstream=other")  # a client chooses no account
    ]
    assert [status for status, _ in begun] == [200, 200]
    (first, passed), (second, _) = [url.rsplit("&tidegate_key=", 1) for _, url in begun]
    assert all("&tidegate_upstream=gemini&" in url for url in (first, second))
    assert key not in passed
    assert (await post(f"{first}&tidegate_key={passed}", "upload"))[0] == 200
    for wrong in (
        first,
        f"{second}&tidegate_key={passed}",
        f"{first}&tidegate_key={passed[:-1]}{'0' if passed[-1] != '0' else '1'}",
        f"{first}&tidegate_key={passed}&tidegate_key={passed}",
        f"{first}&tidegate_key=nobody1234{passed[10:]}",
    ):
        assert (await post(wrong, "upload"))[0] == 401, wrong
    # A URL of an earlier version has no mark: its pass shows that its upstream is ours.
    old = "upload_id=1&tidegate_upstream=other"
    for query, status in ((old, 502), (old.replace("other", "gemini"), 401)):
        signed = f"{passed[:10]}.{_signature(old, digest_of(key.encode()), KEY)}"
        url = f"{gateway.url}/upload/v1beta/files?{query}&tidegate_key={signed}"
        assert (await post(url, "upload"))[0] == status, query
    for path in ("/v1beta/models", "/v1beta/files", "/usage"):
        url = f"{gateway.url}{path}?{first.partition('?')[2]}&tidegate_key={passed}"
        async with gateway.http.get(url) as response:
            assert response.status == 401, path
    await gateway.services.store.tenants.revoke_key(passed[:10], by="test")
    assert (await post(f"{first}&tidegate_key={passed}", "upload"))[0] == 401


async def test_errors_are_what_the_sdk_knows(open_gateway: Opener, genai: MakeSdk) -> None:
    gateway = await open_gateway(worker=False, rate_limits={"text_only": 0})
    with pytest.raises(errors.ClientError) as refused:
        await genai(gateway).aio.models.generate_content(model=MODEL, contents="Say hello")
    assert refused.value.code == 400
    assert "kind:text_only" in str(refused.value)
    with pytest.raises(errors.ClientError) as unknown:
        await genai(gateway).aio.models.generate_content(
            model=MODEL, contents=[types.Part.from_bytes(data=PNG, mime_type="")]
        )
    assert unknown.value.code == 400
