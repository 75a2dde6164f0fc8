"""Input files through the Files API: upload, wait until usable, delete.

Invariant: the upload URL, which holds the key, is never logged; a file whose upload has finished
is in `names` before anything else can fail, so that it is deleted whatever happens (Google's copy
ends by itself after 48 hours).
"""

from __future__ import annotations

import asyncio
import io
from typing import TYPE_CHECKING, Any

from tidegate.call import Media
from tidegate.errors import UpstreamGarbled, UpstreamRejected, UpstreamTimeout

if TYPE_CHECKING:
    from google.genai.client import AsyncClient
    from google.genai.types import File

POLL_FIRST_MS = 100
POLL_LONGEST_MS = 2_000
READY_WITHIN_MS = 120_000


async def upload(client: AsyncClient, media: Media, names: list[str]) -> dict[str, Any]:
    """Upload one file; its request part. Appends the file's name to `names`.

    Raises UpstreamRejected when the provider can't process it, UpstreamTimeout when it isn't
    usable within 120 s, and whatever the SDK raises.
    """
    config: dict[str, Any] = {"mime_type": media.mime_type}
    if media.name:
        config["display_name"] = media.name[:512]
    file = await client.files.upload(file=io.BytesIO(media.data), config=config)  # type: ignore[arg-type]
    if not file.name:
        raise UpstreamGarbled("the provider gave an uploaded file no name")
    names.append(file.name)
    file = await _usable(client, file, file.name)
    return {"file_data": {"file_uri": file.uri, "mime_type": file.mime_type or media.mime_type}}


async def _usable(client: AsyncClient, file: File, name: str) -> File:
    wait_ms = POLL_FIRST_MS
    try:
        async with asyncio.timeout(READY_WITHIN_MS / 1000) as limit:
            while (state := str(getattr(file.state, "value", file.state))) == "PROCESSING":
                await asyncio.sleep(wait_ms / 1000)
                wait_ms = min(wait_ms * 2, POLL_LONGEST_MS)
                file = await client.files.get(name=name)
    except TimeoutError:
        if limit.expired():
            raise UpstreamTimeout(
                f"the provider had not processed a file after {READY_WITHIN_MS} ms", phase="total"
            ) from None
        raise
    if state == "FAILED":
        raise UpstreamRejected("the provider could not process an uploaded file")
    if not file.uri:
        raise UpstreamGarbled("the provider gave an uploaded file no address")
    return file
