"""Chat completions: whole, and as a stream of chunks.

Invariant: a stream tells its usage only when asked to, in a last chunk without choices.
"""

from __future__ import annotations

import time

import orjson

from tidegate.providers.emulator import answers, conversation
from tidegate.providers.emulator.conversation import (
    Composed,
    Moment,
    compose,
    stream_steps,
    whole_steps,
)
from tidegate.providers.emulator.delivery import Script, Step, broken_object
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.faults import Fault
from tidegate.providers.emulator.openai.errors import OPENAI
from tidegate.providers.emulator.openai.reading import Wanted
from tidegate.providers.emulator.settings import Behaviour

_GARBAGE = b'{"id": "chatcmpl-emulated", "choices": [{"delta": {"con'
_DONE = b"data: [DONE]\n\n"
_FINISH = {
    "stop": "stop",
    "length": "length",
    "calls": "tool_calls",
    "blocked": "content_filter",
    "unknown": "something_new",
}


def script(wanted: Wanted, behaviour: Behaviour, fault: Fault | None) -> Script:
    chat = _Chat(wanted, compose(wanted.asked, behaviour, fault))
    return conversation.script(
        wanted.asked,
        chat.composed,
        chat.stream() if wanted.streamed else chat.whole(),
        streamed=wanted.streamed,
        broken=lambda _, fault: _framed(broken_object(OPENAI, _GARBAGE, fault), wanted.streamed),
        headers={"x-request-id": chat.id},
    )


def _framed(data: bytes, streamed: bool) -> bytes:
    return b"data: " + data + b"\n\n" if streamed else data


class _Chat:
    """One answer in the shapes of this API."""

    def __init__(self, wanted: Wanted, composed: Composed) -> None:
        self.wanted = wanted
        self.composed = composed
        self.id = f"chatcmpl-{answers.new_response_id()}"
        self._created = int(time.time())
        self._choices = range(0 if composed.finish == "nothing" else wanted.choices)

    def whole(self) -> list[Step]:
        message: Json = {"role": "assistant", "content": self.composed.said, "refusal": None}
        if self.composed.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.composed.calls
            ]
        choices = [
            {"index": index, "message": message, "logprobs": None, "finish_reason": self._finish}
            for index in self._choices
        ]
        body = self._body("chat.completion", choices) | {"usage": self._usage()}
        return whole_steps(self.composed, body, self._billed())

    def stream(self) -> list[Step]:
        content = None if self.composed.calls else ""
        head = self._deltas({"role": "assistant", "content": content, "refusal": None})
        tail = self._deltas({}, self._finish)
        if self.wanted.with_usage:
            tail += self._event([], self._usage())
        pieces = [
            Step(self._piece(moment), self._billed(moment.output_tokens))
            for moment in self.composed.moments()
        ]
        return stream_steps(head, pieces or [Step(b"", self._billed())], tail + _DONE)

    def _piece(self, moment: Moment) -> bytes:
        call = moment.call
        if call is None:
            return self._deltas({"content": moment.text})
        opening = b""
        if moment.opens:
            function = {"name": call.name, "arguments": ""}
            start = {"index": moment.block, "id": call.id, "type": "function", "function": function}
            opening = self._deltas({"tool_calls": [start]})
        more = {"index": moment.block, "function": {"arguments": moment.text}}
        return opening + self._deltas({"tool_calls": [more]})

    def _deltas(self, delta: Json, finish: str | None = None) -> bytes:
        """The same for each choice, in an event of its own."""
        return b"".join(
            self._event(
                [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}]
            )
            for index in self._choices
        )

    def _event(self, choices: list[Json], usage: Json | None = None) -> bytes:
        body = self._body("chat.completion.chunk", choices)
        if self.wanted.with_usage:
            body["usage"] = usage
        return _framed(orjson.dumps(body), True)

    @property
    def _finish(self) -> str:
        return _FINISH.get(self.composed.finish, "stop")

    def _body(self, name: str, choices: list[Json]) -> Json:
        return {
            "id": self.id,
            "object": name,
            "created": self._created,
            "model": self.wanted.asked.model,
            "service_tier": "default",
            "system_fingerprint": "fp_emulated",
            "choices": choices,
        }

    def _billed(self, output_tokens: int | None = None) -> int:
        """Every choice is charged for, the thoughts before them once."""
        thoughts = self.composed.thoughts_tokens
        one = self.composed.output_tokens if output_tokens is None else output_tokens
        return thoughts + len(self._choices) * (one - thoughts)

    def _usage(self) -> Json:
        prompt, completion = self.wanted.asked.input_tokens, self._billed()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.composed.thoughts_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }
