"""What we use of libraries beyond their public names still does what we use it for."""

from __future__ import annotations

import redis.asyncio
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from redis.asyncio.connection import Connection, parse_url

from tests.waiting import wait_until
from tidegate.limiter._compat import close_now
from tidegate.metrics._compat import add_counts


async def test_a_connection_is_closed_without_an_await(valkey_url: str) -> None:
    options = parse_url(valkey_url)
    options.pop("connection_class", None)
    connection = Connection(**options, client_name="closed-at-once")
    await connection.connect()  # type: ignore[no-untyped-call]

    async with redis.asyncio.Redis.from_url(valkey_url) as other:

        async def connected() -> bool:
            return any(one["name"] == "closed-at-once" for one in await other.client_list())

        assert await connected()
        close_now(connection)
        assert not connection.is_connected

        async def gone() -> bool:
            return not await connected()

        await wait_until(gone, what="the server's view of the end")


def test_many_values_added_together_are_those_added_one_by_one() -> None:
    values, bounds = [0.5, 1.0, 1.5, 7.0, 100.0], [1.0, 2.0, 10.0]
    shown = []
    for together in (True, False):
        registry = CollectorRegistry()
        histogram = Histogram("waits", "Waits", registry=registry, buckets=bounds)
        if together:
            add_counts(histogram, [2, 1, 1, 1], sum(values))
        else:
            for value in values:
                histogram.observe(value)
        lines = generate_latest(registry).decode().splitlines()
        shown.append([line for line in lines if "_created" not in line])
    assert shown[0] == shown[1]
