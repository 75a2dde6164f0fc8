"""Anthropic's front: its routes and keys, under `/v1/`.

Invariant: every error is worded as Anthropic words it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import orjson
from aiohttp import web

from tidegate.providers.emulator.anthropic import messages
from tidegate.providers.emulator.anthropic.errors import ANTHROPIC, AnthropicError
from tidegate.providers.emulator.anthropic.reading import read_messages
from tidegate.providers.emulator.delivery import deliver, deliver_other, ready
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.state import State

MODELS = ("claude-haiku-5-5", "claude-opus-5-5", "claude-sonnet-5-5")
_PREFIX = "/v1/"


class AnthropicFront:
    """What comes for Anthropic's API."""

    dialect = ANTHROPIC

    def __init__(self, state: State) -> None:
        self.state = state

    def wants(self, request: web.BaseRequest) -> bool:
        """`/v1/models` is a path of all three: here it comes with a version in a header."""
        if not request.path.startswith(_PREFIX):
            return False
        name = request.path.removeprefix(_PREFIX)
        return name.partition("/")[0] == "messages" or "anthropic-version" in request.headers

    async def route(self, request: web.BaseRequest) -> web.StreamResponse:
        self._check_headers(request)
        match request.method, request.path.removeprefix(_PREFIX).rstrip("/").split("/"):
            case "POST", ["messages"]:
                wanted = read_messages(await _json(request))
                self._check_model(wanted.asked.model)
                scripted = partial(messages.script, wanted, self.state.behaviour)
                method = "stream" if wanted.streamed else "generate"
                return await deliver(self.state, request, ANTHROPIC, wanted.asked, method, scripted)
            case "POST", ["messages", "count_tokens"]:
                asked = read_messages(await _json(request), counting=True).asked
                self._check_model(asked.model)
                counted = ready(lambda: {"input_tokens": asked.input_tokens})
                return await deliver_other(
                    self.state, request, ANTHROPIC, "count", asked.model, counted
                )
            case "GET", ["models"]:
                return await deliver_other(
                    self.state, request, ANTHROPIC, "models", "", ready(_list_models)
                )
            case "GET", ["models", model]:
                return await deliver_other(
                    self.state,
                    request,
                    ANTHROPIC,
                    "models",
                    model,
                    ready(lambda: self._model(model)),
                )
        raise AnthropicError(404, f"Not found: {request.method} {request.path}")

    @staticmethod
    def _check_headers(request: web.BaseRequest) -> None:
        scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
        key = request.headers.get("x-api-key") or (bearer if scheme.lower() == "bearer" else "")
        if not key:
            raise AnthropicError(401, "x-api-key header is required")
        if key == "invalid-key":
            raise AnthropicError(401, "invalid x-api-key")
        if "anthropic-version" not in request.headers:
            raise AnthropicError(400, "anthropic-version: header is required")

    def _check_model(self, model: str) -> None:
        if self.state.behaviour.strict_models and model not in MODELS:
            raise AnthropicError(404, f"model: {model}")

    def _model(self, model: str) -> Json:
        self._check_model(model)
        return _describe(model)


def _describe(model: str) -> Json:
    return {
        "type": "model",
        "id": model,
        "display_name": f"{model} (emulated)",
        "created_at": "2025-01-01T00:00:00Z",
        "lifecycle": "active",
    }


def _list_models() -> Json:
    data = [_describe(name) for name in MODELS]
    return {"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}


async def _json(request: web.BaseRequest) -> Any:
    try:
        return orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        raise AnthropicError(400, "The request body is not valid JSON.") from None
