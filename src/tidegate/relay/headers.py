"""Which headers pass, in either direction. Pure.

Invariant: what belongs to one connection or to the client's browser, says who is behind us, or is a
key never passes; what we do not know does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tidegate.relay.paths import Dialect

Headers = list[tuple[bytes, bytes]]

# RFC 9110, section 7.6.1, and what Connection itself names.
_HOP_BY_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate"),
        *(b"proxy-authorization", b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    )
)
_OURS = b"x-tidegate-"
_NOT_SENT = _HOP_BY_HOP | frozenset(
    (
        *(b"host", b"content-length", b"expect", b"accept-encoding", b"cookie", b"idempotency-key"),
        *(b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key"),
        *(b"openai-organization", b"openai-project", b"x-goog-user-project"),
        *(b"forwarded", b"via", b"x-real-ip", b"origin", b"referer"),
        # Some servers take these for the method or the path that is really meant.
        *(b"x-http-method-override", b"x-http-method", b"x-method-override"),
        *(b"x-original-url", b"x-rewrite-url"),
        # Some begin work for them that goes on after their answer, under no permit.
        *(b"prefer", b"x-dashscope-async"),
        # Google leaves out what these do not name, such as the usage; and encodes the answer.
        *(b"x-goog-fieldmask", b"x-goog-encode-response-if-executable"),
    )
)
_NOT_SENT_PREFIXES = (_OURS, b"x-forwarded-", b"sec-", b"proxy-")
# What has a say over the client's browser, our origin or our connections, and what our own server
# says. Of a redirect: an upstream's address is none of ours, and a client that followed it would
# show its key there.
_NOT_RETURNED = _HOP_BY_HOP | frozenset(
    (
        *(b"date", b"server", b"via", b"x-powered-by", b"alt-used", b"priority"),
        *(b"location", b"content-location", b"refresh", b"link"),
        *(b"set-cookie", b"set-cookie2", b"clear-site-data", b"set-login", b"p3p"),
        *(b"www-authenticate", b"authentication-info", b"activate-storage-access"),
        *(b"alt-svc", b"strict-transport-security", b"public-key-pins", b"expect-ct"),
        *(b"public-key-pins-report-only", b"early-data", b"http2-settings"),
        *(b"content-security-policy", b"content-security-policy-report-only"),
        *(b"permissions-policy", b"feature-policy", b"document-policy", b"referrer-policy"),
        *(b"x-frame-options", b"x-xss-protection", b"x-permitted-cross-domain-policies"),
        *(b"x-dns-prefetch-control", b"x-download-options", b"x-ua-compatible"),
        *(
            b"origin-agent-cluster",
            b"origin-trial",
            b"service-worker-allowed",
            b"speculation-rules",
        ),
        *(b"supports-loading-mode", b"no-vary-search", b"sourcemap", b"x-sourcemap"),
        *(b"nel", b"report-to", b"reporting-endpoints", b"timing-allow-origin", b"tk"),
        *(b"accept-ch", b"accept-ch-lifetime", b"critical-ch", b"use-as-dictionary"),
    )
)
_NOT_RETURNED_PREFIXES = (_OURS, b"access-control-", b"cross-origin-", b"sec-", b"proxy-")
_SHORTEST_SECRET_BYTES = 8  # a shorter one, such as `none`, opens nothing
_NO_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


def to_send(given: Iterable[tuple[bytes, bytes]]) -> Headers:
    """The headers of a client that go on to the upstream. Names are in lower case, as ASGI gives
    them."""
    found, named = [], b""
    for pair in given:
        name = pair[0]
        if name in _NOT_SENT:
            if name == b"connection":  # there may be several
                named = b"%b,%b" % (named, pair[1].lower()) if named else pair[1].lower()
        elif not name.startswith(_NOT_SENT_PREFIXES):
            found.append(pair)
    if named and named not in (b"keep-alive", b"close"):
        dropped = {one.strip() for one in named.split(b",")}
        found = [pair for pair in found if pair[0] not in dropped]
    # A compressed answer could not be read for its usage.
    found.append((b"accept-encoding", b"identity"))
    return found


def with_key(headers: Headers, dialect: Dialect, key: str) -> Headers:
    """The same with the upstream's key, as the dialect shows it; without one where it is empty."""
    if not key:
        return headers
    if dialect is Dialect.OPENAI:
        return [*headers, (b"authorization", b"Bearer " + key.encode())]
    name = b"x-goog-api-key" if dialect is Dialect.GEMINI else b"x-api-key"
    return [*headers, (name, key.encode())]


def to_return(
    given: Iterable[tuple[bytes, bytes]], key: str = "", *, same_length: bool = True
) -> Headers:
    """The headers of an upstream's answer that go back to the client. Where they repeat the
    upstream's `key` it is masked."""
    found, named = [], b""
    for raw_name, value in given:
        name = raw_name.lower()
        if name == b"connection":
            named = b"%b,%b" % (named, value.lower()) if named else value.lower()
        if name in _NOT_RETURNED or (name == b"content-length" and not same_length):
            continue
        if not name.startswith(_NOT_RETURNED_PREFIXES) or name == b"x-tidegate-emulator":
            found.append((name, value))
    values = b"".join([value for _, value in found])
    if (secret := key.encode()) in values and len(secret) >= _SHORTEST_SECRET_BYTES:
        found = [(name, value.replace(secret, b"***")) for name, value in found]
    if _NO_VALUE.search(values):  # our server would not send it
        found = [pair for pair in found if not _NO_VALUE.search(pair[1])]
    if named and named not in (b"keep-alive", b"close"):
        dropped = {one.strip() for one in named.split(b",")}
        found = [pair for pair in found if pair[0] not in dropped]
    return found


def content_type_in(headers: Headers) -> str | None:
    """None where none is told."""
    for name, value in headers:
        if name == b"content-type":
            return value.decode("latin-1")
    return None


def of_answer(upstream: str, queue_ms: float) -> Headers:
    """What every answer bears that an upstream gave, its refusals too: who gave it, and how long
    the call waited for its turn."""
    return [
        (b"x-tidegate-queue-ms", b"%.1f" % queue_ms),
        (b"x-tidegate-upstream", upstream.encode()),
    ]
