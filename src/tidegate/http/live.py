"""`GET /status/{request_id}` as server-sent events: `status` at each change, then `done`.

Invariant: whenever a client comes, and comes back, it is told the latest version that it has not
seen; versions that it missed meanwhile are skipped, since the latest says all. A follower holds
nothing but its connection, and their number in a process is bounded. Nothing is told to a key that
was revoked meanwhile.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.call import Caller
from tidegate.call import Scope as Right
from tidegate.errors import (
    InvalidRequest,
    NotFound,
    QuotaExceeded,
    StoreUnavailable,
    TidegateError,
    TooManyFollowers,
)
from tidegate.http.caller import caller_of
from tidegate.http.charged import charged_view
from tidegate.http.events import ClientStalled, EventWriter, abort, disconnected
from tidegate.http.problems import REQUEST_ID_HEADER, problem_response
from tidegate.http.services import Services
from tidegate.store.records import RequestRecord

MEDIA_TYPE = "text/event-stream"
KEEP_ALIVE_S = 15.0
_COME_BACK_MS = 1_000
_PAUSE_S = 1.0
_SEEN = re.compile(r"(?P<version>[0-9]{1,18})(?P<done>-done)?")


# What the description says of it, beside the JSON.
LIVE: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The status; or events `status` at each change, and then `done`",
        "content": {
            MEDIA_TYPE: {"example": 'id: 1\nevent: status\ndata: {"status": "queued"}\n\n'}
        },
    },
    204: {"description": "You have seen all of its events"},
}


def wants_events(request: Request) -> bool:
    return MEDIA_TYPE in request.headers.get("accept", "")


def live_status(
    request: Request, services: Services, record: RequestRecord, prefix: str, caller: Caller
) -> Response:
    """The response that follows `record`. Raises InvalidRequest.

    A client that has seen all of it is told so by 204: browsers come back until they hear that.
    """
    last = request.headers.get("last-event-id")
    seen = None if last is None else _SEEN.fullmatch(last)
    if last is not None and seen is None:
        raise InvalidRequest(
            "Last-Event-ID", "no event has this id", allowed="the id of the last event received"
        )
    version = None if seen is None else int(seen["version"])
    if seen and seen["done"] and record.status.is_end and version == record.version:
        return Response(status_code=204)
    return LiveStatus(request, services, record, prefix, version, caller)


class LiveStatus(Response):
    """Follows one request until it ends, its client leaves, or the process drains."""

    def __init__(
        self,
        request: Request,
        services: Services,
        record: RequestRecord,
        prefix: str,
        seen: int | None,
        caller: Caller,
    ) -> None:
        super().__init__()
        self._request = request
        self._services = services
        self._record = record
        self._prefix = prefix
        self._seen = seen
        self._caller = caller
        self._written_at = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        followers, task = self._services.followers, asyncio.current_task()
        assert task is not None
        try:
            opening = self._services.openings.follower(self._caller)
        except (QuotaExceeded, TooManyFollowers) as many:
            await problem_response(many)(scope, receive, send)
            return
        followers.add(task)
        writer = EventWriter(
            send, plain_text=False, stalled_ms=self._services.config.stalled_reader_ms
        )
        over: set[asyncio.Task[Any]] = {
            asyncio.ensure_future(self._services.draining.wait()),
            asyncio.ensure_future(disconnected(receive)),
        }
        try:
            await writer.start({REQUEST_ID_HEADER: str(self._record.request_id)})
            await writer.come_back(_COME_BACK_MS)
            await self._follow(writer, over)
            await writer.end()
        except ClientStalled:
            abort(scope)
        finally:
            for each in over:
                each.cancel()
            followers.discard(task)
            opening.close()

    async def _follow(self, writer: EventWriter, over: set[asyncio.Task[Any]]) -> None:
        while True:
            record = self._record
            if record.version != self._seen:
                view = await charged_view(self._services, record, self._prefix)
                told = view.model_dump_json(exclude_none=True).encode()
                await writer.status("status", told, str(record.version))
                self._seen, self._written_at = record.version, time.monotonic()
            if record.status.is_end:
                last = {"request_id": str(record.request_id), "status": record.status}
                await writer.status("done", orjson.dumps(last), f"{record.version}-done")
                return
            if not await self._changed(over) or not await self._may_go_on():
                return
            if time.monotonic() - self._written_at >= KEEP_ALIVE_S:
                await writer.keep_alive()
                self._written_at = time.monotonic()

    async def _may_go_on(self) -> bool:
        """Whether the key that was shown still opens it: it may have been revoked meanwhile."""
        try:
            await caller_of(self._request, Right.READ)
        except TidegateError:  # it is told which when it comes back
            return False
        return True

    async def _changed(self, over: set[asyncio.Task[Any]]) -> bool:
        """Wait for a change, though not for long; false when there is nobody to tell any more."""
        record, asked_at = self._record, time.monotonic()
        silent_s = asked_at - self._written_at
        change: asyncio.Task[Any] = asyncio.ensure_future(
            self._services.store.wait_change(
                record.request_id,
                record.tenant_id,
                record.version,
                max(1, round((KEEP_ALIVE_S - silent_s) * 1000)),
            )
        )
        try:
            await asyncio.wait({change, *over}, return_when=asyncio.FIRST_COMPLETED)
            if any(each.done() for each in over):
                return False
            self._record = change.result()
        except NotFound:
            return False  # its time was up, and it was deleted
        except StoreUnavailable:
            pass  # asked again below
        finally:
            change.cancel()
        if self._record.version == record.version and time.monotonic() - asked_at < _PAUSE_S:
            # The store is away, or has too many that wait: it answered at once.
            await asyncio.wait(over, timeout=_PAUSE_S, return_when=asyncio.FIRST_COMPLETED)
        return not any(each.done() for each in over)
