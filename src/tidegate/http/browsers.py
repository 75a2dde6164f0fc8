"""Browsers: whether a request may come from a web page that is not ours, and the sign-in.

A browser sends requests for any page that its user opens, from this machine and to loopback
addresses too. Two things tell such a page: the browser says for whom it asks (Origin,
Sec-Fetch-Site), and a name that was made to lead here (DNS rebinding) stands in Host. Programs send
neither Origin nor Sec-Fetch-Site. Nothing here tells whether there is a proxy: no header can.

`tidegate up` prints an address with a one-time code, so that the operator's key is never shown to
a browser. The code becomes a cookie:

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
from collections.abc import Collection
from hashlib import sha256
from ipaddress import ip_address
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

from tidegate.errors import Forbidden
from tidegate.settings import Config

Headers = Collection[tuple[bytes, bytes]]

_OWN_SITES = (b"same-origin", b"none")
_MOST_REMEMBERED = 200


class Origins:
    """What counts as ours, by HOST and ALLOWED_HOSTS; and which pages may call us besides, by
    CORS_ORIGINS."""

    def __init__(self, config: Config) -> None:
        self._loopback = config.is_loopback
        self._names = frozenset((*config.allowed_hosts, config.host))
        self._allowed = frozenset(config.allowed_hosts)
        self._pages = frozenset(one.encode() for one in config.cors_origins)
        self._known: set[bytes] = set()

    def refusal(self, headers: Headers, method: str) -> Forbidden | None:
        """Why a request that shows no key is not answered; None where it is."""
        found = dict(headers)
        host = found.get(b"host")
        if len(found) != len(headers) and len({v for n, v in headers if n == b"host"}) > 1:
            host = b""  # two names are no name
        if host is not None and host not in self._known and not self._is_ours(host):
            return Forbidden(
                f"Host is {_shown(host)}, which is not a name of this gateway",
                field="Host",
                allowed=f"{self._in_words()}, or a name in ALLOWED_HOSTS",
            )
        if b"origin" not in found and b"sec-fetch-site" not in found:
            return None
        if found.get(b"origin") in self._pages:
            return None
        return self.page_refusal(headers, method)

    def socket_refusal(self, headers: Headers) -> Forbidden | None:
        """Why a WebSocket is not opened: no browser asks whether a page may read from one, so that
        a page needs to be ours, or one of CORS_ORIGINS, with a key too."""
        if any(name == b"origin" and value in self._pages for name, value in headers):
            return None
        return self.page_refusal(headers, "GET")

    def page_refusal(self, headers: Headers, method: str) -> Forbidden | None:
        """Why a request comes from a page that is not ours; None where it does not."""
        found = {name: value for name, value in headers if name in _NAMES}
        site = found.get(b"sec-fetch-site", b"none")
        if site not in _OWN_SITES and not _is_opening(found, method):
            return Forbidden(
                f"a page of another site sent this request (Sec-Fetch-Site: {_shown(site)})",
                field="Sec-Fetch-Site",
                allowed="requests of programs and of this gateway's own pages",
            )
        origin = found.get(b"origin")
        if origin is not None and not self._is_own_page(origin, found.get(b"host", b"")):
            return Forbidden(
                f"a page of {_shown(origin)} sent this request",
                field="Origin",
                allowed="requests of programs and of this gateway's own pages; behind a proxy "
                "that changes Host, name its host in ALLOWED_HOSTS",
            )
        return None

    def _is_ours(self, host: bytes) -> bool:
        name = _name_in(host)
        if name in self._names or _is_loopback(name):
            ours = True
        elif self._loopback:
            ours = False
        else:
            # A page's own name has a dot; an address is no name that could be made to lead here.
            ours = _is_address(name) or (bool(name) and "." not in name)
        if ours and len(self._known) < _MOST_REMEMBERED:
            self._known.add(host)
        return ours

    def _is_own_page(self, origin: bytes, host: bytes) -> bool:
        try:
            parts = urlsplit(origin.decode("ascii"))
            netloc, port = parts.netloc.lower(), parts.port
        except ValueError:
            return False
        if netloc and netloc.encode() == host.lower():
            return True
        return parts.hostname in self._allowed and port is None

    def _in_words(self) -> str:
        if self._loopback:
            return "localhost or a loopback address"
        return "an address, a name without a dot"


_NAMES = frozenset((b"host", b"origin", b"sec-fetch-site", b"sec-fetch-mode", b"sec-fetch-dest"))


def _is_opening(found: dict[bytes, bytes], method: str) -> bool:
    """A link that a person follows: the page that has it sees nothing of the answer."""
    return (
        method in ("GET", "HEAD")
        and found.get(b"sec-fetch-mode") == b"navigate"
        and found.get(b"sec-fetch-dest") == b"document"
    )


def _name_in(host: bytes) -> str:
    """The host without its port and brackets; empty where it can't be read."""
    try:
        parts = urlsplit(f"//{host.decode('ascii')}")
        _ = parts.port  # raises for a port that is no number
    except ValueError:
        return ""
    if parts.path or parts.query or parts.fragment or "@" in parts.netloc:
        return ""
    return (parts.hostname or "").removesuffix(".")


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _shown(value: bytes) -> str:
    return ascii(value[:100].decode("ascii", "replace"))[1:-1]


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
