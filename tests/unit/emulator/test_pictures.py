"""Pictures are real, repeatable and their prompt's own."""

from __future__ import annotations

import struct
import zlib

import pytest

from tidegate.emulator.content import draw


def pixels(data: bytes) -> tuple[int, bytes]:
    """Width and filtered rows; checks every chunk's CRC on the way."""
    place, width, packed = 8, 0, b""
    while place < len(data):
        length, name = struct.unpack(">I4s", data[place : place + 8])
        body = data[place + 8 : place + 8 + length]
        assert data[place + 8 + length :][:4] == struct.pack(">I", zlib.crc32(name + body))
        width = struct.unpack(">I", body[:4])[0] if name == b"IHDR" else width
        packed += body if name == b"IDAT" else b""
        place += 12 + length
    return width, zlib.decompress(packed)


@pytest.mark.parametrize("size_px", [1, 2, 17, 512])
def test_every_size_is_a_valid_png(size_px: int) -> None:
    width, rows = pixels(draw("a fox", size_px))
    assert width == size_px
    assert len(rows) == size_px * (1 + 3 * size_px)
    assert rows[:: 1 + 3 * size_px] == b"\0" * size_px


def test_the_same_prompt_gives_the_same_picture_and_another_prompt_another() -> None:
    assert draw("a fox", 64) == draw("a fox", 64)
    assert draw("a fox", 64) != draw("a hen", 64)


def test_the_colour_fades_from_one_corner_to_the_other() -> None:
    _, rows = pixels(draw("a fox", 64))
    corner, opposite = rows[1:4], rows[-3:]
    assert sum(abs(a - b) for a, b in zip(corner, opposite, strict=True)) > 30
    middle = rows[32 * 193 + 1 + 3 * 32 :][:3]
    assert all(
        min(a, b) <= part <= max(a, b) for a, b, part in zip(corner, opposite, middle, strict=True)
    )
