"""What the emulator says: the same request always gets the same answer.

Invariant: the answer names itself as emulated; the tokens counted are the words really sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import count, pairwise
from typing import Any

import orjson

from tidegate.providers.emulator import wire
from tidegate.providers.emulator.pictures import draw
from tidegate.providers.emulator.reading import Asked, Attached, get
from tidegate.providers.emulator.settings import Behaviour
from tidegate.providers.emulator.wire import Json

OUTPUT_PICTURE_TOKENS = 1290
THOUGHTS_TOKENS = 32
QUOTED_WORDS = 12
_WORDS = re.compile(r"\s*\S+\s*")
_PICTURE_WORDS = re.compile(r"\b(draw|picture|image|photo|paint)", re.IGNORECASE)
_response_ids = count(1)


@dataclass(frozen=True, slots=True)
class Written:
    """An answer cut into the parts that a stream sends one by one, with their LLM tokens."""

    parts: tuple[tuple[Json, int], ...]
    finish_reason: str


def new_response_id() -> str:
    return f"emulated-{next(_response_ids)}"


def write(asked: Asked, behaviour: Behaviour) -> Written:
    """Compose the answer to a request."""
    if asked.wants_picture:
        return _picture(asked, behaviour)
    finish_reason = "STOP"
    words = _WORDS.findall(_text(asked, behaviour)) or [""]
    if asked.max_output_tokens is not None and len(words) > asked.max_output_tokens:
        words = words[: asked.max_output_tokens]
        finish_reason = "MAX_TOKENS"
    pieces = min(behaviour.chunks, len(words))
    cuts = [len(words) * index // pieces for index in range(pieces + 1)]
    return Written(
        tuple(
            (wire.text_part("".join(words[start:end])), end - start)
            for start, end in pairwise(cuts)
        ),
        finish_reason,
    )


def whole(asked: Asked, written: Written, response_id: str) -> Json:
    """The answer as one response: the text of all chunks together, then any picture."""
    text = "".join(part["text"] for part, _ in written.parts if "text" in part)
    parts = [wire.text_part(text)] if text else []
    parts += [part for part, _ in written.parts if "text" not in part]
    tokens = sum(tokens for _, tokens in written.parts)
    return wire.answer(
        asked.model,
        response_id,
        usage_of(asked, tokens),
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
    thoughts = THOUGHTS_TOKENS if asked.thinks else None
    return wire.usage(asked.input_by_modality, output_tokens, thoughts)


def embedding(text: str, dimensions: int) -> list[float]:
    """A deterministic vector of length 1."""
    digest = sha256(text.encode("utf-8", "replace")).digest()
    raw = [digest[index % 32] - 127.5 + index % 7 for index in range(dimensions)]
    length = sum(value * value for value in raw) ** 0.5
    return [round(value / length, 8) for value in raw]


def _quoted(text: str) -> str:
    words = text.split()
    more = "…" if len(words) > QUOTED_WORDS else ""
    return " ".join(words[:QUOTED_WORDS])[:200] + more


def _text(asked: Asked, behaviour: Behaviour) -> str:
    if asked.schema is not None:
        return _structured(asked, behaviour)
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
    text = f"Here is an emulated picture for “{_quoted(asked.last_text)}”."
    if asked.attached:
        text += f" With it came {_files(asked.attached)}."
    png = draw(asked.prompt, behaviour.image_size)
    return Written(
        (
            (wire.text_part(text), len(text.split())),
            (wire.picture_part("image/png", png), OUTPUT_PICTURE_TOKENS),
        ),
        "STOP",
    )


def _structured(asked: Asked, behaviour: Behaviour) -> str:
    chosen = behaviour.classifier_answer
    if isinstance(chosen, Mapping):
        return orjson.dumps(dict(chosen)).decode()
    schema = asked.schema or {}
    value = _SchemaFiller(asked, chosen, schema).fill(schema)
    return str(value) if asked.plain_enum else orjson.dumps(value).decode()


class _SchemaFiller:
    """Makes a value that a schema allows; an enum is decided by the words of the prompt."""

    def __init__(self, asked: Asked, chosen: str | None, root: Json) -> None:
        self._attached = bool(asked.attached)
        self._drawn = bool(_PICTURE_WORDS.search(asked.last_text))
        self._chosen = chosen
        self._root = root

    def fill(self, schema: Any, depth: int = 0) -> Any:
        if not isinstance(schema, dict) or depth > 20:
            return None
        if isinstance(schema.get("$ref"), str):
            return self.fill(self._resolve(schema["$ref"]), depth + 1)
        for name in ("anyOf", "any_of", "oneOf", "allOf"):
            if isinstance(schema.get(name), list) and schema[name]:
                return self.fill(schema[name][0], depth + 1)
        if schema.get("enum"):
            return self._choose([str(value) for value in schema["enum"]])
        properties = schema.get("properties")
        if isinstance(properties, dict):
            return {name: self.fill(inner, depth + 1) for name, inner in properties.items()}
        return self._plain(str(schema.get("type", "")).lower(), schema, depth)

    def _plain(self, kind: str, schema: Json, depth: int) -> Any:
        match kind:
            case "string":
                return "Emulated: decided by a few words of the prompt."
            case "boolean":
                return self._drawn
            case "number":
                return min(0.9, schema.get("maximum", 0.9))
            case "integer":
                return schema.get("minimum", 1)
            case "array":
                wanted = get(schema, "minItems") or 0
                return [self.fill(schema.get("items"), depth + 1)] * int(wanted)
            case "object":
                return {}
        return None

    def _resolve(self, ref: str) -> Any:
        found: Any = self._root
        for step in ref.removeprefix("#/").split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        return found

    def _choose(self, values: list[str]) -> str:
        if self._chosen is not None:
            return self._chosen
        wanted = "image" if self._drawn else "multi" if self._attached else "text"
        for value in values:
            if wanted in value.lower():
                return value
        others = [value for value in values if self._drawn or "image" not in value.lower()]
        return (others or values)[0]
