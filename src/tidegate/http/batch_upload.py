"""The upload of a batch's input: a multipart form of OpenAI's SDK, taken apart while it arrives.

Invariant: the file goes to the disk as it comes and is bounded; nothing of it is left when the
form is not sound.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tidegate.errors import InvalidRequest, PayloadTooLarge
from tidegate.http.body import Body, count_in
from tidegate.http.incoming import Hold
from tidegate.http.multipart import (
    MAX_PART_HEADER_BYTES,
    MAX_PART_HEADERS,
    SLICE_BYTES,
    boundary_of,
)
from tidegate.http.spool import Spool

MOST_BYTES = 200_000_000
OVERHEAD_BYTES = 65_536
FORM_BYTES = MOST_BYTES + OVERHEAD_BYTES
_LONGEST_VALUE_BYTES = 200
_FIELDS = ("purpose", "file")


@dataclass(slots=True)
class Uploaded:
    """`spool` has the file. `close` removes it."""

    spool: Spool
    name: str = ""
    lines: int = 0
    values: dict[str, str] = field(default_factory=dict)
    has_file: bool = False
    ends_open: bool = False

    @property
    def all_lines(self) -> int:
        """With the last one, which may have no end."""
        return self.lines + self.ends_open


async def read_upload(body: Body, content_type: str, uploaded: Uploaded, hold: Hold) -> None:
    """Fill `uploaded`, and count in `hold` what of it is in memory. Raises InvalidRequest and its
    kin, QueueFull and StoreUnavailable."""
    if not content_type.startswith("multipart/form-data"):
        raise InvalidRequest("file", "a file is sent as a form", allowed="multipart/form-data")
    reader = _Reader(boundary_of(content_type), uploaded)
    while (piece := await body.next()) is not None:
        for at in range(0, len(piece), SLICE_BYTES):
            await reader.take(piece[at : at + SLICE_BYTES])
        count_in(hold, uploaded.spool.held_bytes)
    if not reader.ended:
        raise InvalidRequest("body", "the multipart body ends before its closing boundary")
    if not uploaded.has_file:
        raise InvalidRequest("file", "there is no file", allowed="a file of JSON lines")
    await uploaded.spool.finish()


class _Reader:
    def __init__(self, boundary: bytes, uploaded: Uploaded) -> None:
        self.ended = False
        self._uploaded = uploaded
        self._pieces: list[bytes] = []
        self._header, self._said = bytearray(), bytearray()
        self._disposition = b""
        self._field = ""
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._part_data,
                    "on_end": self._end,
                },
                max_header_count=MAX_PART_HEADERS,
                max_header_size=MAX_PART_HEADER_BYTES,
            )
        except FormParserError as unfit:
            raise InvalidRequest("Content-Type", f"unfit boundary: {unfit}") from None

    async def take(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as malformed:
            raise InvalidRequest("body", f"malformed multipart body: {malformed}") from None
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            if self._uploaded.spool.size_bytes + len(piece) > MOST_BYTES:
                raise PayloadTooLarge(
                    "file",
                    f"the file is larger than {MOST_BYTES} bytes",
                    allowed=f"a file of at most {MOST_BYTES} bytes",
                )
            self._uploaded.lines += piece.count(b"\n")
            self._uploaded.ends_open = not piece.endswith(b"\n")
            await self._uploaded.spool.write(piece)

    def _part_begins(self) -> None:
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._said += data[start:end]

    def _header_ends(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._said)
        self._header.clear()
        self._said.clear()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        uploaded = self._uploaded
        if name not in _FIELDS:
            shown = ascii(name[:64])
            raise InvalidRequest(
                name[:64] or "body", f"there is no field {shown} here", allowed=", ".join(_FIELDS)
            )
        if name in uploaded.values or (name == "file" and uploaded.has_file):
            raise InvalidRequest(name, f"{name!r} is there more than once")
        self._field = name
        if name == "file":
            uploaded.has_file = True
            given = options.get(b"filename", b"file.jsonl").decode("utf-8", "replace")
            uploaded.name = Path(given.replace("\\", "/")).name[:200] or "file.jsonl"
        else:
            uploaded.values[name] = ""

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == "file":
            self._pieces.append(data[start:end])
            return
        said = self._uploaded.values[self._field] + data[start:end].decode("utf-8", "replace")
        if len(said) > _LONGEST_VALUE_BYTES:
            raise PayloadTooLarge(self._field, f"{self._field!r} is too long")
        self._uploaded.values[self._field] = said

    def _end(self) -> None:
        self.ended = True
