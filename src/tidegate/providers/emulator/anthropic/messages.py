"""Messages: whole, and as a stream of named events.

Invariant: the input's usage comes in the first event of a stream, the output's in the last but one.
"""

from __future__ import annotations

import orjson

from tidegate.providers.emulator import answers, conversation
from tidegate.providers.emulator.answers import SIGNATURE
from tidegate.providers.emulator.anthropic.errors import ANTHROPIC
from tidegate.providers.emulator.anthropic.reading import Wanted
from tidegate.providers.emulator.conversation import (
    Called,
    Composed,
    Moment,
    compose,
    named_event,
    stream_steps,
    whole_steps,
)
from tidegate.providers.emulator.delivery import Script, Step, broken_object
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.faults import Fault, FaultName
from tidegate.providers.emulator.settings import Behaviour

_GARBAGE = b'{"type": "content_block_delta", "del'
_STOP_REASON = {
    "stop": "end_turn",
    "length": "max_tokens",
    "calls": "tool_use",
    "blocked": "refusal",
    "unknown": "something_new",
}


def script(wanted: Wanted, behaviour: Behaviour, fault: Fault | None) -> Script:
    message = _Message(wanted, compose(wanted.asked, behaviour, fault))
    return conversation.script(
        wanted.asked,
        message.composed,
        message.stream() if wanted.streamed else message.whole(),
        streamed=wanted.streamed,
        broken=lambda _, fault: _broken(fault, wanted.streamed),
        headers={"request-id": f"req_{message.id}"},
    )


def _broken(fault: Fault, streamed: bool) -> bytes:
    data = broken_object(ANTHROPIC, _GARBAGE, fault)
    if not streamed:
        return data
    name = b"content_block_delta" if fault.fault is FaultName.GARBAGE else b"error"
    return b"event: %s\ndata: %s\n\n" % (name, data)


class _Message:
    """One answer in the shapes of this API."""

    def __init__(self, wanted: Wanted, composed: Composed) -> None:
        self.id = f"msg_{answers.new_response_id()}"
        self.wanted = wanted
        self.composed = composed

    def whole(self) -> list[Step]:
        composed = self.composed
        content = [_block(call, call.arguments) for call in composed.calls]
        if composed.text:
            content.insert(0, _block(None, composed.said or ""))
        if composed.thoughts_tokens:
            thinking = {"type": "thinking", "thinking": self._thoughts, "signature": SIGNATURE}
            content.insert(0, thinking)
        body = self._body(content, self._stop_reason, composed.output_tokens)
        return whole_steps(composed, body, composed.output_tokens)

    def stream(self) -> list[Step]:
        total = self.composed.output_tokens
        start = {"type": "message_start", "message": self._body([], None, min(1, total))}
        delta = {"stop_reason": self._stop_reason, "stop_sequence": None}
        usage = {"input_tokens": self.wanted.asked.input_tokens, "output_tokens": total}
        end = {"type": "message_delta", "delta": delta, "usage": usage}
        thoughts = self.composed.thoughts_tokens
        first = 1 if thoughts else 0
        pieces = [Step(self._thinking(), thoughts)] * first
        pieces += [
            Step(_piece(moment, moment.block + first), moment.output_tokens)
            for moment in self.composed.moments()
        ]
        return stream_steps(
            named_event(start) + named_event({"type": "ping"}),
            pieces or [Step(b"", total)],
            named_event(end) + named_event({"type": "message_stop"}),
        )

    @property
    def _thoughts(self) -> str:
        """As many words as are charged for, where they are to be shown."""
        words = answers.THOUGHTS.split()[: self.composed.thoughts_tokens]
        return " ".join(words) if self.wanted.asked.shows_thoughts else ""

    def _thinking(self) -> bytes:
        """The block of thoughts as events: the text, then its signature, then the end."""
        block = {"type": "thinking", "thinking": "", "signature": ""}
        deltas: list[Json] = [{"type": "signature_delta", "signature": SIGNATURE}]
        if self._thoughts:
            deltas.insert(0, {"type": "thinking_delta", "thinking": self._thoughts})
        events = [{"type": "content_block_start", "index": 0, "content_block": block}]
        events += [{"type": "content_block_delta", "index": 0, "delta": delta} for delta in deltas]
        return b"".join(map(named_event, [*events, {"type": "content_block_stop", "index": 0}]))

    @property
    def _stop_reason(self) -> str:
        return _STOP_REASON.get(self.composed.finish, "end_turn")

    def _body(self, content: list[Json], stop_reason: str | None, output_tokens: int) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.wanted.asked.model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": None,
            "usage": {
                "input_tokens": self.wanted.asked.input_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": output_tokens,
                "service_tier": "standard",
            },
        }


def _block(call: Called | None, said: str) -> Json:
    """A block of content; an input that a bound has cut off is no JSON, and left empty."""
    if call is None:
        return {"type": "text", "text": said}
    try:
        given = orjson.loads(said or "{}")
    except orjson.JSONDecodeError:
        given = {}
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": given}


def _piece(moment: Moment, index: int) -> bytes:
    events = b""
    if moment.opens:
        block = _block(moment.call, "")
        opened = {"type": "content_block_start", "index": index, "content_block": block}
        events = named_event(opened)
    delta = (
        {"type": "text_delta", "text": moment.text}
        if moment.call is None
        else {"type": "input_json_delta", "partial_json": moment.text}
    )
    events += named_event({"type": "content_block_delta", "index": index, "delta": delta})
    if moment.closes:
        events += named_event({"type": "content_block_stop", "index": index})
    return events
