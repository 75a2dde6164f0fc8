"""Supervisor: processes, started, watched and stopped.

Invariant: this file imports only the standard library, like the supervisor's start (`__main__`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper

# Modules that libraries import if installed, for features that are not used here: redis-py for its
# own metrics, structlog for coloured tracebacks, FastAPI for older models.
OF_REDIS, OF_STRUCTLOG, OF_FASTAPI = "opentelemetry.sdk.metrics", "rich", "pydantic.v1"


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Import as if these modules were not installed, except those imported already. They take a
    seventh of the start, and 6 MB of each process."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def run_role(arguments: Sequence[str], *, is_child: bool) -> bool:
    """Run the process that the arguments name, and return whether they name one: `serve`, `worker`,
    or the command line of a supervisor's child (`up.py`). No parser of command lines is imported:
    it takes a twentieth of the start, and 2 MB. Raises what the role raises."""
    _escape_unencodable()
    match arguments:
        case ["serve"]:
            _serve(None)
        case ["serve", "--fd", descriptor] if is_child:
            _serve(int(descriptor))
        case ["worker"]:
            _work()
        case _:
            return False
    return True


def _serve(descriptor: int | None) -> None:
    with without(OF_REDIS, OF_STRUCTLOG):
        from tidegate.supervisor.api import serve
    from tidegate.supervisor.services import load_to_run

    with without(OF_FASTAPI):
        serve(load_to_run(with_jobs=False), descriptor)


def _work() -> None:
    with without(OF_REDIS, OF_STRUCTLOG):
        from tidegate.supervisor.roles import work
    from tidegate.supervisor.services import load_to_run

    with without(OF_FASTAPI):
        work(load_to_run())


def _escape_unencodable() -> None:
    """Show characters that an output's encoding does not have as escapes."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, TextIOWrapper) and output.errors == "strict":
            output.reconfigure(errors="backslashreplace")
