"""A run that something from outside has to end: detached servers live beneath it, and a process
that ends only when it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from threading import Event

from tidegate.embedded.lease import ensure

_DETACHES = """
import os, signal
if os.fork():
    os._exit(0)
os.setsid()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""


def test_goes_on(tmp_path: Path) -> None:
    """Say what runs, and go on."""
    services = os.environ["RUN_STARTS"].split()
    kept = ensure(tmp_path / "data", services, idle_s=600)  # type: ignore[arg-type]
    with tempfile.TemporaryFile(dir=tmp_path) as said:
        subprocess.run([sys.executable, "-c", _DETACHES], env={}, stdout=said, check=True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(os.environ["RUN_IS_AT"]).write_text(tempfile.gettempdir())
    Event().wait(600)
    kept.close()
