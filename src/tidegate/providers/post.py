"""Posts to a caller's URL, guarded like the fetching of pictures.

Invariant: nothing of the answer but its status is read; no redirect is followed, since the next
address would be one that nobody asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp.abc import AbstractResolver

from tidegate.errors import FetchRefused
from tidegate.providers.addresses import Address, check_uri, is_public
from tidegate.providers.guard import guarded_session, why_not_sent

_HEADERS = {"User-Agent": "tidegate", "Accept": "*/*", "Accept-Encoding": "identity"}


@dataclass(frozen=True, slots=True)
class Posted:
    """The status of the answer; None without one, and then why, in words."""

    status: int | None = None
    problem: str | None = None


class GuardedPoster:
    """Posts within `timeout_ms` in all; `is_allowed` judges each address."""

    def __init__(
        self,
        *,
        timeout_ms: int,
        is_allowed: Callable[[Address], bool] = is_public,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._timeout_ms = timeout_ms
        self._is_allowed = is_allowed
        self._resolver = resolver

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Posted:
        """Cancelling closes the connection."""
        try:
            target = check_uri(url, self._is_allowed, field="webhook_url")
            async with (
                asyncio.timeout(self._timeout_ms / 1000),
                guarded_session(self._is_allowed, self._resolver, _HEADERS) as session,
                session.post(target, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                return Posted(answer.status)
        except FetchRefused as refused:
            return Posted(problem=refused.message)
        except TimeoutError:
            return Posted(problem=f"webhook_url did not answer within {self._timeout_ms} ms")
        except aiohttp.ClientError as failed:
            return Posted(problem=f"webhook_url {why_not_sent(failed)}")
