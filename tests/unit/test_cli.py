"""The command line: one clear line for what is wrong, and no wait for what is not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate import __version__, config
from tidegate.supervisor.ground import Ground, environment_of


def _run(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tidegate", *arguments],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("command", [("up",), ("serve",), ("worker",), ("config", "check")])
def test_a_wrong_setting_is_told_in_one_line(command: tuple[str, ...], tmp_path: Path) -> None:
    done = _run(tmp_path, *command, PORT="abc")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "tidegate: PORT=abc: must be a whole number from 0 to 65535\n"


@pytest.mark.parametrize("command", [("up",), ("serve",), ("worker",), ("config", "check")])
def test_a_mistake_in_the_policy_file_is_told_in_one_line(
    command: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "tidegate.toml").write_text('[limits]\n"rpm:m" = "60"\n')
    done = _run(tmp_path, *command)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "tidegate: tidegate.toml: limits.rpm:m=60: must be a whole number or a table\n"
    )


def test_a_wrong_secret_is_never_shown(tmp_path: Path) -> None:
    done = _run(tmp_path, "config", "check", DATABASE_URL="mysql://me:sesame@host/x", REDIS_URL="x")
    assert done.returncode == 2
    assert done.stderr.startswith("tidegate: DATABASE_URL=(hidden): must be ")
    assert "sesame" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_address_that_is_not_ours_is_told_in_one_line(tmp_path: Path) -> None:
    done = _run(tmp_path, "serve", HOST="192.0.2.1", PORT="0", TIDEGATE_DEMO="1")
    assert done.returncode == 2
    assert done.stderr.startswith("tidegate: HOST=192.0.2.1: must be an address of this machine")
    assert done.stderr.count("\n") == 1


def test_a_custom_provider_without_a_key_is_not_answered_by_the_emulator(tmp_path: Path) -> None:
    done = _run(tmp_path, "worker", GEMINI_BASE_URL="http://localhost:1")
    assert done.returncode == 2
    assert done.stderr.startswith("tidegate: GEMINI_API_KEY=(not set): GEMINI_BASE_URL is set")


def test_check_starts_nothing_and_shows_what_the_settings_come_to(tmp_path: Path) -> None:
    done = _run(tmp_path, "config", "check", RATE_LIMITS='{"text_only": 7}')
    assert done.returncode == 0
    assert "kind:text_only        7 at once" in done.stdout
    assert "emulated" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_shown(tmp_path: Path) -> None:
    done = _run(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"tidegate {__version__}\n")


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"fastapi", "uvicorn", "sqlalchemy", "alembic", "asyncpg", "google.genai", "pydantic"}
    program = f"import sys, tidegate.cli; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_children_read_exactly_the_settings_of_their_supervisor(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text("PORT=1\nJOB_DEADLINE_MS=5\nDATABASE_URL_FILE=/nowhere\n")
    given = {
        "DATABASE_URL": "postgresql://me:secret@localhost/x",
        "REDIS_URL": "redis://localhost",
        "GEMINI_API_KEY": "key",
        "RATE_LIMITS": '{"text_only": 7}',
        "CLASSIFIER": "keywords",
        "TIDEGATE_DEMO": "1",
        "DATA_DIR": str(tmp_path / "data"),
        "SEMAPHORE_TIMEOUT": "1.5",
    }
    whole = config.load(given, dotenv=None)
    ground = Ground(whole, lease=None, embedded=False, emulated=False)
    assert config.load(environment_of(ground), dotenv) == whole


def test_the_settings_check_shows_upstreams_and_misses_their_keys(tmp_path: Path) -> None:
    (tmp_path / "tidegate.toml").write_text(
        '[upstreams.openai]\nprovider = "openai"\nkey = "OPENAI_API_KEY"\nmodels = ["gpt-*"]\n'
        '[upstreams.openai.limits]\n"pool:total" = 7\n'
    )
    missing = _run(tmp_path, "config", "check")
    assert missing.returncode != 0
    assert "OPENAI_API_KEY=(not set)" in missing.stderr
    found = _run(tmp_path, "config", "check", OPENAI_API_KEY="sk-a-secret")
    assert "upstream openai: gpt-* (openai at https://api.openai.com/v1)" in found.stdout
    assert "7 at once" in found.stdout
    assert "sk-a-secret" not in found.stdout
