"""Listing a tenant's own requests, a page at a time."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from tests.integration.store.jobs import UNSURE, new_job, now, unadmitted
from tests.waiting import wait_until
from tidegate.call import Kind, Status, new_id
from tidegate.store import requests as listing
from tidegate.store.requests import START, Filter, ListCursor
from tidegate.store.store import Store

ALL = Filter()


async def ids(store: Store, wanted: Filter = ALL, limit: int = 200) -> list[UUID]:
    """All pages together."""
    found: list[UUID] = []
    place: ListCursor | None = START
    while place is not None:
        page = await store.requests.page("default", wanted, limit, place)
        assert len(page.items) <= limit
        found += [item.request_id for item in page.items]
        place = page.after
    return found


async def submitted(store: Store, count: int) -> list[UUID]:
    jobs = [new_job() for _ in range(count)]
    for job in jobs:
        await store.jobs.submit(job)
    return [job.request_id for job in reversed(jobs)]


async def test_requests_come_newest_first_whatever_the_size_of_a_page(store: Store) -> None:
    expected = await submitted(store, 7)
    for limit in (1, 3, 7, 8):
        assert await ids(store, limit=limit) == expected
    assert (await store.requests.page("default", ALL, 7)).after is None
    assert (await store.requests.page("other", ALL, 7)).items == ()


async def test_those_of_the_same_moment_are_told_apart_by_their_ids(store: Store) -> None:
    moment = now()
    made = [replace(new_job(), request_id=new_id(), created_at=moment) for _ in range(5)]
    for job in made:
        await store.jobs.submit(job)
    expected = sorted((job.request_id for job in made), reverse=True)
    assert await ids(store, limit=2) == expected


async def test_going_on_shows_nothing_twice_while_new_ones_arrive(store: Store) -> None:
    expected = await submitted(store, 6)
    found: list[UUID] = []
    place: ListCursor | None = START
    while place is not None:
        page = await store.requests.page("default", ALL, 2, place)
        found += [item.request_id for item in page.items]
        place = page.after
        await submitted(store, 3)
    assert found == expected


async def test_filters_are_all_obeyed(store: Store, peek: asyncpg.Connection) -> None:
    start = now()
    text = new_job(created_at=start, model="gemini-a")
    unsure = new_job(created_at=start + timedelta(seconds=1), classification=UNSURE)
    late = new_job(created_at=start + timedelta(seconds=2))
    for job in (text, unsure, late):
        await store.jobs.submit(job)
    await store.jobs.cancel(late.request_id, "default")
    stream = new_job(created_at=start + timedelta(seconds=3))
    record = unadmitted(Status.SUCCEEDED, source="stream")
    record.fence, record.admitted_at, record.upstream = (1, 1), now(), "spare"
    await store.audit.record_stream(stream, record)
    await wait_until(lambda: not store.audit._tasks, 20, "the record of the streams")
    assert await peek.fetchval("SELECT count(*) FROM requests") == 4
    one, two = start + timedelta(seconds=1), start + timedelta(seconds=2)
    expected = {
        Filter(status=Status.CANCELLED): [late],
        Filter(kind=Kind.TEXT_ONLY): [stream, late, text],
        Filter(model="gemini-a"): [text],
        Filter(model="a\0b"): [],
        Filter(source="stream"): [stream],
        Filter(upstream="spare"): [stream],
        Filter(since=one): [stream, late, unsure],
        Filter(until=two): [unsure, text],
        Filter(since=one, until=two): [unsure],
        Filter(kind=Kind.TEXT_ONLY, source="job", until=two): [text],
    }
    for wanted, jobs in expected.items():
        assert await ids(store, wanted, 2) == [job.request_id for job in jobs], wanted
    (item,) = (await store.requests.page("default", Filter(status=Status.CANCELLED), 2)).items
    assert (item.failure_code, item.attempts, item.source) == ("cancelled", 0, "job")


async def test_a_rare_one_is_found_over_several_looks_that_are_each_bounded(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "MOST_LOOKED_AT", 4)
    rare = new_job(model="rare")
    await store.jobs.submit(rare)
    await submitted(store, 10)
    page = await store.requests.page("default", Filter(model="rare"), 5)
    assert (page.items, page.after is not None) == ((), True)
    assert await ids(store, Filter(model="rare"), 5) == [rare.request_id]
