"""Content of emulated answers: conversation read, text, JSON by schema, calls, images. Pure.

Invariants: the same conversation gets the same answer; the reported output tokens are the words
that were sent; an image is a valid PNG.
"""

from __future__ import annotations

import colorsys
import json
import math
import re
import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from itertools import count, pairwise
from struct import pack
from typing import Any, Literal

import orjson

from tidegate.emulator.counting import CallSize
from tidegate.emulator.dialect import Fault, FaultName, Json
from tidegate.emulator.settings import Behaviour

Choice = Literal["auto", "required", "none"]
Finish = Literal["stop", "length", "calls", "blocked", "nothing", "unknown"]
Speaker = Literal["system", "user", "assistant", "tool"]
Pieces = tuple[tuple[str, int], ...]
PICTURE_TOKENS = 258  # of a picture, or a page of a document, as input
_MODALITY_OF = {"image": "IMAGE", "audio": "AUDIO", "video": "VIDEO", "text": "TEXT"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that a request offers; `schema` is that of its parameters."""

    name: str
    schema: Json


@dataclass(frozen=True, slots=True)
class Attached:
    """An attached file. `size_bytes` is None for a URI of a file that is not stored here."""

    mime_type: str
    size_bytes: int | None
    uri: str | None = None


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """A request that generates, in any dialect.

    `prompt` is all text of the conversation, `last_text` the last of it, `texts` its parts in their
    order with the system prompt first. `called` are the functions that the answer calls. `fenced`:
    the prompt requests JSON in a fenced block of code. `choices` is the number of answers; a stream
    reports its usage only `with_usage`. `tier` is the processing tier, empty for the usual one.
    `at_google`: for a Gemini model in OpenAI's dialect.
    """

    kind: str
    model: str
    prompt: str
    last_text: str
    attached: tuple[Attached, ...]
    input_by_modality: Mapping[str, int]
    texts: tuple[str, ...] = ()
    schema: Json | None = None
    plain_enum: bool = False
    fenced: bool = False
    wants_picture: bool = False
    wants_sound: bool = False
    max_output_tokens: int | None = None
    thinks: bool = False
    shows_thoughts: bool = False
    called: tuple[Tool, ...] = ()
    streamed: bool = False
    choices: int = 1
    with_usage: bool = False
    at_google: bool = False
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    tier: str = ""

    @property
    def input_tokens(self) -> int:
        return sum(self.input_by_modality.values())

    @property
    def uncached_tokens(self) -> int:
        """Return the input tokens that were neither read from the provider's prompt cache nor
        written to it."""
        return self.input_tokens - self.cached_tokens - self.cache_write_tokens

    @property
    def size(self) -> CallSize:
        """Return what the request counts for limits, before its answer."""
        return CallSize(
            self.uncached_tokens,
            self.cached_tokens,
            self.cache_write_tokens,
            self.max_output_tokens,
            self.choices,
            self.choices if self.kind == "image_generation" else 0,
        )


@dataclass(slots=True)
class Conversation:
    """Turns of a request, added in order.

    `called` and `answered` are the calls since the last question, and whether results were sent.
    """

    texts: list[str] = field(default_factory=list)
    attached: list[Attached] = field(default_factory=list)
    system: list[str] = field(default_factory=list)
    called: list[str] = field(default_factory=list)
    answered: bool = False

    def add(self, speaker: Speaker, text: str | None, file: Attached | None = None) -> None:
        if file is not None:
            self.attached.append(file)
        if speaker == "system":
            self.system.append(text or "")
            return
        if speaker == "user":
            self.called.clear()
            self.answered = False
        elif speaker == "tool":
            self.answered = True
        if text is not None:
            self.texts.append(text)

    @property
    def last_text(self) -> str:
        return self.texts[-1] if self.texts else ""

    def json_schema(self) -> Json:
        """Return the schema if any JSON is requested: the schema in the prompt, otherwise any
        object."""
        return schema_in("\n".join([*self.system, *self.texts])) or ANY_OBJECT

    def calls(
        self, tools: Sequence[Tool], choice: Choice | Tool, *, several: bool = True
    ) -> tuple[Tool, ...]:
        """Return the functions that the answer calls: those that the question names, otherwise a
        required one."""
        if choice == "none" or (self.answered and (choice == "auto" or not self.called)):
            return ()
        left = [tool for tool in tools if not self.answered or tool.name not in self.called]
        if isinstance(choice, Tool):
            return (choice,) if choice in left else ()
        named = [] if self.answered else _named(left, self.last_text)
        if not named and choice == "required":
            named = left[:1]
        return tuple(named if several else named[:1])

    def request(
        self, model: str, *, schema: Json | None, fences: bool = True, **more: Any
    ) -> ModelRequest:
        """Return the request; `more` are further fields of it. `fences`: the prompt may contain a
        schema."""
        prompt = "\n".join(self.texts)
        attached = tuple(self.attached)
        fenced = None
        if fences and not schema:
            fenced = fenced_schema_in("\n".join([*self.system, prompt]))
        chars = len(prompt) + sum(len(text) for text in self.system)
        request = ModelRequest(
            kind="multi_modal" if attached else "text_only",
            model=model,
            prompt=prompt,
            last_text=self.last_text,
            attached=attached,
            input_by_modality=count_by_modality(chars, attached),
            texts=(*self.system, *self.texts),
            schema=schema or fenced,
            fenced=fenced is not None,
        )
        return replace(request, **more)


def _named(tools: Sequence[Tool], question: str) -> list[Tool]:
    words = f" {_as_words(question)} "
    return [tool for tool in tools if f" {_as_words(tool.name)} " in words]


def _as_words(text: str) -> str:
    return " ".join(re.split(r"\W+|_", text.lower())).strip()


ANY_OBJECT: Json = {"type": "object", "properties": {"answer": {"type": "string"}}}
_READ_CHARS = 200_000
_TRIES = 50
_FENCE = re.compile(r"```json|json\s+code\s*block", re.IGNORECASE)
_decoder = json.JSONDecoder()


def schema_in(prompt: str) -> Json | None:
    """Return the first JSON object of a prompt that describes an object's properties."""
    if '"properties"' not in prompt:
        return None
    text = prompt[:_READ_CHARS]
    start = text.find("{")
    for _ in range(_TRIES):
        if start < 0:
            break
        try:
            found, end = _decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            if isinstance(found, dict) and isinstance(found.get("properties"), dict):
                return found
        start = text.find("{", end)
    return None


def fenced_schema_in(prompt: str) -> Json | None:
    """Return the schema of a prompt that requests JSON in a fenced block of code."""
    return schema_in(prompt) if _FENCE.search(prompt[-_READ_CHARS:]) else None


@lru_cache(maxsize=256)
def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def get(body: Mapping[str, Any], name: str) -> Any:
    """Return `body[name]`, in camelCase or snake_case; None if it is missing."""
    value = body.get(name)
    return body.get(_snake(name)) if value is None else value


def base64_bytes(data: Any) -> int | None:
    """Return the number of bytes in a base64 text; None if it is not base64."""
    if not isinstance(data, str) or len(data.rstrip("=")) % 4 == 1:
        return None
    return len(data.rstrip("=")) * 3 // 4


def count_by_modality(chars: int, attached: tuple[Attached, ...]) -> dict[str, int]:
    """Return the input tokens of a number of characters and of the attached files, by modality."""
    counted = {"TEXT": math.ceil(chars / 4)}
    for file in attached:
        family = file.mime_type.partition("/")[0]
        modality = _MODALITY_OF.get(family, "DOCUMENT")
        size = file.size_bytes or 0
        tokens = PICTURE_TOKENS
        if modality == "TEXT":
            tokens = math.ceil(size / 4)
        elif modality in ("AUDIO", "VIDEO"):
            tokens = max(PICTURE_TOKENS, size // 500)
        counted[modality] = counted.get(modality, 0) + tokens
    return counted


_FILLING = "Emulated: decided by a few words of the prompt."
MOST_OF_ANYTHING = 10_000  # items of a list, characters of a string
DEEP = 6
_PICTURE_WORDS = re.compile(r"\b(draw|picture|image|photo|paint)", re.IGNORECASE)


def structured(request: ModelRequest, schema: Json, behaviour: Behaviour) -> str:
    """Return JSON that the schema allows, or the bare value of an enum if that is requested."""
    chosen = behaviour.classifier_answer
    if isinstance(chosen, Mapping):
        return orjson.dumps(dict(chosen)).decode()
    value = _Filler(request, chosen, schema).fill(schema)
    return str(value) if request.plain_enum else orjson.dumps(value).decode()


def arguments(request: ModelRequest, schema: Json) -> Json:
    """Return the arguments of a call of a function whose parameters have this schema."""
    value = _Filler(request, None, schema).fill(schema)
    return value if isinstance(value, dict) else {}


def _bound(schema: Json, name: str, default: int) -> int:
    # Google writes its 64-bit numbers as strings.
    value = get(schema, name)
    return min(int(value), MOST_OF_ANYTHING) if str(value).isdecimal() else default


class _Filler:
    """Makes a value that a schema allows; the words of the prompt select the value of an enum."""

    def __init__(self, request: ModelRequest, chosen: str | None, root: Json) -> None:
        self._attached = bool(request.attached)
        self._drawn = bool(_PICTURE_WORDS.search(request.last_text))
        self._chosen = chosen
        self._root = root

    def fill(self, schema: Any, depth: int = 0) -> Any:
        if not isinstance(schema, dict) or depth > 20:
            return None
        if isinstance(schema.get("$ref"), str):
            return self.fill(self._resolve(schema["$ref"]), depth + 1)
        for name in ("anyOf", "any_of", "oneOf", "allOf"):
            options = schema.get(name)
            if isinstance(options, list) and options:
                # A recursive schema ends at the first place where it may.
                ends = depth > DEEP and {"type": "null"} in options
                return None if ends else self.fill(options[0], depth + 1)
        if isinstance(schema.get("enum"), list) and schema["enum"]:
            return self._choose(list(schema["enum"]))
        if "const" in schema:
            return schema["const"]
        properties = schema.get("properties")
        if isinstance(properties, dict):
            return {name: self.fill(inner, depth + 1) for name, inner in properties.items()}
        kinds = schema.get("type", "")
        kind = next(iter(kinds), "") if isinstance(kinds, list) else kinds
        return self._plain(str(kind).lower(), schema, depth)

    def _plain(self, kind: str, schema: Json, depth: int) -> Any:
        match kind:
            case "string":
                return _FILLING[: _bound(schema, "maxLength", len(_FILLING))].ljust(
                    _bound(schema, "minLength", 0), "."
                )
            case "boolean":
                return self._drawn
            case "number":
                return max(min(0.9, schema.get("maximum", 0.9)), schema.get("minimum", 0))
            case "integer":
                return schema.get("minimum", min(1, schema.get("maximum", 1)))
            case "array":
                return [self.fill(schema.get("items"), depth + 1)] * _bound(schema, "minItems", 0)
            case "object":
                return {}
        return None

    def _resolve(self, ref: str) -> Any:
        found: Any = self._root
        for step in ref.removeprefix("#/").split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        return found

    def _choose(self, values: list[Any]) -> Any:
        if self._chosen is not None:
            return self._chosen
        preferred = "image" if self._drawn else "multi" if self._attached else "text"
        for value in values:
            if preferred in str(value).lower():
                return value
        others = [value for value in values if self._drawn or "image" not in str(value).lower()]
        return (others or values)[0]


PICTURES_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@lru_cache(maxsize=64)
def draw(prompt: str, size_px: int) -> bytes:
    """Return a square PNG, 8 bits RGB, `size_px` wide: a gradient of two hues from the top left."""
    digest = sha256(prompt.encode("utf-8", "replace")).digest()
    hue = digest[0] / 256
    start = _colour(hue, 0.55, 0.95)
    end = _colour((hue + 0.15 + digest[1] / 512) % 1, 0.75, 0.55)
    # Every row is a slice of one diagonal ramp of 2 * size - 1 pixels.
    steps = max(2 * size_px - 2, 1)
    ramp = b"".join(
        bytes(round(a + (b - a) * step / steps) for a, b in zip(start, end, strict=True))
        for step in range(2 * size_px - 1)
    )
    rows = b"".join(b"\0" + ramp[3 * y : 3 * (y + size_px)] for y in range(size_px))
    header = pack(">IIBBBBB", size_px, size_px, 8, 2, 0, 0, 0)
    return (
        PICTURES_SIGNATURE
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows, 1))
        + _chunk(b"IEND", b"")
    )


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(part * 255) for part in colorsys.hsv_to_rgb(hue, saturation, value))


def _chunk(name: bytes, data: bytes) -> bytes:
    return pack(">I", len(data)) + name + data + pack(">I", zlib.crc32(name + data))


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


def new_response_id() -> str:
    return f"emulated-{next(_response_ids)}"


def cut(answer: str, most_tokens: int | None, most_pieces: int) -> tuple[Pieces, bool]:
    """Split an answer into pieces with their tokens (words). Also return whether the bound cut the
    answer."""
    words = _WORDS.findall(answer) or [""]
    cut_short = most_tokens is not None and len(words) > most_tokens
    if cut_short:
        words = words[:most_tokens]
    count = min(most_pieces, len(words))
    if not count:
        return (("", 0),), cut_short
    cuts = [len(words) * index // count for index in range(count + 1)]
    return tuple(("".join(words[a:b]), b - a) for a, b in pairwise(cuts)), cut_short


# Models that think by default; lite models, and image models of 2.5, think only on request.
_GEMINI_THINKS = re.compile(
    r"gemini-(?:pro-latest|flash-latest|2\.5-pro|2\.5-flash(?!-lite|-image)|[3-9](?!\S*-lite))"
)


def gemini_thinks(model: str) -> bool:
    return _GEMINI_THINKS.search(model) is not None


def thoughts_of(request: ModelRequest) -> int:
    return THOUGHTS_TOKENS if request.thinks else 0


def embedding(of: str, dimensions: int) -> list[float]:
    """Return a deterministic vector of length 1."""
    digest = sha256(of.encode("utf-8", "replace")).digest()
    raw = [digest[index % 32] - 127.5 + index % 7 for index in range(dimensions)]
    length = sum(value * value for value in raw) ** 0.5
    return [round(value / length, 8) for value in raw]


def quoted(prompt: str) -> str:
    words = prompt.split()
    more = "…" if len(words) > QUOTED_WORDS else ""
    return " ".join(words[:QUOTED_WORDS])[:200] + more


def answer_text(request: ModelRequest, behaviour: Behaviour) -> str:
    """Return the text of an answer without a bound."""
    if request.schema is not None:
        text = structured(request, request.schema, behaviour)
        return f"```json\n{text}\n```" if request.fenced else text
    if behaviour.answer is not None:
        return behaviour.answer
    lines = [
        f"You asked: “{quoted(request.last_text)}”." if request.last_text else "You sent no text.",
        "This is an emulated answer: no language model was asked.",
    ]
    if request.attached:
        lines.append(f"With it came {listed(request.attached)}.")
    lines.append(
        "It shows that the whole way works, from you to a provider and back, word by word. "
        "Set GEMINI_API_KEY to hear from a real model."
    )
    return " ".join(lines)


def listed(attached: tuple[Attached, ...]) -> str:
    named = [
        f"{file.mime_type} ({file.size_bytes} bytes)"
        if file.size_bytes is not None
        else f"{file.mime_type} ({file.uri})"
        for file in attached
    ]
    return f"{len(named)} file{'s' if len(named) > 1 else ''}: {', '.join(named)}"


@dataclass(frozen=True, slots=True)
class CalledFunction:
    """A function call in an answer; its arguments are JSON, split into pieces."""

    id: str
    name: str
    pieces: Pieces

    @property
    def arguments(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


@dataclass(frozen=True, slots=True)
class Moment:
    """A piece of an answer, and the tokens sent so far with it, thoughts included.

    It belongs to the block `block`: a call, or the text if `call` is None.
    """

    block: int
    call: CalledFunction | None
    text: str
    output_tokens: int
    opens: bool
    closes: bool


@dataclass(frozen=True, slots=True)
class Composed:
    """An answer: a text, or calls of functions, or neither."""

    text: Pieces
    calls: tuple[CalledFunction, ...]
    finish: Finish
    thoughts_tokens: int

    @property
    def whole_text(self) -> str | None:
        return "".join(piece for piece, _ in self.text) if self.text else None

    @property
    def output_tokens(self) -> int:
        pieces = [*self.text, *(piece for call in self.calls for piece in call.pieces)]
        return self.thoughts_tokens + sum(tokens for _, tokens in pieces)

    @property
    def blocks(self) -> list[CalledFunction | None]:
        """Return the blocks: None for the text, if there is one, then the calls."""
        return [*([None] if self.text else []), *self.calls]

    def moments(self) -> list[Moment]:
        found: list[Moment] = []
        sent = self.thoughts_tokens
        for block, call in enumerate(self.blocks):
            pieces = self.text if call is None else call.pieces
            for index, (piece, tokens) in enumerate(pieces):
                sent += tokens
                last = index == len(pieces) - 1
                found.append(Moment(block, call, piece, sent, index == 0, last))
        return found


def compose(request: ModelRequest, behaviour: Behaviour, fault: Fault | None) -> Composed:
    """Return the answer, changed by a fault that makes an unusual but well-formed one."""
    most = request.max_output_tokens
    thoughts = thoughts_of(request) if most is None else min(thoughts_of(request), most)
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
            finish = "calls" if request.called else "stop"
    left = None if most is None else most - thoughts
    if not request.called:
        text, short = cut(answer_text(request, behaviour), left, behaviour.chunks)
        return Composed(text, (), "length" if short else finish, thoughts)
    calls = []
    for tool in request.called:
        encoded = orjson.dumps(arguments(request, tool.schema)).decode()
        pieces, short = cut(encoded, left, behaviour.chunks)
        calls.append(CalledFunction(f"call_{new_response_id()}", tool.name, pieces))
        if left is not None:
            left -= sum(tokens for _, tokens in pieces)
        if short:
            finish = "length"
            break
    return Composed((), tuple(calls), finish, thoughts)
