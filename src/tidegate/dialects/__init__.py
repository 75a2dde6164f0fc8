"""What the providers' dialects mean by what they say: today their refusals.

A refusal is classified once, for every way to a provider: `refusals` puts the dialects' words and
the HTTP status together, `waits` reads how long to wait. Pure.
"""

from tidegate.dialects.refusals import error_of_refusal

__all__ = ["error_of_refusal"]
