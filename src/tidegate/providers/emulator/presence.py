"""Whether the clients of calls in flight are still there, asked of the kernel.

A gateway may close one call and open the next within microseconds, and the event loop may see the
new request before the old disconnect. Asking the kernel at each arrival keeps the count of calls
in flight true to what the gateway really held open.

Invariant: `departed` names only calls whose client has closed its side of the connection.
"""

from __future__ import annotations

import select

from aiohttp import web


class Presence:
    """Where the platform has no epoll, nobody is ever found to be gone early."""

    def __init__(self) -> None:
        self._epoll = select.epoll() if hasattr(select, "epoll") else None
        self._call_of: dict[int, int] = {}  # file descriptor -> call id

    def watch(self, request: web.BaseRequest, call_id: int) -> int:
        """Start to watch a call's connection; returns a handle for `forget`, -1 if it has none."""
        transport = request.transport
        sock = None if transport is None else transport.get_extra_info("socket")
        if sock is None or self._epoll is None:
            return -1
        fd: int = sock.fileno()
        try:
            self._epoll.register(fd, select.EPOLLRDHUP)
        except FileExistsError:
            self._epoll.modify(fd, select.EPOLLRDHUP)
        self._call_of[fd] = call_id
        return fd

    def forget(self, fd: int, call_id: int) -> None:
        # The number may already belong to a newer connection: then it is not ours to remove.
        if self._epoll is None or self._call_of.get(fd) != call_id:
            return
        del self._call_of[fd]
        try:
            self._epoll.unregister(fd)
        except OSError:
            return  # the connection is closed, and the kernel has removed it by itself

    def departed(self) -> list[int]:
        """Ids of watched calls whose client has closed. Never blocks."""
        if self._epoll is None:
            return []
        found = self._epoll.poll(0)
        return [self._call_of[fd] for fd, _ in found if fd in self._call_of]

    def close(self) -> None:
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
