"""The one listening socket, which all API processes of a family share."""

from __future__ import annotations

import errno
import socket

from tidegate.config import Config
from tidegate.errors import ConfigError

_BACKLOG = 2048


def listen(config: Config, *, for_worker: bool = False) -> socket.socket:
    """A socket that listens on HOST and PORT, or WORKER_PORT. Raises ConfigError where that
    cannot be."""
    name, port = "PORT", config.port
    if for_worker and config.worker_port is not None:
        name, port = "WORKER_PORT", config.worker_port
    family, address = _address(config, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as refused:
        listener.close()
        raise _explained(config, refused, name, port) from None
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds the socket."""
    host, port = listener.getsockname()[:2]
    if host in ("127.0.0.1", "::1", "0.0.0.0", "::"):
        return f"http://localhost:{port}"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _address(config: Config, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    host = config.host.strip("[]")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as unknown:
        raise _explained(config, unknown, "PORT", port) from None
    # `localhost` has two addresses; clients that try the other one first come back to this one.
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, (str(address[0]), port)


def _explained(config: Config, refused: OSError, name: str, port: int) -> ConfigError:
    match refused.errno:
        case errno.EADDRINUSE:
            why = "is in use by another program; choose another port, or 0 for any free one"
            return ConfigError(name, str(port), why)
        case errno.EACCES:
            why = "may not be opened by this user; ports from 1024 on may"
            return ConfigError(name, str(port), why)
    return ConfigError("HOST", config.host, f"must be an address of this machine: {refused}")
