"""Servers that the dashboard's tests may pause."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clusters import FAST, copied
from tests.on_uvloop import pytest_asyncio_loop_factories
from tidegate.dashboard import routes
from tidegate.embedded.servers import ValkeyServer

__all__ = ["pytest_asyncio_loop_factories", "stores"]


@pytest.fixture(scope="module", autouse=True)
def files_are_kept() -> Iterator[None]:
    """A profile loads each file of the dashboard once, and not the forty of a view each time."""
    kept = [(name, value) for name, value in routes._RAW_HEADERS if name != b"cache-control"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "_RAW_HEADERS", [*kept, (b"cache-control", b"max-age=3600")])
        yield


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ValkeyServer, Any]]:
    valkey = ValkeyServer(tmp_path_factory.mktemp("valkey"))
    folder = tmp_path_factory.mktemp("postgres")
    postgres = copied(folder, FAST, migrated=True)
    valkey.start()
    postgres.start()
    yield valkey, postgres
    for server in (valkey, postgres):
        server.resume()
        server.stop()
