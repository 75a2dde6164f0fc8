"""`make audit`: looks up every version that uv.lock pins in a database of known vulnerabilities.

Exit status: 0 nothing is known of any; 1 something is known, or the audit itself failed; 3 the
database was not reached. It first asks for a release of which vulnerabilities are known for years:
who does not tell them has no database behind it, and silence on the others would say nothing.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
UV = str(Path(sys.executable).with_name("uv"))
VERSION = "2.10.1"
KNOWN_BAD = "requests==2.19.0"  # CVE-2018-18074 and later ones
TIMEOUT_S = 600
NOT_REACHED = 3


def pip_audit(requirements: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it over a file of pinned versions; `PIP_AUDIT` may name another command to run."""
    usual = f"{shlex.quote(UV)} tool run --quiet --from pip-audit=={VERSION} pip-audit"
    command = shlex.split(os.environ.get("PIP_AUDIT") or usual)
    options = ["--disable-pip", "--progress-spinner", "off", "-r", str(requirements), *arguments]
    return subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )


def knows_what_is_known(folder: Path) -> str:
    """Empty where the database answers with what everybody knows, else why it does not."""
    canary = folder / "canary.txt"
    canary.write_text(f"{KNOWN_BAD}\n")
    try:
        done = pip_audit(canary, "--no-deps", "--format", "json")
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    except (OSError, subprocess.TimeoutExpired) as failed:
        return str(failed)
    if any(one.get("vulns") for one in found):
        return ""
    return f"it has no record even of {KNOWN_BAD}"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        why = knows_what_is_known(Path(name))
        if why:
            print(f"tidegate: NOT AUDITED: the advisory database was not reached ({why})")
            return NOT_REACHED
        pinned = Path(name) / "pinned.txt"
        export = [UV, "export", "--quiet", "--frozen", "--all-extras", "--all-groups"]
        subprocess.run(
            [*export, "--no-emit-project", "--no-header", "--output-file", str(pinned)],
            check=True,
            cwd=ROOT,
        )
        done = pip_audit(pinned, "--require-hashes", "--strict")
    print(done.stdout + done.stderr, end="")
    return min(done.returncode, 1)


if __name__ == "__main__":
    sys.exit(main())
