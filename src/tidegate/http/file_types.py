"""File types: decided by a file's content, and compared with the type that the client declares.

Invariants: at most HEAD_BYTES of a file are kept to decide its type; content that contradicts the
declared type is rejected, never relabelled.
"""

from __future__ import annotations

import codecs
import re
from pathlib import PurePosixPath

from tidegate.errors import UnsupportedMedia
from tidegate.upstream.fetch import PICTURE_TYPES, iso_brands, picture_type

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
# Declared as one container, recognised as another: tools mix these up, and providers accept both.
_ALSO = {
    "image/heic": {"image/heif"},
    "image/heif": {"image/heic"},
    "video/mp4": {"video/quicktime"},
    "video/quicktime": {"video/mp4"},
    # An ID3 tag in front hides the actual format.
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
# Other types of text that the provider accepts only as plain text.
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
# Types that systems derive from the names of text files: CSV as a spreadsheet, TypeScript as video.
_MISSAID = {
    ".csv": {"application/vnd.ms-excel"},
    ".ts": {"video/mp2t", "video/vnd.dlna.mpeg-tts", "text/vnd.trolltech.linguist"},
}
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_NAME_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def safe_name(raw: str) -> str:
    """Return a file's name for records and messages: no folders, no control characters, <= 128
    long."""
    name = _NAME_CONTROL.sub("", raw.replace("\\", "/")).encode("utf-8", "replace").decode()
    name = name.rsplit("/", 1)[-1].strip()
    if name in ("", ".", ".."):
        return "file"
    if len(name) <= MAX_NAME_CHARS:
        return name
    suffix = PurePosixPath(name).suffix[:16]
    return name[: MAX_NAME_CHARS - len(suffix)] + suffix


def content_type_of(head: bytes) -> str | None:
    """Return the supported binary type whose signature `head` has, or None."""
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
        # QuickTime files from before 2001 have no brand.
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
    # Layer I is left out: its first bytes equal a UTF-16 byte order mark.
    version_is_known, bitrate_is_known = head[1] >> 3 & 3 != 1, head[2] >> 4 not in (0, 15)
    if layer in (1, 2) and version_is_known and rate != 3 and bitrate_is_known:
        return "audio/mpeg"
    return None


class TypeCheck:
    """Checks a file while it arrives: call `feed` with each piece, then `finish`, which returns its
    MIME type.

    Both raise UnsupportedMedia as soon as the content is known to be wrong: for all types but text,
    after the first 4 KB.
    """

    __slots__ = ("_decided", "_declared", "_decoder", "_field", "_head", "_name", "_size_bytes")

    def __init__(self, name: str, declared: str | None, *, field: str = "file") -> None:
        """`name` is a `safe_name`; `declared` is the type that the client declared, if any."""
        declared = (declared or "").split(";")[0].strip().lower()
        self._name = name
        self._field = field
        self._declared = _ALIASES.get(declared, declared)
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
        elif found is None and self._declared in _BINARY:
            raise self._refusal(f"was sent as {self._declared}, but {self._its_content()}")
        elif found is None:
            raise self._refusal(f"is {self._declared}, which is not supported")
        elif self._declared in _UNSAID or found == self._declared:
            self._decided = found
        elif found in _ALSO.get(self._declared, ()):
            self._decided = self._declared if found == "audio/mpeg" else found
        elif textual is not None or self._declared in _BINARY:
            raise self._refusal(f"was sent as {self._declared}, but its content is {found}")
        else:
            raise self._refusal(f"is {self._declared}, which is not supported")
        self._head.clear()

    def _text_type(self) -> str | None:
        """Return the type of this file if it is text; None if another type was declared."""
        suffix = PurePosixPath(self._name).suffix.lower()
        if self._declared in _UNSAID or self._declared in _MISSAID.get(suffix, ()):
            return _TEXT_NAMES.get(suffix, "text/plain")
        if self._declared in _TEXT_TYPES:
            return self._declared
        return "text/plain" if _TEXTUAL.fullmatch(self._declared) else None

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
        if self._declared in _UNSAID:
            raise self._refusal(f"has an unknown type: {self._its_content(data)}")
        raise self._refusal(f"was sent as {self._declared}, but {self._its_content(data)}")

    def _its_content(self, data: bytes = b"") -> str:
        import puremagic  # imported with its tables only for rejections

        try:
            best = puremagic.magic_string(bytes(self._head[:HEAD_BYTES]) or data[:HEAD_BYTES])[0]
        except (puremagic.PureError, ValueError, IndexError):
            return "its content is neither that nor text in UTF-8"
        label = best.name or best.mime_type or best.extension
        return f"its content looks like {label[:80]}" if label else "its content is something else"

    def _refusal(self, problem: str) -> UnsupportedMedia:
        return UnsupportedMedia(self._field, f"{self._name!r} {problem}", allowed=ALLOWED)
