"""Bodies in JSON, parsed in steps if they are large.

While orjson parses, or a text is searched, no other Python thread runs: 20 MB of text would hold
the event loop for tens of milliseconds, also from another thread. So a body over `LARGE_BYTES` is
searched in steps, its long texts are parsed in steps, and the contents of its files are not parsed
at all. Pure.

Invariant: the result, or the refusal, is that of parsing the whole body.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from itertools import islice
from secrets import token_hex
from typing import Any, NamedTuple

import orjson

from tidegate.errors import InvalidRequest, PayloadTooLarge

JsonObject = dict[str, Any]
NOTHING_SHORTENED: Mapping[str, Sized] = {}
LARGE_BYTES = 262_144
# Enough to read a picture's size from, and a multiple of 4 characters.
HEAD_CHARS = 65_536
MOST_WALKED = 200_000
_MARK = token_hex(16)  # random for this process: no client can send a placeholder
MARK = _MARK.encode()  # what differs in the placeholders of two processes

# Objects, lists, keys and values: each takes many times its bytes once parsed, and no other Python
# thread runs meanwhile. Providers accept fewer: the largest request other than text, embeddings of
# tokens, has 300,000.
MOST_PARTS = 500_000
_PARTS = (b",", b"[", b"{", b":")
_BACKSLASH = b"\\"


def count_in(body: bytes, *needles: bytes) -> int:
    """Count the needles in a body. A large body is searched in parts, since no other Python thread
    runs during a search."""
    if len(body) <= LARGE_BYTES:
        return sum(map(body.count, needles))
    return sum(
        body.count(needle, place, place + LARGE_BYTES + len(needle) - 1)
        for place in range(0, len(body), LARGE_BYTES)
        for needle in needles
    )


def holds(body: bytes, *needles: bytes) -> bool:
    """Return whether a body holds one of the needles; a large one is searched as in `count_in`."""
    if len(body) <= LARGE_BYTES:  # by `find`: `in` costs five times as much (decision 27)
        return max(map(body.find, needles)) >= 0
    return any(
        body.find(needle, place, place + LARGE_BYTES + len(needle) - 1) >= 0
        for place in range(0, len(body), LARGE_BYTES)
        for needle in needles
    )


def count_folded(body: bytes, *needles: bytes) -> int:
    """Count the needles, in small letters, in a body in any case, as `count_in` does."""
    count, more = 0, max(map(len, needles)) - 1
    for place in range(0, len(body), LARGE_BYTES):
        step = body[place : place + LARGE_BYTES + more].lower()
        count += sum(step.count(one, 0, LARGE_BYTES + len(one) - 1) for one in needles)
    return count


def matches_in(body: bytes, pattern: re.Pattern[bytes], longest_bytes: int) -> bool:
    """Return whether a pattern, whose longest match is given, matches in a body, as `holds`."""
    return any(
        pattern.search(body, place, place + LARGE_BYTES + longest_bytes - 1)
        for place in range(0, len(body), LARGE_BYTES)
    )


def has_too_many_parts(body: bytes, most: int | None = None) -> bool:
    """Return whether JSON has more than `most` (by default `MOST_PARTS`) commas, lists, objects and
    keys outside of texts."""
    most = MOST_PARTS if most is None else most
    if len(body) <= most or count_in(body, *_PARTS) <= most:
        return False
    parts = place = within = 0  # within: 1 if the step begins in a text
    while place < len(body) and parts <= most:
        step = _without_escapes(body, place)
        found = step.split(b'"')
        outside = b"".join(found[within::2])
        parts += sum(map(outside.count, _PARTS))
        within ^= (len(found) - 1) % 2
        place += len(step)
    return parts > most


def _without_escapes(body: bytes, place: int) -> bytes:
    """Return the next step of a body, of the same length, with other characters for escaped quotes
    and backslashes. No escape begins before `place`."""
    step = body[place : place + LARGE_BYTES]
    if (len(step) - len(step.rstrip(_BACKSLASH))) % 2:  # up to the end of the escape
        step = body[place : place + LARGE_BYTES + 1]
    return step.replace(2 * _BACKSLASH, b"__").replace(b'\\"', b"__")


def check_parts(body: bytes) -> None:
    """Raise PayloadTooLarge for JSON that would take too much memory once parsed."""
    if has_too_many_parts(body):
        allowed = f"at most {MOST_PARTS} values"
        raise PayloadTooLarge("body", "the body holds too many values", allowed=allowed)


# Before another character than a backslash or a part of a character, at least six bytes after any
# backslash: neither an escape nor a character is divided there, and no pair of escapes.
_BETWEEN = re.compile(rb"[^\\]{6}(?=[^\\\x80-\xbf])")
# Before an escape, but the second one of a pair.
_BEFORE_ESCAPE = re.compile(rb"(?<!\\)(?=\\(?:[^u]|u[^dD]|u[dD][^c-fC-F]))")
# A field with a list, and the first byte of its first value.
_LIST = re.compile(rb'"\s*+:\s*+\[\s*+(?=(.))', re.DOTALL)
_MOST_TRIES = 16
_MOST_SPENT = 64  # times `LARGE_BYTES` that are read in vain
# Between two values of a list, by the first byte of the values.
_COMMA = re.compile(rb"\s*+(,)\s*+")
_DIVIDED = {
    first: re.compile(rb"\%b\s*+(,)\s*+(?=\%b)" % (last, first))
    for first, last in ((b"{", b"}"), (b"[", b"]"), (b'"', b'"'))
}
_COLON = re.compile(rb"[ \t\n\r]*+:")


def _parsed_in_steps(raw: bytes) -> tuple[JsonObject, bytes] | None:
    """Parse a body with its long texts and lists in steps, and return it with its bytes without
    those texts; None if it is not a valid object."""
    pieces: list[bytes] = []
    placed: dict[str, str | list[Any]] = {}
    done = 0
    try:
        for _, start, end in _long_texts(raw, LARGE_BYTES):
            if _COLON.match(raw, end + 1) is None:  # not the name of a field
                mark = f"~{_MARK}{len(placed)}"
                placed[mark] = _text_in_steps(raw, start, end)
                pieces += raw[done:start], mark.encode()
                done = end
        rest = b"".join([*pieces, raw[done:]]) if pieces else raw
        # Without the token: an error may show a value to its client.
        short = rest.replace(MARK, b"") if pieces else raw
        if len(rest) > LARGE_BYTES and (found := _list_in_steps(rest)) is not None:
            start, end, values = found
            mark = f"~{_MARK}{len(placed)}"
            placed[mark] = values
            rest = b'%b"%b",%b' % (rest[:start], mark.encode(), rest[end:])
        body = orjson.loads(rest)
    except orjson.JSONDecodeError:  # the error of the whole is reported
        return None
    if type(body) is not dict:
        return None
    if placed:
        _put_back(body, placed)
    return body, short


def _list_in_steps(raw: bytes) -> tuple[int, int, list[Any]] | None:
    """Return the values of a long list but its last ones, and where they begin and end; None if no
    field has a long list.

    Where a list can be divided is tried: parts that are valid lists are together the values of a
    valid list.
    """
    left_bytes = _MOST_SPENT * LARGE_BYTES
    for opening in _LIST.finditer(raw):
        start = place = opening.end()
        values: list[Any] = []
        between = _DIVIDED.get(opening[1], _COMMA)
        end, some = _part_of_list(raw, place, between)
        while some:
            values += some
            place = end
            end, some = _part_of_list(raw, place, between)
        left_bytes -= end
        if values:
            return start, place, values
        if left_bytes <= 0:
            break
    return None


def _part_of_list(raw: bytes, start: int, between: re.Pattern[bytes]) -> tuple[int, list[Any]]:
    """Return where a list goes on behind its next values, and these; if none are found, how many
    bytes were read."""
    spent_bytes = LARGE_BYTES // 4
    near, far = start + LARGE_BYTES // 2, start + 2 * LARGE_BYTES
    for found in islice(between.finditer(raw, near, far), _MOST_TRIES):
        try:
            some: list[Any] = orjson.loads(b"[%b]" % raw[start : found.start(1)])
            return (found.end(), some) if some else (spent_bytes, some)
        except orjson.JSONDecodeError as broken:
            spent_bytes += broken.pos
            if broken.pos < LARGE_BYTES // 8:  # the list ends there
                break
    return spent_bytes, []


def _text_in_steps(raw: bytes, start: int, end: int) -> str:
    """Return the text that raw bytes from `start` to `end` mean. Raises JSONDecodeError."""
    pieces: list[str] = []
    while start < end:
        stop = end
        if end - start > LARGE_BYTES:
            near, far = start + LARGE_BYTES // 2, start + LARGE_BYTES
            if (found := _BETWEEN.search(raw, near, far)) is not None:
                stop = found.end()
            elif (found := _BEFORE_ESCAPE.search(raw, near, far)) is not None:
                stop = found.start()
        pieces.append(orjson.loads(b'"%b"' % raw[start:stop]))
        start = stop
    return "".join(pieces)


def _put_back(body: JsonObject, placed: dict[str, str | list[Any]]) -> None:
    """Replace the placeholders in a body: in a list, a list by its values."""
    left: list[Any] = [body]
    while left and placed:
        value = left.pop()
        first = value[0] if type(value) is list and value else None
        if type(first) is str and type(values := placed.get(first)) is list:
            value[:1] = values
            del placed[first]
        for key, inner in _entries(value):
            sort = type(inner)
            if sort is str:
                if inner in placed:
                    value[key] = placed.pop(inner)
            elif sort is dict or sort is list:
                left.append(inner)


def _entries(value: Any) -> Iterable[tuple[Any, Any]]:
    """Return the entries of an object or a list; none of a long one with numbers alone."""
    if len(value) > _FEW:
        inner = value.values() if type(value) is dict else value
        if _WITH_TEXT.isdisjoint(map(type, inner)):
            return ()
    items: Iterable[tuple[Any, Any]] = value.items() if type(value) is dict else enumerate(value)
    return items


_FEW = 100
_WITH_TEXT = frozenset((str, dict, list))
_ENDS_CHARS = 8_192


def shorten(body: JsonObject) -> None:
    """Replace each long text in a parsed body by its ends and its length."""
    left: list[Any] = [body]
    while left:
        value = left.pop()
        for key, inner in _entries(value):
            sort = type(inner)
            if sort is str:
                if len(inner) > LARGE_BYTES:
                    ends = inner[:_ENDS_CHARS], inner[-_ENDS_CHARS:]
                    value[key] = f"{ends[0]}~{len(inner)}~{ends[1]}"
            elif sort is dict or sort is list:
                left.append(inner)


_JSON_OR_FORM = "JSON; on paths of files multipart/form-data; boundary=... with a form"


def parsed(body: bytes) -> JsonObject:
    """Return the body as a JSON object. Raises InvalidRequest and PayloadTooLarge."""
    check_parts(body)
    if len(body) > LARGE_BYTES and (found := _parsed_in_steps(body)) is not None:
        return found[0]
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as broken:
        if body.lstrip()[:2] == b"--":  # the boundary of a form
            begins = (
                "the body is not JSON: it is a form, whose Content-Type must be multipart/form-data"
            )
            raise InvalidRequest("Content-Type", begins, allowed=_JSON_OR_FORM) from None
        why = "it is not UTF-8 without a byte order mark" if "UTF-8" in str(broken) else broken
        raise InvalidRequest("body", f"the body is not JSON: {why}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("body", "the body is not a JSON object", allowed="a JSON object")
    return value


# The kept beginning of a file's text: its type, and enough to read a picture's size from.
_KEPT_BYTES = 2 * HEAD_CHARS
_LONGEST_TYPE_BYTES = 1_000
_BYTES_A_TEXT = 4_096  # in a body with more texts than that, only the first ones are checked
_FIELDS = frozenset(
    (
        *(b'"url"', b'"image_url"', b'"document_url"', b'"data"', b'"file_data"', b'"bytes"'),
        b'"input_audio"',
    )
)
# Characters that JSON forbids in a text, as far as one search finds them.
_FORBIDDEN = (b"\\", b"\0", b"\t", b"\n", b"\r")


class Skimmed(NamedTuple):
    """A body without the contents of its files. `raw`: its bytes, with placeholders for these and
    for long texts. `body`: the object, with its long texts. `whole`: the full text of each file's
    placeholder."""

    raw: bytes
    body: JsonObject
    whole: Mapping[str, Sized] = NOTHING_SHORTENED


@dataclass(frozen=True, slots=True)
class FileText:
    """The content of a text in a body, from `start` to `end`, all in ASCII."""

    raw: bytes
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return self.raw[self.start : self.end].decode("ascii")


def skimmed(raw: bytes) -> Skimmed:
    """Parse a body, a large one without its files. Raises InvalidRequest and PayloadTooLarge."""
    if len(raw) <= LARGE_BYTES:
        return Skimmed(raw, parsed(raw))
    files: Mapping[str, Sized] = NOTHING_SHORTENED
    found = _without_files(raw)
    # Twice the count, since the first entry of each list and object has no comma.
    if found is not None and 2 * count_in(found[0], b",", b"[", b"{") <= MOST_WALKED:
        raw, files = found
    check_parts(raw)
    if len(raw) > LARGE_BYTES and (read := _parsed_in_steps(raw)) is not None:
        return Skimmed(read[1], read[0], files)
    return Skimmed(raw, parsed(raw), files)


def _without_files(raw: bytes) -> tuple[bytes, dict[str, FileText]] | None:
    """Return the body with placeholders for the texts of files; None if there are none."""
    pieces: list[bytes] = []
    files: dict[str, FileText] = {}
    done = 0
    for start, end in _files(raw):
        head = raw[start : start + _KEPT_BYTES]
        mark = f"~{_MARK}{len(files)}"
        files[head.decode("ascii") + mark] = FileText(raw, start, end)
        pieces += raw[done:start], head, mark.encode()
        done = end
    if not files:
        return None
    return b"".join([*pieces, raw[done:]]), files


def _files(raw: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the texts of files begin and end, as far as the search goes."""
    all_ascii = raw.isascii()
    for key, start, end in _long_texts(raw, _KEPT_BYTES):
        if key in _FIELDS and _is_plain(raw, start, end, all_ascii) and _is_typed(raw, start):
            yield start, end


def _long_texts(raw: bytes, most_bytes: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield where texts of more than `most_bytes` begin and end, as far as the search goes, each
    with its key in quotes if it is the value of a field, otherwise without one."""
    place, key = 0, b""
    for _ in range(len(raw) // _BYTES_A_TEXT):
        if (start := raw.find(b'"', place) + 1) == 0 or (end := _end_of(raw, start)) < 0:
            return
        if end - start > most_bytes:
            is_value = raw[place : start - 1].strip() == b":"
            yield key if is_value else b"", start, end
            key = b""
        else:
            key = raw[start - 1 : end + 1]
        place = end + 1


def _end_of(raw: bytes, start: int) -> int:
    """Return where the text that begins at `start` ends; -1 if it does not end."""
    end = raw.find(b'"', start)
    if end <= start or raw[end - 1 : end] != _BACKSLASH:
        return end
    while start < len(raw):
        step = _without_escapes(raw, start)
        if (end := step.find(b'"')) >= 0:
            return start + end
        start += len(step)
    return -1


def _is_plain(raw: bytes, start: int, end: int, all_ascii: bool) -> bool:
    """Return whether all parsers read a text as it is written."""
    if any(raw.find(one, start, end) >= 0 for one in _FORBIDDEN):
        return False
    return all_ascii or raw[start:end].isascii()


def _is_typed(raw: bytes, start: int) -> bool:
    """Return whether the type of a data URL is in the kept beginning."""
    if raw[start : start + 5] != b"data:":
        return True
    return raw.find(b",", start, start + _LONGEST_TYPE_BYTES) >= 0
