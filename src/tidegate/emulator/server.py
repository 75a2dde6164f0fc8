"""Emulator of provider APIs: an HTTP server with enforced limits, injected faults and counters.

Invariants: counters and call log are kept by the server, never by a client; every answer has the
header `x-tidegate-emulator: 1`; the control API under `/_emulator/` answers on loopback only;
after `run_emulator` ends, its port is closed and none of its handlers runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator.anthropic import AnthropicFront
from tidegate.emulator.client import EmulatorControl
from tidegate.emulator.delivery import failed, json_response
from tidegate.emulator.dialect import LimitReached, Refused, error
from tidegate.emulator.gemini import GeminiFront
from tidegate.emulator.openai import OpenAIFront
from tidegate.emulator.settings import Behaviour, EmulatorSettings, RateLimit
from tidegate.emulator.state import State
from tidegate.errors import InvalidRequest

PREFIX = "/_emulator/"
MAX_CALLS = 100_000


async def control(state: State, request: web.BaseRequest) -> web.Response:
    """GET stats, calls, faults, behaviour; POST reset, faults (adds); PUT faults, behaviour."""
    if not is_loopback(request.remote):
        return json_response(403, error(403, "The control API answers on loopback only."))
    name = request.path.removeprefix(PREFIX)
    try:
        match request.method, name:
            case "GET", "stats":
                return json_response(200, state.ledger.to_json())
            case "GET", "calls":
                return json_response(200, {"calls": _calls(state, request)})
            case "GET", "faults":
                return json_response(200, {"faults": state.faults.to_json()})
            case "GET", "behaviour":
                return json_response(200, state.behaviour.to_json())
            case "POST", "reset":
                state.reset()
                return json_response(200, {})
            case "PUT", "behaviour":
                state.change_behaviour(await _object(request))
                return json_response(200, state.behaviour.to_json())
            case "PUT" | "POST", "faults":
                orders = (await _object(request)).get("faults")
                if not isinstance(orders, list) or not all(isinstance(o, dict) for o in orders):
                    raise InvalidRequest("faults", "`faults` must be a list of objects")
                change = state.faults.replace if request.method == "PUT" else state.faults.add
                change(orders)
                return json_response(200, {"faults": state.faults.to_json()})
    except InvalidRequest as invalid:
        return json_response(400, error(400, invalid.message))
    return json_response(404, error(404, f"no control {request.method} {name}"))


def _calls(state: State, request: web.BaseRequest) -> list[dict[str, Any]]:
    since = request.query.get("since", "0")
    if not since.isdecimal():
        raise InvalidRequest("since", f"since={since!r} is not the id of a call")
    contains = request.query.get("contains", "")
    found = [asdict(call) for call in state.ledger.calls(int(since)) if contains in call.prompt]
    return found[:MAX_CALLS]


def is_loopback(remote: str | None) -> bool:
    """Whether a peer's address, as a socket names it, is this machine's own."""
    if remote is None:
        return False
    address = ip_address(remote.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


async def _object(request: web.BaseRequest) -> dict[str, Any]:
    try:
        value = orjson.loads(await request.read())
    except orjson.JSONDecodeError as broken:
        raise InvalidRequest("body", f"not JSON: {broken}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", "not a JSON object")
    return value


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


STOP_GRACE_S = 0.1


@dataclass(frozen=True, slots=True)
class Emulator:
    """A running emulator. `url` is what Google's SDK wants; OpenAI's wants `/v1` behind it."""

    url: str
    port: int
    control: EmulatorControl


@asynccontextmanager
async def run_emulator(
    settings: EmulatorSettings | None = None, *, clock_ns: Callable[[], int] = time.time_ns
) -> AsyncIterator[Emulator]:
    """Serve until the block ends. `clock_ns` is the clock that rate limits go by.

    Raises OSError when the port is taken. At the end, calls in flight are cut off.
    """
    settings = settings or EmulatorSettings()
    state = State(settings, clock_ns)
    runner = web.ServerRunner(EmulatorServer(state).web_server(), shutdown_timeout=STOP_GRACE_S)
    await runner.setup()
    site = web.TCPSite(runner, settings.host, settings.port, backlog=4096)
    await site.start()
    port: int = runner.addresses[0][1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    control = EmulatorControl(f"http://{host}:{port}")
    try:
        yield Emulator(control.url, port, control)
    finally:
        await control.close()
        await runner.cleanup()
        state.presence.close()


__all__ = [
    "Behaviour",
    "Emulator",
    "EmulatorControl",
    "EmulatorSettings",
    "RateLimit",
    "run_emulator",
]
