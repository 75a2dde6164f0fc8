"""Which headers pass, in either direction. Pure.

Invariant: what belongs to one connection, says who is behind us, or is a key never passes; what we
do not know does.
"""

from __future__ import annotations

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
    )
)
_NOT_SENT_PREFIXES = (_OURS, "x-forwarded-", "sec-", "proxy-")
_NOT_RETURNED = _HOP_BY_HOP | frozenset(("set-cookie", "alt-svc", "strict-transport-security"))


def to_send(given: Iterable[tuple[bytes, bytes]]) -> list[tuple[str, str]]:
    """The headers of a client that go on to the upstream; names are in lower case."""
    found, named = [], ""
    for raw_name, raw_value in given:
        name = raw_name.decode("latin-1")
        if name == "connection":
            named = raw_value.decode("latin-1").lower()
        if name not in _NOT_SENT and not name.startswith(_NOT_SENT_PREFIXES):
            found.append((name, raw_value.decode("latin-1")))
    if named and named not in ("keep-alive", "close"):
        dropped = {one.strip() for one in named.split(",")}
        found = [pair for pair in found if pair[0] not in dropped]
    # A compressed answer could not be read for its usage.
    found.append(("accept-encoding", "identity"))
    return found


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
            named = value.lower()
        if name in _NOT_RETURNED_BYTES or (name == b"content-length" and not same_length):
            continue
        if not name.startswith(b"x-tidegate-") or name == b"x-tidegate-emulator":
            found.append((name, value))
    if named and named not in (b"keep-alive", b"close"):
        dropped = {one.strip() for one in named.split(b",")}
        found = [pair for pair in found if pair[0] not in dropped]
    return found


_NOT_RETURNED_BYTES = frozenset(name.encode() for name in _NOT_RETURNED)
