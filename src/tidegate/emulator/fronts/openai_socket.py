"""OpenAI's Responses API over WebSocket: turns, one after another, on one connection.

    https://developers.openai.com/api/docs/guides/websocket-mode

Each event `response.create` is a call of its own in the ledger and for the limits. Its events are
those of a stream over HTTP. A refusal is an event `error` with its status and headers; the
connection stays open.

Invariants: a response that is not stored can be continued on its own connection only; a turn with
`generate: false` has no output; a text with `[too old]` ends the connection as its 60 minutes do.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from functools import partial

import orjson
from aiohttp import WSMsgType, web

from tidegate.emulator.account import AccountLimitReached
from tidegate.emulator.content import ModelRequest
from tidegate.emulator.delivery import EMULATED, Served, broken_object
from tidegate.emulator.dialect import (
    BREAKS_OFF,
    MID_ANSWER,
    ErrorResponse,
    Fault,
    FaultName,
    Json,
    LimitReached,
    Refused,
)
from tidegate.emulator.fronts import openai_stored
from tidegate.emulator.fronts.openai import (
    OPENAI,
    check_model,
    read_model,
    read_responses,
    refused,
)
from tidegate.emulator.fronts.openai_stored import GARBAGE, response_script
from tidegate.emulator.state import LoggedCall

_MAX_BYTES = 16 * 1024 * 1024
_PATHS = ("/v1/responses", "/openai/v1/responses")
_CREATE = "response.create"
_TOO_OLD = "[too old]"
_LIMIT_REACHED = (
    "Responses websocket connection limit reached (60 minutes). Create a new websocket connection "
    "to continue."
)


def wants(request: web.BaseRequest) -> bool:
    """Return whether a request opens such a connection."""
    is_upgrade = request.headers.get("Upgrade", "").lower() == "websocket"
    return is_upgrade and request.method == "GET" and request.path in _PATHS


async def route(served: Served) -> web.StreamResponse:
    """Serve `GET /v1/responses` with an upgrade. Raises Refused."""
    key = served.request.headers.get("Authorization", "").removeprefix("Bearer ")
    if not key:
        raise Refused(401, "Missing bearer or basic authentication in header")
    if key == "invalid-key":
        raise Refused(401, "Incorrect API key provided: inva***-key.")
    socket = web.WebSocketResponse(max_msg_size=_MAX_BYTES, compress=False)
    socket.headers.update(EMULATED)
    await socket.prepare(served.request)
    await _Connection(served, socket).run()
    return socket


class _Connection:
    """A connection: its turns, and the responses that only it holds."""

    def __init__(self, served: Served, socket: web.WebSocketResponse) -> None:
        self._served = served
        self._socket = socket
        self._held: set[str] = set()
        self._stream_id: str | None = None

    async def run(self) -> None:
        async for message in self._socket:
            if message.type not in (WSMsgType.TEXT, WSMsgType.BINARY):
                return
            try:
                await self._answer(orjson.loads(message.data))
            except orjson.JSONDecodeError:
                await self._report(OPENAI.error(400, "We could not parse the JSON body."))
            except Refused as refusal:
                await self._report(OPENAI.error(refusal.status, refusal.message, **refusal.facts))
            except LimitReached as full:
                await self._report(refused(full.refusal, full.model))
            except AccountLimitReached as full:
                account = self._served.state.account_of(OPENAI.name)
                assert account is not None
                spec = account.spec
                await self._report(OPENAI.refused_by_account(spec, full.refusal, full.model))
            if self._socket.closed:
                return

    async def _answer(self, event: Json) -> None:
        """Answer an event of the client. Raises Refused, LimitReached and AccountLimitReached."""
        self._stream_id = event.get("stream_id")
        if event.get("type") != _CREATE:
            kind = event.get("type")
            raise Refused(400, f"Invalid value: '{kind}'.", param="type", code="invalid_value")
        if event.get("background"):
            raise Refused(400, "Background mode is not supported over WebSocket.")
        body = {name: value for name, value in event.items() if name not in ("type", "stream_id")}
        body["stream"] = True
        served = self._served
        model = read_model(body)
        check_model(model, served.behaviour)
        parsed = served.cached(read_responses(body, model))
        parsed = served.in_tier(parsed, body.get("service_tier"))
        named = {k: v for k, v in body.items() if k != "previous_response_id"}
        is_held = body.get("previous_response_id") in self._held
        openai_stored.check_named(served, named if is_held else body)
        with served.state.serving(
            served.request,
            kind=parsed.kind,
            model=model,
            method="socket",
            prompt=parsed.prompt,
            size=parsed.size,
            dialect=OPENAI.name,
        ) as call:
            fault = served.state.faults.strike(parsed.kind, parsed.prompt)
            served.state.keep_prompt(call, parsed.texts)
            await self._generate(call, body, parsed, fault)

    async def _generate(
        self, call: LoggedCall, body: Json, parsed: ModelRequest, fault: Fault | None
    ) -> None:
        served, state = self._served, self._served.state
        if fault is not None:
            call.fault = fault.fault.value
            if fault.fault is FaultName.HANG:
                await asyncio.get_running_loop().create_future()
            if fault.fault is FaultName.CUT:
                await served.cut(call)
            if (error := served.api.ordered(fault, parsed.model)) is not None:
                state.ledger.end(call, "failed")
                await self._report(error)
                return
        if parsed.prompt.find(_TOO_OLD) >= 0:
            state.ledger.end(call, "failed")
            code = "websocket_connection_limit_reached"
            await self._report(OPENAI.error(400, _LIMIT_REACHED, code=code))
            await self._socket.close()
            return
        behaviour = served.behaviour
        broken = partial(broken_object, OPENAI, GARBAGE)
        script = response_script(broken, body, parsed, behaviour, fault)
        script = openai_stored.keep_response(served, body, script, fault)
        await self._pause(behaviour.first_byte(parsed.kind).draw_ms(state.random))
        if fault is not None and fault.fault is FaultName.SLOW_FIRST_TOKEN:
            await self._pause(fault.delay_ms)
        if body.get("generate") is False:
            state.ledger.charge(call, parsed.input_tokens, 0, 0)
            await self._last(call, _without_output(script.steps[0].data, script.steps[-1].data))
            return
        breaks = fault if fault is not None and fault.fault in MID_ANSWER else None
        for index, step in enumerate(script.steps):
            is_last = index == len(script.steps) - 1
            if index:
                await self._pause(behaviour.between(parsed.kind).draw_ms(state.random))
            if breaks is not None and (is_last or index >= breaks.after_chunks):
                if breaks.fault is FaultName.CUT_MID_STREAM:
                    await served.cut(call)
                if breaks.fault in BREAKS_OFF:
                    await asyncio.get_running_loop().create_future()
                state.ledger.end(call, "failed")
                await self._events(script.broken(index, breaks))
                return
            state.ledger.charge(
                call, parsed.input_tokens, step.output_tokens, script.thoughts_tokens
            )
            state.made(call)
            if is_last:
                await self._last(call, step.data)
            else:
                await self._events(step.data)

    async def _last(self, call: LoggedCall, data: bytes) -> None:
        """Send the last events of a turn, which is over for the client once it has them."""
        state = self._served.state
        state.ledger.end(call, "finished")
        state.settle(call)
        for event in _events_in(data):
            if event["type"] in ("response.completed", "response.incomplete"):
                self._held.add(event["response"]["id"])
        await self._events(data)

    async def _pause(self, delay_ms: float) -> None:
        if delay_ms > 0:
            await asyncio.sleep(delay_ms / 1000)

    async def _events(self, data: bytes) -> None:
        """Send events of a stream over HTTP as messages."""
        for line in data.split(b"\n"):
            if line.startswith(b"data: "):
                await self._send_text(line[6:])

    async def _send_text(self, data: bytes) -> None:
        if self._stream_id is not None:
            data = orjson.dumps({**orjson.loads(data), "stream_id": self._stream_id})
        await self._socket.send_str(data.decode())

    async def _report(self, error: ErrorResponse) -> None:
        """Send a refusal as an event."""
        event: Json = {"type": "error", "status": error.status, "error": _inner(error)}
        headers: Mapping[str, str] = error.headers or {}
        if headers:
            event["headers"] = dict(headers)
        await self._send_text(orjson.dumps(event))


def _inner(error: ErrorResponse) -> Json:
    body = error.body[0] if isinstance(error.body, list) else error.body
    inner: Json = body["error"]
    return inner


def _events_in(data: bytes) -> Iterator[Json]:
    for line in data.split(b"\n"):
        if line.startswith(b"data: "):
            yield orjson.loads(line[6:])


def _without_output(first: bytes, last: bytes) -> bytes:
    """Return the events of a turn that only prepares the state of the next one."""
    created = next(_events_in(first))
    response = list(_events_in(last))[-1]["response"]
    usage = {**response["usage"], "output_tokens": 0}
    usage["total_tokens"] = usage["input_tokens"]
    response |= {"status": "completed", "output": [], "usage": usage, "incomplete_details": None}
    completed = {"type": "response.completed", "sequence_number": 1, "response": response}
    return b"".join(b"data: %b\n\n" % orjson.dumps(one) for one in (created, completed))
