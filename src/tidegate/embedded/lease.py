"""Lease on the bundled servers of a DATA_DIR, and the files by which users and keeper coordinate.

`ensure(data_dir, {"valkey", "postgres"})` starts the servers if needed, and returns a
`ServersLease`. Files:

    users.lock             held shared by every user; exclusively by a keeper that stops
    keeper.lock            held exclusively by the one keeper
    start.lock             held while a user starts a keeper
    wanted/NAME            a user requests this server
    hurry                  the last user requests an immediate stop
    state.json             keeper, servers, ports and sockets; contains passwords
    password               of PostgreSQL's superuser, for the keeper only
    password.application, password.valkey    for the processes of Tidegate

Invariants: servers run at least as long as the lease or any process that inherited its descriptor;
the kernel releases the lock, so that `kill -9` has no special effect; every file is readable by its
owner only; `state.json` is replaced as a whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Self

from tidegate.embedded.servers import ProcessIdentity, ServerFailed, recovers, write_private
from tidegate.errors import ConfigError

ServiceName = Literal["valkey", "postgres", "emulator"]
PasswordName = Literal["password", "password.application", "password.valkey"]
SERVICES: tuple[ServiceName, ...] = ("valkey", "postgres", "emulator")
_FOLDER_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class ServiceState:
    """The state of a server when the keeper last checked it."""

    identity: ProcessIdentity
    url: str
    ready: bool


@dataclass(slots=True)
class KeeperState:
    """The state that the keeper publishes. `failures` counts failed starts, with the last
    reason."""

    keeper: ProcessIdentity | None = None
    services: dict[str, ServiceState] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    sockets: dict[str, str] = field(default_factory=dict)
    failures: dict[str, tuple[int, str]] = field(default_factory=dict)


class Folder:
    """The folder `embedded` in a `DATA_DIR`."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.resolve()
        self.path = self.data_dir / "embedded"

    def create(self) -> None:
        """Create the folder if it is missing. Raises OSError."""
        self.data_dir.mkdir(parents=True, exist_ok=True)
        # Root's PostgreSQL runs as another user, which must be able to enter; files stay private.
        self.path.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, exist_ok=True)
        (self.path / "wanted").mkdir(mode=0o700, exist_ok=True)

    @property
    def exists(self) -> bool:
        return (self.path / "wanted").is_dir()

    @property
    def keeper_log(self) -> Path:
        return self.path / "keeper.log"

    def open_lock(self, name: Literal["users", "keeper", "start"]) -> int:
        """Return a descriptor of the lock file, which children inherit only if it is passed to
        them."""
        return os.open(self.path / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)

    def owns_lock(self, descriptor: int, name: Literal["users", "keeper", "start"]) -> bool:
        """Return whether the lock file is still the one that was opened, not a new one of that
        name."""
        try:
            return os.path.samestat(os.stat(self.path / f"{name}.lock"), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def want(self, service: ServiceName) -> None:
        (self.path / "wanted" / service).touch(mode=0o600)

    def wanted(self) -> list[ServiceName]:
        return [name for name in SERVICES if (self.path / "wanted" / name).exists()]

    def want_nothing(self) -> None:
        for name in SERVICES:
            (self.path / "wanted" / name).unlink(missing_ok=True)

    @property
    def hurry(self) -> Path:
        return self.path / "hurry"

    def wake_keeper(self) -> None:
        """Have the keeper check `wanted` and `hurry` now; otherwise it does within a second."""
        keeper = self.read().keeper
        if keeper is not None and keeper.alive and keeper.pid != os.getpid():
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.kill(keeper.pid, signal.SIGHUP)

    def password(self, name: PasswordName) -> str:
        """Return a password, which is created on first use. Only for a keeper, before its
        threads."""
        path = self.path / name
        if not path.exists():
            write_private(path, secrets.token_hex(16))
        return path.read_text(encoding="ascii").strip()

    def read(self) -> KeeperState:
        """Return the published state; an empty one if there is none."""
        try:
            raw = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return KeeperState()
        return KeeperState(
            keeper=ProcessIdentity(**raw["keeper"]) if raw["keeper"] else None,
            services={
                name: ServiceState(ProcessIdentity(**found.pop("identity")), **found)
                for name, found in raw["services"].items()
            },
            ports=raw["ports"],
            sockets=raw.get("sockets", {}),  # version 0.1.0 had none
            failures={name: (count, why) for name, (count, why) in raw["failures"].items()},
        )

    def write(self, state: KeeperState) -> None:
        """Publish the state. Raises FileNotFoundError if the folder was removed."""
        fresh = self.path / "state.json.new"
        write_private(fresh, json.dumps(asdict(state), indent=1))
        fresh.rename(self.path / "state.json")


def try_lock(descriptor: int, how: int) -> bool:
    """Take a lock (`fcntl.LOCK_SH` or `LOCK_EX`) if it is free; return whether it was taken."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_until(descriptor: int, how: int, deadline: float) -> bool:
    """Take a lock before the deadline (`time.monotonic()`), or return False."""
    while not try_lock(descriptor, how):
        if time.monotonic() > deadline:
            return False
        time.sleep(_FOLDER_POLL_S)
    return True


@contextmanager
def opened(descriptor: int) -> Iterator[int]:
    """Close the descriptor, and so release its lock, at the end of the block."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


_POLL_S = 0.02
_WATCH_S = 1.0
_CHECK_S = 5.0  # interval of checks of a recovering server
_TRIES = 3
_VARIABLES = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
# TIDEGATE_TEST_: a mark by which a test finds the processes that it has started.
_PREFIXES = ("LC_", "PYTHON", "TIDEGATE_EMULATOR_", "TIDEGATE_TEST_")


class ServersLease:
    """Keeps the servers running until `close`; starts another keeper if the keeper dies."""

    def __init__(self, folder: Folder, descriptor: int, urls: Mapping[str, str], idle_s: float):
        self._folder = folder
        self.idle_s = idle_s
        self._descriptor = descriptor
        self._urls = urls
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="keeper-watch", daemon=True)
        self._watcher.start()

    @property
    def database_url(self) -> str | None:
        return self._urls.get("postgres")

    @property
    def redis_url(self) -> str | None:
        return self._urls.get("valkey")

    @property
    def emulator_url(self) -> str | None:
        return self._urls.get("emulator")

    @property
    def descriptor(self) -> int:
        """Return the descriptor that children inherit, as `pass_fds`, to keep the servers running
        too."""
        return self._descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, timeout_s: float = 25.0) -> None:
        """Release the lease. If this was the last user, stop the servers now and wait for their
        end.

        Raises ServerFailed if they cannot be stopped because their keeper does not start.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        self._watcher.join()
        os.close(self._descriptor)
        # Only now: a `hurry` that the keeper finds while the lock is held counts as outdated.
        with contextlib.suppress(FileNotFoundError):
            self._folder.hurry.touch(mode=0o600)
        self._folder.wake_keeper()
        deadline = time.monotonic() + timeout_s
        while self._folder.hurry.exists() and time.monotonic() < deadline:
            keeper = self._folder.read().keeper
            if keeper is None:
                self._folder.hurry.unlink(missing_ok=True)
            elif not keeper.alive:
                # It was killed and left servers running, which another keeper must stop.
                _summon(self._folder, self.idle_s, deadline)
            time.sleep(_POLL_S)

    def leave_watch(self) -> None:
        """Stop watching the keeper, before another program replaces this process and keeps the
        lease."""
        self._closed.set()
        self._watcher.join()

    def _watch(self) -> None:
        from tidegate.telemetry import logging as telemetry
        from tidegate.telemetry.logging import Log

        logger = telemetry.get_logger()
        while not self._closed.wait(_WATCH_S):
            keeper = self._folder.read().keeper
            if keeper is not None and keeper.alive:
                continue
            if not self._folder.exists:
                logger.error(Log.EMBEDDED_STARTED, problem="DATA_DIR was removed")
                return
            try:
                _summon(self._folder, self.idle_s, time.monotonic() + 10.0)
            except (ServerFailed, OSError) as failed:
                logger.error(Log.EMBEDDED_STARTED, problem=str(failed))
            else:
                logger.warning(Log.EMBEDDED_STARTED, reason="the keeper had died")


def ensure(
    data_dir: Path,
    services: Collection[ServiceName],
    *,
    timeout_s: float = 30.0,
    idle_s: float = 5.0,
) -> ServersLease:
    """Start these servers in `data_dir`, unless this or another process has done so.

    Blocks until all are ready. Any number of processes may call this concurrently. Raises
    ServerFailed after `timeout_s` seconds, unless PostgreSQL is recovering then, or as soon as a
    server has failed to start three times, and ConfigError for a folder that cannot be used.
    """
    folder = Folder(data_dir)
    deadline = time.monotonic() + timeout_s
    try:
        folder.create()
        descriptor = folder.open_lock("users")
    except OSError as refused:
        why = f"cannot be used: {refused.strerror}"
        raise ConfigError("DATA_DIR", str(folder.data_dir), why) from refused
    try:
        if not lock_until(descriptor, fcntl.LOCK_SH, deadline):
            raise ServerFailed(f"the servers in {folder.path} do not stop")
        for name in services:
            folder.want(name)
        folder.wake_keeper()
        urls = _await_ready(folder, services, idle_s, deadline)
        return ServersLease(folder, descriptor, urls, idle_s)
    except BaseException:  # for an interrupt too: the lock would keep the servers running
        os.close(descriptor)
        raise


def _await_ready(
    folder: Folder, services: Collection[ServiceName], idle_s: float, deadline: float
) -> dict[str, str]:
    failed_before = {name: count for name, (count, _) in folder.read().failures.items()}
    while True:
        state = folder.read()
        if state.keeper is None or not state.keeper.alive:
            _summon(folder, idle_s, deadline)
            continue
        urls = {name: _url_when_ready(state, name) for name in services}
        ready: dict[str, str] = {name: url for name, url in urls.items() if url is not None}
        if len(ready) == len(urls):
            return ready
        for name in services:
            count, why = state.failures.get(name, (0, ""))
            if count - failed_before.get(name, 0) >= _TRIES:
                raise ServerFailed(why)
        if time.monotonic() > deadline:
            if not _recovers(state, services):
                late = ", ".join(sorted(set(urls) - set(ready)))
                raise ServerFailed(f"not ready in time: {late} (see {folder.keeper_log})")
            deadline = time.monotonic() + _CHECK_S
        time.sleep(_POLL_S)


def _recovers(state: KeeperState, services: Collection[ServiceName]) -> bool:
    """Return whether PostgreSQL replays its log, which is not bounded in time."""
    found = state.services.get("postgres")
    is_there = "postgres" in services and found is not None and found.identity.alive
    return is_there and recovers(state.ports["postgres"])


def _url_when_ready(state: KeeperState, name: ServiceName) -> str | None:
    found = state.services.get(name)
    return found.url if found and found.ready and found.identity.alive else None


def _summon(folder: Folder, idle_s: float, deadline: float) -> None:
    """Start a keeper unless one is in charge, and return when one is. Raises ServerFailed."""
    with opened(folder.open_lock("start")) as start:
        if not lock_until(start, fcntl.LOCK_EX, deadline):
            raise ServerFailed(f"another process is starting the servers in {folder.path}")
        keeper = folder.read().keeper
        if keeper is not None and keeper.alive:
            return
        read_end, write_end = os.pipe()
        with opened(read_end), folder.keeper_log.open("ab") as log:
            with opened(write_end):
                folder.keeper_log.chmod(0o600)
                command = [
                    *(sys.executable, "-P", "-m", "tidegate.embedded.keeper", str(folder.data_dir)),
                    *("--idle-s", str(idle_s), "--began-fd", str(write_end)),
                ]
                subprocess.run(
                    command,
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=_environment(),
                    pass_fds=[write_end],
                    start_new_session=True,
                )
            readable, _, _ = select.select(
                [read_end], [], [], max(0.0, deadline - time.monotonic())
            )
            if not readable or os.read(read_end, 1) != b"1":
                tail = folder.keeper_log.read_text(errors="replace")[-800:].strip()
                raise ServerFailed(f"the servers' keeper did not start: {tail}")


def _environment() -> dict[str, str]:
    """Return the environment of the keeper and its servers. An allow-list, since any other variable
    may contain the key of an upstream, and other users can read a server's environment: under root
    the servers run as a user that other daemons share."""
    return {
        name: value
        for name, value in os.environ.items()
        if name in _VARIABLES or name.startswith(_PREFIXES)
    }


__all__ = ["ServerFailed", "ServersLease", "ServiceName", "ensure"]
