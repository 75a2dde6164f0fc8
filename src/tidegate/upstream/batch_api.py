"""Batch APIs of the providers: OpenAI's, Anthropic's and Gemini's.

    https://platform.openai.com/docs/api-reference/batch
    https://platform.claude.com/docs/en/api/creating-message-batches
    https://ai.google.dev/gemini-api/docs/batch-api

    lines ──► upload (OpenAI, Gemini) ──► create ──► poll ──► results, line by line, in any order

Each line has the custom id `<batch id>-<number>`. A batch at OpenAI carries our batch id in its
metadata, one at Gemini in its display name. One at Anthropic carries it nowhere, so that only its
results identify it.

Invariants: a batch is created by one request on a new connection, and this module never repeats
that request; a created batch can be found again; a line of results that is longer than
`MOST_LINE_BYTES` or not JSON does not block the other lines; the key is sent only to the upstream's
own base URL.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode
from uuid import UUID

import orjson

from tidegate.dialects import DIALECTS, refusals
from tidegate.dialects.parsing import LARGE_BYTES
from tidegate.dialects.spec import Dialect, Endpoint, Headers
from tidegate.errors import UpstreamError, UpstreamGarbled, UpstreamRejected, UpstreamThrottled
from tidegate.policy.deployment import Upstream
from tidegate.record import dumped
from tidegate.upstream.transport import Exchange, RelayWire, Timeouts

MOST_LINE_BYTES = 64_000_000
_JSON_BYTES = 64_000_000  # bound of an answer that is not a file; Gemini's may contain results
_REFUSAL_BYTES = 1_000_000
_PAGE = 100
_MOST_PAGES = 1_000
# The largest assumed difference between a provider's clock and ours.
_CLOCKS = timedelta(minutes=10)
TIMEOUTS = Timeouts(connect_ms=10_000, first_byte_ms=120_000, idle_ms=60_000, total_ms=900_000)
_OPENAI_PATHS = ("/chat/completions", "/completions", "/embeddings", "/responses")
_GENERATE = re.compile(r"(/v1(?:beta)?/models/)\{model\}:generateContent")
# Codes of google.rpc.Code -> HTTP statuses.
_RPC_STATUS = {1: 499, 3: 400, 4: 504, 5: 404, 7: 403, 8: 429, 9: 400, 13: 500, 14: 503, 16: 401}

Json = dict[str, Any]
T = TypeVar("T")


def takes(endpoint: Endpoint) -> bool:
    """Return whether calls of a native path can be lines of a batch."""
    match endpoint.dialect:
        case Dialect.OPENAI:
            return endpoint.path in _OPENAI_PATHS
        case Dialect.ANTHROPIC:
            return endpoint.path == "/v1/messages"
        case Dialect.GEMINI:
            return _GENERATE.fullmatch(endpoint.path) is not None
        case Dialect.BEDROCK:  # its batches are files in S3
            return False


@dataclass(frozen=True, slots=True)
class BatchedCall:
    """A line before it is sent: its number, and the body of its call as JSON."""

    line: int
    body: bytes


@dataclass(frozen=True, slots=True)
class BatchOutline:
    """A batch of ours that is sent to a provider.

    endpoint: the native path of all its lines. model: the provider's name of it. lines: their
    number. sent_at: the earliest time at which the request that creates it may have been sent.
    """

    id: UUID
    endpoint: str
    model: str
    lines: int
    sent_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """The state of a batch as its provider reports it.

    word: the provider's name of the state. files: ids of the result files of an ended batch.
    inline: results within the report. is_full: it was refused because too much is already queued.
    problem: the provider's message if it failed.
    """

    provider_id: str
    word: str
    has_ended: bool
    files: tuple[str, ...] = ()
    inline: tuple[Json, ...] = ()
    is_full: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class LineResult:
    """The result of a line.

    answer: the body of a successful answer. error: set if the provider refused the line or failed.
    With neither, the line was not processed and costs nothing. is_unread: the error is that its
    result cannot be read, and its cost is unknown.
    """

    line: int
    answer: bytes | None = None
    error: UpstreamError | None = None
    is_unread: bool = False


class BatchApi(Protocol):
    """The batch API of an account. Every method raises UpstreamError."""

    async def upload(self, batch: BatchOutline, calls: Sequence[BatchedCall]) -> str | None:
        """Upload the lines and return the file's id; None if they are sent with the creation."""

    async def create(
        self,
        batch: BatchOutline,
        file_id: str | None,
        calls: Sequence[BatchedCall],
        on_sent: Callable[[], None],
    ) -> BatchProgress:
        """Create the batch. `on_sent` is called before the first byte is sent: if the call fails
        after that, the batch may exist."""

    async def find(self, batch: BatchOutline, known: Iterable[str]) -> list[str] | None:
        """Return the ids of batches at the provider that were created for `batch`, without those in
        `known`; None while this cannot be determined yet."""

    async def poll(self, provider_id: str) -> BatchProgress:
        """Return the current state of a batch."""

    async def cancel(self, provider_id: str) -> None:
        """Request cancellation. A batch that has ended stays as it is."""

    def results(self, batch: BatchOutline, ended: BatchProgress) -> AsyncIterator[LineResult]:
        """Yield the results of the batch's lines, in any order. Lines without a result are left
        out."""

    async def forget(self, batch: BatchOutline, file_id: str | None, ended: BatchProgress) -> None:
        """Delete the batch's files at the provider."""


def batch_api(wire: RelayWire, upstream: Upstream, dialect: Dialect) -> BatchApi:
    """Return the batch API of an upstream."""
    account = _Account(wire, upstream, dialect)
    match dialect:
        case Dialect.OPENAI:
            return OpenAIBatches(account)
        case Dialect.ANTHROPIC:
            return AnthropicBatches(account)
        case Dialect.GEMINI:
            return GeminiBatches(account)
        case Dialect.BEDROCK:
            raise UpstreamRejected("Bedrock's batches are files in S3, which are not supported")


def custom_id(batch: UUID, line: int) -> str:
    return f"{batch.hex}-{line}"


def line_of(batch: UUID, named: object) -> int | None:
    """Return the line number in a custom id; None if it is not a custom id of this batch."""
    if not isinstance(named, str):
        return None
    head, _, number = named.partition("-")
    return int(number) if head == batch.hex and re.fullmatch(r"\d{1,9}", number) else None


class _Account:
    """HTTP requests to an upstream's batch API, in one dialect."""

    def __init__(self, wire: RelayWire, upstream: Upstream, dialect: Dialect) -> None:
        self._wire = wire
        self._key = upstream.key
        self._access = upstream.access(dialect)
        self._base = self._access.base
        self._dialect = dialect
        spec = DIALECTS[dialect]
        self._headers = [(b"accept-encoding", b"identity"), *spec.headers]

    async def open(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        headers: Headers | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> Exchange:
        """Send a request and return its exchange once the status is below 300; raises the
        provider's error otherwise. `path` is relative to the base URL, or a whole URL that begins
        with it."""
        below, _, query = path.partition("?")
        is_whole = path.startswith(f"{self._base}/")
        url = path if is_whole else self._access.url(below, query)
        sent = [*self._headers, *(headers or [])]
        exchange = await self._wire.open(
            method,
            self._wire.place(url, self._access),
            sent,
            body,
            on_sent,
            TIMEOUTS,
            once=on_sent is not None,
        )
        if exchange.status < 300:
            return exchange
        try:
            text = await exchange.read_refusal(_REFUSAL_BYTES)
        finally:
            exchange.close()
        raise self.error(exchange.status, refusals.error_of_refusal_in(text), exchange.headers)

    async def json(
        self,
        method: str,
        path: str,
        body: Json | bytes | None = None,
        *,
        headers: Headers | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> Json:
        """Send a request and return the JSON object of its answer. body: an object, or its encoded
        bytes."""
        sent, more = body, list(headers or [])
        if isinstance(body, dict):
            sent, more = orjson.dumps(body), [*more, (b"content-type", b"application/json")]
        assert not isinstance(sent, dict)
        exchange = await self.open(method, path, sent, headers=more, on_sent=on_sent)
        try:
            text = await exchange.read(_JSON_BYTES)
        finally:
            exchange.close()
        try:
            value = await _aside(len(text), partial(orjson.loads, text or b"{}"))
        except orjson.JSONDecodeError:
            raise UpstreamGarbled("the batch API did not answer with JSON") from None
        if not isinstance(value, dict):
            raise UpstreamGarbled("the batch API did not answer with an object")
        return value

    async def rows(self, path: str) -> AsyncGenerator[_ResultRow]:
        """Yield the lines of a result file."""
        exchange = await self.open("GET", path)
        held, size_bytes = list[bytes](), 0  # of the current, incomplete line
        try:
            while piece := await exchange.next():
                for number, part in enumerate(piece.split(b"\n")):
                    if number:  # the line before it is complete
                        if line := b"".join(held).strip():
                            yield await _row_of(line, size_bytes)
                        held, size_bytes = [], 0
                    if size_bytes > MOST_LINE_BYTES:  # keep the ends: they may have the id
                        held = [held[0], held[-1]]
                    held.append(part)
                    size_bytes += len(part)
        finally:
            exchange.close()
        if line := b"".join(held).strip():
            yield await _row_of(line, size_bytes)

    async def upload_to(self, headers: Headers, base: str) -> str:
        """Return the URL of an upload's second step. Raises UpstreamGarbled if it is at another
        server."""
        for name, value in headers:
            if name.lower() == b"x-goog-upload-url":
                url = value.decode("latin-1")
                origin = "/".join(base.split("/", 3)[:3])
                if url.startswith(f"{origin}/"):
                    return url
        raise UpstreamGarbled("the provider gave no address for an upload")

    async def send_file(self, path: str, name: str, data: bytes) -> Json:
        """Upload a file in one piece by Google's resumable protocol."""
        start: Headers = [
            (b"content-type", b"application/json"),
            (b"x-goog-upload-protocol", b"resumable"),
            (b"x-goog-upload-command", b"start"),
            (b"x-goog-upload-header-content-length", str(len(data)).encode()),
            (b"x-goog-upload-header-content-type", b"application/jsonl"),
        ]
        about = orjson.dumps({"file": {"displayName": name}})
        exchange = await self.open("POST", path, about, headers=start)
        try:
            await exchange.read(_REFUSAL_BYTES)
        finally:
            exchange.close()
        onward = await self.upload_to(exchange.headers, self._base)
        finish: Headers = [
            (b"x-goog-upload-command", b"upload, finalize"),
            (b"x-goog-upload-offset", b"0"),
        ]
        place = self._wire.place(onward, self._access)
        sent = await self._wire.open("POST", place, finish, data, None, TIMEOUTS)
        try:
            text = await sent.read(_REFUSAL_BYTES)
        finally:
            sent.close()
        if sent.status >= 300:
            raise self.error(sent.status, refusals.error_of_refusal_in(text), sent.headers)
        return _object_in(text)

    def error(
        self, status: int, error: Mapping[str, Any], headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> UpstreamError:
        named = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}
        return refusals.upstream_error(
            status, error, named, secret=self._key, dialect=self._dialect
        )

    def words(self, error: object) -> str:
        """Return a provider's text with the key removed."""
        text = error if isinstance(error, str) else json.dumps(error)
        return refusals.clean(text, self._key)


def _object_in(text: bytes) -> Json:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        raise UpstreamGarbled("the batch API did not answer with JSON") from None
    if not isinstance(value, dict):
        raise UpstreamGarbled("the batch API did not answer with an object")
    return value


async def _aside(size_bytes: int, work: Callable[[], T]) -> T:
    """Run `work` and return its result; in a thread if it processes more than `LARGE_BYTES`, so
    that it does not block the event loop."""
    return work() if size_bytes <= LARGE_BYTES else await asyncio.to_thread(work)


async def _row_of(line: bytes, size_bytes: int) -> _ResultRow:
    read = partial(_ResultRow.of, line, is_too_long=size_bytes > MOST_LINE_BYTES)
    return await _aside(len(line), read)


@dataclass(frozen=True, slots=True)
class _ResultRow:
    """A line of a result file.

    problem: why it cannot be read; `content` then has only its custom id, if that was found in it.
    """

    content: Json
    problem: str = ""
    size_bytes: int = 0

    @classmethod
    def of(cls, line: bytes, *, is_too_long: bool) -> _ResultRow:
        if is_too_long:
            return cls(_named_in(line), f"it is longer than {MOST_LINE_BYTES} bytes")
        try:
            value = orjson.loads(line)
        except orjson.JSONDecodeError:
            return cls(_named_in(line), "it is not JSON")
        if not isinstance(value, dict):
            return cls({}, "it is not an object")
        return cls(value, size_bytes=len(line))

    async def aside(self, read: Callable[[], LineResult]) -> LineResult:
        """Return the result that `read` makes of this row, in a thread if the row is large."""
        return await _aside(self.size_bytes, read)

    def unread(self, line: int) -> LineResult | None:
        """Return the error result of a row that cannot be read; None for any other row."""
        if not self.problem:
            return None
        why = UpstreamGarbled(f"the result of the provider's batch can't be read: {self.problem}")
        return LineResult(line, error=why, is_unread=True)


# The id may precede or follow the answer; within the answer its quotes would be escaped.
_NAMED = re.compile(rb'"(?:custom_id|key)"\s*:\s*"([0-9a-f]{32}-\d{1,9})"')


def _named_in(line: bytes) -> Json:
    found = _NAMED.search(line)
    return {} if found is None else dict.fromkeys(("custom_id", "key"), found[1].decode())


def _part(value: object, name: str) -> Json:
    found = value.get(name) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}


def _objects(value: object) -> list[Json]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(value: Json, name: str) -> str:
    found = value.get(name)
    if not isinstance(found, str) or not found:
        raise UpstreamGarbled(f"the batch API's answer has no {name}")
    return found


class OpenAIBatches:
    """OpenAI's batches. Answers and errors are in two files. A batch above the queue's bound is
    created and then fails."""

    _ENDED = frozenset({"completed", "failed", "expired", "cancelled"})

    def __init__(self, account: _Account) -> None:
        self._account = account

    async def upload(self, batch: BatchOutline, calls: Sequence[BatchedCall]) -> str | None:
        url = f"/v1{batch.endpoint}".encode()
        lines = b"".join(
            b'{"custom_id":"%b","method":"POST","url":"%b","body":%b}\n'
            % (custom_id(batch.id, one.line).encode(), url, one.body)
            for one in calls
        )
        edge = f"tidegate-{batch.id.hex}".encode()
        body = b"".join(
            (
                b"--%b\r\ncontent-disposition: form-data; name=purpose\r\n\r\nbatch\r\n" % edge,
                b'--%b\r\ncontent-disposition: form-data; name="file"; filename="%b.jsonl"\r\n'
                % (edge, edge),
                b"content-type: application/jsonl\r\n\r\n%b\r\n--%b--\r\n" % (lines, edge),
            )
        )
        headers = [(b"content-type", b"multipart/form-data; boundary=" + edge)]
        return _text(await self._account.json("POST", "/files", body, headers=headers), "id")

    async def create(
        self,
        batch: BatchOutline,
        file_id: str | None,
        calls: Sequence[BatchedCall],
        on_sent: Callable[[], None],
    ) -> BatchProgress:
        body = {
            "input_file_id": file_id,
            "endpoint": f"/v1{batch.endpoint}",
            "completion_window": "24h",
            "metadata": {"tidegate_batch": batch.id.hex},
        }
        return self._progress(await self._account.json("POST", "/batches", body, on_sent=on_sent))

    async def find(self, batch: BatchOutline, known: Iterable[str]) -> list[str] | None:
        assert batch.sent_at is not None
        since = (batch.sent_at - _CLOCKS).timestamp()
        found: list[str] = []
        after: str | None = None
        passed = set(known)
        for _ in range(_MOST_PAGES):
            query = {"limit": _PAGE} | ({} if after is None else {"after": after})
            page = await self._account.json("GET", f"/batches?{urlencode(query)}")
            batches = _objects(page.get("data"))
            found += [
                _text(one, "id")
                for one in batches
                if _part(one, "metadata").get("tidegate_batch") == batch.id.hex
                and one.get("id") not in passed
            ]
            made = [at for one in batches if isinstance(at := one.get("created_at"), int | float)]
            if not page.get("has_more") or not batches or max(made, default=since) < since:
                return found
            after = _text(batches[-1], "id")
        raise UpstreamGarbled(f"the list of batches has more than {_MOST_PAGES} pages")

    async def poll(self, provider_id: str) -> BatchProgress:
        return self._progress(await self._account.json("GET", f"/batches/{_quoted(provider_id)}"))

    def _progress(self, body: Json) -> BatchProgress:
        word = _text(body, "status")
        files = [body.get(name) for name in ("output_file_id", "error_file_id")]
        errors = _objects(_part(body, "errors").get("data")) if word == "failed" else []
        codes = {str(one.get("code")) for one in errors}
        message = "; ".join(str(one.get("message") or one.get("code")) for one in errors[:3])
        return BatchProgress(
            _text(body, "id"),
            word,
            word in self._ENDED,
            tuple(one for one in files if isinstance(one, str)),
            is_full="token_limit_exceeded" in codes or "request_limit_exceeded" in codes,
            problem=self._account.words(message) if message else None,
        )

    async def cancel(self, provider_id: str) -> None:
        await _cancel(self._account, f"/batches/{_quoted(provider_id)}/cancel")

    async def results(self, batch: BatchOutline, ended: BatchProgress) -> AsyncIterator[LineResult]:
        for file_id in ended.files:
            async for row in self._account.rows(f"/files/{_quoted(file_id)}/content"):
                line = line_of(batch.id, row.content.get("custom_id"))
                if line is not None:
                    read = partial(self._result, line, row.content)
                    yield row.unread(line) or await row.aside(read)

    def _result(self, line: int, row: Json) -> LineResult:
        answer = _part(row, "response")
        status, body = answer.get("status_code"), answer.get("body")
        if not isinstance(status, int):  # the line expired or was cancelled
            return LineResult(line)
        if status < 300 and isinstance(body, dict):
            return LineResult(line, dumped(body))
        text = dumped(body)
        error = self._account.error(status, refusals.error_of_refusal_in(text))
        return LineResult(line, error=error)

    async def forget(self, batch: BatchOutline, file_id: str | None, ended: BatchProgress) -> None:
        for one in dict.fromkeys(filter(None, (file_id, *ended.files))):
            await self._account.json("DELETE", f"/files/{_quoted(one)}")


class AnthropicBatches:
    """Anthropic's batches. They have no metadata and no file: only the custom ids of the results
    identify a batch."""

    def __init__(self, account: _Account) -> None:
        self._account = account

    async def upload(self, batch: BatchOutline, calls: Sequence[BatchedCall]) -> str | None:
        return None

    async def create(
        self,
        batch: BatchOutline,
        file_id: str | None,
        calls: Sequence[BatchedCall],
        on_sent: Callable[[], None],
    ) -> BatchProgress:
        requests = b",".join(
            b'{"custom_id":"%b","params":%b}' % (custom_id(batch.id, one.line).encode(), one.body)
            for one in calls
        )
        body = b'{"requests":[%b]}' % requests
        headers = [(b"content-type", b"application/json")]
        created = await self._account.json(
            "POST", "/v1/messages/batches", body, headers=headers, on_sent=on_sent
        )
        return self._progress(created)

    async def find(self, batch: BatchOutline, known: Iterable[str]) -> list[str] | None:
        """Look among the batches of the same size and time. A batch that has not ended cannot be
        identified yet."""
        assert batch.sent_at is not None
        since, passed = batch.sent_at - _CLOCKS, set(known)
        found: list[str] = []
        unsure = False
        async for listed in self._listed(since):
            progress = self._progress(listed)
            counts = _part(listed, "request_counts")
            size = sum(count for count in counts.values() if isinstance(count, int))
            if progress.provider_id in passed or size != batch.lines:
                continue
            if not progress.has_ended:
                unsure = True
            elif await self._is_of(batch, progress):
                found.append(progress.provider_id)
        return found or (None if unsure else [])

    async def _listed(self, since: datetime) -> AsyncIterator[Json]:
        after: str | None = None
        for _ in range(_MOST_PAGES):
            query = {"limit": _PAGE} | ({} if after is None else {"after_id": after})
            page = await self._account.json("GET", f"/v1/messages/batches?{urlencode(query)}")
            batches = _objects(page.get("data"))
            for listed in batches:
                made = _time(listed.get("created_at"))
                if made is not None and made < since:
                    return
                yield listed
            if not page.get("has_more") or not batches:
                return
            after = _text(batches[-1], "id")
        raise UpstreamGarbled(f"the list of batches has more than {_MOST_PAGES} pages")

    async def _is_of(self, batch: BatchOutline, ended: BatchProgress) -> bool:
        results = self._account.rows(self._results_path(ended.provider_id))
        try:
            async for row in results:
                return line_of(batch.id, row.content.get("custom_id")) is not None
        finally:
            await results.aclose()
        return False

    async def poll(self, provider_id: str) -> BatchProgress:
        path = f"/v1/messages/batches/{_quoted(provider_id)}"
        return self._progress(await self._account.json("GET", path))

    def _progress(self, body: Json) -> BatchProgress:
        word = _text(body, "processing_status")
        return BatchProgress(_text(body, "id"), word, word == "ended")

    async def cancel(self, provider_id: str) -> None:
        await _cancel(self._account, f"/v1/messages/batches/{_quoted(provider_id)}/cancel")

    @staticmethod
    def _results_path(provider_id: str) -> str:
        # Not the URL in the answer: the key is sent only to the upstream's own address.
        return f"/v1/messages/batches/{_quoted(provider_id)}/results"

    async def results(self, batch: BatchOutline, ended: BatchProgress) -> AsyncIterator[LineResult]:
        async for row in self._account.rows(self._results_path(ended.provider_id)):
            line = line_of(batch.id, row.content.get("custom_id"))
            if line is not None:
                read = partial(self._result, line, _part(row.content, "result"))
                yield row.unread(line) or await row.aside(read)

    def _result(self, line: int, result: Json) -> LineResult:
        message = result.get("message")
        if result.get("type") == "succeeded" and isinstance(message, dict):
            return LineResult(line, dumped(message))
        if result.get("type") != "errored":
            return LineResult(line)
        error = _part(result, "error")
        inner = _part(error, "error") or error
        return LineResult(line, error=self._account.error(refusals.status_of(inner), inner))

    async def forget(self, batch: BatchOutline, file_id: str | None, ended: BatchProgress) -> None:
        """Do nothing: there are no files."""


class GeminiBatches:
    """Gemini's batches. Lines and results are in files. A batch that is cancelled, fails or expires
    has no results."""

    _ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "EXPIRED")

    def __init__(self, account: _Account) -> None:
        self._account = account

    async def upload(self, batch: BatchOutline, calls: Sequence[BatchedCall]) -> str | None:
        lines = b"".join(
            b'{"key":"%b","request":%b}\n' % (custom_id(batch.id, one.line).encode(), one.body)
            for one in calls
        )
        made = await self._account.send_file("/upload/v1beta/files", _display_name(batch), lines)
        return _text(_part(made, "file"), "name")

    async def create(
        self,
        batch: BatchOutline,
        file_id: str | None,
        calls: Sequence[BatchedCall],
        on_sent: Callable[[], None],
    ) -> BatchProgress:
        named = {"displayName": _display_name(batch), "inputConfig": {"fileName": file_id}}
        found = _GENERATE.fullmatch(batch.endpoint)
        assert found is not None
        path = f"{found[1]}{_quoted(batch.model)}:batchGenerateContent"
        created = await self._account.json("POST", path, {"batch": named}, on_sent=on_sent)
        return self._progress(created)

    async def find(self, batch: BatchOutline, known: Iterable[str]) -> list[str] | None:
        found: list[str] = []
        token, passed = "", set(known)
        for _ in range(_MOST_PAGES):
            query = {"pageSize": _PAGE} | ({"pageToken": token} if token else {})
            page = await self._account.json("GET", f"/v1beta/batches?{urlencode(query)}")
            found += [
                _text(one, "name")
                for one in _objects(page.get("operations"))
                if _part(one, "metadata").get("displayName") == _display_name(batch)
                and one.get("name") not in passed
            ]
            token = str(page.get("nextPageToken") or "")
            if not token:
                return found
        raise UpstreamGarbled(f"the list of batches has more than {_MOST_PAGES} pages")

    async def poll(self, provider_id: str) -> BatchProgress:
        return self._progress(await self._account.json("GET", f"/v1beta/{_named(provider_id)}"))

    def _progress(self, body: Json) -> BatchProgress:
        about = _part(body, "metadata")
        word = str(about.get("state") or "BATCH_STATE_UNSPECIFIED")
        output = _part(body, "response") or _part(about, "output")
        file = output.get("responsesFile")
        inlined = _part(output, "inlinedResponses")
        error = _part(body, "error")
        return BatchProgress(
            _text(body, "name"),
            word,
            word.endswith(self._ENDED) or body.get("done") is True,
            (file,) if isinstance(file, str) else (),
            tuple(_objects(inlined.get("inlinedResponses"))),
            problem=self._account.words(str(error.get("message"))) if error else None,
        )

    async def cancel(self, provider_id: str) -> None:
        await _cancel(self._account, f"/v1beta/{_named(provider_id)}:cancel")

    async def results(self, batch: BatchOutline, ended: BatchProgress) -> AsyncIterator[LineResult]:
        for inline in ended.inline:
            line = line_of(batch.id, _part(inline, "metadata").get("key"))
            if line is not None:
                yield self._result(line, inline)
        for file in ended.files:
            async for row in self._account.rows(f"/v1beta/{_named(file)}:download?alt=media"):
                line = line_of(batch.id, row.content.get("key"))
                if line is not None:
                    read = partial(self._result, line, row.content)
                    yield row.unread(line) or await row.aside(read)

    def _result(self, line: int, row: Json) -> LineResult:
        answer, error = row.get("response"), row.get("error")
        if isinstance(answer, dict):
            return LineResult(line, dumped(answer))
        if not isinstance(error, dict):
            return LineResult(line)
        code = error.get("code")
        status = _RPC_STATUS.get(code, 500) if isinstance(code, int) else 500
        if isinstance(code, int) and 400 <= code <= 599:
            status = code
        return LineResult(line, error=self._account.error(status, error))

    async def forget(self, batch: BatchOutline, file_id: str | None, ended: BatchProgress) -> None:
        if file_id is not None:
            await self._account.json("DELETE", f"/v1beta/{_named(file_id)}")


async def _cancel(account: _Account, path: str) -> None:
    try:
        await account.json("POST", path, {})
    except UpstreamThrottled:
        raise
    except UpstreamError as error:
        if error.status not in (400, 409):  # it has ended
            raise


def _display_name(batch: BatchOutline) -> str:
    return f"tidegate-{batch.id.hex}"


def _quoted(name: str) -> str:
    return quote(name, safe="")


def _named(name: str) -> str:
    """Return a resource's name in a provider's answer, such as `batches/b1`."""
    return quote(name.replace("..", ""), safe="/")


def _time(value: object) -> datetime | None:
    if not isinstance(value, str):
        return None
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        return None
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)
