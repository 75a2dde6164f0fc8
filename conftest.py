"""What holds for every run of tests here, those of `chaos/` too."""

from tests.garbage import pytest_collection
from tests.needs import pytest_collection_modifyitems
from tests.watched import pytest_configure, pytest_xdist_setupnodes

__all__ = [
    "pytest_collection",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_xdist_setupnodes",
]
