"""Gemini's API: generateContent, streamGenerateContent, tokens, models and files.

Invariant: every error is a google.rpc body.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import orjson
from aiohttp import web

from tidegate.emulator import content as answers
from tidegate.emulator import dialect as wire
from tidegate.emulator.content import Asked, get, read_generate
from tidegate.emulator.delivery import (
    EMULATED,
    JSON_TYPE,
    SSE_TYPE,
    Script,
    Step,
    broken_object,
    deliver,
    deliver_other,
    json_response,
    ready,
)
from tidegate.emulator.dialect import GEMINI, Json, WireError, key_invalid, key_missing
from tidegate.emulator.limits import BODIES, Fault, FaultName
from tidegate.emulator.settings import Behaviour
from tidegate.emulator.state import State

Framing = Literal["whole", "sse", "array"]
Framed = Callable[[int, bytes], bytes]
_GARBAGE = b'{"candidates": [{"content": {"parts": [{"te'


async def generate(
    state: State, request: web.BaseRequest, model: str, body: Any, framing: Framing
) -> web.StreamResponse:
    asked = read_generate(model, body, state.files.look_up)
    method = "generate" if framing == "whole" else "stream"
    scripted = partial(_script, asked, state.behaviour, framing)
    return await deliver(state, request, wire.GEMINI, asked, method, scripted)


def _script(asked: Asked, behaviour: Behaviour, framing: Framing, fault: Fault | None) -> Script:
    frame = _FRAMED[framing]
    bodies = _bodies(asked, behaviour, framing, fault)
    steps = [
        Step(frame(index, orjson.dumps(body)), output_tokens)
        for index, (body, output_tokens) in enumerate(bodies)
    ]
    if framing == "array":
        steps[-1] = Step(steps[-1].data + b"]", steps[-1].output_tokens)
    return Script(
        steps,
        streamed=framing != "whole",
        input_tokens=asked.input_tokens,
        broken=lambda index, fault: frame(index, broken_object(wire.GEMINI, _GARBAGE, fault)),
        thoughts_tokens=answers.thoughts_of(asked),
        content_type=SSE_TYPE if framing == "sse" else JSON_TYPE,
    )


def _bodies(
    asked: Asked, behaviour: Behaviour, framing: Framing, fault: Fault | None
) -> list[tuple[Json, int]]:
    """One body a step in time, with the LLM tokens sent by then."""
    response_id = answers.new_response_id()
    thoughts = answers.thoughts_of(asked)
    written = answers.write(asked, behaviour)
    if fault is not None and fault.fault in BODIES:
        tokens = written.tokens if fault.fault is FaultName.UNKNOWN_FINISH else 0
        return [(_faulty_body(fault, asked, written, response_id), tokens + thoughts)]
    if framing == "whole":
        body = answers.whole(asked, written, response_id)
        return [({}, 0)] * (len(written.parts) - 1) + [(body, written.tokens + thoughts)]
    sent = 0
    bodies = []
    for body, (_, tokens) in zip(
        answers.chunks(asked, written, response_id), written.parts, strict=True
    ):
        sent += tokens
        bodies.append((body, sent + thoughts))
    return bodies


_FRAMED: dict[Framing, Framed] = {
    "whole": lambda index, data: data,
    "sse": lambda index, data: b"data: " + data + b"\r\n\r\n",
    "array": lambda index, data: (b"[" if index == 0 else b",\r\n") + data,
}


def _faulty_body(fault: Fault, asked: Asked, written: answers.Written, response_id: str) -> Json:
    model, used = asked.model, answers.usage_of(asked, 0)
    match fault.fault:
        case FaultName.BLOCKED_PROMPT:
            return wire.blocked(model, response_id, used, fault.reason)
        case FaultName.UNKNOWN_FINISH:
            body = answers.whole(asked, written, response_id)
            body["candidates"][0]["finishReason"] = "SOMETHING_NEW"
            return body
        case FaultName.SAFETY | FaultName.NO_IMAGE:
            reason = fault.fault.value.upper()
            return wire.answer(model, response_id, used, parts=None, finish_reason=reason)
    return wire.answer(model, response_id, used, parts=None, finish_reason=None) | {
        "candidates": []
    }


VERSIONS = ("v1", "v1alpha", "v1beta")
MODELS = {
    "gemini-2.5-flash": ("generateContent", "countTokens"),
    "gemini-2.5-flash-image": ("generateContent", "countTokens"),
    "gemini-2.5-flash-lite": ("generateContent", "countTokens"),
    "gemini-2.5-pro": ("generateContent", "countTokens"),
    "gemini-embedding-001": ("embedContent", "countTokens"),
}
EMBEDDING_DIMENSIONS = 768


class GeminiFront:
    """What comes for Gemini's API."""

    dialect = GEMINI

    def __init__(self, state: State) -> None:
        self.state = state

    async def route(self, request: web.BaseRequest) -> web.StreamResponse:
        steps = request.path.strip("/").split("/")
        upload = steps[0] == "upload"
        if upload:
            steps = steps[1:]
        if steps == [""]:
            return web.Response(text="Tidegate's emulator of Gemini's API.\n", headers=EMULATED)
        if len(steps) < 2 or steps[0] not in VERSIONS:
            raise WireError(404, f"Not found: {request.path}")
        if upload:
            return await self._upload(request)
        self._check_key(request)
        match request.method, steps[1:]:
            case "POST", ["models", call] if ":" in call:
                model, _, action = call.rpartition(":")
                return await self._act(request, model, action)
            case "GET", ["models"]:
                return await self._other(request, "models", "", _list_models)
            case "GET", ["models", name]:
                return await self._other(request, "models", name, lambda: self._model(name))
            case "GET", ["files"]:
                return await self._other(request, "files", "", lambda: self._list(request))
            case "GET", ["files", name]:
                return await self._other(request, "files", "", lambda: self._file(request, name))
            case "DELETE", ["files", name]:
                return await self._other(request, "files", "", lambda: self._delete(name))
        raise WireError(404, f"Not found: {request.method} {request.path}")

    @staticmethod
    def _check_key(request: web.BaseRequest) -> str:
        key = request.headers.get("x-goog-api-key") or request.query.get("key")
        if not key:
            raise key_missing()
        if key == "invalid-key":
            raise key_invalid()
        return key

    async def _act(self, request: web.BaseRequest, model: str, action: str) -> web.StreamResponse:
        self._check_model(model)
        body = await _json(request)
        match action:
            case "generateContent":
                return await generate(self.state, request, model, body, "whole")
            case "streamGenerateContent":
                framing: Framing = "sse" if request.query.get("alt") == "sse" else "array"
                return await generate(self.state, request, model, body, framing)
            case "countTokens":
                return await self._other(request, "count", model, lambda: self._count(model, body))
            case "embedContent":
                return await self._other(request, "embed", model, lambda: _embed_one(body))
            case "batchEmbedContents":
                return await self._other(request, "embed", model, lambda: _embed_many(body))
        raise WireError(404, f"Not found: {action}")

    async def _other(
        self, request: web.BaseRequest, method: str, model: str, answer: Callable[[], Json]
    ) -> web.StreamResponse:
        return await deliver_other(self.state, request, GEMINI, method, model, ready(answer))

    def _check_model(self, model: str) -> None:
        if self.state.behaviour.strict_models and model not in MODELS:
            raise WireError(
                404,
                f"models/{model} is not found for API version v1beta, or is not supported for "
                "generateContent. Call ListModels to see the list of available models.",
            )

    def _model(self, name: str) -> Json:
        self._check_model(name)
        return _model(name)

    def _count(self, model: str, body: Any) -> Json:
        whole = get(body, "generateContentRequest") if isinstance(body, dict) else None
        asked = read_generate(model, whole or body, self.state.files.look_up)
        details = [
            {"modality": name, "tokenCount": count}
            for name, count in asked.input_by_modality.items()
        ]
        return {"totalTokens": asked.input_tokens, "promptTokensDetails": details}

    def _list(self, request: web.BaseRequest) -> Json:
        size = get(request.query, "pageSize") or "10"
        token = get(request.query, "pageToken") or ""
        if not size.isdecimal() or not 1 <= int(size) <= 100:
            raise WireError(400, "* ListFilesRequest.page_size: must be between 1 and 100")
        found, next_token = self.state.files.page(int(size), token)
        body: Json = {"files": [file.to_json() for file in found]}
        return body | ({"nextPageToken": next_token} if next_token else {})

    def _file(self, request: web.BaseRequest, name: str) -> Json:
        return self.state.files.find(f"files/{name}").to_json()

    def _delete(self, name: str) -> Json:
        self.state.files.delete(f"files/{name}")
        return {}

    async def _upload(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in ("POST", "PUT"):
            raise WireError(405, f"Not for uploads: {request.method}")
        upload_id = request.query.get("upload_id")
        if upload_id is None:
            key = self._check_key(request)
            return await deliver_other(
                self.state, request, GEMINI, "upload", "", lambda: self._upload_start(request, key)
            )
        return await deliver_other(
            self.state,
            request,
            GEMINI,
            "upload",
            "",
            lambda: self._upload_piece(request, upload_id),
        )

    async def _upload_start(self, request: web.BaseRequest, key: str) -> web.Response:
        body = await _json(request) if request.can_read_body else {}
        upload_id = self.state.files.begin(request.headers, body)
        response = json_response(200, {})
        response.headers["X-Goog-Upload-Status"] = "active"
        # The key is part of the real thing's upload URL too: it must never be logged.
        response.headers["X-Goog-Upload-URL"] = (
            f"{_base_url(request)}{request.path}"
            f"?key={key}&upload_id={upload_id}&upload_protocol=resumable"
        )
        return response

    async def _upload_piece(self, request: web.BaseRequest, upload_id: str) -> web.Response:
        pieces = request.content.iter_any()
        files, wait_ms = self.state.files, self.state.behaviour.file_processing_ms
        file = await files.receive(upload_id, request.headers, pieces, wait_ms)
        body = {} if file is None else {"file": file.to_json()}
        response = json_response(200, body)
        response.headers["X-Goog-Upload-Status"] = "active" if file is None else "final"
        return response


def _base_url(request: web.BaseRequest) -> str:
    return f"http://{request.host}"


async def _json(request: web.BaseRequest) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError as broken:
        raise WireError(400, f"Invalid JSON payload received. {broken}") from None


def _model(name: str) -> Json:
    return {
        "name": f"models/{name}",
        "version": "emulated",
        "displayName": f"{name} (emulated)",
        "description": "Answered by Tidegate's built-in emulator.",
        "inputTokenLimit": 1_048_576,
        "outputTokenLimit": 65_536,
        "supportedGenerationMethods": list(MODELS.get(name, ("generateContent", "countTokens"))),
    }


def _list_models() -> Json:
    return {"models": [_model(name) for name in MODELS]}


def _embed_one(body: Any) -> Json:
    return {"embedding": _embedding(body)}


def _embed_many(body: Any) -> Json:
    requests = get(body, "requests") if isinstance(body, dict) else None
    if not isinstance(requests, list) or not requests:
        raise WireError(400, "* BatchEmbedContentsRequest.requests: must not be empty")
    return {"embeddings": [_embedding(item) for item in requests]}


def _embedding(body: Any) -> Json:
    content = get(body, "content") if isinstance(body, dict) else None
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, list):
        raise WireError(400, "* EmbedContentRequest.content: content is not specified")
    text = "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
    wanted = get(body, "outputDimensionality")
    config = get(body, "embedContentConfig")
    if wanted is None and isinstance(config, dict):
        wanted = get(config, "outputDimensionality")
    size = wanted if isinstance(wanted, int) and 1 <= wanted <= 3072 else EMBEDDING_DIMENSIONS
    return {"values": answers.embedding(text, size)}
