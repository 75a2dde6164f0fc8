"""Pages of lists: what is asked for, and the form of the answer, in each dialect. Pure.

A list shows what is the caller's own, so its cursors are the ids of the gateway's own rows, in the
dialect's form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from tidegate.errors import InvalidRequest

_LONGEST_CURSOR = 400
_MOST_IDS = 100
JsonObject = dict[str, Any]
Listed = Sequence[tuple[str, JsonObject]]


def _everything(_: JsonObject) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class PageQuery:
    """What a list is asked for. whole: the body of the answer, of what is shown by ids and of
    whether there is more. shows: whether one is asked for. only: ids to which it is restricted."""

    limit: int
    after: str | None
    newest_first: bool
    whole: Callable[[Listed, bool], JsonObject]
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

    def whole(shown: Listed, has_more: bool) -> JsonObject:
        return {
            "object": "list",
            "data": [one for _, one in shown],
            "first_id": shown[0][0] if shown else None,
            "last_id": shown[-1][0] if shown else None,
            "has_more": has_more,
        }

    # OpenAI answers 0 with an empty page, but for files, of which it refuses none at all.
    usual, most = (_FILES_A_PAGE, 10_000) if of_files else (20, 100)
    limit = min(_limit(named, "limit", usual, most, least=int(of_files)), _FILES_A_PAGE)
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

    def whole(shown: Listed, has_more: bool) -> JsonObject:
        last = shown[-1][0] if shown else None
        return {
            "data": [one for _, one in shown],
            "has_more": has_more,
            "first_id": shown[0][0] if shown else None,
            "last_id": last,
            "next_page": f"page_{last}" if has_more and last else None,
        }

    limit = _limit(named, "limit", 20, 1_000)
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

    def whole(shown: Listed, has_more: bool) -> JsonObject:
        found = [_without_answers(one) if kind == "batch" else one for _, one in shown]
        body: JsonObject = {field: found} if shown else {}
        return body | ({"nextPageToken": shown[-1][0]} if has_more and shown else {})

    limit = _limit(named, "pageSize", usual, most, least=0) or usual  # 0 means none is named
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


def _limit(named: dict[str, str], name: str, usual: int, most: int, least: int = 1) -> int:
    text = named.get(name, str(usual))
    if not (text.isascii() and text.isdecimal()) or not least <= int(text[:9]) <= most:
        allowed = f"a whole number from {least} to {most}"
        raise InvalidRequest(name, f"{name} must be {allowed}", allowed=allowed)
    return int(text)


def _cursor(named: dict[str, str], name: str) -> str | None:
    cursor = named.get(name)
    if cursor is not None and (len(cursor) > _LONGEST_CURSOR or not cursor.isprintable()):
        said = f"{name} is no cursor of a list"
        raise InvalidRequest(name, said, allowed="what the page before it named")
    return cursor
