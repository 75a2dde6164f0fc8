"""The lines of a file of prompts: JSON lines, plain lines or CSV, as requests to hand in.

Invariant: a line's key is made of what is asked in the whole file and of the line's number, so that
handing it in again, after whatever ended the last run, gives the same request and not another one.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tidegate.errors import ConfigError

MOST_BYTES = 200_000_000
MOST_LINES = 1_000_000
_PROMPTS = ("prompt", "data", "text")
_IDS = ("id", "custom_id", "prompt_id")
_ALONG = ("type", "model", "image_uri", "subject")


@dataclass(frozen=True, slots=True)
class Line:
    """One request. `number` counts from 1 in the file; `fields` are those of `POST /submit`."""

    number: int
    prompt_id: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Prompts:
    """A whole file. `digest` is of what is asked in it, with the options of the run."""

    lines: tuple[Line, ...]
    digest: str

    def key(self, line: Line, retries: int) -> str:
        """The idempotency key of a line that has failed so often before."""
        again = f"-r{retries}" if retries else ""
        return f"batch-{self.digest}-{line.number}{again}"


def read(path: Path, column: str | None, options: dict[str, Any]) -> Prompts:
    """The file's lines; `options` go into each that does not say otherwise.

    Raises ConfigError, which names the line, for what can't be a prompt, and for an id that is
    there twice.
    """
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ConfigError("FILE", str(path), f"must be at most {MOST_BYTES} bytes; split it")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as wrong:
        why = getattr(wrong, "strerror", None) or "not UTF-8 text"
        raise ConfigError("FILE", str(path), f"must be a readable file: {why}") from None
    is_table = path.suffix.lower() in (".csv", ".tsv")
    found = _of_table(path, text, column, options) if is_table else _of_lines(path, text, options)
    lines = tuple(found)
    _check(path, lines)
    asked = json.dumps([line.fields for line in lines], sort_keys=True).encode()
    return Prompts(lines, hashlib.sha256(asked).hexdigest()[:32])


def _check(path: Path, lines: tuple[Line, ...]) -> None:
    if not lines:
        raise ConfigError("FILE", str(path), "must have at least one prompt in it")
    if len(lines) > MOST_LINES:
        raise ConfigError("FILE", str(path), f"must have at most {MOST_LINES} lines; split it")
    seen: dict[str, int] = {}
    for line in lines:
        if (before := seen.setdefault(line.prompt_id, line.number)) != line.number:
            raise _wrong(path, line.number, f"has the id {line.prompt_id!r} of line {before}")


def _of_lines(path: Path, text: str, options: dict[str, Any]) -> Iterator[Line]:
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if line:
            yield _line(path, number, _value(path, number, line), options)


def _value(path: Path, number: int, line: str) -> Any:
    """The JSON of a line; what is none and does not look like it is a prompt as it stands."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        if line[0] in "{[":
            raise _wrong(path, number, "is broken JSON") from None
        return line
    return value if isinstance(value, str | dict | list) else line


def _line(path: Path, number: int, value: Any, options: dict[str, Any]) -> Line:
    if isinstance(value, str):
        return Line(number, str(number), {**options, "data": value})
    if not isinstance(value, dict):
        raise _wrong(path, number, "must be a text or an object")
    prompt_id = next((str(value[name]) for name in _IDS if value.get(name) is not None), None)
    prompt_id = prompt_id or str(number)
    if "url" in value and "body" in value:
        return Line(number, prompt_id, _native(value, options))
    prompt = next((value[name] for name in _PROMPTS if value.get(name) is not None), None)
    if not isinstance(prompt, str) or not prompt.strip():
        raise _wrong(path, number, f"must have a text as one of {', '.join(_PROMPTS)}")
    unknown = set(value) - {*_PROMPTS, *_IDS, *_ALONG}
    if unknown:
        known = ", ".join((*_PROMPTS, "id", *_ALONG))
        raise _wrong(path, number, f"has {sorted(unknown)[0]!r}; known are {known}")
    along = {name: value[name] for name in _ALONG if value.get(name) is not None}
    return Line(number, prompt_id, {**options, **along, "data": prompt})


def _native(value: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """A line of OpenAI's batches; what the options say of models and types is in its body."""
    kept: dict[str, Any] = {
        name: options[name] for name in ("priority", "deadline_ms") if name in options
    }
    return {**kept, "endpoint": value["url"], "body": value["body"]}


def _of_table(path: Path, text: str, column: str | None, options: dict[str, Any]) -> Iterator[Line]:
    rows = csv.DictReader(
        text.splitlines(keepends=True), delimiter="\t" if path.suffix.lower() == ".tsv" else ","
    )
    columns = [name for name in rows.fieldnames or () if name]
    wanted = [column] if column is not None else [one for one in _PROMPTS if one in columns]
    if not wanted or wanted[0] not in columns:
        there = ", ".join(columns) or "none"
        raise ConfigError(
            "--column", column or "(not given)", f"must be a column of {path}: {there}"
        )
    csv.field_size_limit(MOST_BYTES)
    for number, row in enumerate(rows, start=1):
        prompt = (row[wanted[0]] or "").strip()
        if not prompt:
            raise _wrong(path, number, f"has nothing in the column {wanted[0]}", what="row")
        given = {name: row[name] for name in _ALONG if row.get(name)}
        prompt_id = next((row[name] for name in _IDS if row.get(name)), str(number))
        yield Line(number, str(prompt_id), {**options, **given, "data": prompt})


def _wrong(path: Path, number: int, why: str, *, what: str = "line") -> ConfigError:
    return ConfigError("FILE", f"{path}, {what} {number}", why)
