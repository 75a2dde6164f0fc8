"""Which addresses and URLs may be fetched on a caller's behalf. Pure.

Invariant: `is_public` is true only of unicast addresses of the public internet, never of one
that wraps, maps or embeds an IPv4 address.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from yarl import URL

from tidegate.errors import FetchRefused

Address = IPv4Address | IPv6Address
MAX_URI_CHARS = 2048
ALLOWED = (
    "an http:// or https:// URL of a public host, on port 80, 443 or above 1023, "
    f"without a user name or password, at most {MAX_URI_CHARS} characters"
)

# Own tables rather than `is_global`, whose answers have changed between Python's releases.
_CLOSED_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT; one cloud's metadata too
        "127.0.0.0/8",  # loopback
        "168.63.129.16/32",  # a cloud's metadata on an otherwise public address
        "169.254.0.0/16",  # link-local; most clouds' metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
# Outside it lie loopback, unspecified, mapped, compatible, NAT64, ULA, link-local, multicast.
_OPEN_V6 = IPv6Network("2000::/3")
_CLOSED_V6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments; Teredo wraps IPv4 in 2001::/32
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4 wraps IPv4
        "3fff::/20",  # documentation
    )
)
_CLOSED_NAMES = ("localhost", "metadata", "metadata.google.internal")
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?!.{{254}}){_LABEL}(\.{_LABEL})*")
_AUTHORITY = re.compile(r"[^/?#]*//([^/?#]*)")
_UNSAFE = re.compile(r"[\x00-\x20\x7f-\x9f\\]")
# How inet_aton reads a host: 2130706433, 0x7f.1, 0177.0.0.1, 127.1.
_LOOKS_NUMERIC = re.compile(r"(.*\.)?(0[xX][0-9a-fA-F]*|[0-9]+)\.?")


def is_public(address: Address) -> bool:
    """Whether `address` may be connected to on a caller's behalf."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _CLOSED_V4)
    # ISATAP hides an IPv4 address in the lower half of an address of any network.
    if int(address) >> 32 & 0xFDFF_FFFF == 0x0000_5EFE:
        return False
    return address in _OPEN_V6 and not any(address in network for network in _CLOSED_V6)


def check_uri(
    uri: str, is_allowed: Callable[[Address], bool] = is_public, *, field: str = "image_uri"
) -> URL:
    """Parse `uri`, refusing all that can be refused without asking DNS.

    Raises FetchRefused, which names `field`.
    """
    try:
        return _checked(uri, is_allowed)
    except ValueError as wrong:
        raise refused(str(wrong), field) from None


def _checked(uri: str, is_allowed: Callable[[Address], bool]) -> URL:
    if len(uri) > MAX_URI_CHARS:
        raise ValueError(f"is longer than {MAX_URI_CHARS} characters")
    if _UNSAFE.search(uri):
        raise ValueError("has spaces, backslashes or control characters in it")
    try:
        url = URL(uri)
        port = url.port
    except ValueError:
        raise ValueError("is not a URL") from None
    if url.scheme not in ("http", "https"):
        raise ValueError("is neither http:// nor https://")
    host = (url.raw_host or "").rstrip(".").lower()
    if not host:
        raise ValueError("names no host")
    # Of the text itself: the parser drops an empty name, and brackets that hold no address.
    authority = found[1] if (found := _AUTHORITY.match(uri)) else ""
    if "@" in authority:
        raise ValueError("has a user name or password in it")
    if port not in (80, 443) and (port is None or port < 1024):
        raise ValueError("names a port that is not allowed")
    _check_host(host, is_allowed, bracketed="[" in authority)
    return url.with_fragment(None)


def refused(problem: str, field: str = "image_uri") -> FetchRefused:
    """The one error of this room; `problem` continues the sentence that begins with the field."""
    return FetchRefused(field, f"{field} {problem}", allowed=ALLOWED)


def _check_host(host: str, is_allowed: Callable[[Address], bool], *, bracketed: bool) -> None:
    try:
        address = ip_address(host)
    except ValueError:
        if _LOOKS_NUMERIC.fullmatch(host):
            raise ValueError("spells an address in numbers in an unusual way") from None
        if bracketed or not _NAME.fullmatch(host):
            raise ValueError("is not a URL") from None
        name_is_closed = host in _CLOSED_NAMES or host.endswith(".localhost")
        if name_is_closed and not is_allowed(IPv4Address("127.0.0.1")):
            raise ValueError("does not name a public host") from None
        return
    if not is_allowed(address):
        raise ValueError("does not name a public host")
