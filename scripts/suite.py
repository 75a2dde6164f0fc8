"""`make suite`: all tests, beside one another; then each test that failed, once more and alone.

The tests start real servers, kill them and wait for what follows, six at a time on two cores: on
a busy machine a test may fail that has nothing wrong with it. A test that failed beside others has
to hold alone (`-n0`), where every promise of time is held to the letter (`promised_s`). Each rerun
is written to `.pytest_cache/reruns` and printed at the end: a test that was run again in two runs
has a defect, and so has whatever makes more than `MOST_AGAIN` tests fail.

Exit status: that of pytest; 0 where all tests that failed beside others held alone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
RERUNS = ROOT / ".pytest_cache/reruns"
PROCESSES = 6
MOST_AGAIN = 5
MOST_SAID = 2000
SOME_FAILED = 1

Failures = dict[str, str]


def pytest_addoption(parser: pytest.Parser) -> None:
    """As a plugin of pytest (`-p scripts.suite`), this module notes which tests fail."""
    parser.addoption("--failures", type=Path, help="append a line of JSON for each failed test")


class Notes:
    """Appends each failure to a file, with the end of what it said."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            said = report.longreprtext[-MOST_SAID:]
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": report.nodeid, "said": said}) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--failures")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Notes(path))


def tests(failures: Path, *arguments: str) -> tuple[int, Failures]:
    """Run pytest; its exit status, and what each failed test said."""
    failures.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "scripts.suite", "--failures", str(failures)]
    status = subprocess.Popen([*command, *arguments], cwd=ROOT).wait()
    lines = failures.read_text(encoding="utf-8").splitlines() if failures.exists() else []
    failures.unlink(missing_ok=True)
    return status, {note["test"]: note["said"] for note in map(json.loads, lines)}


def commit() -> str:
    """The commit that is tested, with a `+` where files have changed since."""
    answers = [
        subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        for words in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
    ]
    return answers[0].stdout.strip() + ("+" if answers[1].stdout else "")


def note(reruns: Path, failed: Failures, again: Failures) -> None:
    """Append each rerun to the file of all."""
    reruns.parent.mkdir(parents=True, exist_ok=True)
    at, of = datetime.now(UTC).isoformat(timespec="seconds"), commit()
    with reruns.open("a", encoding="utf-8") as file:
        for test, said in sorted(failed.items()):
            line: dict[str, Any] = {"at": at, "commit": of, "test": test}
            line |= {"alone": "failed" if test in again else "held", "said": said}
            file.write(json.dumps(line) + "\n")


def report(reruns: Path, failed: Failures, again: Failures) -> None:
    """Print the reruns of this run, and in how many runs each test was run again."""
    lines = reruns.read_text(encoding="utf-8").splitlines()
    times = Counter(json.loads(line)["test"] for line in lines)
    print(f"suite: {len(failed)} tests failed beside others and ran again alone ({reruns}):")
    for test, said in sorted(failed.items()):
        how = "FAILED alone too" if test in again else "held alone"
        often = f"; in {times[test]} runs by now: a defect" if times[test] > 1 else ""
        print(f"  {test}: {how}{often}\n      {said.strip().rpartition(chr(10))[2]}")


def main(arguments: Sequence[str]) -> int:
    """Run all; see the module."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--reruns", type=Path, default=RERUNS, help="the file of all reruns")
    given, others = parser.parse_known_args(arguments)
    reruns: Path = given.reruns
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # pytest answers it, and ends
        signal.signal(signal.SIGINT, lambda *_: None)
    failures = reruns.with_name(f"failures-{os.getpid()}")
    beside = ["-n", str(PROCESSES), "--dist", "worksteal"]
    status, failed = tests(failures, *beside, *others)
    if status != SOME_FAILED or not failed:
        return status
    if len(failed) > MOST_AGAIN:
        print(f"suite: {len(failed)} tests failed: too many to be by accident")
        return status
    print(f"suite: once more, alone: {len(failed)} tests", flush=True)
    status, again = tests(failures, "-n0", *failed)
    note(reruns, failed, again)
    report(reruns, failed, again)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
