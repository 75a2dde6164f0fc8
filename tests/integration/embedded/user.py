"""A user of bundled servers in a process of its own, to be killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import json, sys
from pathlib import Path
from tidegate.embedded.lease import ensure
lease = ensure(Path(sys.argv[1]), sys.argv[3:], idle_s=float(sys.argv[2]))
urls = {"postgres": lease.database_url, "valkey": lease.redis_url, "emulator": lease.emulator_url}
print(json.dumps(urls), flush=True)
sys.stdin.read()
lease.close()
"""


class User:
    """Starts at once; `urls` waits until its servers are ready."""

    def __init__(self, data_dir: Path, *services: str, idle_s: float = 0.3) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(data_dir), str(idle_s), *services],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._urls: dict[str, str] | None = None

    @property
    def urls(self) -> dict[str, str]:
        if self._urls is None:
            assert self._child.stdout is not None
            line = self._child.stdout.readline()
            assert line, "the user ended before its servers were ready"
            self._urls = json.loads(line)
        return self._urls

    def kill(self) -> None:
        """As `kill -9`."""
        self._child.kill()
        self._end()

    def leave(self) -> int:
        """Go in order; returns the exit code."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        return self._end()

    def _end(self) -> int:
        code = self._child.wait(30)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()
        return code
