"""Records of calls in progress and of attempts, and the calls that this process has open.

Answers that an upstream compressed unasked are read in a decoded copy of at most `MOST_BYTES`.
"""

from __future__ import annotations

import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Literal
from uuid import UUID

from tidegate.call import NO_CHARGE, Answer, Caller, Charge, Kind
from tidegate.dialects import DIALECTS
from tidegate.dialects.answers import TAIL_BYTES
from tidegate.dialects.spec import NO_FACTS, AnswerFacts, Endpoint, Headers
from tidegate.errors import UpstreamError
from tidegate.spine.routing import Target
from tidegate.store.audit import SOURCE, RelayRecord
from tidegate.store.records import AttemptResult, FailedTry, Failure, OutputFile
from tidegate.store.states import Status
from tidegate.telemetry.tracing import Trail

MOST_BYTES = 16_000_000
_MOST_CODED_BYTES = 4_000_000
_GZIP, _ZLIB, _RAW = 31, 15, -15
# `deflate` is zlib's format by RFC 9110, and at some servers without its head.
_WINDOWS = {b"gzip": (_GZIP,), b"x-gzip": (_GZIP,), b"deflate": (_ZLIB, _RAW)}


def coding_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """In which coding an answer came; empty where it is as it is."""
    for name, value in headers:
        if name.lower() == b"content-encoding":
            coding = value.strip().lower()
            return b"" if coding == b"identity" else coding
    return b""


def decoded(data: bytes, coding: bytes) -> bytes:
    """What an answer says, as far as it goes where it was cut; empty where that cannot be told:
    another coding than gzip and deflate, or too long."""
    if len(data) > _MOST_CODED_BYTES:
        return b""
    for window in _WINDOWS.get(coding, ()):
        reader = zlib.decompressobj(window)
        try:
            text = reader.decompress(data, MOST_BYTES)
        except zlib.error:
            continue
        return b"" if reader.unconsumed_tail else text
    return b""


KEPT_BYTES = 16_000_000
MOST_TRIES = 4


@dataclass(slots=True)
class NativeCall:
    """What the front took in. headers: those that may go on to an upstream. query: without
    its `?` and without a key. received: on the monotonic clock. wait_ms: from receipt to
    admission. subject: whom it is about, for erasing. trail: its place in a trace. repeats: whether
    an upstream that failed is called again by itself; where not, the queue does that. most_tries:
    of all upstreams together."""

    request_id: UUID
    endpoint: Endpoint
    method: str
    query: str
    headers: Headers
    body: bytes
    caller: Caller
    received: float
    received_at: datetime
    wait_ms: int
    priority: int = 0
    subject: str | None = None
    trail: Trail | None = None
    repeats: bool = True
    most_tries: int = MOST_TRIES

    def left_ms(self) -> int:
        """Until its deadline for admission; negative when it has passed."""
        return round(self.wait_ms - (time.monotonic() - self.received) * 1000)


class Out(ABC):
    """The way back to the client. `started` is true once the head of an answer has gone out."""

    __slots__ = ("started",)

    def __init__(self) -> None:
        self.started = False

    @abstractmethod
    async def start(self, status: int, headers: Headers) -> None:
        """The head of an answer; names are in lower case."""

    @abstractmethod
    async def body(self, piece: bytes, more: bool) -> None:
        """A piece of it, the last one without `more` after it."""

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """All of it at once."""
        await self.start(status, headers)
        await self.body(body, False)


@dataclass(slots=True)
class Life:
    """What became of a call; filled step by step, so that one that was cut can be recorded.

    http_status: what the client was told; 0 while nothing. pieces: of the upstream's answer, as it
    came, up to `KEPT_BYTES`; answer_bytes counts all. coding: of these bytes, where the upstream
    compressed them unasked. waits: for its first try or for another one;
    an upstream is not being asked, and has not answered. queue: the pool and the limits in whose
    queue it stands, or stood. sent: the request of its last try began to go out. first_byte_ms:
    of the last try, from then to the first bytes of its answer's body. throttled: tries that were
    answered with 429. failed: by what the last try failed that did. of_upstream: tries that failed
    by the upstream itself.
    """

    waits: bool = True
    kind: Kind | None = None
    model: str | None = None
    streams: bool = False
    target: Target | None = None
    queue: tuple[str, tuple[str, ...]] = ("", ())
    tries: int = 0
    sent: bool = False
    fence: tuple[int, int] | None = None
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float = 0.0
    upstream_ms: float = 0.0
    first_byte_ms: float | None = None
    throttled: int = 0
    failed: UpstreamError | None = None
    of_upstream: int = 0
    trail: Trail | None = None
    http_status: int = 0
    told: AnswerFacts = NO_FACTS
    charge: Charge = NO_CHARGE
    pieces: list[bytes] = field(default_factory=list)
    answer_bytes: int = 0
    coding: bytes = b""
    _decoded: tuple[int, bytes] = (0, b"")

    def keep(self, piece: bytes) -> None:
        if self.answer_bytes < KEPT_BYTES:
            self.pieces.append(piece)
        else:  # only the end, where the usage is told
            self.pieces[-1] = (self.pieces[-1] + piece)[-TAIL_BYTES:]
        self.answer_bytes += len(piece)

    @property
    def answer(self) -> bytes:
        """What was kept of it."""
        if len(self.pieces) != 1:
            self.pieces = [b"".join(self.pieces)]
        return self.pieces[0]

    @property
    def said(self) -> bytes:
        """What was kept of it as it is to be read: decoded where its upstream compressed it, and
        empty where that cannot be done."""
        if not self.pieces or not self.coding:
            return self.answer if self.pieces else b""
        if self._decoded[0] != self.answer_bytes:
            self._decoded = self.answer_bytes, decoded(self.answer, self.coding)
        return self._decoded[1]

    @property
    def said_bytes(self) -> int:
        """How long all of it is, what was not kept too."""
        return len(self.said) if self.coding else self.answer_bytes

    @property
    def omitted_bytes(self) -> int:
        """How much of its middle was not kept."""
        if self.answer_bytes <= KEPT_BYTES:
            return 0
        return self.answer_bytes - sum(map(len, self.pieces))

    def read_usage(self, endpoint: Endpoint, *, whole: bool) -> None:
        """Find in the answer what it says of itself. `whole`: it came to its end."""
        omitted = self.omitted_bytes > 0
        dialect = DIALECTS[endpoint.dialect]
        self.told = dialect.answer_facts(self.said, omitted=omitted, cut=not whole)

    def begin_again(self) -> None:
        """Another try: what the last one brought is not the answer."""
        self.waits, self.sent = True, False
        self.pieces, self.answer_bytes, self.coding = [], 0, b""
        self.told, self.charge = NO_FACTS, NO_CHARGE
        self.first_byte_ms = None


class CallFailed(Exception):
    """An upstream's refusal or fault, with its own words where it had any.

    status 0: it gave no answer. paused_ms: for how long a limit of the call was paused by it.
    told: the client has heard it already, inside of an answer that is at its end.
    """

    def __init__(
        self,
        error: UpstreamError,
        target: Target,
        *,
        status: int = 0,
        headers: Headers | None = None,
        body: bytes = b"",
        told: bool = False,
    ) -> None:
        super().__init__(error.message)
        self.error = error
        self.target = target
        self.status = status
        self.headers = headers or []
        self.body = body
        self.paused_ms = 0
        self.told = told


def record_of(
    call: NativeCall,
    life: Life,
    path: str,
    status: Status,
    failure: Failure | None,
    *,
    http_status: int,
    request_type: str | None = None,
    response_type: str | None = None,
) -> RelayRecord:
    """`path` is the one that was asked; http_status: what the client was told, 0 while nothing; the
    types are those of the bodies, as they were told."""
    target, endpoint = life.target, call.endpoint
    upstream = None if target is None else target.upstream
    caller, charge, told = call.caller, life.charge, life.told
    # By their order: names would double what so many fields cost.
    return RelayRecord(
        call.request_id,
        caller.tenant_id,
        upstream.pool if upstream else "",
        path,
        status,
        http_status,
        call.received_at,
        life.finished_at or datetime.now(UTC),
        call.body,
        life.said or (life.answer if life.pieces else b""),
        life.kind.value if life.kind else None,
        (target.model if target else life.model) or None,
        call.priority,
        life.tries,
        life.admitted_at,
        life.queue_ms,
        life.upstream_ms,
        life.first_byte_ms,
        charge,
        told.finish_reason,
        told.response_id,
        told.model_version,
        failure,
        life.streams,
        caller.key_id,
        call.subject,
        request_type,
        response_type,
        life.omitted_bytes,
        SOURCE,
        upstream.name if upstream else None,
        endpoint.dialect.value,
        endpoint.name,
        life.throttled,
        life.trail,
    )


MOST_CHARS = 200

Source = Literal["relay", "stream"]


@dataclass(frozen=True, slots=True)
class CallUnderWay:
    """How a call stands. admitted_at: None while it waits, for its first try or for another one.
    pool and limits: what it waits for or has, as far as it has come."""

    request_id: str
    tenant: str
    source: Source
    received_at: datetime
    admitted_at: datetime | None = None
    endpoint: str | None = None
    kind: str | None = None
    model: str | None = None
    upstream: str | None = None
    pool: str = ""
    limits: tuple[str, ...] = ()


Look = Callable[[], CallUnderWay]


class UnderWay:
    """One per process. What is entered is told by the function that is given."""

    def __init__(self) -> None:
        self._calls: dict[object, Look] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"<UnderWay calls={len(self._calls)}>"

    def enter(self, call: object, look: Look) -> None:
        """`call` is known by being itself."""
        self._calls[call] = look

    def leave(self, call: object) -> None:
        self._calls.pop(call, None)

    def oldest(self, most: int) -> list[CallUnderWay]:
        """Those that are here for the longest time, the oldest first."""
        return [look() for look in islice(self._calls.values(), most)]


def look_at(call: NativeCall, life: Life, path: str) -> CallUnderWay:
    """A native call as it stands; `path` is the one that was asked."""
    pool, limits = life.queue
    target = None if life.waits else life.target
    return CallUnderWay(
        request_id=str(call.request_id),
        tenant=call.caller.tenant_id,
        source="relay",
        received_at=call.received_at,
        admitted_at=None if life.waits else life.admitted_at,
        endpoint=shortened(path),
        kind=life.kind.value if life.kind else None,
        model=shortened(life.model if target is None else target.model),
        upstream=target.upstream.name if target else None,
        pool=target.upstream.pool if target else pool,
        limits=limits,
    )


def shortened(text: str | None) -> str | None:
    """A text of a client's, which may be as long as its body."""
    return None if text is None else text[:MOST_CHARS]


@dataclass(slots=True)
class Attempt:
    """One try upstream as it goes: filled in step by step, so that a cut one can be recorded.

    `limits` are those that it asks for. `queue_ms` is from `waiting_since`, the receipt of the
    request at first, to admission. `is_marked`: a job's call is on record, as one that may be made.
    `failed_try`: the one before, of another upstream; of such `counted_tries` use up attempts.
    """

    waiting_since: datetime
    answer: Answer = field(default_factory=Answer)
    fence: tuple[int, int] | None = None
    limits: tuple[str, ...] = ()
    admitted_at: datetime | None = None
    finished_at: datetime | None = None
    queue_ms: float = 0.0
    upstream_ms: float = 0.0
    charge: Charge = NO_CHARGE
    upstream: str | None = None
    dialect: str = "gemini"
    operation: str = "generate_content"
    trail: Trail | None = None
    is_marked: bool = False
    failed_try: FailedTry | None = None
    counted_tries: int = 0


def attempt_result(
    attempt: Attempt, model: str, pictures: tuple[OutputFile, ...], failure: Failure | None
) -> AttemptResult | None:
    """The attempt as the store takes it; None when it was never admitted."""
    if attempt.admitted_at is None or attempt.fence is None:
        return None
    answer = attempt.answer
    return AttemptResult(
        model=model,
        fence=attempt.fence,
        admitted_at=attempt.admitted_at,
        finished_at=attempt.finished_at or datetime.now(UTC),
        queue_ms=attempt.queue_ms,
        upstream_ms=attempt.upstream_ms,
        text=answer.whole_text,
        pictures=pictures,
        usage=answer.usage,
        finish_reason=answer.finish_reason,
        model_version=answer.model_version,
        response_id=answer.response_id,
        failure=failure,
        charge=attempt.charge,
        first_byte_ms=answer.first_byte_ms,
        upstream=attempt.upstream,
        dialect=attempt.dialect,
        operation=attempt.operation,
        trail=attempt.trail,
    )
