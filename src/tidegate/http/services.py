"""Services of the routes, quotas on open connections, the access log, counters of requests.

Invariants: an open stream or long poll is counted from its admission to its close, once, however it
ends; an exception that reaches the access log's middleware is logged once with its traceback, and
the client gets a plain 500 or a closed connection; a request target that PostgreSQL cannot store is
rejected before any route; a process reads a pool at most once per `FRESH_MS`, and probes a store at
most once per `PROBED_EVERY_MS`, however many callers ask.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any, Self, TypeVar, cast
from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit

import orjson
from pydantic import SecretStr
from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidegate.call import ANYBODY, DEFAULT_POOL, Caller, Status
from tidegate.errors import (
    InvalidRequest,
    LimiterUnavailable,
    QuotaExceeded,
    TidegateError,
    TooManyFollowers,
)
from tidegate.http.auth import Authenticator
from tidegate.http.body import BodyBudget, BodyMemory, MemoryBound
from tidegate.http.browsers import Origins, Sessions, SignIn
from tidegate.http.problems import REQUEST_ID_HEADER, problem_response, status_of
from tidegate.http.sse import abort, disconnected
from tidegate.limiter import Limiter, Snapshot, WaitingLine
from tidegate.metrics.instruments import Tally
from tidegate.metrics.process import Board, Exposition, ProcessState, Recent
from tidegate.metrics.verdict import Standing
from tidegate.policy.inspection import Waiting, estimate_of, is_put_back, waiting
from tidegate.policy.rollout import PolicyKeeper
from tidegate.record import REFUSED, CallListeners, CallRecord, Failure, Source
from tidegate.rehearse import Rehearsals
from tidegate.settings import Config
from tidegate.spine.native import Relay
from tidegate.spine.prompt import PromptCalls
from tidegate.spine.run import Spine
from tidegate.spine.upstreams import LiveUpstreams
from tidegate.store.blobs import Blobs
from tidegate.store.budgets import Budgets
from tidegate.store.notifications import ServerClock
from tidegate.store.requests import FoundRequest, Whereabouts
from tidegate.store.store import Store
from tidegate.telemetry.logging import FrequentLog, Log, get_logger

FRESH_MS = 500
# Probes are open to anybody, and one of PostgreSQL makes a connection.
PROBED_EVERY_MS = 250
_MOST_LINES = 1_000
ProbedT = TypeVar("ProbedT")


class RecentReads:
    """A cache of the last read of each pool and of each line of its waiters, and of the last
    probes."""

    def __init__(self) -> None:
        self._probes: dict[str, Recent[Any]] = {}
        self._pools: dict[str, Recent[Snapshot | None]] = {}
        self._lines: dict[tuple[str, str, int, str], Recent[WaitingLine]] = {}

    async def line(self, limiter: Limiter, limit: str, band: int, tenant: str) -> WaitingLine:
        """Return a line of waiters as `Limiter.line` does. Raises LimiterUnavailable."""
        key = limiter.pool, limit, band, tenant
        if key not in self._lines:
            if len(self._lines) >= _MOST_LINES:
                self._lines.clear()
            read = partial(limiter.line, limit, band, tenant)
            self._lines[key] = Recent(FRESH_MS / 1000, read)
        return await self._lines[key].get()

    async def probed(self, name: str, probe: Callable[[], Awaitable[ProbedT]]) -> ProbedT:
        """Return the result of a probe, which all callers share. Raises what the probe raises."""
        if name not in self._probes:
            self._probes[name] = Recent(PROBED_EVERY_MS / 1000, probe)
        recent: Recent[ProbedT] = self._probes[name]
        return await recent.get()

    async def of(self, limiter: Limiter) -> Snapshot | None:
        """Return the snapshot of a pool; None while Valkey is unavailable."""
        if limiter.pool not in self._pools:
            self._pools[limiter.pool] = Recent(FRESH_MS / 1000, partial(_snapshot, limiter))
        return await self._pools[limiter.pool].get()


async def _snapshot(limiter: Limiter) -> Snapshot | None:
    try:
        return await limiter.snapshot()
    except LimiterUnavailable:
        return None


# Of bodies in the temporary files of a process. A form waits there for the limits, as long as its
# client allows.
MOST_SPOOLED_BYTES = 20_000_000_000
MOST_LONG_POLLS = 4_000
MOST_FOLLOWERS = 2_000
_RETRY_AFTER_MS = 1_000


class Opening:
    """An open stream or long poll. `close` is idempotent."""

    __slots__ = ("_counter", "_tenant")

    def __init__(self, counter: Counter[str], tenant: str) -> None:
        counter[tenant] += 1
        self._counter: Counter[str] | None = counter
        self._tenant = tenant

    def close(self) -> None:
        counter, self._counter = self._counter, None
        if counter is None:
            return
        counter[self._tenant] -= 1
        if not counter[self._tenant]:
            del counter[self._tenant]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


class Openings:
    """Counts of open streams and long polls; one object per process. A tenant with a key may use
    half of the long polls, and half of the followers, that the others leave: no number of tenants
    can take them all."""

    def __init__(self) -> None:
        self._streams: Counter[str] = Counter()
        self._long_polls: Counter[str] = Counter()
        self._followers: Counter[str] = Counter()  # of events; they count as long polls too

    def __repr__(self) -> str:
        polls = self._long_polls.total() + self._followers.total()
        return f"<Openings streams={self._streams.total()} polls={polls}>"

    def stream(self, caller: Caller) -> Opening:
        """Count another open stream. Raises QuotaExceeded."""
        open_now = self._streams[caller.tenant_id]
        return _opened(self._streams, caller, open_now, caller.caps.most_streams, "streams")

    def long_poll(self, caller: Caller) -> Opening:
        """Count another long poll. Raises QuotaExceeded."""
        share = _share_of(self._long_polls, caller, MOST_LONG_POLLS)
        if self._long_polls[caller.tenant_id] >= share:
            raise _quota_exceeded(caller, share, "long polls")
        return self._capped_poll(self._long_polls, caller)

    def follower(self, caller: Caller) -> Opening:
        """Count another client that follows a request. Raises QuotaExceeded and
        TooManyFollowers."""
        if self._followers[caller.tenant_id] >= _share_of(self._followers, caller, MOST_FOLLOWERS):
            message = (
                "too many clients follow requests at this process; poll instead, or retry later"
            )
            raise TooManyFollowers(message, retry_after_ms=_RETRY_AFTER_MS)
        return self._capped_poll(self._followers, caller)

    def _capped_poll(self, counter: Counter[str], caller: Caller) -> Opening:
        open_now = self._long_polls[caller.tenant_id] + self._followers[caller.tenant_id]
        return _opened(counter, caller, open_now, caller.caps.most_long_polls, "long polls")


def _share_of(counter: Counter[str], caller: Caller, most: int) -> int:
    """Return how many a caller's tenant may have. Without keys a caller chooses its tenant's name,
    so that a share would have no effect."""
    left = most - counter.total() + counter[caller.tenant_id]
    return left if caller.key_id is None else (left + 1) // 2


def _opened(
    counter: Counter[str], caller: Caller, open_now: int, most: int | None, what: str
) -> Opening:
    if most is not None and open_now >= most:
        raise _quota_exceeded(caller, most, what)
    return Opening(counter, caller.tenant_id)


def _quota_exceeded(caller: Caller, most: int, what: str) -> QuotaExceeded:
    return QuotaExceeded(
        f"tenant {caller.tenant_id} has reached its limit of open {what}",
        limit=f"most_{what.replace(' ', '_')}",
        allowed=f"at most {most} open {what} at a time in each process",
        retry_after_ms=_RETRY_AFTER_MS,
    )


@dataclass(frozen=True, slots=True)
class Services:
    """Services of the routes.

    `leaving` is set when the process is to stop: it is no longer ready. `draining` is set when it
    accepts no more requests: long polls then answer immediately.

    `limiters` and `keepers` are those of every pool; `limiter` and `keeper` those of the pool
    `gemini`. `streams` are the tasks that answer streams: they end, and are recorded, before the
    services close. `followers` are the tasks that stream the status of a request. `listeners` are
    notified of every call that has ended, with the values given to `listeners.listen`. `board` has
    the streams and native calls of this process (`board.active_calls`), and exchanges them with the
    other processes. `standing` judges the whole deployment. `tally` counts answers, `exposition`
    answers scrapes, and `state` reports the state of this process.
    """

    config: Config
    listeners: CallListeners
    tally: Tally
    exposition: Exposition
    state: ProcessState
    board: Board
    standing: Standing
    store: Store
    blobs: Blobs
    limiter: Limiter
    spine: Spine
    prompts: PromptCalls
    keeper: PolicyKeeper
    relay: Relay
    keepers: Mapping[str, PolicyKeeper]
    limiters: Mapping[str, Limiter]
    gate: Authenticator
    operator_key: SecretStr
    origins: Origins
    sign_in: SignIn | None
    sessions: Sessions
    budgets: Budgets
    upstreams: LiveUpstreams
    openings: Openings = field(default_factory=Openings)
    bodies: BodyMemory = field(default_factory=BodyMemory)
    spooled: BodyMemory = field(default_factory=BodyMemory)
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    recent_reads: RecentReads = field(default_factory=RecentReads)
    rehearsals: Rehearsals = field(default_factory=Rehearsals)
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    streams: set[asyncio.Task[Any]] = field(default_factory=set)
    followers: set[asyncio.Task[Any]] = field(default_factory=set)

    @property
    def clock(self) -> ServerClock:
        """Return the clock of stored times, by which all processes judge deadlines."""
        return self.store.notifications.clock

    @property
    def usual_pool(self) -> str:
        """Return the pool of a request that names none: Gemini's, or the first upstream's."""
        upstreams = self.spine.targets.upstreams
        return DEFAULT_POOL if DEFAULT_POOL in upstreams else next(iter(upstreams))

    async def waiting_of(self, found: Whereabouts, now: datetime) -> Waiting:
        """Return what a request waits for, and an estimate of how long. Raises StoreUnavailable."""
        if found.status is not Status.QUEUED:
            return waiting(found, None, now)
        reasons = []
        for place in self.places_of(found):
            reasons.append(await self._waiting_at(place, now))
            if (reasons[-1].limit is None) is is_put_back(place):
                return reasons[-1]
        return reasons[0]

    def places_of(self, found: Whereabouts) -> list[Whereabouts]:
        """Return a job once for each pool that may serve it. See `Targets.places_of`."""
        places = self.spine.targets.places_of(found, self.config)
        return [one for one in places if one.pool in self.limiters] or [found]

    def may_call(self, found: FoundRequest, upstream: str | None) -> bool:
        """Return whether a request was last called at an upstream or, before its first call, may be
        called there; with None always True."""
        if upstream in (None, found.upstream):
            return True
        if found.upstream is not None or found.listed.source != "job":
            return False
        one = found.listed
        place = Whereabouts(
            request_id=one.request_id,
            tenant_id=found.tenant_id,
            pool=found.pool,
            status=one.status,
            kind=one.kind,
            model=one.model,
            claimed_by=None,
            attempts=one.attempts,
            created_at=one.created_at,
            not_before=None,
            admitted_at=one.admitted_at,
            finished_at=one.finished_at,
            failure_code=one.failure_code,
        )
        return any(each.pool == upstream for each in self.places_of(place))

    async def _waiting_at(self, found: Whereabouts, now: datetime) -> Waiting:
        limiter = self.limiters.get(found.pool)
        if limiter is None:
            return waiting(found, None, now)
        snapshot, estimate = await self.recent_reads.of(limiter), None
        if snapshot is not None and not snapshot.recovering_ms:
            ahead = await self.store.running_calls.ahead(found.request_id)
            lines = partial(self.recent_reads.line, limiter)
            try:
                estimate = await estimate_of(lines, found, snapshot, ahead)
            except LimiterUnavailable:  # the answer is valid without an estimate
                estimate = None
        return waiting(found, snapshot, now, estimate)

    async def place_json(self, record: CallRecord, waited_ms: float) -> bytes:
        """Return the JSON of a waiting call's place, for its stream. `waited_ms`: since its request
        was received."""
        pool, limits = record.waits_for
        limiter, place = self.limiters.get(pool), None
        if limiter is not None and limits:
            try:
                place = await limiter.place_of(record.tenant_id, limits, waited_ms)
            except LimiterUnavailable:  # the next comment may have it
                place = None
        fields: dict[str, object] = {"limit": None if place is None else place.held_up_by}
        if place is not None:
            fields |= {"ahead": place.ahead_of_all, "wait_ms": place.wait_ms}
            fields |= {"is_certain": place.is_certain}
        return orjson.dumps(fields)

    def reject_waiters(self) -> None:
        """Answer calls that wait for a permit with 503 now, so that their clients try another
        process; calls with a permit continue."""
        for limiter in self.limiters.values():
            limiter.turn_away()

    def hold(self, caller: Caller) -> BodyBudget:
        """Return the budgets for the body of another request. Without keys a caller chooses its
        tenant's name, so that a share per tenant would have no effect."""
        largest, has_key = self.config.max_body_bytes, caller.key_id is not None
        most_bytes = max(self.config.max_held_bytes, largest)
        in_memory = MemoryBound(most_bytes, largest, shared=has_key)
        on_disk = MemoryBound(
            MOST_SPOOLED_BYTES, MOST_SPOOLED_BYTES // 2, has_key, "disk space", "DATA_DIR"
        )
        spooled = BodyBudget(self.spooled, on_disk, caller.tenant_id)
        return BodyBudget(self.bodies, in_memory, caller.tenant_id, spooled)


def services_of(connection: HTTPConnection) -> Services:
    return cast(Services, connection.app.state.services)


def services_of_scope(scope: Scope) -> Services:
    return cast(Services, scope["app"].state.services)


_ALLOWED = "text in UTF-8 without NUL"


class SoundTarget:
    """ASGI middleware that rejects request targets which PostgreSQL cannot store."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                check_target(scope)
            except InvalidRequest as error:
                await problem_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_target(scope: Scope) -> None:
    """Raise InvalidRequest, which names the parameter or the path."""
    query: bytes = scope["query_string"]
    if b"%" in query:
        for pair in query.split(b"&"):
            name, _, value = pair.partition(b"=")
            label = ascii(unquote_to_bytes(name)[:64].decode("utf-8", "replace"))[1:-1]
            for part in (name, value):
                if "\0" in _text_of(part, label):
                    raise InvalidRequest(label, f"{label} has a NUL character", allowed=_ALLOWED)
    raw: bytes = scope.get("raw_path") or b""
    if b"%" in raw:  # its route rejects NUL in the path, with the right field
        _text_of(raw, "path")


def _text_of(raw: bytes, field: str) -> str:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise InvalidRequest(field, f"{field} is not text in UTF-8", allowed=_ALLOWED) from None


# The header that requests comments on the place of a waiting call in its stream.
SHOW_WAIT_HEADER = "x-tidegate-show-wait"
SHOW_WAIT_EVERY_S = 1.0


def shows_wait(value: str) -> bool:
    """Return the value of the header. Raises InvalidRequest."""
    if value.strip() not in ("0", "1"):
        message = f"{SHOW_WAIT_HEADER} must be 0 or 1"
        raise InvalidRequest(SHOW_WAIT_HEADER, message, allowed="0 or 1")
    return value.strip() == "1"


NATIVE = "native"
# First segments of paths, as labels: a segment that a client makes up is not one.
_ROUTES = {
    *("submit", "stream", "status", "files", "requests", "usage", "health", "admin", "dashboard"),
    *("metrics", "docs", "static"),
}
_BATCHES = ("/v1/batches", "/v1/files", "/v1/messages/batches")


def route_of(path: str) -> str:
    """Return the class of a path that is not a native call's."""
    if path.startswith(_BATCHES):
        return "batches"
    first = path.removeprefix("/llm").lstrip("/").partition("/")[0]
    return first if first in _ROUTES else "other"


_CUT_WITHIN_S = 1.0
_REDIRECT = 307
_REQUEST_ID = REQUEST_ID_HEADER.encode()
CACHEABLE = ("GET", "HEAD")
_CACHE = (b"cache-control", b"private, no-store")
# Paths that machines request all the time: logged at the level `debug`.
_ROUTINE = ("/health", "/llm/health", "/metrics", "/llm/metrics")
TRACE_IN_SCOPE = "tidegate.trace"  # the id of the request's trace, as text
CALLER_IN_SCOPE = "tidegate.caller"  # a Caller: set where the caller is identified
LOGS_ITSELF = "tidegate.logs_itself"  # set for a request that its handler logs and counts

log = get_logger()
log_request = FrequentLog(Log.REQUEST_DONE)


async def _cut(scope: Scope, receive: Receive) -> None:
    """Cut an answer that has begun, and wait until the server has seen its end: otherwise it would
    log an incomplete answer."""
    abort(scope)
    try:
        async with asyncio.timeout(_CUT_WITHIN_S):
            await disconnected(receive)
    except TimeoutError:
        return


class AccessLog:
    """ASGI middleware that logs requests; health checks and scrapes at debug level."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        status = 0  # stays 0 if the client disconnected before an answer
        request_id: str | None = None

        async def watched(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                for name, value in message["headers"]:
                    if name == _REQUEST_ID:
                        request_id = value.decode()
                headers = message["headers"]
                if status == _REDIRECT:
                    headers = [_here(one) for one in headers]
                if scope["method"] in CACHEABLE and not any(n == _CACHE[0] for n, _ in headers):
                    headers = [*headers, _CACHE]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:  # the top of a request's task: logged only here
            log.exception(Log.INTERNAL_ERROR, method=scope["method"], path=scope["path"])
            if not status:
                answer = problem_response(TidegateError("an internal error; it has been logged"))
                await answer(scope, receive, watched)
            else:
                await _cut(scope, receive)
        finally:
            if LOGS_ITSELF not in scope:
                _note_answered(scope, status, request_id, time.monotonic() - started)


def _note_answered(scope: Scope, status: int, request_id: str | None, took_s: float) -> None:
    """Count an answer, and log it after the answers that are ready to be sent: in a burst they
    would wait for the log lines."""
    path = scope["path"]
    tally: Tally = scope["app"].state.services.tally
    fields: dict[str, Any] = {
        "method": scope["method"],
        "path": path,
        "status": status,
        "took_ms": round(took_s * 1000, 1),
        **({"request_id": request_id} if request_id else {}),
        **({"trace_id": scope[TRACE_IN_SCOPE]} if TRACE_IN_SCOPE in scope else {}),
        **who(scope.get(CALLER_IN_SCOPE)),
    }
    tally.answered(route_of(path), status, took_s)
    asyncio.get_running_loop().call_soon(log_answered, fields)


def _here(header: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    """Return a Location with the path only. The redirect of a superfluous slash names a whole URL,
    with http if a proxy in front of us terminates TLS, to which a key would be sent unencrypted."""
    name, value = header
    if name != b"location":
        return header
    parts = urlsplit(value)
    own = parts.netloc and not parts.path.startswith(b"//")
    return (name, urlunsplit((b"", b"", parts.path, parts.query, b""))) if own else header


def log_answered(fields: dict[str, Any]) -> None:
    """Log a request that has been answered."""
    if fields["path"].startswith(_ROUTINE):
        log.debug(Log.REQUEST_DONE, **fields)
    else:
        log_request(fields)


def who(caller: Caller | None) -> dict[str, str]:
    """Return the tenant, and the prefix of the key, if a request named one."""
    if caller is None or caller is ANYBODY:
        return {}
    key = {} if caller.key_id is None else {"key_id": caller.key_id}
    return {"tenant": caller.tenant_id, **key}


def note_refused(scope: Scope, source: Source, error: TidegateError) -> None:
    """Report a rejected request to `/submit` or `/stream` to the listeners."""
    caller: Caller = scope.get(CALLER_IN_SCOPE, ANYBODY)
    now = datetime.now(UTC)
    record = CallRecord(source, caller.tenant_id, now, streamed=source == "stream")
    record.http_status = status_of(error)
    record.end(REFUSED, Failure.of(error))
    services_of(Request(scope)).store.listeners.note(record)
