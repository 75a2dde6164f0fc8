"""What holds for every run of tests here, those of `chaos/` too."""

from __future__ import annotations

import pytest

from tests.garbage import pytest_collection
from tests.needs import mark
from tests.order import order
from tests.watched import pytest_configure, pytest_xdist_setupnodes

__all__ = ["pytest_collection", "pytest_configure", "pytest_xdist_setupnodes"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items)
    order(items)
