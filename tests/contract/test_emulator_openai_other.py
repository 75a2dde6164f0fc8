"""The unmodified OpenAI SDK against the emulator: responses, embeddings, pictures, models, keys."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from tests.contract.openai_sdk import MODEL, ask, client, emulator, sdk, sync_client, user
from tidegate.emulator.server import Emulator

if TYPE_CHECKING:
    from openai import AsyncOpenAI

__all__ = ["emulator", "sdk"]
GEMINI = "gemini-2.5-flash"


async def post(
    emulator: Emulator, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    headers = {"Authorization": "Bearer k"} if headers is None else headers
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{emulator.url}{path}", data=json.dumps(body)) as response,
    ):
        assert response.headers["x-tidegate-emulator"] == "1"
        return response.status, await response.json()


async def test_a_response_has_text_and_usage(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    response = await sdk.responses.create(model=MODEL, instructions="Be kind", input="Why rain?")
    assert "Why rain?" in response.output_text
    assert (response.status, response.model, response.instructions) == (
        "completed",
        MODEL,
        "Be kind",
    )
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (4, len(response.output_text.split()))
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    (call,) = await emulator.control.calls()
    assert (call.kind, call.method, call.output_tokens) == (
        "text_only",
        "generate",
        usage.output_tokens,
    )


async def test_a_streamed_response_ends_in_the_whole_one(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    await emulator.control.set_behaviour(chunks=3)
    whole = await sdk.responses.create(model=MODEL, input="Hello")
    stream = await sdk.responses.create(model=MODEL, input="Hello", stream=True)
    events = [event async for event in stream]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    last = events[-1]
    assert last.type == "response.completed"
    assert (last.response.output_text, last.response.usage) == (whole.output_text, whole.usage)
    calls = await emulator.control.calls()
    assert [call.method for call in calls] == ["generate", "stream"]
    assert calls[0].output_tokens == calls[1].output_tokens > 0


async def test_an_item_of_its_thoughts_comes_before_the_message(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    include: Any = ["reasoning.encrypted_content"]
    whole = await sdk.responses.create(model="gpt-5", input="Hello", include=include)
    assert [item.type for item in whole.output] == ["reasoning", "message"]
    stream = await sdk.responses.create(model="gpt-5", input="Hello", stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    items = [
        (event.type.rpartition(".")[2], event.output_index, event.item.type)
        for event in events
        if event.type in ("response.output_item.added", "response.output_item.done")
    ]
    assert items == [
        (end, place, kind)
        for place, kind in enumerate(("reasoning", "message"))
        for end in ("added", "done")
    ]
    last = events[-1]
    assert last.type == "response.completed"
    assert [item.type for item in last.response.output] == ["reasoning", "message"]
    sealed = [whole.output[0], last.response.output[0]]
    assert [getattr(item, "encrypted_content", None) is None for item in sealed] == [False, True]
    calls = await emulator.control.calls()
    assert calls[0].output_tokens == calls[1].output_tokens > calls[1].thoughts_tokens > 0


async def test_a_response_cut_by_its_bound_is_incomplete(sdk: AsyncOpenAI) -> None:
    short = await sdk.responses.create(model=MODEL, input="Hello", max_output_tokens=2)
    assert short.status == "incomplete"
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    stream = await sdk.responses.create(
        model=MODEL, input="Hello", max_output_tokens=2, stream=True
    )
    events = [event async for event in stream]
    assert [event.type for event in events[-2:]] == [
        "response.output_item.done",
        "response.incomplete",
    ]
    for item in (short.output[0], events[-2].item, events[-1].response.output[0]):
        assert (item.type, item.status) == ("message", "incomplete")


async def test_a_response_calls_functions_and_hears_their_output(sdk: AsyncOpenAI) -> None:
    tool: Any = {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "strict": False,
    }
    given: list[Any] = user("Please get weather of Oslo")
    async with sdk.responses.stream(model=MODEL, input=given, tools=[tool]) as stream:
        names = [event.type async for event in stream]
        response = await stream.get_final_response()
    assert names.count("response.function_call_arguments.delta") > 1
    (call,) = response.output
    assert call.type == "function_call"
    assert (call.name, bool(json.loads(call.arguments)["city"])) == ("get_weather", True)
    given += [
        call.to_dict(),
        {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"},
    ]
    second = await sdk.responses.create(model=MODEL, input=given, tools=[tool])
    assert "22 degrees" in second.output_text


async def test_a_response_reads_files_and_a_schema(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    from pydantic import BaseModel

    class Seen(BaseModel):
        what: str
        sure: bool

    content: Any = [
        {"type": "input_text", "text": "What is it?"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "auto"},
        {"type": "input_file", "file_url": "https://example.com/a.pdf"},
    ]
    response = await sdk.responses.parse(model=MODEL, input=user(content), text_format=Seen)
    assert response.output_parsed is not None
    assert response.output_parsed.what
    assert (await emulator.control.stats())["multi_modal"].finished == 1


async def test_embeddings_come_as_base64_and_as_floats(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    model = "text-embedding-3-small"
    packed = await sdk.embeddings.create(model=model, input=["a", "b"])
    plain = await sdk.embeddings.create(model=model, input=["a", "b"], encoding_format="float")
    assert [item.index for item in packed.data] == [0, 1]
    assert len(packed.data[0].embedding) == 1536
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert plain.data[0].embedding != plain.data[1].embedding
    assert (plain.usage.prompt_tokens, plain.usage.total_tokens) == (2, 2)
    body = {"model": model, "input": "a", "encoding_format": "base64", "dimensions": 8}
    _, answer = await post(emulator, "/v1/embeddings", body)
    assert len(b64decode(answer["data"][0]["embedding"])) == 8 * 4
    numbers = await sdk.embeddings.create(model=model, input=[[1, 2, 3], [4]])
    assert numbers.usage.prompt_tokens == 4
    stats = await emulator.control.stats()
    assert (stats["other"].finished, stats.in_flight) == (4, 0)
    assert stats.billed("finished", model).input_tokens == 2 + 2 + 1 + 4


async def test_pictures_are_drawn_and_charged_one_by_one(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    await emulator.control.set_behaviour(image_size=16)
    drawn = await sdk.images.generate(model="gpt-image-1", prompt="A red fox", n=2)
    assert drawn.data is not None
    pictures = [b64decode(item.b64_json or "") for item in drawn.data]
    assert [picture[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"] * 2
    assert pictures[0] != pictures[1]
    assert drawn.usage is not None
    assert (drawn.usage.input_tokens, drawn.usage.output_tokens) == (3, 2 * 1290)
    stats = await emulator.control.stats()
    assert stats["image_generation"].finished == 1
    assert stats.billed(model="gpt-image-1").output_tokens == 2 * 1290


async def test_models_are_listed_and_described(sdk: AsyncOpenAI, emulator: Emulator) -> None:
    names = [model.id async for model in sdk.models.list()]
    assert {MODEL, GEMINI} <= set(names)
    assert (await sdk.models.retrieve(MODEL)).id == MODEL
    async with client(emulator, "/v1beta/openai") as other:
        assert [model.id async for model in other.models.list()] == names
    assert (await emulator.control.stats())["other"].finished == 3


async def test_the_path_that_several_apis_have_goes_by_the_key(emulator: Emulator) -> None:
    async def listed(headers: dict[str, str], query: str = "") -> Any:
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.get(f"{emulator.url}/v1/models{query}") as response,
        ):
            return await response.json()

    assert (await listed({"Authorization": "Bearer k"}))["object"] == "list"
    assert (await listed({"x-goog-api-key": "k"}))["models"]
    assert (await listed({}, "?key=k"))["models"]
    assert (await listed({"x-goog-api-key": "k", "Authorization": "Bearer k"}))["models"]
    assert (await listed({}))["error"]["status"] == "PERMISSION_DENIED"


async def test_a_missing_or_an_invalid_key_is_refused(emulator: Emulator) -> None:
    from openai import AuthenticationError

    async with client(emulator, api_key="invalid-key") as sdk:
        with pytest.raises(AuthenticationError) as failed:
            await ask(sdk)
    assert failed.value.code == "invalid_api_key"
    body = {"model": MODEL, "messages": user("Hello")}
    status, answer = await post(emulator, "/v1/chat/completions", body, {})
    assert (status, answer["error"]["type"]) == (401, "invalid_request_error")
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert (await emulator.control.stats())["text_only"].arrived == 0


async def test_an_unknown_model_is_not_found_when_models_are_strict(
    sdk: AsyncOpenAI, emulator: Emulator
) -> None:
    from openai import NotFoundError

    await emulator.control.set_behaviour(strict_models=True)
    with pytest.raises(NotFoundError) as failed:
        await sdk.chat.completions.create(model="gpt-0", messages=user("x"))
    assert (failed.value.code, failed.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError):
        await sdk.models.retrieve("gpt-0")
    assert (await ask(sdk)).choices


async def test_the_synchronous_sdk_sees_the_same_errors(emulator: Emulator) -> None:
    from openai import BadRequestError

    def wrong() -> Any:
        with sync_client(emulator) as sdk, pytest.raises(BadRequestError) as failed:
            sdk.chat.completions.create(model=MODEL, messages=[])
        return failed.value

    error = await asyncio.to_thread(wrong)
    assert (error.param, error.type) == ("messages", "invalid_request_error")


CHAT, RESPONSES, EMBED, DRAW = "chat/completions", "responses", "embeddings", "images/generations"
TEXT: dict[str, Any] = {"messages": user("x")}
BAD_BODIES: list[tuple[str, dict[str, Any], str]] = [
    (CHAT, {}, "messages"),
    (CHAT, {"messages": "Hello"}, "messages"),
    (CHAT, {"messages": ["Hello"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
    (CHAT, {"messages": user(5)}, "messages[0].content"),
    (CHAT, {"messages": user(["x"])}, "messages[0].content[0]"),
    (CHAT, {"messages": user([{"type": "dance"}])}, "messages[0].content[0].type"),
    (CHAT, {"messages": user([{"type": "text", "text": 5}])}, "messages[0].content[0].text"),
    (
        CHAT,
        {"messages": user([{"type": "image_url", "image_url": {"url": "fox.png"}}])},
        "messages[0].content[0].image_url",
    ),
    (CHAT, {**TEXT, "max_tokens": 0}, "max_tokens"),
    (CHAT, {**TEXT, "n": 1000}, "n"),
    (CHAT, {**TEXT, "stream": "yes"}, "stream"),
    (CHAT, {**TEXT, "tools": 5}, "tools"),
    (CHAT, {**TEXT, "tools": [{"type": "function"}]}, "tools[0].function.name"),
    (
        CHAT,
        {**TEXT, "tool_choice": {"type": "function", "function": {"name": "f"}}},
        "tool_choice",
    ),
    (CHAT, {**TEXT, "response_format": {"type": "json_schema"}}, "response_format"),
    (RESPONSES, {}, "input"),
    (RESPONSES, {"input": [{"role": "user", "content": 5}]}, "input[0].content"),
    (EMBED, {"input": ""}, "input"),
    (EMBED, {"input": []}, "input"),
    (EMBED, {"input": "x", "encoding_format": "morse"}, "encoding_format"),
    (EMBED, {"input": "x", "dimensions": -1}, "dimensions"),
    (DRAW, {}, "prompt"),
    (DRAW, {"prompt": "x", "n": 0}, "n"),
    ("rerank", {"query": " ", "documents": ["a"]}, "query"),
    ("rerank", {"query": "a", "documents": [5]}, "documents"),
    ("rerank", {"query": "a", "documents": ["a"], "top_n": "x"}, "top_n"),
]


async def test_a_body_that_makes_no_sense_is_refused_by_its_field(emulator: Emulator) -> None:
    for path, body, param in BAD_BODIES:
        status, answer = await post(emulator, f"/v1/{path}", {"model": MODEL, **body})
        assert (status, answer["error"]["param"]) == (400, param), body
        assert answer["error"]["type"] == "invalid_request_error"
    unreadable: list[Any] = [[], {}, {"model": 5}]
    for unread in unreadable:
        status, answer = await post(emulator, "/v1/chat/completions", unread)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), unread
    assert (await emulator.control.stats())["text_only"].arrived == 0


async def test_what_an_answer_cannot_repeat_is_refused(emulator: Emulator) -> None:
    deep: Any = "x"
    for _ in range(400):
        deep = {"a": deep}
    body = {"model": MODEL, "input": "hi", "metadata": deep}
    status, answer = await post(emulator, "/v1/responses", body)
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_parts_of_an_upload_that_are_not_there_are_refused(emulator: Emulator) -> None:
    asked = {"purpose": "user_data", "filename": "a.txt", "bytes": 5, "mime_type": "text/plain"}
    assert (await post(emulator, "/v1/uploads", []))[0] == 400
    _, upload = await post(emulator, "/v1/uploads", asked)
    bodies: list[Any] = [{"part_ids": ["none"]}, {"part_ids": [[]]}, {}, []]
    for body in bodies:
        status, answer = await post(emulator, f"/v1/uploads/{upload['id']}/complete", body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body


@pytest.mark.parametrize(
    "part",
    [
        b'name="image"\r\n\r\n\x89PNG',  # a picture that is sent as a text
        b'name="image"; filename=""\r\n\r\n\x89PNG',
        b'name="image"; filename="a\x01.png"\r\n\r\n\x89PNG',
        b'name="prompt"\r\nContent-Type: text/plain; charset=unknown\r\n\r\nDraw',
        b'name="n"\r\n\r\ntwo',
    ],
)
@pytest.mark.parametrize("path", ["images/edits", "files"])
async def test_a_form_that_makes_no_sense_is_refused(
    emulator: Emulator, part: bytes, path: str
) -> None:
    head = b"--line\r\nContent-Disposition: form-data; "
    prompt = head + b'name="prompt"\r\n\r\nDraw\r\n'
    headers = {"Authorization": "Bearer k", "Content-Type": "multipart/form-data; boundary=line"}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(
            f"{emulator.url}/v1/{path}", data=prompt + head + part + b"\r\n--line--\r\n"
        ) as answer,
    ):
        assert answer.status == 400, await answer.text()
        assert (await answer.json())["error"]["type"] == "invalid_request_error"


async def test_an_unknown_path_is_a_404_in_openais_words(emulator: Emulator) -> None:
    for path in ("/v1beta/openai/sing", "/v1/audio/singing"):
        status, answer = await post(emulator, path, {})
        assert (status, answer["error"]["message"]) == (404, f"Invalid URL (POST {path})")


async def test_azures_header_for_the_key_is_taken(emulator: Emulator) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"{emulator.url}/v1/models", headers={"api-key": "k"}) as answer,
    ):
        assert answer.status == 200


async def test_a_call_names_no_model_where_openai_has_it_optional(sdk: AsyncOpenAI) -> None:
    made = await sdk.images.generate(prompt="A cat")
    assert made.data is not None
    assert made.data[0].b64_json
    saved = await sdk.responses.create(prompt={"id": "pmpt_1"}, input="Say hello")
    assert saved.output_text
