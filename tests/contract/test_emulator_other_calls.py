"""The unmodified google-genai SDK against the emulator: files, models, keys, bad requests."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.contract.gemini_sdk import MODEL, PNG, call, emulator, sdk
from tests.waiting import wait_until
from tidegate.emulator.client import EmulatorControl
from tidegate.emulator.server import Emulator
from tidegate.emulator.state import Billed

if TYPE_CHECKING:
    from google.genai import Client

__all__ = ["emulator", "sdk"]


async def test_counting_says_what_generating_will_charge(sdk: Client) -> None:
    from google.genai.types import Part

    contents = ["Describe it", Part.from_bytes(data=PNG, mime_type="image/png")]
    counted = await sdk.aio.models.count_tokens(model=MODEL, contents=contents)
    answer = await sdk.aio.models.generate_content(model=MODEL, contents=contents)
    assert answer.usage_metadata is not None
    assert counted.total_tokens == answer.usage_metadata.prompt_token_count == 3 + 258


async def test_embeddings_are_of_length_one_and_repeatable(sdk: Client) -> None:
    first, second = [
        await sdk.aio.models.embed_content(model="gemini-embedding-001", contents=["a", "b"])
        for _ in range(2)
    ]
    assert first.embeddings is not None
    assert len(first.embeddings) == 2
    values = first.embeddings[0].values or []
    assert sum(value * value for value in values) == pytest.approx(1)
    assert first.embeddings == second.embeddings
    assert first.embeddings[0] != first.embeddings[1]


async def test_one_content_can_be_embedded_alone(emulator: Emulator) -> None:
    body = {"content": {"parts": [{"text": "a"}]}, "outputDimensionality": 16}
    path = "/v1beta/models/gemini-embedding-001:embedContent"
    status, answer = await call(emulator, path, body)
    assert status == 200
    assert len(answer["embedding"]["values"]) == 16


async def test_what_is_embedded_counts_and_is_reported_by_the_model_that_does(
    emulator: Emulator,
) -> None:
    one = {"content": {"parts": [{"text": "eight characters"}]}, "outputDimensionality": 2}
    for model in ("gemini-embedding-001", "gemini-embedding-2"):
        for action, body, tokens in (
            ("embedContent", one, 4),
            ("batchEmbedContents", {"requests": [one] * 2}, 8),
        ):
            await emulator.control.reset()
            _, answer = await call(emulator, f"/v1beta/models/{model}:{action}", body)
            told = answer.get("usageMetadata")
            details = [{"modality": "TEXT", "tokenCount": tokens}]
            usage = {"promptTokenCount": tokens, "promptTokenDetails": details}
            assert told == (usage if model.endswith("2") else None)
            assert (await emulator.control.stats()).billed() == Billed(1, tokens)
    limit = {"unit": "input_tokens", "bound": 4}
    await emulator.control.set_behaviour(account={"provider": "gemini", "limits": [limit]})
    path = "/v1beta/models/gemini-embedding-001:embedContent"
    assert [(await call(emulator, path, one))[0] for _ in range(2)] == [200, 429]


async def test_models_are_listed_and_described(sdk: Client) -> None:
    names = [model.name async for model in await sdk.aio.models.list()]
    assert f"models/{MODEL}" in names
    assert (await sdk.aio.models.get(model=MODEL)).name == f"models/{MODEL}"


async def test_an_unknown_model_is_not_found_when_models_are_strict(
    sdk: Client, emulator: Emulator
) -> None:
    from google.genai.errors import ClientError

    await emulator.control.set_behaviour(strict_models=True)
    with pytest.raises(ClientError) as failed:
        await sdk.aio.models.generate_content(model="gemini-0", contents="x")
    assert failed.value.code == 404
    assert (await sdk.aio.models.generate_content(model=MODEL, contents="x")).text


UPLOADS: list[tuple[str, int]] = [("empty", 0), ("small", 1000), ("two pieces", 9_000_000)]


@pytest.mark.parametrize(("name", "size"), UPLOADS, ids=[name for name, _ in UPLOADS])
async def test_a_file_is_uploaded_processed_used_and_deleted(
    sdk: Client, emulator: Emulator, name: str, size: int
) -> None:
    from google.genai.errors import ClientError
    from google.genai.types import UploadFileConfig

    await emulator.control.set_behaviour(file_processing_ms=1500)
    files = sdk.aio.files
    config = UploadFileConfig(mime_type="image/png", display_name=name)
    file = await files.upload(file=io.BytesIO(b"x" * size), config=config)
    assert file.name is not None
    assert (file.state, file.size_bytes, file.display_name) == ("PROCESSING", size, name)
    with pytest.raises(ClientError, match="not in an ACTIVE state"):
        await sdk.aio.models.generate_content(model=MODEL, contents=["What is it?", file])

    async def active() -> bool:
        return (await files.get(name=file.name or "")).state == "ACTIVE"

    await wait_until(active, 20, "the file is active")
    answer = await sdk.aio.models.generate_content(model=MODEL, contents=["What is it?", file])
    assert f"image/png ({size} bytes)" in (answer.text or "")
    assert [listed.name async for listed in await files.list()] == [file.name]
    await files.delete(name=file.name)
    with pytest.raises(ClientError) as failed:
        await files.get(name=file.name)
    assert failed.value.code == 403


async def test_the_synchronous_sdk_uploads_a_path(sdk: Client, tmp_path: Path) -> None:
    path = tmp_path / "note.txt"
    path.write_bytes(b"hello")
    file = await asyncio.to_thread(sdk.files.upload, file=path)
    assert (file.size_bytes, file.mime_type) == (5, "text/plain")


async def test_files_are_listed_page_by_page(sdk: Client) -> None:
    from google.genai.types import ListFilesConfig, UploadFileConfig

    config = UploadFileConfig(mime_type="text/plain")
    made = {
        (await sdk.aio.files.upload(file=io.BytesIO(b"x"), config=config)).name for _ in range(5)
    }
    pager = await sdk.aio.files.list(config=ListFilesConfig(page_size=2))
    assert {file.name async for file in pager} == made


KEYS: list[tuple[str, int, str]] = [
    ("", 403, "PERMISSION_DENIED"),
    ("invalid-key", 400, "INVALID_ARGUMENT"),
]


@pytest.mark.parametrize(("key", "status", "name"), KEYS)
async def test_a_missing_or_invalid_key_is_refused(
    emulator: Emulator, key: str, status: int, name: str
) -> None:
    body = {"contents": [{"parts": [{"text": "Hello"}]}]}
    found, answer = await call(emulator, f"/v1beta/models/{MODEL}:generateContent", body, key)
    assert (found, answer["error"]["code"], answer["error"]["status"]) == (status, status, name)
    assert (await emulator.control.stats())["text_only"].arrived == 0


async def test_a_key_in_the_query_is_as_good(emulator: Emulator) -> None:
    body = {"contents": [{"parts": [{"text": "Hello"}]}]}
    status, _ = await call(emulator, f"/v1beta/models/{MODEL}:generateContent?key=k", body, "")
    assert status == 200


BAD_BODIES: list[Any] = [
    [],
    {},
    {"contents": []},
    {"contents": "Hello"},
    {"contents": ["Hello"]},
    {"contents": [{"parts": ["Hello"]}]},
    {"contents": [{"parts": [{"text": 5}]}]},
    {"contents": [{"parts": [{"inlineData": {"mimeType": "image/png", "data": "AAAAA"}}]}]},
    {"contents": [{"parts": [{"text": "x"}]}], "generationConfig": []},
    {"contents": [{"parts": 7}]},
]


@pytest.mark.parametrize("body", BAD_BODIES, ids=str)
async def test_a_body_that_makes_no_sense_is_an_invalid_argument(
    emulator: Emulator, body: Any
) -> None:
    status, answer = await call(emulator, f"/v1beta/models/{MODEL}:generateContent", body)
    assert (status, answer["error"]["status"]) == (400, "INVALID_ARGUMENT")


async def test_an_unknown_path_is_a_404_in_googles_words(emulator: Emulator) -> None:
    status, answer = await call(emulator, "/v1beta/models/m:sing", {})
    assert (status, answer["error"]["status"]) == (404, "NOT_FOUND")


async def test_behaviour_and_faults_that_make_no_sense_change_nothing(emulator: Emulator) -> None:
    from tidegate.errors import InvalidRequest

    control: EmulatorControl = emulator.control
    wrong: list[Callable[[], Any]] = [
        lambda: control.set_behaviour(chunks=0),
        lambda: control.set_behaviour(chunks=3, nonsense=1),
        lambda: control.set_behaviour(concurrency={"text": 1}),
        lambda: control.set_behaviour(rates=[{"scope": "total"}]),
        lambda: control.set_behaviour(first_byte_ms={"uniform": [1]}),
        lambda: control.set_fault("earthquake"),
        lambda: control.set_fault("hang", kind="text"),
        lambda: control.set_fault("hang", count="many"),
    ]
    for order in wrong:
        with pytest.raises(InvalidRequest):
            await order()
    _, answer = await call(
        emulator,
        f"/v1beta/models/{MODEL}:streamGenerateContent",
        {"contents": [{"parts": [{"text": "x"}]}]},
    )
    assert len(answer) == 4
