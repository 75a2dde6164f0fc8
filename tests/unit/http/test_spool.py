"""Where an arriving file is kept."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.http.asgi import files_under
from tests.waiting import wait_until
from tidegate.errors import StoreUnavailable
from tidegate.http.body import Spool, remove_leftovers


async def test_a_small_file_never_touches_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, memory_bytes=10)
    await spool.write(b"0123456789")
    await spool.finish()
    assert (spool.path, spool.data, files_under(tmp_path)) == (None, b"0123456789", [])


async def test_a_large_file_is_whole_on_disk_for_its_owner_only_and_gone_after_close(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path / "new" / "folder", memory_bytes=10)
    for _ in range(7):
        await spool.write(b"abcdef")
    await spool.finish()
    assert spool.path is not None
    assert spool.path.read_bytes() == b"abcdef" * 7
    assert spool.path.stat().st_mode & 0o777 == 0o600
    await spool.close()
    await spool.close()
    assert files_under(tmp_path) == []


async def test_writing_does_not_block_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    fdopen = os.fdopen

    def noted(*args: object, **named: object) -> object:
        threads.append(threading.get_ident())
        return fdopen(*args, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "fdopen", noted)
    spool = Spool(tmp_path, memory_bytes=1)
    await spool.write(b"xx")
    await spool.close()
    assert threads != []
    assert threading.get_ident() not in threads


async def test_closed_while_a_cancelled_writer_is_in_its_thread_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go = threading.Event(), threading.Event()
    mkdir = Path.mkdir

    def slow_mkdir(folder: Path, **named: Any) -> None:
        begun.set()
        assert go.wait(10)
        mkdir(folder, **named)

    monkeypatch.setattr(Path, "mkdir", slow_mkdir)
    spool = Spool(tmp_path / "tmp", memory_bytes=1)
    writing = asyncio.create_task(spool.write(b"xx"))
    await wait_until(begun.is_set)
    writing.cancel()
    closing = asyncio.create_task(spool.close())
    asyncio.get_running_loop().call_later(0.05, go.set)
    await asyncio.gather(writing, closing, return_exceptions=True)
    assert files_under(tmp_path) == []


async def test_a_disk_that_refuses_is_said_to_be_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    spool = Spool(tmp_path / "file", memory_bytes=1)
    with pytest.raises(StoreUnavailable):
        await spool.write(b"xx")
    await spool.close()


async def test_what_a_killed_process_left_is_removed_and_a_running_upload_is_not(
    tmp_path: Path,
) -> None:
    spool = Spool(tmp_path, memory_bytes=1)
    await spool.write(b"xx")
    (old := tmp_path / "upload-old").write_bytes(b"x")
    (other := tmp_path / "not-ours").write_bytes(b"x")
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    assert remove_leftovers(tmp_path) == 1
    assert set(files_under(tmp_path)) == {spool.path, other}
    assert remove_leftovers(tmp_path / "absent") == 0
    await spool.close()
