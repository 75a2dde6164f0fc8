"""What holds for every run of tests here, those of `chaos/` too."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

from tests.garbage import pytest_collection, pytest_runtest_setup, pytest_unconfigure
from tests.needs import mark
from tests.order import order, taken_first
from tests.watched import pytest_configure, pytest_xdist_setupnodes

__all__ = [
    "pytest_collection",
    "pytest_configure",
    "pytest_runtest_setup",
    "pytest_unconfigure",
    "pytest_xdist_setupnodes",
]

# A machine that others use stands still for a second now and then: that says nothing of a test.
# The examples of each property were a quarter of the unit tests' time: `make chaos` gives it 1,000.
settings.register_profile(
    "suite",
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
settings.register_profile("deep", settings.get_profile("suite"), max_examples=1_000)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items)
    taken_first(items)
    order(items)
