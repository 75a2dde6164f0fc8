"""PostgreSQL servers of a test's own, as copies of two clusters that are made once in a run: an
empty one, and one whose databases `tidegate` and `TEMPLATE` have our schema.

Making a cluster takes most of a server's start, and the schema takes as long again; a copy is as
much the test's own. The processes that run tests beside one another share the two.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import asyncpg

from tests.watcher import SHARED
from tidegate.embedded.servers import PostgresServer

TEMPLATE = "template_tidegate"
# A crash of a server loses nothing without it: what the server wrote is the kernel's.
FAST = {"fsync": "off"}


def copied(
    folder: Path, settings: dict[str, str] | None = None, *, migrated: bool = False
) -> PostgresServer:
    """A server, not yet started, on a cluster of its own: in the folder, also as root."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    let_in(folder)
    server = PostgresServer(folder, settings=settings)
    server.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # With owner and modes, and where the file system can without copying blocks.
    source = _made(migrated=migrated) / "cluster"
    subprocess.run(["cp", "-a", "--reflink=auto", source, server.folder / "cluster"], check=True)
    return server


def let_in(folder: Path) -> None:
    """Let the account of PostgreSQL, which is not root, into a folder of the run: a cluster that it
    can't reach there lies on the disk of the system, where making one costs several times as much.
    """
    run = Path(tempfile.gettempdir()).resolve()
    for private in (folder, *folder.parents):
        if os.geteuid() or run not in private.parents:
            break
        private.chmod(private.stat().st_mode | 0o011)


@cache
def _made(*, migrated: bool) -> Path:
    """The folder of a stopped server, kept until the run ends."""
    folder = shared() / ("migrated" if migrated else "empty")
    folder.mkdir(parents=True, exist_ok=True)
    server = PostgresServer(folder, settings=FAST)
    done = folder / "done"
    with _locked(folder / "lock"):
        if not done.exists():
            server.start()
            if migrated:
                with ThreadPoolExecutor(1) as beside:  # the loop of a test may be running here
                    beside.submit(asyncio.run, _migrate(server)).result()
            server.stop()
            done.touch()
    return server.folder


async def _migrate(server: PostgresServer) -> None:
    from tidegate.store.database import migrate

    await migrate(server.url())
    connection = await asyncpg.connect(server.url("postgres"))
    try:
        await connection.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE tidegate")
    finally:
        await connection.close()


@cache
def shared() -> Path:
    """A folder of all processes of the run; where a run has none, one of this process."""
    temporary = Path(tempfile.gettempdir())
    if (temporary / "run").exists():  # tests/watched.py
        return temporary / SHARED
    _kept.append(tempfile.TemporaryDirectory(prefix="clusters-"))
    return Path(_kept[0].name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
