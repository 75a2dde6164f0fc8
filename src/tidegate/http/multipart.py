"""A multipart form taken apart while it arrives, with every limit in force as it does.

Invariant: at most one small slice of a body is held in memory beyond what the form's texts and
the spools keep; the first byte, part or file over a limit ends the reading.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tidegate.config import Config
from tidegate.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia
from tidegate.http.body import Body, count_in
from tidegate.http.fields import (
    FIELDS,
    FILE_FIELDS,
    PROMPT_FIELDS,
    check_known,
    too_long,
)
from tidegate.http.filetypes import TypeCheck, safe_name
from tidegate.http.incoming import Hold
from tidegate.http.spool import Spool

SLICE_BYTES = 64 * 1024
MAX_VALUE_BYTES = 8192
MAX_PART_HEADERS = 8
MAX_PART_HEADER_BYTES = 4096

# It warns of each malformed body, with the caller's bytes; our own error says it already.
logging.getLogger("python_multipart").setLevel(logging.ERROR)


@dataclass(slots=True)
class Upload:
    """One file of a form: `spool` holds its bytes."""

    name: str
    spool: Spool
    check: TypeCheck
    mime_type: str = ""


@dataclass(slots=True)
class Form:
    """The parts of a form so far. `close` removes the uploads' files."""

    values: dict[str, str] = field(default_factory=dict)
    uploads: list[Upload] = field(default_factory=list)

    @property
    def held_bytes(self) -> int:
        """What of it is in memory."""
        texts = sum(map(len, self.values.values()))
        return texts + sum(upload.spool.held_bytes for upload in self.uploads)

    async def close(self) -> None:
        for upload in self.uploads:
            await upload.spool.close()


@dataclass(frozen=True, slots=True)
class _Head:
    """A part's headers, by lower-case name."""

    headers: Mapping[str, bytes]


_Piece = _Head | bytes | None  # of a part: its head, some of its content, its end


def boundary_of(content_type: str) -> bytes:
    """Raises InvalidRequest when the header has none."""
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise InvalidRequest(
            "Content-Type",
            "multipart/form-data without a boundary",
            allowed="multipart/form-data; boundary=...; let your HTTP client write this header",
        )
    return boundary


class MultipartReader:
    """Reads one body into a `Form` that the caller closes, whatever happens."""

    def __init__(self, boundary: bytes, config: Config, folder: Path) -> None:
        self._config = config
        self._folder = folder
        self._pieces: list[_Piece] = []
        self._headers: dict[str, bytes] = {}
        self._name = bytearray()
        self._value = bytearray()
        self._parts = 0
        self._ended = False
        self._field: str | None = None
        self._text = bytearray()
        self._upload: Upload | None = None
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": lambda: self._pieces.append(None),
                    "on_end": self._on_end,
                },
                max_header_count=MAX_PART_HEADERS,
                max_header_size=MAX_PART_HEADER_BYTES,
            )
        except FormParserError as unfit:
            raise InvalidRequest("Content-Type", f"unfit boundary: {unfit}") from None

    async def read(self, body: Body, form: Form, hold: Hold | None = None) -> None:
        """Fill `form`, and count in `hold` what of it is in memory. Raises InvalidRequest and its
        kin at the first thing wrong, and QueueFull."""
        while (chunk := await body.next()) is not None:
            for at in range(0, len(chunk), SLICE_BYTES):
                self._parse(chunk[at : at + SLICE_BYTES])
                for piece in self._pieces:
                    await self._take(piece, form)
                self._pieces.clear()
            count_in(hold, form.held_bytes + len(self._text))
            # A body that is all there already must not hold the loop to its end.
            await asyncio.sleep(0)
        if body.received_bytes == 0:
            raise InvalidRequest("body", "the body is empty")
        if not self._ended:
            raise InvalidRequest("body", "the multipart body ends before its closing boundary")

    def _parse(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as malformed:
            raise InvalidRequest("body", f"malformed multipart body: {malformed}") from None

    # What the parser calls while it parses one slice.

    def _on_part_begin(self) -> None:
        self._headers = {}
        self._parts += 1
        if self._parts > len(FIELDS) + self._config.max_files + 1:
            raise self._too_many_files()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._name.decode("ascii", "replace").lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        self._pieces.append(_Head(self._headers))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _on_end(self) -> None:
        self._ended = True

    # What is done with the pieces afterwards.

    async def _take(self, piece: _Piece, form: Form) -> None:
        if isinstance(piece, _Head):
            self._begin(piece.headers, form)
        elif piece is None:
            await self._end(form)
        elif self._upload is not None:
            await self._take_file(piece, self._upload, form)
        elif self._field is not None:
            self._take_text(piece, self._field)

    def _begin(self, headers: Mapping[str, bytes], form: Form) -> None:
        kind, options = parse_options_header(headers.get("content-disposition"))
        if kind != b"form-data" or not options.get(b"name"):
            raise InvalidRequest("body", "a part of the multipart body has no name")
        encoding = headers.get("content-transfer-encoding", b"binary").strip().lower()
        if encoding not in (b"7bit", b"8bit", b"binary"):
            raise InvalidRequest("body", "parts with a Content-Transfer-Encoding are not taken")
        name = options[b"name"].decode("utf-8", "replace")
        if name in FILE_FIELDS and b"filename" in options:
            said = headers.get("content-type", b"").decode("latin-1")
            self._begin_file(name, options[b"filename"].decode("utf-8", "replace"), said, form)
            return
        check_known(name)
        if b"filename" in options:
            raise InvalidRequest(
                name,
                f"{name!r} must be a text, not a file",
                allowed=f"files are sent as {' or '.join(FILE_FIELDS)}",
            )
        if name in form.values:
            raise InvalidRequest(name, f"{name!r} is there more than once")
        self._field = name

    def _begin_file(self, field: str, raw_name: str, said: str, form: Form) -> None:
        name = safe_name(raw_name.replace("%22", '"')) if raw_name else ""
        check = TypeCheck(name or "file", said, field=field)
        self._upload = Upload(name, Spool(self._folder), check)
        form.uploads.append(self._upload)
        # A browser sends a nameless, empty part for a file that was not chosen.
        if name and len(form.uploads) > self._config.max_files:
            raise self._too_many_files()

    async def _take_file(self, data: bytes, upload: Upload, form: Form) -> None:
        if len(form.uploads) > self._config.max_files:
            raise self._too_many_files()
        limit = self._config.max_file_bytes
        if upload.spool.size_bytes + len(data) > limit:
            raise PayloadTooLarge(
                "file",
                f"{upload.name or 'file'!r} is larger than {limit} bytes",
                allowed=f"files of at most {limit} bytes",
            )
        upload.check.feed(data)
        await upload.spool.write(data)

    def _take_text(self, data: bytes, field: str) -> None:
        self._text += data
        if field in PROMPT_FIELDS:
            # UTF-8 needs at most four bytes for a character; the exact count follows at the end.
            if len(self._text) > self._config.max_prompt_chars * 4:
                raise too_long(field, self._config.max_prompt_chars)
        elif len(self._text) > MAX_VALUE_BYTES:
            raise PayloadTooLarge(field, f"{field!r} is longer than {MAX_VALUE_BYTES} bytes")

    async def _end(self, form: Form) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            if not upload.name and upload.spool.size_bytes == 0:
                form.uploads.remove(upload)
                return
            upload.mime_type = upload.check.finish()
            await upload.spool.finish()
        elif self._field is not None:
            try:
                form.values[self._field] = self._text.decode("utf-8")
            except UnicodeDecodeError:
                raise UnsupportedMedia(
                    self._field, f"{self._field!r} is not text in UTF-8", allowed="UTF-8"
                ) from None
            self._field = None
            self._text.clear()

    def _too_many_files(self) -> PayloadTooLarge:
        limit = self._config.max_files
        return PayloadTooLarge(
            "file", f"more than {limit} files in one request", allowed=f"at most {limit} files"
        )
