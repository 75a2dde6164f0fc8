"""Conversation in messages, as OpenAI's and Anthropic's dialects have it.

Invariant: the same conversation gets the same answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import orjson

from tidegate.emulator import content as answers
from tidegate.emulator.content import (
    ANY_OBJECT,
    Asked,
    Attached,
    Choice,
    Pieces,
    Tool,
    Turn,
    arguments,
    count_by_modality,
    fenced_schema_in,
    schema_in,
)
from tidegate.emulator.delivery import JSON_TYPE, SSE_TYPE, Script, Step
from tidegate.emulator.dialect import Json
from tidegate.emulator.limits import Fault, FaultName
from tidegate.emulator.settings import Behaviour

Finish = Literal["stop", "length", "calls", "blocked", "nothing", "unknown"]
Speaker = Literal["system", "user", "assistant", "tool"]


@dataclass(slots=True)
class Heard:
    """What the messages come to, as a reader goes through them."""

    texts: list[str] = field(default_factory=list)
    attached: list[Attached] = field(default_factory=list)
    system: list[str] = field(default_factory=list)
    turn: Turn = field(default_factory=Turn)

    def hear(self, speaker: Speaker, text: str | None, file: Attached | None = None) -> None:
        if file is not None:
            self.attached.append(file)
        if speaker == "system":
            self.system.append(text or "")
            return
        if speaker == "user":
            self.turn.question()
        elif speaker == "tool":
            self.turn.result()
        if text is not None:
            self.texts.append(text)

    def json_schema(self) -> Json:
        """What is to be answered where only "some JSON" is asked for: what the prompt says."""
        return schema_in("\n".join([*self.system, *self.texts])) or ANY_OBJECT

    def asked(
        self,
        model: str,
        *,
        schema: Json | None,
        max_output_tokens: int | None,
        thinks: bool,
        called: Sequence[Tool] = (),
    ) -> Asked:
        prompt = "\n".join(self.texts)
        attached = tuple(self.attached)
        fenced = None if schema else fenced_schema_in("\n".join([*self.system, prompt]))
        return Asked(
            kind="multi_modal" if attached else "text_only",
            model=model,
            prompt=prompt,
            last_text=self.texts[-1] if self.texts else "",
            attached=attached,
            input_by_modality=count_by_modality(
                len(prompt) + sum(len(text) for text in self.system), attached
            ),
            schema=schema or fenced,
            fenced=fenced is not None,
            max_output_tokens=max_output_tokens,
            thinks=thinks,
            called=tuple(called),
        )

    def calls(
        self, tools: Sequence[Tool], choice: Choice | Tool, *, several: bool
    ) -> tuple[Tool, ...]:
        """The functions that the answer calls."""
        question = self.texts[-1] if self.texts else ""
        return self.turn.calls(tools, choice, question, several=several)


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a function in an answer; its arguments are JSON, cut into pieces."""

    id: str
    name: str
    pieces: Pieces

    @property
    def arguments(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


@dataclass(frozen=True, slots=True)
class Moment:
    """A piece of an answer and the LLM tokens sent with it in all, thoughts included.

    It belongs to the block `block`: a call, or the text where `call` is None.
    """

    block: int
    call: Called | None
    text: str
    output_tokens: int
    opens: bool
    closes: bool


@dataclass(frozen=True, slots=True)
class Composed:
    """An answer: a text, or calls of functions, or neither."""

    text: Pieces
    calls: tuple[Called, ...]
    finish: Finish
    thoughts_tokens: int

    @property
    def said(self) -> str | None:
        return "".join(piece for piece, _ in self.text) if self.text else None

    @property
    def output_tokens(self) -> int:
        pieces = [*self.text, *(piece for call in self.calls for piece in call.pieces)]
        return self.thoughts_tokens + sum(tokens for _, tokens in pieces)

    def moments(self) -> list[Moment]:
        found: list[Moment] = []
        sent = self.thoughts_tokens
        blocks: list[tuple[Called | None, Pieces]] = [(call, call.pieces) for call in self.calls]
        if self.text:
            blocks.insert(0, (None, self.text))
        for block, (call, pieces) in enumerate(blocks):
            for index, (piece, tokens) in enumerate(pieces):
                sent += tokens
                last = index == len(pieces) - 1
                found.append(Moment(block, call, piece, sent, index == 0, last))
        return found


def compose(asked: Asked, behaviour: Behaviour, fault: Fault | None) -> Composed:
    """The answer; of the faults, those that make an unusual but well-formed one show in it."""
    most = asked.max_output_tokens
    thoughts = answers.thoughts_of(asked) if most is None else min(answers.thoughts_of(asked), most)
    match None if fault is None else fault.fault:
        case FaultName.BLOCKED_PROMPT | FaultName.SAFETY:
            return Composed((), (), "blocked", thoughts)
        case FaultName.NO_CANDIDATES:
            return Composed((), (), "nothing", thoughts)
        case FaultName.NO_IMAGE:
            return Composed((), (), "stop", thoughts)
        case FaultName.UNKNOWN_FINISH:
            finish: Finish = "unknown"
        case _:
            finish = "calls" if asked.called else "stop"
    left = None if most is None else most - thoughts
    if not asked.called:
        text, short = answers.cut(answers.text(asked, behaviour), left, behaviour.chunks)
        return Composed(text, (), "length" if short else finish, thoughts)
    calls = []
    for tool in asked.called:
        said = orjson.dumps(arguments(asked, tool.schema)).decode()
        pieces, short = answers.cut(said, left, behaviour.chunks)
        calls.append(Called(f"call_{answers.new_response_id()}", tool.name, pieces))
        if left is not None:
            left -= sum(tokens for _, tokens in pieces)
        if short:
            finish = "length"
            break
    return Composed((), tuple(calls), finish, thoughts)


def script(
    asked: Asked,
    composed: Composed,
    steps: Sequence[Step],
    *,
    streamed: bool,
    broken: Callable[[int, Fault], bytes],
    headers: Mapping[str, str],
) -> Script:
    return Script(
        steps,
        streamed=streamed,
        input_tokens=asked.input_tokens,
        broken=broken,
        thoughts_tokens=composed.thoughts_tokens,
        content_type=SSE_TYPE if streamed else JSON_TYPE,
        headers=headers,
    )


def whole_steps(composed: Composed, body: Json, output_tokens: int) -> list[Step]:
    """An answer that is not streamed: it takes as many moments as it would as a stream."""
    waits = max(len(composed.moments()) - 1, 0)
    return [Step(b"", 0)] * waits + [Step(orjson.dumps(body), output_tokens)]


def stream_steps(head: bytes, pieces: Iterable[Step], tail: bytes) -> list[Step]:
    """A stream: what comes before goes out with the first piece, what comes after with the last."""
    found = list(pieces)
    found[0] = Step(head + found[0].data, found[0].output_tokens)
    found[-1] = Step(found[-1].data + tail, found[-1].output_tokens)
    return found


def named_event(event: Json) -> bytes:
    """An SSE event that goes by the name of its type."""
    return b"event: %s\ndata: %s\n\n" % (str(event["type"]).encode(), orjson.dumps(event))
