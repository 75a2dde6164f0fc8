"""Following a request until it changes.

Invariant: nobody is followed for a client that has gone, nor by a process that is to stop.
"""

from __future__ import annotations

import asyncio
import time

from starlette.requests import Request

from tidegate.http.events import disconnected
from tidegate.http.services import Services
from tidegate.store.records import RequestRecord
from tidegate.store.states import Status


async def until_changed(
    request: Request, services: Services, record: RequestRecord, wait_s: float
) -> RequestRecord:
    """Follow the record until its status differs or nobody should wait any longer.

    That is when the time is up, this process drains, or the client has gone.
    """
    until = time.monotonic() + wait_s
    enough = {
        asyncio.ensure_future(services.draining.wait()),
        asyncio.ensure_future(disconnected(request.receive)),
    }
    try:
        first: Status = record.status
        while record.status is first and (left_s := until - time.monotonic()) > 0:
            change = asyncio.ensure_future(
                services.store.wait_change(
                    record.request_id, record.tenant_id, record.version, round(left_s * 1000)
                )
            )
            try:
                await asyncio.wait({change, *enough}, return_when=asyncio.FIRST_COMPLETED)
                if not change.done():
                    break
                record = change.result()
            finally:
                change.cancel()
            if any(task.done() for task in enough):
                break
        return record
    finally:
        for task in enough:
            task.cancel()
