"""The spill on disk, without a database."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from tidegate.errors import StoreUnavailable
from tidegate.store.records import Json
from tidegate.store.spill import CallJournal, Spill


async def replayed(spill: Spill) -> list[Json]:
    entries: list[Json] = []

    async def take(chunk: list[Json]) -> None:
        entries.extend(chunk)

    await spill.replay(take)
    return entries


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


async def test_entries_come_back_in_order_and_once(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 1_000_000)
    for number in range(450):
        await spill.keep({"n": number})
    assert [entry["n"] for entry in await replayed(spill)] == list(range(450))
    assert await replayed(spill) == []
    assert spill.used_bytes == 0
    assert os.listdir(tmp_path) == []
    await spill.keep({"n": "after"})
    assert await replayed(spill) == [{"n": "after"}]


async def test_bytes_come_back_in_base64(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 1_000_000)
    await spill.keep({"row": {"answer": b"\xff\x00"}})
    assert await replayed(spill) == [{"row": {"answer": "/wA="}}]


class Answer(bytes):
    """Which threads have read pieces of it."""

    readers: set[int]

    def __getitem__(self, place: Any) -> Any:
        self.readers.add(threading.get_ident())
        piece = super().__getitem__(place)
        assert len(piece) <= 262_144
        return piece


async def test_a_large_answer_is_encoded_in_pieces_beside_the_event_loop(tmp_path: Path) -> None:
    spill, answer = Spill(tmp_path, 10_000_000), Answer(os.urandom(1_000_001))
    answer.readers = set()
    await spill.keep({"row": {"answer": answer}})
    assert answer.readers.isdisjoint({threading.get_ident()})
    assert len(answer.readers) == 1
    assert await replayed(spill) == [{"row": {"answer": b64encode(answer).decode()}}]


async def test_a_replay_that_is_cut_short_starts_again(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 1_000_000)
    await spill.keep({"n": 1})

    async def away(_chunk: list[Json]) -> None:
        raise StoreUnavailable("still away")

    with pytest.raises(StoreUnavailable):
        await spill.replay(away)
    await spill.keep({"n": 2})
    assert await replayed(spill) == [{"n": 1}, {"n": 2}]


async def test_what_does_not_fit_is_refused_and_what_fits_is_kept(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 100)
    await spill.keep({"n": 1})
    with pytest.raises(StoreUnavailable):
        await spill.keep({"n": "x" * 100})
    await spill.keep({"n": 2})
    assert await replayed(spill) == [{"n": 1}, {"n": 2}]


async def test_what_another_process_has_replayed_is_room_again(tmp_path: Path) -> None:
    owner = Spill(tmp_path, 100)
    await owner.keep({"n": "x" * 60})
    other = Spill(tmp_path, 100)
    with pytest.raises(StoreUnavailable):
        await other.keep({"n": "y" * 60})
    await replayed(owner)
    assert await replayed(other) == []
    assert other.used_bytes == 0
    await other.keep({"n": "y" * 60})
    assert other.used_bytes == size_of(tmp_path)


async def test_the_processes_of_a_folder_have_its_room_together(tmp_path: Path) -> None:
    spills = [Spill(tmp_path, 1_000) for _ in range(3)]
    full = 0
    while full < len(spills):
        for spill in spills:
            try:
                await spill.keep({"n": "x" * 50})
            except StoreUnavailable:
                full += 1
    assert size_of(tmp_path) < 1_000 + len(spills) * 100


async def test_a_disk_that_fails_is_said_so_and_leaves_no_half_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spill = Spill(tmp_path, 1_000_000)
    await spill.keep({"n": 1})

    def broken(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(StoreUnavailable, match="No space"):
            await spill.keep({"n": 2})
    await spill.keep({"n": 3})
    assert await replayed(spill) == [{"n": 1}, {"n": 3}]


async def test_a_torn_or_spoilt_line_is_skipped_and_the_rest_replayed(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 1_000_000)
    for number in range(3):
        await spill.keep({"n": number})
    spill.close()
    (name,) = os.listdir(tmp_path)
    file = tmp_path / name
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1].replace(b":1", b":7") + lines[2] + b'0badcafe {"n"')
    assert await replayed(Spill(tmp_path, 1_000_000)) == [{"n": 0}, {"n": 2}]


async def test_the_file_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    owner, other = Spill(tmp_path, 1_000_000), Spill(tmp_path, 1_000_000)
    await owner.keep({"n": 1})
    assert await replayed(other) == []
    owner.close()
    assert await replayed(other) == [{"n": 1}]


async def test_two_that_find_a_dead_process_file_do_not_both_replay_it(tmp_path: Path) -> None:
    dead = Spill(tmp_path, 1_000_000)
    await dead.keep({"n": 1})
    dead.close()
    spills = [Spill(tmp_path, 1_000_000) for _ in range(3)]
    found = await asyncio.gather(*(replayed(spill) for spill in spills))
    assert sorted(found, key=len) == [[], [], [{"n": 1}]]


async def test_a_killed_process_leaves_what_it_kept(tmp_path: Path) -> None:
    code = """
import asyncio, os, signal, sys
from pathlib import Path
from tidegate.store.spill import CallJournal, Spill

async def main():
    spill = Spill(Path(sys.argv[1]), 1_000_000)
    await asyncio.gather(*(spill.keep({"n": number}) for number in range(20)))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(tmp_path))
    assert await child.wait() == -9
    spill = Spill(tmp_path, 1_000_000)
    assert spill.used_bytes > 0
    assert sorted(entry["n"] for entry in await replayed(spill)) == list(range(20))
    assert spill.used_bytes == 0


async def test_an_empty_folder_costs_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle processes look every five seconds for what dead ones have left."""
    spill, journal = Spill(tmp_path, 1_000_000), CallJournal(tmp_path)
    journal.open()
    in_thread = asyncio.to_thread
    called: list[object] = []

    async def to_thread(call: Any, *values: Any) -> Any:
        called.append(call)
        return await in_thread(call, *values)

    async def keep(_calls: object) -> None:
        raise AssertionError("nothing is lost")

    monkeypatch.setattr(asyncio, "to_thread", to_thread)
    assert await replayed(spill) == []
    await journal.lost(keep)
    assert called == []
    other = CallJournal(tmp_path)
    other.open()
    await journal.lost(keep)
    assert len(called) == 1, "another process may have died"
    await spill.keep({"n": 1})
    assert await replayed(spill) == [{"n": 1}]
    assert len(called) > 1
    other.close()
    journal.close()
