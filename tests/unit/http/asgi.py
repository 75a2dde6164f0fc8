"""Requests without a server: a scope, and a body that arrives in the given pieces."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

from starlette.requests import Request
from starlette.types import Message

from tidegate.settings import Config

BOUNDARY = "frontier"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"
PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + bytes(range(64))
PDF = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj\n<<>>\nendobj\n"

Part = tuple[str, bytes, str | None, str | None]  # name, content, file name, content type


class Sender:
    """The client's side: `taken` counts the pieces that were asked for."""

    def __init__(self, pieces: Iterable[bytes], *, then: str = "end") -> None:
        """`then` is what follows the last piece: `end`, `leave` (disconnect) or `silence`."""
        self._pieces = iter(pieces)
        self._then = then
        self.taken = 0

    async def receive(self) -> Message:
        piece = next(self._pieces, None)
        if piece is not None:
            self.taken += 1
            return {"type": "http.request", "body": piece, "more_body": True}
        if self._then == "leave":
            return {"type": "http.disconnect"}
        if self._then == "silence":
            await asyncio.Event().wait()
        return {"type": "http.request", "body": b"", "more_body": False}


def request(
    sender: Sender | bytes,
    content_type: str | None = "application/json",
    *,
    headers: Sequence[tuple[str, str]] = (),
) -> Request:
    """A POST whose body `sender` sends."""
    named = [*headers] if content_type is None else [("content-type", content_type), *headers]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/submit",
        "query_string": b"",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named],
    }
    sender = Sender([sender]) if isinstance(sender, bytes) else sender
    return Request(scope, sender.receive)


def text(name: str, content: str) -> Part:
    return name, content.encode(), None, None


def file(content: bytes, name: str = "a.txt", said: str | None = None) -> Part:
    return "file", content, name, said


def multipart(*parts: Part) -> bytes:
    """A whole multipart body."""
    lines = b""
    for name, content, filename, said in parts:
        lines += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"'.encode()
        if filename is not None:
            lines += f'; filename="{filename}"'.encode()
        if said is not None:
            lines += f"\r\nContent-Type: {said}".encode()
        lines += b"\r\n\r\n" + content + b"\r\n"
    return lines + f"--{BOUNDARY}--\r\n".encode()


def settings(folder: Path, **changes: object) -> Config:
    """Sound settings whose files go to `folder`."""
    return Config.model_validate({"data_dir": folder, **changes})


def files_under(folder: Path) -> list[Path]:
    """Every file that is there, in any folder below."""
    return [path for path in folder.rglob("*") if path.is_file()]
