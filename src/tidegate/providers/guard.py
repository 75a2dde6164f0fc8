"""Going out on a caller's behalf without becoming its way into our network.

Invariant: a socket is opened only to an address that is allowed, checked on the very address that
is connected to; nothing of ours is sent along (no cookies, credentials or proxy).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from ipaddress import ip_address

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.resolver import ThreadedResolver

from tidegate.providers.addresses import Address


class AddressRefused(OSError):
    """The name led to an address that may not be connected to."""


def guarded_session(
    is_allowed: Callable[[Address], bool],
    resolver: AbstractResolver | None,
    headers: Mapping[str, str],
) -> aiohttp.ClientSession:
    """For one exchange: nothing is shared with another. The caller bounds the time."""

    def open_socket(info: aiohttp.AddrInfoType) -> socket.socket:
        """Called with the very address that the connection is then made to."""
        family, kind, protocol, _, where = info
        if not is_allowed(ip_address(str(where[0]).split("%", 1)[0])):
            raise AddressRefused("the address is not public")
        return socket.socket(family=family, type=kind, proto=protocol)

    connector = aiohttp.TCPConnector(
        resolver=resolver or ThreadedResolver(),
        socket_factory=open_socket,
        use_dns_cache=False,
        force_close=True,
        limit=1,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None),
        headers=dict(headers),
    )


def why_not_sent(failed: aiohttp.ClientError) -> str:
    """In words that go on from what was to be reached: "...could not be connected to"."""
    if isinstance(failed, aiohttp.ClientConnectorDNSError):
        return "names a host that cannot be found"
    if isinstance(failed, aiohttp.ClientConnectorError):
        if "the address is not public" in str(failed.os_error):
            return "does not lead to a public address"
        return "could not be connected to"
    if isinstance(failed, aiohttp.InvalidURL):
        return "is not a URL"
    return "was not answered properly"
