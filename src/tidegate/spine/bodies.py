"""Native calls and their bodies: JSON, and forms that may be on disk.

Invariants: bytes are sent as they were received, except for the model's name if a route or an alias
changes it, the fields that Vertex has instead, and the request for a stream's usage. A form can be
sent repeatedly, and its announced length is the length that is sent; of a form on disk, memory
holds one piece at a time. A body of more than `LARGE_BYTES` is read and copied beside the event
loop.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import orjson

from tidegate.dialects.answers import asking_for_usage
from tidegate.dialects.forms import MediaForm, is_prose
from tidegate.dialects.parsing import LARGE_BYTES
from tidegate.dialects.requests import NAMES_MODEL
from tidegate.dialects.resources import Reference
from tidegate.dialects.spec import (
    Dialect,
    Endpoint,
    Headers,
    JsonObject,
    Operation,
    RequestFacts,
)
from tidegate.errors import InvalidRequest, StoreUnavailable, UpstreamUnavailable
from tidegate.policy.access import Paths
from tidegate.policy.deployment import Upstream
from tidegate.policy.providers import may_ask_usage
from tidegate.record import CallRecord
from tidegate.spine.routing import Target
from tidegate.spine.run import Terms
from tidegate.upstream.transport import Exchange, RepeatableBody, Timeouts

_Result = TypeVar("_Result")
# One thread, so one body at a time: parsed values take several times the body's memory.
_READER = ThreadPoolExecutor(1, "large-bodies")


async def aside(size_bytes: int, work: Callable[[], _Result]) -> _Result:
    """Return the result of `work` on a body of this size: a large one's in a thread, one after
    another. Work that has begun continues after a cancellation."""
    if size_bytes <= LARGE_BYTES:
        return work()
    return await asyncio.get_running_loop().run_in_executor(_READER, work)


class Pieces:
    """An answer in pieces, which are joined beside the event loop. is_whole: it had no more bytes
    than were allowed."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.size_bytes = 0
        self.is_whole = False

    @classmethod
    async def of(cls, exchange: Exchange, most_bytes: int) -> Pieces:
        """Read an answer, of a longer one a little more than `most_bytes`. Raises UpstreamError."""
        found = cls()
        while found.size_bytes <= most_bytes:
            if not (piece := await exchange.next()):
                found.is_whole = True
                break
            found._pieces.append(piece)
            found.size_bytes += len(piece)
        return found

    async def joined(self) -> bytes:
        """Return all bytes."""
        return await self.read(bytes)

    async def read(self, work: Callable[[bytes], _Result]) -> _Result:
        """Return the result of `work` on all bytes, as `aside` does."""
        return await aside(self.size_bytes, lambda: work(b"".join(self._pieces)))


async def read_to_its_end(size_bytes: int, work: Callable[[], _Result]) -> _Result:
    """Return as `aside` for an answer that is relayed or given up. A cancellation meanwhile, such
    as of a client that has received everything, is dropped: there is nothing left to end."""
    if size_bytes <= LARGE_BYTES:
        return work()
    reading = asyncio.get_running_loop().run_in_executor(_READER, work)
    while not reading.done():
        try:
            await asyncio.wait({reading})
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is not None:
                task.uncancel()
    return reading.result()


async def check_whole(record: CallRecord, endpoint: Endpoint) -> JsonObject | None:
    """Check a model's plain answer in JSON whose last bytes have arrived; other answers are not
    checked. Returns the answer if it was parsed for that, and is an object. Raises
    UpstreamUnavailable for one that lacks its end: the end of an answer without a length is that of
    its connection, which may have broken, and a proxy may end one that its provider broke off."""
    operation = endpoint.operation
    is_text = operation is Operation.TRANSCRIBE and is_prose(record.response_type)
    if record.streamed or not endpoint.is_counted or is_text or operation is Operation.SPEAK:
        return None
    if record.answer_bytes <= LARGE_BYTES:
        return _checked(record)
    return await aside(record.answer_bytes, partial(_checked, record))


def _checked(record: CallRecord) -> JsonObject | None:
    answer = record.text
    if answer[:_BLANK_BYTES].lstrip()[:1] not in (b"{", b"["):
        return None
    if record.omitted_bytes:
        is_cut = answer[-_BLANK_BYTES:].rstrip()[-1:] not in (b"}", b"]")
    elif len(answer) > LARGE_BYTES and answer.find(b"\\") < 0:
        is_cut = _is_open(answer)
    else:
        try:
            parsed = orjson.loads(answer)
        except orjson.JSONDecodeError:
            is_cut = _is_cut(answer)
        else:
            return parsed if type(parsed) is dict else None
    if is_cut:
        raise UpstreamUnavailable("the provider's answer was cut off before its end")
    return None


def _is_cut(answer: bytes) -> bool:
    """Whether an answer that orjson rejects lacks its end. This parser accepts half a surrogate
    pair, and more after the end."""
    try:
        json.JSONDecoder().raw_decode(answer.decode("utf-8", "replace").lstrip())
    except json.JSONDecodeError:
        return True
    except RecursionError:
        pass
    return False


def _is_open(answer: bytes) -> bool:
    """Whether JSON without escapes ends within a text or a bracket, as all that lacks its end does.
    Costs a fifth of parsing where most of it are numbers, as in embeddings."""
    marks = answer.translate(None, _NO_MARKS)
    outside = b"".join(marks.split(b'"')[::2])
    brackets = outside.count(b"{") + outside.count(b"["), outside.count(b"}") + outside.count(b"]")
    return marks.count(b'"') % 2 == 1 or brackets[0] != brackets[1]


_NO_MARKS = bytes(set(range(256)) - set(b'"{}[]'))
_BLANK_BYTES = 256
_END_BYTES = 65_536
_TEXT = re.compile(rb'\s*("(?:[^"\\]|\\.)*")')
# Nested objects may contain more, such as a tool's parameter named `model`.
_MOST_MODELS = 8
# Operations whose bodies repeat the model of the path, which must be equal.
_NAMES_IT_AGAIN = (Operation.EMBED, Operation.COUNT, Operation.BATCH)


def identity_of(raw: bytes) -> int:
    """Return a hash, equal for equal bodies; a large body's is of its length and its ends."""
    if len(raw) > LARGE_BYTES:
        return hash((len(raw), raw[:_END_BYTES], raw[-_END_BYTES:]))
    return hash(raw)


def body_for(
    raw: bytes, endpoint: Endpoint, body: dict[str, Any], target: Target, *, request_usage: bool
) -> bytes | None:
    """Return the client's bytes, which were parsed to `body`, with the upstream's name for the
    model and a request for a stream's usage. None for a request without a body. Raises
    InvalidRequest."""
    if not raw:
        return None
    try:
        return _changed(raw, endpoint, body, target, request_usage)
    except orjson.JSONEncodeError:  # the parser accepts deeper nesting than the writer
        allowed = "at most 250 levels"
        raise InvalidRequest("body", "the body is nested too deeply", allowed=allowed) from None


def _changed(
    raw: bytes, endpoint: Endpoint, body: dict[str, Any], target: Target, request_usage: bool
) -> bytes:
    named = endpoint.model
    if named is not None and endpoint.model_in_path:
        again = endpoint.operation in _NAMES_IT_AGAIN and named != target.model
        return _model_named_again(raw, named, target.model) if again else raw
    if "agent" in body and endpoint.path.endswith("/interactions"):  # instead of a model
        same = target.model in ("", body["agent"])
        return raw if same else _rewritten(raw, "agent", target.model)
    if endpoint.operation is Operation.CACHE:
        same = body["model"].removeprefix("models/") == target.model
        return raw if same else _rewritten(raw, "model", f"models/{target.model}")
    if endpoint.dialect is Dialect.ANTHROPIC:
        if target.upstream.access(endpoint.dialect).paths is Paths.VERTEX:
            return _for_vertex(raw, endpoint, body, target.model)
        if _VERSION in body:
            raw, body = _from_vertex(raw, body, target.model)
    if target.model and body.get("model") != target.model:
        with_model = _with_model if "model" in body else _naming_model
        body = {**body, "model": target.model}
        raw = with_model(raw, target.model) or _rewritten(raw, "model", target.model)
    if _OPTIONS in body and _refuses_options(target.upstream):
        return orjson.dumps(
            {name: value for name, value in orjson.loads(raw).items() if name != _OPTIONS}
        )
    return asking_for_usage(raw, body) if request_usage else raw


# Of a stream of OpenAI's, such as a request for its usage.
_OPTIONS = "stream_options"


def _refuses_options(upstream: Upstream) -> bool:
    """Whether a provider reports the usage of streams unasked, and refuses a call with options."""
    return not upstream.asks_usage and not may_ask_usage(
        upstream.provider, upstream.base_urls.values()
    )


def _with_model(raw: bytes, model: str) -> bytes | None:
    """Return the body with another value of the outermost `model`, a string that occurs once; None
    if it is not found."""
    found = [one.end() for one in NAMES_MODEL.finditer(raw)]
    if len(found) > _MOST_MODELS:
        return None
    name = orjson.dumps(model)
    for end in found:
        if (text := _TEXT.match(raw, end)) is None:
            continue
        changed = raw[: text.start(1)] + name + raw[text.end(1) :]
        if len(found) == 1 or orjson.loads(changed)["model"] == model:
            return changed
    return None


# At Vertex the path contains the model, and the body the version that is a header elsewhere.
_VERSION = "anthropic_version"
_VERTEX_VERSION = b'"anthropic_version":"vertex-2023-10-16"'
_NAMES_VERSION = re.compile(rb'"anthropic_version"\s*:')


def _for_vertex(raw: bytes, endpoint: Endpoint, body: dict[str, Any], model: str) -> bytes:
    """Return a body of Anthropic's own API in Vertex's form. Token counting names the model in
    both."""
    if endpoint.operation is Operation.COUNT:
        if body.get("model") != model:
            raw = _with_model(raw, model) or _rewritten(raw, "model", model)
        return raw if _VERSION in body else _beginning_with(raw, _VERTEX_VERSION)
    if "model" not in body:
        return raw if _VERSION in body else _beginning_with(raw, _VERTEX_VERSION)
    if _VERSION not in body:
        changed = _with_member(raw, NAMES_MODEL, _VERTEX_VERSION)
        if changed is not None:
            return changed
    whole = {name: value for name, value in orjson.loads(raw).items() if name != "model"}
    return orjson.dumps({_VERSION: "vertex-2023-10-16", **whole})


def _from_vertex(raw: bytes, body: dict[str, Any], model: str) -> tuple[bytes, dict[str, Any]]:
    """Return a body of Vertex's in the form of Anthropic's own API, as bytes and parsed."""
    without = {name: value for name, value in body.items() if name != _VERSION}
    if "model" not in body and model:
        member = b'"model":%b' % orjson.dumps(model)
        if (changed := _with_member(raw, _NAMES_VERSION, member)) is not None:
            return changed, {**without, "model": model}
    whole = {name: value for name, value in orjson.loads(raw).items() if name != _VERSION}
    return orjson.dumps(whole), without


def _with_member(raw: bytes, names: re.Pattern[bytes], member: bytes) -> bytes | None:
    """Return the body with `member` instead of the only one that `names` finds; None if it finds
    several, or one whose value is not a string."""
    found = list(names.finditer(raw))
    if len(found) != 1 or (text := _TEXT.match(raw, found[0].end())) is None:
        return None
    return raw[: found[0].start()] + member + raw[text.end(1) :]


def _beginning_with(raw: bytes, member: bytes) -> bytes:
    start = raw.index(b"{") + 1
    return b"%b%b,%b" % (raw[:start], member, raw[start:])


def _rewritten(raw: bytes, name: str, value: Any) -> bytes:
    """Return the body with another value of a field. Parses `raw`, since `body` lacks large
    files."""
    return orjson.dumps({**orjson.loads(raw), name: value})


def _naming_model(raw: bytes, model: str) -> bytes:
    """Return the body with a model, which it did not name."""
    return _beginning_with(raw, b'"model":%b' % orjson.dumps(model))


def _model_named_again(raw: bytes, named: str, model: str) -> bytes:
    names = rb'("model"\s*:\s*"(?:models/)?)%b(?=")' % re.escape(named.encode())
    name = orjson.dumps(model)[1:-1]
    return re.sub(names, lambda found: found[1] + name, raw)


def has_several_answers(body: dict[str, Any]) -> bool:
    """Whether several answers are requested, each with the full output length."""
    settings = body.get("generationConfig") or body.get("generation_config")
    found = settings if type(settings) is dict else body
    names = ("n", "best_of", "candidateCount", "candidate_count")
    return any(found.get(name) not in (None, 1) for name in names)


_PIECE_BYTES = 256 * 1024
_MODEL_PART = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n'


@dataclass(frozen=True, slots=True)
class FormBody:
    """A form that was read: its bytes are in `data`, or in the file `path` until the call has
    ended."""

    form: MediaForm
    data: bytes = b""
    path: Path | None = None

    @property
    def identity(self) -> int:
        """A hash, equal for equal forms."""
        files = tuple((file.field, file.size_bytes, file.head) for file in self.form.files)
        return hash((repr(self.form.fields), files))

    def for_model(self, model: str) -> bytes | RepeatableBody:
        """Return the body with this model name; unchanged if it is empty or the same."""
        spans = self._spans(model)
        if self.path is None:
            return b"".join(
                one if isinstance(one, bytes) else self.data[one[0] : one[1]] for one in spans
            )
        size_bytes = sum(len(one) if isinstance(one, bytes) else one[1] - one[0] for one in spans)
        return RepeatableBody(size_bytes, partial(_pieces, self.path, spans))

    def _spans(self, model: str) -> list[bytes | tuple[int, int]]:
        """Return the parts to send: bytes, and spans of the received body."""
        form = self.form
        if not model or form.fields.get("model") == model:
            return [(0, form.size_bytes)]
        if form.model_at is None:
            return [_MODEL_PART % (form.boundary, model.encode()), (0, form.size_bytes)]
        start, end = form.model_at
        return [(0, start), model.encode(), (end, form.size_bytes)]

    async def beginning(self, most_bytes: int) -> bytes:
        """Return the received body, or its first bytes. Raises StoreUnavailable."""
        if self.path is None:
            return self.data[:most_bytes]
        try:
            return await asyncio.to_thread(_read, self.path, most_bytes)
        except OSError as failed:
            raise _unreadable(failed) from failed


def _read(path: Path, most_bytes: int) -> bytes:
    with path.open("rb") as file:
        return file.read(most_bytes)


async def _pieces(path: Path, spans: list[bytes | tuple[int, int]]) -> AsyncIterator[bytes]:
    try:
        file = await asyncio.to_thread(path.open, "rb")
        try:
            for span in spans:
                if isinstance(span, bytes):
                    yield span
                    continue
                place, end = span
                while place < end:
                    piece = await asyncio.to_thread(_piece, file, place, end)
                    if not piece:
                        raise OSError(0, "it is shorter than it was")
                    place += len(piece)
                    yield piece
        finally:
            file.close()
    except OSError as failed:
        raise _unreadable(failed) from failed


def _piece(file: BinaryIO, place: int, end: int) -> bytes:
    file.seek(place)
    return file.read(min(_PIECE_BYTES, end - place))


def _unreadable(failed: OSError) -> StoreUnavailable:
    return StoreUnavailable(f"an upload could not be read: {failed.strerror}")


class CallSocket(Protocol):
    """A WebSocket to which calls are sent as events, one after another, instead of over HTTP."""

    def serving(self, targets: Sequence[Target]) -> list[Target]:
        """Return the targets that have such a WebSocket. Raises WebSocketRefused if none has."""

    def continued(
        self,
        references: Sequence[Reference],
        facts: RequestFacts | None,
        targets: Sequence[Target],
    ) -> tuple[Sequence[Reference], list[Target]]:
        """Return the references to what the connection itself does not hold, and the targets that
        hold the rest, whose tokens are added to the input. Raises InvalidRequest if none does."""

    async def open(
        self,
        target: Target,
        url: str,
        headers: Headers,
        body: bytes,
        timeouts: Timeouts,
        opened: Callable[[Exchange], None] | None,
    ) -> Exchange:
        """Send a call with a body for HTTP, and wait for its first event. Raises UpstreamError.
        Cancelling closes the connection."""


@dataclass(slots=True)
class NativeCall:
    """A request in a provider's dialect. headers: those that may be sent to an upstream. query:
    without its `?` and without a key. shows_wait: the client asked for comments on its place in the
    queue. has_key: it sent an idempotency key. form: the body if that is a form; `body` is then
    empty. socket: the WebSocket of the client's connection, for a call in one."""

    terms: Terms
    endpoint: Endpoint
    method: str
    query: str
    headers: Headers
    body: bytes
    received_at: datetime
    shows_wait: bool = False
    has_key: bool = False
    form: FormBody | None = None
    socket: CallSocket | None = None

    @property
    def body_bytes(self) -> int:
        """Length of the body."""
        return len(self.body) if self.form is None else self.form.form.size_bytes
