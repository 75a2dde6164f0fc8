"""Forms: fields of a multipart body that admission needs, read part by part. Pure.

    --boundary                      one delimiter, which occurs nowhere else
    Content-Disposition: ...        `name` once, plain; a `filename` makes it a file
    Content-Type: ...               no multipart of its own, no other encoding
                                    content: a text is kept, of a file its beginning

Servers differ in reading a form that is not plain: which of two fields with one name counts, what a
name with escapes means, whether a part is decoded. A form in which admission and the provider could
read different values is rejected; unknown fields and files are forwarded unchanged.

Invariants: the kept part of a form is bounded, whatever its size; a recording never counts as
shorter than its bytes allow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import ceil
from typing import Any, BinaryIO, Protocol
from urllib.parse import unquote

from tinytag import TinyTag, TinyTagException

from tidegate.admission.estimator import (
    Learning,
    Modality,
    Rules,
    input_pieces,
    pieces_of_file,
)
from tidegate.call import Kind
from tidegate.dialects.requests import admission_field
from tidegate.dialects.spec import Endpoint, Operation, RequestFacts
from tidegate.errors import InvalidRequest, PayloadTooLarge

MOST_PARTS = 1_000
MOST_TEXT_BYTES = 1_000_000  # of all text fields together
_HEAD_BYTES = 65_536  # enough to read a picture's size from
_MOST_HEADS = 16
# By RFC 2046, section 5.1.1.
_FORM_TYPE = re.compile(
    rb"multipart/form-data\s*;\s*boundary="
    rb"""(?:"([\w'()+,./:=? -]{0,69}[\w'()+,./:=?-])"|([\w'+.:-]{1,70}))"""
    rb"\s*(?:;\s*charset=[\w-]+\s*)?",
    re.IGNORECASE | re.ASCII,
)
_DISPOSITION = re.compile(rb"\s*form-data\s*((?:;.*)?)", re.IGNORECASE | re.DOTALL)
# A backslash in quotes is an escape for some servers, and a character for others.
_OPTION = rb"\s*;\s*([\w*.-]+)\s*=\s*(?:%b|([^\s;\"]+))"
_ESCAPING = re.compile(_OPTION % rb'"((?:[^"\\]|\\.)*)"', re.DOTALL | re.ASCII)
_LITERAL = re.compile(_OPTION % rb'"([^"]*)"', re.DOTALL | re.ASCII)
_CHARSET = re.compile(rb"charset\s*=\s*\"?([\w.:-]+)", re.IGNORECASE)
_UTF_8 = frozenset((b"utf-8", b"utf8", b"us-ascii", b"ascii"))
_ALLOWED_DISPOSITION = 'form-data; name="...", and for a file filename="..."'
_BOOLEANS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class FormFile:
    """A file in a form: where its content is in the body, and the beginning of it. `seconds`:
    length of a recording; 0 for any other file."""

    field: str
    mime_type: str
    start: int
    end: int
    head: bytes = b""
    seconds: int = 0

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class MediaForm:
    """The contents of a form.

    fields: its texts; those that admission reads are converted as if from JSON, and a repeated name
    has a list. model_at: where the model's name is in the body. digest: of the parts, independent
    of the boundary; empty unless requested.
    """

    fields: Mapping[str, Any]
    files: tuple[FormFile, ...]
    boundary: bytes
    size_bytes: int
    model_at: tuple[int, int] | None
    digest: bytes = b""


def is_form(content_type: bytes) -> bool:
    """Return whether a body is multipart, however correctly its type describes it."""
    return content_type[:100].lstrip().lower().startswith(b"multipart/")


def boundary_in(content_type: bytes) -> bytes:
    """Return the boundary that a Content-Type names. Raises InvalidRequest if servers could
    disagree on it."""
    found = _FORM_TYPE.fullmatch(content_type.strip())
    if found is None:
        raise InvalidRequest(
            "Content-Type",
            "this is not multipart/form-data with one boundary",
            allowed="multipart/form-data; boundary=...; let your HTTP client write this header",
        )
    return found[1] or found[2]


class MediaFormReader:
    """Reads the parts of a form in order: call `begin`, `data` for each piece, and `end` for each
    part; then `form`. All raise InvalidRequest and PayloadTooLarge."""

    def __init__(self, boundary: bytes, *, digests: bool = False) -> None:
        self.held_bytes = 0
        self._boundary = boundary
        self._whole = sha256() if digests else None
        self._part = sha256()
        self._count = 0
        self._name = ""
        self._head = b""  # headers of the part, for the digest
        self._mime = b""
        self._is_file = False
        self._buffer = bytearray()
        self._size_bytes = 0
        self._fields: dict[str, Any] = {}
        self._files: list[tuple[int, FormFile]] = []
        self._model: tuple[int, int] | None = None

    def begin(self, headers: Mapping[str, bytes]) -> None:
        """Begin a part with these headers, by lower-case name."""
        self._count += 1
        if self._count > MOST_PARTS:
            allowed = f"at most {MOST_PARTS} parts"
            raise PayloadTooLarge("body", "the form has too many parts", allowed=allowed)
        disposition = headers.get("content-disposition", b"")
        self._name, self._is_file = _named(disposition)
        self._mime = headers.get("content-type", b"").strip().lower()
        if is_form(self._mime):
            message = f"the part {self._name[:64]!a} is a multipart body of its own"
            raise InvalidRequest("body", message, allowed="one field or file in each part")
        self._check_read(headers)
        self._buffer.clear()
        self._size_bytes = 0
        if self._whole is not None:
            self._head, self._part = disposition + b"\0" + self._mime, sha256()

    def _check_read(self, headers: Mapping[str, bytes]) -> None:
        """Check a field that admission reads: it must be plainly named, occur once, and be a
        text."""
        name = self._name
        # Some servers decode names, or read lists and objects from them.
        known = admission_field(unquote(name).partition("[")[0].strip())
        if name == "_charset_":
            known = name
        if known is None:
            return
        if known != name:
            message = (
                f"{name[:64]!a} is {known} in another spelling, which servers read differently"
            )
            raise InvalidRequest(known, message, allowed=known)
        if self._is_file:
            raise InvalidRequest(
                known, f"{known} is a file of the form", allowed="a text field, without filename"
            )
        if name in self._fields:
            raise InvalidRequest(name, f"{name} is named more than once", allowed=f"one {name}")
        charset = _CHARSET.search(self._mime)
        if charset is not None and charset[1] not in _UTF_8:
            raise InvalidRequest(name, f"{name} is not in UTF-8", allowed="UTF-8")
        if name == "model" and "content-length" in headers:
            message = "the part of model has a length of its own, which its new name would change"
            raise InvalidRequest(name, message, allowed="a part without Content-Length")

    def data(self, piece: bytes) -> None:
        """Add a piece of the part's content."""
        self._size_bytes += len(piece)
        if self._whole is not None:
            self._part.update(piece)
        if self._is_file:
            room = _HEAD_BYTES - len(self._buffer) if len(self._files) < _MOST_HEADS else 0
            self._append(piece[:room])
            return
        self._append(piece)
        if self.held_bytes > MOST_TEXT_BYTES + _MOST_HEADS * _HEAD_BYTES:
            name = self._name[:64]
            allowed = f"at most {MOST_TEXT_BYTES} bytes, and a filename for a file"
            message = f"the text fields of the form are too large, up to {name!a}"
            raise PayloadTooLarge("body", message, allowed=allowed)

    def _append(self, piece: bytes) -> None:
        self._buffer += piece
        self.held_bytes += len(piece)

    def end(self) -> None:
        """End the part."""
        name, place = self._name, self._count - 1
        if self._whole is not None:
            self._whole.update(b"%d\0%b\0" % (len(self._head), self._head) + self._part.digest())
        if self._is_file:
            mime = self._mime.partition(b";")[0].decode("latin-1")
            file = FormFile(name, mime, 0, self._size_bytes, bytes(self._buffer))
            self._files.append((place, file))
            return
        value = _value(name, bytes(self._buffer))
        if name == "_charset_" and str(value).encode().lower() not in _UTF_8:
            raise InvalidRequest(name, "the form is not in UTF-8", allowed="utf-8")
        if name == "model":
            self._model = place, self._size_bytes
        if name in self._fields:
            held = self._fields[name]
            self._fields[name] = [*held, value] if type(held) is list else [held, value]
        else:
            self._fields[name] = value

    def form(self, starts: list[int], size_bytes: int) -> MediaForm:
        """Return the form after its last part. starts: where the content of each part begins in the
        body, negative for a part without content."""
        model = None
        if self._model is not None:
            place, length = self._model
            model = starts[place], starts[place] + length
        files = [
            replace(file, start=(start := max(0, starts[place])), end=start + file.size_bytes)
            for place, file in self._files
        ]
        digest = b"" if self._whole is None else self._whole.digest()
        return MediaForm(self._fields, tuple(files), self._boundary, size_bytes, model, digest)


def _named(disposition: bytes) -> tuple[str, bool]:
    """Return the name of a part, and whether it is a file. Raises InvalidRequest if servers could
    read another name."""
    found = _DISPOSITION.fullmatch(disposition)
    first = None if found is None else _options(_ESCAPING, found[1])
    second = None if found is None else _options(_LITERAL, found[1])
    if first is not None and second is not None:
        name = first.get(b"name")
        agree = first.keys() == second.keys() and name == second.get(b"name")
        if agree and name and b"\\" not in name and b"name*" not in first:
            try:
                text = name.decode()
            except UnicodeDecodeError:
                text = "\0"
            if text.isprintable():
                return text, b"filename" in first or b"filename*" in first
    message = "the name of a part of the form is missing or not valid"
    raise InvalidRequest("Content-Disposition", message, allowed=_ALLOWED_DISPOSITION)


def _options(pattern: re.Pattern[bytes], text: bytes) -> dict[bytes, bytes] | None:
    """Return the options of a Content-Disposition; None if they are malformed or one is
    repeated."""
    found: dict[bytes, bytes] = {}
    place, end = 0, len(text.rstrip(b" \t;"))
    while place < end:
        one = pattern.match(text, place, end)
        if one is None or (name := one[1].lower()) in found:
            return None
        found[name] = one[2] if one[2] is not None else one[3]
        place = one.end()
    return found


def _value(name: str, content: bytes) -> Any:
    """Return the value of a text field, converted for admission as if it came from JSON."""
    known = admission_field(name)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        if known is not None:
            raise InvalidRequest(name, f"{name} is not in UTF-8", allowed="UTF-8") from None
        return content.decode("latin-1")
    if known == "stream":
        if (value := _BOOLEANS.get(text.lower())) is None:
            message = "stream is neither true nor false"
            raise InvalidRequest("stream", message, allowed="true or false")
        return value
    if known == "model" and (not text.isprintable() or text != text.strip()):
        raise InvalidRequest("model", "invalid model name", allowed="a name")
    if known is not None and text.isdecimal() and len(text) < 10:
        return int(text)
    return text


def is_prose(content_type: str | None) -> bool:
    """Return whether a transcript is plain text: it may contain any text of the client, and reports
    no usage."""
    if content_type is None:
        return False
    kind = content_type.partition(";")[0].lower()
    return "json" not in kind and "event-stream" not in kind


def with_files(
    facts: RequestFacts, form: MediaForm, endpoint: Endpoint, rules: Rules
) -> RequestFacts:
    """Return the facts of a form's fields with those of its files added."""
    if not form.files:
        return facts
    pieces = dict(facts.pieces)
    for file in form.files:
        for modality, tokens in _pieces_of(file, endpoint, rules).items():
            pieces[modality] = pieces.get(modality, 0.0) + tokens
    return replace(
        facts,
        kind=facts.kind if facts.images else Kind.MULTI_MODAL,
        pieces=input_pieces(pieces, learning=Learning.FILES),
        audio_seconds=sum(file.seconds for file in form.files),
    )


def _pieces_of(file: FormFile, endpoint: Endpoint, rules: Rules) -> Mapping[Modality, float]:
    if file.seconds:
        return {Modality.AUDIO: file.seconds * rules.audio_second}
    # Clients also send pictures as application/octet-stream.
    mime = "image/*" if endpoint.operation is Operation.IMAGES else file.mime_type
    return pieces_of_file(mime or "application/octet-stream", file.head, file.size_bytes, rules)


# For a recording of unknown length, such as a browser's in WebM: 32 kbit/s, which is low for
# speech.
_USUAL_BYTES_A_SECOND = 4_000
# The largest data rates: of MP3 and Ogg; any other file may be uncompressed, or a film.
_MOST_COMPRESSED, _MOST_BYTES_A_SECOND = 64_000, 600_000
_COMPRESSED = (b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"OggS")
_MOST_SECONDS = 86_400 * 7


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...

    def seek(self, offset: int, whence: int = 0, /) -> int: ...


_MOST_READS = 50_000


class FileSection:
    """A part of a file as a file of its own. The number of reads is bounded, so that no content can
    keep a parser busy. Blocks."""

    def __init__(self, file: _Readable, start: int, end: int) -> None:
        self._file = file
        self._start = start
        self._size = end - start
        self._place = 0
        self._reads = 0

    def read(self, size: int = -1) -> bytes:
        self._count()
        left = max(0, self._size - self._place)
        self._file.seek(self._start + self._place)
        data = self._file.read(left if size < 0 else min(size, left))
        self._place += len(data)
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        self._count()
        base = (0, self._place, self._size)[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._place = base + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def _count(self) -> None:
        self._reads += 1
        if self._reads > _MOST_READS:
            raise ValueError("too many reads")


def recording_seconds(file: Any, start: int, end: int) -> int:
    """Return the length of a recording within a file: by its header, but at least what its bytes
    allow; by its size if the header cannot be read. Blocks."""
    size_bytes = end - start
    section: Any = FileSection(file, start, end)
    head = section.read(12)
    is_compressed = head.startswith(_COMPRESSED)
    least = size_bytes / (_MOST_COMPRESSED if is_compressed else _MOST_BYTES_A_SECOND)
    section.seek(0)
    seconds = _stated_seconds(section)
    if seconds is None:
        seconds = size_bytes / _USUAL_BYTES_A_SECOND
    return max(1, ceil(min(_MOST_SECONDS, max(seconds, least))))


def _stated_seconds(section: BinaryIO) -> float | None:
    try:
        found = TinyTag.get(file_obj=section, tags=False).duration
    except (TinyTagException, ValueError):
        return None
    # Excludes NaN and a missing duration.
    return found if found is not None and 0 < found < _MOST_SECONDS else None
