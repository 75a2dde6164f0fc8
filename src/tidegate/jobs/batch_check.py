"""Whether a batch's input file is sound: line by line, in OpenAI's words for what is not. Pure.

Invariant: what passes can be relayed as it is: its custom_id is the only one of that name, its body
names a model and asks for no stream.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from dataclasses import dataclass, field
from typing import Any

import orjson

from tidegate.errors import InvalidRequest
from tidegate.relay.asked import MOST_PARTS, has_too_many_parts
from tidegate.relay.detached import asked_by, endpoint_named

MOST_LINES = 50_000
MOST_ERRORS = 100
_LONGEST_ID = 512


@dataclass(frozen=True, slots=True)
class Sound:
    """A line that passes. body: as JSON, of ASCII and escapes or UTF-8, without line ends."""

    line: int
    custom_id: str
    body: str


@dataclass(slots=True)
class Check:
    """One file. `errors` has the first hundred; `lines` counts those that are not blank."""

    endpoint: str
    lines: int = 0
    errors: list[dict[str, Any]] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    @property
    def is_over(self) -> bool:
        """Whether to read on is of no use."""
        return len(self.errors) >= MOST_ERRORS or self.lines > MOST_LINES

    def take(self, number: int, raw: bytes) -> Sound | None:
        """Check line `number`, counted from 1; a byte order mark before that is passed over."""
        if number == 1:
            raw = raw.removeprefix(BOM_UTF8)
        if not raw.strip():
            return None
        self.lines += 1
        if self.lines > MOST_LINES:
            self._wrong("too_many_lines", None, f"a batch has at most {MOST_LINES} lines", None)
            return None
        if has_too_many_parts(raw):
            said = f"this line holds too many values: {MOST_PARTS} are taken"
            self._wrong("invalid_json_line", number, said, None)
            return None
        try:
            value = orjson.loads(raw)
        except orjson.JSONDecodeError as broken:
            self._wrong("invalid_json_line", number, f"this line is not JSON: {broken}", None)
            return None
        if not isinstance(value, dict):
            self._wrong("invalid_json_line", number, "this line is not a JSON object", None)
            return None
        return self._sound(number, value)

    def end(self) -> None:
        """The file has no more lines."""
        if not self.lines:
            self._wrong("empty_file", None, "the input file has no lines", None)

    def _sound(self, number: int, value: dict[str, Any]) -> Sound | None:
        custom_id, body = value.get("custom_id"), value.get("body")
        if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _LONGEST_ID:
            said = f"custom_id must be a text of 1 to {_LONGEST_ID} characters"
            self._wrong("missing_custom_id", number, said, "custom_id")
            return None
        if "\x00" in custom_id:
            self._wrong("invalid_custom_id", number, "a NUL is in custom_id", "custom_id")
            return None
        if custom_id in self._seen:
            said = f"the custom_id {custom_id[:64]!r} is there already"
            self._wrong("duplicate_custom_id", number, said, "custom_id")
            return None
        self._seen.add(custom_id)
        if value.get("method") != "POST":
            self._wrong("invalid_method", number, "method must be POST", "method")
            return None
        if value.get("url") != self.endpoint:
            said = f"url must be the batch's endpoint, {self.endpoint}"
            self._wrong("mismatched_url", number, said, "url")
            return None
        if not isinstance(body, dict):
            self._wrong("invalid_body", number, "body must be an object", "body")
            return None
        try:
            asked_by(endpoint_named(self.endpoint), body)
        except InvalidRequest as wrong:
            param = wrong.field if wrong.field.startswith("body") else f"body.{wrong.field}"
            self._wrong("invalid_body", number, wrong.message, param)
            return None
        return Sound(number, custom_id, orjson.dumps(body).decode())

    def _wrong(self, code: str, line: int | None, message: str, param: str | None) -> None:
        self.errors.append({"code": code, "line": line, "message": message, "param": param})
