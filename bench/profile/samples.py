"""Samples of a process, taken by `sampler.c` inside it and read as rooms of the code.

A sample's own room is that of the innermost frame that is not a plain library of C's: a room of
tidegate, a package, the standard library, or uvloop and httptools. Where that is no room of ours,
it counts also as called by the innermost frame of tidegate on the stack.
"""

from __future__ import annotations

import bisect
import os
import signal
import struct
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.environments import ROOT, EnvironmentMissing
from bench.gateway.programs import compiled_from

TOGGLE = signal.SIGRTMIN + 8
LOOP = "uvloop, httptools"
STDLIB = "stdlib"
BETWEEN = "between calls"
# Whose frames lie under everything that runs.
_RUNNERS = ("tidegate/supervisor", "tidegate/cli", "tidegate/__main__")
_HEAD = struct.Struct("8Q")
_WRITTEN_S = 10.0
_SOURCES = ROOT / "src" / "tidegate"


@dataclass(slots=True)
class Samples:
    """How many there are, and of whom: of each room and of each function its own, and those of
    what it calls outside of our rooms. `sampler_ns`: what taking them took."""

    count: int = 0
    sampler_ns: int = 0
    own: Counter[str] = field(default_factory=Counter)
    called: Counter[str] = field(default_factory=Counter)
    functions_own: Counter[str] = field(default_factory=Counter)
    functions_called: Counter[str] = field(default_factory=Counter)

    def add(self, more: Samples) -> None:
        self.count += more.count
        self.sampler_ns += more.sampler_ns
        for name in ("own", "called", "functions_own", "functions_called"):
            getattr(self, name).update(getattr(more, name))


class Sampler:
    """Samples the main threads of processes that were started with `settings`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        include = Path(sysconfig.get_paths()["include"])
        if not (include / "internal" / "pycore_frame.h").exists():
            raise EnvironmentMissing("Python has no headers (on Debian: apt install python3-dev)")
        library = compiled_from(
            [Path(__file__).with_name("sampler.c")],
            *("-shared", "-fPIC", f"-I{include}", f"-I{include / 'internal'}"),
        )
        (folder / "sitecustomize.py").write_text(
            "import ctypes\n"
            f"failed = ctypes.PyDLL({str(library)!r}).prepare({str(folder)!r}.encode())\n"
            "assert not failed, failed\n"
        )

    @property
    def settings(self) -> dict[str, str]:
        return {"PYTHONPATH": f"{self._folder}:{ROOT / 'src'}"}

    def begin(self, pids: Sequence[int]) -> None:
        for pid in pids:
            (self._folder / str(pid)).unlink(missing_ok=True)
            os.kill(pid, TOGGLE)

    def end(self, pids: Sequence[int]) -> Samples:
        for pid in pids:
            os.kill(pid, TOGGLE)
        found = Samples()
        for pid in pids:
            _read(_written(self._folder / str(pid)), _Maps(pid), found)
        return found


def _written(file: Path) -> bytes:
    deadline_s = time.monotonic() + _WRITTEN_S
    while time.monotonic() < deadline_s:
        if file.exists() and len(raw := file.read_bytes()) >= _HEAD.size:
            words, codes, name_bytes = _HEAD.unpack_from(raw)[3:6]
            if len(raw) == _HEAD.size + words * 8 + codes * (8 + 2 * name_bytes):
                return raw
        time.sleep(0.02)
    raise RuntimeError(f"the sampler wrote nothing into {file}")


class _Maps:
    """What is mapped into a process: the room of an address, None for a plain library of C's."""

    def __init__(self, pid: int) -> None:
        found = []
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and "x" in fields[1]:
                begin, end = (int(one, 16) for one in fields[0].split("-"))
                found.append((begin, end, fields[5]))
        self._found = sorted(found)
        self._begins = [begin for begin, _, _ in self._found]
        self._known: dict[int, str | None] = {}

    def room(self, address: int) -> str | None:
        if address not in self._known:
            at = bisect.bisect_right(self._begins, address) - 1
            inside = at >= 0 and address < self._found[at][1]
            file = self._found[at][2] if inside else ""
            is_extension = "/site-packages/" in file or "/lib-dynload/" in file
            self._known[address] = _room(file) if is_extension else None
        return self._known[address]


def _room(file: str) -> str:
    if file.startswith(f"{_SOURCES}/"):
        return f"tidegate/{Path(file).relative_to(_SOURCES).parts[0].removesuffix('.py')}"
    if "/site-packages/" in file:
        package = file.rpartition("/site-packages/")[2].split("/")[0].split(".")[0]
        return LOOP if package in ("uvloop", "httptools") else package
    return STDLIB


def _read(raw: bytes, maps: _Maps, found: Samples) -> None:
    count, lost, own_ns, words, _, name_bytes, eval_begin, eval_end = _HEAD.unpack_from(raw)
    if lost:
        raise RuntimeError(f"there was no place for {lost} samples")
    found.count += count
    found.sampler_ns += own_ns
    values = struct.unpack_from(f"{words}Q", raw, _HEAD.size)
    entry = struct.Struct(f"Q{name_bytes}s{name_bytes}s")
    frames: dict[int, tuple[str, str]] = {}
    for index, (key, *texts) in enumerate(entry.iter_unpack(raw[_HEAD.size + words * 8 :])):
        file, name = (text.split(b"\0")[0].decode() for text in texts)
        # What was made while running, as a dataclass's methods, is a part of what calls it.
        if key and (not file.startswith("<") or file.startswith("<frozen")):
            room = _room(file)
            short = file.removeprefix(f"{_SOURCES}/").rpartition("/site-packages/")[2]
            frames[index] = (room, f"{short} {name}")
    for addresses, stack in _samples(values):
        python = [frames[code] for code in stack if code in frames]
        in_c = (maps.room(at) for at in addresses if not eval_begin <= at < eval_end)
        own = next((room for room in in_c if room), None)
        room = own or (python[0][0] if python else BETWEEN)
        found.own[room] += 1
        ours = next((frame for frame in python if _is_ours(frame[0])), (BETWEEN, BETWEEN))
        if room == ours[0]:
            found.functions_own[ours[1]] += 1
        else:
            found.called[ours[0]] += 1
            found.functions_called[ours[1]] += 1


def _is_ours(room: str) -> bool:
    return room.startswith("tidegate/") and room not in _RUNNERS


def _samples(values: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The addresses and the codes of each sample, innermost first; read from the last one back."""
    at = len(values)
    while at:
        codes = values[at - 1 - values[at - 1] : at - 1]
        at -= 1 + len(codes)
        addresses = values[at - 1 - values[at - 1] : at - 1]
        at -= 1 + len(addresses)
        yield addresses, codes
