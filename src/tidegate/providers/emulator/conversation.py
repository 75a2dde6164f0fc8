"""A conversation in messages, as OpenAI's and Anthropic's dialects have it: heard and answered.

Invariant: the same conversation gets the same answer; a function is called only when it was made
to be or its name stands in the prompt, and never twice for one question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import orjson

from tidegate.providers.emulator import answers
from tidegate.providers.emulator.answers import Pieces
from tidegate.providers.emulator.delivery import JSON_TYPE, SSE_TYPE, Script, Step
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.faults import Fault, FaultName
from tidegate.providers.emulator.reading import Asked, Attached, count_by_modality
from tidegate.providers.emulator.schema import arguments
from tidegate.providers.emulator.settings import Behaviour

Finish = Literal["stop", "length", "calls", "blocked", "nothing", "unknown"]
Speaker = Literal["system", "user", "assistant", "tool"]
Choice = Literal["auto", "required", "none"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function on offer; `schema` is that of its parameters."""

    name: str
    schema: Json


@dataclass(slots=True)
class Heard:
    """What the messages come to, as a reader goes through them."""

    texts: list[str] = field(default_factory=list)
    attached: list[Attached] = field(default_factory=list)
    system_chars: int = 0
    last_speaker: Speaker = "user"

    def hear(self, speaker: Speaker, text: str | None, file: Attached | None = None) -> None:
        if file is not None:
            self.attached.append(file)
        if speaker == "system":
            self.system_chars += len(text or "")
            return
        self.last_speaker = speaker
        if text is not None:
            self.texts.append(text)

    def asked(
        self, model: str, *, schema: Json | None, max_output_tokens: int | None, thinks: bool
    ) -> Asked:
        prompt = "\n".join(self.texts)
        attached = tuple(self.attached)
        return Asked(
            kind="multi_modal" if attached else "text_only",
            model=model,
            prompt=prompt,
            last_text=self.texts[-1] if self.texts else "",
            attached=attached,
            input_by_modality=count_by_modality(len(prompt) + self.system_chars, attached),
            schema=schema,
            max_output_tokens=max_output_tokens,
            thinks=thinks,
        )

    def calls(self, tools: Sequence[Tool], choice: Choice | Tool, *, several: bool) -> list[Tool]:
        """The functions that the answer calls: those the prompt names, else the one it must."""
        if self.last_speaker == "tool" or choice == "none" or not tools:
            return []
        if isinstance(choice, Tool):
            return [choice]
        last_text = _plain(self.texts[-1]) if self.texts else ""
        named = [tool for tool in tools if f" {_plain(tool.name)} " in f" {last_text} "]
        if not named and choice == "required":
            named = [tools[0]]
        return named if several else named[:1]


def _plain(text: str) -> str:
    return " ".join(re.split(r"\W+|_", text.lower())).strip()


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


def compose(
    asked: Asked, called: Sequence[Tool], behaviour: Behaviour, fault: Fault | None
) -> Composed:
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
            finish = "calls" if called else "stop"
    left = None if most is None else most - thoughts
    if not called:
        text, short = answers.cut(answers.text(asked, behaviour), left, behaviour.chunks)
        return Composed(text, (), "length" if short else finish, thoughts)
    calls = []
    for tool in called:
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
