"""Parts of a measurement that run beside one another, each in a process with a fleet of its own.

Invariant: whatever ends a measurement in this process ends the processes of its parts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.environments import ROOT

Figures = dict[str, Any]
_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Part:
    """arguments: by which a process of `bench.limits` measures this part alone. measure: the same
    in this process."""

    arguments: Sequence[str]
    measure: Callable[[], Figures]


def run_beside(
    parts: Mapping[str, Part], beside: int, general: Sequence[str]
) -> Iterator[tuple[str, Figures]]:
    """Each part's figures as they come, `beside` parts at a time; one part alone in this process.

    general: arguments of all parts. A part whose process fails has `failed` for its figures.
    """
    if len(parts) == 1:
        for name, part in parts.items():
            yield name, part.measure()
        return
    left = list(parts.items())
    running: dict[str, subprocess.Popen[bytes]] = {}
    with TemporaryDirectory(prefix="bench-limits-") as folder:
        try:
            while left or running:
                while left and len(running) < beside:
                    name, part = left.pop(0)
                    running[name] = _started((*part.arguments, *general), _file(folder, name))
                time.sleep(_POLL_S)
                for name in [name for name, one in running.items() if one.poll() is not None]:
                    yield name, _figures(_file(folder, name), name, running.pop(name).returncode)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _file(folder: str, name: str) -> Path:
    return Path(folder) / f"{name.replace(' ', '-')}.json"


def _started(arguments: Sequence[str], file: Path) -> subprocess.Popen[bytes]:
    command = (sys.executable, "-m", "bench.limits", *arguments, "--json", str(file))
    # Ctrl-C is for this process, which then ends its parts.
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)


def _figures(file: Path, name: str, status: int) -> Figures:
    if not file.exists():
        return {"failed": f"its process ended with {status}"}
    figures: Figures = json.loads(file.read_text())[name]
    return figures
