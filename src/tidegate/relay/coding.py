"""Answers that an upstream compressed although it was asked not to. Pure.

They go on as they came; what is read of them is read in a decoded copy. Invariant: a copy is never
longer than `MOST_BYTES`, whatever the answer would come to.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

MOST_BYTES = 16_000_000
_MOST_CODED_BYTES = 4_000_000
_GZIP, _ZLIB, _RAW = 31, 15, -15
# `deflate` is zlib's format by RFC 9110, and at some servers without its head.
_WINDOWS = {b"gzip": (_GZIP,), b"x-gzip": (_GZIP,), b"deflate": (_ZLIB, _RAW)}


def coding_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """In which coding an answer came; empty where it is as it is."""
    for name, value in headers:
        if name.lower() == b"content-encoding":
            coding = value.strip().lower()
            return b"" if coding == b"identity" else coding
    return b""


def decoded(data: bytes, coding: bytes) -> bytes:
    """What an answer says, as far as it goes where it was cut; empty where that cannot be told:
    another coding than gzip and deflate, or too long."""
    if len(data) > _MOST_CODED_BYTES:
        return b""
    for window in _WINDOWS.get(coding, ()):
        reader = zlib.decompressobj(window)
        try:
            text = reader.decompress(data, MOST_BYTES)
        except zlib.error:
            continue
        return b"" if reader.unconsumed_tail else text
    return b""
