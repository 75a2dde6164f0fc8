"""GeminiProcessor: one call of Gemini's API for a prompt, its files and its answer.

Events of an answer are read as they come. A large file goes through the Files API, and is deleted
after the call.

Invariants: `run` ends only after its upstream responses are closed, so that a permit around it
covers the whole call; one request is one attempt; only UpstreamErrors, the sink's own exception
and cancellation come out; an answer holds a piece before its event is emitted; answers are
bounded; uploaded files are deleted whatever happens; the upload URL, which holds the key, is never
logged.
"""

from __future__ import annotations

import asyncio
import re
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, TypeVar

import orjson

from tidegate.call import (
    Answer,
    Call,
    Delta,
    Event,
    Kind,
    Media,
    Picture,
    Sink,
    Tier,
    Usage,
    UsageReport,
)
from tidegate.classify import question
from tidegate.dialects import refusals
from tidegate.dialects.answers import with_searches, with_tier
from tidegate.dialects.gemini import modality_details
from tidegate.dialects.headers import tier_in
from tidegate.errors import (
    EmptyAnswer,
    PromptBlocked,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from tidegate.policy.access import Access, AccessOptions, Authentication
from tidegate.telemetry.logging import Log, get_logger
from tidegate.telemetry.tracing import HEADER
from tidegate.upstream.transport import (
    Exchange,
    RelayWire,
    RequestPlace,
    Signer,
    Timeouts,
    out_of_time,
)

T = TypeVar("T")
Json = dict[str, Any]
Fields = Sequence[tuple[bytes, bytes]]

_ANSWER = frozenset(
    ("candidates", "promptFeedback", "usageMetadata", "modelVersion", "responseId", "createTime")
)


class AnswerReader:
    """Reads the objects of one answer, as they were parsed, into `answer`.

    object  --take-->  events, in order       end  --finish-->  fine, or an UpstreamError
    """

    def __init__(self, kind: Kind, answer: Answer) -> None:
        self._kind = kind
        self._answer = answer
        self._block_reason: str | None = None
        self._chunks = 0
        self._blanks = 0
        self._candidates = 0
        self._queries: set[str] = set()

    def take(self, chunk: Any) -> list[Event]:
        """Events of an object: text and pictures, then the usage when it has changed. Raises
        ValueError where its shape is not the API's."""
        if not isinstance(chunk, dict) or _ANSWER.isdisjoint(chunk):
            self._blanks += 1
            return []
        self._chunks += 1
        answer = self._answer
        answer.model_version = _text(chunk, "modelVersion") or answer.model_version
        answer.response_id = _text(chunk, "responseId") or answer.response_id
        if (reason := _text(_object(chunk, "promptFeedback"), "blockReason")) is not None:
            self._block_reason = reason[:_LONGEST_WORD]
        events: list[Event] = []
        if candidates := _objects(chunk, "candidates"):
            self._candidates += 1
            events += self._take_candidate(candidates[0])
        usage = usage_of(_object(chunk, "usageMetadata"), answer.usage)
        if self._queries:
            usage = with_searches(usage, len(self._queries))
        if usage != answer.usage:
            answer.usage = usage
            events.append(UsageReport(usage))
        return events

    def _take_candidate(self, candidate: Json) -> Iterator[Event]:
        answer = self._answer
        if (reason := _text(candidate, "finishReason")) is not None:
            answer.finish_reason = reason[:_LONGEST_WORD]
        if grounding := _object(candidate, "groundingMetadata"):
            queries = grounding.get("webSearchQueries") or ()
            self._queries.update(one for one in queries if isinstance(one, str) and one)
        for part in _objects(_object(candidate, "content"), "parts"):
            if part.get("thought"):
                continue
            if text := _text(part, "text"):
                answer.text.append(text)
                yield Delta(text)
            elif (picture := _picture(_object(part, "inlineData"))) is not None:
                answer.pictures.append(picture)
                yield Picture(picture)

    def finish(self) -> None:
        """The answer has ended. Raises PromptBlocked, EmptyAnswer, UpstreamGarbled when nothing in
        it was an answer, or UpstreamUnavailable when it was cut: an answer ends with a finish
        reason, so content without one is only a part.
        """
        answer = self._answer
        if self._blanks and not self._chunks:
            raise _garbled()
        content = bool(answer.text or answer.pictures)
        if self._block_reason is not None and not content:
            raise PromptBlocked(
                f"the provider refused the prompt ({self._block_reason})",
                reason=self._block_reason,
            )
        if answer.finish_reason is None and (content or self._candidates or not self._chunks):
            raise UpstreamUnavailable("the provider's answer broke off before its end")
        if not content or (self._kind is Kind.IMAGE_GENERATION and not answer.pictures):
            missing = "picture" if self._kind is Kind.IMAGE_GENERATION else "content"
            raise EmptyAnswer(
                f"the provider's answer has no {missing} ({answer.finish_reason or 'no reason'})",
                finish_reason=answer.finish_reason,
            )


_LONGEST_WORD = 100
_URL_SAFE = str.maketrans("-_", "+/")


def _picture(blob: Json) -> Media | None:
    kind, data = _text(blob, "mimeType") or "", _text(blob, "data")
    if not data or not kind.startswith("image/"):
        return None
    return Media(mime_type=kind, data=b64decode(data.translate(_URL_SAFE), validate=True))


def _text(of: Json, name: str) -> str | None:
    found: str | None = _typed(of, name, str, None)
    return found


def _object(of: Json, name: str) -> Json:
    found: Json = _typed(of, name, dict, {})
    return found


def _objects(of: Json, name: str) -> list[Json]:
    found: list[Json] = _typed(of, name, list, [])
    if not all(type(one) is dict for one in found):
        raise ValueError(name)
    return found


def _typed(of: Json, name: str, kind: type, absent: Any) -> Any:
    """A member, which must be of a type. Raises ValueError."""
    value = of.get(name)
    if value is None:
        return absent
    if type(value) is not kind:
        raise ValueError(name)
    return value


def usage_of(said: Json, before: Usage) -> Usage:
    """The usage so far: figures that are left out keep their last value. Raises ValueError."""
    if not said:
        return before
    taken = [*_counts(said, "promptTokensDetails"), *_counts(said, "toolUsePromptTokensDetails")]
    return Usage(
        input_tokens=_later(said, "promptTokenCount", before.input_tokens),
        output_tokens=_later(said, "candidatesTokenCount", before.output_tokens),
        thoughts_tokens=_later(said, "thoughtsTokenCount", before.thoughts_tokens),
        cached_tokens=_later(said, "cachedContentTokenCount", before.cached_tokens),
        total_tokens=_later(said, "totalTokenCount", before.total_tokens),
        details=modality_details(taken, _counts(said, "candidatesTokensDetails")) or before.details,
    )


def _counts(said: Json, name: str) -> list[tuple[Any, Any]]:
    return [(one.get("modality"), one.get("tokenCount")) for one in _objects(said, name)]


def _later(said: Json, name: str, before: int | None) -> int | None:
    count: int | None = _typed(said, name, int, None)
    return before if count is None or count < 0 else count


class _Events:
    """Objects of an answer, out of its bytes: those of server-sent events, or of a body that is
    JSON as a whole, as of a server that knows no streams. Raises ValueError for what is neither."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []  # of a line that has not ended
        self._data: list[bytes] = []  # of an event that has not ended
        self._body: list[bytes] = []  # lines of no event

    def take(self, piece: bytes) -> Iterator[Any]:
        self._rest.append(piece)
        if b"\n" in piece:
            *lines, rest = b"".join(self._rest).split(b"\n")
            self._rest = [rest]
            yield from self._lines(lines)

    def end(self) -> Iterator[Any]:
        yield from self._lines([b"".join(self._rest), b""])
        if self._body:
            yield orjson.loads(b"\n".join(self._body))

    def _lines(self, lines: list[bytes]) -> Iterator[Any]:
        for ended in lines:
            line = ended.rstrip(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:])
            elif not line:
                if self._data:
                    data, self._data = b"\n".join(self._data), []
                    yield orjson.loads(data)
            elif not line.startswith(_OTHER_FIELDS):
                self._body.append(line)


_OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")


def _garbled() -> UpstreamGarbled:
    return UpstreamGarbled("the provider's answer is not what its protocol says")


_MODELS_KEPT = 256
_MODEL = re.compile(r"(?:(?:models|tunedModels)/)?[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@lru_cache(_MODELS_KEPT)
def model_path(model: str) -> str:
    """`model` as it may stand in a URL. Raises UpstreamRejected for anything but a plain name."""
    if not _MODEL.fullmatch(model) or ".." in model:
        raise UpstreamRejected("the model's name is not one that the provider could know")
    return model


def request_of(call: Call, parts: Sequence[Json]) -> bytes:
    """The body of a call: `parts` are its files. Raises UpstreamRejected for what is no Unicode."""
    settings = {"responseModalities": ["TEXT", "IMAGE"]}
    body = {
        "contents": [turn(call.prompt, parts)],
        "generationConfig": settings if call.kind is Kind.IMAGE_GENERATION else {},
    }
    if call.tier is Tier.FLEX:
        body["serviceTier"] = call.tier.value
    return _json(body)


def _json(body: Json) -> bytes:
    try:
        return orjson.dumps(body)
    except TypeError:
        said = "the request could not be built: its text is no Unicode"
        raise UpstreamRejected(said, status=400) from None


def turn(prompt: str, parts: Sequence[Json]) -> Json:
    """One user turn: the files' parts, then the prompt where there is one."""
    text = [{"text": prompt}] if prompt else []
    return {"role": "user", "parts": [*parts, *text]}


def inline(media: Media) -> Json:
    return {
        "inlineData": {"data": b64encode(media.data).decode(), "mimeType": media.mime_type},
    }


def too_large_for_inline(media: Sequence[Media], inline_max_bytes: int) -> set[int]:
    """Indexes of the files to upload beforehand: the largest, until the rest fits."""
    if not media:
        return set()
    rest_bytes = sum(len(item.data) for item in media)
    chosen: set[int] = set()
    for index in sorted(range(len(media)), key=lambda index: -len(media[index].data)):
        if rest_bytes <= inline_max_bytes:
            break
        chosen.add(index)
        rest_bytes -= len(media[index].data)
    return chosen


def question_of(prompt: str, mime_types: Sequence[str]) -> bytes:
    """The body of the classifier's question; its answer can only name a kind which the files
    allow."""
    texts = question.data_of(prompt, mime_types)
    body = {
        "contents": [{"role": "user", "parts": [{"text": text} for text in texts]}],
        "systemInstruction": {"parts": [{"text": question.instruction(mime_types)}]},
        "generationConfig": {
            "temperature": 0.0,
            "maxOutputTokens": question.MAX_ANSWER_TOKENS,
            "responseMimeType": "application/json",
            "responseSchema": {
                "type": "OBJECT",
                "properties": {
                    "kind": {"type": "STRING", "enum": question.kinds_allowed(mime_types)},
                    "reason": {"type": "STRING"},
                },
                "required": ["kind", "reason"],
                "propertyOrdering": ["kind", "reason"],
            },
        },
    }
    return _json(body)


POLL_FIRST_MS = 100
POLL_LONGEST_MS = 2_000
READY_WITHIN_MS = 120_000
MAX_ANSWER_BYTES = 64_000_000
API_VERSION = "v1beta"
FORGET_WITHIN_MS = 10_000
CLOSE_WITHIN_S = 2.0
_REFUSAL_BYTES = 65_536
_PIECE_BYTES = 8_388_608  # of an upload; a multiple of 256 KiB
_PLAIN = ((b"accept-encoding", b"identity"),)
_IN_JSON = ((b"content-type", b"application/json"), *_PLAIN)
_FILE = re.compile(r"files/[A-Za-z0-9_-]{1,100}")


class GeminiProcessor:
    """Calls Gemini. One processor per event loop; any number of concurrent calls, whose connections
    the limiter bounds."""

    def __init__(
        self,
        *,
        api_key: str,
        base_url: str,
        timeouts: Timeouts,
        inline_max_bytes: int = 20_000_000,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
        access: Access | None = None,
        signers: Mapping[Authentication, Signer] | None = None,
    ) -> None:
        """`base_url` may have a path; the version (`v1beta`) is appended unless it ends with it.
        Files go inline up to `inline_max_bytes` in all, beyond that through the Files API.
        `access`: of the upstream, where it is more than an address and a key; `signers` have its
        credentials.
        """
        self._api_key = api_key
        self._base_url = base_url.rstrip("/").removesuffix(f"/{API_VERSION}")
        self._access = access or AccessOptions().access("gemini", self._base_url, api_key)
        self._signers = signers or {}
        self._timeouts = timeouts
        self._inline_max_bytes = inline_max_bytes
        self._max_answer_bytes = max_answer_bytes
        self._wire: RelayWire | None = None
        self.open_calls = 0  # HTTP exchanges that are open now, housekeeping included
        self._chores: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<GeminiProcessor {self._base_url} open_calls={self.open_calls}>"

    async def start(self) -> None:
        """Be ready for calls. Repeating it does nothing."""
        if self._wire is None:
            self._wire = RelayWire(self._timeouts)
            self._wire.signers = self._signers
            await self._wire.start()

    async def aclose(self) -> None:
        """Give deletions of uploaded files up to 2 s, then close every connection."""
        if self._chores:
            _, late = await asyncio.wait(self._chores, timeout=CLOSE_WITHIN_S)
            for chore in late:
                chore.cancel()
        if self._wire is not None:
            await self._wire.aclose()

    async def run(self, call: Call, answer: Answer, sink: Sink | None) -> None:
        """Make the call, push Delta, Picture and UsageReport events into `sink` as they arrive and
        fill `answer`, which keeps what was received also when this raises or is cancelled.

        Raises UpstreamError's subclasses, and whatever `sink` raises, unchanged. Cancellation at
        any point closes the upstream connection before it comes out of here.
        """
        uploaded: list[str] = []
        place = self._model(call.model, "streamGenerateContent", "alt=sse")
        try:
            await _within(self._timeouts.total_ms, self._run(call, place, answer, sink, uploaded))
        finally:
            if uploaded:
                self._forget_later(uploaded)

    async def _run(
        self,
        call: Call,
        place: RequestPlace,
        answer: Answer,
        sink: Sink | None,
        uploaded: list[str],
    ) -> None:
        parts = await self._parts(call, uploaded) if call.media else ()
        body = request_of(call, parts)
        fields: Fields = _IN_JSON
        if call.traceparent is not None:
            fields = (*_IN_JSON, (HEADER, call.traceparent.encode()))
        reading = AnswerReader(call.kind, answer)
        tier = "" if call.tier is Tier.LIVE else call.tier
        # Pictures are streamed too: idle time is then seen, and text comes early.
        async with self._exchange("POST", place, body, fields) as exchange:
            try:
                await self._read(exchange, reading, sink, tier)
                reading.finish()
            finally:
                answer.first_byte_ms = exchange.first_byte_ms
                answer.usage = with_tier(answer.usage, tier_in(exchange.headers))

    async def judge(
        self, prompt: str, mime_types: Sequence[str], *, model: str, answer: Answer
    ) -> tuple[Kind, str]:
        """Classify the request by an LLM: its kind and a short reason. The prompt is data, cut
        to 4,000 characters; `answer` is filled with what came. Raises UpstreamError's subclasses;
        the caller bounds and cancels it.
        """
        place = self._model(model, "generateContent")
        reading, body = AnswerReader(Kind.TEXT_ONLY, answer), question_of(prompt, mime_types)

        async def ask() -> None:
            async with self._exchange("POST", place, body, _IN_JSON) as exchange:
                await self._read(exchange, reading, None, "")

        await _within(self._timeouts.total_ms, ask())
        if not answer.text:
            reading.finish()
            raise EmptyAnswer("the judge said nothing", finish_reason=answer.finish_reason)
        return question.judgement(answer.whole_text, mime_types)

    async def _read(
        self, exchange: Exchange, reading: AnswerReader, sink: Sink | None, tier: str
    ) -> None:
        """An answer to its end. `tier` was requested."""
        if exchange.status != 200:
            raise await self._refusal(exchange, tier) from None
        events, size_bytes = _Events(), 0
        while True:
            piece = await exchange.next()
            size_bytes += len(piece)
            if size_bytes > self._max_answer_bytes:
                said = f"the provider's answer is larger than {self._max_answer_bytes} bytes"
                raise UpstreamGarbled(said)
            values = events.take(piece) if piece else events.end()
            while True:
                # The sink's exceptions must come out as they are.
                try:
                    if (value := next(values, exchange)) is exchange:
                        break
                    taken = self._taken(value, reading, exchange, tier)
                except ValueError:
                    raise _garbled() from None
                if sink is not None:
                    for event in taken:
                        await sink(event)
            if not piece:
                return

    def _taken(
        self, value: Any, reading: AnswerReader, exchange: Exchange, tier: str
    ) -> list[Event]:
        """Events of an object, or of a list of them. Raises ValueError, and UpstreamError for an
        error that is reported under status 200."""
        found: list[Event] = []
        for one in value if isinstance(value, list) else (value,):
            if isinstance(one, dict) and (error := refusals.error_object(one)):
                raise self._error(refusals.status_of(error), error, exchange, tier) from None
            found += reading.take(one)
        return found

    async def _refusal(self, exchange: Exchange, tier: str = "") -> UpstreamError:
        body = b""
        try:
            while len(body) < _REFUSAL_BYTES and (piece := await exchange.next()):
                body += piece
        except UpstreamTimeout:
            raise
        except UpstreamError:
            pass  # its status says enough
        return self._error(exchange.status, refusals.error_of_refusal_in(body), exchange, tier)

    def _error(
        self, status: int, error: Mapping[str, Any], exchange: Exchange, tier: str
    ) -> UpstreamError:
        headers = _named(exchange)
        return refusals.upstream_error(status, error, headers, secret=self._api_key, tier=tier)

    @asynccontextmanager
    async def _exchange(
        self, method: str, place: RequestPlace, body: bytes | None, fields: Fields
    ) -> AsyncIterator[Exchange]:
        """Send a request; its answer is closed when the block is left. Raises UpstreamError."""
        await self.start()
        assert self._wire is not None
        self.open_calls += 1
        try:
            exchange = await self._wire.open(method, place, fields, body)
            try:
                for name, value in exchange.headers:
                    if name.lower() == b"content-encoding" and value.lower() != b"identity":
                        said = "the provider compressed an answer that we asked for plain"
                        raise UpstreamGarbled(said)
                yield exchange
            finally:
                if not exchange.close():
                    await asyncio.sleep(0)  # the connection is closed in the loop's next round
        finally:
            self.open_calls -= 1

    def _model(self, model: str, method: str, query: str = "") -> RequestPlace:
        path = model_path(model)
        below = path if "/" in path else f"models/{path}"
        return self._place(f"/{API_VERSION}/{below}:{method}", query)

    def _place(self, path: str, query: str = "") -> RequestPlace:
        return RelayWire.place(self._access.url(path, query), self._access)

    # Files

    async def _parts(self, call: Call, uploaded: list[str]) -> list[Json]:
        large: set[int] = set()
        if call.kind is not Kind.IMAGE_GENERATION:
            large = too_large_for_inline(call.media, self._inline_max_bytes)
        return [
            await self._upload(media, uploaded) if index in large else inline(media)
            for index, media in enumerate(call.media)
        ]

    async def _upload(self, media: Media, names: list[str]) -> Json:
        """Upload one file, as https://ai.google.dev/api/files says; its request part. Appends the
        file's name to `names`.

        Raises UpstreamRejected when the provider can't process it, UpstreamTimeout when it isn't
        usable within 120 s, and UpstreamError.
        """
        named = {"displayName": media.name[:512]} if media.name else {}
        file = {"mimeType": media.mime_type, "sizeBytes": len(media.data), **named}
        start = {
            "x-goog-upload-protocol": "resumable",
            "x-goog-upload-command": "start",
            "x-goog-upload-header-content-length": str(len(media.data)),
            "x-goog-upload-header-content-type": media.mime_type,
        }
        begins = self._place(f"/upload/{API_VERSION}/files")
        _, headers = await self._ask(
            "POST", begins, _json({"file": file}), _fields(start, _IN_JSON)
        )
        if (url := headers.get("x-goog-upload-url")) is None:
            raise UpstreamGarbled("the provider gave no address for an upload")
        made: Json = {}
        for offset in range(0, len(media.data), _PIECE_BYTES):
            piece = media.data[offset : offset + _PIECE_BYTES]
            ends = offset + len(piece) == len(media.data)
            sent = {
                "x-goog-upload-command": "upload, finalize" if ends else "upload",
                "x-goog-upload-offset": str(offset),
            }
            made, _ = await self._ask("POST", self._below(url), piece, _fields(sent, _PLAIN))
        found = _object(made, "file")
        if not _FILE.fullmatch(name := str(found.get("name"))):
            raise UpstreamGarbled("the provider gave an uploaded file no name")
        names.append(name)
        found = await _within(READY_WITHIN_MS, self._processed(found, name), _NOT_PROCESSED)
        kind = found.get("mimeType") or media.mime_type
        return {"fileData": {"fileUri": found["uri"], "mimeType": kind}}

    async def _processed(self, file: Json, name: str) -> Json:
        wait_ms = POLL_FIRST_MS
        while file.get("state") == "PROCESSING":
            await asyncio.sleep(wait_ms / 1000)
            wait_ms = min(wait_ms * 2, POLL_LONGEST_MS)
            file, _ = await self._ask("GET", self._place(f"/{API_VERSION}/{name}"))
        if file.get("state") == "FAILED":
            raise UpstreamRejected("the provider could not process an uploaded file")
        if not isinstance(file.get("uri"), str):
            raise UpstreamGarbled("the provider gave an uploaded file no address")
        return file

    def _below(self, url: str) -> RequestPlace:
        """Of an upload's URL. Nothing of the upstream's goes to another address."""
        below = url.removeprefix(self._base_url)
        if below == url or not below.startswith("/"):
            return RelayWire.place(url)
        path, _, query = below.partition("?")
        return self._place(path, query)

    async def _ask(
        self,
        method: str,
        place: RequestPlace,
        body: bytes | None = None,
        fields: Fields = _PLAIN,
    ) -> tuple[Json, dict[str, str]]:
        """The object of an answer and its headers. Raises UpstreamError."""
        async with self._exchange(method, place, body, fields) as exchange:
            if exchange.status != 200:
                raise await self._refusal(exchange) from None
            raw = await exchange.read(_REFUSAL_BYTES)
            try:
                value = orjson.loads(raw or b"{}")
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise _garbled()
            return value, _named(exchange)

    def _forget_later(self, names: Sequence[str]) -> None:
        """Deleting must not hold up the permit: a task of its own, awaited by `aclose`."""
        chore = asyncio.create_task(self._forget(tuple(names)))
        self._chores.add(chore)
        chore.add_done_callback(self._chores.discard)

    async def _forget(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                place = self._place(f"/{API_VERSION}/{name}")
                await _within(FORGET_WITHIN_MS, self._ask("DELETE", place))
            except UpstreamError as failure:
                get_logger().warning(
                    Log.INTERNAL_ERROR, what="uploaded file not deleted", error=str(failure)
                )


def _named(exchange: Exchange) -> dict[str, str]:
    """Headers of an answer, their names in lower case."""
    return {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in exchange.headers
    }


def _fields(headers: Mapping[str, str], more: Fields) -> Fields:
    return [*more, *((name.encode(), value.encode()) for name, value in headers.items())]


_NOT_PROCESSED = f"the provider had not processed a file after {READY_WITHIN_MS} ms"


async def _within(limit_ms: int, work: Coroutine[Any, Any, T], late: str = "") -> T:
    """Raises UpstreamTimeout."""
    try:
        async with asyncio.timeout(limit_ms / 1000) as bound:
            return await work
    except TimeoutError:
        if not bound.expired():
            raise  # the sink's own
        if late:
            raise UpstreamTimeout(late, phase="total") from None
        raise out_of_time("total", limit_ms) from None
