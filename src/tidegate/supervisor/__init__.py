"""Supervisor: processes, started, watched and stopped.

Invariant: this file imports only the standard library, like the supervisor's start (`__main__`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


def run_child(arguments: Sequence[str]) -> bool:
    """Run the role of a supervisor's child (`up.py` has its command lines), and return whether the
    arguments name one. No parser of command lines is imported: it takes a twentieth of the start,
    and 2 MB. Raises what the role raises."""
    match arguments:
        case ["serve", "--fd", descriptor]:
            with without(OF_REDIS, OF_STRUCTLOG):
                from tidegate.supervisor.api import serve
            from tidegate.supervisor.services import load_sound

            with without(OF_FASTAPI):
                serve(load_sound(with_jobs=False), int(descriptor))
        case ["worker"]:
            with without(OF_REDIS, OF_STRUCTLOG):
                from tidegate.supervisor.roles import work
            from tidegate.supervisor.services import load_sound

            with without(OF_FASTAPI):
                work(load_sound())
        case _:
            return False
    return True
