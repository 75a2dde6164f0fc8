"""The emulator's HTTP server: routes, keys, errors, and the calls that generate nothing.

Invariant: every answer carries `x-tidegate-emulator: 1`; every error is a google.rpc body.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web

from tidegate.providers.emulator import answers
from tidegate.providers.emulator.control import PREFIX, control
from tidegate.providers.emulator.faults import FaultName
from tidegate.providers.emulator.generate import (
    EMULATOR_HEADER,
    Framing,
    early_fault,
    generate,
    json_response,
)
from tidegate.providers.emulator.reading import get, read_generate
from tidegate.providers.emulator.state import LimitReached, State
from tidegate.providers.emulator.wire import Json, WireError, error, key_invalid, key_missing

VERSIONS = ("v1", "v1alpha", "v1beta")
MODELS = {
    "gemini-2.5-flash": ("generateContent", "countTokens"),
    "gemini-2.5-flash-image": ("generateContent", "countTokens"),
    "gemini-2.5-flash-lite": ("generateContent", "countTokens"),
    "gemini-2.5-pro": ("generateContent", "countTokens"),
    "gemini-embedding-001": ("embedContent", "countTokens"),
}
EMBEDDING_DIMENSIONS = 768
_EMULATED = {EMULATOR_HEADER: "1"}


class _Listener(web.Server):
    """Tells of a lost connection at once: the handler's own cancellation comes two turns later."""

    def __init__(self, state: State, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._state = state

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self._state.connection_lost(handler)
        super().connection_lost(handler, exc)


class EmulatorServer:
    def __init__(self, state: State) -> None:
        self.state = state

    def web_server(self) -> web.Server:
        """An aiohttp server that cancels a handler as soon as its client leaves."""
        loop = asyncio.get_running_loop()
        most_bytes = self.state.settings.max_body_bytes

        def make(
            message: Any, payload: Any, protocol: Any, writer: Any, task: Any
        ) -> web.BaseRequest:
            return web.BaseRequest(
                message, payload, protocol, writer, task, loop, client_max_size=most_bytes
            )

        return _Listener(
            self.state,
            self.handle,
            request_factory=make,
            handler_cancellation=True,
            access_log=None,
        )

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if request.path.startswith(PREFIX):
                return await control(self.state, request)
            return await self._route(request)
        except LimitReached as full:
            return json_response(429, full.body)
        except WireError as refused:
            return json_response(refused.code, refused.body)
        except web.HTTPRequestEntityTooLarge:
            message = "Request payload size exceeds the limit."
            return json_response(413, error(413, message))

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        steps = request.path.strip("/").split("/")
        upload = steps[0] == "upload"
        if upload:
            steps = steps[1:]
        if steps == [""]:
            return web.Response(text="Tidegate's emulator of Gemini's API.\n", headers=_EMULATED)
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
        """Serve a call that generates nothing; it is counted as the kind `other`."""
        return await self._other_async(request, method, model, _ready(answer))

    async def _other_async(
        self,
        request: web.BaseRequest,
        method: str,
        model: str,
        answer: Callable[[], Awaitable[web.Response]],
    ) -> web.StreamResponse:
        state = self.state
        with state.serving(
            request, kind="other", model=model, method=method, prompt=request.path
        ) as call:
            fault = state.faults.strike("other", request.path)
            if (early := await early_fault(state, request, call, fault)) is not None:
                return early
            delay_ms = state.behaviour.first_byte("other").draw_ms(state.random)
            if fault is not None and fault.fault is FaultName.SLOW_FIRST_TOKEN:
                delay_ms += fault.delay_ms
            if delay_ms > 0:
                await asyncio.sleep(delay_ms / 1000)
            response = await answer()
            if fault is not None and fault.fault is FaultName.GARBAGE:
                response.body = b'{"broken": ['
                state.ledger.end(call, "failed")
            if isinstance(response.body, bytes):
                state.ledger.sent(call, len(response.body))
            return response

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
        body: Json = {"files": [file.to_json(_base_url(request)) for file in found]}
        return body | ({"nextPageToken": next_token} if next_token else {})

    def _file(self, request: web.BaseRequest, name: str) -> Json:
        return self.state.files.find(f"files/{name}").to_json(_base_url(request))

    def _delete(self, name: str) -> Json:
        self.state.files.delete(f"files/{name}")
        return {}

    async def _upload(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method not in ("POST", "PUT"):
            raise WireError(405, f"Not for uploads: {request.method}")
        upload_id = request.query.get("upload_id")
        if upload_id is None:
            key = self._check_key(request)
            return await self._other_async(
                request, "upload", "", lambda: self._upload_start(request, key)
            )
        return await self._other_async(
            request, "upload", "", lambda: self._upload_piece(request, upload_id)
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
        body = {} if file is None else {"file": file.to_json(_base_url(request))}
        response = json_response(200, body)
        response.headers["X-Goog-Upload-Status"] = "active" if file is None else "final"
        return response


def _ready(answer: Callable[[], Json]) -> Callable[[], Awaitable[web.Response]]:
    async def respond() -> web.Response:
        return json_response(200, answer())

    return respond


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
