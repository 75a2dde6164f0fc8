"""The results of a batch, a line of JSON each, in the order in which they came.

Invariant: this file is the whole memory of a run. A line is in it once it has ended, and what is in
it is not asked again; half a line, left by a process that was killed, is taken off at the start.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO, Any, Self

import orjson

from tidegate.errors import ConfigError

SUCCEEDED = "succeeded"


class Results:
    """An open file of results; one run at a time has it. Raises ConfigError, naming `--output`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():
            raise ConfigError(
                "--output", str(path), "must be a file: it tells the next run how far"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = path.open("a+b")
        except OSError as wrong:
            allowed = f"must be a file that can be written: {wrong.strerror}"
            raise ConfigError("--output", str(path), allowed) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError("--output", str(path), "another run is writing it") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def read(self) -> list[dict[str, Any]]:
        """What is there of earlier runs, less half a line at its end."""
        self._file.seek(0)
        rows: list[dict[str, Any]] = []
        whole = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(whole)
                break
            whole += len(line)
            if line.strip():
                rows.append(self._row(number, line))
        self._file.seek(0, os.SEEK_END)
        return rows

    def _row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = orjson.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("key"), str):
            where = f"{self.path}, line {number}"
            raise ConfigError("--output", where, "is not a result of `tidegate batch run`")
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Append a result; it outlives this process once this returns."""
        self._file.write(orjson.dumps(row) + b"\n")
        self._file.flush()


def row_of(line_id: str, number: int, key: str, view: dict[str, Any]) -> dict[str, Any]:
    """A result, of the last state of its request or of a refusal to take it."""
    row: dict[str, Any] = {
        "id": line_id,
        "line": number,
        "status": view["status"],
        "request_id": view.get("request_id"),
        "model": view.get("model"),
        "text": view.get("text"),
        "usage": view.get("usage"),
        "cost_micros": view.get("cost_micros"),
        "error": view.get("error"),
        "key": key,
    }
    for name in ("answer", "images"):
        if view.get(name):
            row[name] = view[name]
    return row
