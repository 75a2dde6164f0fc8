"""Every route that can take a permit or a place in a queue, and one sound request to each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tests.gateway import PNG, payload_of

GEMINI = "gemini-2.5-flash"
ASKED: dict[str, Any] = {"contents": [{"parts": [{"text": "Say hello"}]}]}
CHAT: dict[str, Any] = {
    "model": "gpt-x",
    "max_tokens": 50,
    "messages": [{"role": "user", "content": "Say hello"}],
}


@dataclass(frozen=True)
class Route:
    """A sound request, and how the same is spoilt. kind: the limit that it falls under.

    broken: a body that is refused here; None where no body is looked at. missing: a path or a body
    that only the provider can refuse.
    """

    method: str
    path: str
    kind: str = "text_only"
    body: dict[str, Any] | None = None
    data: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    broken: dict[str, Any] | None = None
    streams: bool = False

    @property
    def name(self) -> str:
        streams = " (stream)" if self.streams and "stream" not in self.path else ""
        return f"{self.method} {self.path}{streams}"

    def payload(self, body: dict[str, Any] | None = None) -> dict[str, Any]:
        given = self.body if body is None else body
        if self.data is not None:
            return {"data": self.data}
        return {} if given is None else payload_of(given)


def _gemini(do: str, kind: str = "text_only", body: dict[str, Any] | None = None) -> Route:
    streams = do.startswith("stream")
    return Route(
        "POST",
        f"/v1beta/models/{GEMINI}:{do}",
        kind,
        ASKED if body is None else body,
        broken={"contents": "?", "generationConfig": 1} if kind != "other" else None,
        streams=streams,
    )


def _form(path: str, kind: str, name: str, **fields: str) -> Route:
    return Route("POST", path, kind, {**fields, name: PNG})


def _post(path: str, kind: str = "text_only", **body: Any) -> Route:
    headers = _AS_ANTHROPIC if path.startswith("/v1/messages") else {}
    streams = bool(body.get("stream"))
    broken = {"stream": True}
    return Route("POST", path, kind, body, headers=headers, broken=broken, streams=streams)


_EMBED = {"content": {"parts": [{"text": "Say hello"}]}}
_LONG = {"contents": [{"role": "user", "parts": [{"text": "Say hello. " * 2_000}]}]}
_AS_ANTHROPIC = {"anthropic-version": "2023-06-01"}
_START = {"X-Goog-Upload-Protocol": "resumable", "X-Goog-Upload-Command": "start"}
_START |= {"X-Goog-Upload-Header-Content-Length": "5", "X-Goog-Upload-Header-Content-Type": "a/b"}

_QUESTIONS = [{"type": "predicate", "name": "rain", "instructions": "Does it rain?"}]
NATIVE = (
    _gemini("generateContent"),
    _gemini("streamGenerateContent?alt=sse"),
    _gemini("embedContent", body=_EMBED),
    _gemini("batchEmbedContents", body={"requests": [{**_EMBED, "model": f"models/{GEMINI}"}]}),
    _gemini("countTokens", "other"),
    _gemini("computeTokens", "other"),
    _post("/v1/chat/completions", **CHAT),
    _post("/v1/chat/completions", **CHAT, stream=True),
    _post("/v1/completions", model="gpt-x", prompt="Say hello"),
    _post("/v1/responses", model="gpt-x", input="Say hello"),
    _post("/v1/responses", model="gpt-x", input="Say hello", stream=True),
    _post("/v1/embeddings", model="embed-x", input="Say hello"),
    _post("/v1/images/generations", "image_generation", model="image-x", prompt="A fox"),
    _form("/v1/images/edits", "image_generation", "image", model="image-x", prompt="A fox"),
    _form("/v1/images/variations", "image_generation", "image", model="image-x"),
    _form("/v1/audio/transcriptions", "multi_modal", "file", model="whisper-1"),
    _form("/v1/audio/translations", "multi_modal", "file", model="whisper-1"),
    _post("/v1/audio/speech", model="tts-1", voice="alloy", input="Say hello"),
    Route("POST", "/v1/moderations", body={"model": "omni-moderation-latest", "input": "Hello"}),
    _post("/v1/rerank", model="rerank-x", query="Say", documents=["hello", "tide"]),
    _post("/v1/responses/compact", model="gpt-x", input="Say hello"),
    _post("/v1/decisions", model="gpt-x", input="Say hello", questions=_QUESTIONS),
    Route("POST", "/v1/responses/input_tokens", "other", {"model": "gpt-x", "input": "Say hello"}),
    _post("/v1/messages", **CHAT),
    _post("/v1/messages", **CHAT, stream=True),
    _post("/v1/messages/count_tokens", "other", **CHAT),
    Route("GET", "/v1/models", "other"),
    Route("GET", "/v1/models", "other", headers=_AS_ANTHROPIC),
    Route("GET", "/v1beta/models", "other"),
    Route("GET", f"/v1beta/models/{GEMINI}", "other"),
    Route("POST", "/v1beta/cachedContents", body={"model": f"models/{GEMINI}", **_LONG}),
    Route("POST", "/v1/conversations", "other", {"metadata": {}}),
    Route("GET", "/v1beta/files", "other"),
    Route("GET", "/v1beta/files/abc", "other"),
    Route("DELETE", "/v1beta/files/abc", "other"),
    Route("POST", "/upload/v1beta/files", "upload", data=b"{}", headers=_START),
)
OWN = (
    Route("POST", "/stream", body={"text": "Explain", "type": "text_only"}, streams=True),
    Route(
        "POST",
        "/stream",
        "multi_modal",
        {"text": "Describe this", "file": PNG},
        headers={"Accept": "text/plain"},
        streams=True,
    ),
    Route(
        "POST",
        "/llm/stream",
        "image_generation",
        {"text": "A fox", "type": "image_generation"},
        streams=True,
    ),
)
