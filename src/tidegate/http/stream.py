"""Route `POST /stream`: one request, answered while the client waits.

The response's head is sent after admission, so that a refusal is a real 503 or 504. The call runs
in a task of its own. Invariant: however a stream ends, first its upstream call is closed and the
release of its permit is on its way; then it is recorded, once; then the client, if connected, is
answered.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tidegate.call import (
    CLASSIFIER_LIMIT,
    DEFAULT_POOL,
    Admitted,
    Call,
    Caller,
    Delta,
    Event,
    Kind,
    Media,
    Picture,
    Status,
    UsageReport,
    new_id,
)
from tidegate.dialects.spec import wait_comment
from tidegate.errors import (
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    NotFound,
    ShuttingDown,
    StoreUnavailable,
    TidegateError,
    UpstreamMissing,
)
from tidegate.http.body import BodyBudget
from tidegate.http.guards import caller_of, check_models, check_prompt
from tidegate.http.problems import REQUEST_ID_HEADER, problem_response, problem_responses
from tidegate.http.services import (
    SHOW_WAIT_EVERY_S,
    SHOW_WAIT_HEADER,
    TRACE_IN_SCOPE,
    Opening,
    Services,
    services_of,
    shows_wait,
)
from tidegate.http.sse import ClientStalled, EventWriter, abort, disconnected
from tidegate.http.submission import BODY, Submission, ask_of, discard, read_submission
from tidegate.http.views import prefix_of, usage_view
from tidegate.limiter import Permit
from tidegate.record import CallRecord, Failure, Lineage, OutputFile
from tidegate.spine.out import client_left
from tidegate.spine.run import Terms
from tidegate.store.blobs import new_key
from tidegate.store.records import NewJob
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Parent, parent_in

_RECORDED_WITHIN_S = 1.0
_ABORTED_WITHIN_S = 1.0
_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 0.05

log = get_logger()
router = APIRouter(tags=["streams"])


@router.post(
    "/stream",
    response_class=StreamingResponse,
    openapi_extra=BODY,
    responses=problem_responses(400, 401, 403, 408, 413, 415, 422, 429, 500, 502, 503, 504)
    | {
        200: {
            "description": "Events `delta`, `image`, `usage`, then `done` or `error`",
            "content": {
                "text/event-stream": {"example": 'event: delta\ndata: {"text": "A modern "}\n\n'},
                "text/plain": {"example": "A modern family is ..."},
            },
        }
    },
    summary="Submit a prompt and stream the answer",
)
async def stream(request: Request) -> Response:
    """Waits for admission (30 s unless `deadline_ms` is set), then streams the answer: server-sent
    events, or plain text for `Accept: text/plain`. The header `x-tidegate-request-id` has the id,
    by which `/status` shows the record once the stream has ended."""
    services = services_of(request)
    received, received_at = time.monotonic(), datetime.now(UTC)
    caller = await caller_of(request)
    await services.budgets.check(caller)
    opening, hold = services.openings.stream(caller), services.hold(caller)
    try:
        submission = await read_submission(request, services.config, services.blobs, hold=hold)
        hold.keep(len(submission.prompt))
        accepts = request.headers.get("accept", "")
        answer = StreamedAnswer(
            services,
            submission,
            prefix_of(request),
            caller=caller,
            opening=opening,
            hold=hold,
            received=received,
            received_at=received_at,
            plain_text="text/plain" in accepts and "text/event-stream" not in accepts,
            parent=parent_in(request.scope["headers"]),
            show_wait=shows_wait(request.headers.get(SHOW_WAIT_HEADER, "0")),
        )
        await answer.check_models()
    except BaseException:  # cancellation too: the resources that it holds are released
        opening.close()
        hold.release()
        raise
    return answer


@dataclass(frozen=True, slots=True)
class _StreamEnd:
    """How a stream ended. `error` is sent to a connected client."""

    status: Status
    failure: Failure | None = None
    error: TidegateError | None = None


_CLIENT_STALLED = _StreamEnd(
    Status.CANCELLED, Failure("client_stalled", "the client stopped reading and was disconnected")
)


def _failed(error: TidegateError) -> _StreamEnd:
    status = Status.EXPIRED if isinstance(error, DeadlineExceeded) else Status.FAILED
    return _StreamEnd(status, Failure.of(error), error)


class StreamedAnswer(Response):
    """A response that makes the call while it is sent. At its end it closes its `opening` and
    releases its `hold`."""

    def __init__(
        self,
        services: Services,
        submission: Submission,
        prefix: str,
        *,
        caller: Caller,
        opening: Opening,
        hold: BodyBudget,
        received: float,
        received_at: datetime,
        plain_text: bool,
        parent: Parent | None,
        show_wait: bool = False,
    ) -> None:
        super().__init__()
        self._services = services
        self._show_wait = show_wait and not plain_text  # plain text has no comments
        self._is_admitted = self._has_left = False
        self._submission = submission
        self._prefix = prefix
        self._caller = caller
        self._opening, self._hold = opening, hold
        self._priority = min(submission.priority, caller.most_priority)
        self._received = received
        self._received_at = received_at
        self._plain_text = plain_text
        self._request_id = new_id()
        self._outputs: list[OutputFile] = []
        self._ask = ask_of(submission, caller)
        self._classification = services.prompts.classify_by_rules(self._ask)
        kind = self._classification.kind
        self._record = CallRecord(
            "stream",
            caller.tenant_id,
            received_at,
            self._request_id,
            priority=self._priority,
            key_id=caller.key_id,
            subject=submission.subject,
            trail=services.spine.tracing.trail(self._request_id, parent),
            kind=kind,
            model=submission.model,
            streamed=True,
            pool=DEFAULT_POOL,
            # While its kind is unknown it waits for the answer of the classifier.
            waits_for=(DEFAULT_POOL, (CLASSIFIER_LIMIT,) if kind is None else ()),
            waits_since=received_at,
        )
        self._record.lineage = Lineage.of(submission.conversation, self._record.trail)

    async def check_models(self) -> None:
        """Raise Forbidden for a model that the caller may not use, InvalidRequest for a model of
        which no upstream accepts the prompt, UpstreamMissing for a model that this process cannot
        reach."""
        try:
            config = self._services.config
            model = self._submission.model
            check_models(self._caller, model, self._classification, config)
            targets = self._services.spine.targets
            check_prompt(targets, model, self._classification, config, self._ask.files)
        except (Forbidden, InvalidRequest, UpstreamMissing):
            await discard(self._submission, self._services.blobs)
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the call and send its answer, until its end or until the client disconnects."""
        task = asyncio.current_task()
        assert task is not None
        if self._record.trail is not None:
            scope[TRACE_IN_SCOPE] = self._record.trail.trace
        self._services.streams.add(task)
        self._services.board.active_calls.enter(self._record)
        stalled_ms = self._services.config.stalled_reader_ms
        writer = EventWriter(send, plain_text=self._plain_text, stalled_ms=stalled_ms)
        disconnect = asyncio.create_task(disconnected(receive))
        comments = (
            asyncio.create_task(self._send_wait_comments(writer)) if self._show_wait else None
        )
        try:
            end = await self._run(writer, disconnect, task)
            if comments is not None:
                comments.cancel()
            # Shielded: the record must be written even while the process is stopping.
            record = asyncio.create_task(self._store_record(end))
            self._services.streams.add(record)
            record.add_done_callback(self._services.streams.discard)
            await asyncio.shield(record)
            if await self._send_end(end, writer, scope, receive, send):
                abort(scope)
                # Until the server has noticed too; otherwise it would log an unfinished answer.
                await asyncio.wait({disconnect}, timeout=_ABORTED_WITHIN_S)
        finally:
            disconnect.cancel()
            if comments is not None:
                comments.cancel()
            self._services.streams.discard(task)
            self._services.board.active_calls.leave(self._record)
            self._opening.close()
            self._hold.release()

    async def _send_wait_comments(self, writer: EventWriter) -> None:
        """Send comments on the place in the queue while it waits. From the first one on the status
        is 200."""
        with suppress(ClientStalled):  # the answer fails in the same way, and ends with it
            while True:
                await asyncio.sleep(SHOW_WAIT_EVERY_S)
                waited_ms = (time.monotonic() - self._received) * 1000
                comment = wait_comment(await self._services.place_json(self._record, waited_ms))
                if not self._record.waits or self._is_admitted:
                    return
                if not writer.started:
                    await writer.start({REQUEST_ID_HEADER: str(self._request_id)})
                await writer.comment(comment)

    async def _run(
        self, writer: EventWriter, disconnect: asyncio.Task[None], task: asyncio.Task[object]
    ) -> _StreamEnd:
        """Make the call and return how it ended, once it is closed and its permit released. If the
        upstream continues after its client has disconnected, that is later."""
        work = asyncio.create_task(self._answer(writer))
        stopping = False
        try:
            await asyncio.wait({work, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the grace period is over: notify the client
            stopping = True
            task.uncancel()
        finally:
            cut = not work.done()
            self._has_left = cut and not stopping
            while not work.done():
                work.cancel()
                try:
                    await asyncio.wait({work})
                except asyncio.CancelledError:  # the server's grace period is over now
                    task.uncancel()
        error = None if work.cancelled() else work.exception()
        if stopping and (cut or error):
            return _failed(ShuttingDown("this process is stopping; retry"))
        if cut and (work.cancelled() or error):
            return _StreamEnd(Status.CANCELLED, client_left(self._record))
        match error:
            case None:
                return _StreamEnd(Status.SUCCEEDED)
            case ClientStalled():
                return _CLIENT_STALLED
            case TidegateError():
                return _failed(error)
        log.error(Log.INTERNAL_ERROR, request_id=str(self._request_id), exc_info=error)
        return _failed(TidegateError("an internal error; it has been logged"))

    async def _answer(self, writer: EventWriter) -> None:
        prompts, submission = self._services.prompts, self._submission
        self._classification = await prompts.decide(self._ask, within_ms=self._left_ms())
        kind = self._classification.kind
        assert kind is not None
        model = submission.model or self._services.config.model_for(kind)
        self._record.kind, self._record.model, self._record.waits_for = (
            kind,
            model,
            (DEFAULT_POOL, ()),
        )
        if kind is Kind.IMAGE_GENERATION and self._services.blobs.unavailable:
            await self._services.blobs.ping()  # a picture that cannot be stored is not requested
        media = await self._media(kind)
        call = Call(
            request_id=self._request_id,
            prompt=submission.prompt,
            kind=kind,
            model=model,
            media=media,
            tenant_id=self._caller.tenant_id,
            priority=self._priority,
        )

        async def sink(event: Event) -> None:
            await self._emit(writer, event, kind)

        terms = Terms(
            request_id=self._request_id,
            caller=self._caller,
            received=self._received,
            wait_ms=self._submission.deadline_ms or self._services.config.stream_wait_ms,
            priority=self._priority,
            trail=self._record.trail,
            subject=self._submission.subject,
            conversation=self._submission.conversation,
            has_own_deadline=self._submission.deadline_ms is not None,
            left=lambda: self._has_left,
        )

        async def admitted(_permit: Permit | None) -> None:
            self._is_admitted = True
            if not writer.started:
                await sink(Admitted(waited_ms=self._record.queue_ms or 0.0))

        await prompts.run(call, terms, self._record, sink, admitted)

    def _left_ms(self) -> int:
        """Return the time left until the deadline of the admission; negative when it has passed."""
        wait_ms = self._submission.deadline_ms or self._services.config.stream_wait_ms
        return round(wait_ms - (time.monotonic() - self._received) * 1000)

    async def _media(self, kind: Kind) -> tuple[Media, ...]:
        prompt_bytes = len(self._submission.prompt)
        own_bytes = prompt_bytes + sum(one.size_bytes for one in self._ask.attachments)

        def occupy(fetched_bytes: int) -> None:
            self._hold.occupy(own_bytes + fetched_bytes)

        occupy(0)
        try:
            async with asyncio.timeout(self._left_ms() / 1000):
                media = await self._services.prompts.media(self._ask, occupy)
            self._hold.occupy(prompt_bytes + sum(len(one.data) for one in media))
            return media
        except TimeoutError:
            raise DeadlineExceeded(
                "the deadline passed before the files were stored", limit=kind.limit
            ) from None

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

    async def _store_record(self, end: _StreamEnd) -> None:
        record, submission = self._record, self._submission
        parent = None if record.trail is None else record.trail.parent
        job = NewJob(
            request_id=self._request_id,
            created_at=self._received_at,
            prompt=submission.prompt,
            classification=self._classification,
            attachments=submission.attachments,
            image_uri=submission.image_uri,
            model=record.model,
            priority=self._priority,
            tenant_id=self._caller.tenant_id,
            subject=submission.subject,
            key_id=self._caller.key_id,
            conversation=submission.conversation,
            traceparent=None if parent is None else parent.text,
        )
        record.files = tuple(self._outputs)
        record.end(end.status, end.failure)
        await self._services.store.audit.record_stream(job, record)

    async def _send_end(
        self, end: _StreamEnd, writer: EventWriter, scope: Scope, receive: Receive, send: Send
    ) -> bool:
        """Send the end of the answer to a client that is still connected. Return True if the
        connection is to be cut."""
        request_id = str(self._request_id)
        try:
            if end.error is not None and not writer.started:
                await problem_response(end.error, request_id)(scope, receive, send)
            elif end.error is not None:
                await writer.error(end.error, request_id)
                if self._plain_text:
                    return True
                await writer.end()
            elif end.status is Status.SUCCEEDED:
                await self._until_recorded()
                await self._finish(writer)
        except ClientStalled:
            return True
        return end is _CLIENT_STALLED

    async def _until_recorded(self) -> None:
        """Wait, for a short time, until `/status` and `/files` find what `done` refers to.

        The record is written asynchronously, in batches; while PostgreSQL is unavailable it comes
        later.
        """
        store, pause_s = self._services.store, _FIRST_PAUSE_S
        try:
            async with asyncio.timeout(_RECORDED_WITHIN_S):
                while not store.connections.unavailable:
                    try:
                        await store.requests.get(self._request_id, self._caller.tenant_id)
                        return
                    except NotFound:
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except (TimeoutError, StoreUnavailable) as late:
            log.debug(Log.STORE_AWAY, request_id=str(self._request_id), detail=repr(late))

    async def _finish(self, writer: EventWriter) -> None:
        record, answer = self._record, self._record.answer
        if (usage := usage_view(answer.usage)) is not None:
            await writer.usage(usage.of_event())
        await writer.done(
            {
                "request_id": str(self._request_id),
                "status": Status.SUCCEEDED.value,
                "type": self._classification.kind,
                "classified_by": self._classification.by.value,
                "finish_reason": answer.finish_reason,
                "queue_ms": round(record.queue_ms or 0.0, 1),
                "upstream_ms": round(record.upstream_ms or 0.0, 1),
            }
        )
