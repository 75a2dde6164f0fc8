"""Start, watch and stop of one bundled server process, and the account that it runs under.

Invariant: nothing here opens a folder to other users that was closed to them before, and nothing
signals a process that merely got the number of one that has gone: a process is its number *and*
its start time.
"""

from __future__ import annotations

import os
import pwd
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

UNPRIVILEGED_USER = "nobody"
_POLL_S = 0.01
_LOG_MAX_BYTES = 5_000_000
_HAS_PROC = Path("/proc/self/stat").exists()
# Below every system's range of ephemeral ports: a client that keeps knocking at a server which is
# being restarted would else sooner or later be given that very port as its own, and connect to
# itself.
_KEPT_PORTS = range(20_000, 30_000)


class ServerFailed(RuntimeError):
    """A bundled server did not start or stop in time; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Account:
    """The user that a server runs as; None where this process is not root and keeps its own."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Identity:
    """One process for ever: its number and when it started, in the system's own words."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        return identify(self.pid) == self


class Running:
    """A server process that this one started, or adopted from one that is gone."""

    def __init__(self, identity: Identity, child: subprocess.Popen[bytes] | None = None) -> None:
        self.identity = identity
        self._child = child

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def alive(self) -> bool:
        if self._child is not None:
            return self._child.poll() is None
        return self.identity.alive

    def send(self, how: signal.Signals) -> None:
        """Send `how`, unless the process is gone."""
        if self.alive:
            try:
                os.kill(self.pid, how)
            except ProcessLookupError:
                return

    def wait(self, timeout_s: float) -> bool:
        """Whether the process has ended within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True

    def stop(self, how: signal.Signals, timeout_s: float = 20.0) -> None:
        """Signal the process and wait for its end; after `timeout_s` it is killed."""
        self.send(how)
        if not self.wait(timeout_s):
            self.send(signal.SIGKILL)
            self.wait(5)


def identify(pid: int) -> Identity | None:
    """The living process of that number; None where there is none, or only its zombie."""
    if _HAS_PROC:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The command, in parentheses, may hold anything; the fields after it are plain.
        state, *fields = stat.rpartition(")")[2].split()
        started = fields[18]
    else:
        shown = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, check=False
        )
        state, _, started = shown.stdout.decode().strip().partition(" ")
    return Identity(pid, started.strip()) if state and state[0] not in "ZX" else None


def exists(pid: int) -> bool:
    """Whether anything has that number, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def command_of(pid: int) -> str:
    """The command line of a process, its words joined by blanks; empty where it is gone."""
    if _HAS_PROC:
        try:
            raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return raw.replace(b"\0", b" ").decode(errors="replace").strip()
    shown = subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, check=False
    )
    return shown.stdout.decode(errors="replace").strip()


def server_account() -> Account | None:
    """PostgreSQL refuses to run as root, so root hands its servers to an unprivileged user."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(UNPRIVILEGED_USER)
    return Account(entry.pw_uid, entry.pw_gid)


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def port_to_keep() -> int:
    """A free loopback port for a server that shall find it again after a restart."""
    for _ in range(100):
        port = random.choice(_KEPT_PORTS)
        if is_free(port):
            return port
    return free_port()


def spawn(command: Sequence[str], log_path: Path, account: Account | None, cwd: Path) -> Running:
    """Start `command` in a session of its own, its output appended to `log_path`."""
    if log_path.exists() and log_path.stat().st_size > _LOG_MAX_BYTES:
        log_path.rename(log_path.with_suffix(".log.old"))
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=cwd,
            start_new_session=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
    # A child that ended already is a zombie of ours, which `identify` takes for gone.
    return Running(identify(child.pid) or Identity(child.pid, ""), child)


def wait_ready(
    server: Running, name: str, ready: Callable[[], bool], log_path: Path, timeout_s: float
) -> None:
    """Return when `ready()` is true; raise ServerFailed when the process ends or time runs out.

    A process that is not ready in time is killed.
    """
    deadline = time.monotonic() + timeout_s
    while not ready():
        alive = server.alive
        if alive and time.monotonic() <= deadline:
            time.sleep(_POLL_S)
            continue
        server.stop(signal.SIGKILL)
        why = f"was not ready within {timeout_s:g} s" if alive else "ended while starting"
        tail = log_path.read_text(errors="replace")[-800:].strip() if log_path.exists() else ""
        raise ServerFailed(f"{name} {why} (log: {log_path}): {tail}")
