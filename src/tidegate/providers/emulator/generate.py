"""Gemini's generateContent and streamGenerateContent: the script of an answer, and its framing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import orjson
from aiohttp import web

from tidegate.providers.emulator import answers, wire
from tidegate.providers.emulator.delivery import (
    JSON_TYPE,
    SSE_TYPE,
    Script,
    Step,
    broken_object,
    deliver,
)
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.faults import BODIES, Fault, FaultName
from tidegate.providers.emulator.reading import Asked, read_generate
from tidegate.providers.emulator.settings import Behaviour
from tidegate.providers.emulator.state import State

Framing = Literal["whole", "sse", "array"]
Framed = Callable[[int, bytes], bytes]
_GARBAGE = b'{"candidates": [{"content": {"parts": [{"te'


async def generate(
    state: State, request: web.BaseRequest, model: str, body: Any, framing: Framing
) -> web.StreamResponse:
    asked = read_generate(model, body, state.files.look_up)
    method = "generate" if framing == "whole" else "stream"
    scripted = partial(_script, asked, state.behaviour, framing)
    return await deliver(state, request, wire.GEMINI, asked, method, scripted)


def _script(asked: Asked, behaviour: Behaviour, framing: Framing, fault: Fault | None) -> Script:
    frame = _FRAMED[framing]
    bodies = _bodies(asked, behaviour, framing, fault)
    steps = [
        Step(frame(index, orjson.dumps(body)), output_tokens)
        for index, (body, output_tokens) in enumerate(bodies)
    ]
    if framing == "array":
        steps[-1] = Step(steps[-1].data + b"]", steps[-1].output_tokens)
    return Script(
        steps,
        streamed=framing != "whole",
        input_tokens=asked.input_tokens,
        broken=lambda index, fault: frame(index, broken_object(wire.GEMINI, _GARBAGE, fault)),
        thoughts_tokens=answers.thoughts_of(asked),
        content_type=SSE_TYPE if framing == "sse" else JSON_TYPE,
    )


def _bodies(
    asked: Asked, behaviour: Behaviour, framing: Framing, fault: Fault | None
) -> list[tuple[Json, int]]:
    """One body a step in time, with the LLM tokens sent by then."""
    response_id = answers.new_response_id()
    thoughts = answers.thoughts_of(asked)
    written = answers.write(asked, behaviour)
    if fault is not None and fault.fault in BODIES:
        tokens = written.tokens if fault.fault is FaultName.UNKNOWN_FINISH else 0
        return [(_faulty_body(fault, asked, written, response_id), tokens + thoughts)]
    if framing == "whole":
        body = answers.whole(asked, written, response_id)
        return [({}, 0)] * (len(written.parts) - 1) + [(body, written.tokens + thoughts)]
    sent = 0
    bodies = []
    for body, (_, tokens) in zip(
        answers.chunks(asked, written, response_id), written.parts, strict=True
    ):
        sent += tokens
        bodies.append((body, sent + thoughts))
    return bodies


_FRAMED: dict[Framing, Framed] = {
    "whole": lambda index, data: data,
    "sse": lambda index, data: b"data: " + data + b"\r\n\r\n",
    "array": lambda index, data: (b"[" if index == 0 else b",\r\n") + data,
}


def _faulty_body(fault: Fault, asked: Asked, written: answers.Written, response_id: str) -> Json:
    model, used = asked.model, answers.usage_of(asked, 0)
    match fault.fault:
        case FaultName.BLOCKED_PROMPT:
            return wire.blocked(model, response_id, used, fault.reason)
        case FaultName.UNKNOWN_FINISH:
            body = answers.whole(asked, written, response_id)
            body["candidates"][0]["finishReason"] = "SOMETHING_NEW"
            return body
        case FaultName.SAFETY | FaultName.NO_IMAGE:
            reason = fault.fault.value.upper()
            return wire.answer(model, response_id, used, parts=None, finish_reason=reason)
    return wire.answer(model, response_id, used, parts=None, finish_reason=None) | {
        "candidates": []
    }
