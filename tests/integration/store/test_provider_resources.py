"""Owners of resources at providers: one each, until the provider has deleted it."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import asyncpg

from tidegate.store.provider.resources import NewResource, ResourceOwner
from tidegate.store.store import Store


def made_by(tenant: str, expires_at: datetime | None = None) -> NewResource:
    owner = ResourceOwner(tenant, "gemini", b"account")
    return NewResource("gemini", "file", "chosen", owner, expires_at=expires_at)


async def owner(store: Store) -> str | None:
    found = await store.provider_resources.owners("gemini", "file", ["chosen"])
    return found["chosen"].tenant_id if found else None


async def test_the_first_owner_stays(store: Store) -> None:
    await store.provider_resources.note([made_by("first")])
    await store.provider_resources.note([made_by("second")])
    assert await owner(store) == "first"


async def test_a_name_can_be_chosen_again_once_the_first_has_expired(
    store: Store, peek: asyncpg.Connection
) -> None:
    ends = datetime.now(UTC) + timedelta(hours=48)
    await store.provider_resources.note([made_by("first", ends)])
    await store.provider_resources.note([made_by("second", ends)])
    await peek.execute("UPDATE provider_resources SET expires_at = now() - interval '1 ms'")
    assert await owner(store) is None
    await store.provider_resources.note([made_by("second", ends)])
    assert await owner(store) == "second"
    assert (
        await store.provider_resources.of_tenant(
            "first", "gemini", "file", newest_first=True, after=None, limit=9
        )
        == []
    )


async def test_what_is_known_of_an_owner_ends_with_the_resource(
    store: Store, peek: asyncpg.Connection
) -> None:
    known, clock_s = store.provider_resources, [time.monotonic()]
    known._clock = lambda: clock_s[0]
    await known.note([made_by("first", datetime.now(UTC) + timedelta(seconds=30))])
    assert await owner(store) == "first"
    await peek.execute("UPDATE provider_resources SET expires_at = now() - interval '1 ms'")
    assert await owner(store) == "first"  # from memory
    clock_s[0] += 30
    assert await owner(store) is None
    await known.note([made_by("second")])
    assert await owner(store) == "second"
