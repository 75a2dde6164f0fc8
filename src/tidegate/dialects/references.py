"""References to files and other resources within a body, wherever they stand in it. Pure.

Invariants: a field that stands twice in an object is read both times, since parsers do not agree on
which of them is meant; a name is the same however it is escaped; what a model or a client's own
function wrote (`skipped`) refers to nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tidegate.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class NamedValue:
    """A text under a field that may refer to something."""

    field: str
    value: str


def named_values(
    raw: bytes,
    names: frozenset[str],
    skipped: frozenset[str],
    passed_types: frozenset[str] = frozenset(),
) -> list[NamedValue]:
    """The texts under fields of these `names`, also in lists of them, but not those below a field
    that is `skipped`, nor of an object whose `type` is one of `passed_types`. Raises
    InvalidRequest."""

    def gather(pairs: list[tuple[str, Any]]) -> _Found:
        found = _Found()
        types = [value for name, value in pairs if name == "type"]
        if types and all(isinstance(one, str) and one in passed_types for one in types):
            return found
        for name, value in pairs:
            if name in skipped:
                continue
            if name in names:
                found += [NamedValue(name, one) for one in _texts(value)]
            found += _below(value)
        return found

    try:
        whole = json.loads(raw, object_pairs_hook=gather, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None
    return list(_below(whole))


class _Found(list[NamedValue]):
    """What was found in an object, in its place."""


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and not isinstance(value, _Found):
        return [one for one in value if isinstance(one, str)]
    return ()


def _below(value: Any) -> Iterator[NamedValue]:
    if isinstance(value, _Found):
        yield from value
    elif isinstance(value, list):
        for one in value:
            yield from _below(one)


# The end of a key with an escaped character of ASCII, which needs no escape.
_ESCAPED = re.compile(rb'\\u00[4-7][0-9A-Fa-f](?:[^"\\]|\\.)*+"\s*:')


def may_name(raw: bytes, *names: bytes) -> bool:
    """Whether a body may have one of these fields: a cheap check, since nearly all have none."""
    if any(name in raw for name in names):
        return True
    return b"\\u00" in raw and _ESCAPED.search(raw) is not None
