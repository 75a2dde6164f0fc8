"""Who may see and change the limits, tenants and keys of a running deployment.

Whoever shows ADMIN_TOKEN or, where API keys are asked for, a key of the scope `admin`. Where they
are not, and there is no ADMIN_TOKEN, this machine alone, and only while HOST is a loopback address.
Invariant: no page in a browser and no proxy in front gets in without a token or a key: a request
that bears a mark of either is refused.
"""

from __future__ import annotations

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.requests import Request

from tidegate.call import Scope as ScopeOfKey
from tidegate.errors import Forbidden, Unauthenticated
from tidegate.http.caller import caller_of
from tidegate.http.services import services_of

_SCHEME = "bearer"
# Set by proxies: the connection then comes from nearer than its sender.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


async def admit_admin(request: Request) -> None:
    """A dependency of all admin routes. Raises Unauthenticated or Forbidden."""
    services = services_of(request)
    config, token = services.config, services.config.admin_token
    shown = _shown(request)
    if token is not None and shown is not None and _is_same(shown, token.get_secret_value()):
        return
    if services.gate.on:
        await caller_of(request, ScopeOfKey.ADMIN)
        return
    if token is not None:
        if shown is None:
            raise Unauthenticated("show ADMIN_TOKEN as Authorization: Bearer <token>")
        raise Unauthenticated("the token is not the right one")
    if not config.is_loopback:
        raise Forbidden("set ADMIN_TOKEN to use /admin: HOST is not a loopback address")
    if not _from_this_machine(request):
        raise Forbidden("without ADMIN_TOKEN, /admin answers only to programs of this machine")


def _shown(request: Request) -> str | None:
    """What a bearer shows; None without one."""
    scheme, _, shown = request.headers.get("authorization", "").partition(" ")
    return shown.strip() if scheme.lower() == _SCHEME else None


def _is_same(shown: str, token: str) -> bool:
    # In time that says nothing of how much of it was right.
    return hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode())


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
