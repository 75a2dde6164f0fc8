"""Backup and restore of the record by PostgreSQL's own `pg_dump` and `pg_restore`.

Invariant: a file with the wanted name is a whole dump, and from its first byte on nobody but its
owner can read it; a restore goes into a database that has no
tables of ours, and is all there or nothing of it. Passwords reach the programs by their
environment, never by their arguments.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from tidegate.embedded import servers as place
from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.settings import Config
from tidegate.store.diagnostics import revision_at, settle
from tidegate.supervisor.services import prepared

# How pg_restore complains of the file and not of the server.
_NO_WHOLE_DUMP = ("input file", "valid archive")


def back_up(config: Config, file: Path) -> int:
    """Write the record into a new `file`; its size in bytes. Processes may go on meanwhile.

    Raises ConfigError for a file that is there or cannot be, and StoreUnavailable where it failed.
    """
    if file.exists():
        raise ConfigError("FILE", str(file), "is there already; nothing is overwritten")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise ConfigError("FILE", str(file), "must be in a folder that is there and can be written")
    partial = file.with_name(f"{file.name}.partial")
    partial.unlink(missing_ok=True)  # of a run that was cut short
    try:
        # Made here, since pg_dump would make it as the umask says: it is all prompts and answers.
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as failed:
        raise ConfigError("FILE", str(partial), f"cannot be made: {failed.strerror}") from None
    with prepared(config, only={"postgres"}) as ground:
        url = _url_of(ground.config)
        _run(_program("pg_dump", config), url, "--format=custom", f"--file={partial.resolve()}")
    partial.rename(file)
    return file.stat().st_size


def restore(config: Config, file: Path) -> None:
    """Fill an empty database from a file of `back_up`.

    Raises ConfigError for a file that is no whole dump or a database that is not empty, and
    StoreUnavailable where it failed; the database is then as empty as before.
    """
    if not file.is_file():
        raise ConfigError("FILE", str(file), "is not there")
    with prepared(config, only={"postgres"}) as ground:
        url = _url_of(ground.config)
        if (revision := asyncio.run(revision_at(url))) is not None:
            raise ConfigError(
                "DATABASE_URL",
                "(its database)",
                f"holds a record already, of revision {revision}; restore into an empty one",
            )
        options = ("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges")
        try:
            _run(_program("pg_restore", config), url, *options, str(file.resolve()))
        except StoreUnavailable as failed:
            if any(words in failed.message for words in _NO_WHOLE_DUMP):
                allowed = f"must be a whole dump: {failed.message}"
                raise ConfigError("FILE", str(file), allowed) from None
            raise
        asyncio.run(settle(url))


def _url_of(config: Config) -> str:
    assert config.database_url is not None
    return config.database_url.get_secret_value()


def _program(name: str, config: Config) -> str:
    """The bundled one for the bundled server, whose version it has; else that of the system."""
    if config.embedded:
        return str(place.binaries_of(None) / name)
    found = shutil.which(name)
    if found is None:
        raise ConfigError("PATH", name, "is not there: install PostgreSQL's client programs")
    return found


def _run(program: str, url: str, *options: str) -> None:
    parts = urlsplit(url)
    environment = dict(os.environ)
    if parts.password:
        environment["PGPASSWORD"] = unquote(parts.password)
        user, _, place_of = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user.partition(':')[0]}@{place_of}")
    command = [program, *options[:-1], f"--dbname={urlunsplit(parts)}", options[-1]]
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise StoreUnavailable(f"{Path(program).name} failed: {said}")
