"""These tests run on the event loop of production."""

from tests.on_uvloop import pytest_asyncio_loop_factories

__all__ = ["pytest_asyncio_loop_factories"]
