"""Record of a call: filled while the call runs, then stored, counted and traced as it is.

    front creates it ─► spine fills it ─► store writes it ─► listeners count it

Native calls, streams, jobs, batch lines and the classifier's questions have the same record. It is
never copied: the front that creates it, the spine and the store share one object, which must not be
changed once `CallListeners` have it.

Invariants: a listener can neither fail nor delay a call, because ends are delivered in batches, by
a timer or by the record's write-behind; an error of a listener is logged and not propagated. An
answer that an upstream compressed without a request is read from a decoded copy of at most
`MOST_DECODED_BYTES`. So is a stream in AWS's framing, whose messages are binary, each with two
checksums: a message with a wrong checksum is skipped, and the next one is searched for.

    https://smithy.io/2.0/aws/amazon-eventstream.html
"""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from typing import Any, Literal, NamedTuple
from uuid import UUID

import orjson

from tidegate.call import NO_CHARGE, Answer, Charge
from tidegate.errors import TidegateError, UpstreamError
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import Trail

Source = Literal["relay", "stream", "job", "batch", "judge"]
JUDGE: Source = "judge"
REFUSED, RETRIED = "refused", "retried"

KEPT_BYTES = 16_000_000
TAIL_BYTES = 65_536
MOST_DECODED_BYTES = 16_000_000
_MOST_CODED_BYTES = 4_000_000
_MOST_CHARS = 200
_DEEPEST, _LEVELS_AROUND = 200, 40
_NOTIFY_AFTER_S = 0.1
_MOST_WAITING = 500

log = get_logger()


def dumped(value: Any) -> bytes:
    """Return a value as JSON, also if it nests deeper than orjson can write, as parsed values
    may."""
    try:
        return orjson.dumps(value)
    except orjson.JSONEncodeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def answer_within(text: str) -> Any:
    """Return a recorded answer as a value within JSON; as text if it is no JSON, or nests too
    deeply to be written within JSON."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    if text.count("{") + text.count("[") <= _DEEPEST:
        return value
    around = value
    for _ in range(_LEVELS_AROUND):
        around = [around]
    try:
        orjson.dumps(around)
    except orjson.JSONEncodeError:
        return text
    return value


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as it is recorded and shown. `message` is safe to show to a client."""

    code: str
    message: str
    retryable: bool = False
    retry_after_ms: int | None = None
    upstream_status: int | None = None

    @classmethod
    def of(cls, error: TidegateError) -> Failure:
        return cls(
            code=error.code,
            message=error.public_message,  # `/status` shows it to tenants
            retryable=error.retryable,
            retry_after_ms=error.retry_after_ms,
            upstream_status=getattr(error, "status", None),
        )


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A generated image whose bytes are already in the blob store."""

    file_id: UUID
    mime_type: str
    size_bytes: int
    blob_key: str
    name: str = ""


class Lineage(NamedTuple):
    """A call's relation to other calls of its tenant. None means unknown.

    conversation: its name in a header, in `prompt_cache_key`, at the provider, or of the call that
    it continues; else derived from `opening`, a digest of the beginning of its calls: tools, system
    prompt and first message. parent_id: the call whose answer it continues. trace_id, parent_span:
    of the client's own trace.
    """

    conversation: str | None = None
    opening: str | None = None
    parent_id: UUID | None = None
    trace_id: str | None = None
    parent_span: str | None = None

    @classmethod
    def of(cls, conversation: str | None, trail: Trail | None) -> Lineage:
        """Return the lineage that a call's headers state."""
        parent = None if trail is None else trail.parent
        if parent is None:
            return NO_LINEAGE if conversation is None else cls(conversation)
        trace_id, span = f"{parent.trace_id:032x}", f"{parent.span_id:016x}"
        return cls(conversation, trace_id=trace_id, parent_span=span)


NO_LINEAGE = Lineage()
PROMPT_HEAD_CHARS = 500  # of a prompt, to search by


# Compared by identity: a record is one call, not a value.
@dataclass(slots=True, eq=False)
class CallRecord:
    """One call, from its receipt to its end; with several attempts upstream, of the last one.

    None means unknown or not reached. Identity: `source` is what made the call (`judge` is the
    classifier, whose question is not a request of the tenant, but charged to its budgets);
    `endpoint` is the requested path; `operation` never contains a name.

    Admission: `waits` while no attempt is in progress; `waits_for` is the pool and the limits of
    the queue that the call waits or waited in, or a budget. `waits_since`: the start of the wait of
    a job or stream; other calls wait from their request to the limiter. `queue_ms` ends with
    admission. `fence` is the permit's (epoch, sequence).

    Attempts: `attempts` counts those made upstream. `throttled` of them were answered with 429
    (`throttled_by`: by upstream and pool, of which the last may be another), and `faults` failed by
    the upstream's own fault. `tries_elsewhere` counts, by pool, those before the call moved to the
    pool of the last. `failed` is the error of the last failed attempt. `earlier_attempts` were made
    before this record began, for the same line of a batch; in `lapses` of them their process died.
    `sent`: the request began to be sent. `upstream_ms` is the duration of the last.

    Answer: `http_status` is what the client received, 0 before that. `pieces` are the bytes of a
    native answer as received, up to `KEPT_BYTES` and the end of a longer one; `answer_bytes` counts
    all. `coding`: the content coding, if the upstream compressed them without a request. `files`
    are the stored images of a prompt's answer.

    `handed_over`: the call continues, and a worker makes its record. `went_on_ms`: for how long it
    continued after its client had left, None if it did not.

    `slot`: its place in the journal of calls in progress, while it has one.

    End: `status` is a `Status`, `retried` for an attempt after which a job or a line of a batch
    returns to its queue, `refused` for a request that was rejected before there was a call to
    record.
    """

    source: Source
    tenant_id: str
    received_at: datetime
    request_id: UUID | None = None
    endpoint: str = ""
    dialect: str = "gemini"
    operation: str = "generate_content"
    request: bytes = b""
    priority: int = 0
    key_id: str | None = None
    subject: str | None = None
    trail: Trail | None = None
    lineage: Lineage = NO_LINEAGE
    request_omitted_bytes: int = 0  # of a form that is kept in part
    prompt_head: str = ""  # the beginning of the user's last text
    request_type: str | None = None  # content types, as they were sent
    response_type: str | None = None

    kind: str | None = None
    model: str | None = None
    streamed: bool = False
    upstream: str | None = None
    pool: str = ""

    waits: bool = True
    waits_since: datetime | None = None
    waits_for: tuple[str, tuple[str, ...]] = ("", ())
    fence: tuple[int, int] | None = None
    admitted_at: datetime | None = None
    queue_ms: float | None = None

    attempts: int = 0
    earlier_attempts: int = 0
    lapses: int = 0
    throttled_by: dict[tuple[str, str], int] | None = None
    tries_elsewhere: dict[str, int] | None = None
    faults: int = 0
    failed: UpstreamError | None = None
    sent: bool = False
    upstream_ms: float | None = None

    http_status: int = 0
    answer: Answer = field(default_factory=Answer)
    pieces: list[bytes] = field(default_factory=list)
    answer_bytes: int = 0
    coding: bytes = b""
    charge: Charge = NO_CHARGE
    files: tuple[OutputFile, ...] = ()

    handed_over: bool = False
    went_on_ms: float | None = None
    slot: int | None = None
    status: str = ""
    failure: Failure | None = None
    finished_at: datetime | None = None
    _decoded: tuple[int, bytes] = (0, b"")

    @property
    def id(self) -> UUID:
        """The request's id, of a call that is on record."""
        assert self.request_id is not None
        return self.request_id

    @property
    def ended_at(self) -> datetime:
        """The end time of a call that has ended."""
        assert self.finished_at is not None
        return self.finished_at

    def end(self, status: str, failure: Failure | None = None) -> None:
        """Set the end of the call, with the current time if the last attempt has set none."""
        self.status, self.failure = str(status), failure
        self.finished_at = self.finished_at or datetime.now(UTC)

    @property
    def waited_ms(self) -> float:
        """The wait for admission, or for a call that ended without one, until its end."""
        if self.queue_ms is not None or self.admitted_at is not None or self.finished_at is None:
            return self.queue_ms or 0.0
        since = self.waits_since or self.received_at
        return max(0.0, (self.finished_at - since).total_seconds() * 1000)

    @property
    def was_admitted(self) -> bool:
        """Whether the call had a permit, at least in its last admission."""
        return self.admitted_at is not None and self.fence is not None

    @property
    def code(self) -> str | None:
        """The failure's code."""
        return None if self.failure is None else self.failure.code

    def keep(self, piece: bytes) -> None:
        """Add a piece of a native answer."""
        if self.answer_bytes < KEPT_BYTES:
            self.pieces.append(piece)
        else:  # keep only the end, where the usage is reported
            self.pieces[-1] = (self.pieces[-1] + piece)[-TAIL_BYTES:]
        self.answer_bytes += len(piece)

    @property
    def throttled(self) -> int:
        """The number of attempts that were answered with 429."""
        return 0 if self.throttled_by is None else sum(self.throttled_by.values())

    def note_moving(self) -> None:
        """Note that the next attempt is made in a different pool."""
        found = self.tries_elsewhere = self.tries_elsewhere or {}
        found[self.pool] = found.get(self.pool, 0) + self.attempts - sum(found.values())

    def note_throttled(self, upstream: str, pool: str) -> None:
        """Count an attempt that an upstream answered with 429."""
        found = self.throttled_by = self.throttled_by or {}
        found[upstream, pool] = found.get((upstream, pool), 0) + 1

    @property
    def body(self) -> bytes:
        """The kept part of a native answer, as received."""
        if len(self.pieces) != 1:
            self.pieces = [b"".join(self.pieces)]
        return self.pieces[0]

    @property
    def text(self) -> bytes:
        """The kept part of a native answer, decoded if the upstream compressed it; empty if it
        cannot be decoded."""
        if not self.coding or not self.pieces:
            return self.body if self.pieces else b""
        if self._decoded[0] != self.answer_bytes:
            self._decoded = self.answer_bytes, decoded(self.body, self.coding)
        return self._decoded[1]

    @property
    def result(self) -> str:
        """The answer as a job's result: a native answer's body, else the text."""
        return self.text.decode("utf-8", "replace") if self.pieces else self.answer.whole_text

    @property
    def text_bytes(self) -> int:
        """The length of the whole answer, including bytes that were not kept."""
        return len(self.text) if self.coding else self.answer_bytes

    @property
    def response(self) -> bytes:
        """The body that is stored."""
        if not self.pieces:
            return b""
        return (self.text if self.coding else b"") or self.body

    @property
    def omitted_bytes(self) -> int:
        """The number of bytes of the answer's middle that were not kept."""
        if self.answer_bytes <= KEPT_BYTES:
            return 0
        return self.answer_bytes - sum(map(len, self.pieces))

    @property
    def size_bytes(self) -> int:
        """The approximate memory of the record."""
        return 1_000 + len(self.request) + len(self.response)

    def wait_for_budget(self, budget: str, since: datetime) -> None:
        """Wait for a budget whose rest is reserved by calls in progress; an earlier permit was
        released."""
        self.waits_for = self.waits_for[0], (f"{OF_BUDGETS}{budget}",)
        self.waits_since = self.waits_since or since

    def begin_again(self) -> None:
        """Discard the last attempt's answer before the next one."""
        self.waits, self.sent = True, False
        self.pieces, self.answer_bytes, self.coding = [], 0, b""
        self.answer.clear()
        self.charge = NO_CHARGE


OF_BUDGETS = "budget:"  # prefix of a budget's name in `waits_for`

_GZIP, _ZLIB, _RAW = 31, 15, -15
# `deflate` is zlib's format by RFC 9110; some servers omit its header.
_WINDOWS = {b"gzip": (_GZIP,), b"x-gzip": (_GZIP,), b"deflate": (_ZLIB, _RAW)}


def coding_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return the Content-Encoding of an answer, or `FRAMED`; empty for an unencoded one."""
    framing = b""
    for raw_name, value in headers:
        name = raw_name.lower()
        if name == b"content-encoding":
            codings = [coding.strip() for coding in value.lower().split(b",")]
            applied = [coding for coding in codings if coding not in (b"", b"identity")]
            if applied:
                return b", ".join(applied)
        if name == b"content-type" and value.startswith(EVENT_STREAM):
            framing = FRAMED
    return framing


def decoded(data: bytes, coding: bytes) -> bytes:
    """Return the content of an answer, up to where it was cut off. Empty for a coding other than
    gzip and deflate, for more than two codings, and for a body that is too long. Of AWS's framing,
    return the events as text."""
    if len(data) > _MOST_CODED_BYTES or coding.count(b",") > 1:
        return b""
    if coding == FRAMED:
        return b"".join(_event(*message) for message in framed_in(data))
    for applied in reversed(coding.split(b", ")):
        data = _decoded_once(data, applied)
    return data


def _decoded_once(data: bytes, coding: bytes) -> bytes:
    for window in _WINDOWS.get(coding, ()):
        try:
            return _unpacked(data, window)
        except zlib.error:
            continue
    return b""


# gzip may have several members in a row (RFC 1952); other bytes end them.
_MOST_MEMBERS = 10_000
_STEP_BYTES = 16_384  # what follows a member is copied


def _unpacked(data: bytes, window: int) -> bytes:
    """Return decompressed data; empty if it is too long. Raises zlib.error."""
    reader, text, members = zlib.decompressobj(window), bytearray(), 1
    for start in range(0, len(data), _STEP_BYTES):
        piece = data[start : start + _STEP_BYTES]
        while piece:
            try:
                text += reader.decompress(piece, MOST_DECODED_BYTES + 1 - len(text))
            except zlib.error:
                if members == 1:
                    raise
                return bytes(text)
            if len(text) > MOST_DECODED_BYTES or members > _MOST_MEMBERS:
                return b""
            if not reader.eof:
                break
            if window != _GZIP:
                return bytes(text)
            piece, reader = reader.unused_data, zlib.decompressobj(window)
            members += 1
    return bytes(text)


_MOST_OF_PIECE_BYTES = 1_000_000
_MOST_MEMBERS_OF_PIECE = 100


class PieceDecoder:
    """Decoder of the beginning of an answer as it arrives. `reads` is false for a coding other than
    gzip, deflate and AWS's framing, and once the data is invalid or takes too much memory."""

    __slots__ = ("_framed", "_is_gzip", "_read", "_reader", "_windows", "reads")

    def __init__(self, coding: bytes) -> None:
        self._windows = list(_WINDOWS.get(coding, ()))
        self._reader = zlib.decompressobj(self._windows.pop(0)) if self._windows else None
        self._framed = coding == FRAMED
        self._is_gzip = _GZIP in _WINDOWS.get(coding, ())
        self.reads = self._reader is not None or self._framed
        self._read = b""  # while the format is undecided, or a message incomplete

    def take(self, piece: bytes) -> bytes:
        """Return the content of a piece; empty if nothing can be read."""
        if self._framed:
            data = self._read + piece
            end = whole_frames(data)
            self._read = data[end:]
            self.reads = len(self._read) < _PRELUDE.size or _frame_at(self._read, 0)[0] > 0
            return decoded(data[:end], FRAMED)
        text, members = self._unpack(piece), 1
        while self._is_gzip and self._reader is not None and self._reader.eof and self.reads:
            rest, self._reader = self._reader.unused_data, zlib.decompressobj(_GZIP)
            text, members = text + self._unpack(rest), members + 1
            if len(text) > _MOST_OF_PIECE_BYTES or members > _MOST_MEMBERS_OF_PIECE:
                self.reads = False
        return text

    def _unpack(self, piece: bytes) -> bytes:
        """Return the content of a piece of the current member."""
        if self._reader is None or not self.reads:
            return b""
        try:
            text = self._reader.decompress(piece, _MOST_OF_PIECE_BYTES)
        except zlib.error:
            if not self._windows:
                self.reads = False
                return b""
            self._reader = zlib.decompressobj(self._windows.pop(0))
            return self._unpack(self._read + piece)
        self._read += piece if self._windows else b""
        if text:
            self._windows, self._read = [], b""
        self.reads = not self._reader.unconsumed_tail
        return text


# A message: its length and that of its headers, a checksum; headers; payload; a checksum of all.
EVENT_STREAM, FRAMED = b"application/vnd.amazon.eventstream", b"aws-event-stream"
_PRELUDE, _LENGTHS = struct.Struct(">III"), struct.Struct(">II")
_WORD, _SHORT = struct.Struct(">I"), struct.Struct(">H")
_LEAST_FRAME_BYTES, _MOST_FRAME_BYTES = 16, 16 * 1024 * 1024
_TEXT = 7
# Sizes of header values by type, except strings and bytes.
_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
_MOST_SOUGHT = 100_000  # bytes to search for the next message


def frame(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return a message in AWS's framing with short string headers."""
    named = b""
    for name, value in headers.items():
        key, text = name.encode(), value.encode()
        named += b"%c%b%c%b%b" % (len(key), key, _TEXT, _SHORT.pack(len(text)), text)
    lengths = _LENGTHS.pack(_LEAST_FRAME_BYTES + len(named) + len(payload), len(named))
    message = lengths + _WORD.pack(zlib.crc32(lengths)) + named + payload
    return message + _WORD.pack(zlib.crc32(message))


def _frame_at(data: bytes, place: int) -> tuple[int, int]:
    """Return the lengths of the message that begins at `place` and of its headers; 0 if none
    does."""
    if len(data) - place < _PRELUDE.size:
        return 0, 0
    size_bytes, named_bytes, checksum = _PRELUDE.unpack_from(data, place)
    if not _LEAST_FRAME_BYTES + named_bytes <= size_bytes <= _MOST_FRAME_BYTES:
        return 0, 0
    is_valid = zlib.crc32(data[place : place + _LENGTHS.size]) == checksum
    return (size_bytes, named_bytes) if is_valid else (0, 0)


def whole_frames(data: bytes) -> int:
    """Return where the consecutive complete messages end."""
    place = 0
    while size_bytes := _frame_at(data, place)[0]:
        if place + size_bytes > len(data):
            break
        place += size_bytes
    return place


def framed_in(data: bytes) -> Iterator[tuple[dict[str, str], bytes]]:
    """Yield headers and payload of each complete message, in order, without invalid ones."""
    place = sought = 0
    while place < len(data) and sought < _MOST_SOUGHT:
        size_bytes, named_bytes = _frame_at(data, place)
        if not size_bytes:
            place, sought = place + 1, sought + 1
            continue
        start, end = place + _PRELUDE.size, place + size_bytes
        if end > len(data):
            return
        if zlib.crc32(data[place : end - 4]) == _WORD.unpack_from(data, end - 4)[0]:
            yield (
                _headers_in(data[start : start + named_bytes]),
                data[start + named_bytes : end - 4],
            )
        place = end


def _headers_in(data: bytes) -> dict[str, str]:
    """Return the string headers, up to the first one of unknown form."""
    found: dict[str, str] = {}
    place = 0
    try:
        while place < len(data):
            name_end = place + 1 + data[place]
            name, sort = data[place + 1 : name_end].decode("utf-8", "replace"), data[name_end]
            place = name_end + 1
            if (size_bytes := _SIZES.get(sort)) is None:
                (size_bytes,) = _SHORT.unpack_from(data, place)
                place += _SHORT.size
            if sort == _TEXT:
                found[name] = data[place : place + size_bytes].decode("utf-8", "replace")
            place += size_bytes
    except (IndexError, struct.error):
        return found
    return found


def _event(headers: Mapping[str, str], payload: bytes) -> bytes:
    """Return a message as a text event: under its type; the content of a `chunk`, a model's own
    event, as it is; an exception as the body of the corresponding refusal."""
    kind = headers.get(":event-type", "")
    try:
        value = orjson.loads(payload or b"{}")
        if headers.get(":message-type", "event") != "event":
            name = headers.get(":exception-type") or headers.get(":error-code") or "Failure"
            text = value.get("message") or headers.get(":error-message", "")
            name = name[:1].upper() + name[1:]
            value = {"object": "error", "code": name, "__type": name, "message": text}
        elif kind == "chunk":
            value = orjson.loads(b64decode(value["bytes"]))
        else:
            value = {kind: value}
        return b"data: %b\n\n" % orjson.dumps(value)
    except (ValueError, KeyError, TypeError, AttributeError):  # of unknown form
        return b""


@dataclass(frozen=True, slots=True)
class ActiveCall:
    """The state of a call in progress, as processes report it to one another. admitted_at: None
    while the call waits, for its first or another attempt. pool and limits: those it waits for or
    holds, if known."""

    request_id: str
    tenant: str
    source: Literal["relay", "stream"]
    received_at: datetime
    admitted_at: datetime | None = None
    endpoint: str | None = None
    kind: str | None = None
    model: str | None = None
    upstream: str | None = None
    pool: str = ""
    limits: tuple[str, ...] = ()

    @classmethod
    def of(cls, record: CallRecord) -> ActiveCall:
        pool, limits = record.waits_for
        waits = record.waits
        return cls(
            request_id=str(record.request_id),
            tenant=record.tenant_id,
            source="stream" if record.source == "stream" else "relay",
            received_at=record.received_at,
            admitted_at=None if waits else record.admitted_at,
            endpoint=_shortened(record.endpoint) or None,
            kind=record.kind,
            model=_shortened(record.model),
            upstream=None if waits else record.upstream,
            pool=pool if waits else record.pool,
            limits=limits,
        )


class ActiveCalls:
    """The calls in progress in this process, in order of receipt. One per process."""

    def __init__(self) -> None:
        self._calls: dict[CallRecord, None] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"<ActiveCalls {len(self._calls)}>"

    def enter(self, record: CallRecord) -> None:
        self._calls[record] = None

    def leave(self, record: CallRecord) -> None:
        self._calls.pop(record, None)

    def oldest(self, most: int) -> list[ActiveCall]:
        """Return at most so many calls, the oldest first."""
        return [ActiveCall.of(record) for record in islice(self._calls, most)]


def _shortened(text: str | None) -> str | None:
    """Shorten a client's text, which may be as long as its body."""
    return None if text is None else text[:_MOST_CHARS]


Listener = Callable[[Sequence[CallRecord]], None]


class CallListeners:
    """Counts and traces calls once they have ended. One per process.

    A listener is called in the event loop with batches of records: it must be quick, must not wait,
    and changes nothing.
    """

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._waiting: list[CallRecord] = []
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<CallListeners {len(self._listeners)} waiting={len(self._waiting)}>"

    def listen(self, listener: Listener) -> None:
        """Call `listener` with every batch from now on."""
        self._listeners.append(listener)

    def notify(self, batch: Sequence[CallRecord]) -> None:
        """Deliver a batch immediately, from outside the path of calls."""
        if not batch:
            return
        for listener in self._listeners:
            try:
                listener(batch)
            except Exception:  # logged: counting must not fail what it counts
                log.exception(Log.INTERNAL_ERROR, component="call listener")

    def note(self, record: CallRecord) -> None:
        """Deliver an ended call within a tenth of a second, together with others."""
        if not self._listeners:
            return
        self._waiting.append(record)
        if len(self._waiting) >= _MOST_WAITING:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_NOTIFY_AFTER_S, self.flush)

    def flush(self) -> None:
        """Deliver the waiting records; also when the process ends."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        self.notify(waiting)
