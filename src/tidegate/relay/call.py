"""A native call as it travels: what the front took in, and what became of it."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from tidegate.call import NO_CHARGE, Caller, Charge, Kind
from tidegate.errors import UpstreamError
from tidegate.relay.coding import decoded
from tidegate.relay.headers import Headers
from tidegate.relay.paths import Endpoint
from tidegate.relay.targets import Target
from tidegate.relay.told import NOTHING_TOLD, Told, told_in
from tidegate.relay.usage import TAIL_BYTES
from tidegate.tracing import Trail

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
    told: Told = NOTHING_TOLD
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
        self.told = told_in(endpoint.dialect, self.said, omitted=omitted, cut=not whole)

    def begin_again(self) -> None:
        """Another try: what the last one brought is not the answer."""
        self.waits, self.sent = True, False
        self.pieces, self.answer_bytes, self.coding = [], 0, b""
        self.told, self.charge = NOTHING_TOLD, NO_CHARGE
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
