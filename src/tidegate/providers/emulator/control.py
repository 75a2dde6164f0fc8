"""The control API under `/_emulator/`: ground truth out; faults and behaviour in. Loopback only."""

from __future__ import annotations

from dataclasses import asdict
from ipaddress import ip_address
from typing import Any

import orjson
from aiohttp import web

from tidegate.errors import InvalidRequest
from tidegate.providers.emulator.delivery import json_response
from tidegate.providers.emulator.state import State
from tidegate.providers.emulator.wire import error

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
