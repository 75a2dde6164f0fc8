"""Loads the named statements of the files `*.sql` beside it once, at import.

Invariant: every statement has a name and a description of one line; a test says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files

_HEAD = re.compile(r"^-- name: (?P<name>\w+)\n-- (?P<does>.+)\n", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Query:
    name: str
    does: str
    sql: str


def _load(text: str) -> dict[str, Query]:
    heads = list(_HEAD.finditer(text))
    ends = [head.start() for head in heads[1:]] + [len(text)]
    return {
        head["name"]: Query(head["name"], head["does"], text[head.end() : end].strip())
        for head, end in zip(heads, ends, strict=True)
    }


QUERIES = {
    name: query
    for file in files("tidegate.store").iterdir()
    if file.name.endswith(".sql")
    for name, query in _load(file.read_text(encoding="utf-8")).items()
}


def sql(name: str) -> str:
    """The text of the statement `name`."""
    return QUERIES[name].sql
