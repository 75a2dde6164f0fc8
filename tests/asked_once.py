"""What two libraries ask for with each connection is asked for once in a test process.

asyncpg asks PostgreSQL what an array is made of, by a query that takes milliseconds to plan, and
redis-py reads its own version from a file. Together that was a tenth of what a test with a gateway
cost. Processes that the tests start, and tests with `asked_each_time`, ask as the product does.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest
import redis.utils

_FIRST_OF_USERS = 16384  # PostgreSQL's own types, below it, are the same in every database
_ask = asyncpg.Connection._introspect_types
_known: dict[frozenset[int], Any] = {}
# No statement was run, so that asyncpg need not prepare its own again.
_NOTHING_RUN = SimpleNamespace(name="none")


async def _ask_once(
    connection: asyncpg.Connection, oids: Iterable[int], timeout: float | None
) -> tuple[Any, Any]:
    asked = frozenset(oids)
    if asked in _known:
        return _known[asked], _NOTHING_RUN
    types, statement = await _ask(connection, oids, timeout)
    if max(asked) < _FIRST_OF_USERS:
        _known[asked] = types
    return types, statement


asyncpg.Connection._introspect_types = _ask_once
redis.utils.get_lib_version = cache(redis.utils.get_lib_version)


@pytest.fixture
def asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asyncpg.Connection, "_introspect_types", _ask)
