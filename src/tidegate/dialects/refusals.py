"""Errors of upstreams, classified: refusals, and errors within a stream of status 200.

The refusal rules of the upstream's own dialect come first, then those of the other dialects,
because providers mix them; the HTTP status decides what no dialect recognises. Errors are read from
the bytes on the wire, never from an SDK's exception text, because SDKs raise TypeError on some
error bodies.

Invariants: a refusal is one of throttled, unpaid, invalid key, busy, never possible, or about this
request only; nothing that a client alone can cause counts as a refusal of the key; no message
contains the API key or a whole page of another server; a model's text cannot imitate an error
event, because quotes and line ends in it are escaped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, assert_never

import orjson

from tidegate.dialects import DIALECTS, interactions
from tidegate.dialects.headers import answered_at, retry_after_ms
from tidegate.dialects.spec import (
    Dialect,
    ErrorAnswer,
    Headers,
    JsonObject,
    Operation,
    RefusalFacts,
)
from tidegate.errors import (
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamTierBusy,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnpaid,
)
from tidegate.telemetry.logging import redact

# Other 4xx that are temporary: the same call may succeed later.
TRANSIENT_CODES = (408, 425, 499)
# Without an error object, a balancer or proxy answers in the provider's place, such as while the
# servers behind it are replaced: an API names what it does not know.
_NOT_OF_THE_API = (403, 404, 405, 407)
# Statuses that mean the same from any server.
_NEVER_A_PAGE = (401, 402, 429, *TRANSIENT_CODES)
_TOO_LARGE_FOR_A_PROXY = 413
# HTTP statuses of errors by their type, code or status.
_STATUSES = {word: status for spec in DIALECTS.values() for word, status in spec.statuses.items()}
_IN_ORDER = tuple(DIALECTS[name] for name in ("gemini", "openai", "anthropic", "bedrock"))
# A self-hosted server at capacity: vLLM, SGLang, TGI, Ollama, llama.cpp.
_BUSY = re.compile(
    r"server (?:is )?busy|no slots? available|loading model|maximum pending requests|"
    r"queue (?:is )?full|too many (?:pending|waiting|concurrent) requests",
    re.IGNORECASE,
)
# llama.cpp's server answers these invalid requests with a 500 (verified with its build b10434):
# JSON that it cannot parse, tools and messages without a field, pictures for a model without
# vision.
_WRONG_REQUEST = re.compile(
    r"\[json\.exception\.|Failed to parse |\w+ input is not supported|Unknown reasoning format"
)
# TGI's for a generation that its model server failed, such as for lack of memory; elsewhere it is
# about a tool of the client's.
_FAILED_DEPENDENCY = 424
# A refusal of the key mentions it. Gemini also answers "The caller does not have permission" for a
# private video, and some keys have only some permissions.
_ABOUT_THE_KEY = re.compile(
    r"\b(?:api.?key|credential|consumer|project|account|organi[sz]ation|billing|suspended)",
    re.IGNORECASE,
)
_ABOUT_A_SCOPE = re.compile(r"missing scopes?\b|\bresource\b", re.IGNORECASE)


def upstream_error(
    status: int,
    error: Mapping[str, Any],
    headers: Mapping[str, str],
    *,
    secret: str,
    dialect: str = Dialect.GEMINI,
    tier: str = "",
    is_own: bool = False,
    calls_model: bool = False,
) -> UpstreamError:
    """Return the error for an error object and its HTTP status. `headers` are in lower case.
    `secret`: the API key, which is removed from the message. `tier`: the requested one. `is_own`:
    the server is self-hosted. `calls_model`: the request was for a model's answer."""
    if calls_model and not error and _is_of_another_server(status, headers):
        return _no_api(status)
    message = f"the provider answered {status}: {_reason(error, secret)}"
    at = answered_at(headers.get("date", ""), datetime.now(UTC))
    answer = ErrorAnswer(status, error, _passed_on(error) | dict(headers), at, tier.lower())
    wait_ms = retry_after_ms(answer)
    refusal = _of_openrouter(answer) or _by_words(dialect, answer)
    if is_own:
        refusal = _of_own_server(answer) or refusal
    if refusal is None:
        return _by_status(answer, message, wait_ms)
    # The headers of a bucket state when it is full again, long after one more call fits.
    is_stated = refusal.reason == "throttled" and wait_ms
    if refusal.wait_ms is not None and not is_stated:
        wait_ms = max(wait_ms or 0, refusal.wait_ms)
    match refusal.reason:
        case "throttled" | "busy":
            throttled = UpstreamThrottled(
                message,
                status=status,
                retry_after_ms=wait_ms,
                per_day=refusal.per_day,
                day_quota=refusal.day_quota,
                unit=refusal.unit,
                of_account=refusal.of_account,
                stated=refusal.stated,
            )
            throttled.is_busy = is_own and refusal.reason == "busy"
            return throttled
        case "tier_busy":
            return UpstreamTierBusy(message, status=status, retry_after_ms=wait_ms)
        case "fault":
            return UpstreamUnavailable(message, status=status, retry_after_ms=wait_ms)
        case "unpaid":
            return UpstreamUnpaid(message, status=status, retry_after_ms=wait_ms)
        case "too_expensive":
            return UpstreamUnpaid(message, status=status, of_key=False)
        case "key":
            return UpstreamUnauthorized(message, status=status)
        case "of_place":
            return UpstreamUnauthorized(message, status=status, of_key=False)
        case "never" | "of_thing":
            return UpstreamRejected(message, status=status)
        case _:
            assert_never(refusal.reason)


def _is_of_another_server(status: int, headers: Mapping[str, str]) -> bool:
    """Return whether a proxy or balancer made a refusal that has no error object."""
    is_page = headers.get("content-type", "").lower().startswith("text/html")
    is_refusal = 400 <= status < 500 and status not in _NEVER_A_PAGE
    return status in _NOT_OF_THE_API or (is_page and is_refusal)


def _no_api(status: int) -> UpstreamGarbled:
    message = f"the provider answered {status} without an error of its API"
    if status == _TOO_LARGE_FOR_A_PROXY:
        message += "; a proxy in front of it may not accept a body of this size"
    return UpstreamGarbled(message, status=status)


_MOST_PASSED_ON = 40


def _passed_on(error: Mapping[str, Any]) -> dict[str, str]:
    """Return the headers of a limit that OpenRouter puts into the error itself, in lower case."""
    metadata = error.get("metadata")
    found = metadata.get("headers") if isinstance(metadata, dict) else None
    if not isinstance(found, dict) or len(found) > _MOST_PASSED_ON:
        return {}
    return {name.lower(): value for name, value in found.items() if isinstance(value, str)}


# Its budgets, which are spent for a time: of a key, of a workspace, of a guardrail.
_SPENT = re.compile(r"openrouter_(?:guardrail_budget|workspace_budget|key_limit)")
_IN_FLIGHT, _TOO_HEAVY = "openrouter_in_flight_budget", "weight_exceeds_budget"


def _of_openrouter(answer: ErrorAnswer) -> RefusalFacts | None:
    """Classify a refusal of OpenRouter by the limit that it names; None if it names none.
    openrouter.ai/docs/api/reference, pages "errors-and-debugging" and "limits"."""
    metadata = answer.error.get("metadata")
    named = metadata if isinstance(metadata, dict) else {}
    source = str(named.get("limit_source"))
    if source == _IN_FLIGHT:  # the calls that are running may cost as much as the balance
        return RefusalFacts("throttled", of_account=True)
    if _TOO_HEAVY in {*answer.words, *(one for one in named.values() if isinstance(one, str))}:
        return RefusalFacts("too_expensive")
    return RefusalFacts("unpaid") if _SPENT.fullmatch(source) else None


def _by_words(dialect: str, answer: ErrorAnswer) -> RefusalFacts | None:
    own = DIALECTS[dialect]
    throttled = None
    plain = replace(answer, tier="")  # a tier is requested in one dialect's words
    for spec in (own, *(one for one in _IN_ORDER if one is not own)):
        refusal = spec.refusal(answer if spec is own else plain)
        if refusal is None:
            continue
        if refusal.reason != "throttled":
            return refusal
        more = refusal.unit or refusal.day_quota
        if throttled is None or (throttled.unit is None and more):
            throttled = refusal
    if answer.status in (429, 503) and _BUSY.search(answer.message):
        return RefusalFacts("busy")
    return throttled


def _of_own_server(answer: ErrorAnswer) -> RefusalFacts | None:
    """Classify the refusal of a self-hosted server. Such a server has no quota: it is busy or
    loads its model, whatever the wording. An answer without a message comes from a proxy in
    front of it."""
    if answer.status in (429, 503) and answer.message:
        return RefusalFacts("busy")
    if answer.status == 500 and _WRONG_REQUEST.match(answer.message):
        return RefusalFacts("never")
    if answer.status == _FAILED_DEPENDENCY:
        return RefusalFacts("fault")
    return None


def _by_status(answer: ErrorAnswer, message: str, wait_ms: int | None) -> UpstreamError:
    status = answer.status
    if status == 402:
        return UpstreamUnpaid(message, status=status, retry_after_ms=wait_ms)
    if status == 429:
        return UpstreamThrottled(message, retry_after_ms=wait_ms)
    if status in (401, 403):
        return UpstreamUnauthorized(message, status=status, of_key=_is_of_key(answer))
    if status == 501:  # for example a cancellation that is not supported
        return UpstreamRejected(message, status=status)
    if status >= 500 or status in TRANSIENT_CODES:
        return UpstreamUnavailable(message, status=status, retry_after_ms=wait_ms)
    if 400 <= status < 500:
        return UpstreamRejected(message, status=status)
    return UpstreamGarbled(message, status=status)


def _is_of_key(answer: ErrorAnswer) -> bool:
    if any("reason" in detail for detail in answer.details):
        return True
    if _ABOUT_A_SCOPE.search(answer.message):
        return False
    return answer.status != 403 or bool(_ABOUT_THE_KEY.search(answer.message))


MAX_MESSAGE_CHARS = 500
# OpenAI's form of a rejected key: its first and its last letters.
_MASKED_KEY = re.compile(r"\S*\*{3,}\S*")
_GOOGLE_KEY = re.compile(r"AIza[0-9A-Za-z_-]{20,}")


def error_of_refusal_in(body: bytes) -> JsonObject:
    """Return the error object of an answer that is known to be a refusal: the whole body if it is
    flat, as at Mistral and vLLM; empty if it has none."""
    if (value := error_event_in(body)) is not None:
        return error_object(value) or {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    if "message" not in value and isinstance(value.get("detail"), str):
        return {"message": value["detail"]}
    if isinstance(value.get("Message"), str):  # AWS's, before the request reaches a service
        return {**value, "message": value["Message"]}
    return value if isinstance(value.get("message"), str) else {}


def status_of(error: Mapping[str, Any]) -> int:
    """Return the HTTP status that belongs to an error object; 500 if it names none."""
    for word in (error.get("code"), error.get("type")):
        if (status := _STATUSES.get(str(word))) is not None:
            return status
    code = error.get("code")
    if isinstance(code, str) and code.isascii() and code.isdigit():
        code = int(code)
    if isinstance(code, int) and 400 <= code <= 599:
        return code
    return _STATUSES.get(str(error.get("status")), 500)


def _reason(error: Mapping[str, Any], secret: str) -> str:
    message = error.get("message")
    if not isinstance(message, str) or not message.strip():
        status = error.get("status")
        return status[:100] if isinstance(status, str) else "no reason given"
    return clean(message, secret)


def clean(message: str, secret: str) -> str:
    """Return a provider's text on one line, without keys, cut to a bound."""
    if secret:
        message = message.replace(secret, "***")
    message = " ".join(message.split())
    if "***" in message:  # cut first: on a very long word the search would be slow
        message = _MASKED_KEY.sub("***", message[: 4 * MAX_MESSAGE_CHARS])
    message = redact(_GOOGLE_KEY.sub("***", message))
    return message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}..."


# The first text after comments is an error: in an event, in a list or alone. Nothing is tried
# twice, since an answer may begin with any number of blank lines, which keep its connection alive.
_BEGINS = re.compile(
    rb"(?:\s++|:[^\n]*+\n|(?:event|id|retry):[^\n]*+\n)*+(?:data:)?\s*+\[?\s*+\{\s*+"
    # xAI's, before the message:
    rb'(?:"(?:code|status)"\s*+:\s*+(?:"[^"\\]*+"|\d++|null)\s*+,\s*+)*+'
    rb'(?:"error"\s*+:\s*+[{"]|"(?:type|object)"\s*+:\s*+"error"|'
    rb'"type"\s*+:\s*+"response\.failed")'
)
# A shorter first piece may be half of a line that reports an error.
SHORTEST_BYTES = 64
LONGEST_BYTES = 65_536
_HEAD_BYTES = 160
_TAIL_BYTES = 16_384
_ENOUGH_BYTES, _MOST_TAIL_BYTES = 2_048, 4_000_000
# The start of an event with content, and text that every error event contains.
_EVENT, _DATA = re.compile(rb"(?:^|\n)data:(?!\s*\[DONE\])"), re.compile(rb"(?:^|\n)data:")
_MAY_REPORT = re.compile(
    rb'"error"\s*:\s*(?:data:\s*)?[{"]|"type"\s*:\s*"(?:error|response\.failed)"|'
    rb'"object"\s*:\s*"error"|"finish_reason"\s*:\s*"error"|(?:^|\n)event:[ ]?error\s|'
    rb'"base_resp"\s*:\s*\{[^{}]*"status_code"\s*:\s*[1-9]'  # MiniMax's, which has no `error`
)
# What `_MAY_REPORT` finds contains one of these.
_WORDS_OF_ERRORS = (b"error", b"response.failed", b'"base_resp"')
_NAMED_ERROR = re.compile(rb"(?:^|\n)event:[ ]?error\s*(?:\n|$)")
_BETWEEN_EVENTS = re.compile(rb"\r?\n\r?\n")
_IN_LIST = re.compile(rb'[\[,]\s*(?=\{\s*"error"\s*:\s*\{)')
_DECODER = json.JSONDecoder()


def is_too_short(first: bytes) -> bool:
    """Return whether the first bytes of a stream may be half of a line that reports an error."""
    if len(first) >= SHORTEST_BYTES or first.endswith((b"\n\n", b"\r\n\r\n")):
        return False
    return not first.endswith(b"\n") or first.lstrip()[:6] in (b"", b"event:")


def tail_of(pieces: list[bytes]) -> bytes:
    """Return the last bytes of an answer, enough to find an error: with its whole last event, which
    repeats the request and may be long."""
    start, size_bytes = len(pieces), 0
    is_whole = bool(pieces) and pieces[0].lstrip()[:1] in (b"[", b"{")  # not a stream of events
    while start and (size_bytes < _ENOUGH_BYTES or not is_whole):
        start -= 1
        size_bytes += len(pieces[start])
        is_whole = is_whole or size_bytes > _MOST_TAIL_BYTES or bool(_EVENT.search(pieces[start]))
    return b"".join(pieces[start:])


def may_begin_with_error(first: bytes) -> bool:
    """Return whether the first bytes of an answer may begin an error."""
    head = first[:_HEAD_BYTES]  # a quick check, which excludes nearly all
    if head.find(b"error") < 0 and head.find(b"response.failed") < 0:
        return False
    return _BEGINS.match(first) is not None


def error_event_in(data: bytes) -> JsonObject | None:
    """Return the object that reports an error in the first or the last bytes of an answer: a JSON
    body, an item of a list, or an event, also one without `data:`."""
    if not any(data.find(word) >= 0 for word in _WORDS_OF_ERRORS):
        return None  # the usual case
    if _MAY_REPORT.search(data) is None:
        return None
    lines, parts = _data_lines(data), _BETWEEN_EVENTS.split(data)
    events = [b"\n".join(_data_lines(event)) for event in parts]  # an event may have several lines
    bare = [text for text in parts if text.startswith(b"{")]  # Google's SDKs accept this form too
    for text in (*reversed(lines), *reversed(events), *reversed(bare), data):
        if _MAY_REPORT.search(text) and (event := _error_event(text)) is not None:
            return event
    for text, part in zip(reversed(events), reversed(parts), strict=True):
        if _NAMED_ERROR.search(part) and text.strip():
            return named_error(text)
    tail = data[-_TAIL_BYTES:]
    places = [one.end() for one in _IN_LIST.finditer(tail)]
    return _error_event(tail[places[-1] :], at_start=True) if places else None


def _data_lines(data: bytes) -> list[bytes]:
    return [line[5:] for line in data.splitlines() if line.startswith(b"data:")]


def _error_event(text: bytes, *, at_start: bool = False) -> JsonObject | None:
    """Return the parsed text if it reports an error. `at_start`: other text may follow the
    object."""
    decoded = text.decode("utf-8", "replace").strip()
    try:
        value = _DECODER.raw_decode(decoded)[0] if at_start else json.loads(decoded)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    return value if isinstance(value, dict) and error_object(value) else None


def named_error(data: bytes) -> JsonObject:
    """Return the object that reports the error in an event with the name `error`, whose data may
    have any form."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = data.decode("utf-8", "replace").strip()
    if type(value) is not dict:
        return {"error": {"message": str(value)}}
    return value if error_object(value) is not None else {"error": value or dict(_ENDED)}


def error_object(value: JsonObject) -> JsonObject | None:
    """Return the error that an event of a stream, a body, or an item of a list reports; None if it
    reports none."""
    if value.get("type") == "response.failed" and isinstance(value.get("response"), dict):
        value = value["response"]
    error = value.get("error")
    if isinstance(error, str) and error:
        return {"message": error}
    if isinstance(error, dict) and any(error.values()):  # or all empty, without a failure
        return error
    if (error := _error_of_choices(value) or _error_of_base(value)) is not None:
        return error
    # The flat form of Mistral and vLLM, marked by its `object`.
    return value if "error" in (value.get("type"), value.get("object")) else None


def _error_of_choices(event: JsonObject) -> JsonObject | None:
    """Return the error in the only choice of an answer, which OpenRouter sends if an error ends the
    answer. OpenRouter and Mistral also have a `finish_reason` for it (see their descriptions of
    chat completions)."""
    choices = event.get("choices")
    if type(choices) is not list or len(choices) != 1 or type(choices[0]) is not dict:
        return None
    error = choices[0].get("error")
    if type(error) is dict and any(error.values()):
        return error
    return dict(_ENDED) if choices[0].get("finish_reason") == "error" else None


# HTTP statuses of MiniMax's codes, which it reports within a 200; those of its own failures are
# left out: https://platform.minimax.io/docs/api-reference/errorcode
_BASE_STATUSES = {
    **dict.fromkeys((1002, 1039, 1041, 2045, 2056), 429),
    **dict.fromkeys((1004, 2049), 401),
    1008: 402,
    **dict.fromkeys((1026, 1027, 1042, 1043, 1044, 2013, 2037, 2039, 2042, 2048, 20132), 400),
}


def _error_of_base(event: JsonObject) -> JsonObject | None:
    """Return the error that MiniMax reports beside the choices of an answer."""
    base = event.get("base_resp")
    if type(base) is not dict or type(code := base.get("status_code")) is not int or not code:
        return None
    message = f"{base.get('status_msg') or 'no reason given'} ({code})"
    return {"code": _BASE_STATUSES.get(code, 500), "message": message}


_ENDED = {"code": 502, "message": "the answer ended with an error without details"}
_NO_EVENT = {"error": {"code": 502, "message": "the stream ended without an event"}}


def error_without_output(answer: bytes) -> JsonObject | None:
    """Return a whole answer that reports an error beside its choices and no output; None for any
    other."""
    value = error_of_choice(answer)
    if value is None:
        return None
    choices = value.get("choices")
    choice = _object(choices[0]) if type(choices) is list and choices else {}
    content = [part for name, part in _object(choice.get("message")).items() if name != "role"]
    return None if choice.get("text") or any(content) else value


def error_of_choice(answer: bytes) -> JsonObject | None:
    """Return a whole answer whose only choice ends with an error, or that reports one beside its
    choices, with or without output; None for any other."""
    # By `find`: `in` costs five times as much (decision 27).
    has_choice = answer.find(b'"error"') >= 0 and answer.find(b'"choices"') >= 0
    if not has_choice and answer.find(b'"base_resp"') < 0:
        return None
    try:
        value = orjson.loads(answer)
    except orjson.JSONDecodeError:
        return None
    if type(value) is not dict:
        return None
    return value if _error_of_choices(value) or _error_of_base(value) else None


def error_at_end(pieces: list[bytes]) -> JsonObject | None:
    """Return the object that reports an error at the end of a stream; an error of ours if the
    stream has only comments."""
    tail = tail_of(pieces)
    if tail.startswith(b":") and _DATA.search(tail) is None:
        return _NO_EVENT
    return error_event_in(tail)


def error_body(event: JsonObject) -> JsonObject:
    """Return an error event as the body of an answer, in the form that clients parse."""
    if event.get("type") == "response.failed" or not (event.get("error") or "message" in event):
        return {"error": error_object(event)}
    return event


def stream_error(
    event: JsonObject,
    headers: Iterable[tuple[bytes, bytes]],
    *,
    secret: str,
    dialect: str,
    tier: str = "",
    is_own: bool = False,
) -> UpstreamError:
    """Return the error for an event of a stream."""
    error = error_object(event) or {}
    status = status_of(error)
    named = {
        name.decode("latin-1").lower(): value.decode("latin-1")
        for name, value in without_wait(headers, status)
    }
    return upstream_error(
        status, error, named, secret=secret, dialect=dialect, tier=tier, is_own=is_own
    )


_WAITS = (b"retry-after", b"retry-after-ms")


def without_wait(headers: Iterable[tuple[bytes, bytes]], status: int) -> Headers:
    """Return the headers of a successful answer for an error in it. Without a 429 the wait is left
    out: Anthropic states the wait of a limit in successful answers too, and it applies to no other
    error."""
    if status == 429:
        return list(headers)
    return [pair for pair in headers if pair[0].lower() not in _WAITS]


_MAYBE_EMPTY = frozenset((Operation.TRANSCRIBE,))  # the transcript of a recording without speech


def no_answer(operation: Operation, headers: Headers, first: bytes, *, at_end: bool) -> str:
    """Return why a success of a model's call is not an answer (an empty body, or a web page, for
    example of a proxy), otherwise an empty string. `first`: its first bytes, all of them if
    `at_end`."""
    if at_end and not first.strip() and operation not in _MAYBE_EMPTY:
        return "an empty body"
    for name, value in headers:
        if name.lower() == b"content-type" and value.lower().startswith(b"text/html"):
            return "a page of HTML"
    return ""


def own_headers(headers: Headers, event: JsonObject) -> Headers:
    """Return the headers of a successful answer that apply if the error in it becomes the
    answer."""
    framing = (b"content-type", b"content-length", b"content-encoding", b"cache-control")
    left = without_wait(headers, status_of(error_object(event) or {}))
    own = [pair for pair in left if pair[0] not in framing]
    return [(b"content-type", b"application/json"), *own]


_FIELDS = (b":", b"event:", b"id:", b"retry:")
_BEGUN = frozenset(
    {
        *("response.created", "response.in_progress", "response.queued"),
        *("response.content_part.added", "response.reasoning_part.added"),
        "response.reasoning_summary_part.added",
        *("message_start", "ping"),
    }
)


class Prelude:
    """The events of a stream before any output.

    `error` is set to an event that reports an error, or if the stream ends after comments only.
    `is_events` becomes false for data that is not a stream of events.
    """

    __slots__ = ("_has_data", "_is_error", "_rest", "error", "is_events")

    def __init__(self) -> None:
        self.error: dict[str, Any] | None = None
        self.is_events = True
        self._has_data = False
        self._is_error = False  # the event that is being read has the name `error`
        self._rest = b""

    def holds(self, piece: bytes, *, at_end: bool) -> bool:
        """Return whether neither output nor an error has come so far, this piece included."""
        data, start = self._rest + piece, 0
        while (end := data.find(b"\n", start)) >= 0 or (at_end and start < len(data)):
            end = len(data) if end < 0 else end
            if not self._is_without_output(data[start:end].rstrip(b"\r")):
                return False
            start = end + 1
        self._rest = data[start:]
        if at_end and not self._has_data:
            self.error = _NO_EVENT
        return True

    def _is_without_output(self, line: bytes) -> bool:
        if not line.startswith(b"data:"):
            if line and not line.startswith(_FIELDS):
                self.is_events = False
                return False
            if not line or line.startswith(b"event:"):
                self._is_error = line[6:].strip() == b"error"
            return True
        self._has_data = True
        if self._is_error:
            self.error = named_error(line[5:])
            return False
        try:
            value = orjson.loads(line[5:])
        except orjson.JSONDecodeError:  # the end marker, or an unknown protocol
            return False
        if type(value) is not dict:
            return False
        if error_object(value) is not None:
            self.error = value
            return False
        return _has_no_output(value)


def _has_no_output(event: dict[str, Any]) -> bool:
    if "messageStart" in event:  # Bedrock's
        return True
    if "event_type" in event:
        return interactions.has_no_output(event)
    kind = event.get("type")
    if kind == "content_block_start":
        block = _object(event.get("content_block"))
        return block.get("type") in ("text", "thinking") and not _has_content(block)
    if kind == "response.output_item.added":
        return _object(event.get("item")).get("type") in ("message", "reasoning")
    if type(kind) is str:
        return kind in _BEGUN
    if "usageMetadata" in event:  # Gemini's usage of the prompt, before there is a candidate
        return not event.get("candidates") and not event.get("promptFeedback")
    choices = event.get("choices")
    if type(choices) is not list or event.get("usage") is not None:
        return False
    return all(type(one) is dict and _is_empty(one) for one in choices)


def _is_empty(choice: dict[str, Any]) -> bool:
    if choice.get("finish_reason") or choice.get("text"):
        return False
    return not any(value for name, value in _object(choice.get("delta")).items() if name != "role")


def _has_content(block: dict[str, Any]) -> bool:
    return any(block.get(name) for name in ("text", "thinking", "signature", "citations"))


def _object(value: Any) -> dict[str, Any]:
    return value if type(value) is dict else {}
