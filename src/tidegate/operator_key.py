"""Key of the operator: ADMIN_TOKEN, or else the file `operator.key` in DATA_DIR.

Invariant: all processes of a deployment read the same key. The first process that needs the file
creates it by a hard link, readable by its user alone.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import SecretStr

from tidegate.errors import ConfigError
from tidegate.settings import SHORTEST_TOKEN, Config, is_key

FILE_NAME = "operator.key"
PREFIX = "tgop_"
_RANDOM_BYTES = 32


def operator_key(config: Config) -> SecretStr:
    """Return the key of this deployment; creates the file if neither it nor ADMIN_TOKEN exists.

    Raises ConfigError if the key can neither be read nor created.
    """
    if config.admin_token is not None:
        return config.admin_token
    path = key_file(config)
    try:
        if not path.exists():
            _make(path)
        return _operator_key_sound(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as failed:
        why = getattr(failed, "strerror", None) or "it is not text"
        reason = f"cannot be read or made ({why}); let this user write to it, or set ADMIN_TOKEN"
        raise ConfigError("DATA_DIR", str(path), reason) from None


def existing_operator_key(config: Config) -> SecretStr | None:
    """Return the key if it can be read here, for a command that does not create one. Raises
    ConfigError if the file contains no key."""
    if config.admin_token is not None:
        return config.admin_token
    path = key_file(config)
    try:
        return _operator_key_sound(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return None


def key_file(config: Config) -> Path:
    return config.data_dir / FILE_NAME


def write_private(path: Path, text: str) -> None:
    """Replace a file by one that its user alone can read. Raises OSError."""
    with _fresh(path, text) as fresh:
        fresh.replace(path)


def _make(path: Path) -> None:
    """Write a new key to `path`, unless another process has done so. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        _fresh(path, f"{PREFIX}{secrets.token_urlsafe(_RANDOM_BYTES)}\n") as fresh,
        suppress(FileExistsError),
    ):
        os.link(fresh, path)
    _sync_folder(path.parent)


@contextmanager
def _fresh(path: Path, text: str) -> Iterator[Path]:
    """Write a file beside `path` that its user alone can read, removed at the end. Raises
    OSError."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield fresh
    finally:
        fresh.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make the file's name survive a crash of the machine."""
    with suppress(OSError):  # not every system allows a folder to be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _operator_key_sound(path: Path, text: str) -> SecretStr:
    key = text.strip()
    if len(key) < SHORTEST_TOKEN or not is_key(key):
        reason = (
            f"must hold one key of {SHORTEST_TOKEN} characters or more; remove it to get another"
        )
        raise ConfigError("DATA_DIR", str(path), reason)
    return SecretStr(key)
