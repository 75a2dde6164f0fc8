"""A batch's file is cut into lines while it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable

import pytest

from tidegate.jobs import batches as batch_runner
from tidegate.jobs.batches import lines_of


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
