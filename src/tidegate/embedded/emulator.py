"""The built-in emulator of the provider, run as one more bundled server."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

from tidegate.embedded import process
from tidegate.embedded.process import Identity, Running, ServerFailed

_COMMAND = (sys.executable, "-m", "tidegate.providers.emulator")


class EmulatorServer:
    """One emulator process on loopback. It keeps nothing: a start is always a fresh one."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or process.free_port()
        self._process: Running | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def running(self) -> Running | None:
        """The process, alive or dead; None before the first start and after a stop."""
        return self._process

    def start(self, timeout_s: float = 20.0) -> None:
        """Start and wait until it accepts connections. Raises ServerFailed."""
        self.launch()
        self.await_ready(timeout_s)

    def launch(self) -> None:
        """Start the process without waiting for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._port_file.unlink(missing_ok=True)
        command = [
            *(*_COMMAND, "--host", "127.0.0.1", "--port", str(self.port)),
            *("--port-file", str(self._port_file)),
        ]
        self._process = process.spawn(command, self._log_path, None, self.folder)

    def await_ready(self, timeout_s: float = 20.0) -> None:
        """Wait until the launched or adopted process answers. Raises ServerFailed."""
        if self._process is None:
            raise ServerFailed("the emulator is not running")
        process.wait_ready(self._process, "the emulator", self._accepts, self._log_path, timeout_s)

    def adopt(self, identity: Identity) -> None:
        """Take over an emulator on this port whose starter is gone."""
        self._process = Running(identity)

    def stop(self) -> None:
        """Orderly end; what it is answering is cut off after 2 s."""
        if self._process is not None:
            self._process.send(signal.SIGCONT)
            self._process.stop(signal.SIGTERM, timeout_s=2.0)
            self._process = None

    @property
    def _log_path(self) -> Path:
        return self.folder / "emulator.log"

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
