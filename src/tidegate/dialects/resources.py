"""Resources at a provider: their names in paths and bodies, and pages of their lists. Pure.

A dialect has a table of `ResourcePath`s and two functions: the resources that a body refers to, and
the resources that an answer creates. From these follow the owner of a resource, the account that
its calls go to, and the content of a list. A list shows only the caller's own resources, so that
its cursors are the ids of the gateway's rows, in the dialect's form.

Invariants: both values of a duplicate field are read, since parsers disagree on which one counts; a
name is recognised however it is escaped; text of a model or of a client's own function (`skipped`)
refers to nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qs

from tidegate.dialects.parsing import JsonObject, holds, matches_in
from tidegate.errors import InvalidRequest

# Without slashes and dots, which could lead to another path.
RESOURCE_ID = r"[A-Za-z0-9_\-]{1,200}"
LONGEST_ID = 400


class Act(StrEnum):
    """An action on a resource. CREATE makes one, which the answer names; LIST shows those of the
    caller; DELETE removes it; CANCEL stops its work; READ and CHANGE are all other requests that
    name it."""

    CREATE = "create"
    LIST = "list"
    READ = "read"
    CHANGE = "change"
    CANCEL = "cancel"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Making:
    """How the answer to a call names the resource that it creates.

    name: the field with the id, in an answer; or in an event of its stream, within the object
    `within` if that is set. prefix: text before the id, such as `files/`; it is dropped with all
    that precedes it. each: returns the ids of all resources that an object creates, if there may be
    none or several.
    """

    kind: str
    name: str = "id"
    within: str | None = None
    prefix: str = ""
    each: Callable[[Mapping[str, Any]], Sequence[str]] | None = None


@dataclass(frozen=True, slots=True)
class MadeByTools:
    """Resources that a provider's own tools make during a call: files, and where the tools run.

    fields: a request without any of these has no such tool. marks: one of these is in every answer
    or event that names a resource. may_be_made: whether a request has such a tool. named_in:
    returns the kinds and ids in an answer or an event, from the places alone where the provider
    writes them. of: the kinds of resources that name them too when they are read.
    """

    fields: frozenset[str]
    marks: tuple[bytes, ...]
    may_be_made: Callable[[Mapping[str, Any]], bool]
    named_in: Callable[[JsonObject], Sequence[tuple[str, str]]]
    of: tuple[str, ...] = ()

    def may_make(self, use: ResourceUse | None, body: Mapping[str, Any]) -> bool:
        """Return whether the answer to a call may name one. use: of a call about a resource."""
        return self.may_be_made(body) if use is None else use.kind in self.of


@dataclass(frozen=True, slots=True)
class ResourcePath:
    """A path of resources. pattern: of the whole path, with a group `id` if the path names one.
    makes: how the answer names a new resource."""

    method: str
    pattern: re.Pattern[str]
    kind: str
    act: Act
    makes: Making | None = None


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """A request's action and the resource that it applies to."""

    path: ResourcePath
    resource_id: str | None = None

    @property
    def kind(self) -> str:
        return self.path.kind

    @property
    def act(self) -> Act:
        return self.path.act


@dataclass(frozen=True, slots=True)
class Reference:
    """A resource that the body of a call refers to, and the field that names it."""

    kind: str
    resource_id: str
    field: str


def path_of(
    method: str, pattern: str, kind: str, act: Act, makes: Making | None = None
) -> ResourcePath:
    """Build a row of a table. In `pattern`, `{id}` is the resource's id, and `{any}` the id of
    something below it. CREATE makes a resource of the same kind unless `makes` is given."""
    if makes is None and act is Act.CREATE:
        makes = Making(kind)
    named = pattern.replace("{id}", f"(?P<id>{RESOURCE_ID})").replace("{any}", RESOURCE_ID)
    return ResourcePath(method, re.compile(named, re.ASCII), kind, act, makes)


def use_in(table: Sequence[ResourcePath], method: str, path: str) -> ResourceUse | None:
    """Return the use of a resource by the first row that matches the path; None without a match."""
    for row in table:
        if row.method == method and (found := row.pattern.fullmatch(path)) is not None:
            return ResourceUse(row, found.groupdict().get("id"))
    return None


def nothing_referred(body: Mapping[str, Any], raw: bytes) -> Sequence[Reference]:
    """Return no references: for a dialect whose bodies refer to nothing."""
    return ()


def nothing_made(path: str, body: Mapping[str, Any]) -> Making | None:
    """Return None: for a dialect whose calls create nothing."""
    return None


# References within bodies


@dataclass(frozen=True, slots=True)
class NamedValue:
    """A text in a field that may refer to a resource."""

    field: str
    value: str


def named_values(
    raw: bytes,
    names: frozenset[str],
    skipped: frozenset[str],
    passed_types: frozenset[str] = frozenset(),
) -> list[NamedValue]:
    """Return the texts in fields of these `names`, and in lists there. Fields in `skipped`, and
    objects whose `type` is in `passed_types`, are left out with all below them. Raises
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
    """The values found in an object; it replaces the parsed object."""


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


# First: an escaped ASCII character, which needs no escape. Second: everything up to the end of the
# next text that has one, with a group for the colon if it is a key. Matched from one place only, so
# that it is linear.
_ESCAPE_BYTES = 6
_ESCAPED = re.compile(rb"\\u00[4-7][0-9A-Fa-f]")
_PLAIN = rb'"(?:[^"\\]++|\\(?!u00[4-7][0-9A-Fa-f]).)*+'
_ESCAPED_TEXT = re.compile(
    rb'(?:[^"]++|%b")*+%b\\u00[4-7][0-9A-Fa-f](?:[^"\\]++|\\.)*+"\s*+(:)?' % (_PLAIN, _PLAIN),
    re.DOTALL,
)


def has_escaped_key(raw: bytes) -> bool:
    """Return whether the name of a field is written with an escape that it does not need."""
    if not holds(raw, b"\\u00") or not matches_in(raw, _ESCAPED, _ESCAPE_BYTES):
        return False
    place = 0
    while (found := _ESCAPED_TEXT.match(raw, place)) is not None:
        if found[1] is not None:
            return True
        place = found.end()
    return False


def may_name(raw: bytes, *names: bytes) -> bool:
    """Return whether a body may have one of these fields: a cheap check, since nearly all have
    none."""
    return holds(raw, *names) or has_escaped_key(raw)


# Answers

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\],:]', re.DOTALL)
_OPENS, _CLOSES = (b"{", b"["), (b"}", b"]")


def early_text(beginning: bytes, name: str) -> str | None:
    """Return the text of an object's field from the object's beginning; None if the field is not in
    it."""
    depth, key, is_value = 0, b"", False
    for found in _TOKEN.finditer(beginning):
        token = found[0]
        if token == b'"':  # a text without an end
            return None
        depth += (token in _OPENS) - (token in _CLOSES)
        if depth != 1:
            continue
        if token in (b":", b","):
            is_value = token == b":"
        elif token[:1] == b'"':
            if is_value and key == b'"%b"' % name.encode():
                with suppress(ValueError):  # not a valid JSON string
                    return str(json.loads(token))
            key = b"" if is_value else token
    return None


# Pages of lists

_LONGEST_CURSOR = 400
_LONGEST_NUMBER = 9
_MOST_IDS = 100
Listed = Sequence[tuple[str, JsonObject]]


def _everything(_: JsonObject) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class PageQuery:
    """A request for a page of a list.

    whole: builds the body of the answer from the entries by id, whether there are more, and the id
    at which the next page begins. matches: whether an entry passes the filters. only: the ids to
    which the list is restricted.
    """

    limit: int
    after: str | None
    newest_first: bool
    whole: Callable[[Listed, bool, str | None], JsonObject]
    matches: Callable[[JsonObject], bool] = _everything
    only: tuple[str, ...] | None = None


_FILES_A_PAGE = 100  # each is read at its provider


def openai_page(kind: str, query: str) -> PageQuery:
    """Return the query of an OpenAI list. Raises InvalidRequest."""
    named, of_files = _named(query), kind == "file"
    order = named.get("order", "desc" if of_files else "asc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", "order is not valid", allowed="asc or desc")
    metadata = {
        name[len("metadata[") : -1]: value
        for name, value in named.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    model, purpose = named.get("model"), named.get("purpose")

    def matches(one: JsonObject) -> bool:
        if of_files and purpose not in (None, one.get("purpose")):
            return False
        if model is not None and one.get("model") != model:
            return False
        own = one.get("metadata")
        own = own if isinstance(own, dict) else {}
        return all(own.get(name) == value for name, value in metadata.items())

    def whole(listed: Listed, has_more: bool, _last: str | None) -> JsonObject:
        return {
            "object": "list",
            "data": [one for _, one in listed],
            "first_id": listed[0][0] if listed else None,
            "last_id": listed[-1][0] if listed else None,
            "has_more": has_more,
        }

    # OpenAI answers a limit of 0 with an empty page, except for files, where it rejects 0.
    usual, most = (_FILES_A_PAGE, 10_000) if of_files else (20, 100)
    limit = page_limit(named.get("limit"), "limit", usual, most, least=int(of_files))
    limit = min(limit, _FILES_A_PAGE)
    return PageQuery(limit, _cursor(named, "after"), order == "desc", whole, matches)


def anthropic_page(_kind: str, query: str) -> PageQuery:
    """Return the query of an Anthropic list; both forms of cursor that the API has had are
    accepted. Raises InvalidRequest."""
    named = _named(query)
    if named.get("before_id"):
        message = "this list can only be read forwards"
        raise InvalidRequest("before_id", message, allowed="after_id, or page")
    page = _cursor(named, "page")
    after = page.removeprefix("page_") if page is not None else _cursor(named, "after_id")
    values = parse_qs(query)
    ids = [*values.get("ids", ()), *values.get("ids[]", ())]
    if len(ids) > _MOST_IDS:
        allowed = f"at most {_MOST_IDS} ids"
        raise InvalidRequest("ids", "ids are too many", allowed=allowed)

    def whole(listed: Listed, has_more: bool, last: str | None) -> JsonObject:
        return {
            "data": [one for _, one in listed],
            "has_more": has_more,
            "first_id": listed[0][0] if listed else None,
            "last_id": last,
            "next_page": f"page_{last}" if has_more and last else None,
        }

    limit = page_limit(named.get("limit"), "limit", 20, 1_000)
    return PageQuery(limit, after, True, whole, only=tuple(dict.fromkeys(ids)) or None)


# Each batch and operation is read as a whole.
_GEMINI_LISTS = {
    "file": ("files", 10, 100),
    "cached_content": ("cachedContents", 50, 1_000),
    "batch": ("operations", 10, 20),
    "operation": ("operations", 10, 100),
    "file_search_store": ("fileSearchStores", 10, 20),
}


def gemini_page(kind: str, query: str) -> PageQuery:
    """Return the query of a Gemini list. Raises InvalidRequest."""
    named = _named(query)
    field, usual, most = _GEMINI_LISTS[kind]

    def whole(listed: Listed, has_more: bool, last: str | None) -> JsonObject:
        body: JsonObject = {field: [one for _, one in listed]} if listed else {}
        return body | ({"nextPageToken": last} if has_more and last else {})

    limit = page_limit(named.get("pageSize"), "pageSize", usual, most, least=0)
    limit = limit or usual  # 0 means the default
    return PageQuery(limit, _cursor(named, "pageToken"), False, whole)


def without_answers(shown: JsonObject) -> JsonObject:
    """Return an object of a list, if it is a batch of Gemini's without the answers in it, which may
    be as long as any body."""
    metadata = shown.get("metadata")
    outputs = [shown.get("response"), metadata.get("output") if type(metadata) is dict else None]
    for output in outputs:
        if type(output) is dict:
            for name in ("inlinedResponses", "inlinedEmbedContentResponses"):
                output.pop(name, None)
    return shown


def _named(query: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query).items()}


def page_limit(text: str | None, name: str, usual: int, most: int, *, least: int = 1) -> int:
    """Return the number of entries of a page, from the parameter `name`. Raises InvalidRequest."""
    if text is None:
        return usual
    is_number = text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER
    if not is_number or not least <= int(text) <= most:
        allowed = f"a whole number from {least} to {most}"
        raise InvalidRequest(name, f"{name} must be {allowed}", allowed=allowed)
    return int(text)


def _cursor(named: dict[str, str], name: str) -> str | None:
    cursor = named.get(name)
    if cursor is not None and (len(cursor) > _LONGEST_CURSOR or not cursor.isprintable()):
        message = f"{name} is not a valid cursor"
        raise InvalidRequest(name, message, allowed="the cursor that the previous page returned")
    return cursor
