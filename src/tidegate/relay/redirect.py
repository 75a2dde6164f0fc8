"""Redirects of an upstream that are followed: within its own base URL alone. Pure.

Google answers the download of a file with one. Invariant: what is followed has the scheme, host and
port of the upstream's base URL, written as there, and lies below its path: the key goes nowhere
else, and no client or provider leads the gateway to another server. All other redirects end the
call.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST_REDIRECTS = 3
REDIRECTS = frozenset((301, 302, 303, 307, 308))
_LONGEST_BYTES = 8_000
# Whatever a server could read as a step upwards, or in another way than it is read here.
_UNSOUND = re.compile(rb"[\\\x00-\x20\x7f-\xff]|/\.|%2e|%5c|%00", re.IGNORECASE)


def followed(headers: Iterable[tuple[bytes, bytes]], base: str) -> str | None:
    """The URL to which a redirect leads that is to be followed, else None. `base`: that of the
    upstream, without a slash at its end."""
    named = [value for name, value in headers if name.lower() == b"location"]
    if len(named) != 1 or len(named[0]) > _LONGEST_BYTES or _UNSOUND.search(named[0]):
        return None
    location = named[0].decode("ascii").partition("#")[0]
    scheme, _, rest = base.partition("://")
    origin = f"{scheme}://{rest.partition('/')[0]}"
    if location[: len(origin)].lower() == origin.lower():
        location = location[len(origin) :]
    if not location.startswith("/") or location.startswith("//"):
        return None
    url = origin + location
    return url if url.startswith(f"{base}/") else None
