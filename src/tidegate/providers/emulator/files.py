"""Gemini's Files API: resumable upload, look-up, deletion, PROCESSING until it is ACTIVE.

Invariant: contents are counted and hashed as they arrive and never kept; a file becomes visible
when its upload is finalized.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any

from tidegate.providers.emulator.dialect import Json
from tidegate.providers.emulator.reading import Attached, get
from tidegate.providers.emulator.wire import WireError

MAX_FILES = 10_000
KEPT_S = 48 * 3600
# Google names a file by its own address, wherever it was asked.
_URIS = "https://generativelanguage.googleapis.com"
_FORBIDDEN = "You do not have permission to access the File {name} or it may not exist."


@dataclass(slots=True)
class StoredFile:
    name: str  # files/abc
    mime_type: str
    display_name: str
    created_ns: int = field(default_factory=time.time_ns)
    size_bytes: int = 0
    active_ns: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def to_json(self) -> Json:
        body = {
            "name": self.name,
            "mimeType": self.mime_type,
            "sizeBytes": str(self.size_bytes),
            "createTime": _rfc3339(self.created_ns),
            "updateTime": _rfc3339(max(self.active_ns, self.created_ns)),
            "expirationTime": _rfc3339(self.created_ns + KEPT_S * 10**9),
            "sha256Hash": base64.b64encode(self.digest.digest()).decode(),
            "uri": f"{_URIS}/v1beta/{self.name}",
            "state": "ACTIVE" if time.time_ns() >= self.active_ns else "PROCESSING",
            "source": "UPLOADED",
        }
        return body | ({"displayName": self.display_name} if self.display_name else {})


def _rfc3339(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat().replace("+00:00", "Z")


class Files:
    def __init__(self) -> None:
        self._files: dict[str, StoredFile] = {}
        self._uploads: dict[str, StoredFile] = {}

    def clear(self) -> None:
        self._files.clear()
        self._uploads.clear()

    def begin(self, headers: Mapping[str, str], body: Any) -> str:
        """Start a resumable upload; returns its id."""
        file = get(body, "file") if isinstance(body, dict) else None
        file = file if isinstance(file, dict) else {}
        name = str(file.get("name") or f"files/{token_hex(6)}")
        if not name.startswith("files/"):
            raise WireError(400, "* CreateFileRequest.file.name: must begin with `files/`")
        if name in self._files:
            raise WireError(400, f"Requested entity already exists: {name}")
        if len(self._files) + len(self._uploads) >= MAX_FILES:
            raise WireError(429, "Too many files are stored.")
        declared = headers.get("X-Goog-Upload-Header-Content-Type", "application/octet-stream")
        mime_type = str(get(file, "mimeType") or declared)
        shown = str(get(file, "displayName") or headers.get("X-Goog-Upload-File-Name", ""))
        upload_id = token_hex(16)
        self._uploads[upload_id] = StoredFile(name, mime_type, shown)
        return upload_id

    async def receive(
        self,
        upload_id: str,
        headers: Mapping[str, str],
        content: AsyncIterator[bytes],
        processing_ms: int,
    ) -> StoredFile | None:
        """Take one piece; the file when its command says `finalize`, else None."""
        file = self._uploads.get(upload_id)
        if file is None:
            raise WireError(404, "Upload not found.")
        offset = headers.get("X-Goog-Upload-Offset", "0")
        if offset != str(file.size_bytes):
            raise WireError(400, f"Offset {offset} is not {file.size_bytes}, where we are.")
        async for piece in content:
            file.digest.update(piece)
            file.size_bytes += len(piece)
        if "finalize" not in headers.get("X-Goog-Upload-Command", "finalize"):
            return None
        del self._uploads[upload_id]
        file.active_ns = time.time_ns() + processing_ms * 1_000_000
        self._files[file.name] = file
        return file

    def find(self, name: str) -> StoredFile:
        """Raises WireError 403, as Gemini does for a file that does not exist."""
        file = self._files.get(name)
        if file is None:
            raise WireError(403, _FORBIDDEN.format(name=name.removeprefix("files/")))
        return file

    def delete(self, name: str) -> None:
        del self._files[self.find(name).name]

    def page(self, size: int, token: str) -> tuple[list[StoredFile], str]:
        """Up to `size` files after the one named by `token`, and the next page's token."""
        names = sorted(self._files)
        later = [name for name in names if name > token]
        chosen = later[:size]
        return [self._files[name] for name in chosen], chosen[-1] if len(later) > size else ""

    def look_up(self, uri: str) -> Attached:
        """What a `fileUri` of a prompt stands for; URIs elsewhere are taken as they are."""
        _, marker, name = uri.partition("/v1beta/files/")
        if not uri:
            raise WireError(400, "Invalid value at 'file_data.file_uri': it is empty")
        if not marker:
            return Attached("application/octet-stream", None, uri)
        file = self.find(f"files/{name}")
        if time.time_ns() < file.active_ns:
            raise WireError(
                400, f"The File {name} is not in an ACTIVE state and usage is not allowed."
            )
        return Attached(file.mime_type, file.size_bytes, uri)
