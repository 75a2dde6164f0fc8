"""`POST /stream`: one request, answered while the client waits.

The response's head goes out after admission, so that a refusal is a real 503 or 504. The work
runs in a task of its own; when the client leaves or stalls, that task is cancelled, which closes
the upstream call and gives the permit back before anything is recorded.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tidegate.call import (
    DEFAULT_TENANT,
    Admitted,
    Call,
    Classification,
    ClassifiedBy,
    Delta,
    Event,
    Kind,
    Media,
    Picture,
    UsageReport,
    new_id,
)
from tidegate.errors import DeadlineExceeded, ShuttingDown, TidegateError
from tidegate.http.events import ClientStalled, EventWriter, abort
from tidegate.http.forms import Submission, read_submission
from tidegate.http.jobs import BODY, ask_of, prefix_of, problem_responses
from tidegate.http.services import Services, services_of
from tidegate.http.views import usage_view
from tidegate.pipeline import Attempt, attempt_result
from tidegate.store.blobs import new_key
from tidegate.store.records import Failure, NewJob, OutputFile, StreamRecord
from tidegate.store.states import Status
from tidegate.telemetry import Log, get_logger

REQUEST_ID_HEADER = "x-tidegate-request-id"

log = get_logger()
router = APIRouter(tags=["streams"])


@router.post(
    "/stream",
    openapi_extra=BODY,
    responses=problem_responses(400, 408, 413, 415, 422, 503, 504)
    | {
        200: {
            "description": "Events `delta`, `image`, `usage`, then `done` or `error`",
            "content": {
                "text/event-stream": {"example": 'event: delta\ndata: {"text": "A modern "}\n\n'},
                "text/plain": {"example": "A modern family is ..."},
            },
        }
    },
    summary="Ask, and have the answer streamed",
)
async def stream(request: Request) -> Response:
    """Waits for admission (30 s unless `deadline_ms` says otherwise), then streams the answer as
    it comes: server-sent events, or plain text for `Accept: text/plain`."""
    services = services_of(request)
    received = time.monotonic()
    submission = await read_submission(request, services.config, services.blobs)
    plain_text = "text/plain" in request.headers.get("accept", "")
    return StreamedAnswer(
        services, submission, prefix_of(request), received=received, plain_text=plain_text
    )


class StreamedAnswer(Response):
    """The response whose sending is the work itself."""

    def __init__(
        self,
        services: Services,
        submission: Submission,
        prefix: str,
        *,
        received: float,
        plain_text: bool,
    ) -> None:
        super().__init__()
        self._services = services
        self._submission = submission
        self._prefix = prefix
        self._received = received
        self._plain_text = plain_text
        self._request_id = new_id()
        self._attempt = Attempt()
        self._outputs: list[OutputFile] = []
        self._created_at = datetime.now(UTC)
        self._classification = Classification(None, ClassifiedBy.RULES, "not reached")
        self._model = submission.model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Work until the end, or until the client has gone."""
        config = self._services.config
        writer = EventWriter(send, plain_text=self._plain_text, stalled_ms=config.stalled_reader_ms)
        work = asyncio.create_task(self._work(writer, scope))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled() and (error := work.exception()) is not None:
            raise error

    async def _work(self, writer: EventWriter, scope: Scope) -> None:
        status = Status.CANCELLED
        failure: Failure | None = Failure("client_left", "the client went away")
        try:
            await self._answer(writer)
            status, failure = Status.SUCCEEDED, None
        except ClientStalled:
            failure = Failure("client_stalled", "the client stopped reading and was cut")
            abort(scope)
        except TidegateError as error:
            expired = isinstance(error, DeadlineExceeded)
            status, failure = (Status.EXPIRED if expired else Status.FAILED), Failure.of(error)
            if not writer.started:
                raise
            await self._end_in_error(writer, scope, error)
        except asyncio.CancelledError:
            if self._services.draining.is_set() and writer.started:
                stopping = ShuttingDown("this process is stopping")
                failure = Failure.of(stopping)
            raise
        finally:
            # Shielded, as the record must be kept though the client has gone.
            await asyncio.shield(self._record(status, failure))
        if status is Status.SUCCEEDED:
            await self._finish(writer)

    async def _end_in_error(self, writer: EventWriter, scope: Scope, error: TidegateError) -> None:
        try:
            await writer.error(error, str(self._request_id))
            if self._plain_text:
                abort(scope)
            else:
                await writer.end()
        except ClientStalled:
            abort(scope)

    async def _answer(self, writer: EventWriter) -> None:
        services, submission = self._services, self._submission
        ask = ask_of(submission)
        self._classification = await services.pipeline.decide(ask)
        kind = self._classification.kind
        assert kind is not None
        self._model = submission.model or services.config.model_for(kind)
        media = await services.pipeline.media(ask)
        call = Call(self._request_id, submission.prompt, kind, self._model, media, DEFAULT_TENANT)
        wait_ms = submission.deadline_ms or services.config.stream_wait_ms
        spent_ms = round((time.monotonic() - self._received) * 1000)

        async def sink(event: Event) -> None:
            await self._emit(writer, event, kind)

        await services.pipeline.run(
            call, self._attempt, sink, deadline_ms=max(1, wait_ms - spent_ms)
        )

    async def _emit(self, writer: EventWriter, event: Event, kind: Kind) -> None:
        match event:
            case Admitted(waited_ms):
                await writer.start(
                    {
                        REQUEST_ID_HEADER: str(self._request_id),
                        "x-tidegate-type": kind.value,
                        "x-tidegate-queue-ms": f"{waited_ms:.1f}",
                    }
                )
            case Delta(text):
                await writer.delta(text)
            case Picture(media):
                stored = await self._store(media)
                url = f"{self._prefix}/files/{stored.file_id}"
                await writer.image(url, stored.mime_type, stored.size_bytes)
            case UsageReport():
                pass  # sent once, at the end

    async def _store(self, media: Media) -> OutputFile:
        key = new_key(datetime.now(UTC))
        await self._services.blobs.put(key, media.data)
        stored = OutputFile(new_id(), media.mime_type, len(media.data), key, media.name)
        self._outputs.append(stored)
        return stored

    async def _finish(self, writer: EventWriter) -> None:
        attempt, answer = self._attempt, self._attempt.answer
        try:
            if (usage := usage_view(answer.usage)) is not None:
                await writer.usage(usage.model_dump())
            await writer.done(
                {
                    "request_id": str(self._request_id),
                    "status": Status.SUCCEEDED.value,
                    "type": self._classification.kind,
                    "classified_by": self._classification.by.value,
                    "finish_reason": answer.finish_reason,
                    "queue_ms": round(attempt.queue_ms, 1),
                    "upstream_ms": round(attempt.upstream_ms, 1),
                }
            )
        except ClientStalled:
            log.info(Log.REQUEST_FAILED, request_id=str(self._request_id), code="client_stalled")

    async def _record(self, status: Status, failure: Failure | None) -> None:
        attempt, submission = self._attempt, self._submission
        job = NewJob(
            request_id=self._request_id,
            created_at=self._created_at,
            prompt=submission.prompt,
            classification=self._classification,
            attachments=submission.attachments,
            image_uri=submission.image_uri,
            model=self._model,
            tenant_id=DEFAULT_TENANT,
        )
        result = attempt_result(attempt, self._model or "", tuple(self._outputs), failure)
        await self._services.store.record_stream(
            StreamRecord(job, status, datetime.now(UTC), result, failure)
        )


async def _disconnected(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
