"""Where workers record the beginning and the end of each call, so that nothing is over-looked.

A file in shared memory: one record costs a microsecond and no system call, so that the harness is
never what is measured, and what a killed process wrote stays. Times are the machine's monotonic
clock, the same for all processes. A call's end is written before its permit is given back, and its
beginning after it was had: calls that overlap here really overlapped.
"""

from __future__ import annotations

import itertools
import mmap
import struct
import time
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

_RECORD = struct.Struct("<qii")
CAPACITY = 1_000_000
# Threads may fill their places out of order; so many empty ones in a row are the end.
_MOST_OPEN_PLACES = 4096


class Kind(IntEnum):
    READY = 1
    BEGAN = 2
    ENDED = 3
    FAILED = 4


class Record(NamedTuple):
    at_ns: int
    kind: int
    task: int


class CallLog:
    """The writing side. A process of many threads may share one."""

    def __init__(self, path: str) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._places = itertools.count()

    def add(self, kind: Kind, task: int = 0) -> None:
        place = next(self._places) * _RECORD.size
        _RECORD.pack_into(self._map, place, time.monotonic_ns(), kind, task)


def create(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(CAPACITY * _RECORD.size)


def read(path: Path) -> list[Record]:
    """All records, by time."""
    records: list[Record] = []
    with path.open("rb") as file:
        while chunk := file.read(_MOST_OPEN_PLACES * _RECORD.size):
            found = [Record(*fields) for fields in _RECORD.iter_unpack(chunk) if fields[0]]
            if not found:
                break
            records += found
    return sorted(records)
