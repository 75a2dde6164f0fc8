"""Fetches a picture from a caller's URI without becoming the caller's way into our network.

Invariant: a socket is opened only to an address that `is_allowed`, checked on the very address
that is connected to, for every hop; no more than `max_bytes` are kept; nothing of ours is sent
along (no cookies, credentials, referrer or proxy). One session per fetch: nothing is shared.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL

from tidegate.call import Media
from tidegate.errors import FetchRefused
from tidegate.providers.addresses import Address, check_uri, is_public, refused
from tidegate.providers.guard import guarded_session, why_not_sent
from tidegate.providers.pictures import PICTURE_TYPES, picture_type

__all__ = ["ImageFetcher", "check_uri"]

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "Accept": ", ".join(PICTURE_TYPES),
    "Accept-Encoding": "identity",
    "User-Agent": "tidegate",
}
# Servers that do not say, or say so of everything.
_UNSAID = ("application/octet-stream", "binary/octet-stream")


class ImageFetcher:
    """Fetches pictures of at most `max_bytes` within `timeout_ms` in all, name look-up included.

    `is_allowed` judges each address; `resolver` looks names up (the system's resolver in a
    thread by default). Both are for tests: production uses the defaults.
    """

    def __init__(
        self,
        *,
        max_bytes: int,
        timeout_ms: int,
        is_allowed: Callable[[Address], bool] = is_public,
        resolver: AbstractResolver | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._timeout_ms = timeout_ms
        self._is_allowed = is_allowed
        self._resolver = resolver

    async def fetch(self, uri: str) -> Media:
        """The picture at `uri`. Raises FetchRefused; cancelling closes the connection."""
        try:
            async with asyncio.timeout(self._timeout_ms / 1000), AsyncExitStack() as stack:
                session = await stack.enter_async_context(self._session())
                return await self._follow(session, check_uri(uri, self._is_allowed))
        except TimeoutError:
            raise refused(f"did not arrive within {self._timeout_ms} ms") from None
        except aiohttp.ClientError as failed:
            raise refused(why_not_sent(failed)) from None

    def _session(self) -> aiohttp.ClientSession:
        return guarded_session(self._is_allowed, self._resolver, _HEADERS)

    async def _follow(self, session: aiohttp.ClientSession, url: URL) -> Media:
        for _ in range(MAX_REDIRECTS + 1):
            async with session.get(url, allow_redirects=False) as response:
                if response.status not in _REDIRECTS:
                    return await self._read(response)
                target = response.headers.get("Location", "")
            try:
                url = url.join(URL(target))
            except ValueError:
                raise refused("redirects to something that is not a URL") from None
            url = check_uri(str(url), self._is_allowed)
        raise refused(f"redirects more than {MAX_REDIRECTS} times")

    async def _read(self, response: aiohttp.ClientResponse) -> Media:
        if response.status != 200:
            raise refused(f"was answered with status {response.status}")
        if response.headers.get("Content-Encoding", "identity").strip().lower() != "identity":
            raise refused("was answered with a compressed body, which is not taken")
        said = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
        if said and said not in _UNSAID and not said.startswith("image/"):
            raise refused(f"is not an image but {said[:64]!r}")
        if response.content_length is not None and response.content_length > self._max_bytes:
            raise self._too_large()
        data = bytearray()
        async for chunk in response.content.iter_any():
            data += chunk
            if len(data) > self._max_bytes:
                raise self._too_large()
            if len(data) >= 32 and picture_type(bytes(data[:256])) is None:
                break
        mime_type = picture_type(bytes(data[:256]))
        if mime_type is None:
            raise refused("is not an image of a type that is taken")
        name = "".join(letter for letter in response.url.name if letter.isprintable())
        return Media(mime_type=mime_type, data=bytes(data), name=name[:128])

    def _too_large(self) -> FetchRefused:
        return refused(f"is larger than {self._max_bytes} bytes")
