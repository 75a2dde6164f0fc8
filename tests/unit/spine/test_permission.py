"""A tenant may name no model in a body but those that it may ask."""

from __future__ import annotations

from typing import Any

import pytest

from tidegate.call import ANYBODY, Caller
from tidegate.dialects import endpoint_of
from tidegate.dialects.spec import Dialect, Endpoint
from tidegate.errors import Forbidden, InvalidRequest
from tidegate.spine.models import check_body, check_names

CALLER = Caller("acme", models=("gpt-5-mini", "m"))
DEAR = "gpt-image-1"
SCHEMA = {"type": "object", "properties": {"model": {"const": DEAR}, "fallbacks": {}}}


def endpoint(path: str) -> Endpoint:
    found = endpoint_of("POST", path, Dialect.GEMINI)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (
            "/v1/responses",
            {"tools": [{"type": "image_generation", "model": DEAR}]},
            "tools.model",
        ),
        ("/v1/responses", {"tools": [{"type": "image_generation"}]}, "tools.model"),
        ("/v1/responses", {"tools": [{"type": "image_generation", "model": None}]}, "tools.model"),
        (
            "/v1/chat/completions",
            {"tools": [{"type": "openrouter:image_generation", "parameters": {"model": DEAR}}]},
            "tools.parameters.model",
        ),
        ("/v1/chat/completions", {"models": ["m", DEAR]}, "models"),
        ("/v1/chat/completions", {"fallbacks": [DEAR]}, "fallbacks"),
        ("/v1/chat/completions", {"fallbacks": [{"model": DEAR}]}, "fallbacks.model"),
        (
            "/v1/chat/completions",
            {"plugins": [{"id": "auto-router", "allowed_models": [DEAR]}]},
            "plugins.allowed_models",
        ),
        ("/v1/chat/completions", {"web": {"search_model": DEAR}}, "web.search_model"),
        # A `type` makes a client's tool of an entry of `tools`, and of nothing else.
        (
            "/v1/responses",
            {"type": "function", "tools": [{"type": "image_generation", "model": DEAR}]},
            "tools.model",
        ),
        ("/v1/chat/completions", {"type": "custom", "models": ["m", DEAR]}, "models"),
        ("/v1/chat/completions", {"web": {"type": "function", "model": DEAR}}, "web.model"),
        ("/v1/messages", {"tools": [{"type": "advisor_1", "model": DEAR}]}, "tools.model"),
        (
            "/v1beta/models/m:generateContent",
            {"generationConfig": {"routingConfig": {"manualMode": {"modelName": DEAR}}}},
            "generationConfig.routingConfig.manualMode.modelName",
        ),
    ],
)
def test_a_model_within_a_body_must_be_allowed(path: str, body: dict[str, Any], field: str) -> None:
    with pytest.raises(Forbidden) as refused:
        check_body(CALLER, endpoint(path), {"model": "m", **body})
    assert refused.value.field == field
    assert refused.value.allowed == "gpt-5-mini, m"
    check_body(ANYBODY, endpoint(path), {"model": "m", **body})


@pytest.mark.parametrize(
    ("do", "body", "field"),
    [
        ("generateContent", {"model": "models/dear"}, "model"),
        (
            "countTokens",
            {"generateContentRequest": {"model": "models/dear", "contents": []}},
            "generateContentRequest.model",
        ),
        (
            "batchEmbedContents",
            {"requests": [{"model": "models/m"}, {"model": "models/dear"}]},
            "requests.model",
        ),
    ],
)
def test_a_body_of_geminis_dialect_names_the_model_of_its_path_and_no_other(
    do: str, body: dict[str, Any], field: str
) -> None:
    where = endpoint(f"/v1beta/models/m:{do}")
    for caller in (ANYBODY, CALLER):
        with pytest.raises(InvalidRequest) as refused:
            check_body(caller, where, body)
        assert (refused.value.field, refused.value.allowed) == (field, "models/m")
    same = {"model": "models/m", "requests": [{"model": "m"}, 7, {"model": None}]}
    check_body(CALLER, where, same)


def test_what_a_model_reads_and_what_a_client_runs_names_none() -> None:
    function = {"name": "f", "parameters": SCHEMA}
    body = {
        "model": "m",
        "messages": [{"content": [{"model": DEAR}]}],
        "input": [{"model": DEAR}],
        "metadata": {"model": DEAR},
        "text": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        "tools": [
            {"type": "function", "function": function},
            {"type": "function", **function},
            {"name": "f", "input_schema": SCHEMA},
            {"functionDeclarations": [function]},
            {"type": "namespace", "tools": [{"type": "function", "model": DEAR}]},
            {"type": "web_search"},
        ],
        "reasoning": {"effort": "low"},
    }
    check_body(CALLER, endpoint("/v1/responses"), body)


def test_a_body_that_is_too_large_to_be_looked_through_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        check_body(CALLER, endpoint("/v1/responses"), {"model": "m", "x": [[]] * 100_001})


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "m", "tools": [{"model": "gpt-image-1", "model": "m"}]}',
        b'{"model": "m", "tools": [{"model": "gpt-image-1", "m\\u006fdel": "m"}]}',
        b'{"model": "m", "web": {"search_model": "dear", "search_model": "m"}}',
        b'{"model": "m", "fallbacks": ["gpt-image-1"], "fallbacks": []}',
        b'{"model": "m", "tools": [{"type": "image_generation", "type": "function"}]}',
        b'{"model": "m", "tools": [{"type": "image\\u005fgeneration", "type": "mcp"}]}',
        b'{"model": "m", "fallback\\u0073": ["o9"], "fallback\\u0073": ["m"]}',
        '{"model": "m", "fallback\u017f": ["o9"], "fallback\u017f": ["m"]}'.encode(),
    ],
)
def test_an_object_names_its_model_once(raw: bytes) -> None:
    with pytest.raises(InvalidRequest):
        check_names(CALLER, raw)
    check_names(ANYBODY, raw)


def test_objects_of_their_own_name_each_a_model() -> None:
    check_names(CALLER, b'{"model": "m", "tools": [{"model": "m"}, {"a": 1, "a": {"model": "m"}}]}')
    check_names(CALLER, b'{"tools": [{"type": "image_generation"}, {"type": "mcp", "type": "x"}]}')
