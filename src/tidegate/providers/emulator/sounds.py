"""The sound of an emulated answer: a short tone, as Gemini sends it.

Invariant: the same text gets the same bytes: 16-bit little-endian PCM, one channel.
"""

from __future__ import annotations

import math
from array import array
from hashlib import sha256
from sys import byteorder

RATE_HZ = 24_000
MIME_TYPE = f"audio/L16;codec=pcm;rate={RATE_HZ}"
DURATION_MS = 400
TOKENS = 25 * DURATION_MS // 1000  # Gemini counts 25 a second


def hum(of: str) -> bytes:
    """A tone whose pitch depends on the text."""
    pitch_hz = 220 + sha256(of.encode("utf-8", "replace")).digest()[0]
    step = math.tau * pitch_hz / RATE_HZ
    samples = array(
        "h",
        (round(8000 * math.sin(step * index)) for index in range(RATE_HZ * DURATION_MS // 1000)),
    )
    if byteorder == "big":
        samples.byteswap()
    return samples.tobytes()
