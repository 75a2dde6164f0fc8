"""What lets the bytes of an upload in: Google's SDK sends them to the URL that it was told, without
the key that it began the upload with.

So that URL bears a pass: the key's prefix, and a signature by what only the database and this
deployment know. Invariant: a pass is good for the one upload whose URL it stands in, and while its
key works; it opens nothing else, and never goes on to an upstream.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qsl, urlencode

from tidegate.call import Caller
from tidegate.http.auth import Gate
from tidegate.http.credentials import shown_in
from tidegate.relay.uploads import UPLOADS
from tidegate.store.api_keys import digest_of, prefix_of

PASS = "tidegate_key"
_PASS = re.compile(r"([a-z0-9]{10})\.([0-9a-f]{64})", re.ASCII)


def own_urls(scope: Any, secret: str) -> Callable[[str], str]:
    """From the query of an upload's URL to that URL, as the client reaches us; with a pass of the
    key that the request in `scope` shows, if it is one of ours."""
    said = dict(scope["headers"])
    host = said.get(b"host", b"").decode("latin-1")
    # A proxy that ends TLS says so. Whoever else says it misleads nobody but itself.
    scheme = "https" if said.get(b"x-forwarded-proto", b"").strip() == b"https" else scope["scheme"]
    own_url = f"{scheme}://{host}{UPLOADS}"
    key = shown_in(scope["headers"], scope["query_string"]).key
    prefix = None if key is None else prefix_of(key)
    if key is None or prefix is None:
        return lambda query: f"{own_url}?{query}"
    digest = digest_of(key)
    return lambda query: f"{own_url}?{query}&{PASS}={prefix}.{_signature(query, digest, secret)}"


async def let_in(gate: Gate, scope: Any, secret: str) -> Caller | None:
    """Whose upload it is, by the pass in its URL; None where the request shows a key of its own, or
    no pass. Raises Unauthenticated, Forbidden, StoreUnavailable."""
    if shown_in(scope["headers"], scope["query_string"]).key is not None:
        return None
    pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
    shown = [_PASS.fullmatch(value) for name, value in pairs if name == PASS]
    if len(shown) != 1 or (found := shown[0]) is None:
        return None
    query = urlencode([pair for pair in pairs if pair[0] != PASS])
    prefix, signature = found.groups()
    return await gate.vouched(
        prefix,
        lambda digest: hmac.compare_digest(_signature(query, digest, secret), signature),
    )


def _signature(query: str, digest: bytes, secret: str) -> str:
    """By the key's digest and the upstream's key together: neither a copy of the database nor a
    guess at the other is enough."""
    message = b"an upload\0" + query.encode()
    return hmac.digest(digest + secret.encode(), message, sha256).hex()
