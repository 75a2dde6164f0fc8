"""What RFC 9112 asks of a request's head beyond what the parser checks. Pure.

Invariant: a head that two servers could read in two ways is refused, before any route sees it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from http import HTTPStatus

import orjson

# Status, code and words of a refusal.
Refusal = tuple[int, str, str]

# RFC 9110, section 7.2: a host and a port, with nothing about the user. An empty one is a host.
_HOST = re.compile(
    rb"(?:\[[0-9A-Fa-f:.]{2,45}\]|(?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}){0,255})(?::\d{0,5})?"
)
_BAD = "bad_request"
_END = b"\r\n"
# Values that were found to be hosts: nearly all clients name the same few.
_HOSTS: set[bytes] = set()
_MOST_HOSTS = 200


# The word of a Connection header by which a client offers another protocol.
_OFFER = re.compile(rb"(\r\nconnection:[^\r\n]{0,200}?)upgrade\b", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


def without_offer(piece: bytes) -> bytes:
    """The next bytes of a head, and perhaps what follows it, without the offer of another protocol:
    RFC 9110, section 7.8, lets a server pass over it, and the parser would read no body behind one.
    As long as it was. The JDK's client makes one of each request on plain HTTP."""
    end = piece.find(_HEAD_END)
    head = piece if end < 0 else piece[:end]
    return _OFFER.sub(rb"\1xpgrade", head) + piece[len(head) :]


class RequestLine:
    """The request line as it came, of which the parser returns only the parts."""

    __slots__ = ("_is_known", "_is_second", "_kept", "_piece", "_seen")

    def __init__(self) -> None:
        self._kept = b""  # of a line that began in an earlier piece
        self._piece = b""
        self._seen = 0  # how much of the piece lines before have used up
        self._is_second = False  # another request ended in this piece
        self._is_known = True  # where the line began

    def take(self, piece: bytes) -> None:
        """The next bytes of the connection, before the parser has them."""
        self._piece, self._seen, self._is_second = piece, 0, False

    def keep(self) -> None:
        """The parser has had the piece, and the head that began in it, or before, goes on."""
        if self._is_known:
            self._kept = self._line()

    def begin(self) -> None:
        """A request has begun in the present piece."""
        self._is_known = not self._is_second

    def end_message(self) -> None:
        """A request has ended in the present piece: the next may begin anywhere in it."""
        self._is_second = True

    def is_as(self, expected: bytes) -> bool:
        """Whether it is as it would be written from its parts, once the head is there. Of one that
        began behind another request only that much is known: that it comes later in the piece."""
        piece = self._piece
        if self._is_known:
            self._seen = len(expected)
            if not self._kept and piece.startswith(expected) and piece.startswith(_END, self._seen):
                return True
            line, self._kept = self._line(), b""
            self._seen = len(line)
            return line.rstrip(b"\r\n") == expected
        self._is_known, self._kept = True, b""
        if not self._is_second:
            return True
        at = piece.find(expected, self._seen)
        self._seen = at + len(expected)
        return at >= 0

    def _line(self) -> bytes:
        """All of it that has come up to the present piece's end."""
        line, piece = self._kept, self._piece
        if line.endswith(b"\n"):
            return line
        if not line:
            piece = piece.lstrip(b"\r\n")  # as by the parser: RFC 9112, section 2.2
        return line + piece[: piece.find(b"\n") + 1 or len(piece)]


def refusal_of_head(
    version: str, headers: Iterable[tuple[bytes, bytes]], line_is_plain: bool
) -> Refusal | None:
    """None for a head that is as it should be. Names of headers are in lower case."""
    if version not in ("1.1", "1.0"):
        if version == "0.9":
            return 400, _BAD, "the request line names no version of HTTP"
        return 505, "http_version_not_supported", f"HTTP/{version} is not spoken here: HTTP/1.1 is"
    if not line_is_plain:
        return 400, _BAD, "the request line must be method, target and version with one space each"
    hosts = 0
    for name, value in headers:
        if name == b"host":
            hosts += 1
            if hosts > 1:
                return 400, _BAD, "there is more than one Host"
            if value not in _HOSTS and not _is_host(value):
                return 400, _BAD, "Host is not a host with an optional port"
        elif name == b"transfer-encoding":
            refusal = _refusal_of_coding(version, value.strip().lower())
            if refusal is not None:
                return refusal
    if not hosts and version == "1.1":
        return 400, _BAD, "there is no Host, which HTTP/1.1 asks for"
    return None


def as_answer(refusal: Refusal, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The answer that tells it, without its first line; `headers` are the server's own."""
    status, code, detail = refusal
    body = orjson.dumps(
        {
            "type": f"urn:tidegate:problem:{code}",
            "title": HTTPStatus(status).phrase,
            "status": status,
            "detail": detail,
            "code": code,
        }
    )
    told = [
        *headers,
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    return b"".join(name + b": " + value + b"\r\n" for name, value in told) + b"\r\n" + body


def _is_host(value: bytes) -> bool:
    if _HOST.fullmatch(value) is None:
        return False
    if len(_HOSTS) < _MOST_HOSTS:
        _HOSTS.add(value)
    return True


def _refusal_of_coding(version: str, coding: bytes) -> Refusal | None:
    """RFC 9112, sections 6.1 and 6.3. Several headers are several calls: the parser refuses what
    comes after `chunked`, and all that comes before it is refused here."""
    if version == "1.0":
        return 400, _BAD, "HTTP/1.0 has no Transfer-Encoding"
    if coding == b"chunked":
        return None
    if coding.rpartition(b",")[2].strip() != b"chunked":
        return 400, _BAD, "chunked must be the last coding of Transfer-Encoding"
    return 501, "not_implemented", "of the codings of Transfer-Encoding only chunked is taken"
