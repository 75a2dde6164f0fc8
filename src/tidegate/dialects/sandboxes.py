"""Sandboxes and other things that answers name, and references of later calls to them. Pure.

Sandboxes are the containers and environments where a provider's tools run code. A later call may
continue with one, with a file that a tool has made, or with an item or the audio of an answer. So
these belong to the tenant of the call whose answer names them. An item that a client sends with all
of its content refers to nothing, whatever its id is: otherwise the provider reads it from what it
has stored. What a path of `passthrough` makes belongs to the tenant of its call, too.

Invariant: an id is only taken from where the provider writes it; other fields of that name may
repeat a client's text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tidegate.dialects.answers import objects_in, part_of
from tidegate.dialects.resources import (
    LONGEST_ID,
    RESOURCE_ID,
    MadeByTools,
    Reference,
    may_name,
    named_values,
)
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


_REFERRING = frozenset(("previous_response_id", "conversation"))


def references_in(
    body: Mapping[str, Any], raw: bytes, *, has_fields: bool, has_parts: bool
) -> list[Reference]:
    """Return the response that a call continues, the conversation that it is added to, and its
    files, containers, vector stores, skills, and the items and the audio of earlier answers.
    has_fields, has_parts: whether `raw` may name any of these by a field, and by an item or a
    message. Raises InvalidRequest."""
    found = _named_below(raw) if has_fields else []
    if has_parts:
        found += _items_of_input(body, raw) + _audio_of(body)
    if _REFERRING.isdisjoint(body):
        return found
    before, conversation = body.get("previous_response_id"), body.get("conversation")
    if isinstance(conversation, Mapping):
        conversation = _id_of_conversation(raw)
    for field, kind, value in (
        ("previous_response_id", "response", before),
        ("conversation", "conversation", conversation),
    ):
        if value is None and body.get(field) is None:
            continue
        if not isinstance(value, str) or not 1 <= len(value) <= LONGEST_ID:
            message = f"{field} is not the id of a {kind}"
            raise InvalidRequest(field, message, allowed=f"the id of a {kind}")
        found.append(Reference(kind, value, field))
    return found


def _id_of_conversation(raw: bytes) -> Any:
    """Return the id in the object of a conversation. Raises InvalidRequest if servers could read
    two ids."""
    try:
        named = dict(json.loads(raw, object_pairs_hook=list)).get("conversation")
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None
    ids = [pair for pair in named or () if pair[0].lower() == "id"]
    if len(ids) != 1 or ids[0][0] != "id":
        message = "conversation names its id more than once, or in another case"
        raise InvalidRequest("conversation", message, allowed="one id")
    return ids[0][1]


# By the field that names one: its kind, and the field that an error names.
_NAMING = {
    **dict.fromkeys(("file_id", "file_ids"), ("file", "file_id")),
    **dict.fromkeys(OPENAIS_FIELDS, (CONTAINER, "container_id")),
    "vector_store_ids": (VECTOR_STORE, "vector_store_ids"),
    "skill_id": (SKILL, "skill_id"),
}
_NAMES = frozenset(_NAMING)
_MARKS = (b"file_id", b'"container', b"vector_store_id", b"skill_id")
# Citations and results of a model, and descriptions of functions: no file is read for these.
_NO_FILES = frozenset(("annotations", "results", "parameters", "metadata", "schema"))
_CITATIONS = frozenset(("file_citation", "file_path")) | OPENAIS_CALLS


def _named_below(raw: bytes) -> list[Reference]:
    """Return the resources that fields of a body name, at any depth. Raises InvalidRequest."""
    if not may_name(raw, *(b'"%b"' % one.encode() for one in _NAMING)):
        return []
    named = named_values(raw, _NAMES, _NO_FILES, _CITATIONS)
    found = [Reference(_NAMING[one.field][0], one.value, _NAMING[one.field][1]) for one in named]
    return list(dict.fromkeys(found))


# The field by which an item of this type is whole; any other item with an id is read by it.
_WHOLE_BY = {
    "message": "content",
    "reasoning": "encrypted_content",
    "compaction": "encrypted_content",
    "function_call": "name",
    "function_call_output": "output",
    "custom_tool_call": "name",
    "custom_tool_call_output": "output",
}
_ITEM_REFERENCE = "item_reference"
_NAMES_ITEM = ("type", _ITEM_REFERENCE)


def _items_of_input(body: Mapping[str, Any], raw: bytes) -> list[Reference]:
    """Return the items of earlier responses that a request takes by their ids. Raises
    InvalidRequest."""
    found: list[Any] = []
    for one in objects_in(body.get("input")):
        whole_by = _WHOLE_BY.get(str(one.get("type") or "message"))
        if "id" in one and not (whole_by and one.get(whole_by)):
            found.append(one["id"])
    if raw.find(_ITEM_REFERENCE.encode()) >= 0:  # also in a message, and of doubled fields both
        found += _item_references(raw)
    return _named_by(ITEM, found, "input")


def _item_references(raw: bytes) -> list[Any]:
    found: list[Any] = []

    def gather(pairs: list[tuple[str, Any]]) -> None:
        if _NAMES_ITEM in pairs:
            found.extend(value for name, value in pairs if name == "id")

    try:
        json.loads(raw, object_pairs_hook=gather, parse_int=len, parse_float=len)
    except (ValueError, RecursionError):
        raise InvalidRequest("body", "the body is nested too deeply") from None
    return found


def _audio_of(body: Mapping[str, Any]) -> list[Reference]:
    """Return the audio of earlier chat completions that the messages of a request name."""
    ids = [part_of(one, "audio").get("id") for one in objects_in(body.get("messages"))]
    return _named_by(AUDIO, ids, "messages")


def _named_by(kind: str, ids: list[Any], field: str) -> list[Reference]:
    named = [one for one in ids if isinstance(one, str) and 1 <= len(one) <= LONGEST_ID]
    return [Reference(kind, one, field) for one in dict.fromkeys(named)]


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
