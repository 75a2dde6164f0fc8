"""What a text is: an IP address, a host's name, the parts of a URL. Pure; never raises."""

from __future__ import annotations

import re
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.(?!-)[A-Za-z0-9-]{1,63})*\.?")


def split_url(text: str) -> SplitResult:
    """The parts of a URL, all empty where it is none."""
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises for a port that is no number
    except ValueError:
        return SplitResult("", "", "", "", "")
    return parts


def is_host_name(text: str) -> bool:
    return _HOST_NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
