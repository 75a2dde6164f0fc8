"""Who may see and change the limits of a running deployment.

With ADMIN_TOKEN whoever shows it. Without one, only this machine, and only while HOST is a loopback
address. Invariant: no page in a browser and no proxy in front gets in without the token: a request
that bears a mark of either is refused.
"""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request

from tidegate.errors import Forbidden, Unauthenticated
from tidegate.http.services import services_of

_SCHEME = "bearer"
# Set by proxies: the connection then comes from nearer than its sender.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


async def admit_admin(request: Request) -> None:
    """A dependency of all admin routes. Raises Unauthenticated or Forbidden."""
    config = services_of(request).config
    if config.admin_token is not None:
        _check_token(request, config.admin_token.get_secret_value())
        return
    if not config.is_loopback:
        raise Forbidden("set ADMIN_TOKEN to use /admin: HOST is not a loopback address")
    if not _from_this_machine(request):
        raise Forbidden("without ADMIN_TOKEN, /admin answers only to programs of this machine")


def _check_token(request: Request, token: str) -> None:
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != _SCHEME:
        raise Unauthenticated("show ADMIN_TOKEN as Authorization: Bearer <token>")
    # In time that says nothing of how much of it was right.
    if not hmac.compare_digest(shown.strip().encode("utf-8", "replace"), token.encode()):
        raise Unauthenticated("the token is not the right one")


def _from_this_machine(request: Request) -> bool:
    peer = request.client
    if peer is None or not _is_loopback(peer.host):
        return False
    if any(name in request.headers for name in _FORWARDED):
        return False
    # A page of another site has its browser send us its own name (and, after DNS rebinding, its
    # own host); a program sends neither.
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return False
    own = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != own:
        return False
    return _is_loopback(_name_in(own))


def _name_in(host: str) -> str:
    """The host without its port and brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
