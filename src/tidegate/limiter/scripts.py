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

ScriptName = Literal["sync", "tend", "renew", "inspect", "place", "act", "rights", "notes"]

# Releases must work when the server's memory is full: a permit may not leak for want of a byte.
_FLAGS = "#!lua flags=allow-oom\n"

# Making a function costs more than calling it: those which an ordinary request can do without are
# made when the first of them is asked for.
_LATER = """T.later = { %s }
setmetatable(T, { __index = function(_, name)
  while #T.later > 0 do
    table.remove(T.later, 1)()
    local found = rawget(T, name)
    if found ~= nil then return found end
  end
end })"""


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
    later = [f"function()\n{fragment(part)}\nend" for part in header.get("later", "").split()]
    if later:
        parts.append(_LATER % ",\n".join(later))
    source = (_FLAGS + "\n".join([*parts, main])).encode()
    return Script(name, source, hashlib.sha1(source, usedforsecurity=False).hexdigest(), header)
