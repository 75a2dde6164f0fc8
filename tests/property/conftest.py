from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.property.server import Server, connected


@pytest.fixture
def server(valkey_url: str) -> Iterator[Server]:
    with connected(valkey_url) as made:
        yield made
