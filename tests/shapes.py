"""Whether a real answer looks like the one that a document shows. Pure.

Every key that is shown must be there with a value of the same kind; a `"...": "..."` among them
says that there are others, else there may be none.
"""

from __future__ import annotations

import json
import re
from typing import Any

_MORE = "..."
_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
_NUMBER = r"\d+(?:\.\d+)?"
_VARIES = re.compile(rf"({_ID}|\.\.\.|{_NUMBER})")


def differences(shown: Any, real: Any, where: str = "it") -> list[str]:
    """What differs in shape, in words; empty where nothing does."""
    match shown:
        case dict():
            return _of_objects(shown, real, where)
        case list():
            if not isinstance(real, list) or (shown and not real):
                return [f"{where} is {_kind(real)}, not a list with something in it"]
            return differences(shown[0], real[0], f"{where}[0]") if shown else []
        case _:
            if shown is None or _kind(shown) == _kind(real):
                return []
            return [f"{where} is {_kind(real)}, not {_kind(shown)}"]


def _of_objects(shown: dict[str, Any], real: Any, where: str) -> list[str]:
    if not isinstance(real, dict):
        return [f"{where} is {_kind(real)}, not an object"]
    found = []
    for key, value in shown.items():
        if key != _MORE:
            known = key in real
            found += (
                differences(value, real[key], f"{where}.{key}") if known else [f"no {where}.{key}"]
            )
    if _MORE not in shown:
        found += [f"{where}.{key} is not shown" for key in real if key not in shown]
    return found


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    return {str: "a text", dict: "an object", list: "a list", type(None): "null"}[type(value)]


def streamed(text: str) -> list[dict[str, Any]]:
    """Server-sent events, each kind once, in the order of their first coming."""
    found: dict[str, Any] = {}
    for block in text.strip().split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.splitlines():
            name, _, value = line.partition(": ")
            fields[name] = fields[name] + value if name in fields else value
        if "event" in fields:
            found.setdefault(fields["event"], {"event": fields["event"], "data": _data(fields)})
    return [{name: event["data"] for name, event in found.items()}]


def _data(fields: dict[str, str]) -> Any:
    return json.loads(fields["data"])


def lines_that_differ(shown: str, real: str) -> list[str]:
    """The lines shown that nothing said looks like; numbers, ids and `...` stand for any."""
    said = [" ".join(line.split()) for line in real.splitlines()]
    found = []
    for line in shown.splitlines():
        plain = " ".join(line.split())
        pattern = re.compile("".join(_pattern(part) for part in _VARIES.split(plain)))
        if plain and not any(pattern.fullmatch(one) for one in said):
            found.append(f"nothing like: {plain}")
    return found


def _pattern(part: str) -> str:
    for kind in (_ID, _NUMBER):
        if re.fullmatch(kind, part):
            return kind
    return ".*" if part == _MORE else re.escape(part)
