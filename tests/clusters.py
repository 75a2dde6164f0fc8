"""PostgreSQL servers of a test's own, from one cluster that is made once in a test process.

Making a cluster takes most of a server's start; a copy is as empty and as much the test's own.
"""

from __future__ import annotations

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from tidegate.embedded.postgres import PostgresServer


@cache
def _made() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """The folder that leads to it, kept until this process ends, and the stopped server's own."""
    folder = tempfile.TemporaryDirectory(prefix="cluster-")
    server = PostgresServer(Path(folder.name) / "postgres")
    server.start()
    server.stop()
    return folder, server.folder


def copied(folder: Path, settings: dict[str, str] | None = None) -> PostgresServer:
    """A server, not yet started, on a cluster of its own."""
    server = PostgresServer(folder, settings=settings)
    server.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # With owner and modes, and where the file system can without copying blocks.
    source = _made()[1] / "cluster"
    subprocess.run(["cp", "-a", "--reflink=auto", source, server.folder / "cluster"], check=True)
    return server
