"""Start and stop of one bundled server process, and the account that it runs under.

Invariant: nothing here opens a folder to other users that was closed to them before.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

UNPRIVILEGED_USER = "nobody"
_POLL_S = 0.01


class ServerFailed(RuntimeError):
    """A bundled server did not start or stop in time; the message holds the end of its log."""


@dataclass(frozen=True, slots=True)
class Account:
    """The user that a server runs as; None where this process is not root and keeps its own."""

    uid: int
    gid: int


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


def spawn(
    command: Sequence[str], log_path: Path, account: Account | None, cwd: Path
) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own, its output appended to `log_path`."""
    with log_path.open("ab") as log:
        return subprocess.Popen(
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


def wait_ready(
    process: subprocess.Popen[bytes], ready: Callable[[], bool], log_path: Path, timeout_s: float
) -> None:
    """Return when `ready()` is true; raise ServerFailed when the process ends or time runs out."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log_path.read_text(errors="replace")[-800:] if log_path.exists() else ""
            raise ServerFailed(f"{process.args!r} did not become ready: {tail}")
        time.sleep(_POLL_S)


def stop(process: subprocess.Popen[bytes], how: signal.Signals, timeout_s: float = 20.0) -> None:
    """Signal the process and reap it; after `timeout_s` it is killed."""
    if process.poll() is None:
        process.send_signal(how)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
