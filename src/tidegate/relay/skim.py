"""Large bodies, read without the files in them: a picture of 20 MB is a name and a length here.

To parse a body of that size takes tens of milliseconds, in which this process does nothing else; to
find where its texts end takes one or two. Invariants: nothing but the inside of a text is left out,
and only of fields that hold files; all names and all other values are read as they came. A body
that does not fit is read as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from secrets import token_hex
from typing import Any, NamedTuple

from tidegate.relay.asked import parsed
from tidegate.relay.content import HEAD_CHARS, MOST_WALKED, NOTHING_SHORTENED

LARGE_BYTES = 262_144
# What stays of a file's text: its type and enough to find a picture's size in.
_KEPT_BYTES = 2 * HEAD_CHARS
_LONGEST_TYPE_BYTES = 1_000
_BYTES_A_TEXT = 4_096  # of a body with more texts than that, the first ones alone are looked at
_FIELDS = frozenset((b'"url"', b'"image_url"', b'"data"', b'"file_data"'))
# Nothing that JSON forbids in a text, as far as one look finds it.
_FORBIDDEN = (b"\\", b"\0", b"\t", b"\n", b"\r")
_MARK = token_hex(16)  # of this process: no client can write what stands for a file


class Skimmed(NamedTuple):
    """`raw` is the body, or what it comes to without its files; `body` is that as an object.
    `whole` has, for each text in it that stands for a longer one, that one."""

    raw: bytes
    body: dict[str, Any]
    whole: Mapping[str, Sized] = NOTHING_SHORTENED


@dataclass(frozen=True, slots=True)
class FileText:
    """The inside of a text of a body, from `start` to `end`, which is all in ASCII."""

    raw: bytes
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return self.raw[self.start : self.end].decode("ascii")


def skimmed(raw: bytes) -> Skimmed:
    """Raises InvalidRequest and PayloadTooLarge."""
    if len(raw) > LARGE_BYTES and (found := _without_files(raw)) is not None:
        short, files = found
        # Twice as many are walked, since the first of each list and object has no comma.
        if 2 * sum(map(short.count, (b",", b"[", b"{"))) <= MOST_WALKED:
            return Skimmed(short, parsed(short), files)
    return Skimmed(raw, parsed(raw))


def _without_files(raw: bytes) -> tuple[bytes, dict[str, FileText]] | None:
    """The same with short texts for those of files; None where there is none to leave out."""
    pieces: list[bytes] = []
    files: dict[str, FileText] = {}
    done = 0
    for start, end in _files(raw):
        kept = raw[start : start + _KEPT_BYTES]
        mark = f"~{_MARK}{len(files)}"
        files[kept.decode("ascii") + mark] = FileText(raw, start, end)
        pieces += raw[done:start], kept, mark.encode()
        done = end
    if not files:
        return None
    return b"".join([*pieces, raw[done:]]), files


def _files(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where the texts of files begin and end, as far as it looks."""
    all_ascii = raw.isascii()
    place, key = 0, b""
    for _ in range(len(raw) // _BYTES_A_TEXT):
        if (quote := raw.find(b'"', place)) < 0 or (end := _end_of(raw, quote + 1)) < 0:
            return
        start = quote + 1
        if end - start > _KEPT_BYTES:
            is_value = key in _FIELDS and raw[place:quote].strip() == b":"
            if is_value and _is_plain(raw, start, end, all_ascii) and _is_typed(raw, start):
                yield start, end
            key = b""
        else:
            key = raw[quote : end + 1]
        place = end + 1


def _end_of(raw: bytes, place: int) -> int:
    """Where the text ends in which `place` is; -1 where it does not."""
    while (end := raw.find(b'"', place)) > place and raw[end - 1] == 0x5C:
        inside = raw[place:end]
        if (len(inside) - len(inside.rstrip(b"\\"))) % 2 == 0:
            return end
        place = end + 1  # the quote is escaped
    return end


def _is_plain(raw: bytes, start: int, end: int, all_ascii: bool) -> bool:
    """Whether it says itself, in any parser."""
    if any(raw.find(one, start, end) >= 0 for one in _FORBIDDEN):
        return False
    return all_ascii or raw[start:end].isascii()


def _is_typed(raw: bytes, start: int) -> bool:
    """Whether the type of a file's URL is in what is kept."""
    if raw[start : start + 5] != b"data:":
        return True
    return raw.find(b",", start, start + _LONGEST_TYPE_BYTES) >= 0
