"""Which headers pass, in either direction. Pure.

Invariant: what belongs to one connection, says who is behind us, or is a key never passes; what we
do not know does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tidegate.relay.paths import Dialect

# RFC 9110, section 7.6.1, and what Connection itself names.
_HOP_BY_HOP = frozenset(
    (
        *("connection", "keep-alive", "proxy-connection", "proxy-authenticate"),
        *("proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"),
    )
)
_OURS = "x-tidegate-"
_NOT_SENT = _HOP_BY_HOP | frozenset(
    (
        *("host", "content-length", "expect", "accept-encoding", "cookie", "idempotency-key"),
        *("authorization", "x-api-key", "x-goog-api-key", "api-key"),
        *("openai-organization", "openai-project", "x-goog-user-project"),
        *("forwarded", "via", "x-real-ip", "origin", "referer"),
        # Some servers take these for the method or the path that is really meant.
        *("x-http-method-override", "x-http-method", "x-method-override"),
        *("x-original-url", "x-rewrite-url"),
    )
)
_NOT_SENT_PREFIXES = (_OURS, "x-forwarded-", "sec-", "proxy-")
# What would have a say over our own origin and its connections.
_NOT_RETURNED = _HOP_BY_HOP | frozenset(
    (
        *("set-cookie", "set-cookie2", "alt-svc", "strict-transport-security"),
        *("clear-site-data", "refresh", "nel", "report-to", "reporting-endpoints"),
    )
)
_NO_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def to_send(given: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """The headers of a client that go on to the upstream; names are in lower case."""
    found, named = [], ""
    for raw_name, raw_value in given:
        name = raw_name.decode("latin-1")
        if name == "connection":  # there may be several
            value = raw_value.decode("latin-1").lower()
            named = f"{named},{value}" if named else value
        if name not in _NOT_SENT and not name.startswith(_NOT_SENT_PREFIXES):
            found.append((name, _text(raw_value)))
    if named and named not in ("keep-alive", "close"):
        dropped = {one.strip() for one in named.split(",")}
        found = [pair for pair in found if pair[0] not in dropped]
    # A compressed answer could not be read for its usage.
    found.append(("accept-encoding", "identity"))
    return found


def _text(value: bytes) -> str:
    """As text that is sent as the same bytes: the client that sends it encodes as UTF-8."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


def with_key(headers: list[tuple[str, str]], dialect: Dialect, key: str) -> list[tuple[str, str]]:
    """The same with the upstream's key, as the dialect shows it."""
    if dialect is Dialect.OPENAI:
        return [*headers, ("authorization", f"Bearer {key}")]
    return [*headers, ("x-goog-api-key" if dialect is Dialect.GEMINI else "x-api-key", key)]


def to_return(
    given: Iterable[tuple[bytes, bytes]], *, same_length: bool = True
) -> list[tuple[bytes, bytes]]:
    """The headers of an upstream's answer that go back to the client."""
    found, named = [], b""
    for raw_name, value in given:
        name = raw_name.lower()
        if name == b"connection":
            named = b"%b,%b" % (named, value.lower()) if named else value.lower()
        if name in _NOT_RETURNED_BYTES or (name == b"content-length" and not same_length):
            continue
        if not name.startswith(b"x-tidegate-") or name == b"x-tidegate-emulator":
            found.append((name, value))
    if _NO_VALUE.search(b"".join([value for _, value in found])):  # our server would not send it
        found = [pair for pair in found if not _NO_VALUE.search(pair[1])]
    if named and named not in (b"keep-alive", b"close"):
        dropped = {one.strip() for one in named.split(b",")}
        found = [pair for pair in found if pair[0] not in dropped]
    return found


_NOT_RETURNED_BYTES = frozenset(name.encode() for name in _NOT_RETURNED)
