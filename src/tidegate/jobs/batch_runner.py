"""What a worker does for batches: validates them, has their lines called, assembles what they gave.

Invariant: each step is claimed and can be begun anew by another worker; a batch whose worker died
goes on where its lines stand.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from tidegate.call import new_id
from tidegate.config import Config
from tidegate.errors import ClaimLost, NotFound, StoreUnavailable
from tidegate.jobs.batch_check import Check
from tidegate.jobs.batch_lines import LineCaller
from tidegate.jobs.batch_output import OutputFile, output_line
from tidegate.jobs.held import Held
from tidegate.relay.detached import LONGEST_BYTES
from tidegate.relay.spine import Relay
from tidegate.store.batches import Batch
from tidegate.store.bell import BATCHES
from tidegate.store.blobs import Blobs
from tidegate.store.records import Json
from tidegate.store.store import Store
from tidegate.telemetry import Log, get_logger

_LOOK_EVERY_S = 0.5
_CHUNK_LINES = 500
_CHUNK_BYTES = 4_000_000

log = get_logger()


class BatchRunner:
    """One process's share of all batches."""

    def __init__(
        self, config: Config, store: Store, blobs: Blobs, relay: Relay, held: Held
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._folder = config.data_dir / "tmp"
        self._lines = LineCaller(config, store, relay, held)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set; then finish what is called within the grace."""
        loops = (self._lines.feed, self._conduct)
        tasks = [asyncio.create_task(self._forever(loop)) for loop in loops]
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._lines.drain()

    async def _forever(self, loop: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await loop()
            except StoreUnavailable as away:
                log.debug(Log.STORE_AWAY, detail=away.message)
            except Exception:  # the top of a task: logged, and the loop starts again
                log.exception(Log.WORKER_LOOP_FAILED)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _conduct(self) -> None:
        """See to the batches as wholes, one after the other."""
        while True:
            await self._store.batches.expire()
            await self._lines.leave_ended()
            await self._lines.leave_held()
            await self._store.batch_lines.retake()
            while (batch := await self._store.batches.take()) is not None:
                try:
                    await (
                        self._validate(batch)
                        if batch.status == "validating"
                        else self._assemble(batch)
                    )
                    await self._forget_input(batch)
                except ClaimLost:
                    continue
                finally:
                    await self._store.batches.free(batch)
            mark = self._store.work_mark(BATCHES)
            await self._store.wait_work(round(_LOOK_EVERY_S * 1000), mark, BATCHES)

    async def _forget_input(self, batch: Batch) -> None:
        """Delete the bytes of a file whose owner deleted it while the batch had yet to read it."""
        if not await self._store.batches.needs_blob(batch.input_blob):
            await self._blobs.delete([batch.input_blob])

    async def _validate(self, batch: Batch) -> None:
        check = Check(batch.endpoint)
        ready: list[Json] = []
        size_bytes = number = 0
        try:
            async for raw in lines_of(self._blobs.stream(batch.input_blob)):
                number += 1
                sound = check.take(number, raw)
                if check.is_over:
                    break
                if sound is None or check.errors:
                    continue
                ready.append(
                    {
                        "line": sound.line,
                        "id": new_id(),
                        "custom_id": sound.custom_id,
                        "body": sound.body,
                    }
                )
                size_bytes += len(sound.body)
                if len(ready) >= _CHUNK_LINES or size_bytes > _CHUNK_BYTES:
                    await self._store.batches.add_lines(batch, ready)
                    ready, size_bytes = [], 0
            check.end()
        except NotFound:
            gone = "the input file is not there any more"
            check.errors.append(
                {"code": "file_not_found", "line": None, "message": gone, "param": "input_file_id"}
            )
        if check.errors:
            await self._store.batches.refuse(batch, check.errors)
            return
        if ready:
            await self._store.batches.add_lines(batch, ready)
        await self._store.batches.begin(batch, check.lines)

    async def _assemble(self, batch: Batch) -> None:
        with OutputFile(self._folder) as output, OutputFile(self._folder) as errors:
            last = 0
            while rows := await self._store.batches.lines_after(batch, last, _CHUNK_LINES):
                last = rows[-1]["line"]
                said = [output_line(row, batch.ends_as) for row in rows]
                await output.write([line for succeeded, line in said if succeeded])
                await errors.write([line for succeeded, line in said if not succeeded])
            kept = (
                await output.keep(batch, "output", self._blobs),
                await errors.keep(batch, "error", self._blobs),
            )
            try:
                await self._store.batches.end(batch, *kept)
            except ClaimLost:
                await self._blobs.delete([one.blob_key for one in kept if one is not None])
                raise


async def lines_of(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a file that comes in pieces; one that is too long ends as a broken one."""
    begun: list[bytes] = []
    room_bytes = LONGEST_BYTES
    async for piece in pieces:
        *ends, rest = piece.split(b"\n")
        for end in ends:
            yield b"".join((*begun, end[:room_bytes]))
            begun, room_bytes = [], LONGEST_BYTES
        if kept := rest[:room_bytes]:
            begun.append(kept)
            room_bytes -= len(kept)
    if begun:
        yield b"".join(begun)
