"""Removing what a verification has left in Valkey, also where that answers slowly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tidegate.errors import TidegateError
from tidegate.verify.promises import Report

_TRIES = 3


async def clean_pool(remove: Callable[[], Awaitable[object]], pool: str, report: Report) -> None:
    """Call `remove` until it has worked, some times at most; then the report says what is left."""
    for tries_left in reversed(range(_TRIES)):
        try:
            await remove()
            return
        except TidegateError as away:
            if not tries_left:
                report.left.append(f"keys of the pool {pool}: {away.message}")
