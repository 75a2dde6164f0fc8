"""Which limiters are measured, in which versions, and their environments.

Every peer has a virtual environment of its own below `.bench/`, with exactly the pinned packages.
redis-py's peers get hiredis, and everybody gets uvloop, so that nobody is slow for the lack of it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from bench.environments import ours_python, python_with

EVENT_LOOP = "uvloop==0.23.0"
REDIS = ("redis==8.1.0", "hiredis==3.5.0")


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
        ("redis==3.5.3", "hiredis==3.5.0", "setuptools==80.9.0"),  # distutils, which is imported
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
    if entry.ours:
        return ours_python()
    if entry.floor:
        return Path(sys.executable)
    wanted = [f"{entry.name}=={entry.version}", EVENT_LOOP, *entry.requirements]
    return python_with(f"{entry.name}-{entry.version}", wanted, entry.python)
