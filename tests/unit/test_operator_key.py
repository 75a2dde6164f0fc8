"""The operator's key: one a DATA_DIR, whichever process comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from tidegate.errors import ConfigError
from tidegate.operator_key import existing_operator_key, key_file, operator_key
from tidegate.settings import Config
from tidegate.telemetry.logging import redact

# Each process writes a line with its key; none begins before all are there.
_RACE = """
import os, sys
from pathlib import Path
from tidegate.operator_key import operator_key
from tidegate.settings import Config
config = Config(data_dir=Path(sys.argv[1]))
waits, begins = os.pipe()
for _ in range(int(sys.argv[2])):
    if not os.fork():
        os.close(begins)
        os.read(waits, 1)  # returns when the last one has closed `begins`
        os.write(1, f"{operator_key(config).get_secret_value()}\\n".encode())
        os._exit(0)
os.close(begins)
for _ in range(int(sys.argv[2])):
    os.wait()
"""
PROCESSES = 6


def key_in(folder: Path) -> str:
    return operator_key(Config(data_dir=folder)).get_secret_value()


def test_it_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "data"
    assert existing_operator_key(Config(data_dir=folder)) is None
    assert not folder.exists()
    key = key_in(folder)
    assert key_in(folder) == key
    assert existing_operator_key(Config(data_dir=folder)) == SecretStr(key)
    path = key_file(Config(data_dir=folder))
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in folder.iterdir()] == ["operator.key"]
    assert len(key) > 43  # 256 bits
    assert key_in(tmp_path / "another") != key


def test_processes_that_start_together_end_up_with_one_key(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    command = [sys.executable, "-c", _RACE, str(folder), str(PROCESSES)]
    raced = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    keys = raced.stdout.splitlines()
    assert len(keys) == PROCESSES
    assert {*keys} == {key_in(folder)}
    assert [one.name for one in folder.iterdir()] == ["operator.key"]


def test_the_one_that_comes_second_takes_the_key_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the narrowest place: both have seen that there is none, and written one of their own."""
    config = Config(data_dir=tmp_path)
    link = os.link

    def later(source: Path, target: Path) -> None:
        assert not target.exists()
        monkeypatch.setattr("os.link", link)
        first.append(key_in(tmp_path))
        link(source, target)

    first: list[str] = []
    monkeypatch.setattr("os.link", later)
    assert [operator_key(config).get_secret_value()] == first


def test_no_process_reads_half_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is whole and on the disk, it is under another name."""
    path = key_file(Config(data_dir=tmp_path))
    synced = os.fsync
    states: list[bool] = []

    def fsync(descriptor: int) -> None:
        states.append(path.exists())
        synced(descriptor)

    monkeypatch.setattr("os.fsync", fsync)
    key_in(tmp_path)
    assert states == [False, True]  # the file, then the folder


def test_admin_token_wins_and_no_file_is_made(tmp_path: Path) -> None:
    config = Config(data_dir=tmp_path, admin_token=SecretStr("of-the-operator-alone"))
    assert operator_key(config).get_secret_value() == "of-the-operator-alone"
    assert existing_operator_key(config) == operator_key(config)
    assert not key_file(config).exists()


@pytest.mark.parametrize("text", ["", "short\n", "with a space in its middle", "x" * 20 + "\n\nx"])
def test_a_file_that_holds_no_key_stops_the_start(tmp_path: Path, text: str) -> None:
    config = Config(data_dir=tmp_path)
    key_file(config).write_text(text)
    with pytest.raises(ConfigError) as wrong:
        operator_key(config)
    assert str(key_file(config)) in str(wrong.value)
    assert not text.strip() or text.strip() not in str(wrong.value)


def test_a_folder_that_cannot_be_written_to_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file, and no folder")
    config = Config.model_construct(data_dir=tmp_path / "data", admin_token=None)
    with pytest.raises(ConfigError) as wrong:
        operator_key(config)
    assert "ADMIN_TOKEN" in str(wrong.value)
    assert "\n" not in str(wrong.value)


def test_it_is_redacted_wherever_it_is_logged(tmp_path: Path) -> None:
    key = key_in(tmp_path)
    assert key.startswith("tgop_")
    assert key not in redact(f"the key {key}, said in passing")
