"""What a request in OpenAI's dialect asks for. Pure; knows nothing of limits or answers.

Invariant: fields that are not known are ignored; a body that OpenAI would refuse is an OpenAIError
that names the field.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tidegate.providers.emulator.conversation import Heard, Speaker
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.functions import Choice, Tool
from tidegate.providers.emulator.openai.errors import OpenAIError, wrong
from tidegate.providers.emulator.openai.parts import read_content
from tidegate.providers.emulator.reading import Asked

MOST_CHOICES = 128
_THINKS = re.compile(r"^(models/)?(o\d|gpt-5)")
_NO_THOUGHTS = (None, "none", "minimal")
_SPEAKERS: dict[str, Speaker] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """`asked` as in Gemini's dialect, and how the answer is to come."""

    asked: Asked
    choices: int = 1
    streamed: bool = False
    with_usage: bool = False


def read_body(body: Any) -> tuple[Json, str]:
    """A body and the model that it names."""
    if not isinstance(body, dict):
        raise OpenAIError(400, "We could not parse the JSON body of your request.")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise wrong("model", "You must provide a model parameter.", "missing_required_parameter")
    return body, model


def read_chat(body: Json, model: str) -> Wanted:
    """Parse a body of chat/completions. Raises OpenAIError (400)."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        message = "Missing required parameter: 'messages'."
        raise wrong("messages", message, "missing_required_parameter")
    heard = Heard()
    for index, message in enumerate(messages):
        _hear(heard, message, f"messages[{index}]")
    options = body.get("stream_options")
    asked = heard.asked(
        model,
        schema=_schema_of(heard, body.get("response_format"), "response_format"),
        max_output_tokens=whole(body, "max_completion_tokens") or whole(body, "max_tokens"),
        thinks=_thinks(model, body.get("reasoning_effort")),
        called=_calls(heard, body),
    )
    choices = whole(body, "n") or 1
    if choices > MOST_CHOICES:
        raise wrong("n", f"Invalid 'n': integer above maximum value: {MOST_CHOICES}.")
    return Wanted(
        asked,
        choices,
        streamed=flag(body, "stream"),
        with_usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


def read_responses(body: Json, model: str) -> Wanted:
    """Parse a body of responses. Raises OpenAIError (400)."""
    heard = Heard()
    heard.hear("system", str(body.get("instructions") or ""))
    given = body.get("input")
    if isinstance(given, str):
        heard.hear("user", given)
    elif isinstance(given, list) and given:
        for index, item in enumerate(given):
            _hear_item(heard, item, f"input[{index}]")
    else:
        raise wrong("input", "Missing required parameter: 'input'.", "missing_required_parameter")
    text, reasoning = body.get("text"), body.get("reasoning")
    wanted = text.get("format") if isinstance(text, dict) else None
    asked = heard.asked(
        model,
        schema=_schema_of(heard, wanted, "text.format"),
        max_output_tokens=whole(body, "max_output_tokens"),
        thinks=_thinks(model, reasoning.get("effort") if isinstance(reasoning, dict) else None),
        called=_calls(heard, body),
    )
    return Wanted(asked, streamed=flag(body, "stream"))


def _hear(heard: Heard, message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise wrong(place, f"Invalid type for '{place}': expected an object.", "invalid_type")
    speaker = _SPEAKERS.get(str(message.get("role")))
    if speaker is None:
        allowed = ", ".join(f"'{name}'" for name in _SPEAKERS)
        raise wrong(
            f"{place}.role",
            f"Invalid value: '{message.get('role')}'. Supported values are: {allowed}.",
        )
    heard.hear(speaker, None)
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            heard.turn.called.append(str(function.get("name")))
    for text, file in read_content(message.get("content"), f"{place}.content"):
        heard.hear(speaker, text, file)


def _hear_item(heard: Heard, item: Any, place: str) -> None:
    if isinstance(item, dict) and item.get("type") == "function_call_output":
        heard.hear("tool", None)
        for text, file in read_content(item.get("output"), f"{place}.output"):
            heard.hear("tool", text, file)
    elif isinstance(item, dict) and item.get("type") == "function_call":
        heard.turn.called.append(str(item.get("name")))
    elif not isinstance(item, dict) or item.get("type", "message") == "message":
        _hear(heard, item, place)


def _schema_of(heard: Heard, wanted: Any, param: str) -> Json | None:
    """The schema of a `response_format`, or of a `text.format`, which is flatter."""
    if not isinstance(wanted, dict):
        return None
    match wanted.get("type"):
        case "json_object":
            return heard.json_schema()
        case "json_schema":
            inner = wanted.get("json_schema", wanted)
            schema = inner.get("schema") if isinstance(inner, dict) else None
            if not isinstance(schema, dict):
                raise wrong(
                    param,
                    f"Missing required parameter: '{param}.schema'.",
                    "missing_required_parameter",
                )
            return schema
    return None


def _calls(heard: Heard, body: Json) -> Sequence[Tool]:
    given = body.get("tools") or []
    if not isinstance(given, list):
        raise wrong("tools", "Invalid type for 'tools': expected a list.", "invalid_type")
    tools = []
    for index, item in enumerate(given):
        if not isinstance(item, dict) or item.get("type") != "function":
            continue
        function = item.get("function", item)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            place = f"tools[{index}].function.name"
            raise wrong(
                place, f"Missing required parameter: '{place}'.", "missing_required_parameter"
            )
        schema = function.get("parameters")
        tools.append(Tool(function["name"], schema if isinstance(schema, dict) else {}))
    several = body.get("parallel_tool_calls") is not False
    return heard.calls(tools, _choice(body.get("tool_choice"), tools), several=several)


def _choice(choice: Any, tools: list[Tool]) -> Choice | Tool:
    if choice in ("none", "required"):
        return "none" if choice == "none" else "required"
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, dict) else None
        for tool in tools:
            if tool.name == name:
                return tool
        raise wrong("tool_choice", f"Tool choice '{name}' not found in 'tools' parameter.")
    return "auto"


def _thinks(model: str, effort: Any) -> bool:
    return effort not in _NO_THOUGHTS or (effort is None and bool(_THINKS.match(model)))


def flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise wrong(name, f"Invalid type for '{name}': expected a boolean.", "invalid_type")
    return bool(value)


def whole(body: Json, name: str) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise wrong(name, f"Invalid '{name}': expected an integer of at least 1.")
    return value
