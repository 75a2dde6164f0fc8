"""What a file is, whatever it is said to be."""

from __future__ import annotations

import io
import zipfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.http.asgi import PDF, PNG
from tidegate.errors import UnsupportedMedia
from tidegate.http.file_types import HEAD_BYTES, MAX_NAME_CHARS, TypeCheck, safe_name
from tidegate.upstream.fetch import PICTURE_TYPES, picture_type

OCTETS = "application/octet-stream"
TAIL = bytes(range(256)) * 2


def iso(major: bytes, *compatible: bytes) -> bytes:
    brands = major + b"\0\0\2\0" + b"".join(compatible)
    return (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + b"\0\0\0\x08free" + TAIL


def docx() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("word/document.xml", "<w:document/>" * 500)
    return packed.getvalue()


BINARY = {
    "image/png": PNG,
    "image/jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF" + TAIL,
    "image/gif": b"GIF89a" + TAIL,
    "image/webp": b"RIFF\x24\0\0\0WEBPVP8 " + TAIL,
    "image/heic": iso(b"heic", b"mif1", b"heic"),
    "image/heif": iso(b"mif1", b"miaf"),
    "application/pdf": PDF,
    "audio/mpeg": b"\xff\xfb\x90\x64" + TAIL,
    "audio/wav": b"RIFF\x24\0\0\0WAVEfmt " + TAIL,
    "audio/ogg": b"OggS\0\2" + TAIL,
    "audio/flac": b"fLaC\0\0\0\x22" + TAIL,
    "audio/aac": b"\xff\xf1\x50\x80" + TAIL,
    "video/mp4": iso(b"isom", b"isom", b"avc1"),
    "video/quicktime": iso(b"qt  ", b"qt  "),
    "video/webm": b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\1\x42\x82\x84webm" + TAIL,
    "video/mpeg": b"\0\0\1\xba\x44" + TAIL,
}


def found(content: bytes, said: str | None = None, name: str = "f") -> str:
    check = TypeCheck(name, said)
    check.feed(content)
    return check.finish()


@pytest.mark.parametrize("said", [None, "", OCTETS])
@pytest.mark.parametrize("mime_type", BINARY)
def test_a_file_of_unsaid_type_is_recognised(mime_type: str, said: str | None) -> None:
    assert found(BINARY[mime_type], said) == mime_type


@pytest.mark.parametrize("mime_type", BINARY)
def test_a_file_that_is_what_it_says_is_taken(mime_type: str) -> None:
    assert found(BINARY[mime_type], f"{mime_type.upper()}; x=y") == mime_type


@pytest.mark.parametrize("mime_type", PICTURE_TYPES)
def test_every_picture_type_is_recognised_by_32_bytes(mime_type: str) -> None:
    assert picture_type(BINARY[mime_type][:32]) == mime_type


@pytest.mark.parametrize("mime_type", BINARY)
@pytest.mark.parametrize("content", [PDF, PNG, b"plain text\n", BINARY["audio/wav"], docx()])
def test_a_file_whose_content_is_not_what_its_type_says_is_refused(
    mime_type: str, content: bytes
) -> None:
    if content == BINARY[mime_type]:
        assert found(content, mime_type) == mime_type
        return
    with pytest.raises(UnsupportedMedia, match=f"'f' was sent as {mime_type}") as refusal:
        found(content, mime_type)
    assert "PNG" in str(refusal.value.allowed)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (docx(), "application/vnd.openxmlformats-officedocument.wordprocessingml.document"),
        (docx(), "application/zip"),
        (docx(), None),
        (b"BM" + TAIL, "image/bmp"),
        (b"MZ\x90\0" + TAIL, OCTETS),
        (b"\x7fELF\2\1\1\0" + TAIL, OCTETS),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        (b"\x1a\x45\xdf\xa3\x42\x82\x88matroska" + TAIL, "video/x-matroska"),
        (iso(b"avif", b"mif1"), "image/avif"),
        (iso(b"mif1", b"avif"), None),
        (iso(b"M4A ", b"mp42"), None),
        (b"plain", "font/woff2"),
        (PNG, "nonsense"),
        (bytes(100), None),
    ],
)
def test_an_unsupported_file_is_refused_by_name_with_what_is_allowed(
    content: bytes, said: str | None
) -> None:
    with pytest.raises(UnsupportedMedia, match=r"'report\.x'") as refusal:
        found(content, said, "report.x")
    assert refusal.value.field == "file"
    assert refusal.value.allowed


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("a.txt", "text/plain", "text/plain"),
        ("a.md", None, "text/markdown"),
        ("a.md", "text/x-markdown", "text/markdown"),
        ("a.csv", OCTETS, "text/csv"),
        ("a.csv", "application/vnd.ms-excel", "text/csv"),
        ("a.ts", "video/mp2t", "text/plain"),
        ("a.html", "text/html; charset=utf-8", "text/html"),
        ("a.json", "application/json", "application/json"),
        ("a.xml", "text/xml", "application/xml"),
        ("a.py", "text/x-python", "text/plain"),
        ("a.js", "application/javascript", "text/plain"),
        ("a.yaml", "application/x-yaml", "text/plain"),
        ("Makefile", None, "text/plain"),
    ],
)
def test_text_is_taken_by_its_type_or_its_name(name: str, said: str | None, expected: str) -> None:
    assert found("naïve 🦊\r\n\tx".encode(), said, name) == expected


@pytest.mark.parametrize(
    "content",
    ["naïve".encode("utf-16"), "naïve".encode("latin-1"), b"a\0b", b"a\x01b", b"cut \xf0\x9f\xa6"],
)
@pytest.mark.parametrize("at", [0, HEAD_BYTES * 3])
def test_text_that_is_not_utf8_to_its_end_is_refused(content: bytes, at: int) -> None:
    check = TypeCheck("a.txt", "text/plain")

    def send() -> None:
        check.feed(b"x" * at)
        check.feed(content)
        check.finish()

    with pytest.raises(UnsupportedMedia, match=r"'a\.txt' was sent as text/plain"):
        send()


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(UnsupportedMedia, match="'f' is empty"):
        found(b"")


@given(st.binary(max_size=HEAD_BYTES * 2), st.integers(1, 5000))
def test_any_content_is_either_taken_or_refused_whatever_its_pieces(
    content: bytes, size: int
) -> None:
    def verdict(step: int) -> str | None:
        check = TypeCheck("f", None)
        try:
            for at in range(0, len(content), step):
                check.feed(content[at : at + step])
            return check.finish()
        except UnsupportedMedia:
            return None

    assert verdict(size) == verdict(max(1, len(content)))


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("a.txt", "a.txt"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\x.pdf", "x.pdf"),
        ("..", "file"),
        ("", "file"),
        ("/", "file"),
        ("a\0b\r\nc\x1b[31m.txt", "abc[31m.txt"),
        ("invoice\u202efdp.exe", "invoicefdp.exe"),
        ("résumé.pdf", "résumé.pdf"),
    ],
)
def test_a_name_is_made_safe(raw: str, safe: str) -> None:
    assert safe_name(raw) == safe


@given(st.text())
def test_a_safe_name_is_short_printable_and_storable(raw: str) -> None:
    name = safe_name(raw)
    assert 1 <= len(name) <= MAX_NAME_CHARS
    assert "/" not in name
    assert "\0" not in name
    assert name.encode("utf-8")
    assert safe_name(name) == name


def test_a_long_name_keeps_its_suffix() -> None:
    assert safe_name("x" * 500 + ".pdf").endswith("x.pdf")
