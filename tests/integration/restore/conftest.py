"""A test here takes part in the gateways of `tests.gateway`."""

from tests.gateway import open_gateway

__all__ = ["open_gateway"]
