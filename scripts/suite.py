"""`make suite`: the tests beside one another, and what failed so once more by itself.

The tests start real servers, kill them and wait for what follows, five at a time on two cores: on a
busy machine one may come too late that has nothing wrong with it. What fails beside others has to
hold alone, and is named at the end either way. More than `MOST_AGAIN` failures are no accident.

Exit status: that of pytest; 0 where all that failed beside others held alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED = ROOT / ".pytest_cache/v/cache/lastfailed"
PROCESSES = 5
MOST_AGAIN = 5
SOME_FAILED = 1


def tests(processes: int, *arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "-n", str(processes), "--dist", "worksteal"]
    return subprocess.run([*command, *arguments], cwd=ROOT, check=False).returncode


def main(arguments: list[str]) -> int:
    FAILED.unlink(missing_ok=True)
    status = tests(PROCESSES, *arguments)
    if status != SOME_FAILED or not FAILED.exists():
        return status
    failed = sorted(json.loads(FAILED.read_text()))
    if len(failed) > MOST_AGAIN:
        print(f"suite: {len(failed)} tests failed: too many to be by accident")
        return status
    print(f"suite: once more, by themselves: {len(failed)} tests", flush=True)
    status = tests(1, *failed)
    print(f"suite: {'held' if status == 0 else 'NOT all held'} alone, had failed beside others:")
    print("\n".join(f"  {test}" for test in failed))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
