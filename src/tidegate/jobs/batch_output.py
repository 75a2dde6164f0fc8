"""The two files that a batch leaves, written line by line while the lines are read.

Invariant: never more than some lines are in memory; nothing is left of a file that was not kept.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from uuid import UUID

import orjson

from tidegate.call import new_id
from tidegate.errors import StoreUnavailable
from tidegate.store.batches import OUTPUT, Batch, BatchFile
from tidegate.store.blobs import Blobs, new_key
from tidegate.store.line_records import ambiguous_of

_UNTOUCHED = {
    "expired": ("batch_expired", "the batch expired before this line was called"),
    "cancelled": ("batch_cancelled", "the batch was cancelled before this line was called"),
}


def output_line(row: Any, ends_as: str) -> tuple[bool, bytes]:
    """Whether a line succeeded, and what the batch says of it."""
    response = error = None
    failure = None if row["failure"] is None else orjson.loads(row["failure"])
    request_id = UUID(int=row["id"].int).hex
    if row["answer"] is not None:
        response = {
            "status_code": row["status_code"],
            "request_id": request_id,
            "body": _body(row["answer"]),
        }
    elif failure is not None:
        error = {"code": failure["code"], "message": failure["message"]}
    else:
        code, message = _UNTOUCHED.get(ends_as, ("not_called", "this line was not called"))
        if row["attempts"]:
            message = ambiguous_of(row, ends_as).message
        error = {"code": code, "message": message}
    said = {
        "id": f"batch_req_{request_id}",
        "custom_id": row["custom_id"],
        "response": response,
        "error": error,
    }
    return row["state"] == "succeeded", orjson.dumps(said) + b"\n"


def _body(answer: str) -> Any:
    """Verbatim but for line ends between its values; what is not JSON as a text."""
    try:
        orjson.loads(answer)
    except orjson.JSONDecodeError:
        return answer
    return orjson.Fragment(answer.replace("\r", " ").replace("\n", " "))


class OutputFile:
    """`with OutputFile(folder) as file`: write, then keep."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = 0
        self._file: BinaryIO | None = None
        self._path = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    async def write(self, lines: list[bytes]) -> None:
        """Raises StoreUnavailable when the disk does not take it."""
        if lines:
            self._lines += len(lines)
            try:
                await asyncio.to_thread(self._write, b"".join(lines))
            except OSError as failed:
                raise StoreUnavailable(f"no room for a batch's file: {failed.strerror}") from failed

    async def keep(self, batch: Batch, what: str, blobs: Blobs) -> BatchFile | None:
        """Put it into the blob store; None where nothing was written."""
        if self._file is None:
            return None
        size_bytes = await asyncio.to_thread(self._flushed)
        key = new_key(datetime.now(UTC))
        await blobs.put_file(key, self._path)
        name = f"batch_{batch.batch_id.hex}_{what}.jsonl"
        return BatchFile(new_id(), batch.tenant_id, OUTPUT, name, size_bytes, self._lines, key)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="upload-", dir=self._folder)
            self._path, self._file = Path(name), os.fdopen(handle, "wb")
        assert self._file is not None
        self._file.write(data)

    def _flushed(self) -> int:
        assert self._file is not None
        self._file.flush()
        return self._file.tell()
