"""What a request of OpenAI's refers to. Pure.

An item of a response's input may be the id of an earlier one, which the provider then reads from
what it has stored. So the items of stored responses belong to the tenant of the call. An item that
a client sends with all of its content refers to nothing, whatever its id is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tidegate.dialects.answers import objects_in, part_of
from tidegate.dialects.resources import LONGEST_ID, Reference, may_name, named_values
from tidegate.dialects.sandboxes import (
    AUDIO,
    CONTAINER,
    ITEM,
    OPENAIS_CALLS,
    OPENAIS_FIELDS,
    SKILL,
    VECTOR_STORE,
)
from tidegate.errors import InvalidRequest

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
