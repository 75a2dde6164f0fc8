"""A JSON schema that stands in a prompt, where an API has only "some JSON" to ask for.

Invariant: a prompt without a schema costs one search for a word.
"""

from __future__ import annotations

import json
import re

from tidegate.providers.emulator.dialect import Json

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
