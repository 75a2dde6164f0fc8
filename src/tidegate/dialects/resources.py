"""Resources at a provider: their names in paths and bodies, and pages of their lists. Pure.

A dialect has a table of `ResourcePath`s and two functions: which resources of which kinds a body
refers to, and what an answer makes. The rest follows from them: whose a resource is, where its
calls go, and what a list shows. A list shows what is the caller's own, so its cursors are the ids
of the gateway's own rows, in the dialect's form.

Invariants: a field that stands twice in an object is read both times, since parsers do not agree on
which of them is meant; a name is the same however it is escaped; what a model or a client's own
function wrote (`skipped`) refers to nothing.
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

from tidegate.errors import InvalidRequest

# No slash and no dot, which would lead elsewhere.
RESOURCE_ID = r"[A-Za-z0-9_\-]{1,200}"
LONGEST_ID = 400


class Act(StrEnum):
    """Act on a resource. CREATE makes one, which the answer names; LIST shows those of the caller;
    DELETE ends it; CANCEL ends its work; READ and CHANGE are all others that name it."""

    CREATE = "create"
    LIST = "list"
    READ = "read"
    CHANGE = "change"
    CANCEL = "cancel"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class Making:
    """What the answer to a call makes. name: the field that names it, in an answer or, within the
    object `within` if there is one, in an event of its stream. prefix: of an id there, such as
    `files/`, which is not kept, nor what precedes it. each: the ids of all that an object makes,
    where that may be none or several."""

    kind: str
    name: str = "id"
    within: str | None = None
    prefix: str = ""
    each: Callable[[Mapping[str, Any]], Sequence[str]] | None = None


@dataclass(frozen=True, slots=True)
class ResourcePath:
    """A path of resources. pattern: the whole path, with a group `id` where it names one. makes:
    what its answer makes."""

    method: str
    pattern: re.Pattern[str]
    kind: str
    act: Act
    makes: Making | None = None


@dataclass(frozen=True, slots=True)
class ResourceUse:
    """What a request does to which resource."""

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
    """A resource that the body of a call refers to, in this field."""

    kind: str
    resource_id: str
    field: str


def path_of(
    method: str, pattern: str, kind: str, act: Act, makes: Making | None = None
) -> ResourcePath:
    """A row of a table; `{id}` stands for the id, `{any}` for that of something below it. What
    CREATE makes is of its own kind, unless `makes` says more."""
    if makes is None and act is Act.CREATE:
        makes = Making(kind)
    named = pattern.replace("{id}", f"(?P<id>{RESOURCE_ID})").replace("{any}", RESOURCE_ID)
    return ResourcePath(method, re.compile(named, re.ASCII), kind, act, makes)


def use_in(table: Sequence[ResourcePath], method: str, path: str) -> ResourceUse | None:
    """What a request does to a resource, by the first row that its path matches."""
    for row in table:
        if row.method == method and (found := row.pattern.fullmatch(path)) is not None:
            return ResourceUse(row, found.groupdict().get("id"))
    return None


def nothing_referred(body: Mapping[str, Any], raw: bytes) -> Sequence[Reference]:
    """Of a dialect whose bodies refer to nothing."""
    return ()


def nothing_made(path: str, body: Mapping[str, Any]) -> Making | None:
    """Of a dialect whose calls leave nothing behind."""
    return None


# References within bodies


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


# An escaped character of ASCII, which needs no escape; the next text that has one, with all that
# is before it, and whether it is a key. Tried at one place alone, it is linear.
_ESCAPED = re.compile(rb"\\u00[4-7][0-9A-Fa-f]")
_PLAIN = rb'"(?:[^"\\]++|\\(?!u00[4-7][0-9A-Fa-f]).)*+'
_ESCAPED_TEXT = re.compile(
    rb'(?:[^"]++|%b")*+%b\\u00[4-7][0-9A-Fa-f](?:[^"\\]++|\\.)*+"\s*+(:)?' % (_PLAIN, _PLAIN),
    re.DOTALL,
)


def has_escaped_key(raw: bytes) -> bool:
    """Whether a field's name in a body is written with an escape that it does not need."""
    if b"\\u00" not in raw or _ESCAPED.search(raw) is None:
        return False
    place = 0
    while (found := _ESCAPED_TEXT.match(raw, place)) is not None:
        if found[1] is not None:
            return True
        place = found.end()
    return False


def may_name(raw: bytes, *names: bytes) -> bool:
    """Whether a body may have one of these fields: a cheap check, since nearly all have none."""
    if any(name in raw for name in names):
        return True
    return has_escaped_key(raw)


# Answers

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|["{}\[\],:]', re.DOTALL)
_OPENS, _CLOSES = (b"{", b"["), (b"}", b"]")


def early_text(beginning: bytes, name: str) -> str | None:
    """The text of a field of an object whose end is missing; None where the field is, too."""
    depth, key, is_value = 0, b"", False
    for found in _TOKEN.finditer(beginning):
        token = found[0]
        if token == b'"':  # a text that does not end
            return None
        depth += (token in _OPENS) - (token in _CLOSES)
        if depth != 1:
            continue
        if token in (b":", b","):
            is_value = token == b":"
        elif token[:1] == b'"':
            if is_value and key == b'"%b"' % name.encode():
                with suppress(ValueError):  # it is no text that JSON allows
                    return str(json.loads(token))
            key = b"" if is_value else token
    return None


# Pages of lists

_LONGEST_CURSOR = 400
_LONGEST_NUMBER = 9
_MOST_IDS = 100
JsonObject = dict[str, Any]
Listed = Sequence[tuple[str, JsonObject]]


def _everything(_: JsonObject) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class PageQuery:
    """What a list is asked for. whole: the body of the answer, of what is shown by ids, of whether
    there is more, and of the id where the next page goes on. shows: whether one is asked for. only:
    ids to which it is restricted."""

    limit: int
    after: str | None
    newest_first: bool
    whole: Callable[[Listed, bool, str | None], JsonObject]
    shows: Callable[[JsonObject], bool] = _everything
    only: tuple[str, ...] | None = None


_FILES_A_PAGE = 100  # each is read where it lives


def openai_page(kind: str, query: str) -> PageQuery:
    """Raises InvalidRequest."""
    named, of_files = _named(query), kind == "file"
    order = named.get("order", "desc" if of_files else "asc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order", "order is unknown", allowed="asc or desc")
    metadata = {
        name[len("metadata[") : -1]: value
        for name, value in named.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    model, purpose = named.get("model"), named.get("purpose")

    def shows(one: JsonObject) -> bool:
        if of_files and purpose not in (None, one.get("purpose")):
            return False
        if model is not None and one.get("model") != model:
            return False
        said = one.get("metadata")
        said = said if isinstance(said, dict) else {}
        return all(said.get(name) == value for name, value in metadata.items())

    def whole(shown: Listed, has_more: bool, _last: str | None) -> JsonObject:
        return {
            "object": "list",
            "data": [one for _, one in shown],
            "first_id": shown[0][0] if shown else None,
            "last_id": shown[-1][0] if shown else None,
            "has_more": has_more,
        }

    # OpenAI answers 0 with an empty page, but for files, of which it refuses none at all.
    usual, most = (_FILES_A_PAGE, 10_000) if of_files else (20, 100)
    limit = page_limit(named.get("limit"), "limit", usual, most, least=int(of_files))
    limit = min(limit, _FILES_A_PAGE)
    return PageQuery(limit, _cursor(named, "after"), order == "desc", whole, shows)


def anthropic_page(_kind: str, query: str) -> PageQuery:
    """By either sort of cursor that the API has had. Raises InvalidRequest."""
    named = _named(query)
    if named.get("before_id"):
        said = "a list is read forwards here"
        raise InvalidRequest("before_id", said, allowed="after_id, or page")
    page = _cursor(named, "page")
    after = page.removeprefix("page_") if page is not None else _cursor(named, "after_id")
    values = parse_qs(query)
    ids = [*values.get("ids", ()), *values.get("ids[]", ())]
    if len(ids) > _MOST_IDS:
        allowed = f"at most {_MOST_IDS} ids"
        raise InvalidRequest("ids", "ids are too many", allowed=allowed)

    def whole(shown: Listed, has_more: bool, last: str | None) -> JsonObject:
        return {
            "data": [one for _, one in shown],
            "has_more": has_more,
            "first_id": shown[0][0] if shown else None,
            "last_id": last,
            "next_page": f"page_{last}" if has_more and last else None,
        }

    limit = page_limit(named.get("limit"), "limit", 20, 1_000)
    return PageQuery(limit, after, True, whole, only=tuple(dict.fromkeys(ids)) or None)


# Each batch and operation is read whole.
_GEMINI_LISTS = {
    "file": ("files", 10, 100),
    "cached_content": ("cachedContents", 50, 1_000),
    "batch": ("operations", 10, 20),
    "operation": ("operations", 10, 100),
    "file_search_store": ("fileSearchStores", 10, 20),
}


def gemini_page(kind: str, query: str) -> PageQuery:
    """Raises InvalidRequest."""
    named = _named(query)
    field, usual, most = _GEMINI_LISTS[kind]

    def whole(shown: Listed, has_more: bool, last: str | None) -> JsonObject:
        found = [_without_answers(one) if kind == "batch" else one for _, one in shown]
        body: JsonObject = {field: found} if shown else {}
        return body | ({"nextPageToken": last} if has_more and last else {})

    limit = page_limit(named.get("pageSize"), "pageSize", usual, most, least=0)
    limit = limit or usual  # 0 means none is named
    return PageQuery(limit, _cursor(named, "pageToken"), False, whole)


def _without_answers(batch: JsonObject) -> JsonObject:
    """A batch without the answers that it holds, which may be as long as any body."""
    metadata = batch.get("metadata")
    outputs = [batch.get("response"), metadata.get("output") if type(metadata) is dict else None]
    for output in outputs:
        if type(output) is dict:
            for name in ("inlinedResponses", "inlinedEmbedContentResponses"):
                output.pop(name, None)
    return batch


def _named(query: str) -> dict[str, str]:
    return {name: values[-1] for name, values in parse_qs(query).items()}


def page_limit(text: str | None, name: str, usual: int, most: int, *, least: int = 1) -> int:
    """How many entries a page may have, from the parameter `name`. Raises InvalidRequest."""
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
        said = f"{name} is no cursor of a list"
        raise InvalidRequest(name, said, allowed="what the page before it named")
    return cursor
