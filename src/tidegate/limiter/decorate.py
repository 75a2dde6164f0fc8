"""Functions that run with a permit in hand.

Invariant: each call of a decorated function is one acquisition, and what the function raises or
returns is not touched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypedDict, TypeVar, Unpack

if TYPE_CHECKING:
    from tidegate.limiter import Tokens
    from tidegate.limiter.limiter import Limiter

P = ParamSpec("P")
R = TypeVar("R")


class AttemptOptions(TypedDict, total=False):
    """The keywords of `Limiter.try_acquire`."""

    tenant: str
    priority: str | None
    tokens: int | Tokens | None
    images: int
    hard_ms: int | None


class AcquireOptions(AttemptOptions, total=False):
    """The keywords of `Limiter.acquire`."""

    deadline_ms: int | None


def limited(
    limiter: Limiter, *limits: str, **options: Unpack[AcquireOptions]
) -> Callable[[Callable[P, Coroutine[Any, Any, R]]], Callable[P, Coroutine[Any, Any, R]]]:
    """Decorate a coroutine function: each call of it waits for a permit and runs while it holds it.

    Takes what `Limiter.acquire` takes; its errors leave the call, and when the permit is lost the
    function is cancelled and the call raises LeaseLost. Raises TypeError for anything but a
    coroutine function: what a plain function or a generator returns would outlive the permit.
    """

    def decorate(
        function: Callable[P, Coroutine[Any, Any, R]],
    ) -> Callable[P, Coroutine[Any, Any, R]]:
        if not inspect.iscoroutinefunction(function):
            raise TypeError(f"{function!r} is no coroutine function")

        @functools.wraps(function)
        async def call(*args: P.args, **kwargs: P.kwargs) -> R:
            async with limiter.acquire(*limits, **options) as permit:
                await permit.confirm()
                return await function(*args, **kwargs)

        return call

    return decorate
