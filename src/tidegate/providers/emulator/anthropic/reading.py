"""What a request in Anthropic's dialect asks for. Pure; knows nothing of limits or answers.

Invariant: fields and blocks that are not known are ignored; a body that Anthropic would refuse is
an AnthropicError that names the field.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tidegate.providers.emulator.anthropic.errors import AnthropicError
from tidegate.providers.emulator.conversation import Heard, Speaker
from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.functions import Choice, Tool
from tidegate.providers.emulator.reading import Asked, Attached

LEAST_BUDGET = 1024
_SPEAKERS: dict[str, Speaker] = {"user": "user", "assistant": "assistant", "system": "system"}
_FILES = {"image": "image/*", "document": "application/pdf"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """`asked` as in Gemini's dialect, and how the answer is to come."""

    asked: Asked
    streamed: bool


def read_messages(body: Any, *, counting: bool = False) -> Wanted:
    """Parse a body of messages, or of messages/count_tokens. Raises AnthropicError (400)."""
    if not isinstance(body, dict):
        raise AnthropicError(400, "The request body is not valid JSON.")
    model, messages, most = body.get("model"), body.get("messages"), body.get("max_tokens")
    if not isinstance(model, str) or not model:
        raise AnthropicError(400, "model: Field required")
    if not isinstance(messages, list) or not messages:
        raise AnthropicError(400, "messages: Field required")
    if not counting and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise AnthropicError(400, "max_tokens: Field required, an integer of at least 1")
    heard = Heard()
    for text, _ in _blocks(body.get("system"), "system"):
        heard.hear("system", text)
    for index, message in enumerate(messages):
        _hear(heard, message, f"messages.{index}")
    asked = heard.asked(
        model,
        schema=_schema(body),
        max_output_tokens=None if counting else most,
        thinks=_thinks(body.get("thinking"), most),
        called=_calls(heard, body),
    )
    return Wanted(replace(asked, shows_thoughts=_shows(body)), body.get("stream") is True)


def _thinks(thinking: Any, most: Any) -> bool:
    kind = thinking.get("type") if isinstance(thinking, dict) else "disabled"
    if kind == "enabled":
        budget = thinking.get("budget_tokens")
        if not isinstance(budget, int) or budget < LEAST_BUDGET:
            raise AnthropicError(
                400,
                "thinking.enabled.budget_tokens: Input should be greater than or equal to "
                f"{LEAST_BUDGET}",
            )
        if isinstance(most, int) and budget >= most:
            raise AnthropicError(400, "`max_tokens` must be greater than `thinking.budget_tokens`.")
    elif kind not in ("disabled", "adaptive"):
        raise AnthropicError(
            400, "thinking.type: Input should be 'enabled', 'disabled' or 'adaptive'"
        )
    return kind != "disabled"


def _shows(body: Json) -> bool:
    thinking = body.get("thinking")
    return isinstance(thinking, dict) and thinking.get("display") != "omitted"


def _hear(heard: Heard, message: Any, place: str) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    speaker = _SPEAKERS.get(str(role))
    if speaker is None:
        raise AnthropicError(400, f"{place}.role: Input should be 'user', 'assistant' or 'system'")
    content = message.get("content")
    results = isinstance(content, list) and any(
        isinstance(block, dict) and block.get("type") == "tool_result" for block in content
    )
    heard.hear("tool" if results else speaker, None)
    for block in content if isinstance(content, list) else ():
        if isinstance(block, dict) and block.get("type") == "tool_use":
            heard.turn.called.append(str(block.get("name")))
    for text, file in _blocks(content, f"{place}.content"):
        heard.hear("tool" if results else speaker, text, file)


def _blocks(content: Any, place: str) -> Iterator[tuple[str | None, Attached | None]]:
    if content is None:
        return
    if isinstance(content, str):
        yield content, None
        return
    if not isinstance(content, list):
        raise AnthropicError(400, f"{place}: Input should be a valid string or list")
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise AnthropicError(400, f"{place}.{index}: Input should be an object")
        yield from _block(block, f"{place}.{index}")


def _block(block: Json, place: str) -> Iterator[tuple[str | None, Attached | None]]:
    kind = block.get("type")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise AnthropicError(400, f"{place}.text: Input should be a valid string")
        yield block["text"], None
    elif kind in _FILES:
        yield _file(block.get("source"), _FILES[kind], f"{place}.source")
    elif kind == "tool_result":
        yield from _blocks(block.get("content"), f"{place}.content")


def _file(source: Any, default: str, place: str) -> tuple[str | None, Attached | None]:
    source = source if isinstance(source, dict) else {}
    match source.get("type"):
        case "base64":
            data = source.get("data")
            if not isinstance(data, str) or len(data.rstrip("=")) % 4 == 1:
                raise AnthropicError(400, f"{place}.base64.data: Invalid base64 data")
            size = len(data.rstrip("=")) * 3 // 4
            return None, Attached(str(source.get("media_type") or default), size)
        case "text":
            return str(source.get("data") or ""), None
        case "url" | "file":
            uri = str(source.get("url") or source.get("file_id") or "")
            return None, Attached(default, None, uri)
    raise AnthropicError(400, f"{place}.type: Input should be 'base64', 'url', 'file' or 'text'")


def _schema(body: Json) -> Json | None:
    config = body.get("output_config")
    wanted = config.get("format") if isinstance(config, dict) else body.get("output_format")
    schema = wanted.get("schema") if isinstance(wanted, dict) else None
    return schema if isinstance(schema, dict) else None


def _calls(heard: Heard, body: Json) -> Sequence[Tool]:
    given = body.get("tools") or []
    if not isinstance(given, list):
        raise AnthropicError(400, "tools: Input should be a valid list")
    tools = [
        Tool(item["name"], item["input_schema"])
        for item in given
        if isinstance(item, dict)
        and isinstance(item.get("name"), str)
        and isinstance(item.get("input_schema"), dict)
    ]
    wanted = body.get("tool_choice")
    wanted = wanted if isinstance(wanted, dict) else {}
    choice: Choice | Tool = "auto"
    if wanted.get("type") in ("none", "any"):
        choice = "none" if wanted["type"] == "none" else "required"
    elif wanted.get("type") == "tool":
        named = [tool for tool in tools if tool.name == wanted.get("name")]
        if not named:
            raise AnthropicError(400, f"Tool '{wanted.get('name')}' not found in provided tools")
        choice = named[0]
    return heard.calls(tools, choice, several=wanted.get("disable_parallel_tool_use") is not True)
