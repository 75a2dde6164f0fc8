"""A backup has its file to itself, before it starts a server."""

from __future__ import annotations

import fcntl
import signal
from functools import partial
from pathlib import Path

import pytest

from tidegate.errors import ConfigError, StoreUnavailable
from tidegate.settings import load
from tidegate.supervisor.maintenance import back_up


def test_a_second_backup_of_one_name_is_refused_while_the_first_writes(tmp_path: Path) -> None:
    away = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1"}
    config = load({**away, "GEMINI_API_KEY": "k"}, None)
    half = tmp_path / "record.partial"
    with half.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(b"half of it")
        file.flush()
        with pytest.raises(ConfigError, match="is being written by another backup"):
            back_up(config, tmp_path / "record")
    assert half.read_bytes() == b"half of it"


def test_a_backup_that_fails_or_is_interrupted_leaves_no_half_of_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """pg_dump is a program that writes a part of it and fails, or never ends."""
    # A run that a shell starts in the background ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(partial(signal.signal, signal.SIGINT, before))
    away = {"DATABASE_URL": "postgresql://127.0.0.1:1/x", "REDIS_URL": "redis://127.0.0.1:1"}
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, ending in (("failing", "exit 1"), ("interrupted", "kill -INT $PPID; exec sleep 60")):
        program = programs / "pg_dump"
        program.write_text(
            f'#!/bin/sh\nfor one; do case $one in --file=*) echo half > "${{one#--file=}}"; esac;'
            f" done\n{ending}\n"
        )
        program.chmod(0o700)
        monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
        config = load({**away, "GEMINI_API_KEY": "k"}, None)
        with pytest.raises((StoreUnavailable, KeyboardInterrupt)):
            back_up(config, tmp_path / name)
        assert list(tmp_path.glob(f"{name}*")) == []
