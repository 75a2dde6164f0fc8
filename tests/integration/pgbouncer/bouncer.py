"""PgBouncer in transaction mode, in front of a PostgreSQL of the tests."""

from __future__ import annotations

import shutil
import signal
import socket
from pathlib import Path
from types import TracebackType
from typing import Self

from tidegate.embedded.servers import (
    PostgresServer,
    ServerProcess,
    free_port,
    server_account,
)

SERVERS = 3  # connections of the pooler to PostgreSQL: fewer than its clients open
_COMMAND = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"


class Bouncer:
    """One PgBouncer process; `settings` are lines of its configuration.

    All that is said neither here nor there is at PgBouncer's defaults.
    """

    def __init__(self, folder: Path, server: PostgresServer, *settings: str) -> None:
        self.port = free_port()
        self._folder = folder
        self._lines = [
            "[databases]",
            f"* = host=127.0.0.1 port={server.port}",
            "[pgbouncer]",
            "pool_mode = transaction",
            f"default_pool_size = {SERVERS}",
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =",
            "auth_type = trust\nauth_file = users.txt",
            *settings,
        ]
        # It refuses to run as root, and reads its files as the user that it runs as.
        account = server_account()
        self._process = ServerProcess("PgBouncer", folder / "log", self._answers, account)

    def url(self, database: str) -> str:
        return f"postgresql://tidegate@127.0.0.1:{self.port}/{database}"

    def __enter__(self) -> Self:
        self._folder.mkdir()
        (self._folder / "pgbouncer.ini").write_text("\n".join(self._lines) + "\n")
        (self._folder / "users.txt").write_text('"tidegate" ""\n')
        self._process.spawn([_COMMAND, "pgbouncer.ini"])
        self._process.await_ready(20)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.stop(signal.SIGQUIT)  # immediately, whatever is connected

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False
