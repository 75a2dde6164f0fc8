"""Values that a JSON schema allows: structured answers, and the arguments of a tool call.

Invariant: the same request gets the same value; an enum is decided by the words of its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import orjson

from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.reading import Asked, get
from tidegate.providers.emulator.settings import Behaviour

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
