"""Servers that the dashboard's tests may pause."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.clusters import FAST, copied
from tests.on_uvloop import pytest_asyncio_loop_factories
from tidegate.embedded.servers import ValkeyServer

__all__ = ["pytest_asyncio_loop_factories", "stores"]


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
