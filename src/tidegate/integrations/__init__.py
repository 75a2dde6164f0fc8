"""Integrations of third-party HTTP clients: one module for each, which alone imports it.

Invariant: a request with a demand is sent only with a permit, which is held until the answer's body
has been read to its end or closed.
"""
