"""Blobs in the local folder: whole, durable, by age; and read on where a bucket's answer breaks."""

from __future__ import annotations

import asyncio
import atexit
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest

from tests.waiting import work_for
from tidegate.errors import NotFound, StoreUnavailable
from tidegate.store import blobs as blobs_module
from tidegate.store.blobs import Blobs, new_key

NOW = datetime(2025, 3, 9, 23, 59, tzinfo=UTC)


async def test_bytes_and_files_come_back_as_they_went_in(tmp_path: Path) -> None:
    blobs = Blobs.from_url("", tmp_path / "data")
    large = tmp_path / "large"
    large.write_bytes(os.urandom(3_000_000))
    small_key, large_key = new_key(NOW), new_key(NOW)
    await blobs.put(small_key, b"small")
    await blobs.put(large_key, large)
    assert await blobs.get(small_key) == b"small"
    pieces = [piece async for piece in blobs.stream(large_key)]
    assert len(pieces) > 1
    assert b"".join(pieces) == large.read_bytes()
    await blobs.put(new_key(NOW), b"")


async def test_what_is_not_there_is_not_found_and_may_be_deleted(tmp_path: Path) -> None:
    blobs = Blobs.from_url("", tmp_path)
    key, missing = new_key(NOW), new_key(NOW)
    await blobs.put(key, b"x")
    with pytest.raises(NotFound):
        await blobs.get(missing)
    with pytest.raises(NotFound):
        async for _ in blobs.stream(missing):
            pass
    await blobs.delete([missing, key])
    with pytest.raises(NotFound):
        await blobs.get(key)


async def test_keys_tell_their_day_and_are_listed_by_it(tmp_path: Path) -> None:
    blobs = Blobs.from_url("", tmp_path)
    keys = [new_key(NOW), new_key(NOW), new_key(NOW.replace(day=10))]
    for key in keys:
        await blobs.put(key, b"x")
    assert await blobs.days() == ["2025-03-09", "2025-03-10"]
    found = [key async for batch in blobs.keys_of("2025-03-09") for key in batch]
    assert sorted(found) == sorted(keys[:2])


async def test_a_write_is_on_the_disk_with_its_name_before_put_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = Blobs.from_url("", tmp_path)
    synced: set[str] = set()
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    key = new_key(NOW)
    await blobs.put(key, b"x")
    path = tmp_path / "blobs" / key
    assert {str(path), str(path.parent)} <= synced


async def test_a_store_that_cannot_write_is_unavailable(tmp_path: Path) -> None:
    blobs = Blobs.from_url("", tmp_path)
    (tmp_path / "blobs" / "2025-03-09").write_text("a file where the folder should be")
    with pytest.raises(StoreUnavailable):
        await blobs.put(new_key(NOW), b"x")


async def test_a_store_that_lists_and_cannot_write_stays_unavailable_and_says_why(
    tmp_path: Path,
) -> None:
    """As a full disk does. An image would be generated, paid for and lost."""
    blobs, now = Blobs.from_url("", tmp_path), datetime.now(UTC)
    await blobs.put(new_key(NOW), b"x")
    in_the_way = tmp_path / "blobs" / f"{now:%Y-%m-%d}"
    in_the_way.touch()
    for write in (partial(blobs.put, new_key(now), b"x"), blobs.ping):
        with pytest.raises(StoreUnavailable, match="the blob store failed: Not a directory"):
            await write()
        assert blobs.unavailable
    in_the_way.unlink()
    await blobs.ping()
    assert (blobs.unavailable, blobs.is_silent) == (False, False)
    assert [key async for batch in blobs.keys_of(in_the_way.name) for key in batch] == []


async def test_a_process_leaves_the_librarys_threads_time_to_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reports a result while the interpreter ends aborts the process, rarely."""
    at_the_end: list[tuple[object, ...]] = []
    blobs_module._leave_time_for_threads.cache_clear()
    monkeypatch.setattr(atexit, "register", lambda *given: at_the_end.append(given))
    for folder in ("one", "other"):
        made = Blobs.from_url("", tmp_path / folder)
        await made.put(new_key(datetime.now(UTC)), b"a")
        assert len(await made.days()) == 1
    assert at_the_end == [(time.sleep, 0.1)]


def test_the_folder_is_closed_to_others(tmp_path: Path) -> None:
    Blobs.from_url("", tmp_path)
    assert (tmp_path / "blobs").stat().st_mode & 0o077 == 0


_OBJECT = os.urandom(1_000_000)


@asynccontextmanager
async def at_bucket(
    monkeypatch: pytest.MonkeyPatch,
    answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[None]:
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        for name, value in (("ENDPOINT_URL", f"http://127.0.0.1:{port}"), ("REGION", "eu")):
            monkeypatch.setenv(f"AWS_{name}", value)
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            monkeypatch.setenv(f"AWS_{name}", "k")
        yield


@asynccontextmanager
async def breaking_bucket(
    monkeypatch: pytest.MonkeyPatch, most_bytes: int, ends_at: int = len(_OBJECT)
) -> AsyncIterator[list[int]]:
    """A bucket that closes each connection after `most_bytes` of its one object, and sends none
    from `ends_at` on; with where it was read from."""
    starts: list[int] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        ranged = re.search(rb"(?i)range: bytes=(\d+)-", head)
        start = int(ranged[1]) if ranged else 0
        starts.append(start)
        last = len(_OBJECT) - 1
        writer.write(b"HTTP/1.1 206 Partial Content\r\n" if ranged else b"HTTP/1.1 200 OK\r\n")
        writer.write(b"Content-Range: bytes %d-%d/%d\r\n" % (start, last, len(_OBJECT)))
        writer.write(b'Last-Modified: Sun, 09 Mar 2025 20:00:00 GMT\r\nETag: "e"\r\n')
        writer.write(b"Content-Length: %d\r\n\r\n" % (len(_OBJECT) - start))
        writer.write(_OBJECT[start : min(start + most_bytes, ends_at)])
        await writer.drain()
        writer.close()

    async with at_bucket(monkeypatch, answer):
        yield starts


async def test_an_answer_that_breaks_is_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one does after 30 s, whose reader is slower than that."""
    async with breaking_bucket(monkeypatch, 180_000) as starts:
        blobs = Blobs.from_url("s3://bucket", tmp_path)
        assert await blobs.get(new_key(NOW)) == _OBJECT
    assert len(starts) > 3, "more requests than the library makes by itself"


async def test_an_answer_that_brings_nothing_more_is_an_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with breaking_bucket(monkeypatch, 300_000, ends_at=500_000) as starts:
        with pytest.raises(StoreUnavailable):
            await Blobs.from_url("s3://bucket", tmp_path).get(new_key(NOW))
    assert max(starts) == 500_000


@asynccontextmanager
async def slow_bucket(
    monkeypatch: pytest.MonkeyPatch, part_ms: int
) -> AsyncIterator[dict[str, int]]:
    """A bucket behind a line that carries one part after the other, each in `part_ms`; with the
    objects that are whole, by their number of parts."""
    line, parts, objects = asyncio.Lock(), set[bytes](), dict[str, int]()
    created = (
        b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
    )
    ended = b'<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>'

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                await reader.readexactly(int(length[1]) if length else 0)
                method, target, _ = head.split(b" ", 2)
                body = created if b"uploads" in target else ended
                if method == b"PUT":
                    body = b""
                    async with line:
                        await work_for(part_ms / 1000)
                    parts.add(target)
                elif body is ended:
                    objects[target.partition(b"?")[0].decode()] = len(parts)
                writer.write(
                    b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: %d\r\n\r\n' % len(body)
                )
                writer.write(body)
        writer.close()

    async with at_bucket(monkeypatch, answer):
        yield objects


async def test_a_large_file_goes_over_a_line_that_takes_long_for_each_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of 1 MB a second, where a part of 5 MB takes 5 s and twelve together would take 60 s."""
    monkeypatch.setattr(blobs_module, "_PART_BYTES", 50_000)
    monkeypatch.setattr(blobs_module, "_TIMEOUT_MS", 300)
    large = tmp_path / "large"
    large.write_bytes(_OBJECT[: 12 * 50_000])
    async with slow_bucket(monkeypatch, 50) as objects:
        await Blobs.from_url("s3://bucket", tmp_path).put("2025-03-09/k", large)
    assert objects == {"/bucket/2025-03-09/k": 12}
