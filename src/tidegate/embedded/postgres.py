"""The bundled PostgreSQL: a cluster in a folder, started on loopback.

PostgreSQL refuses to run as root. Root therefore runs it as an unprivileged user, from a copy of
its binaries in a place that this user can read, with the cluster in a folder that it owns. When
the wanted folder lies under one that the user may not enter (a home of mode 0700), the cluster is
put in a place of the system instead, and the wanted folder says where: no parent is ever opened.

Invariant: never two servers on one cluster. `postmaster.pid` is removed only when the process
that it names exists and is not a server of this cluster; else PostgreSQL's own checks decide.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tidegate.embedded import place, process
from tidegate.embedded.process import Identity, Running, ServerFailed

_SUPERUSER = "tidegate"
_APPLICATION = "tidegate_app"
_APPLICATION_SQL = Path(__file__).with_name("application.sql")
# In the cluster, so that it goes where the cluster goes.
_HAS_APPLICATION = "tidegate_app.created"
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    # No socket file: a predictable name in a folder that all may write to is a trap for root.
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "logging_collector": "off",
    "log_min_messages": "warning",
}


@dataclass(frozen=True, slots=True)
class Postmaster:
    """A server that runs on a cluster, as its `postmaster.pid` tells."""

    identity: Identity
    port: int


class PostgresServer:
    """One PostgreSQL cluster and its server process.

    `folder` will hold the cluster (or lead to it); `settings` override the server's defaults.
    With a `password` (fixed when the cluster is made) clients need it to connect. With an
    `application_password` too, `url` names a role that owns the database `tidegate` and is no
    superuser, so that its password opens neither files nor programs of the machine.
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        settings: dict[str, str] | None = None,
        password: str | None = None,
        application_password: str | None = None,
    ) -> None:
        self.folder, self._account = place.for_cluster(folder.resolve())
        self.port = port or process.free_port()
        self._settings = _SETTINGS | (settings or {})
        self._password = password
        self._application_password = application_password
        self._process: Running | None = None

    def url(self, database: str = "tidegate") -> str:
        access = f"{_SUPERUSER}:{self._password}" if self._password else _SUPERUSER
        if self._application_password:
            access = f"{_APPLICATION}:{self._application_password}"
        return f"postgresql://{access}@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerFailed("PostgreSQL is not running")
        return self._process.pid

    @property
    def running(self) -> Running | None:
        """The process, alive or dead; None before the first start and after a stop."""
        return self._process

    def start(self, timeout_s: float = 30.0) -> None:
        """Create the cluster where there is none, start it, make the database `tidegate`.

        A server that already runs on the cluster is stopped first. Raises ServerFailed.
        """
        self.launch()
        self.await_ready(timeout_s)

    def launch(self) -> None:
        """As `start`, without waiting until the server accepts connections."""
        binaries = place.binaries(self._account)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        place.give(self.folder, self._account)
        if not (self._cluster / "PG_VERSION").exists():
            self._create(binaries)
        self._refuse_another_version(binaries)
        other = self.postmaster()
        if other is not None:
            Running(other.identity).stop(signal.SIGINT)
        self._create_application(binaries)
        options = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [
            *(str(binaries / "postgres"), "-D", str(self._cluster), "-p", str(self.port)),
            *options,
        ]
        self._process = process.spawn(command, self._log_path, self._account, self.folder)

    def await_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until the launched or adopted server accepts connections. Raises ServerFailed."""
        if self._process is None:
            raise ServerFailed("PostgreSQL is not running")
        process.wait_ready(self._process, "PostgreSQL", self._accepts, self._log_path, timeout_s)

    def adopt(self, identity: Identity) -> None:
        """Take over a server on this cluster and port whose starter is gone."""
        self._process = Running(identity)

    def postmaster(self) -> Postmaster | None:
        """The server that runs on this cluster now, whoever started it.

        The file of one that has gone is removed when its number belongs to another program now,
        or still to its zombie: PostgreSQL would take either for a server and refuse to start.
        """
        path = self._cluster / "postmaster.pid"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            pid, port = int(lines[0]), int(lines[3])
        except (FileNotFoundError, ValueError, IndexError):
            return None
        found = process.identify(pid)
        if found is not None and str(self._cluster) in process.command_of(pid):
            return Postmaster(found, port)
        if process.exists(pid):
            path.unlink(missing_ok=True)
        return None

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
        os.kill(self.pid, how)
        for pid in pids:
            with suppress(ProcessLookupError):  # it has ended since the file was read
                os.kill(pid, how)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send(signal.SIGCONT)
            self._process.stop(how)
            self._process = None

    @property
    def _cluster(self) -> Path:
        return self.folder / "cluster"

    @property
    def _log_path(self) -> Path:
        return self.folder / "postgres.log"

    def _refuse_another_version(self, binaries: Path) -> None:
        """Raises ServerFailed where another major version made the cluster; it stays as it is."""
        made = (self._cluster / "PG_VERSION").read_text(encoding="utf-8").strip()
        said = subprocess.run(
            [str(binaries / "postgres"), "--version"], capture_output=True, text=True, check=True
        ).stdout
        ours = said.split()[2].partition(".")[0]  # "postgres (PostgreSQL) 18.6"
        if made != ours:
            raise ServerFailed(
                f"{self._cluster} was made by PostgreSQL {made}, and the bundled one is {ours}; "
                'nothing was changed. docs/operating.md, "A data folder of an older PostgreSQL", '
                "says how to take the data along"
            )

    def _create(self, binaries: Path) -> None:
        # Written beside and renamed, so that a start cut short leaves no half cluster behind.
        fresh = self.folder / "cluster.new"
        shutil.rmtree(fresh, ignore_errors=True)
        command = [
            *(str(binaries / "initdb"), "-D", str(fresh), "-U", _SUPERUSER, "-E", "UTF8"),
            *("--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"),
            *("--no-sync", "--no-instructions"),
        ]
        if self._password is None:
            self._run([*command, "-A", "trust"])
        else:
            secret = self.folder / "password.new"
            place.write_private(secret, self._password, self._account)
            # One round of hashing is enough for a password that is all randomness.
            scram = ["-A", "scram-sha-256", "-c", "scram_iterations=1"]
            self._run([*command, *scram, f"--pwfile={secret}"])
            secret.unlink()
        single = [str(binaries / "postgres"), "--single", "-D", str(fresh), "postgres"]
        statements = "CREATE DATABASE tidegate;\n"
        if self._application_password is not None:
            password = self._application_password
            statements = (
                f"CREATE ROLE {_APPLICATION} LOGIN PASSWORD '{password}';\n"
                f"CREATE DATABASE tidegate OWNER {_APPLICATION};\n"
            )
            place.write_private(fresh / _HAS_APPLICATION, "", self._account)
        self._run(single, statements.encode())
        fresh.rename(self._cluster)

    def _create_application(self, binaries: Path) -> None:
        """Make the application's role in a cluster of an earlier version, which has none."""
        created = self._cluster / _HAS_APPLICATION
        if self._application_password is None or created.exists():
            return
        statement = _APPLICATION_SQL.read_text(encoding="utf-8")
        single = [str(binaries / "postgres"), "--single", "-j", "-D", str(self._cluster)]
        given = statement.format(password=self._application_password).encode()
        said = self._run([*single, "tidegate"], given)
        if "ERROR:" in said:  # single-user mode goes on after one, and ends well
            raise ServerFailed(f"{_APPLICATION} could not be made in {self._cluster}: {said}")
        place.write_private(created, "", self._account)

    def _run(self, command: list[str], given: bytes = b"") -> str:
        """Run a program of PostgreSQL's; the end of what it wrote to its standard error."""
        account = self._account
        done = subprocess.run(
            command,
            input=given,
            cwd=self.folder,
            capture_output=True,
            check=False,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
        )
        said = done.stderr.decode(errors="replace")[-800:].strip()
        if done.returncode != 0:
            raise ServerFailed(f"{Path(command[0]).name} failed: {said}")
        return said

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
