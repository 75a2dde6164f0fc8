"""OpenAI's front: its routes and keys, under `/v1/` and under Gemini's `/v1beta/openai/`.

Invariant: every error is worded as OpenAI words it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
from aiohttp import web

from tidegate.providers.emulator.delivery import deliver, deliver_other, ready
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.openai import chat, completions, plain, responses
from tidegate.providers.emulator.openai.errors import (
    OPENAI,
    OpenAIError,
    key_invalid,
    key_missing,
)
from tidegate.providers.emulator.openai.reading import read_body, read_chat, read_responses
from tidegate.providers.emulator.state import State

_PREFIXES = ("/v1beta/openai/", "/v1/")
_OWN = {"chat/completions", "completions", "responses", "embeddings", "images/generations"}


class OpenAIFront:
    """What comes for OpenAI's API."""

    dialect = OPENAI

    def __init__(self, state: State) -> None:
        self.state = state

    def wants(self, request: web.BaseRequest) -> bool:
        """`/v1/models` is Gemini's path too: only the way of sending the key tells them apart."""
        if request.path.startswith(_PREFIXES[0]):
            return True
        if not request.path.startswith(_PREFIXES[1]):
            return False
        googles = "x-goog-api-key" in request.headers or "key" in request.query
        return _name(request) in _OWN or (_key(request) is not None and not googles)

    async def route(self, request: web.BaseRequest) -> web.StreamResponse:
        key = _key(request)
        if not key:
            raise key_missing()
        if key == "invalid-key":
            raise key_invalid()
        name = _name(request)
        if request.method == "POST" and name in _OWN:
            body, model = read_body(await _json(request))
            plain.check_model(model, self.state.behaviour)
            return await self._create(request, name, body, model)
        if request.method == "GET" and name == "models":
            return await deliver_other(
                self.state, request, OPENAI, "models", "", ready(plain.list_models)
            )
        if request.method == "GET" and name.startswith("models/"):
            model = name.removeprefix("models/")
            return await deliver_other(
                self.state, request, OPENAI, "models", model, ready(partial(self._model, model))
            )
        raise OpenAIError(404, f"Invalid URL ({request.method} {request.path})")

    async def _create(
        self, request: web.BaseRequest, name: str, body: Json, model: str
    ) -> web.StreamResponse:
        behaviour = self.state.behaviour
        if name == "embeddings":
            embedded = plain.read_embeddings(body, model)
            return await deliver_other(
                self.state,
                request,
                OPENAI,
                "embed",
                model,
                ready(embedded.answer),
                input_tokens=embedded.input_tokens,
            )
        if name == "images/generations":
            asked, count = plain.read_pictures(body, model)
            pictures = partial(plain.pictures_script, asked, count, behaviour)
            return await deliver(self.state, request, OPENAI, asked, "generate", pictures)
        if name == "responses":
            wanted = read_responses(body, model)
            scripted = partial(responses.script, wanted, body, behaviour)
        elif name == "completions":
            wanted = completions.read_completions(body, model)
            scripted = partial(completions.script, wanted, behaviour)
        else:
            wanted = read_chat(body, model)
            scripted = partial(chat.script, wanted, behaviour)
        method = "stream" if wanted.streamed else "generate"
        return await deliver(self.state, request, OPENAI, wanted.asked, method, scripted)

    def _model(self, model: str) -> Json:
        plain.check_model(model, self.state.behaviour)
        return plain.describe(model)


def _name(request: web.BaseRequest) -> str:
    for prefix in _PREFIXES:
        if request.path.startswith(prefix):
            return request.path.removeprefix(prefix).rstrip("/")
    return ""


def _key(request: web.BaseRequest) -> str | None:
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


async def _json(request: web.BaseRequest) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        raise OpenAIError(400, "We could not parse the JSON body of your request.") from None
