"""Shapes of OpenAI's Responses API: an answer as one object, or as a stream of typed events.

Invariant: every event has the next `sequence_number`, and the last one is the whole response.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count

import orjson

from tidegate.emulator.content import (
    CalledFunction,
    Composed,
    ModelRequest,
    Moment,
    compose,
    new_response_id,
)
from tidegate.emulator.delivery import (
    AnswerScript,
    ScriptStep,
    data_event,
    named_event,
    stream_steps,
    whole_steps,
)
from tidegate.emulator.dialect import Json
from tidegate.emulator.limits import Fault, FaultName
from tidegate.emulator.settings import Behaviour

GARBAGE = b'{"type": "response.output_text.delta", "del'
_ECHOED: Json = {
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "store": True,
    "temperature": 1.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
}


def response_script(
    broken: Callable[[Fault], bytes],
    body: Json,
    asked: ModelRequest,
    behaviour: Behaviour,
    fault: Fault | None,
) -> AnswerScript:
    """The answer to a request with this `body`; `broken` gives the body of a fault."""
    answer = _ResponseObject(asked, body, compose(asked, behaviour, fault))

    def broken_event(index: int, fault: Fault) -> bytes:
        """An `error` event is flat: it holds the fields of the error object."""
        data = broken(fault)
        if fault.fault is FaultName.GARBAGE:
            return b"event: response.output_text.delta\n" + data_event(data)
        error = orjson.loads(data)["error"]
        named = error | {"type": "error", "code": error["code"] or error["type"]}
        return named_event(named | {"sequence_number": index})

    return AnswerScript(
        answer.stream() if asked.streamed else answer.whole(),
        broken_event if asked.streamed else lambda _, fault: broken(fault),
        answer.composed.thoughts_tokens,
        {"x-request-id": answer.id},
    )


class _ResponseObject:
    """One answer in the shapes of this API."""

    def __init__(self, asked: ModelRequest, body: Json, composed: Composed) -> None:
        self._asked = asked
        self.composed = composed
        self.id = f"resp_{new_response_id()}"
        self._body = body
        self._created = int(time.time())
        self._sequence = count()

    def whole(self) -> list[ScriptStep]:
        return whole_steps(self.composed, self._ended(), self.composed.output_tokens)

    def stream(self) -> list[ScriptStep]:
        begun = self._response("in_progress", [], None)
        head = self._event("response.created", response=begun)
        head += self._event("response.in_progress", response=begun)
        pieces = [
            ScriptStep(self._piece(moment), moment.output_tokens)
            for moment in self.composed.moments()
        ]
        ended = self._ended()
        tail = self._event(f"response.{ended['status']}", response=ended)
        return stream_steps(head, pieces or [ScriptStep(b"", self.composed.output_tokens)], tail)

    def _piece(self, moment: Moment) -> bytes:
        events = b""
        if moment.opens:
            events += self._opened(moment)
        place = {"item_id": self._item_id(moment.block), "output_index": moment.block}
        if moment.call is None:
            text = {**place, "content_index": 0, "delta": moment.text, "logprobs": []}
            events += self._event("response.output_text.delta", **text)
        else:
            name = "response.function_call_arguments.delta"
            events += self._event(name, **place, delta=moment.text)
        return events + (self._closed(moment) if moment.closes else b"")

    def _opened(self, moment: Moment) -> bytes:
        item = self._item(moment.block, moment.call, "in_progress")
        events = self._event("response.output_item.added", output_index=moment.block, item=item)
        if moment.call is None:
            events += self._event(
                "response.content_part.added", **self._content(moment), part=_text_part("")
            )
        return events

    def _closed(self, moment: Moment) -> bytes:
        if moment.call is None:
            text = self.composed.said or ""
            events = self._event(
                "response.output_text.done", **self._content(moment), text=text, logprobs=[]
            )
            events += self._event(
                "response.content_part.done", **self._content(moment), part=_text_part(text)
            )
        else:
            events = self._event(
                "response.function_call_arguments.done",
                item_id=self._item_id(moment.block),
                output_index=moment.block,
                name=moment.call.name,
                arguments=moment.call.arguments,
            )
        item = self._item(moment.block, moment.call, "completed")
        return events + self._event(
            "response.output_item.done", output_index=moment.block, item=item
        )

    def _content(self, moment: Moment) -> Json:
        item_id = self._item_id(moment.block)
        return {"item_id": item_id, "output_index": moment.block, "content_index": 0}

    def _item_id(self, block: int) -> str:
        return f"item_{self.id}_{block}"

    def _item(self, block: int, call: CalledFunction | None, status: str) -> Json:
        done = status == "completed"
        if call is not None:
            return {
                "id": self._item_id(block),
                "type": "function_call",
                "status": status,
                "call_id": call.id,
                "name": call.name,
                "arguments": call.arguments if done else "",
            }
        return {
            "id": self._item_id(block),
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [_text_part(self.composed.said or "")] if done else [],
        }

    def _ended(self) -> Json:
        reason = {"length": "max_output_tokens", "blocked": "content_filter"}.get(
            self.composed.finish
        )
        output = [
            self._item(block, call, "completed") for block, call in enumerate(self.composed.blocks)
        ]
        status = "incomplete" if reason else "completed"
        ended = self._response(status, output, self._usage())
        return ended | {"incomplete_details": {"reason": reason} if reason else None}

    def _response(self, status: str, output: list[Json], usage: Json | None) -> Json:
        echoed = {name: self._body.get(name, value) for name, value in _ECHOED.items()}
        return echoed | {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self._asked.model,
            "service_tier": self._asked.tier or "default",
            "output": output,
            "usage": usage,
        }

    def _event(self, name: str, /, **fields: object) -> bytes:
        return named_event({"type": name, "sequence_number": next(self._sequence), **fields})

    def _usage(self) -> Json:
        read, wrote = self._asked.input_tokens, self.composed.output_tokens
        return {
            "input_tokens": read,
            "input_tokens_details": {
                "cached_tokens": self._asked.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": wrote,
            "output_tokens_details": {"reasoning_tokens": self.composed.thoughts_tokens},
            "total_tokens": read + wrote,
        }


def _text_part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
