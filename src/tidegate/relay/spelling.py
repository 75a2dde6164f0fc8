"""Fields of a native body that all servers must read alike, since admission goes by them. Pure.

Invariant: a body that names one of them twice, or in another case, is refused: JSON parsers do not
agree on what it means, so that an upstream could do other work than what was admitted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from tidegate.errors import InvalidRequest

_READ = frozenset(
    (
        *("model", "models", "stream", "stream_options", "background", "deferred", "n"),
        *("max_tokens", "max_completion_tokens", "max_output_tokens", "service_tier", "tools"),
        *("generationConfig", "generation_config"),
    )
)
_WRITTEN = {name: b'"%b"' % name.encode() for name in _READ}
# Go's parser folds letters beyond ASCII too: a long s is an s to it.
_FOLDED = {name.casefold(): name for name in _READ}
# The end of a key with an escaped character of ASCII, which nobody needs to escape.
_ESCAPED = re.compile(rb'\\u00[4-7][0-9A-Fa-f](?:[^"\\]|\\.)*+"\s*:')
# What asks for work that goes on after its answer: OpenAI's word, and xAI's.
_GO_ON = ("background", "deferred")


def check_spelling(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest where a field is written in another case."""
    for key in body:
        if key not in _READ and (name := _FOLDED.get(key.casefold())) is not None:
            said = f"{key[:64]!a} is {name} in another case, which servers read differently"
            raise InvalidRequest(name, said, allowed=name)
    if "generationConfig" in body and "generation_config" in body:
        said = "generationConfig is named more than once"
        raise InvalidRequest("generationConfig", said, allowed="one generationConfig")


def check_said_once(raw: bytes, body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest where the outermost object of `raw`, which was parsed to `body`, says
    a field twice."""
    # To look at each key is dear: nearly all bodies are done with some counts.
    for key in body:
        if (needle := _WRITTEN.get(key)) is not None and raw.count(needle) > 1:
            break
    else:
        if b"\\u00" not in raw or _ESCAPED.search(raw) is None:
            return
    outermost: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        outermost[:] = [name for name, _ in pairs]  # objects end from the inside out

    try:
        json.loads(raw, object_pairs_hook=note, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None
    for name in _READ:
        if outermost.count(name) > 1:
            said = f"{name} is named more than once"
            raise InvalidRequest(name, said, allowed=f"one {name}")


def check_ends(body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for what asks for work that goes on after its answer: no permit could
    be held for it, and nobody would be charged."""
    for name in _GO_ON:
        if body.get(name) not in (None, False):
            raise InvalidRequest(
                name,
                f"{name} asks for work that goes on after its answer, outside of every limit and "
                "budget, which is not relayed; submit it as a job or in a batch instead",
                allowed="false",
            )
