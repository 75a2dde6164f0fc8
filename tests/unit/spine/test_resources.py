"""Lists of what lives at a provider: how often it is asked for one of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from tidegate.call import Caller
from tidegate.dialects.spec import Dialect
from tidegate.spine import resources as module
from tidegate.spine.resources import Resources


def resources_with(ids: list[str], monkeypatch: pytest.MonkeyPatch) -> Resources:
    """Of one tenant that has made these, in their order."""

    async def of_tenant(
        *_: object, after: str | None, limit: int, newest_first: bool
    ) -> list[tuple[str, object]]:
        first = 0 if after is None else ids.index(after) + 1
        return [(one, SimpleNamespace(upstream="u")) for one in ids[first : first + limit]]

    monkeypatch.setattr(module.Resources, "_home_of", lambda *_: SimpleNamespace(name="u"))
    store: Any = SimpleNamespace(of_tenant=of_tenant)
    return Resources(store, cast("Any", None), cast("Any", None), cast("Any", None))


@pytest.mark.parametrize(
    ("dialect", "query", "field", "more"),
    [
        (Dialect.ANTHROPIC, "limit=1000", "data", "has_more"),
        (Dialect.GEMINI, "pageSize=1000", "cachedContents", "nextPageToken"),
        (Dialect.OPENAI, "limit=10000", "data", "has_more"),
    ],
)
async def test_a_page_asks_the_provider_for_a_hundred_things_at_most(
    monkeypatch: pytest.MonkeyPatch, dialect: Dialect, query: str, field: str, more: str
) -> None:
    ids = [f"id-{number:04}" for number in range(1_000)]
    resources, reads = resources_with(ids, monkeypatch), list[str]()

    async def read(_target: object, resource_id: str) -> dict[str, Any]:
        reads.append(resource_id)
        return {"id": resource_id}

    kind = "cached_content" if dialect is Dialect.GEMINI else "file"
    use: Any = SimpleNamespace(kind=kind)
    page = orjson.loads(await resources.page(Caller("acme"), dialect, use, query, read))
    assert [one["id"] for one in page[field]] == ids[:100]
    assert page[more]
    assert reads == ids[:101]
