"""Lengths of time, counted by their size: what percentiles over many processes are made of. Pure.

A histogram is one whole number, with a count of 64 bits for each of `LANES` classes: adding two
numbers adds two histograms, and its bytes are what the record keeps. A class is a quarter of an
octave wide, so that a percentile is off by less than a tenth.
"""

from __future__ import annotations

import math
import struct

LANES = 90  # from 1 ms to over an hour; the first is below 1 ms, the last all that is above
_BITS = 64
_PER_OCTAVE = 4
_BYTES = LANES * _BITS // 8
_COUNTS = struct.Struct(f"<{LANES}Q")
_ONES = tuple(1 << (_BITS * lane) for lane in range(LANES))


def one(length_ms: float) -> int:
    """The histogram of a single length."""
    return _ONES[lane_of(length_ms)]


def lane_of(length_ms: float) -> int:
    """The class of a length."""
    if length_ms < 1:
        return 0
    return min(LANES - 1, 1 + int(math.log2(length_ms) * _PER_OCTAVE))


def pack(histogram: int) -> bytes:
    """As few bytes as it takes."""
    return histogram.to_bytes((histogram.bit_length() + 7) // 8, "little")


def unpack(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def counts(histogram: int) -> tuple[int, ...]:
    """How many are in each class."""
    return _COUNTS.unpack(histogram.to_bytes(_BYTES, "little"))


def percentiles(histogram: int, shares: tuple[float, ...]) -> list[float | None]:
    """The lengths, in ms, that these shares of all (0 to 1) do not exceed; None for an empty one.

    Within a class they are taken to lie evenly.
    """
    in_class = counts(histogram)
    total = sum(in_class)
    if not total:
        return [None] * len(shares)
    return [_length_at(in_class, share * total) for share in shares]


def _length_at(in_class: tuple[int, ...], rank: float) -> float:
    before = 0
    lane = 0
    while lane < LANES - 1 and before + in_class[lane] < max(rank, 1e-9):
        before += in_class[lane]
        lane += 1
    least = 0.0 if lane == 0 else 2 ** ((lane - 1) / _PER_OCTAVE)
    most = 2 ** (lane / _PER_OCTAVE)
    inside = (rank - before) / in_class[lane] if in_class[lane] else 1.0
    return float(least + (most - least) * min(1.0, max(0.0, inside)))
