"""Sign-in of a browser with a one-time code, so that the operator's key is never shown to it.

`tidegate up` prints an address with a one-time code. The code becomes a cookie:

    code      nonce . end . HMAC(key, "code", nonce, end)     ten minutes, spent once
    cookie    nonce . end . HMAC(key, "session", nonce, end)  twelve hours

Both are derived from the key, so every process of a deployment can check them and none stores a
session. That a code is spent is on record in PostgreSQL, which all processes share. A new key ends
every code and session. Invariant: neither tells anything of the key.
"""

from __future__ import annotations

import hmac
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import sha256
from typing import Literal, NamedTuple

CODE_S = 600
SESSION_S = 12 * 3600
_NONCE_BYTES = 16
_END_BYTES = 6
_MAC_BYTES = 32
_LENGTH = _NONCE_BYTES + _END_BYTES + _MAC_BYTES

Use = Literal["code", "session"]


class Pass(NamedTuple):
    """A code or a session that is sound and not over."""

    nonce: bytes
    ends_at: int  # Unix time


def make_code(key: str, now: float | None = None) -> str:
    """For the address that the start-up page prints."""
    return _made("code", key, CODE_S, now)


def make_session(key: str, now: float | None = None) -> str:
    """The value of the cookie."""
    return _made("session", key, SESSION_S, now)


def checked(use: Use, key: str, text: str, now: float | None = None) -> Pass | None:
    """What `text` is a sound code or session of; None where it is none, or is over."""
    try:
        raw = urlsafe_b64decode(text.encode("ascii"))
    except ValueError:
        return None
    if len(raw) != _LENGTH:
        return None
    told, mac = raw[:-_MAC_BYTES], raw[-_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(use, key, told)):
        return None
    ends_at = int.from_bytes(told[_NONCE_BYTES:])
    if ends_at <= (time.time() if now is None else now):
        return None
    return Pass(told[:_NONCE_BYTES], ends_at)


def cookie_name(key: str) -> str:
    """Differs from key to key: a browser keeps the cookies of all ports of a host together."""
    return f"tidegate_{_mac('session', key, b'name').hex()[:12]}"


def _made(use: Use, key: str, lasts_s: int, now: float | None) -> str:
    ends_at = int((time.time() if now is None else now) + lasts_s)
    told = secrets.token_bytes(_NONCE_BYTES) + ends_at.to_bytes(_END_BYTES)
    return urlsafe_b64encode(told + _mac(use, key, told)).decode()


def _mac(use: Use, key: str, told: bytes) -> bytes:
    return hmac.digest(key.encode(), f"tidegate sign-in {use} 1:".encode() + told, sha256)
