"""The answer to a scrape: what the processes of this machine have seen, and what holds for all.

Invariant: however many ask, the stores are asked once a second, and the text is made apart from the
event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from prometheus_client.exposition import choose_encoder

from tidegate.limiter import Limiter
from tidegate.metrics import standing
from tidegate.metrics.instruments import Instruments
from tidegate.metrics.process import Watch
from tidegate.store.standing import Standing

FRESH_S = 1.0


class Exposition:
    """One per process."""

    def __init__(
        self,
        instruments: Instruments,
        watch: Watch,
        limiters: Mapping[str, Limiter],
        depths: Standing,
    ) -> None:
        self._instruments = instruments
        self._watch = watch
        self._limiters = limiters
        self._depths = depths
        self._answers: dict[str, tuple[float, bytes, str]] = {}
        self._making = asyncio.Lock()

    async def text(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their media type: as OpenMetrics where `accept` asks for it."""
        sort = "openmetrics" if "openmetrics" in accept else "plain"
        async with self._making:
            made_at, body, media_type = self._answers.get(sort, (float("-inf"), b"", ""))
            if time.monotonic() - made_at > FRESH_S:
                self._watch.look()
                given = await standing.read(self._limiters, self._depths)
                encode, media_type = choose_encoder(accept)
                body = await asyncio.to_thread(encode, self._instruments.also(given))
                self._answers[sort] = (time.monotonic(), body, media_type)
        return body, media_type
