"""Dialects: what requests, answers and refusals of each provider mean.

A refusal is classified once, for every way to a provider: `refusals` puts the dialects' words and
the HTTP status together, `waits` reads how long to wait. Pure.
"""

from tidegate.dialects.faults import error_of_refusal

__all__ = ["error_of_refusal"]
