"""The exit codes of every command, once: for scripts, the help and the documentation."""

from __future__ import annotations

from typing import NamedTuple

from tidegate.errors import (
    ConfigError,
    GatewayRefused,
    GatewayUnreachable,
    InvalidRequest,
    LimiterUnavailable,
    StoreUnavailable,
    TidegateError,
)

DONE = 0
FAILED = 1
WRONG = 2
REFUSED = 3
AWAY = 4
INTERRUPTED = 130


class Exit(NamedTuple):
    code: int
    means: str


EXITS = (
    Exit(DONE, "all is done"),
    Exit(
        FAILED,
        "it failed: the request, lines of a batch, a check of doctor; or there is no such thing",
    ),
    Exit(WRONG, "an argument, a setting or a file of yours is wrong"),
    Exit(REFUSED, "refused: no key or a wrong one, or a cap or budget is reached"),
    Exit(AWAY, "Tidegate, Valkey or PostgreSQL can't be reached"),
    Exit(INTERRUPTED, "interrupted by Ctrl-C"),
)

# The help makes a line of each paragraph.
EPILOGUE = "Exit codes:\n\n" + "\n\n".join(f"{one.code}: {one.means}" for one in EXITS)

_WRONG_STATUSES = (400, 405, 409, 413, 415, 422)
_REFUSING_STATUSES = (401, 403, 429)
_AWAY_STATUSES = (408, 502, 503, 504)


def code_of(error: TidegateError) -> int:
    """The exit code for an error that ends a command."""
    match error:
        case ConfigError() | InvalidRequest():
            return WRONG
        case GatewayUnreachable() | LimiterUnavailable() | StoreUnavailable():
            return AWAY
        case GatewayRefused(status=status):
            return _code_of_status(status)
    return FAILED


def _code_of_status(status: int) -> int:
    if status in _WRONG_STATUSES:
        return WRONG
    if status in _REFUSING_STATUSES:
        return REFUSED
    return AWAY if status in _AWAY_STATUSES else FAILED
