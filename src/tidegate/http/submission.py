"""Submission: the checked fields and files of a request, from JSON, form or multipart.

A file's type is decided by its content and compared with the declared one. A job can wrap a
native call (`endpoint` and `body`) that could be relayed immediately.

Invariants: all or nothing: after an error or a cancellation neither a temporary file nor a blob
is left; at most a small slice of a body is in memory beyond its texts; what passes can be stored
in PostgreSQL (no NUL, no lone surrogates) and put in a provider's URL.
"""

from __future__ import annotations

import asyncio
import codecs
import json
import logging
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Never
from urllib.parse import parse_qsl

import anyio
import puremagic
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from tidegate.call import Attachment, Kind, new_id
from tidegate.dialects.requests import check_parts
from tidegate.errors import InvalidRequest, PayloadTooLarge, StoreUnavailable, UnsupportedMedia
from tidegate.http.body import Body, Hold, Pace, Spool, count_in, too_long
from tidegate.settings import Config
from tidegate.spine.native import asked_by, endpoint_named
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.records import NewJob
from tidegate.upstream.fetch import (
    PICTURE_TYPES,
    Address,
    check_uri,
    is_public,
    iso_brands,
    picture_type,
)

PROMPT_FIELDS = ("data", "text")
FIELDS = (
    *PROMPT_FIELDS,
    *("image_uri", "type", "model", "priority", "deadline_ms", "webhook_url", "subject"),
)
FILE_FIELDS = ("file", "files")
MAX_PRIORITY = 100
MAX_DEADLINE_MS = 7 * 86_400_000
MAX_SUBJECT_CHARS = 200

_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class Fields:
    """The values of one request; `prompt` is empty when there was none."""

    prompt: str = ""
    image_uri: str | None = None
    kind: Kind | None = None
    model: str | None = None
    priority: int = 0
    deadline_ms: int | None = None
    webhook_url: str | None = None
    subject: str | None = None


def read_fields(
    values: Mapping[str, Any],
    config: Config,
    *,
    is_allowed: Callable[[Address], bool] = is_public,
) -> Fields:
    """Check `values` by name. None counts as absent. Raises InvalidRequest naming the field."""
    for name in values:
        check_known(name)
    given = {name: value for name, value in values.items() if value is not None}
    return Fields(
        prompt=_prompt(given, config.max_prompt_chars),
        image_uri=_image_uri(given.get("image_uri"), is_allowed),
        kind=_kind(given.get("type")),
        model=_model(given.get("model")),
        priority=_integer("priority", given.get("priority", 0), -MAX_PRIORITY, MAX_PRIORITY),
        deadline_ms=(
            _integer("deadline_ms", given["deadline_ms"], 1, MAX_DEADLINE_MS)
            if "deadline_ms" in given
            else None
        ),
        webhook_url=_webhook_url(given.get("webhook_url"), config),
        subject=_subject(given.get("subject")),
    )


def from_form(pairs: Mapping[str, str]) -> dict[str, Any]:
    """A form's texts as the values that JSON would have: numbers read, empty ones left out."""
    values: dict[str, Any] = {}
    for name, text in pairs.items():
        if name in PROMPT_FIELDS:
            values[name] = text
        elif text.strip():
            is_number = name in ("priority", "deadline_ms") and _INTEGER.fullmatch(text.strip())
            values[name] = int(text) if is_number else text.strip()
        else:
            check_known(name)
    return values


def check_known(name: str) -> None:
    """Refuse a field that we do not know, by name."""
    if name in FIELDS:
        return
    shown = name if name.isprintable() and len(name) <= 64 else ascii(name[:64])
    allowed = ", ".join(FIELDS)
    if name in FILE_FIELDS:
        raise InvalidRequest(
            name,
            f"{name!r} must be a file, sent as multipart/form-data with a file name",
            allowed=f"curl -F '{name}=@path'; values are {allowed}",
        )
    raise InvalidRequest(shown, f"there is no field {shown!r}", allowed=allowed)


def field_too_long(field: str, limit: int) -> PayloadTooLarge:
    """The prompt in `field` is over its limit."""
    return PayloadTooLarge(
        field,
        f"{field!r} is longer than {limit} characters",
        allowed=f"a prompt of at most {limit} characters",
    )


def _prompt(given: Mapping[str, Any], limit: int) -> str:
    if all(name in given for name in PROMPT_FIELDS):
        raise InvalidRequest("text", "'data' and 'text' mean the same: send one of them")
    for name in PROMPT_FIELDS:
        if name in given:
            prompt = _text(name, given[name])
            if len(prompt) > limit:
                raise field_too_long(name, limit)
            return prompt if prompt.strip() else ""
    return ""


def _text(field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(field, f"{field!r} must be a text, not {_json_name(value)}")
    if "\0" in value:
        raise InvalidRequest(field, f"{field!r} has a NUL character in it")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(
            field, f"{field!r} has half of a surrogate pair in it", allowed="text in Unicode"
        ) from None
    return value


def _kind(value: Any) -> Kind | None:
    if value is None:
        return None
    try:
        return Kind(_text("type", value))
    except ValueError:
        raise InvalidRequest(
            "type", f"there is no type {value[:64]!r}", allowed=", ".join(Kind)
        ) from None


def _model(value: Any) -> str | None:
    if value is None:
        return None
    name = _text("model", value)
    if len(name) > 128 or not _MODEL.fullmatch(name):
        raise InvalidRequest(
            "model",
            f"{name[:64]!r} is not a model's name",
            allowed="letters, digits, '.', '_', '-', and '/' between them; at most 128",
        )
    return name


def _integer(field: str, value: Any, lowest: int, highest: int) -> int:
    allowed = f"a whole number from {lowest} to {highest}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequest(field, f"{field!r} must be a whole number", allowed=allowed)
    if not lowest <= value <= highest:
        raise InvalidRequest(field, f"{field!r} is out of range", allowed=allowed)
    return value


def _image_uri(value: Any, is_allowed: Callable[[Address], bool]) -> str | None:
    if value is None:
        return None
    uri = _text("image_uri", value)
    check_uri(uri, is_allowed)
    return uri


def _webhook_url(value: Any, config: Config) -> str | None:
    if value is None:
        return None
    url = _text("webhook_url", value)
    if config.webhook_secret is None:
        raise InvalidRequest(
            "webhook_url", "webhooks are off here", allowed="none while WEBHOOK_SECRET is not set"
        )
    private = config.webhook_allow_private
    check_uri(url, lambda address: private or is_public(address), field="webhook_url")
    return url


def _subject(value: Any) -> str | None:
    if value is None:
        return None
    subject = _text("subject", value).strip()
    if not 1 <= len(subject) <= MAX_SUBJECT_CHARS or not subject.isprintable():
        allowed = f"1 to {MAX_SUBJECT_CHARS} printable characters"
        raise InvalidRequest("subject", f"'subject' must be {allowed}", allowed=allowed)
    return subject


def _json_name(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "an object")


HEAD_BYTES = 4096
MAX_NAME_CHARS = 128
ALLOWED = (
    "PNG, JPEG, WebP, GIF and HEIC/HEIF images; PDF; text, Markdown, CSV, HTML, JSON, XML and "
    "source code in UTF-8; MP3, WAV, Ogg, FLAC and AAC audio; MP4, MOV, WebM and MPEG video"
)

_UNSAID = {"", "application/octet-stream", "binary/octet-stream", "*/*", "application/unknown"}
_ALIASES = {
    "image/jpg": "image/jpeg",
    "image/pjpeg": "image/jpeg",
    "image/x-png": "image/png",
    "image/heic-sequence": "image/heic",
    "image/heif-sequence": "image/heif",
    "application/x-pdf": "application/pdf",
    "audio/mp3": "audio/mpeg",
    "audio/x-mp3": "audio/mpeg",
    "audio/x-mpeg": "audio/mpeg",
    "audio/x-wav": "audio/wav",
    "audio/wave": "audio/wav",
    "audio/vnd.wave": "audio/wav",
    "audio/x-flac": "audio/flac",
    "audio/x-aac": "audio/aac",
    "audio/aacp": "audio/aac",
    "application/ogg": "audio/ogg",
    "audio/opus": "audio/ogg",
    "audio/vorbis": "audio/ogg",
    "audio/webm": "video/webm",
    "video/mov": "video/quicktime",
    "video/mpg": "video/mpeg",
    "video/x-mpeg": "video/mpeg",
    "text/x-markdown": "text/markdown",
    "text/xml": "application/xml",
    "text/json": "application/json",
    "application/csv": "text/csv",
}
_BINARY = {
    *PICTURE_TYPES,
    "application/pdf",
    *("audio/mpeg", "audio/wav", "audio/ogg", "audio/flac", "audio/aac"),
    *("video/mp4", "video/quicktime", "video/webm", "video/mpeg"),
}
# Said of one container, borne out by another: tools mix these up, providers do not care.
_ALSO = {
    "image/heic": {"image/heif"},
    "image/heif": {"image/heic"},
    "video/mp4": {"video/quicktime"},
    "video/quicktime": {"video/mp4"},
    # An ID3 tag in front hides what follows it.
    "audio/aac": {"audio/mpeg"},
    "audio/flac": {"audio/mpeg"},
}
_TEXT_TYPES = {
    "text/plain",
    "text/markdown",
    "text/csv",
    "text/html",
    "application/json",
    "application/xml",
}
# Other names for text that the provider knows only as plain text.
_TEXTUAL = re.compile(
    r"text/[a-z0-9.+_-]+|application/(x-)?(javascript|ecmascript|typescript|yaml|toml|sql|sh|shellscript|"
    r"python|python-code|httpd-php|ruby|perl|tex|latex|ndjson|jsonlines|jsonl|xhtml\+xml|"
    r"[a-z0-9.+-]+\+json|graphql)"
)
_TEXT_NAMES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".csv": "text/csv",
    ".html": "text/html",
    ".htm": "text/html",
    ".json": "application/json",
    ".xml": "application/xml",
}
# What systems say of text files by their names alone: a spreadsheet's CSV, TypeScript as video.
_MISSAID = {
    ".csv": {"application/vnd.ms-excel"},
    ".ts": {"video/mp2t", "video/vnd.dlna.mpeg-tts", "text/vnd.trolltech.linguist"},
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_NAME_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def safe_name(raw: str) -> str:
    """A file's name for records and messages: no folders, no control characters, <= 128 long."""
    name = _NAME_CONTROL.sub("", raw.replace("\\", "/")).encode("utf-8", "replace").decode()
    name = name.rsplit("/", 1)[-1].strip()
    if name in ("", ".", ".."):
        return "file"
    if len(name) <= MAX_NAME_CHARS:
        return name
    suffix = PurePosixPath(name).suffix[:16]
    return name[: MAX_NAME_CHARS - len(suffix)] + suffix


def content_type_of(head: bytes) -> str | None:
    """The supported binary type whose signature `head` bears, or None."""
    if picture := picture_type(head):
        return picture
    if head.lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"%PDF-"):
        return "application/pdf"
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return "audio/wav"
    if head.startswith(b"fLaC"):
        return "audio/flac"
    if head.startswith(b"OggS"):
        return None if b"theora" in head[:256] else "audio/ogg"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "video/webm" if b"webm" in head[:128] else None
    if head.startswith((b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3")):
        return "video/mpeg"
    return _iso_video(head) or _mpeg_audio(head)


def _iso_video(head: bytes) -> str | None:
    brands = iso_brands(head)
    if not brands:
        # QuickTime of before 2001 has no brand.
        old = head[4:8] in (b"moov", b"mdat", b"wide") and head[:2] == b"\x00\x00"
        return "video/quicktime" if old else None
    if brands[0] == b"qt  ":
        return "video/quicktime"
    sound_or_picture = brands[0] in (b"M4A ", b"M4B ", b"M4P ", b"avif", b"avis", b"crx ", b"jp2 ")
    if sound_or_picture or {b"avif", b"avis", b"mif1"} & set(brands):
        return None
    return "video/mp4"


def _mpeg_audio(head: bytes) -> str | None:
    if head.startswith((b"ID3\x02", b"ID3\x03", b"ID3\x04")):
        return "audio/mpeg"
    if head.startswith(b"ADIF"):
        return "audio/aac"
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    layer, rate = head[1] >> 1 & 3, head[2] >> 2 & 3
    if layer == 0 and head[1] & 0xF0 == 0xF0:
        return "audio/aac" if head[2] >> 2 & 0xF <= 12 else None
    # Layer I is left out: its first bytes are a UTF-16 byte order mark.
    version_is_known, bitrate_is_known = head[1] >> 3 & 3 != 1, head[2] >> 4 not in (0, 15)
    if layer in (1, 2) and version_is_known and rate != 3 and bitrate_is_known:
        return "audio/mpeg"
    return None


class TypeCheck:
    """Checks one file while it arrives: `feed` each piece, then `finish` for its MIME type.

    Both raise UnsupportedMedia as soon as the content is known to be wrong, which for all but
    text is after the first 4 KB.
    """

    __slots__ = ("_decided", "_decoder", "_field", "_head", "_name", "_said", "_size_bytes")

    def __init__(self, name: str, said: str | None, *, field: str = "file") -> None:
        """`name` is a `safe_name`; `said` is the type that the client gave, if any."""
        said = (said or "").split(";")[0].strip().lower()
        self._name = name
        self._field = field
        self._said = _ALIASES.get(said, said)
        self._head = bytearray()
        self._size_bytes = 0
        self._decided: str | None = None
        self._decoder: codecs.IncrementalDecoder | None = None

    def feed(self, data: bytes) -> None:
        self._size_bytes += len(data)
        if self._decided is not None:
            self._check_text(data)
            return
        self._head += data
        if len(self._head) >= HEAD_BYTES:
            self._decide()

    def finish(self) -> str:
        if self._size_bytes == 0:
            raise UnsupportedMedia(self._field, f"{self._name!r} is empty", allowed=ALLOWED)
        if self._decided is None:
            self._decide()
        if self._decoder is not None:
            self._check_text(b"", last=True)
        assert self._decided is not None
        return self._decided

    def _decide(self) -> None:
        found = content_type_of(bytes(self._head[:HEAD_BYTES]))
        textual = self._text_type()
        if found is None and textual is not None:
            self._decided = textual
            self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
            self._check_text(bytes(self._head))
        elif found is None and self._said in _BINARY:
            raise self._refusal(f"was sent as {self._said}, but {self._its_content()}")
        elif found is None:
            raise self._refusal(f"is {self._said}, which is not supported")
        elif self._said in _UNSAID or found == self._said:
            self._decided = found
        elif found in _ALSO.get(self._said, ()):
            self._decided = self._said if found == "audio/mpeg" else found
        elif textual is not None or self._said in _BINARY:
            raise self._refusal(f"was sent as {self._said}, but its content is {found}")
        else:
            raise self._refusal(f"is {self._said}, which is not supported")
        self._head.clear()

    def _text_type(self) -> str | None:
        """The type that this file has if it is text; None if it is said to be something else."""
        suffix = PurePosixPath(self._name).suffix.lower()
        if self._said in _UNSAID or self._said in _MISSAID.get(suffix, ()):
            return _TEXT_NAMES.get(suffix, "text/plain")
        if self._said in _TEXT_TYPES:
            return self._said
        return "text/plain" if _TEXTUAL.fullmatch(self._said) else None

    def _check_text(self, data: bytes, *, last: bool = False) -> None:
        if self._decoder is None:
            return
        try:
            self._decoder.decode(data, last)
            broken = _CONTROL.search(data) is not None
        except UnicodeDecodeError:
            broken = True
        if not broken:
            return
        if self._said in _UNSAID:
            raise self._refusal(f"is of no type that we know: {self._its_content(data)}")
        raise self._refusal(f"was sent as {self._said}, but {self._its_content(data)}")

    def _its_content(self, data: bytes = b"") -> str:
        try:
            best = puremagic.magic_string(bytes(self._head[:HEAD_BYTES]) or data[:HEAD_BYTES])[0]
        except (puremagic.PureError, ValueError, IndexError):
            return "its content is neither that nor text in UTF-8"
        label = best.name or best.mime_type or best.extension
        return f"its content looks like {label[:80]}" if label else "its content is something else"

    def _refusal(self, problem: str) -> UnsupportedMedia:
        return UnsupportedMedia(self._field, f"{self._name!r} {problem}", allowed=ALLOWED)


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
                raise field_too_long(field, self._config.max_prompt_chars)
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


CONTENT_TYPES = (
    "application/json, multipart/form-data (for files) or application/x-www-form-urlencoded"
)
CLEAN_UP_S = 10.0
_CONTENT_TYPES_KEPT = 64
_PARSED_AT_ONCE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Submission:
    """What a caller asks for. `prompt` may be empty when there is a file or an `image_uri`."""

    prompt: str
    attachments: tuple[Attachment, ...]
    image_uri: str | None
    kind: Kind | None
    model: str | None
    priority: int
    deadline_ms: int | None
    webhook_url: str | None = None
    subject: str | None = None
    digests: tuple[str, ...] = ()  # SHA-256 of each attachment, where they were asked for
    endpoint: str | None = None  # of a native call; `prompt` is then its body, as JSON


@dataclass(frozen=True, slots=True)
class Wrapping:
    """How JSON that names an `endpoint` is taken: `most_bytes` of it, read by `take`."""

    take: Callable[[Mapping[str, Any], Config], Submission]
    most_bytes: int


async def read_submission(
    request: Request,
    config: Config,
    blobs: Blobs,
    *,
    is_allowed: Callable[[Address], bool] = is_public,
    pace: Pace | None = None,
    as_job: bool = False,
    digests: bool = False,
    wrapping: Wrapping | None = None,
    hold: Hold | None = None,
) -> Submission:
    """Read, check and keep one request; what of it is in memory counts in `hold`, which the caller
    gives back.

    `as_job`: whether it is one that others may be told the end of. `digests`: whether to take those
    of its files. `wrapping`: where a JSON body may name an `endpoint`.

    The files of the Submission are in `blobs`; a caller that does not go on to record it deletes
    them. Raises InvalidRequest, PayloadTooLarge, UnsupportedMedia, FetchRefused, RequestTimeout,
    StoreUnavailable, QueueFull, or starlette's ClientDisconnect. A cancelled read leaves nothing
    behind.
    """
    kind = _encoding(request)
    body = Body(request, config, pace=pace)
    form = Form()
    try:
        if kind == "multipart":
            boundary = boundary_of(request.headers["content-type"])
            reader = MultipartReader(boundary, config, config.data_dir / "tmp")
            await reader.read(body, form, hold)
            values = from_form(form.values)
        elif kind == "json":
            found = await _from_json(body, config, wrapping, hold)
            if isinstance(found, Submission):
                return found
            values = found
        else:
            most_bytes = _text_body_bytes(config)
            values = from_form(_parse_pairs(await body.read(most_bytes, field="body", hold=hold)))
        fields = read_fields(values, config, is_allowed=is_allowed)
        if not (fields.prompt or fields.image_uri or form.uploads):
            raise InvalidRequest(
                "data",
                "there is neither a prompt nor a file",
                allowed="a text in 'data' (or 'text'), a file in 'file', or an 'image_uri'",
            )
        if fields.webhook_url is not None and not as_job:
            raise InvalidRequest("webhook_url", "only a job has a webhook", allowed="POST /submit")
        taken = [await upload.spool.sha256() for upload in form.uploads if digests]
        return _submission(fields, await _keep(form.uploads, blobs), tuple(taken))
    finally:
        if kind == "multipart":
            await _to_the_end(form.close())


async def _from_json(
    body: Body, config: Config, wrapping: Wrapping | None, hold: Hold | None
) -> dict[str, Any] | Submission:
    """The values of a prompt, or what wraps a call."""
    text_bytes = _text_body_bytes(config)
    if wrapping is None:
        return _parse_json(await body.read(text_bytes, field="body", hold=hold))
    most_bytes = max(text_bytes, wrapping.most_bytes)
    raw = await body.read(most_bytes, field="body", hold=hold)
    if len(raw) <= _PARSED_AT_ONCE_BYTES or hold is None:
        return _read_json(raw, config, wrapping.take)
    async with hold.turn:
        found = await asyncio.to_thread(_read_json, raw, config, wrapping.take)
    if isinstance(found, Submission):
        hold.reach(len(found.prompt))  # what is held from here on
    elif len(raw) > text_bytes:
        raise too_long("body", text_bytes)
    return found


def _read_json(
    raw: bytes, config: Config, take: Callable[[Mapping[str, Any], Config], Submission]
) -> dict[str, Any] | Submission:
    check_parts(raw)
    values = _parse_json(raw)
    return take(values, config) if "endpoint" in values else values


def _submission(
    fields: Fields, attachments: tuple[Attachment, ...], digests: tuple[str, ...]
) -> Submission:
    return Submission(
        prompt=fields.prompt,
        attachments=attachments,
        image_uri=fields.image_uri,
        kind=fields.kind,
        model=fields.model,
        priority=fields.priority,
        deadline_ms=fields.deadline_ms,
        webhook_url=fields.webhook_url,
        subject=fields.subject,
        digests=digests,
    )


def _encoding(request: Request) -> str:
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        raise UnsupportedMedia(
            "Content-Encoding", f"{packed[:32]!r} bodies are not taken", allowed="identity"
        )
    if len(request.headers.getlist("content-type")) > 1:
        raise UnsupportedMedia(
            "Content-Type", "there is more than one Content-Type", allowed=CONTENT_TYPES
        )
    return _encoding_of(request.headers.get("content-type"))


@lru_cache(_CONTENT_TYPES_KEPT)
def _encoding_of(content_type: str | None) -> str:
    said, options = parse_options_header(content_type)
    media = said.decode("latin-1")
    charset = options.get(b"charset", b"utf-8").lower()
    if charset not in (b"utf-8", b"utf8", b"us-ascii", b"ascii"):
        raise UnsupportedMedia(
            "Content-Type", "only text in UTF-8 is taken", allowed="charset=utf-8"
        )
    if media == "multipart/form-data":
        return "multipart"
    if media == "application/x-www-form-urlencoded":
        return "pairs"
    if media == "application/json" or (
        media.startswith("application/") and media.endswith("+json")
    ):
        return "json"
    problem = f"{media[:64]!r} is not taken" if media else "there is no Content-Type"
    raise UnsupportedMedia("Content-Type", problem, allowed=CONTENT_TYPES)


def _text_body_bytes(config: Config) -> int:
    """The longest body that can hold a prompt within its limit: \\ud83d\\ude00 is 12 for one."""
    return min(config.max_body_bytes, config.max_prompt_chars * 12 + 65_536)


def _decode(raw: bytes) -> str:
    if not raw.strip():
        raise InvalidRequest("body", "the body is empty")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as broken:
        raise InvalidRequest(
            "body", f"the body is not UTF-8: byte {broken.start}", allowed="text in UTF-8"
        ) from None


def _parse_json(raw: bytes) -> dict[str, Any]:
    text = _decode(raw)
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as broken:
        where = f"line {broken.lineno}, column {broken.colno}"
        raise InvalidRequest("body", f"invalid JSON: {broken.msg} at {where}") from None
    except RecursionError:
        raise InvalidRequest("body", "the JSON is nested too deeply") from None
    except ValueError as unfit:
        # Python refuses to read numbers of more than 4300 digits.
        raise InvalidRequest("body", "invalid JSON: a number is too long") from unfit
    if not isinstance(value, dict):
        raise InvalidRequest("body", "the JSON must be an object", allowed='{"data": "..."}')
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise InvalidRequest("body", f"{name[:64]!a} is there more than once")
        found[name] = value
    return found


def _no_constant(name: str) -> Never:
    raise InvalidRequest("body", f"invalid JSON: {name} is not a JSON value")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse_pairs(raw: bytes) -> dict[str, str]:
    text = _decode(raw)
    if text.lstrip().startswith("{"):
        raise UnsupportedMedia(
            "Content-Type",
            "the body looks like JSON but is sent as a form",
            allowed='the header "Content-Type: application/json"',
        )
    try:
        pairs = parse_qsl(
            text,
            keep_blank_values=True,
            errors="strict",
            max_num_fields=len(FIELDS) + 1,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("body", "the form is not text in UTF-8") from None
    except ValueError:
        raise InvalidRequest("body", "the form has too many fields") from None
    values: dict[str, str] = {}
    for name, value in pairs:
        if name in values:
            raise InvalidRequest(name[:64], f"{name[:64]!r} is there more than once")
        values[name] = value
    return values


async def discard(asked: Submission | NewJob, blobs: Blobs) -> None:
    """Delete the files of what will not be recorded. Not cut off by cancellation."""
    keys = [attachment.blob_key for attachment in asked.attachments]
    if keys:
        await _to_the_end(blobs.delete(keys))


async def _keep(uploads: list[Upload], blobs: Blobs) -> tuple[Attachment, ...]:
    """Put every upload into the blob store, or none."""
    now = datetime.now(UTC)
    kept: list[Attachment] = []
    try:
        for upload in uploads:
            attachment = Attachment(
                file_id=new_id(),
                name=upload.name or "file",
                mime_type=upload.mime_type,
                size_bytes=upload.spool.size_bytes,
                blob_key=new_key(now),
            )
            kept.append(attachment)
            # A put that is cut off may still land: let it end, so that deleting comes after it.
            await _to_the_end(_put(attachment.blob_key, upload, blobs))
    except BaseException as failed:
        try:
            await _to_the_end(blobs.delete([attachment.blob_key for attachment in kept]))
        except StoreUnavailable as left:
            failed.add_note(f"blobs are left behind: {left}")
        raise
    return tuple(kept)


async def _put(key: str, upload: Upload, blobs: Blobs) -> None:
    if upload.spool.path is None:
        await blobs.put(key, upload.spool.data)
    else:
        await blobs.put_file(key, upload.spool.path)


async def _to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end though we are cancelled meanwhile, then pass the cancellation on."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        # A scope of anyio, such as starlette's, cancels again and again: hence the shield.
        with anyio.move_on_after(CLEAN_UP_S, shield=True):
            await asyncio.wait([task])
        if task.done() and not task.cancelled() and (failed := task.exception()):
            raise asyncio.CancelledError from failed
        raise


ENDPOINT, BODY = "endpoint", "body"
MOST_IN_ROW_BYTES = 256 * 1024
_HEAD_CHARS = 2_000
_BESIDE = ("priority", "deadline_ms", "webhook_url", "subject")


def wrapped_submission(values: Mapping[str, Any], config: Config) -> Submission:
    """Raises InvalidRequest."""
    for name in values:
        if name not in (ENDPOINT, BODY, *_BESIDE):
            raise InvalidRequest(
                name[:64],
                f"{name[:64]!a} does not go together with 'endpoint'",
                allowed=", ".join((ENDPOINT, BODY, *_BESIDE)),
            )
    path, body = values.get(ENDPOINT), values.get(BODY)
    if not isinstance(body, dict):
        raise InvalidRequest(BODY, "'body' must be an object", allowed="the body of the call")
    asked = asked_by(endpoint_named(path), body)
    fields = read_fields({name: values.get(name) for name in _BESIDE}, config)
    return Submission(
        # Only ASCII: whatever a text holds, PostgreSQL can hold it.
        prompt=json.dumps(body, separators=(",", ":")),
        attachments=(),
        image_uri=None,
        kind=asked.kind,
        model=asked.model,
        priority=fields.priority,
        deadline_ms=fields.deadline_ms,
        webhook_url=fields.webhook_url,
        subject=fields.subject,
        endpoint=path,
    )


async def body_apart(job: NewJob, blobs: Blobs) -> NewJob:
    """The job as it is stored: a large body of a call becomes its one file, and `prompt` the head
    of it. Raises StoreUnavailable; what a failure leaves behind goes with the other orphans."""
    if job.endpoint is None or len(job.prompt) <= MOST_IN_ROW_BYTES:
        return job
    now = datetime.now(UTC)
    data = job.prompt.encode()
    kept = Attachment(new_id(), "body.json", "application/json", len(data), new_key(now))
    await blobs.put(kept.blob_key, data)
    # What a person is shown. It must be no JSON: a worker of a version that knows of no such files
    # takes it for the body, and is to fail over it instead of asking for something else.
    return replace(job, prompt=job.prompt[:_HEAD_CHARS], attachments=(kept,))
