"""Delivery of answers in any dialect: pace, counting, and faults in mid-answer.

Invariant: a call counts as in flight until just before its last bytes are handed to the kernel, so
that whoever has read the whole answer is never counted as still being served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import orjson
from aiohttp import web

from tidegate.emulator.content import Asked
from tidegate.emulator.dialect import Dialect, Failure
from tidegate.emulator.limits import BREAKS_OFF, MID_ANSWER, Fault, FaultName
from tidegate.emulator.settings import Distribution
from tidegate.emulator.state import LoggedCall, State

EMULATOR_HEADER = "x-tidegate-emulator"
EMULATED = {EMULATOR_HEADER: "1"}
JSON_TYPE = "application/json; charset=UTF-8"
SSE_TYPE = "text/event-stream"
EXHAUSTED = "Resource has been exhausted (e.g. check quota)."
UNAVAILABLE = "The service is currently unavailable."


@dataclass(frozen=True, slots=True)
class Step:
    """What goes out at one moment, and the answer's LLM tokens that are out by then."""

    data: bytes
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Script:
    """An answer, step by step. One that is not streamed is the data of its last step.

    `broken` gives the bytes of a fault that strikes instead of the step of that number.
    """

    steps: Sequence[Step]
    streamed: bool
    input_tokens: int
    broken: Callable[[int, Fault], bytes]
    thoughts_tokens: int = 0
    content_type: str = JSON_TYPE
    headers: Mapping[str, str] = field(default_factory=dict)


Scripted = Callable[[Fault | None], Script]


def json_response(status: int, body: Any, headers: Mapping[str, str] | None = None) -> web.Response:
    whole = EMULATED | {"Content-Type": JSON_TYPE} | dict(headers or {})
    return web.Response(status=status, body=orjson.dumps(body), headers=whole)


def failed(failure: Failure) -> web.Response:
    return json_response(failure.status, failure.body, failure.headers)


def broken_object(dialect: Dialect, garbage: bytes, fault: Fault) -> bytes:
    """What stands where JSON should: half of it, or an error object."""
    if fault.fault is FaultName.GARBAGE:
        return garbage
    message = EXHAUSTED if fault.code == 429 else UNAVAILABLE
    return orjson.dumps(dialect.inside(fault.code, message))


async def deliver(
    state: State,
    request: web.BaseRequest,
    dialect: Dialect,
    asked: Asked,
    method: str,
    scripted: Scripted,
) -> web.StreamResponse:
    """Serve a call that generates; `scripted` composes its answer, given its fault.

    `method` is what the log calls it: `generate` or `stream`.
    """
    with state.serving(
        request,
        kind=asked.kind,
        model=asked.model,
        method=method,
        prompt=asked.prompt,
        input_tokens=asked.input_tokens,
        dialect=dialect.name,
    ) as call:
        fault = state.faults.strike(asked.kind, asked.prompt)
        if (early := await _early_fault(state, request, dialect, call, fault)) is not None:
            return early
        return await _Answering(state, request, call, scripted(fault), fault).run()


async def deliver_other(
    state: State,
    request: web.BaseRequest,
    dialect: Dialect,
    method: str,
    model: str,
    answer: Callable[[], Awaitable[web.Response]],
    *,
    input_tokens: int = 0,
) -> web.StreamResponse:
    """Serve a call that generates nothing; it is counted as the kind `other`."""
    with state.serving(
        request,
        kind="other",
        model=model,
        method=method,
        prompt=request.path,
        input_tokens=input_tokens,
        dialect=dialect.name,
    ) as call:
        fault = state.faults.strike("other", request.path)
        if (early := await _early_fault(state, request, dialect, call, fault)) is not None:
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
        state.ledger.charge(call, input_tokens, 0)
        if isinstance(response.body, bytes):
            state.ledger.sent(call, len(response.body))
        return response


def ready(answer: Callable[[], Any]) -> Callable[[], Awaitable[web.Response]]:
    """An answer for `deliver_other` that needs no waiting."""

    async def respond() -> web.Response:
        return json_response(200, answer())

    return respond


async def _forever() -> NoReturn:
    """Until cancelled, as happens when the client leaves or the server stops."""
    await asyncio.get_running_loop().create_future()
    raise AssertionError("nobody sets this future")


async def _cut(state: State, request: web.BaseRequest, call: LoggedCall) -> NoReturn:
    """Close the connection; the loss of it then cancels this task."""
    state.ledger.end(call, "failed")
    if request.transport is not None:
        request.transport.close()
    await _forever()


async def _early_fault(
    state: State,
    request: web.BaseRequest,
    dialect: Dialect,
    call: LoggedCall,
    fault: Fault | None,
) -> web.Response | None:
    """Carry out a fault that ends the call before it is answered; None when it is not one."""
    if fault is None:
        return None
    call.fault = fault.fault.value
    if fault.fault is FaultName.HANG:
        await _forever()
    if fault.fault is FaultName.CUT:
        await _cut(state, request, call)
    if (failure := dialect.ordered(fault, call.model)) is not None:
        state.ledger.end(call, "failed")
        return failed(failure)
    return None


class _Answering:
    """One answer on its way."""

    def __init__(
        self,
        state: State,
        request: web.BaseRequest,
        call: LoggedCall,
        script: Script,
        fault: Fault | None,
    ) -> None:
        self._state = state
        self._request = request
        self._call = call
        self._script = script
        self._fault = fault
        self._behaviour = state.behaviour

    async def run(self) -> web.StreamResponse:
        await self._pause(self._behaviour.first_byte(self._call.kind))
        if self._fault is not None and self._fault.fault is FaultName.SLOW_FIRST_TOKEN:
            await asyncio.sleep(self._fault.delay_ms / 1000)
        in_mid_answer = self._fault is not None and self._fault.fault in MID_ANSWER
        fault = self._fault if in_mid_answer else None
        if self._script.streamed:
            return await self._send_stream(fault)
        for _ in self._script.steps[1:]:
            await self._between()
        return await self._send_whole(fault)

    async def _pause(self, delays: Distribution) -> None:
        if (delay_ms := delays.draw_ms(self._state.random)) > 0:
            await asyncio.sleep(delay_ms / 1000)

    async def _between(self) -> None:
        await self._pause(self._behaviour.between(self._call.kind))

    async def _send_whole(self, fault: Fault | None) -> web.StreamResponse:
        step = self._script.steps[-1]
        data = step.data
        if fault is not None and fault.fault in BREAKS_OFF:
            response = self._response()
            response.content_length = len(data)
            await response.prepare(self._request)
            self._charge(step)
            await self._write(response, data[: len(data) // 2])
            await self._break_off(fault)
        if fault is not None:
            data = self._script.broken(0, fault)
        else:
            self._charge(step)
        self._end("finished" if fault is None else "failed", len(data))
        return web.Response(body=data, headers=self._headers())

    async def _send_stream(self, fault: Fault | None) -> web.StreamResponse:
        steps = self._script.steps
        response = self._response()
        await response.prepare(self._request)
        for index, step in enumerate(steps):
            if index:
                await self._between()
            if fault is not None and index >= min(fault.after_chunks, len(steps) - 1):
                return await self._go_wrong(response, fault, index)
            self._charge(step)
            if index < len(steps) - 1:
                await self._write(response, step.data)
        self._end("finished", len(steps[-1].data))
        await response.write_eof(steps[-1].data)
        return response

    async def _go_wrong(
        self, response: web.StreamResponse, fault: Fault, index: int
    ) -> web.StreamResponse:
        if fault.fault in BREAKS_OFF:
            await self._break_off(fault)
        data = self._script.broken(index, fault)
        self._end("failed", len(data))
        await response.write_eof(data)
        return response

    async def _break_off(self, fault: Fault) -> NoReturn:
        if fault.fault is FaultName.CUT_MID_STREAM:
            await _cut(self._state, self._request, self._call)
        await _forever()

    def _headers(self) -> dict[str, str]:
        return EMULATED | {"Content-Type": self._script.content_type} | dict(self._script.headers)

    def _response(self) -> web.StreamResponse:
        return web.StreamResponse(headers=self._headers())

    async def _write(self, response: web.StreamResponse, data: bytes) -> None:
        self._state.ledger.sent(self._call, len(data))
        await response.write(data)

    def _charge(self, step: Step) -> None:
        self._state.ledger.charge(
            self._call, self._script.input_tokens, step.output_tokens, self._script.thoughts_tokens
        )

    def _end(self, outcome: Literal["finished", "failed"], last_bytes: int) -> None:
        self._state.ledger.sent(self._call, last_bytes)
        self._state.ledger.end(self._call, outcome)
