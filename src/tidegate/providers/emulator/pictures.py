"""Pictures drawn without a library: a gradient whose colours come from the prompt.

Invariant: the bytes are a valid PNG (signature, IHDR, IDAT, IEND, each with its CRC), and the same
prompt and size always give the same bytes.
"""

from __future__ import annotations

import colorsys
import zlib
from functools import lru_cache
from hashlib import sha256
from struct import pack

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@lru_cache(maxsize=64)
def draw(prompt: str, size_px: int) -> bytes:
    """A square PNG, 8 bits RGB, `size_px` wide: one hue at the top left fades into another."""
    digest = sha256(prompt.encode("utf-8", "replace")).digest()
    hue = digest[0] / 256
    start = _colour(hue, 0.55, 0.95)
    end = _colour((hue + 0.15 + digest[1] / 512) % 1, 0.75, 0.55)
    # Every row is a slice of one diagonal ramp of 2 * size - 1 pixels.
    steps = max(2 * size_px - 2, 1)
    ramp = b"".join(
        bytes(round(a + (b - a) * step / steps) for a, b in zip(start, end, strict=True))
        for step in range(2 * size_px - 1)
    )
    rows = b"".join(b"\0" + ramp[3 * y : 3 * (y + size_px)] for y in range(size_px))
    header = pack(">IIBBBBB", size_px, size_px, 8, 2, 0, 0, 0)
    return (
        SIGNATURE
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(rows, 1))
        + _chunk(b"IEND", b"")
    )


def _colour(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    return tuple(round(part * 255) for part in colorsys.hsv_to_rgb(hue, saturation, value))


def _chunk(name: bytes, data: bytes) -> bytes:
    return pack(">I", len(data)) + name + data + pack(">I", zlib.crc32(name + data))
