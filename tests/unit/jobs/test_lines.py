"""A batch's file is cut into lines while it comes; lines that are given up keep their tries."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from tidegate.call import new_id
from tidegate.jobs import batches as batch_runner
from tidegate.jobs.batches import LineCaller, _ActiveLine, lines_of
from tidegate.jobs.calls import LastTries, OwnLimits
from tidegate.record import CallRecord


class Piece(bytes):
    """Of a file; a line that is long must not be copied for each of its pieces."""

    def __radd__(self, other: bytes) -> bytes:
        raise AssertionError(f"{len(other)} bytes are copied")


async def cut(pieces: Iterable[bytes]) -> list[bytes]:
    async def coming() -> AsyncIterator[bytes]:
        for piece in pieces:
            yield Piece(piece)

    return [line async for line in lines_of(coming())]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
async def test_lines_are_the_same_however_the_file_comes(size: int) -> None:
    whole = b"\n\nfirst\nsecond\r\n\nthe last"
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert await cut(pieces) == whole.split(b"\n")
    assert await cut([*pieces, b"\n"]) == whole.split(b"\n")
    assert await cut([]) == []


async def test_a_line_that_is_too_long_ends_early_and_others_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_runner, "LONGEST_BYTES", 10)
    given = [b"x" * 7] * 9 + [b"x\n" + b"y" * 10 + b"\n", b"z" * 30 + b"\nz"]
    assert await cut(given) == [b"x" * 10, b"y" * 10, b"z" * 10, b"z"]


class Lines:
    """Of one batch that has ended."""

    def __init__(self) -> None:
        self.counted: dict[UUID, int] = {}

    async def over(self, batches: Iterable[UUID]) -> frozenset[UUID]:
        return frozenset(batches)

    async def release(self, _lines: object, *, counted: Mapping[UUID, int], **_how: object) -> None:
        self.counted |= counted


async def test_lines_that_are_given_up_between_two_tries_keep_what_they_have_used_up() -> None:
    store = SimpleNamespace(notifications=None, batch_lines=(lines := Lines()))
    held = SimpleNamespace(outages=None)
    caller = LineCaller(*cast(Any, (None, store, None, held, LastTries(), OwnLimits(set), None)))
    made: dict[UUID, int] = {}
    for attempts, faults in ((2, 0), (1, 1), (2, 1)):
        line = SimpleNamespace(id=new_id(), batch_id=new_id(), lapses=0)
        record = CallRecord("batch", "default", datetime.now(UTC), line.id)
        record.attempts, record.faults = attempts, faults
        task = asyncio.create_task(asyncio.Event().wait())
        caller._feeder.tasks[cast(Any, task)] = _ActiveLine(cast(Any, line), record)
        made[line.id] = attempts - faults
    await caller.leave_ended()
    assert lines.counted == made
