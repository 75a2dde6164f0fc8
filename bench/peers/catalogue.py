"""Which limiters are measured, in which versions, and their environments.

Every peer has a virtual environment of its own below `.bench/`, with exactly the pinned packages.
redis-py's peers get hiredis, and everybody gets uvloop, so that nobody is slow for the lack of it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".bench"
EVENT_LOOP = "uvloop==0.23.0"
REDIS = ("redis==8.1.0", "hiredis==3.5.0")


class EnvironmentMissing(Exception):
    """A peer's environment cannot be made on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One limiter. `bounds` says what it limits; a `floor` is measured but limits nothing."""

    name: str
    version: str
    adapter: str
    requirements: tuple[str, ...] = ()
    python: tuple[int, int] = (3, 11)
    threads: bool = False
    bounds: str = "calls"
    floor: bool = False

    @property
    def label(self) -> str:
        return f"{self.name} {self.version}".strip()

    @property
    def ours(self) -> bool:
        return self.adapter.startswith("ours")


OURS = Entry("tidegate", version("tidegate"), "ours")
LOCAL = Entry("no limiter, asyncio", "", "local", floor=True)
LOCAL_THREADS = Entry("no limiter, threads", "", "local_threads", threads=True, floor=True)
EVALSHA = Entry("bare EVALSHA, redis-py", version("redis"), "evalsha", floor=True)

PEERS = (
    Entry(
        "redis-semaphore-eval",
        "0.3.0",
        "redis_semaphore_eval",
        ("redis==3.5.3", "hiredis==3.5.0"),
        threads=True,
    ),
    Entry("self-limiters", "0.4.0", "self_limiters"),
    Entry("py-redis-semaphore", "0.2.0", "py_redis_semaphore", REDIS),
    Entry("concurrency-limit", "1.2.0", "concurrency_limit", REDIS, threads=True),
    Entry(
        "async-redis-rate-limiters",
        "0.1.4",
        "async_redis_rate_limiters",
        (*REDIS, "tenacity==9.2.1"),
    ),
    Entry(
        "orditect-core",
        "0.1.7",
        "orditect",
        (*REDIS, "orditect-protocol==0.1.7", "pydantic==2.14.4"),
        python=(3, 12),
    ),
)
RATE_PEERS = (
    Entry(
        "limits", "5.8.0", "limits_window", ("redis==7.4.1", "hiredis==3.5.0"), bounds="arrivals"
    ),
    Entry("pyrate-limiter", "4.5.1", "pyrate", REDIS, bounds="arrivals"),
)
ENTRIES = (OURS, *PEERS, LOCAL, LOCAL_THREADS, EVALSHA, *RATE_PEERS)


def interpreter(entry: Entry) -> Path:
    """The Python that has this limiter installed. Raises EnvironmentMissing."""
    if entry.ours or entry.floor:
        return Path(sys.executable)
    folder = CACHE / f"{entry.name}-{entry.version}"
    wanted = [f"{entry.name}=={entry.version}", EVENT_LOOP, *entry.requirements]
    digest = hashlib.sha256("\n".join([*wanted, str(entry.python)]).encode()).hexdigest()
    stamp, found = folder / "installed", folder / "bin" / "python"
    if not (stamp.exists() and stamp.read_text() == digest and found.exists()):
        _install(folder, found, wanted, entry.python)
        stamp.write_text(digest)
    return found


def _install(folder: Path, python: Path, wanted: list[str], oldest: tuple[int, int]) -> None:
    uv = Path(sys.executable).with_name("uv")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    base = _base_python(oldest)
    commands: tuple[list[str | Path], ...] = (
        [uv, "venv", "--quiet", "--no-config", "--python", base, folder],
        [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python, *wanted],
    )
    settings = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    settings.pop("VIRTUAL_ENV", None)
    for command in commands:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=settings, cwd=folder.parent
        )
        if done.returncode:
            raise EnvironmentMissing(done.stderr.strip().splitlines()[-1])


def _base_python(oldest: tuple[int, int]) -> str:
    """The oldest interpreter that will do, so that most peers run on the same one as we."""
    if sys.version_info[:2] >= oldest:
        return str(Path(sys.executable).resolve())
    for minor in range(oldest[1], 20):
        found = shutil.which(f"python3.{minor}")
        if found and _runs(found):
            return found
    raise EnvironmentMissing(f"needs Python {oldest[0]}.{oldest[1]} or newer, and there is none")


def _runs(python: str) -> bool:
    return not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode
