"""A gateway for each test."""

from tests.gateway import open_gateway

__all__ = ["open_gateway"]
