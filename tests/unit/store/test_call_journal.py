"""Journal of the calls under way: what a killed process was calling is found, and nothing else."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import orjson
import pytest

from tidegate.call import (
    UNKNOWN_CHARGE,
    Charge,
    Usage,
    UsageDetails,
    UsageState,
    new_id,
)
from tidegate.record import NO_LINEAGE, CallRecord, Lineage
from tidegate.store.spill import CallJournal, facts_of

AT = datetime(2026, 11, 28, 1, 2, 3, 456_789, UTC)


def a_call(**facts: object) -> CallRecord:
    usual = {"request_id": new_id(), "model": "m", "upstream": "u", "pool": "u", "attempts": 1}
    return CallRecord("relay", "acme", AT, **usual | facts)  # type: ignore[arg-type]


async def lost_in(folder: Path) -> list[CallRecord]:
    found: list[CallRecord] = []

    async def keep(calls: list[CallRecord]) -> None:
        found.extend(calls)

    await CallJournal(folder).lost(keep)
    return found


async def test_what_was_under_way_is_found_once_the_process_is_gone(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    ended, under_way = a_call(), a_call(subject="s", streamed=True, admitted_at=AT)
    for record in (ended, under_way):
        journal.enter(record)
    journal.leave(ended)
    assert await lost_in(tmp_path) == [], "its process lives"
    journal.close()
    (found,) = await lost_in(tmp_path)
    assert (found.request_id, found.received_at, found.admitted_at) == (under_way.id, AT, AT)
    assert (found.tenant_id, found.model, found.upstream) == ("acme", "m", "u")
    assert (found.subject, found.streamed, found.attempts) == ("s", True, 1)
    assert await lost_in(tmp_path) == []
    assert os.listdir(tmp_path) == []


def test_its_file_has_all_of_its_room_on_the_disk_from_the_start(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    (file,) = tmp_path.iterdir()
    # A page of a mapped file that finds no room on a full disk later kills the process (SIGBUS).
    assert file.stat().st_blocks * 512 >= file.stat().st_size > 0
    journal.close()


def test_without_room_for_it_on_the_disk_calls_go_on_unnoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    journal = CallJournal(tmp_path)
    journal.open()
    assert os.listdir(tmp_path) == []
    record = a_call()
    journal.enter(record)
    journal.note(record)
    journal.leave(record)
    journal.close()


async def test_a_process_that_ended_in_order_leaves_nothing(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    record = a_call()
    journal.enter(record)
    journal.enter(record)  # another try of it
    journal.leave(record)
    journal.leave(record)
    assert record.slot is None
    journal.close()
    assert os.listdir(tmp_path) == []


async def test_the_lineage_of_a_call_is_found_where_it_was_written(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    talk = Lineage("talk", "ab", UUID(int=7), "cd", "ef")
    long = a_call(lineage=Lineage("\u6f6e" * 200), model="m" * 300)
    for record in (a_call(lineage=talk), a_call(), long):
        journal.enter(record)
    path = tmp_path / os.listdir(tmp_path)[0]
    data = bytearray(path.read_bytes())
    journal.close()
    found = await lost_in(tmp_path)
    assert [one.lineage for one in found] == [talk, NO_LINEAGE, NO_LINEAGE]
    assert found[2].model == long.model, "only its lineage found no room"

    # An earlier version leaves what was there before behind the facts, or nothing.
    for slot in range(3):
        begin = slot * 1_024 + 19
        begin += int.from_bytes(data[begin - 2 : begin], "little")
        data[begin : (slot + 1) * 1_024] = (b'"rest"]' * 200)[: (slot + 1) * 1_024 - begin]
    path.write_bytes(data)
    assert [one.lineage for one in await lost_in(tmp_path)] == [NO_LINEAGE] * 3


async def test_what_a_session_was_charged_for_so_far_is_found(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    told = Usage(120, 30, total_tokens=150, details=UsageDetails(input_audio_seconds=7))
    whole = Charge(UsageState.TOLD, told, None, 42)
    talk, torn, none, long = a_call(lineage=Lineage("talk")), a_call(), a_call(), a_call()
    long.model = "m" * (950 - len(orjson.dumps(facts_of(long))))
    for record in (talk, torn, none, long):
        journal.enter(record)
    for record in (talk, torn, long):
        for charge in (Charge(UsageState.TOLD, Usage(1, 1), None, 1), whole):
            record.charge = charge
            journal.note(record)
    path = tmp_path / os.listdir(tmp_path)[0]
    data = bytearray(path.read_bytes())
    data[2 * 1_024 - 12] ^= 1  # killed while it was written
    journal.close()
    path.write_bytes(data)
    found = await lost_in(tmp_path)
    assert found[0].charge == replace(whole, state=UsageState.PARTIAL)
    assert (found[0].answer.usage, found[0].lineage.conversation) == (told, "talk")
    assert [one.charge for one in found[1:]] == [UNKNOWN_CHARGE] * 3
    assert found[3].model == long.model, "only its charge found no room"


async def test_another_call_in_the_same_place_has_none_of_it(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    first = a_call(charge=Charge(UsageState.TOLD, Usage(1, 1), None, 1))
    journal.enter(first)
    journal.note(first)
    journal.leave(first)
    journal.note(first)  # it is on record already
    journal.enter(a_call())
    journal.close()
    assert [one.charge for one in await lost_in(tmp_path)] == [UNKNOWN_CHARGE]


async def test_what_is_not_kept_is_found_again(tmp_path: Path) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    journal.enter(a_call())
    journal.close()

    async def fail(_: list[CallRecord]) -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        await CallJournal(tmp_path).lost(fail)
    assert len(await lost_in(tmp_path)) == 1


async def test_more_calls_than_there_is_room_for_and_long_names_are_left_out(
    tmp_path: Path,
) -> None:
    journal = CallJournal(tmp_path)
    journal.open()
    long = a_call(endpoint="/v1/" + "x" * 2_000)
    journal.enter(long)
    assert long.slot is None
    calls = [a_call() for _ in range(4_097)]
    for record in calls:
        journal.enter(record)
    assert [record.slot is None for record in calls].count(True) == 1
    journal.leave(calls[-1])
    journal.leave(calls[0])
    journal.enter(calls[-1])
    assert calls[-1].slot is not None
    journal.close()


_DIES = """
import sys, os, signal
from pathlib import Path
from uuid import UUID
from datetime import UTC, datetime
from tidegate.call import new_id
from tidegate.record import NO_LINEAGE, CallRecord, Lineage
from tidegate.store.spill import CallJournal
journal = CallJournal(Path(sys.argv[1]))
journal.open()
for _ in range(3):
    journal.enter(CallRecord("relay", "acme", datetime.now(UTC), request_id=new_id()))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_9_loses_none(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(_DIES)
    folder = tmp_path / "spill"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(folder)]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert len(asyncio.run(lost_in(folder))) == 3
