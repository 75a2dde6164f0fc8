"""What a request shows of itself: an API key, from wherever an SDK puts it, and a tenant's name.

Pure, and on the way of every call: no request is parsed further than these need.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

TENANT_HEADER = "x-tidegate-tenant"
_TENANT = TENANT_HEADER.encode()
_BEARER = b"authorization"
_CREDENTIALS = frozenset((_BEARER, b"x-api-key", b"x-goog-api-key", b"api-key"))
_NAMES = _CREDENTIALS | {_TENANT}
_OURS = b"tg_"
_IN_QUERY = b"key="


class Shown(NamedTuple):
    """`several`: keys of ours that differ. `tenant` is empty where two names were given."""

    key: bytes | None
    tenant: bytes | None
    several: bool


def shown_in(headers: Iterable[tuple[bytes, bytes]], query: bytes) -> Shown:
    """What is in the headers and the query; of credentials, one of ours goes before others'."""
    key: bytes | None = None
    tenant: bytes | None = None
    several = False
    for name, value in headers:
        if name not in _NAMES:
            continue
        if name == _TENANT:
            tenant = value if tenant in (None, value) else b""
            continue
        found = _in_authorization(value) if name == _BEARER else value.strip()
        key, several = _better(key, found, several)
    if _IN_QUERY in query:
        for pair in query.split(b"&"):
            if pair.startswith(_IN_QUERY):
                found = unquote_to_bytes(pair[len(_IN_QUERY) :])
                key, several = _better(key, found, several)
    return Shown(key, tenant, several)


def in_headers(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    """All credentials that headers hold, ours or not; none of a query, which ends up in logs."""
    return [
        found
        for name, value in headers
        if name in _CREDENTIALS
        and (found := _in_authorization(value) if name == _BEARER else value.strip())
    ]


def _in_authorization(value: bytes) -> bytes:
    scheme, _, given = value.strip().partition(b" ")
    return given.strip() if scheme.lower() == b"bearer" else b""


def _better(key: bytes | None, found: bytes, several: bool) -> tuple[bytes | None, bool]:
    if not found or found == key:
        return key, several
    if key is None or not key.startswith(_OURS):
        return found, several
    return key, several or found.startswith(_OURS)
