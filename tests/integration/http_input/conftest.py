"""One server for the tests that only look at an answer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.http_input.server import Running, serving


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Small limits on the prompt and the number of files; a test clears what it looks at."""
    with serving(tmp_path_factory.mktemp("plain"), max_prompt_chars=100, max_files=2) as running:
        yield running
