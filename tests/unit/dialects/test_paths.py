"""What native paths mean."""

from __future__ import annotations

import pytest

from tidegate.dialects import (
    DIALECTS,
    dialect_of,
    endpoint_in,
    endpoint_of,
    is_known,
    native_path,
)
from tidegate.dialects.spec import Dialect, Operation
from tidegate.policy import providers

VERTEX = "/projects/p/locations/l/publishers"
NONE: frozenset[bytes] = frozenset()


@pytest.mark.parametrize(
    ("method", "path", "dialect", "operation", "below"),
    [
        ("POST", "/v1/chat/completions", "openai", "infer", "/chat/completions"),
        ("POST", "/v1/responses", "openai", "infer", "/responses"),
        ("POST", "/v1/embeddings", "openai", "embed", "/embeddings"),
        ("POST", "/v1/images/generations", "openai", "images", "/images/generations"),
        ("POST", "/v1/responses/compact", "openai", "infer", "/responses/compact"),
        ("POST", "/v1/decisions", "openai", "infer", "/decisions"),
        ("POST", "/v1/responses/input_tokens", "openai", "count", "/responses/input_tokens"),
        ("POST", "/v1/moderations", "openai", "moderate", "/moderations"),
        ("POST", "/v1/rerank", "openai", "rerank", "/rerank"),
        ("POST", "/v1/audio/speech", "openai", "speak", "/audio/speech"),
        ("POST", "/v1/images/edits", "openai", "images", "/images/edits"),
        ("POST", "/v1/audio/translations", "openai", "transcribe", "/audio/translations"),
        ("GET", "/v1/models", "openai", "models", "/models"),
        ("GET", "/v1/models/gpt-x", "openai", "models", "/models/gpt-x"),
        ("POST", "/v1/messages", "anthropic", "infer", "/v1/messages"),
        ("POST", "/upload/v1beta/files", "gemini", "upload", "/upload/v1beta/files"),
        ("GET", "/v1beta/models", "gemini", "models", "/v1beta/models"),
        ("GET", "/v1beta/files/abc-1", "gemini", "files", "/v1beta/files/abc-1"),
        ("DELETE", "/v1beta/files/abc-1", "gemini", "files", "/v1beta/files/abc-1"),
        ("POST", "/v1/files", "openai", "upload", "/files"),
        ("POST", "/v1/uploads/a/parts", "openai", "upload", "/uploads/a/parts"),
        ("POST", "/v1/uploads/a/complete", "openai", "resource", "/uploads/a/complete"),
        ("POST", "/v1/batches/a/cancel", "openai", "resource", "/batches/a/cancel"),
        ("DELETE", "/v1/models/ft:x:a::b", "openai", "resource", "/models/ft:x:a::b"),
        ("POST", "/v1beta/interactions", "gemini", "infer", "/v1beta/interactions"),
        ("POST", "/v1beta/cachedContents", "gemini", "cache", "/v1beta/cachedContents"),
        ("PATCH", "/v1beta/cachedContents/a", "gemini", "resource", "/v1beta/cachedContents/a"),
        ("GET", "/v1beta/interactions/a", "gemini", "resource", "/v1beta/interactions/a"),
        ("GET", "/v1beta/batches", "gemini", "resource", "/v1beta/batches"),
        ("POST", "/v1beta/batches/a:cancel", "gemini", "resource", "/v1beta/batches/a:cancel"),
        (
            *("GET", "/v1beta/models/veo-3.1/operations/a", "gemini", "resource"),
            "/v1beta/models/veo-3.1/operations/a",
        ),
        (
            *("GET", "/download/v1beta/files/a:download", "gemini", "files"),
            "/download/v1beta/files/a:download",
        ),
    ],
)
def test_known_paths(method: str, path: str, dialect: str, operation: str, below: str) -> None:
    found = endpoint_of(method, path, dialect_of(path, NONE, b""))
    assert found is not None
    assert (found.dialect, found.operation) == (dialect, operation)
    assert found.path_for(found.model or "") == below
    assert found.model == ("gpt-x" if below.endswith("gpt-x") else None)
    assert native_path(path) is not None


@pytest.mark.parametrize(
    ("do", "operation", "streams"),
    [
        ("generateContent", Operation.INFER, False),
        ("streamGenerateContent", Operation.INFER, True),
        ("countTokens", Operation.COUNT, False),
        ("embedContent", Operation.EMBED, False),
        ("batchEmbedContents", Operation.EMBED, False),
        ("predictLongRunning", Operation.VIDEO, False),
        ("batchGenerateContent", Operation.BATCH, False),
        ("asyncBatchEmbedContent", Operation.BATCH, False),
        ("somethingOfNextYear", Operation.INFER, False),
    ],
)
@pytest.mark.parametrize("version", ["v1", "v1beta", "v1alpha"])
def test_calls_of_gemini_name_their_model_in_the_path(
    version: str, do: str, operation: Operation, streams: bool
) -> None:
    found = endpoint_of("POST", f"/{version}/models/gemini-x:{do}", Dialect.GEMINI)
    assert found is not None
    assert (found.operation, found.streams, found.model) == (operation, streams, "gemini-x")
    assert found.path_for("other-1") == f"/{version}/models/other-1:{do}"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/fine_tuning/jobs"),
        ("GET", "/v1/responses/resp.1"),
        ("POST", "/v1/responses/resp_1"),
        ("DELETE", "/v1/responses/input_tokens"),
        ("POST", "/v1beta/models/x:fetchPredictOperation"),
        ("POST", "/v1beta/tunedModels/x:transferOwnership"),
        ("POST", "/v1beta/models/x:somethingLongRunning"),
        ("GET", "/v1beta/models/../operations/a"),
        ("POST", "/v1beta/batches"),
        ("POST", "/v1beta/models/a?b:generateContent"),
        ("POST", "/v1beta/models/../files:generateContent"),
        ("PUT", "/v1/chat/completions"),
        ("GET", "/v1/models/a/../b"),
        ("GET", "/v1/models/a/.b"),
        ("GET", "/v1/models/a/b/c/d/e"),
        ("DELETE", "/v1beta/files"),
        ("DELETE", "/v1beta/models/x"),
        ("DELETE", "/v1/models/../files"),
        ("GET", "/upload/v1beta/files"),
        ("PATCH", "/v1beta/fileSearchStores/a"),
        ("POST", "/v1beta/fileSearchStores/a/documents/b"),
        ("POST", "/v1beta/fileSearchStores/a:exportFile"),
        ("POST", "/upload/v1beta/fileSearchStores/a"),
    ],
)
def test_what_is_not_known_is_not_relayed(method: str, path: str) -> None:
    assert endpoint_of(method, path, dialect_of(path, NONE, b"")) is None


def test_a_path_of_two_dialects_is_told_by_the_key() -> None:
    assert dialect_of("/v1/models", NONE, b"") is Dialect.OPENAI
    assert dialect_of("/v1/models", frozenset({b"x-goog-api-key"}), b"") is Dialect.GEMINI
    assert dialect_of("/v1/models", NONE, b"key=abc") is Dialect.GEMINI
    assert dialect_of("/v1/models", frozenset({b"anthropic-version"}), b"") is Dialect.ANTHROPIC


@pytest.mark.parametrize("path", ["/submit", "/llm/stream", "/status/1", "/docs", "/v1", "/v10/x"])
def test_the_products_own_paths_are_not_native(path: str) -> None:
    assert native_path(path) is None


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("/messages", "/v1/messages"),
        ("/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/messages/batches", "/v1/messages/batches"),
        ("/messages/batches/msgbatch_1/results", "/v1/messages/batches/msgbatch_1/results"),
        ("/anthropic/v1/messages/batches/m/cancel", "/v1/messages/batches/m/cancel"),
        ("/models", "/v1/models"),
        ("/models/gpt-x", "/v1/models/gpt-x"),
        ("/models/gemini-x:generateContent", "/v1beta/models/gemini-x:generateContent"),
        ("/v1beta/openai/chat/completions", "/v1/chat/completions"),
        ("/openai/v1/responses", "/v1/responses"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/v1beta/models/x:generateContent", "/v1beta/models/x:generateContent"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//embeddings", "/v1/embeddings"),
        ("/v1/audio/speech", "/v1/audio/speech"),
    ],
)
def test_a_base_url_that_is_one_step_off_leads_to_the_same(path: str, meant: str) -> None:
    assert native_path(path) == meant


@pytest.mark.parametrize(
    "path", ["/", "/submit", "/status/1", "/files/1", "/responsesx", "/models/x/y:z/a", "/v1", "//"]
)
def test_no_path_of_the_product_is_taken_for_one(path: str) -> None:
    assert native_path(path) is None


def test_a_model_s_id_may_hold_slashes_which_stay_escaped() -> None:
    found = endpoint_of("GET", "/v1/models/meta/Llama-3-8B", Dialect.OPENAI)
    assert found is not None
    assert found.model == "meta/Llama-3-8B"
    assert found.path_for(found.model) == "/models/meta%2FLlama-3-8B"


def test_each_dialect_that_settings_may_name_has_one_spec() -> None:
    assert {spec.name for spec in DIALECTS.values()} == set(Dialect) == set(providers.DIALECTS)
    assert all(DIALECTS[dialect].name is dialect for dialect in Dialect)


@pytest.mark.parametrize(
    ("path", "dialect", "below", "model"),
    [
        ("/openai/deployments/d-1/chat/completions", "openai", "/chat/completions", "d-1"),
        ("//openai/deployments/d-1/embeddings", "openai", "/embeddings", "d-1"),
        ("/openai/responses", "openai", "/responses", None),
        (
            "/v1beta1/publishers/google/models/g:countTokens",
            "gemini",
            "/v1beta/models/g:countTokens",
            "g",
        ),
        (
            f"/v1{VERTEX}/google/models/g:generateContent",
            "gemini",
            "/v1/models/g:generateContent",
            "g",
        ),
        (f"/v1{VERTEX}/anthropic/models/c@1:rawPredict", "anthropic", "/v1/messages", "c@1"),
        (f"/v1{VERTEX}/anthropic/models/c@1:streamRawPredict", "anthropic", "/v1/messages", "c@1"),
        (
            f"/v1{VERTEX}/anthropic/models/count-tokens:rawPredict",
            *("anthropic", "/v1/messages/count_tokens", None),
        ),
        ("/anthropic/v1/messages", "anthropic", "/v1/messages", None),
        (
            "/v1/projects/p/locations/l/endpoints/openapi/chat/completions",
            *("openai", "/chat/completions", None),
        ),
    ],
)
def test_paths_of_azures_and_vertexs_clients_lead_to_the_same(
    path: str, dialect: str, below: str, model: str | None
) -> None:
    native = native_path(path)
    assert native is not None
    found, _ = endpoint_in("POST", native, [], b"")
    assert found is not None
    assert (found.dialect, found.path_for(found.model or ""), found.model) == (
        dialect,
        below,
        model,
    )
    assert found.streams == ("stream" in path)


@pytest.mark.parametrize(
    "path",
    [
        "/openai/deployments/d-1/responses",
        "/openai/deployments/../chat/completions",
        "/openai/deployments/d-1/../../admin/limits",
        f"/v1{VERTEX}/meta/models/x:rawPredict",
        f"/v1{VERTEX}/anthropic/models/c:predict",
        f"/v1{VERTEX}/anthropic/models/..:rawPredict",
        "/openai/../admin/limits",
    ],
)
def test_what_no_cloud_s_client_calls_is_not_relayed(path: str) -> None:
    native = native_path(path)
    assert native is None or endpoint_in("POST", native, [], b"")[0] is None


# What clients and agents of the three providers' own hosts call: each is relayed.
RELAYED = {
    "openai": """
        POST /v1/chat/completions
        GET /v1/chat/completions
        GET /v1/chat/completions/chatcmpl-1
        GET /v1/chat/completions/chatcmpl-1/messages
        POST /v1/completions
        POST /v1/responses
        GET /v1/responses/resp_1
        DELETE /v1/responses/resp_1
        POST /v1/responses/resp_1/cancel
        GET /v1/responses/resp_1/input_items
        POST /v1/responses/input_tokens
        POST /v1/responses/compact
        POST /v1/decisions
        POST /v1/conversations
        GET /v1/conversations/conv_1/items
        DELETE /v1/conversations/conv_1
        POST /v1/embeddings
        POST /v1/moderations
        POST /v1/audio/transcriptions
        POST /v1/audio/translations
        POST /v1/audio/speech
        POST /v1/images/generations
        POST /v1/images/edits
        POST /v1/images/variations
        GET /v1/models
        GET /v1/models/gpt-x
        DELETE /v1/models/ft:gpt-x:team::abc
        GET /v1/files
        POST /v1/files
        GET /v1/files/file-1
        GET /v1/files/file-1/content
        DELETE /v1/files/file-1
        POST /openai/deployments/name/chat/completions
        POST //openai/deployments/name/embeddings
        POST /openai/v1/responses
    """,
    "anthropic": """
        POST /v1/messages
        POST /v1/messages/count_tokens
        GET /v1/models
        GET /v1/models/claude-x
        GET /v1/files
        POST /v1/files
        GET /v1/files/file_1
        GET /v1/files/file_1/content
        DELETE /v1/files/file_1
    """,
    "gemini": """
        POST /v1beta/models/gemini-x:generateContent
        POST /v1beta/models/gemini-x:streamGenerateContent
        POST /v1beta/models/gemini-x:countTokens
        POST /v1beta/models/gemini-x:embedContent
        POST /v1beta/models/gemini-x:batchEmbedContents
        POST /v1beta/models/gemini-x:batchGenerateContent
        POST /v1beta/models/gemini-x:asyncBatchEmbedContent
        POST /v1beta/models/imagen-x:predict
        POST /v1beta/models/veo-3.1:predictLongRunning
        GET /v1beta/models/veo-3.1/operations
        GET /v1beta/models/veo-3.1/operations/abc
        GET /v1beta/batches
        GET /v1beta/batches/abc
        POST /v1beta/batches/abc:cancel
        DELETE /v1beta/batches/abc
        GET /v1beta/models
        GET /v1beta/models/gemini-x
        POST /upload/v1beta/files
        GET /v1beta/files
        GET /v1beta/files/abc
        GET /v1beta/files/abc:download
        GET /download/v1beta/files/abc:download
        DELETE /v1beta/files/abc
        POST /v1beta/cachedContents
        GET /v1beta/cachedContents
        GET /v1beta/cachedContents/abc
        PATCH /v1beta/cachedContents/abc
        DELETE /v1beta/cachedContents/abc
        POST /v1beta/interactions
        GET /v1beta/interactions/v1_abc
        POST /v1beta/interactions/v1_abc/cancel
        DELETE /v1beta/interactions/v1_abc
        POST /v1beta/models/veo-x/operations/abc:cancel
        POST /v1beta/models/veo-x/operations/abc:wait
        DELETE /v1beta/models/veo-x/operations/abc
        POST /v1beta/batches/abc:wait
        POST /v1beta/fileSearchStores
        GET /v1beta/fileSearchStores
        GET /v1beta/fileSearchStores/a-b
        DELETE /v1beta/fileSearchStores/a-b
        POST /v1beta/fileSearchStores/a-b:importFile
        POST /v1beta/fileSearchStores/a-b:uploadToFileSearchStore
        POST /upload/v1beta/fileSearchStores/a-b:uploadToFileSearchStore
        GET /v1beta/fileSearchStores/a-b/documents
        GET /v1beta/fileSearchStores/a-b/documents/c
        DELETE /v1beta/fileSearchStores/a-b/documents/c
        GET /v1beta/fileSearchStores/a-b/media/c
        GET /v1beta/fileSearchStores/a-b/operations/c
        GET /v1beta/fileSearchStores/a-b/upload/operations/c
        POST /v1beta/fileSearchStores/a-b/upload/operations/c:cancel
        POST /v1beta1/projects/p/locations/l/publishers/google/models/gemini-x:generateContent
        POST /v1/projects/p/locations/l/publishers/google/models/gemini-x:countTokens
        POST /v1beta1/publishers/google/models/text-embedding-x:predict
    """,
}
KEYS = {
    "openai": [(b"authorization", b"")],
    "anthropic": [(b"anthropic-version", b""), (b"x-api-key", b"")],
    "gemini": [(b"x-goog-api-key", b"")],
}
# Served by an upstream's `passthrough` alone: nothing would say whose a thing behind them is.
BY_PASSTHROUGH = (
    *("/v1/assistants/*", "/v1/threads/*", "/v1/vector_stores/*", "/v1/fine_tuning/*"),
    *("/v1/evals/*", "/v1/videos/*", "/v1/traces/ingest", "/v1/realtime/client_secrets"),
    *("/v1/live/sessions/*", "/v1/agents/*", "/v1/vaults/*"),
)


@pytest.mark.parametrize(
    ("dialect", "line"),
    [
        (dialect, line.strip())
        for dialect, lines in RELAYED.items()
        for line in lines.strip().splitlines()
    ],
)
def test_what_clients_of_the_three_providers_call_is_relayed(dialect: str, line: str) -> None:
    method, path = line.split()
    meant = native_path(path)
    assert meant is not None
    found, _ = endpoint_in(method, meant, KEYS[dialect], b"")
    assert found is not None
    assert found.dialect == dialect


@pytest.mark.parametrize("path", BY_PASSTHROUGH)
def test_what_is_not_relayed_can_be_passed_through(path: str) -> None:
    assert not is_known(path)
    assert all(endpoint_of(one, path, Dialect.OPENAI) is None for one in ("GET", "POST"))


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/organization/usage/completions", "/v1/organization/*"),
        *("/v1/compliance/*", "/v1/compliance/review/cases"),
    ],
)
def test_the_administration_of_an_account_is_never_opened(path: str) -> None:
    assert is_known(path)
