"""A gateway for each test, and an upstream that says whatever the test wants, byte for byte."""

from tests.gateway import open_gateway
from tests.integration.security.hostile import hostile

__all__ = ["hostile", "open_gateway"]
