"""What a request asks for, as an upstream sees it. Pure; knows nothing of limits or answers.

Invariant: camelCase and snake_case are the same; a body that Gemini would refuse is a WireError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import orjson

from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.functions import Choice, Tool, Turn
from tidegate.providers.emulator.prompted import ANY_OBJECT, schema_in
from tidegate.providers.emulator.wire import WireError

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
