"""Samples of a profile: whose time is whose."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from bench.environments import ROOT
from bench.profile import samples

_NAME_BYTES = 192


def _raw(stacks: list[list[int]], files: list[tuple[str, str]]) -> bytes:
    words: list[int] = []
    for stack in stacks:
        words += [0, 1, *stack, len(stack)]
    table = b"".join(
        struct.pack(f"Q{_NAME_BYTES}s{_NAME_BYTES}s", index + 1, file.encode(), name.encode())
        for index, (file, name) in enumerate(files)
    )
    head = (len(stacks), 0, 7, len(words), len(files), _NAME_BYTES, 1, 2)
    return struct.pack(f"8Q{len(words)}Q", *head, *words) + table


def test_what_a_room_has_a_package_do_counts_in_both() -> None:
    sources = ROOT / "src" / "tidegate"
    files = [
        (str(sources / "store" / "audit.py"), "AuditLog.add"),
        ("/x/site-packages/asyncpg/pool.py", "Pool.acquire"),
        (str(sources / "supervisor" / "roles.py"), "_run"),
        ("<string>", "__init__"),
        ("/x/site-packages/uvloop/__init__.py", "run"),
    ]
    stacks = [[0, 4, 2], [1, 0, 4, 2], [3, 0, 4, 2], [4, 2]]
    found = samples.Samples()
    samples._read(_raw(stacks, files), samples._Maps(os.getpid()), found)
    assert (found.count, found.sampler_ns) == (4, 7)
    assert found.own == {"tidegate/store": 2, "asyncpg": 1, samples.LOOP: 1}
    assert found.called == {"tidegate/store": 1, samples.BETWEEN: 1}
    assert found.functions_own == {"store/audit.py AuditLog.add": 2}
    assert found.functions_called == {"store/audit.py AuditLog.add": 1, samples.BETWEEN: 1}


def test_an_address_belongs_to_the_extension_that_is_mapped_there() -> None:
    import orjson

    maps = samples._Maps(os.getpid())
    begin = next(
        int(line.split("-")[0], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if Path(orjson.__file__).parent.name in line and " r-xp " in line
    )
    assert maps.room(begin) == "orjson"
    assert maps.room(0) is None
