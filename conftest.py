"""What holds for every run of tests here, those of `chaos/` too."""

from tests.watched import pytest_configure, pytest_xdist_setupnodes

__all__ = ["pytest_configure", "pytest_xdist_setupnodes"]
