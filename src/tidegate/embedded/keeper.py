"""Keeper: one detached process per DATA_DIR that starts and stops the bundled servers.

    python -m tidegate.embedded.keeper DATA_DIR

Invariants: servers run while any process holds `users.lock`, and stop within `--idle-s` seconds
after the last one ends, however it ends. A server that dies is restarted on the same port. A new
keeper adopts the servers of a killed one without interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from tidegate.embedded.lease import (
    SERVICES,
    Folder,
    KeeperState,
    ServiceName,
    ServiceState,
    lock_until,
    opened,
    try_lock,
)
from tidegate.embedded.servers import (
    EmulatorServer,
    PostgresServer,
    RunningProcess,
    ServerFailed,
    StillRecovering,
    ValkeyServer,
    for_socket,
    free_port,
    identify,
    is_free,
    remove_socket,
)

# The interval of checks that no signal causes: for a lock that the kernel has released, and for a
# server that is not a child of this keeper.
_TICK_S = 1.0
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)


Server = ValkeyServer | PostgresServer | EmulatorServer


class Keeper:
    """Owner of the servers of a folder: one thread per server, and one that watches the users."""

    def __init__(self, folder: Folder, idle_s: float) -> None:
        self._folder = folder
        self._idle_s = idle_s
        self._state = KeeperState()
        self._superuser = self._application = self._valkey = ""
        self._writing = threading.Lock()
        self._stopping = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._woken: dict[str, threading.Event] = {}

    def run(self, began: int | None, signals: int | None = None) -> None:
        """Keep the servers running until no process needs them. Return immediately if another
        keeper runs.

        `began` is a descriptor that gets a byte and is closed once this keeper is in charge.
        `signals` is readable when a user has requested a check, or a server has ended.
        """
        with opened(self._folder.open_lock("keeper")) as own_lock:
            if not lock_until(own_lock, fcntl.LOCK_EX, time.monotonic() + 1.0):
                sys.stderr.write(f"another keeper holds {self._folder.path}/keeper.lock\n")
                return
            self._state = self._folder.read()
            self._superuser = self._folder.password("password")
            self._application = self._folder.password("password.application")
            self._valkey = self._folder.password("password.valkey")
            with self._changing() as state:
                state.keeper = identify(os.getpid())
            if began is not None:
                with opened(began), contextlib.suppress(BrokenPipeError):  # the starter may be gone
                    os.write(began, b"1")
            self._start([name for name in SERVICES if name in self._state.services])
            with opened(self._folder.open_lock("users")) as users:
                unused = self._watch(own_lock, users, [] if signals is None else [signals])
                self._end(unused)

    def stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stopping.set()

    def _watch(self, own_lock: int, users: int, signals: Sequence[int]) -> bool:
        """Return when the servers should end; True if no user is left.

        `users` is then locked, so that a new user waits until this keeper has ended.
        """
        last_used = time.monotonic()
        tick_s = min(_TICK_S, self._idle_s / 4)
        while not self._stopping.is_set():
            if not self._folder.owns_lock(own_lock, "keeper"):
                break  # the folder was removed
            self._start(self._folder.wanted())
            if not try_lock(users, fcntl.LOCK_EX):
                last_used = time.monotonic()
                self._folder.hurry.unlink(missing_ok=True)
            elif self._folder.hurry.exists() or time.monotonic() - last_used > self._idle_s:
                return True
            else:
                fcntl.flock(users, fcntl.LOCK_UN)
            for signal_pipe in select.select(signals, [], [], tick_s)[0]:
                os.read(signal_pipe, 4096)
                self._wake()
        return False

    def _start(self, names: Collection[ServiceName]) -> None:
        for name in names:
            if name not in self._threads:
                self._woken[name] = threading.Event()
                thread = threading.Thread(target=self._keep, args=(name,), name=name)
                self._threads[name] = thread
                thread.start()

    def _wake(self) -> None:
        """Have every server checked now."""
        for event in self._woken.values():
            event.set()

    def _end(self, unused: bool) -> None:
        self._stopping.set()
        # A new user waits for the next keeper: until this one has ended, a server rejects its
        # clients.
        with self._changing() as state:
            state.services = {
                name: replace(service, ready=False) for name, service in state.services.items()
            }
        self._wake()
        for thread in self._threads.values():
            thread.join()
        with contextlib.suppress(FileNotFoundError):  # removed with its DATA_DIR
            if unused:
                self._folder.want_nothing()
            with self._changing():
                self._state.keeper = None
            self._folder.hurry.unlink(missing_ok=True)

    def _keep(self, name: ServiceName) -> None:
        """Start a server, restart it when it dies, and stop it at the end."""
        failures = 0
        # A running server belongs to this keeper from now on, and is stopped at the end.
        server = self._adopted(name)
        ready, woken = False, self._woken[name]
        while not self._stopping.is_set():
            woken.clear()
            try:
                server = server or self._new(name)
                if server.process.running is None or not server.process.running.alive:
                    ready = False
                    server.launch()
                    self._note(name, server, ready=False)
                if not ready:
                    server.await_ready()
                    ready = True
                    self._note(name, server, ready=not self._stopping.is_set())
                failures = 0
            except StillRecovering as slow:
                sys.stderr.write(f"{slow}\n")
                continue
            except (ServerFailed, OSError) as failed:
                traceback.print_exc()
                self._note_failure(name, str(failed))
                self._stopping.wait(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1
                if server is not None and not _can_be_there(server):
                    server = None  # another program has its port: choose another port
                continue
            if not self._stopping.is_set():
                woken.wait(_TICK_S)
        if server is not None:
            server.stop()
        with self._changing() as state:
            state.services.pop(name, None)
            if (used := state.sockets.pop(name, None)) is not None:
                remove_socket(self._folder.path / name, Path(used))

    def _adopted(self, name: ServiceName) -> Server | None:
        """Return the server that a killed keeper has left running, if there is one."""
        before = self._state.services.get(name)
        if before is None or not before.identity.alive:
            return None
        server = self._new(name, adopts=True)
        url = server.url() if isinstance(server, PostgresServer) else server.url
        if url != before.url:  # one of an earlier version, with another address
            RunningProcess(before.identity).stop(signal.SIGINT)
            return None
        server.process.adopt(before.identity)
        return server

    def _new(self, name: ServiceName, *, adopts: bool = False) -> Server:
        """Return the server at its former address, so that its clients find it."""
        path = self._folder.path / name
        if name == "valkey":
            known = self._state.sockets.get(name)
            socket_path = for_socket(path, Path(known) if known else None)
            return ValkeyServer(
                path, password=self._valkey, socket_path=socket_path, keeps_spent=True
            )
        port = self._state.ports.get(name)
        if port is None or not (adopts or is_free(port)):
            port = free_port()
        if name == "postgres":
            return PostgresServer(
                path, port, password=self._superuser, application_password=self._application
            )
        return EmulatorServer(path, port)

    def _note(self, name: ServiceName, server: Server, *, ready: bool) -> None:
        running = server.process.running
        if running is None:
            return
        url = server.url() if isinstance(server, PostgresServer) else server.url
        with self._changing() as state:
            state.services[name] = ServiceState(running.identity, url, ready)
            if isinstance(server, ValkeyServer):
                state.sockets[name] = str(server.socket_path)
            else:
                state.ports[name] = server.port

    def _note_failure(self, name: ServiceName, why: str) -> None:
        with self._changing() as state:
            count, _ = state.failures.get(name, (0, ""))
            state.failures[name] = (count + 1, why)
            state.services.pop(name, None)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[KeeperState]:
        """Change the published state, one thread at a time, and write it."""
        with self._writing:
            yield self._state
            try:
                self._folder.write(self._state)
            except FileNotFoundError:
                self._stopping.set()  # the folder was removed: no process can use it any more


@contextlib.contextmanager
def woken_by_signals() -> Iterator[int]:
    """Yield a descriptor that is readable after each signal that this process handles."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield read_end
    finally:
        signal.set_wakeup_fd(before)
        os.close(read_end)
        os.close(write_end)


def _wake_only(_signal: int, _frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor of the signal wakes the keeper."""


def _can_be_there(server: Server) -> bool:
    if isinstance(server, ValkeyServer):
        return True  # its socket is in a folder that no other user may enter
    running = server.process.running
    return (running is not None and running.alive) or is_free(server.port)


def main() -> None:
    """Detach from the starter, and run the keeper."""
    parser = argparse.ArgumentParser(prog="tidegate.embedded.keeper")
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--idle-s", type=float, default=5.0)
    parser.add_argument("--began-fd", type=int)
    given = parser.parse_args()
    # The starter must not be the parent: an ended keeper would be a zombie that looks alive.
    if os.fork():
        os._exit(0)
    keeper = Keeper(Folder(given.data_dir), given.idle_s)
    signal.signal(signal.SIGTERM, keeper.stop)
    signal.signal(signal.SIGCHLD, _wake_only)
    signal.signal(signal.SIGHUP, _wake_only)  # sent by a user; earlier versions ignore it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with woken_by_signals() as signals:
        keeper.run(given.began_fd, signals)
    sys.exit(0)


if __name__ == "__main__":
    main()
