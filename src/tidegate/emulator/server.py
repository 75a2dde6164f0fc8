"""Emulator of provider APIs: an HTTP server with enforced limits, injected faults and counters.

Invariants: counters and call log are kept by the server, never by a client; every answer has the
header `x-tidegate-emulator: 1`; the control API under `/_emulator/` answers on loopback only; after
`run_emulator` ends, its port is closed and none of its handlers runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from functools import partial
from ipaddress import ip_address
from typing import Any

import orjson
from aiohttp import web

from tidegate.emulator import usage_api
from tidegate.emulator.account import AccountLimitReached, AccountSpec
from tidegate.emulator.client import EmulatorControl
from tidegate.emulator.delivery import JSON_TYPE, Served, failed, json_response
from tidegate.emulator.dialect import EmulatedApi, LimitReached, Refused
from tidegate.emulator.fronts import (
    anthropic,
    bedrock,
    gemini,
    gpu_server,
    openai,
    openai_socket,
    realtime,
)
from tidegate.emulator.fronts.anthropic import ANTHROPIC
from tidegate.emulator.fronts.bedrock import BEDROCK
from tidegate.emulator.fronts.gemini import GEMINI
from tidegate.emulator.fronts.openai import OPENAI
from tidegate.emulator.rate_limits import rate_limit_headers, retry_headers
from tidegate.emulator.settings import EmulatorSettings
from tidegate.emulator.state import EmulatorState
from tidegate.errors import InvalidRequest

PREFIX = "/_emulator/"
MAX_CALLS = 100_000


async def control(state: EmulatorState, request: web.BaseRequest) -> web.Response:
    """Serve the control API. GET stats, calls, faults, behaviour, account; POST reset, faults (adds
    one); PUT faults, behaviour, account (some of its fields)."""
    if not is_loopback(request.remote):
        return failed(GEMINI.error(403, "The control API answers on loopback only."))
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
            case "GET", "account":
                return json_response(200, _book(state))
            case "PUT", "account":
                _change_account(state, await _object(request))
                return json_response(200, _book(state))
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
        return failed(GEMINI.error(400, invalid.message))
    return failed(GEMINI.error(404, f"no control {request.method} {name}"))


def _calls(state: EmulatorState, request: web.BaseRequest) -> list[dict[str, Any]]:
    since = request.query.get("since", "0")
    if not since.isdecimal():
        raise InvalidRequest("since", f"since={since!r} is not the id of a call")
    contains = request.query.get("contains", "")
    found = [asdict(call) for call in state.ledger.calls(int(since)) if contains in call.prompt]
    return found[:MAX_CALLS]


def _book(state: EmulatorState) -> dict[str, Any]:
    if state.account is None:
        raise InvalidRequest("account", "there is no account: set `account` of the behaviour")
    return state.account.to_json()


def _change_account(state: EmulatorState, changes: dict[str, Any]) -> None:
    spec = state.behaviour.account
    account = AccountSpec.parse(changes) if spec is None else spec.changed(changes)
    state.change_behaviour({"account": account})


def is_loopback(remote: str | None) -> bool:
    """Return whether a peer's address, in the form of a socket, is on this machine."""
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


Route = Callable[[Served], Awaitable[web.StreamResponse]]
_FRONTS = ((BEDROCK, bedrock), (ANTHROPIC, anthropic), (OPENAI, openai))  # all else is Gemini's


async def handle(state: EmulatorState, request: web.BaseRequest) -> web.StreamResponse:
    """Serve a request: by the path if only one API has it, otherwise by the form in which the key
    is sent."""
    state.batches.advance()
    if request.path.startswith(PREFIX):
        return await control(state, request)
    if state.behaviour.gpu is not None:
        return await asyncio.shield(state.work_on(gpu_server.answer(state, request)))
    if usage_api.wants(request):
        return _usage_report(state, request)
    if state.behaviour.works_on:
        return await asyncio.shield(state.work_on(_answer(state, request)))
    return await _answer(state, request)


async def _answer(state: EmulatorState, request: web.BaseRequest) -> web.StreamResponse:
    found = ((api, front.route) for api, front in _FRONTS if front.wants(request))
    api, route = next(found, (GEMINI, gemini.route))
    if (realtime_api := realtime.api_of(request)) is not None:
        api, route = realtime_api, realtime.route
    elif openai_socket.wants(request):
        api, route = OPENAI, openai_socket.route
    answer = await _routed(state, request, api, route)
    if isinstance(answer, web.Response) and answer.headers.get("Content-Type") == JSON_TYPE:
        # Google answers in the requested type, also with errors.
        sse = api is GEMINI and request.query.get("alt") == "sse"
        answer.headers["Content-Type"] = api.stream_type if sse else api.json_type
    return answer


async def _routed(
    state: EmulatorState, request: web.BaseRequest, api: EmulatedApi, route: Route
) -> web.StreamResponse:
    try:
        return await route(Served(state, request, api))
    except LimitReached as full:
        return failed(api.refused(full.refusal, full.model))
    except AccountLimitReached as full:
        return _refused_by_account(state, api, full)
    except Refused as refused:
        await _count_failed(state, request, api)
        return failed(api.error(refused.status, refused.message, **refused.facts))
    except web.HTTPRequestEntityTooLarge:
        return failed(api.error(413, "Request payload size exceeds the limit."))


def _usage_report(state: EmulatorState, request: web.BaseRequest) -> web.Response:
    api = ANTHROPIC if request.path.startswith("/v1/organizations/") else OPENAI
    try:
        return json_response(200, usage_api.report(state, request))
    except Refused as refused:
        return failed(api.error(refused.status, refused.message))


def _refused_by_account(
    state: EmulatorState, api: EmulatedApi, full: AccountLimitReached
) -> web.Response:
    account = state.account_of(api.name)
    assert account is not None  # it has just refused the call
    spec, views = account.spec, account.views(full.model)
    error = api.refused_by_account(spec, full.refusal, full.model)
    limits = rate_limit_headers(spec.headers, views, account.now_ns())
    headers = {**error.headers, **limits, **retry_headers(spec, full.refusal)}
    return json_response(error.status, error.body, headers)


async def _count_failed(state: EmulatorState, request: web.BaseRequest, api: EmulatedApi) -> None:
    """Count a refused request for the limits of the model that its body names, if any."""
    account = state.account_of(api.name)
    if account is None or request.method != "POST":
        return
    try:
        body = orjson.loads(await request.read())
    except (orjson.JSONDecodeError, web.HTTPRequestEntityTooLarge):
        return
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        account.count_failed(body["model"])


class _Listener(web.Server):
    """A server that notes a lost connection immediately: the handler's cancellation comes two
    iterations of the event loop later.

    A handler is cancelled as soon as its client disconnects.
    """

    def __init__(self, state: EmulatorState) -> None:
        loop = asyncio.get_running_loop()
        most_bytes = state.settings.max_body_bytes

        def make(
            message: Any, payload: Any, protocol: Any, writer: Any, task: Any
        ) -> web.BaseRequest:
            return web.BaseRequest(
                message, payload, protocol, writer, task, loop, client_max_size=most_bytes
            )

        super().__init__(
            partial(handle, state),
            request_factory=make,
            handler_cancellation=True,
            access_log=None,
        )
        self._state = state

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        self._state.connection_lost(handler)
        super().connection_lost(handler, exc)


STOP_GRACE_S = 0.1


@dataclass(frozen=True, slots=True)
class Emulator:
    """A running emulator. `url` is the base URL of Google's SDK; OpenAI's appends `/v1`."""

    url: str
    port: int
    control: EmulatorControl


@asynccontextmanager
async def run_emulator(
    settings: EmulatorSettings | None = None, *, clock_ns: Callable[[], int] = time.time_ns
) -> AsyncIterator[Emulator]:
    """Serve until the block ends. `clock_ns` is the clock of the rate limits.

    Raises OSError if the port is in use. At the end, calls in flight are cut off.
    """
    settings = settings or EmulatorSettings()
    state = EmulatorState(settings, clock_ns)
    runner = web.ServerRunner(_Listener(state), shutdown_timeout=STOP_GRACE_S)
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
        await state.end_work()
        state.presence.close()
