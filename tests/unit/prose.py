"""Prose of the repository, where it is: docstrings, comments, help and texts of the command line,
the API and the dashboard, and documents."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.unit.trees import nodes

ROOT = Path(__file__).parents[2]
# Of other people, or what they have written or recorded.
_NOT_OURS = ("static/vendor", "docs/decisions/", "docs/measurements")
_DOCUMENTS = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", ".env.example")
_SHOWN = {".js", ".mjs", ".html", ".css"}
_SCRIPTS = {".lua", ".sql", ".sh", ".zsh", ".toml", ".yaml", ".yml"}
_COMMENT = {".lua": "--", ".sql": "--"}


@cache
def lines() -> tuple[tuple[str, int, str], ...]:
    """Each line of prose with its file and number."""
    return tuple(
        (name, number, text)
        for path in _files()
        for name in (path.relative_to(ROOT).as_posix(),)
        for number, text in _of(path)
    )


def _files() -> Iterator[Path]:
    for name in _DOCUMENTS:
        yield ROOT / name
    for folder in ("src", "docs", "deploy", "scripts"):
        for path in sorted((ROOT / folder).rglob("*")):
            ours = not any(part in path.as_posix() for part in _NOT_OURS)
            if path.is_file() and ours and path.suffix in {".py", ".md", *_SHOWN, *_SCRIPTS}:
                yield path


def _of(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        yield from _of_python(path, text)
    elif path.suffix in _SCRIPTS:
        mark = _COMMENT.get(path.suffix, "#")
        for number, line in enumerate(text.splitlines(), start=1):
            if mark in line:
                yield number, line.partition(mark)[2]
    else:
        yield from enumerate(text.splitlines(), start=1)


def _of_python(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """Comments, docstrings, and strings of several words, which somebody reads."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield from enumerate(node.value.splitlines(), start=node.lineno)


def found(pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """File, and number and text of each line that the pattern matches."""
    for path, number, text in lines():
        if pattern.search(text):
            yield path, f"line {number}: {text.strip()}"
