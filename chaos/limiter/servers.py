"""Valkey servers that can lose, restore and copy their memory, and whose clock can be set.

Invariant: none of them writes outside its folder, and none listens beyond the addresses given.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tidegate.embedded.servers import ValkeyServer, _binary, free_port

CLOCK_SOURCE = Path(__file__).with_name("clock.c")
APPEND_ONLY = ("--appendonly", "yes", "--appendfsync", "always")
REPLICATING = ("--repl-diskless-sync-delay", "0", "--min-replicas-max-lag", "1")


class Server(ValkeyServer):
    """A `valkey-server` with `options` of its command line, on loopback and `addresses`."""

    def __init__(
        self,
        folder: Path,
        options: Sequence[str] = (),
        *,
        addresses: Sequence[str] = (),
        clock: Clock | None = None,
    ) -> None:
        super().__init__(folder, port=free_port())
        self.options = list(options)
        self._addresses = addresses
        self._clock = clock

    def launch(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(str(_binary()), str(self._settings()), "--port", str(self.port)),
            *("--bind", "127.0.0.1", *self._addresses, "--dir", str(self.folder), "--save", ""),
            *("--appendonly", "no", "--maxmemory-policy", "noeviction"),
            *(("--protected-mode", "no") if self._addresses else ()),
            *self.options,
        ]
        if self._clock is not None:
            command = ["env", *self._clock.environment, *command]
        self.process.spawn(command)

    def url_at(self, address: str) -> str:
        return f"redis://{address}:{self.port}/0"

    # -- the append-only file

    @property
    def _append_only(self) -> Path:
        return self.folder / "appendonlydir"

    @property
    def _copy(self) -> Path:
        return self.folder / "older"

    def copy_append_only(self) -> None:
        """Keep what the file holds now, as a backup does."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._append_only, self._copy)

    def put_back_copy(self) -> None:
        """Put the older file where the next start reads it. The server must be down."""
        shutil.rmtree(self._append_only)
        shutil.copytree(self._copy, self._append_only)


class Clock:
    """The wall clock of a server that is started with it; `step_ms` sets it forward or back.

    A library put before libc's answers the server; so everything in it sees the step, expiry of
    keys included. Needs a C compiler.
    """

    def __init__(self, folder: Path) -> None:
        self._library = folder / "clock.so"
        self._offset = folder / "clock.offset"
        self._ahead_ms = 0
        self.step_ms(0)
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", self._library, CLOCK_SOURCE, "-ldl"],
            check=True,
            capture_output=True,
        )

    @staticmethod
    def missing() -> str:
        """Why this machine can't do it; empty where it can."""
        return "" if shutil.which("cc") else "there is no C compiler"

    @property
    def environment(self) -> list[str]:
        return [f"LD_PRELOAD={self._library}", f"CHAOS_CLOCK={self._offset}"]

    def step_ms(self, by_ms: int) -> None:
        """Set it forward, or back, from where it is now."""
        self._ahead_ms += by_ms
        # In place: the server has the file mapped.
        with self._offset.open("r+b" if self._offset.exists() else "w+b") as file:
            file.write(struct.pack("=q", self._ahead_ms * 1_000_000))
