"""A test that fails beside others runs again alone, and the rerun is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
RUNS = "tests/data/runs"


def suite(reruns: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/suite.py", "--reruns", str(reruns), "-n1", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=100
    )


def noted(reruns: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in reruns.read_text().splitlines()]


def test_a_test_that_holds_alone_lets_the_suite_pass_and_is_reported(tmp_path: Path) -> None:
    reruns = tmp_path / "reruns"
    test = f"{RUNS}/beside_others.py::test_fails_beside_others"
    reruns.write_text(json.dumps({"test": test}) + "\n")  # of an earlier run
    done = suite(reruns, f"{RUNS}/beside_others.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{test}: held alone; in 2 runs by now: a defect" in done.stdout
    _, note = noted(reruns)
    assert note.keys() == {"at", "commit", "test", "alone", "said"}
    assert (note["test"], note["alone"]) == (test, "held")
    assert "AssertionError: beside others" in note["said"]
    assert [path.name for path in tmp_path.iterdir()] == ["reruns"]


def test_a_test_that_fails_alone_too_fails_the_suite(tmp_path: Path) -> None:
    done = suite(tmp_path / "reruns", f"{RUNS}/always.py")
    assert done.returncode == 1
    assert f"{RUNS}/always.py::test_fails: FAILED alone too" in done.stdout
    assert [note["alone"] for note in noted(tmp_path / "reruns")] == ["failed"]
