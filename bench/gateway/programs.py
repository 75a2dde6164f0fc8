"""The load generator and the upstream: compiled, started and asked.

Invariant: neither outlives this process, whatever its end.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.environments import CACHE, EnvironmentMissing, program, run
from tidegate.embedded.servers import free_port

HERE = Path(__file__).parent
Figures = dict[str, Any]
_START_S = 5.0
# Beyond what a load says of itself: it always ends by then.
_MARGIN_S = 30.0


class LoadFailed(Exception):
    """The load generator did not do its work; the message says what it said."""


def compiled(name: str) -> Path:
    """`name`.c as a program. Raises EnvironmentMissing where there is no compiler."""
    return compiled_from([HERE / f"{name}.c", *sorted(HERE.glob("*.h"))])


def compiled_from(sources: Sequence[Path], *options: str) -> Path:
    """The first of `sources`, which includes the others. Raises EnvironmentMissing."""
    digest = hashlib.sha256(" ".join(options).encode())
    for source in sources:
        digest.update(source.read_bytes())
    found = CACHE / "gateway" / f"{sources[0].stem}-{digest.hexdigest()[:16]}"
    if not found.exists():
        compiler = program("gcc", "gcc libc6-dev")
        found.parent.mkdir(parents=True, exist_ok=True)
        warnings = ("-O2", "-Wall", "-Wextra", "-Werror")
        run([compiler, *warnings, *options, "-o", found, sources[0]], found.parent)
    return found


class Upstream:
    """The provider that all are measured in front of."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._process = subprocess.Popen([compiled("upstream"), str(self.port)])
        deadline_s = time.monotonic() + _START_S
        while True:
            try:
                self.stats()
                return self
            except OSError:
                if time.monotonic() > deadline_s:
                    self.__exit__(None, None, None)
                    raise EnvironmentMissing("the upstream does not answer") from None
                time.sleep(0.02)

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def behave(
        self, *, delay_ms: float = 0, chunks: int = 50, gap_ms: float = 1, status: int = 200
    ) -> None:
        """From now on, and count anew: an answer takes `delay_ms`, a stream has `chunks` events
        that are `gap_ms` apart; with another `status` than 200 every call is refused."""
        delay_us, gap_us = round(delay_ms * 1000), round(gap_ms * 1000)
        self._ask(f"/control?delay_us={delay_us}&chunks={chunks}&gap_us={gap_us}&status={status}")

    def stats(self) -> dict[str, int]:
        """What came since: `requests`, `answers`, `cut`, `in_flight`, `max_in_flight`."""
        return self._ask("/stats")

    def _ask(self, path: str) -> dict[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", path)
            found: dict[str, int] = json.loads(connection.getresponse().read())
            return found
        finally:
            connection.close()


class Load:
    """One run of the load generator, which `figures` waits for."""

    def __init__(
        self,
        port: int,
        path: str,
        body: Path,
        *,
        headers: tuple[str, ...] = (),
        tail: str = "",
        seconds: float = 5.0,
        drain: float = 15.0,
        **more: float,
    ) -> None:
        """more: as `load.c` says."""
        command = [str(compiled("load")), str(port), path, str(body)]
        command += ["--tail", tail, "--seconds", str(seconds), "--drain", str(drain)]
        for name, value in more.items():
            command += [f"--{name}", str(value)]
        for header in headers:
            command += ["--header", header]
        self._within_s = seconds + drain + _MARGIN_S
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def figures(self) -> Figures:
        """What it printed, once it has ended. Raises LoadFailed."""
        try:
            said, _ = self._process.communicate(timeout=self._within_s)
        except subprocess.TimeoutExpired:
            self.stop()
            raise LoadFailed("it did not end") from None
        if self._process.returncode:
            raise LoadFailed(f"ended with {self._process.returncode}: {said.strip()}")
        found: Figures = json.loads(said)
        return found

    def end(self) -> Figures:
        """Send nothing more, and return the figures once all answers have come. Raises
        LoadFailed."""
        self._process.send_signal(signal.SIGINT)
        return self.figures()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
