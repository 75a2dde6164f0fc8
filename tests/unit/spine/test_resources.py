"""Lists of what lives at a provider: how often it is asked for one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

import orjson
import pytest

from tidegate.call import Caller
from tidegate.dialects.spec import Dialect
from tidegate.errors import NotFound, UpstreamUnavailable
from tidegate.policy.deployment import Upstream
from tidegate.spine import resources as module
from tidegate.spine.resources import Resources
from tidegate.store.provider.resources import NewResource, ResourceOwner

NOW = datetime(2026, 1, 3, tzinfo=UTC)


def resources_with(ids: list[str], monkeypatch: pytest.MonkeyPatch) -> Resources:
    """Of one tenant that has made these, in their order."""

    async def of_tenant(
        *_: object, after: str | None, limit: int, newest_first: bool
    ) -> list[tuple[str, object]]:
        first = 0 if after is None else ids.index(after) + 1
        owner = SimpleNamespace(upstream="u", account=b"the same")
        return [(one, owner) for one in ids[first : first + limit]]

    monkeypatch.setattr(module, "account_of", lambda *_: b"the same")
    monkeypatch.setattr(module.Resources, "_home_of", lambda *_: SimpleNamespace(name="u"))

    async def forget(_tenant: str, _dialect: str, _kind: str, resource_id: str) -> None:
        ids.remove(resource_id)

    async def note(_made: object) -> None:
        pass

    store: Any = SimpleNamespace(of_tenant=of_tenant, forget=forget, note=note)
    return Resources(store, *cast("Any", [None] * 4))


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


LISTS = [
    (Dialect.ANTHROPIC, "file", "data", lambda page: f"after_id={page['last_id']}"),
    (Dialect.GEMINI, "cached_content", "cachedContents", lambda page: _token(page)),
]


def _token(page: dict[str, Any]) -> str:
    return f"pageToken={page['nextPageToken']}"


@pytest.mark.parametrize(("dialect", "kind", "field", "onward"), LISTS)
async def test_what_is_gone_hides_nothing_that_comes_after_it(
    monkeypatch: pytest.MonkeyPatch,
    dialect: Dialect,
    kind: str,
    field: str,
    onward: Callable[[dict[str, Any]], str],
) -> None:
    """A list of caches that end within an hour was empty for ever, once there had been 300."""
    ids = [f"id-{number:04}" for number in range(400)]
    resources, use = resources_with(ids, monkeypatch), cast("Any", SimpleNamespace(kind=kind))

    async def read(_target: object, resource_id: str) -> dict[str, Any] | None:
        return {"id": resource_id} if resource_id >= "id-0390" else None

    async def page(query: str) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(
            await resources.page(Caller("acme"), dialect, use, query, read)
        )
        return found

    first = await page("")
    assert field not in first or not first[field]
    following = await page(onward(first))
    assert [one["id"] for one in following[field]] == ids[390:]


@pytest.mark.parametrize("account", [b"the same", b"another"])
async def test_the_row_of_what_is_gone_for_a_while_goes_too(
    monkeypatch: pytest.MonkeyPatch, account: bytes
) -> None:
    ids = [f"id-{number:04}" for number in range(700)]
    resources, use = resources_with(ids, monkeypatch), cast("Any", SimpleNamespace(kind="file"))
    monkeypatch.setattr(module, "account_of", lambda *_: account)
    reads = list[str]()

    async def read(_target: object, resource_id: str) -> dict[str, Any] | None:
        reads.append(resource_id)
        return {"id": resource_id} if resource_id >= "id-0690" else None

    async def shown() -> list[str]:
        page = await resources.page(Caller("acme"), Dialect.OPENAI, use, "", read)
        return [one["id"] for one in orjson.loads(page)["data"]]

    assert await shown() == await shown() == []
    assert await shown() == [f"id-{number:04}" for number in range(690, 700)]
    assert len(reads) == len(set(reads)) == 700, "asked for once in a while"
    monkeypatch.setattr(module, "GONE_AFTER_S", 0.0)
    for _ in range(4):
        await shown()
    kept = 700 if account == b"another" else 10
    assert len(ids) == kept, "what another account does not know may still be there"


async def test_a_name_that_is_chosen_again_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    resources, use = (
        resources_with(["id-1"], monkeypatch),
        cast("Any", SimpleNamespace(kind="file")),
    )
    there = list[str]()

    async def read(_target: object, resource_id: str) -> dict[str, Any] | None:
        return {"name": resource_id} if resource_id in there else None

    async def shown() -> list[dict[str, Any]]:
        page = await resources.page(Caller("acme"), Dialect.GEMINI, use, "", read)
        return list(orjson.loads(page).get("files", ()))

    assert await shown() == []
    there.append("id-1")
    owner = ResourceOwner("acme", "u", b"the same")
    await resources.note([NewResource("gemini", "file", "id-1", owner)])
    assert await shown() == [{"name": "id-1"}]


async def test_a_list_reads_a_few_things_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first eight are asked for before any of them is answered, and shown in their order."""
    ids = [f"id-{number:04}" for number in range(20)]
    resources, use = resources_with(ids, monkeypatch), cast("Any", SimpleNamespace(kind="file"))
    under_way, most, enough = 0, 0, asyncio.Event()

    async def read(_target: object, resource_id: str) -> dict[str, Any]:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if most == 8:
            enough.set()
        await enough.wait()
        under_way -= 1
        return {"id": resource_id}

    async with asyncio.timeout(20):
        page = await resources.page(Caller("acme"), Dialect.OPENAI, use, "", read)
    assert [one["id"] for one in orjson.loads(page)["data"]] == ids
    assert most == 8


async def test_a_read_that_fails_ends_the_others_of_its_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resources = resources_with(["a", "b", "c"], monkeypatch)
    use, ended = cast("Any", SimpleNamespace(kind="file")), list[str]()

    async def read(_target: object, resource_id: str) -> dict[str, Any]:
        if resource_id == "a":
            raise UpstreamUnavailable("not now")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(resource_id)
        return {}

    with pytest.raises(UpstreamUnavailable):
        await resources.page(Caller("acme"), Dialect.OPENAI, use, "", read)
    assert ended == ["b", "c"], "none goes on"


@pytest.mark.parametrize(
    ("provider", "kind", "shown", "days"),
    [
        ("openai", "response", {"id": "r", "conversation": None}, 60),
        ("azure", "response", {"id": "r", "object": "response"}, 60),
        ("xai", "response", {"id": "r", "object": "response"}, 60),
        ("gemini", "interaction", {"id": "i", "status": "completed"}, 85),
        ("openai", "response", {"id": "r", "conversation": {"id": "c"}}, None),
        ("openai", "response", {"id": "r"}, None),
        ("openai", "response", None, None),
        ("openai", "conversation", {"id": "c", "object": "conversation"}, None),
        ("openai", "completion", {"id": "c", "object": "chat.completion"}, None),
        ("xai", "deferred", {"request_id": "d", "object": "deferred"}, None),
        ("gemini", "cached_content", {"name": "cachedContents/c", "model": "m"}, None),
        ("vllm", "response", {"id": "r", "object": "response"}, None),
        (None, "response", {"id": "r", "object": "response"}, None),
    ],
)
def test_a_row_ends_only_where_the_provider_states_an_end(
    provider: str | None, kind: str, shown: dict[str, Any] | None, days: int | None
) -> None:
    upstream, made_at = Upstream("u", {}, "", provider=provider), datetime(2026, 1, 1, tzinfo=UTC)
    ends_at = None if days is None else made_at + timedelta(days=days)
    assert module.row_end(upstream, kind, shown, made_at) == ends_at


@pytest.mark.parametrize(
    ("shown", "is_owned"),
    [
        ({"id": "i", "created": "2026-01-02T00:00:00Z"}, True),
        ({"id": "i", "created": "2025-10-01T00:00:00Z"}, False),
        ({"id": "i", "created": "lately"}, False),
        ({"id": "i"}, False),
        (None, False),
    ],
)
async def test_an_interaction_is_adopted_if_it_is_younger_than_a_row_becomes(
    shown: dict[str, Any] | None, is_owned: bool
) -> None:
    upstream = Upstream("u", {"gemini": "http://u"}, "", provider="gemini", adopt="heir")
    targets: Any = SimpleNamespace(upstreams_of=lambda _: [upstream])

    async def owners(*_: object) -> dict[str, Any]:
        return {}

    async def show(*_: object) -> dict[str, Any] | None:
        return shown

    store: Any = SimpleNamespace(owners=owners)
    none: Any = None
    resources = Resources(store, none, targets, none, show, lambda: NOW)
    use: Any = SimpleNamespace(kind="interaction", resource_id="i")
    asking = resources.target_of(Caller("heir", "key"), Dialect.GEMINI, use)
    if is_owned:
        assert (await asking).upstream is upstream
    else:
        with pytest.raises(NotFound):
            await asking
