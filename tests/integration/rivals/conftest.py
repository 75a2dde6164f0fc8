"""What hurts the users of others, as tests of ours: see docs/rivals.md."""

from tests.gateway import open_gateway

__all__ = ["open_gateway"]
