"""A gateway as a newcomer starts it: `tidegate up` in an empty folder, without a key.

Models whose names have `spent` in them have a budget of nothing, which their first call pauses.

Invariant: leaving it ends all that it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tidegate.embedded.servers import free_port

READY_WITHIN_S = 120
STOPPED_WITHIN_S = 40
SPENT = "*spent*"


class NotReady(Exception):
    """It ended, or took too long; the message has the last of what it wrote."""


@contextmanager
def keyless_gateway(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """Its URL. settings: beside those that it has by default. Raises NotReady."""
    port, log = free_port(), folder / "gateway.log"
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    own = {"HOST": "127.0.0.1", "PORT": str(port), "DATA_DIR": str(folder / "data")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tidegate", "up"],
            cwd=folder,
            env={**kept, **own, **(settings or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while not _ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise NotReady(log.read_text(encoding="utf-8", errors="replace")[-1000:])
            time.sleep(0.1)
        _pause_budget(folder, kept | {"GATEWAY_URL": url, "DATA_DIR": str(folder / "data")})
        yield url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOPPED_WITHIN_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)


def _pause_budget(folder: Path, environment: dict[str, str]) -> None:
    arguments = ("--tokens", "0", "--model", SPENT, "--pause", "--doubt", "estimate")
    done = subprocess.run(
        [sys.executable, "-m", "tidegate", "budgets", "set", "spent", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotReady(done.stderr[-1000:])


def _ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/health/ready", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
