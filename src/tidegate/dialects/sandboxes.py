"""What an answer names for later calls: sandboxes, where a provider's tools run code, with their
files; items and audio; and what a path of `passthrough` makes. Pure.

A later call may name one of these to continue with it. So it belongs to the tenant of the call.

Invariant: an id is only taken from where the provider writes it; other fields of that name may
repeat a client's text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tidegate.dialects.answers import objects_in, part_of
from tidegate.dialects.resources import RESOURCE_ID, MadeByTools, Reference
from tidegate.dialects.spec import JsonObject
from tidegate.errors import InvalidRequest

CONTAINER, ENVIRONMENT = "container", "environment"
ITEM, AUDIO, VECTOR_STORE, SKILL = "item", "audio", "vector_store", "skill"
_ID = re.compile(RESOURCE_ID, re.ASCII)
Named = list[tuple[str, str]]


class _Pairs(list[tuple[str, Any]]):
    """The fields of an object, with those that it has twice."""


def _values(raw: bytes, name: str) -> Iterator[Any]:
    """Yield each value of a field of the body itself. Raises InvalidRequest."""
    try:
        whole = json.loads(raw, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None
    yield from (value for field, value in whole if field == name)


def _named(raw: bytes, name: str, *ids: str) -> list[str]:
    """Return the ids in a field of the body: its text, or those of `ids` in its object."""
    found: list[Any] = []
    for value in _values(raw, name):
        is_object = isinstance(value, _Pairs)
        found += [one for field, one in value if field in ids] if is_object else [value]
    return list(dict.fromkeys(one for one in found if isinstance(one, str)))


def _with_ids(kind: str, ids: list[Any]) -> Named:
    return [(kind, one) for one in ids if type(one) is str and _ID.fullmatch(one) is not None]


# Anthropic's

_CODE, _RESULT = "code_execution", "code_execution_tool_result"
# Files that a tool of the provider has made, in a conversation that is sent again.
OUTPUTS = frozenset(("code_execution_output", "bash_code_execution_output", "file_citation"))


def claudes_container(body: Mapping[str, Any], raw: bytes) -> list[Reference]:
    """Return the container that a request of Anthropic's continues with, and its skills."""
    if body.get("container") is None:
        return []
    found = [Reference(CONTAINER, one, "container") for one in _named(raw, "container", "id")]
    ids = [one.get("skill_id") for one in objects_in(part_of(body, "container").get("skills"))]
    return found + [Reference(SKILL, one, "container") for one in ids if type(one) is str]


def _claude_may_run_code(body: Mapping[str, Any]) -> bool:
    return any(str(one.get("type")).startswith(_CODE) for one in objects_in(body.get("tools")))


def made_by_claude(answer: JsonObject) -> Named:
    """Return the files that code execution has made, and its container, in a message or an event of
    its stream."""
    found: list[Any] = []
    for block in (*objects_in(answer.get("content")), part_of(answer, "content_block")):
        if str(block.get("type")).endswith(_RESULT):
            outputs = objects_in(part_of(block, "content").get("content"))
            found += [one.get("file_id") for one in outputs if one.get("type") in OUTPUTS]
    places = (answer, part_of(answer, "message"), part_of(answer, "delta"))
    containers = [part_of(one, "container").get("id") for one in places]
    return _with_ids("file", found) + _with_ids(CONTAINER, containers)


MADE_BY_CLAUDE = MadeByTools(
    frozenset(("tools",)),
    (_RESULT.encode(), b'"container"'),
    _claude_may_run_code,
    made_by_claude,
)


# OpenAI's

# The field that names one, and the items of a conversation that is sent again, for which none is
# used.
OPENAIS_FIELDS = frozenset(("container", "container_id"))
OPENAIS_CALLS = frozenset(("code_interpreter_call", "shell_call", "container_file_citation"))
_OPENAI_RUNS = frozenset(("code_interpreter", "shell"))


def _openai_may_run_code(body: Mapping[str, Any]) -> bool:
    named = any(one.get("type") in _OPENAI_RUNS for one in objects_in(body.get("tools")))
    if named or body.get("prompt") is not None:  # a saved prompt has tools of its own
        return True
    return type(body.get("audio")) is dict  # a chat completion that speaks


def made_by_openai(answer: JsonObject) -> Named:
    """Return the containers of a response, or of an event of its stream, the audio of a chat
    completion, and the items that a list shows."""
    if answer.get("object") == "list":
        return [(ITEM, one) for one in items_in(answer)]
    if choices := objects_in(answer.get("choices")):
        said = [part_of(one, "message", "delta") for one in choices]
        return _with_ids(AUDIO, [part_of(one, "audio").get("id") for one in said])
    items = (
        *objects_in(answer.get("output")),
        *objects_in(part_of(answer, "response").get("output")),
        part_of(answer, "item"),
    )
    found = [
        one.get("container_id") or part_of(one, "environment").get("container_id")
        for one in items
        if one.get("type") in OPENAIS_CALLS
    ]
    return _with_ids(CONTAINER, found)


MADE_BY_OPENAI = MadeByTools(
    frozenset(("tools", "prompt", "audio")),
    (b'"container_id"', b'"audio"', b'"list"'),
    _openai_may_run_code,
    made_by_openai,
    of=("response", "conversation"),
)

# A shorter id is one that a server counts, and may also be another answer's.
_SHORTEST_ID = 20
_MOST_ITEMS = 1_000


def items_in(response: JsonObject) -> tuple[str, ...]:
    """Return the ids of the items of a response, or of a list of items."""
    items = objects_in(response.get("output")) or objects_in(response.get("data"))
    ids = [one.get("id") for one in items[:_MOST_ITEMS]]
    return tuple(one for _, one in _with_ids(ITEM, ids) if len(one) >= _SHORTEST_ID)


# Google's

_NEW = "remote"  # a new environment
_ENVIRONMENT_IDS = ("environment_id", "environmentId")


def googles_environment(body: Mapping[str, Any], raw: bytes) -> list[Reference]:
    """Return the environment that an interaction continues with."""
    if body.get("environment") is None:
        return []
    ids = [one for one in _named(raw, "environment", *_ENVIRONMENT_IDS) if one != _NEW]
    return [Reference(ENVIRONMENT, one, "environment") for one in ids]


def made_by_google(answer: JsonObject) -> Named:
    """Return the environment of an interaction, or of an event of its stream."""
    places = (answer, part_of(answer, "interaction"))
    return _with_ids(ENVIRONMENT, [one.get("environment_id") for one in places])


MADE_BY_GOOGLE = MadeByTools(
    frozenset(("environment",)),
    (b'"environment_id"',),
    lambda _: True,
    made_by_google,
    of=("interaction",),
)


# Made by a path of `passthrough`

# Kinds by the first part of the path. Calls of models have other paths.
_PASSED = {
    "containers": CONTAINER,
    "vector_stores": VECTOR_STORE,
    "skills": SKILL,
    **{
        f"{kind}s": kind
        for kind in (
            *("eval", "video", "assistant", "thread", "agent", "session", "environment"),
            *("memory_store", "user_profile", "vault", "dream", "deployment", "tunnel"),
        )
    },
    "fine_tuning": "fine_tuning",
    "chatkit": "chatkit",
}


def passed_in(path: str) -> Named:
    """Return what the path of a `passthrough` call may name; empty for a path that makes nothing
    which a later call names."""
    root, *parts = path.removeprefix("/v1").strip("/").split("/")
    kind = _PASSED.get(root)
    return [] if kind is None else [(kind, one) for one in (root, *parts)]


def made_by_passed(named: Named) -> MadeByTools:
    """Return how the answer to a call of such a path names what it makes: by an id that is not in
    the path."""

    def made(answer: JsonObject) -> Named:
        found = _with_ids(named[0][0], [answer.get("id")])
        return [one for one in found if one not in named]

    return MadeByTools(frozenset(), (b'"id"',), lambda _: True, made)
