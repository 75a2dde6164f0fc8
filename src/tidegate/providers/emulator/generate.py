"""Serving generateContent and streamGenerateContent: pace, framing, and faults in mid-answer.

Invariant: a call counts as in flight until just before its last bytes are handed to the kernel, so
that whoever has read the whole answer is never counted as still being served.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal, NoReturn

import orjson
from aiohttp import web

from tidegate.providers.emulator import answers, wire
from tidegate.providers.emulator.faults import BODIES, BREAKS_OFF, MID_ANSWER, Fault, FaultName
from tidegate.providers.emulator.ledger import LoggedCall
from tidegate.providers.emulator.reading import Asked, read_generate
from tidegate.providers.emulator.settings import Behaviour, Distribution
from tidegate.providers.emulator.state import State
from tidegate.providers.emulator.wire import Json

EMULATOR_HEADER = "x-tidegate-emulator"
JSON_TYPE = "application/json; charset=UTF-8"
Framing = Literal["whole", "sse", "array"]
_GARBAGE = b'{"candidates": [{"content": {"parts": [{"te'


def json_response(status: int, body: Any) -> web.Response:
    headers = {EMULATOR_HEADER: "1", "Content-Type": JSON_TYPE}
    return web.Response(status=status, body=orjson.dumps(body), headers=headers)


async def forever() -> NoReturn:
    """Until cancelled, as happens when the client leaves or the server stops."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets this future")


async def cut(state: State, request: web.BaseRequest, call: LoggedCall) -> NoReturn:
    """Close the connection; the loss of it then cancels this task."""
    state.ledger.end(call, "failed")
    if request.transport is not None:
        request.transport.close()
    await forever()


async def early_fault(
    state: State, request: web.BaseRequest, call: LoggedCall, fault: Fault | None
) -> web.Response | None:
    """Carry out a fault that ends the call before it is answered; None when it is not one."""
    if fault is None:
        return None
    call.fault = fault.fault.value
    if fault.fault is FaultName.HANG:
        await forever()
    if fault.fault is FaultName.CUT:
        await cut(state, request, call)
    if (failed := fault.error(call.model)) is not None:
        state.ledger.end(call, "failed")
        status, body = failed
        return json_response(status, body)
    return None


async def generate(
    state: State, request: web.BaseRequest, model: str, body: Any, framing: Framing
) -> web.StreamResponse:
    asked = read_generate(model, body, state.files.look_up)
    with state.serving(
        request,
        kind=asked.kind,
        model=model,
        method="generate" if framing == "whole" else "stream",
        prompt=asked.prompt,
        input_tokens=asked.input_tokens,
    ) as call:
        fault = state.faults.strike(asked.kind, asked.prompt)
        if (early := await early_fault(state, request, call, fault)) is not None:
            return early
        return await _Answering(state, request, call, asked, framing, fault).run()


class _Answering:
    """One answer on its way."""

    def __init__(
        self,
        state: State,
        request: web.BaseRequest,
        call: LoggedCall,
        asked: Asked,
        framing: Framing,
        fault: Fault | None,
    ) -> None:
        self._state = state
        self._request = request
        self._call = call
        self._asked = asked
        self._framing = framing
        self._fault = fault
        self._behaviour = state.behaviour

    async def run(self) -> web.StreamResponse:
        bodies = self._bodies()
        await self._pause(self._behaviour.first_byte(self._asked.kind))
        if self._fault is not None and self._fault.fault is FaultName.SLOW_FIRST_TOKEN:
            await asyncio.sleep(self._fault.delay_ms / 1000)
        if self._framing != "whole":
            return await self._send_stream(bodies)
        for _ in bodies[1:]:
            await self._between()
        return await self._send_whole(bodies[-1])

    @property
    def _fault_name(self) -> FaultName | None:
        return None if self._fault is None else self._fault.fault

    def _bodies(self) -> list[Json]:
        """One body a step in time; an answer that is not streamed is the last of them."""
        asked = self._asked
        response_id = answers.new_response_id()
        if self._fault is not None and self._fault.fault in BODIES:
            return [_faulty_body(self._fault, asked, response_id, self._behaviour)]
        written = answers.write(asked, self._behaviour)
        if self._framing == "whole":
            steps = len(written.parts)
            return [{}] * (steps - 1) + [answers.whole(asked, written, response_id)]
        return answers.chunks(asked, written, response_id)

    async def _pause(self, delays: Distribution) -> None:
        if (delay_ms := delays.draw_ms(self._state.random)) > 0:
            await asyncio.sleep(delay_ms / 1000)

    async def _between(self) -> None:
        await self._pause(self._behaviour.between(self._asked.kind))

    async def _send_whole(self, body: Json) -> web.StreamResponse:
        data = orjson.dumps(body)
        fault = self._fault if self._fault_name in MID_ANSWER else None
        if fault is not None and fault.fault in BREAKS_OFF:
            response = self._response()
            response.content_length = len(data)
            await response.prepare(self._request)
            await self._write(response, data[: len(data) // 2])
            await self._break_off(fault)
        if fault is not None:
            data = _broken(fault)
        self._end("finished" if fault is None else "failed", len(data))
        headers = {EMULATOR_HEADER: "1", "Content-Type": JSON_TYPE}
        return web.Response(body=data, headers=headers)

    async def _send_stream(self, bodies: list[Json]) -> web.StreamResponse:
        response = self._response()
        fault = self._fault if self._fault_name in MID_ANSWER else None
        await response.prepare(self._request)
        for index, body in enumerate(bodies):
            if index:
                await self._between()
            if fault is not None and index >= min(fault.after_chunks, len(bodies) - 1):
                return await self._go_wrong(response, fault, index)
            data = self._framed(index, orjson.dumps(body))
            if index < len(bodies) - 1:
                await self._write(response, data)
        if self._framing == "array":
            data += b"]"
        self._end("finished", len(data))
        await response.write_eof(data)
        return response

    async def _go_wrong(
        self, response: web.StreamResponse, fault: Fault, index: int
    ) -> web.StreamResponse:
        if fault.fault in BREAKS_OFF:
            await self._break_off(fault)
        data = self._framed(index, _broken(fault))
        self._end("failed", len(data))
        await response.write_eof(data)
        return response

    async def _break_off(self, fault: Fault) -> NoReturn:
        if fault.fault is FaultName.CUT_MID_STREAM:
            await cut(self._state, self._request, self._call)
        await forever()

    def _response(self) -> web.StreamResponse:
        sse = self._framing == "sse"
        content_type = "text/event-stream" if sse else JSON_TYPE
        return web.StreamResponse(headers={EMULATOR_HEADER: "1", "Content-Type": content_type})

    def _framed(self, index: int, data: bytes) -> bytes:
        if self._framing == "sse":
            return b"data: " + data + b"\r\n\r\n"
        return (b"[" if index == 0 else b",\r\n") + data

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        self._state.ledger.sent(self._call, len(data))
        await response.write(data)

    def _end(self, outcome: Literal["finished", "failed"], last_bytes: int) -> None:
        self._state.ledger.sent(self._call, last_bytes)
        self._state.ledger.end(self._call, outcome)


def _broken(fault: Fault) -> bytes:
    if fault.fault is FaultName.GARBAGE:
        return _GARBAGE
    message = "The service is currently unavailable."
    if fault.code == 429:
        message = "Resource has been exhausted (e.g. check quota)."
    return orjson.dumps(wire.error(fault.code, message))


def _faulty_body(fault: Fault, asked: Asked, response_id: str, behaviour: Behaviour) -> Json:
    model, used = asked.model, answers.usage_of(asked, 0)
    match fault.fault:
        case FaultName.BLOCKED_PROMPT:
            return wire.blocked(model, response_id, used, fault.reason)
        case FaultName.UNKNOWN_FINISH:
            body = answers.whole(asked, answers.write(asked, behaviour), response_id)
            body["candidates"][0]["finishReason"] = "SOMETHING_NEW"
            return body
        case FaultName.SAFETY | FaultName.NO_IMAGE:
            reason = fault.fault.value.upper()
            return wire.answer(model, response_id, used, parts=None, finish_reason=reason)
    return wire.answer(model, response_id, used, parts=None, finish_reason=None) | {
        "candidates": []
    }
