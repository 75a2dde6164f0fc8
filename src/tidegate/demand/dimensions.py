"""How large a picture is, and how long a film, by the first bytes of its file. Pure.

Invariant: never raises, whatever the bytes are; a size that they do not tell is None.
"""

from __future__ import annotations

import struct

_MOST_SEGMENTS = 200
# Start-of-frame markers of JPEG that carry the size; C4, C8 and CC stand between them.
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD9)})


def dimensions(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels of a PNG, JPEG, GIF or WebP."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n"):
            return _pixels(*struct.unpack_from(">II", data, 16))
        if data.startswith((b"GIF87a", b"GIF89a")):
            return _pixels(*struct.unpack_from("<HH", data, 6))
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        return None  # cut short within its head
    return None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    at = 2
    for _ in range(_MOST_SEGMENTS):
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 3)
            return _pixels(width, height)
        if marker not in _WITHOUT_LENGTH:
            at += struct.unpack_from(">H", data, at)[0]
        if data[at] != 0xFF:
            return None
    return None


def _webp(data: bytes) -> tuple[int, int] | None:
    form = data[12:16]
    if form == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return _pixels(width & 0x3FFF, height & 0x3FFF)
    if form == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return _pixels((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if form == b"VP8X" and len(data) >= 30:
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        return _pixels(width, height)
    return None


def duration_s(data: bytes) -> float | None:
    """How long an MP4 or QuickTime film lasts, where its head says so; None where it does not."""
    at = data.find(b"mvhd") + 4
    try:
        if at < 4 or data[at] > 1:
            return None
        form, times = (">II", at + 12) if data[at] == 0 else (">IQ", at + 20)
        scale, ticks = struct.unpack_from(form, data, times)
    except (struct.error, IndexError):
        return None
    return ticks / scale if scale else None


def _pixels(width: int, height: int) -> tuple[int, int] | None:
    return (width, height) if width and height else None
