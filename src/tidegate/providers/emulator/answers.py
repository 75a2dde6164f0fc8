"""What the emulator says: the same request always gets the same answer.

Invariant: the answer names itself as emulated; the tokens counted are the words really sent.
"""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import count, pairwise

import orjson

from tidegate.providers.emulator import sounds, wire
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.pictures import draw
from tidegate.providers.emulator.reading import Asked, Attached
from tidegate.providers.emulator.schema import arguments, structured
from tidegate.providers.emulator.settings import Behaviour

OUTPUT_PICTURE_TOKENS = 1290
THOUGHTS = (
    "This is an emulated thought: no language model was asked, so nobody weighed anything. It "
    "stands where a model would think before it answers, has thirty-two words, and is all made up."
)
THOUGHTS_TOKENS = len(THOUGHTS.split())
SIGNATURE = b64encode(b"an emulated signature of nothing").decode()
QUOTED_WORDS = 12
_WORDS = re.compile(r"\s*\S+\s*")
_response_ids = count(1)
Pieces = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Written:
    """An answer cut into the parts that a stream sends one by one, with their LLM tokens."""

    parts: tuple[tuple[Json, int], ...]
    finish_reason: str

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.parts)


def new_response_id() -> str:
    return f"emulated-{next(_response_ids)}"


def write(asked: Asked, behaviour: Behaviour) -> Written:
    """Compose the answer to a request."""
    if asked.wants_picture:
        written = _picture(asked, behaviour)
    elif asked.called:
        written = _calls(asked)
    elif asked.wants_sound:
        part = wire.media_part(sounds.MIME_TYPE, sounds.hum(asked.prompt))
        written = Written(((part, sounds.TOKENS),), "STOP")
    else:
        pieces, cut_short = cut(text(asked, behaviour), asked.max_output_tokens, behaviour.chunks)
        written = Written(
            tuple((wire.text_part(piece), tokens) for piece, tokens in pieces),
            "MAX_TOKENS" if cut_short else "STOP",
        )
    if not asked.shows_thoughts:
        return written
    return replace(written, parts=((wire.thought_part(THOUGHTS), 0), *written.parts))


def _calls(asked: Asked) -> Written:
    """Calls of functions, each whole, as many as the bound leaves room for."""
    parts: list[tuple[Json, int]] = []
    left = asked.max_output_tokens
    for tool in asked.called:
        given = arguments(asked, tool.schema)
        tokens = len(orjson.dumps(given).split()) + 1
        if left is not None and tokens > left:
            return Written(tuple(parts) or ((wire.text_part(""), 0),), "MAX_TOKENS")
        left = None if left is None else left - tokens
        # A model that thinks signs the first of its calls.
        signature = SIGNATURE if asked.thinks and not parts else None
        parts.append((wire.call_part(tool.name, given, signature), tokens))
    return Written(tuple(parts), "STOP")


def cut(answer: str, most_tokens: int | None, most_pieces: int) -> tuple[Pieces, bool]:
    """Into pieces with their LLM tokens, which are words, and whether the bound left any out."""
    words = _WORDS.findall(answer) or [""]
    cut_short = most_tokens is not None and len(words) > most_tokens
    if cut_short:
        words = words[:most_tokens]
    count = min(most_pieces, len(words))
    if not count:
        return (("", 0),), cut_short
    cuts = [len(words) * index // count for index in range(count + 1)]
    return tuple(("".join(words[a:b]), b - a) for a, b in pairwise(cuts)), cut_short


def whole(asked: Asked, written: Written, response_id: str) -> Json:
    """The answer as one response: thoughts, the text of all chunks together, then the rest."""
    parts = [part for part, _ in written.parts if "thought" in part]
    said = "".join(part["text"] for part, _ in written.parts if part.keys() == {"text"})
    parts += [wire.text_part(said)] if said else []
    parts += [part for part, _ in written.parts if "text" not in part]
    return wire.answer(
        asked.model,
        response_id,
        usage_of(asked, written.tokens),
        parts=parts,
        finish_reason=written.finish_reason,
    )


def chunks(asked: Asked, written: Written, response_id: str) -> list[Json]:
    """The answer as a stream: every chunk is a whole response with the usage so far."""
    tokens = 0
    sent: list[Json] = []
    for index, (part, part_tokens) in enumerate(written.parts):
        tokens += part_tokens
        last = index == len(written.parts) - 1
        sent.append(
            wire.answer(
                asked.model,
                response_id,
                usage_of(asked, tokens),
                parts=[part],
                finish_reason=written.finish_reason if last else None,
            )
        )
    return sent


def usage_of(asked: Asked, output_tokens: int) -> Json:
    thoughts = thoughts_of(asked) if asked.thinks else None
    return wire.usage(asked.input_by_modality, output_tokens, thoughts)


def thoughts_of(asked: Asked) -> int:
    return THOUGHTS_TOKENS if asked.thinks else 0


def embedding(of: str, dimensions: int) -> list[float]:
    """A deterministic vector of length 1."""
    digest = sha256(of.encode("utf-8", "replace")).digest()
    raw = [digest[index % 32] - 127.5 + index % 7 for index in range(dimensions)]
    length = sum(value * value for value in raw) ** 0.5
    return [round(value / length, 8) for value in raw]


def _quoted(prompt: str) -> str:
    words = prompt.split()
    more = "…" if len(words) > QUOTED_WORDS else ""
    return " ".join(words[:QUOTED_WORDS])[:200] + more


def text(asked: Asked, behaviour: Behaviour) -> str:
    """What it says when nothing bounds it."""
    if asked.schema is not None:
        said = structured(asked, asked.schema, behaviour)
        return f"```json\n{said}\n```" if asked.fenced else said
    if behaviour.answer is not None:
        return behaviour.answer
    lines = [
        f"You asked: “{_quoted(asked.last_text)}”." if asked.last_text else "You sent no text.",
        "This is an emulated answer: no language model was asked.",
    ]
    if asked.attached:
        lines.append(f"With it came {_files(asked.attached)}.")
    lines.append(
        "It shows that the whole way works, from you to a provider and back, word by word. "
        "Set GEMINI_API_KEY to hear from a real model."
    )
    return " ".join(lines)


def _files(attached: tuple[Attached, ...]) -> str:
    named = [
        f"{file.mime_type} ({file.size_bytes} bytes)"
        if file.size_bytes is not None
        else f"{file.mime_type} ({file.uri})"
        for file in attached
    ]
    return f"{len(named)} file{'s' if len(named) > 1 else ''}: {', '.join(named)}"


def _picture(asked: Asked, behaviour: Behaviour) -> Written:
    said = f"Here is an emulated picture for “{_quoted(asked.last_text)}”."
    if asked.attached:
        said += f" With it came {_files(asked.attached)}."
    png = draw(asked.prompt, behaviour.image_size)
    return Written(
        (
            (wire.text_part(said), len(said.split())),
            (wire.media_part("image/png", png), OUTPUT_PICTURE_TOKENS),
        ),
        "STOP",
    )
