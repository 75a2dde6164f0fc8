"""The emulator's HTTP server, and which front a request is for.

Invariant: every answer carries `x-tidegate-emulator: 1`; every error is worded as the front does.
"""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from tidegate.providers.emulator.anthropic import AnthropicFront
from tidegate.providers.emulator.control import PREFIX, control
from tidegate.providers.emulator.delivery import failed
from tidegate.providers.emulator.dialect import LimitReached, Refused
from tidegate.providers.emulator.gemini import GeminiFront
from tidegate.providers.emulator.openai import OpenAIFront
from tidegate.providers.emulator.state import State

Front = GeminiFront | OpenAIFront | AnthropicFront


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
        self._gemini = GeminiFront(state)
        self._openai = OpenAIFront(state)
        self._anthropic = AnthropicFront(state)

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
        if request.path.startswith(PREFIX):
            return await control(self.state, request)
        front = self._front(request)
        try:
            return await front.route(request)
        except LimitReached as full:
            return failed(front.dialect.refused(full.refusal, full.model))
        except Refused as refused:
            return failed(refused.failure)
        except web.HTTPRequestEntityTooLarge:
            return failed(front.dialect.error(413, "Request payload size exceeds the limit."))

    def _front(self, request: web.BaseRequest) -> Front:
        """By the path, where only one API has it; else by the way in which the key is sent."""
        if self._anthropic.wants(request):
            return self._anthropic
        return self._openai if self._openai.wants(request) else self._gemini
