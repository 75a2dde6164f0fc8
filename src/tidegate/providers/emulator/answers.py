"""What the emulator says: the same request always gets the same answer.

Invariant: the answer names itself as emulated; the tokens counted are the words really sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, pairwise

from tidegate.providers.emulator import wire
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.pictures import draw
from tidegate.providers.emulator.reading import Asked, Attached
from tidegate.providers.emulator.schema import structured
from tidegate.providers.emulator.settings import Behaviour

OUTPUT_PICTURE_TOKENS = 1290
THOUGHTS_TOKENS = 32
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
        return _picture(asked, behaviour)
    pieces, cut_short = cut(text(asked, behaviour), asked.max_output_tokens, behaviour.chunks)
    return Written(
        tuple((wire.text_part(piece), tokens) for piece, tokens in pieces),
        "MAX_TOKENS" if cut_short else "STOP",
    )


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
    """The answer as one response: the text of all chunks together, then any picture."""
    said = "".join(part["text"] for part, _ in written.parts if "text" in part)
    parts = [wire.text_part(said)] if said else []
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
        return structured(asked, asked.schema, behaviour)
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
            (wire.picture_part("image/png", png), OUTPUT_PICTURE_TOKENS),
        ),
        "STOP",
    )
