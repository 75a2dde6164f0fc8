"""Puts the Lua scripts together from their fragments and reads their headers.

Invariant: what a header says (`request`, `returns`) is what the Python types in `wire.py` hold;
a test compares the two.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

ScriptName = Literal["sync", "tend", "renew", "inspect", "place", "act"]

# Releases must work when the server's memory is full: a permit may not leak for want of a byte.
_FLAGS = "#!lua flags=allow-oom\n"


@dataclass(frozen=True, slots=True)
class Script:
    """A script ready to be sent. `header` maps each word of the header to its text."""

    name: str
    source: bytes
    sha: str
    header: Mapping[str, str]


@cache
def fragment(name: str) -> str:
    """The text of `lua/{name}.lua`."""
    return files(__package__).joinpath("lua", f"{name}.lua").read_text(encoding="utf-8")


def read_header(source: str) -> dict[str, str]:
    """The `-- word: text` lines at the top of a fragment."""
    header: dict[str, str] = {}
    for line in source.splitlines():
        word, colon, text = line.removeprefix("-- ").partition(":")
        if not line.startswith("-- ") or not colon or not word.isidentifier():
            break
        header[word] = text.strip()
    return header


def load(name: ScriptName, *, clock: str | None = None) -> Script:
    """Assemble a script. `clock` replaces the clock fragment: tests pass one that reads a key."""
    main = fragment(name)
    header = read_header(main)
    parts = [
        clock if clock is not None and part == "clock" else fragment(part)
        for part in header["uses"].split()
    ]
    source = (_FLAGS + "\n".join([*parts, main])).encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest(), header)
