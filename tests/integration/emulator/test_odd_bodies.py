"""JSON of another shape than an API's: refused or ignored, and never a fault of the emulator."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tidegate.emulator.server import Emulator

OPENAI = {"Authorization": "Bearer k"}
ANTHROPIC = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
GEMINI = {"x-goog-api-key": "k"}
ODD: Any = {"type": [None]}
SAY = [{"parts": [{"text": "hi"}]}]
CONVERSE, COUNT = "/model/anthropic.claude-x/converse", "/model/anthropic.claude-x/count-tokens"
USER: Any = [{"role": "user", "content": [{"text": "hi"}]}]


def turn(content: Any) -> Any:
    return [{"role": "user", "content": content}]


# A call of a function of which the bound leaves half.
SHORT: Any = {
    "model": "gemini-2.5-flash",
    "input": "get weather",
    "tools": [{"type": "function", "name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}],
    "generation_config": {"max_output_tokens": 1},
}  # fmt: skip


CASES: list[tuple[str, dict[str, str], Any]] = [
    ("/v1/chat/completions", OPENAI, {"model": "gpt-5", "messages": turn([ODD])}),
    ("/v1/responses", OPENAI, {"model": "gpt-5", "input": turn([ODD])}),
    ("/v1/responses", OPENAI, {"model": "gpt-5", "input": "x", "previous_response_id": [None]}),
    ("/v1/conversations", OPENAI, []),
    ("/v1/conversations", OPENAI, {"items": [None]}),
    ("/v1/uploads", OPENAI, []),
    ("/v1/rerank", OPENAI, {"model": "m", "query": "q", "documents": ["a"], "top_n": "x"}),
    ("/v1/messages", ANTHROPIC, {"model": "m", "max_tokens": 5, "messages": turn([ODD])}),
    (CONVERSE, OPENAI, {"messages": USER, "toolConfig": 5}),
    (CONVERSE, OPENAI, {"messages": USER, "toolConfig": {"toolChoice": 5}}),
    (CONVERSE, OPENAI, {"messages": USER, "toolConfig": {"tools": [{"toolSpec": ODD}]}}),
    (CONVERSE, OPENAI, {"messages": USER, "inferenceConfig": 5}),
    (CONVERSE, OPENAI, {"messages": USER, "system": None}),
    (CONVERSE, OPENAI, {"messages": "x"}),
    (CONVERSE, OPENAI, {"messages": turn([{"image": None}])}),
    (CONVERSE, OPENAI, {"messages": turn([{"toolResult": {"content": ["x"]}}])}),
    (COUNT, OPENAI, ODD),
    (COUNT, OPENAI, {"input": {"converse": None}}),
    ("/v1beta/models/imagen:predict", GEMINI, {"instances": [], "parameters": 5}),
    (
        "/v1beta/models/imagen:predict",
        GEMINI,
        {"instances": [], "parameters": {"sampleCount": None}},
    ),
    (
        "/v1beta/models/veo:predictLongRunning",
        GEMINI,
        {"instances": [{"prompt": "x"}], "parameters": 5},
    ),
    ("/v1/rerank", OPENAI, {"model": "m", "query": "q", "documents": [None]}),
    (
        "/v1beta/models/gemini-2.5-flash:generateContent",
        GEMINI,
        {"contents": SAY, "tools": [{"functionDeclarations": 5}]},
    ),
]
IGNORED: list[tuple[str, dict[str, str], Any]] = [
    ("/v1/moderations", OPENAI, {"model": "m", "input": [{"type": "text", "text": "x"}, None]}),
    ("/v1beta/interactions", GEMINI, {"model": "gemini-2.5-flash", "input": "hi", "tools": 5}),
    *(("/v1beta/interactions", GEMINI, SHORT | {"stream": streamed}) for streamed in (False, True)),
    (
        "/v1beta/models/gemini-2.5-flash:generateContent",
        GEMINI,
        {"contents": SAY, "generationConfig": {"responseMimeType": "application/json",
                                               "responseSchema": {"enum": 5}}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("cases", "expected"), [(CASES, 400), (IGNORED, 200)])
async def test_json_of_another_shape_is_no_fault_of_the_emulator(
    emulator: Emulator, cases: list[tuple[str, dict[str, str], Any]], expected: int
) -> None:
    async with httpx2.AsyncClient(base_url=emulator.url) as client:
        answers = [
            (path, body, (await client.post(path, headers=headers, json=body)).status_code)
            for path, headers, body in cases
        ]
    assert [one for one in answers if one[2] != expected] == []


async def test_a_query_that_is_no_number_is_no_fault_of_the_emulator(emulator: Emulator) -> None:
    async with httpx2.AsyncClient(base_url=emulator.url) as client:
        made = await client.post("/v1/responses", headers=OPENAI, json={"model": "m", "input": "x"})
        kept = f"/v1/responses/{made.json()['id']}"
        paths = {
            f"{kept}?stream=true&starting_after=x": OPENAI,
            f"{kept}/input_items?limit=-1": OPENAI,
            "/v1/chat/completions?limit=x": OPENAI,
            "/v1beta/cachedContents?pageSize=x": GEMINI,
        }
        answers = [
            (await client.get(path, headers=headers)).status_code for path, headers in paths.items()
        ]
    assert answers == [400] * len(paths)
