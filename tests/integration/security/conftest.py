"""A gateway for each test, and an upstream that says whatever the test wants, byte for byte."""

from tests.gateway import open_gateway
from tests.integration.security.hostile import hostile, one_try

__all__ = ["hostile", "one_try", "open_gateway"]
