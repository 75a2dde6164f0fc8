"""What a native request says beside its body: its headers of ours, and what may go on. Pure.

Invariant: a wrong value is named, with what is allowed; a key never goes on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode
from uuid import UUID

from tidegate.call import Caller
from tidegate.errors import InvalidRequest
from tidegate.http.upload_pass import PASS
from tidegate.relay.call import NativeCall
from tidegate.relay.headers import Headers, to_send
from tidegate.relay.paths import Endpoint
from tidegate.tracing import HEADER, Tracing, parent_of

# Credentials of clients; `%` since a name can be written in other ways.
_KEYS_IN_QUERY = frozenset(
    ("key", "$key", "api_key", "api-key", "access_token", "oauth_token", PASS)
)
_MAYBE_KEY = re.compile(r"key|token|%", re.IGNORECASE)
# What Google takes for the form of its answer: one without a usage, or that is no JSON.
_FORMS = ("fields", "callback", "alt")
_MAYBE_FORM = re.compile(r"fields|callback|alt=(?!(?:sse|json)(?:&|$))|[%;]", re.IGNORECASE)
_READ_FORMS = ("json", "sse")
_MOST_WAIT_MS = 86_400_000
_LONGEST_TAG = 200


def call_of(
    scope: Mapping[str, Any],
    endpoint: Endpoint,
    body: bytes,
    caller: Caller,
    *,
    request_id: UUID,
    received: tuple[float, datetime],
    usual_wait_ms: int,
    tracing: Tracing,
) -> NativeCall:
    """The call that a request asks for. `received`: on the monotonic clock and by the calendar.
    Raises InvalidRequest."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    wait_ms, priority, subject, parent = usual_wait_ms, 0, None, None
    for name, value in headers:
        if name == b"x-tidegate-deadline-ms":
            wait_ms = _whole(name, value, 1, _MOST_WAIT_MS)
        elif name == b"x-tidegate-priority":
            priority = _whole(name, value, -100, 100)
        elif name == b"x-tidegate-subject":
            subject = _tag(name, value)
        elif name == HEADER:
            parent = parent_of(value.decode("latin-1"))
    trail = tracing.trail(request_id, parent)
    query = ""
    if scope["query_string"]:
        query = _without_key(scope["query_string"].decode("latin-1"))
        if endpoint.is_counted and _MAYBE_FORM.search(query) is not None:
            _check_form(query)
    return NativeCall(
        request_id,
        endpoint,
        scope["method"],
        query,
        to_send(headers if trail is None else _without_parent(headers)),
        body if endpoint.is_counted or endpoint.operation.has_body else b"",
        caller,
        *received,
        wait_ms,
        min(priority, caller.most_priority),
        subject,
        trail,
    )


def _without_parent(headers: Headers) -> Headers:
    """The call says itself whose child it is."""
    return [pair for pair in headers if pair[0] != HEADER]


def is_coded(headers: Headers) -> bool:
    """Whether the body is compressed, or coded in another way."""
    for name, value in headers:
        if name == b"content-encoding":
            for one in value.lower().split(b","):
                if one.strip() not in (b"", b"identity"):
                    return True
    return False


def _without_key(query: str) -> str:
    if _MAYBE_KEY.search(query) is None:
        return query
    pairs = parse_qsl(query, keep_blank_values=True)
    kept = [pair for pair in pairs if pair[0].lower() not in _KEYS_IN_QUERY]
    return query if len(kept) == len(pairs) else urlencode(kept)


def _check_form(query: str) -> None:
    """Raises InvalidRequest for an answer that could not be read for its usage."""
    for name, value in parse_qsl(query.replace(";", "&"), keep_blank_values=True):
        plain = name.lower().removeprefix("$")
        form = value.partition(";")[0]  # what follows says how enumerations are written
        if plain not in _FORMS or (plain == "alt" and form in _READ_FORMS):
            continue
        said = f"{name[:64]!a} asks for an answer whose usage can't be read, which is not relayed"
        allowed = "json or sse" if plain == "alt" else f"a query without {plain}"
        raise InvalidRequest(plain, said, allowed=allowed)


def _whole(name: bytes, value: bytes, least: int, most: int) -> int:
    text = value.decode("latin-1").strip()
    digits = text.removeprefix("-")
    if not digits.isdecimal() or len(digits) > 9 or not least <= int(text) <= most:
        header = name.decode()
        allowed = f"a whole number from {least} to {most}"
        raise InvalidRequest(header, f"{header} must be {allowed}", allowed=allowed)
    return int(text)


def _tag(name: bytes, value: bytes) -> str:
    """A subject, which must be the same whether it came in a header or in JSON: most clients write
    headers in UTF-8; what can't be that is in Latin-1."""
    try:
        text = value.decode().strip()
    except UnicodeDecodeError:
        text = value.decode("latin-1").strip()
    if not 1 <= len(text) <= _LONGEST_TAG or not text.isprintable():
        header = name.decode()
        allowed = f"1 to {_LONGEST_TAG} printable characters"
        raise InvalidRequest(header, f"{header} must be {allowed}", allowed=allowed)
    return text
