"""Servers of uvicorn that look a hundred times a second, and not ten times, whether they are to
stop and whether their connections have closed: every test with a gateway waits for both."""

from __future__ import annotations

import asyncio
from contextvars import Context, ContextVar, copy_context
from types import ModuleType
from typing import Any

import uvicorn.server

from tests.waiting import work_for

_PAUSE_S = 0.01
_soon = ContextVar("_soon", default=False)


def in_which_it_is_soon() -> Context:
    """A context for the task of such a server; others of this process stay as they are."""
    context = copy_context()
    context.run(_soon.set, True)
    return context


class _Sooner(ModuleType):
    """asyncio, but for its pauses."""

    def __getattr__(self, name: str) -> Any:
        return self._pause if name == "sleep" else getattr(asyncio, name)

    async def _pause(self, seconds: float) -> None:
        await work_for(_PAUSE_S if _soon.get() else seconds)


vars(uvicorn.server)["asyncio"] = _Sooner("asyncio")
