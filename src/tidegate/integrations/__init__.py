"""Integrations of third-party HTTP clients: one module for each, which alone imports it.

Invariant: a request that a demand is named for is sent with a permit in hand, and the permit is
held until the answer's body has been read to its end or closed.
"""
