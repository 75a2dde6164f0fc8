"""A question to a provider that costs nothing: which models there are.

Invariant: the key goes to the provider's own address only, and no redirect is followed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import aiohttp

_PATHS = {"gemini": "/v1beta/models?pageSize=1", "openai": "/models", "anthropic": "/v1/models"}


@dataclass(frozen=True, slots=True)
class Probed:
    """The status of the answer; None without one, and then why, in words."""

    status: int | None = None
    problem: str = ""


async def ask_for_models(dialect: str, base_url: str, key: str, timeout_ms: int) -> Probed:
    """Ask a provider that speaks `dialect` (`gemini`, `openai` or `anthropic`). Never raises for
    what the provider or the network does."""
    headers = {
        "gemini": {"x-goog-api-key": key},
        "openai": {"Authorization": f"Bearer {key}"},
        "anthropic": {"x-api-key": key, "anthropic-version": "2023-06-01"},
    }[dialect]
    if not key:  # a server that needs none
        headers = {name: value for name, value in headers.items() if name == "anthropic-version"}
    try:
        async with (
            aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=timeout_ms / 1000), trust_env=False
            ) as session,
            session.get(
                base_url + _PATHS[dialect], headers=headers, allow_redirects=False
            ) as answer,
        ):
            return Probed(answer.status)
    except TimeoutError:
        return Probed(problem=f"no answer within {timeout_ms} ms")
    except (aiohttp.ClientError, ValueError) as failed:
        number = getattr(failed, "errno", None) or 0
        # asyncio's own words for it list every address that was tried.
        words = os.strerror(number) if number > 0 else str(failed) or type(failed).__name__
        return Probed(problem=words)
