"""Tests that run beside others are imported once, and by each process where that failed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
RUNS = "tests/data/runs"


def beside_others(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-n2", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= variables
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=100
    )


def test_a_process_beside_others_finds_the_tests_imported() -> None:
    done = beside_others(f"{RUNS}/imported.py")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_module_that_fails_is_reported_and_not_taken_half() -> None:
    """Half of it would be the tests above the line that failed."""
    done = beside_others(f"{RUNS}/broken.py")
    assert done.returncode != 0
    assert "RuntimeError: can't be imported" in done.stdout
    assert "passed" not in done.stdout


def test_where_no_socket_fits_each_process_imports_the_tests(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    done = beside_others(f"{RUNS}/imported.py", TMPDIR=str(folder))
    assert "1 failed" in done.stdout
    assert "assert os.getpid() != IMPORTED_BY" in done.stdout
