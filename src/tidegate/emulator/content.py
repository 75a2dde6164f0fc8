"""Content of emulated answers: text, JSON by schema, tool calls, images, sound. Pure.

Invariants: the same request gets the same answer; the reported tokens are the words that were
sent; an image is a valid PNG; sound is 16-bit little-endian PCM with one channel.
"""

from __future__ import annotations

import colorsys
import json
import math
import re
import zlib
from array import array
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from hashlib import sha256
from itertools import count, pairwise
from struct import pack
from sys import byteorder
from typing import Any, Literal

import orjson

from tidegate.emulator import dialect as wire
from tidegate.emulator.dialect import Json, WireError
from tidegate.emulator.settings import Behaviour

Choice = Literal["auto", "required", "none"]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function on offer; `schema` is that of its parameters."""

    name: str
    schema: Json


@dataclass(slots=True)
class Turn:
    """What a reader finds behind the last question: the calls, and whether results came."""

    called: list[str] = field(default_factory=list)
    answered: bool = False

    def question(self) -> None:
        self.called.clear()
        self.answered = False

    def result(self) -> None:
        self.answered = True

    def calls(
        self, tools: Sequence[Tool], choice: Choice | Tool, question: str, *, several: bool
    ) -> tuple[Tool, ...]:
        """The functions that the answer calls: those the question names, else one that it must."""
        if choice == "none" or (self.answered and (choice == "auto" or not self.called)):
            return ()
        left = [tool for tool in tools if not self.answered or tool.name not in self.called]
        if isinstance(choice, Tool):
            return (choice,) if choice in left else ()
        named = [] if self.answered else _named(left, question)
        if not named and choice == "required":
            named = left[:1]
        return tuple(named if several else named[:1])


def _named(tools: Sequence[Tool], question: str) -> list[Tool]:
    words = f" {_spoken(question)} "
    return [tool for tool in tools if f" {_spoken(tool.name)} " in words]


def _spoken(text: str) -> str:
    return " ".join(re.split(r"\W+|_", text.lower())).strip()


ANY_OBJECT: Json = {"type": "object", "properties": {"answer": {"type": "string"}}}
_READ_CHARS = 200_000
_TRIES = 50
_FENCE = re.compile(r"```json|json\s+code\s*block", re.IGNORECASE)
_decoder = json.JSONDecoder()


def schema_in(prompt: str) -> Json | None:
    """The first JSON object of a prompt that describes an object's properties."""
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
    """The schema of a prompt that asks for JSON between the marks of a block of code."""
    return schema_in(prompt) if _FENCE.search(prompt[-_READ_CHARS:]) else None


PICTURE_TOKENS = 258  # of one picture, or one page of a document, as input
_CHOICES: Mapping[str, Choice] = {
    "AUTO": "auto",
    "MODE_UNSPECIFIED": "auto",
    "VALIDATED": "auto",
    "ANY": "required",
    "NONE": "none",
}
_BAD_CHOICE = "Invalid value at 'tool_config.function_calling_config"
_TYPE_OF_MODE = "type.googleapis.com/google.ai.generativelanguage.v1beta.FunctionCallingConfig.Mode"
_MODALITY_OF = {"image": "IMAGE", "audio": "AUDIO", "video": "VIDEO", "text": "TEXT"}


@dataclass(frozen=True, slots=True)
class Attached:
    """A file that came along. `size_bytes` is None for a URI that is not one of our files."""

    mime_type: str
    size_bytes: int | None
    uri: str | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """`prompt` is all text of the contents; `last_text` the last text part of the last turn.

    `called` are the functions that the answer calls. `fenced`: JSON between the marks of a block
    of code, since the prompt asks for it.
    """

    kind: str
    model: str
    prompt: str
    last_text: str
    attached: tuple[Attached, ...]
    input_by_modality: Mapping[str, int]
    schema: Json | None = None
    plain_enum: bool = False
    fenced: bool = False
    wants_picture: bool = False
    wants_sound: bool = False
    max_output_tokens: int | None = None
    thinks: bool = False
    shows_thoughts: bool = False
    called: tuple[Tool, ...] = ()

    @property
    def input_tokens(self) -> int:
        return sum(self.input_by_modality.values())


FileLookup = Callable[[str], Attached]


@lru_cache(maxsize=256)
def _snake(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name)


def get(body: Mapping[str, Any], name: str) -> Any:
    """`body[name]`, spelled in camelCase or snake_case, else None."""
    value = body.get(name)
    return body.get(_snake(name)) if value is None else value


def read_generate(model: str, body: Any, lookup: FileLookup) -> Asked:
    """Parse a body of generateContent, streamGenerateContent or countTokens.

    `lookup` says what a file URI is, or raises WireError. Raises WireError (400).
    """
    if not isinstance(body, dict):
        raise WireError(400, "Invalid JSON payload received. Expected an object.")
    contents = get(body, "contents")
    if not isinstance(contents, list) or not contents:
        raise WireError(400, "* GenerateContentRequest.contents: contents is not specified\n")
    texts: list[str] = []
    attached: list[Attached] = []
    last_text = ""
    turn = Turn()
    for content in contents:
        _follow(turn, content)
        for part in _parts(content):
            text, file = _part(part, lookup)
            if text is not None:
                texts.append(text)
                last_text = text
            if file is not None:
                attached.append(file)
    config = get(body, "generationConfig")
    config = {} if config is None else config
    if not isinstance(config, dict):
        raise WireError(400, "Invalid value at 'generation_config'")
    prompt = "\n".join(texts)
    system = [_part(part, lookup)[0] or "" for part in _parts(get(body, "systemInstruction") or {})]
    chars = len(prompt) + sum(len(text) for text in system)
    asked = _with_config(model, config, prompt, last_text, tuple(attached), chars)
    if asked.schema is None and get(config, "responseMimeType") == "application/json":
        asked = replace(asked, schema=schema_in("\n".join([*system, prompt])) or ANY_OBJECT)
    tools, choice = _functions(body)
    return replace(asked, called=turn.calls(tools, choice, last_text, several=True))


def _follow(turn: Turn, content: Any) -> None:
    """What a content means for the calls of functions behind the last question."""
    parts = [part for part in _parts(content) if isinstance(part, dict)]
    if content.get("role") == "model":
        calls = [get(part, "functionCall") for part in parts]
        turn.called += [str(call.get("name")) for call in calls if isinstance(call, dict)]
    elif any(isinstance(get(part, "functionResponse"), dict) for part in parts):
        turn.result()
    else:
        turn.question()


def _functions(body: Json) -> tuple[list[Tool], Choice]:
    """The functions on offer, and whether one must be called."""
    given = get(body, "tools") or []
    tools = [
        _function(declared)
        for item in (given if isinstance(given, list) else [given])
        for declared in (isinstance(item, dict) and get(item, "functionDeclarations")) or ()
    ]
    config = get(body, "toolConfig")
    config = get(config, "functionCallingConfig") if isinstance(config, dict) else None
    config = config if isinstance(config, dict) else {}
    mode = str(get(config, "mode") or "AUTO").upper()
    if mode not in _CHOICES:
        raise WireError(400, f"{_BAD_CHOICE}.mode' ({_TYPE_OF_MODE}), {mode!r}")
    allowed = get(config, "allowedFunctionNames")
    if isinstance(allowed, list) and allowed:
        if unknown := set(map(str, allowed)) - {tool.name for tool in tools}:
            raise WireError(
                400, f"{_BAD_CHOICE}.allowed_function_names': {min(unknown)} is not declared"
            )
        tools = [tool for tool in tools if tool.name in allowed]
    return tools, _CHOICES[mode]


def _function(declared: Any) -> Tool:
    name = declared.get("name") if isinstance(declared, dict) else None
    if not isinstance(name, str) or not name:
        raise WireError(
            400,
            "* GenerateContentRequest.tools[0].function_declarations[0].name: Invalid function "
            "name. Must start with a letter or an underscore.",
        )
    schema = get(declared, "parametersJsonSchema") or get(declared, "parameters")
    return Tool(name, schema if isinstance(schema, dict) else {})


def _parts(content: Any) -> Iterator[Any]:
    if not isinstance(content, dict):
        raise WireError(400, "Invalid value at 'contents': expected an object")
    parts = content.get("parts") or ()
    if not isinstance(parts, list | tuple | dict):
        raise WireError(400, "Invalid value at 'contents[0].parts': expected a list")
    yield from [parts] if isinstance(parts, dict) else parts


def _part(part: Any, lookup: FileLookup) -> tuple[str | None, Attached | None]:
    if not isinstance(part, dict):
        raise WireError(400, "Invalid value at 'contents[0].parts[0]': expected an object")
    text = part.get("text")
    if text is not None and not isinstance(text, str):
        raise WireError(400, "Invalid value at 'contents[0].parts[0].text' (TYPE_STRING)")
    inline = get(part, "inlineData")
    if isinstance(inline, dict):
        data = inline.get("data")
        if not isinstance(data, str) or len(data.rstrip("=")) % 4 == 1:
            raise WireError(400, "Invalid value at 'inline_data.data' (TYPE_BYTES), Base64 failed")
        size = len(data.rstrip("=")) * 3 // 4
        mime = get(inline, "mimeType")
        if not mime:
            raise WireError(400, "Unable to process inline data: no mime type")
        return text, Attached(str(mime), size)
    file = get(part, "fileData")
    if isinstance(file, dict):
        found = lookup(str(get(file, "fileUri") or ""))
        mime = str(get(file, "mimeType") or found.mime_type)
        return text, Attached(mime, found.size_bytes, found.uri)
    result = get(part, "functionResponse")
    if isinstance(result, dict):
        return _result(get(result, "response")), None
    return text, None


def _result(response: Any) -> str:
    """What a function returned: the text where it is one, else its JSON."""
    values = list(response.values()) if isinstance(response, dict) else [response]
    value = values[0] if len(values) == 1 else response
    return value if isinstance(value, str) else orjson.dumps(value, default=str).decode()


def _with_config(
    model: str,
    config: Json,
    prompt: str,
    last_text: str,
    attached: tuple[Attached, ...],
    chars: int,
) -> Asked:
    modalities = get(config, "responseModalities") or []
    if not isinstance(modalities, list):
        raise WireError(400, "Invalid value at 'generation_config.response_modalities'")
    wanted = [str(item).upper() for item in modalities]
    wants_picture = "IMAGE" in wanted
    wants_picture = wants_picture or (not modalities and "image" in model)
    mime = get(config, "responseMimeType")
    schema = get(config, "responseJsonSchema") or get(config, "responseSchema")
    schema = schema if isinstance(schema, dict) else None
    chooses = schema is not None and has_enum(schema)
    if schema is not None and chooses and mime in ("application/json", "text/x.enum"):
        kind = "classifier"
    elif wants_picture:
        kind = "image_generation"
    else:
        kind = "multi_modal" if attached else "text_only"
    most = get(config, "maxOutputTokens")
    thinking = get(config, "thinkingConfig")
    thinking = thinking if isinstance(thinking, dict) else {}
    budget = get(thinking, "thinkingBudget")
    thinks = bool(budget) or (budget is None and "pro" in model)
    return Asked(
        kind=kind,
        model=model,
        prompt=prompt,
        last_text=last_text,
        attached=attached,
        input_by_modality=count_by_modality(chars, attached),
        schema=schema if mime in ("application/json", "text/x.enum") else None,
        plain_enum=mime == "text/x.enum",
        wants_picture=wants_picture and kind == "image_generation",
        wants_sound="AUDIO" in wanted,
        max_output_tokens=most if isinstance(most, int) and most > 0 else None,
        thinks=thinks,
        shows_thoughts=thinks and get(thinking, "includeThoughts") is True,
    )


def count_by_modality(chars: int, attached: tuple[Attached, ...]) -> dict[str, int]:
    """Input tokens of so many characters of text and of the files that came along."""
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


def has_enum(schema: Any) -> bool:
    """Whether a schema lets the model choose among named values anywhere in it."""
    if isinstance(schema, dict):
        if isinstance(schema.get("enum"), list):
            return True
        return any(has_enum(value) for value in schema.values())
    return isinstance(schema, list) and any(has_enum(value) for value in schema)


_FILLING = "Emulated: decided by a few words of the prompt."
MOST_OF_ANYTHING = 10_000  # items of a list, characters of a string
DEEP = 6
_PICTURE_WORDS = re.compile(r"\b(draw|picture|image|photo|paint)", re.IGNORECASE)


def structured(asked: Asked, schema: Json, behaviour: Behaviour) -> str:
    """JSON that the schema allows, or the bare value of an enum where that was asked for."""
    chosen = behaviour.classifier_answer
    if isinstance(chosen, Mapping):
        return orjson.dumps(dict(chosen)).decode()
    value = _Filler(asked, chosen, schema).fill(schema)
    return str(value) if asked.plain_enum else orjson.dumps(value).decode()


def arguments(asked: Asked, schema: Json) -> Json:
    """The arguments of a call of a function whose parameters have this schema."""
    value = _Filler(asked, None, schema).fill(schema)
    return value if isinstance(value, dict) else {}


def _bound(schema: Json, name: str, default: int) -> int:
    # Google writes its 64-bit numbers as strings.
    value = get(schema, name)
    return min(int(value), MOST_OF_ANYTHING) if str(value).isdecimal() else default


class _Filler:
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
            options = schema.get(name)
            if isinstance(options, list) and options:
                # A schema that contains itself ends where it may.
                ends = depth > DEEP and {"type": "null"} in options
                return None if ends else self.fill(options[0], depth + 1)
        if schema.get("enum"):
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
        wanted = "image" if self._drawn else "multi" if self._attached else "text"
        for value in values:
            if wanted in str(value).lower():
                return value
        others = [value for value in values if self._drawn or "image" not in str(value).lower()]
        return (others or values)[0]


PICTURES_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@lru_cache(maxsize=64)
def draw(prompt: str, size_px: int) -> bytes:
    """A square PNG, 8 bits RGB, `size_px` wide: one hue at the top left fades into another."""
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


RATE_HZ = 24_000
MIME_TYPE = f"audio/L16;codec=pcm;rate={RATE_HZ}"
DURATION_MS = 400
TOKENS = 25 * DURATION_MS // 1000  # Gemini counts 25 a second


def hum(of: str) -> bytes:
    """A tone whose pitch depends on the text."""
    pitch_hz = 220 + sha256(of.encode("utf-8", "replace")).digest()[0]
    step = math.tau * pitch_hz / RATE_HZ
    samples = array(
        "h",
        (round(8000 * math.sin(step * index)) for index in range(RATE_HZ * DURATION_MS // 1000)),
    )
    if byteorder == "big":
        samples.byteswap()
    return samples.tobytes()


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
        part = wire.media_part(MIME_TYPE, hum(asked.prompt))
        written = Written(((part, TOKENS),), "STOP")
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
