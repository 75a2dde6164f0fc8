"""`tidegate backup` and `tidegate restore`, by the lines of docs/operating.md, with the bundled
server: also the way to a newer one."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from tests.integration.embedded.traces import Traces
from tests.markdown import blocks
from tests.product import environment
from tidegate.embedded.lease import ensure
from tidegate.store.database import HEAD, migrate

pytestmark = pytest.mark.slow


def _lines(words: str) -> str:
    (text,) = [block.text for block in blocks("docs/operating.md") if words in block.text]
    return text


async def _typed(folder: Path, lines: str) -> tuple[int, str]:
    """In `folder`, whose `data` is the product's."""
    here = environment(folder / "data", 1)
    done = await asyncio.to_thread(
        subprocess.run,
        ["bash", "-euo", "pipefail", "-c", lines],
        cwd=folder,
        env=here | {"PATH": f"{Path(sys.executable).parent}:{here['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


async def test_the_record_and_its_files_are_taken_along(
    tmp_path: Path, data_dir: Path, traces: Traces
) -> None:
    with ensure(data_dir, ["postgres"], idle_s=0.3) as lease:
        assert lease.database_url is not None
        await migrate(lease.database_url)
        connection = await asyncpg.connect(lease.database_url)
        await connection.execute("INSERT INTO tenants (id) VALUES ('acme')")
        await connection.close()
    (data_dir / "blobs").mkdir()
    (data_dir / "blobs" / "a").write_text("a file")
    backup = _lines("tidegate backup tidegate-")
    partial = f"{backup.split()[2]}.partial"  # as a run that was cut short could leave one
    code, said = await _typed(tmp_path, f"umask 0\ntouch {partial}\n{backup}")
    assert (code, said.startswith("wrote 0.")) == (0, True), said
    restore = _lines("tidegate restore tidegate-")
    code, said = await _typed(tmp_path, restore)
    assert (code, "names a database that holds data" in said) == (2, True), said
    os.rename(data_dir, tmp_path / "lost")
    (data_dir / "blobs").mkdir(parents=True)  # as a process that has begun leaves it
    (dump,) = [name for name in os.listdir(tmp_path) if ".dump" in name]
    assert stat.S_IMODE((tmp_path / dump).stat().st_mode) == 0o600, "all prompts and answers"
    whole = (tmp_path / dump).read_bytes()
    for part in (whole[: len(whole) // 2], whole[:-200], b"no dump"):
        (tmp_path / "part").write_bytes(part)
        code, said = await _typed(tmp_path, "tidegate restore part")
        assert (code, "part must be a whole dump" in said) == (2, True), said
    code, said = await _typed(tmp_path, restore)
    assert (code, said.startswith("restored")) == (0, True), said
    assert (data_dir / "blobs" / "a").read_text() == "a file"
    with ensure(data_dir, ["postgres"], idle_s=0.3) as lease:
        connection = await asyncpg.connect(lease.database_url)
        assert await connection.fetchval("SELECT version_num FROM alembic_version") == HEAD
        assert await connection.fetchval("SELECT count(*) FROM tenants WHERE id = 'acme'") == 1
        await connection.close()
    code, said = await _typed(tmp_path, f"tidegate backup {dump}")
    assert (code, "nothing is overwritten" in said) == (2, True), said
    code, said = await _typed(tmp_path, "tidegate backup nowhere/record.dump")
    assert (code, "must be in an existing, writable folder" in said) == (2, True), said
