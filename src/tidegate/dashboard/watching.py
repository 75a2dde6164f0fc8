"""The response that a page's feed is: server-sent events for as long as it is open.

Invariant: nothing goes out to a key that was revoked meanwhile; a client that does not read is cut
off, and one that has gone holds nothing here.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.dashboard.feed import Feed
from tidegate.dashboard.past import Wanted
from tidegate.errors import ShuttingDown, TidegateError, TooManyFollowers
from tidegate.http.admin_gate import admit_admin
from tidegate.http.events import ClientStalled, EventWriter, abort, disconnected
from tidegate.http.problems import problem_response
from tidegate.http.services import Services


class Watching(Response):
    """Shows the feed to one viewer until its client leaves, its key ends or the process drains."""

    def __init__(self, request: Request, services: Services, feed: Feed, wanted: Wanted) -> None:
        super().__init__()
        self._request = request
        self._services = services
        self._feed = feed
        self._wanted = wanted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._feed.watched(self._wanted) as viewer:
                gone = asyncio.ensure_future(disconnected(receive))
                gone.add_done_callback(lambda _: viewer.leave())
                stalled_ms = self._services.config.stalled_reader_ms
                writer = EventWriter(send, plain_text=False, stalled_ms=stalled_ms)
                try:
                    await writer.start({})
                    while (frames := await viewer.take()) and await self._may_go_on():
                        await writer.encoded(frames)
                    await writer.end()
                except ClientStalled:
                    abort(scope)
                finally:
                    gone.cancel()
        except (TooManyFollowers, ShuttingDown) as refused:
            await problem_response(refused)(scope, receive, send)

    async def _may_go_on(self) -> bool:
        """Whether what was shown still opens it; a page that is not told why asks again."""
        try:
            await admit_admin(self._request)
        except TidegateError:
            return False
        return True
