"""Errors inside of answers that began as a success."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate.dialects import interactions, refusals
from tidegate.errors import (
    UpstreamError,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnpaid,
)

GEMINI = b'{"error": {"code": 503, "message": "overloaded", "status": "UNAVAILABLE"}}'
ANTHROPIC = b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}'
RESPONSES = (
    b'{"type":"response.failed","response":{"id":"r","error":{"code":"rate_limit_exceeded",'
    b'"message":"Please try again in 2s."}}}'
)
ERRORS = {
    "an event": b"data: " + GEMINI + b"\n\n",
    "without a space": b"data:" + GEMINI + b"\n\n",
    "with other line ends": b"data: " + GEMINI + b"\r\n\r\n",
    "a named event": b"event: error\ndata: " + ANTHROPIC + b"\n\n",
    "behind a comment": b": hello\n\nevent: error\ndata: " + ANTHROPIC + b"\n\n",
    "a list of one": b"[" + GEMINI + b"\n]\n",
    "alone": b" \n" + GEMINI,
    "that a response failed": b"event: response.failed\ndata: " + RESPONSES + b"\n\n",
    "of OpenAI": b'data: {"error":{"message":"no","type":"server_error","code":null}}\n\n',
    "in a word": b'data: {"error":"no"}\n\n',
    "in a word, behind its code": b'{"code": "Some \xc3\xa4 code", "error": "no credits"}',
    "flat": b'data: {"object":"error","message":"busy","type":"ServiceUnavailable","code":503}\n\n',
    "flat, alone": b'{"object": "error", "message": "busy", "code": "1300"}',
}
NO_ERRORS = {
    "a chunk": b'data: {"choices":[{"delta":{"content":"{\\"error\\": {}}"}}],"error":null}\n\n',
    "a response": b'data: {"type":"response.completed","response":{"error":null}}\n\n',
    "a text": b'data: {"a":"\\ndata: {\\"error\\": {\\"code\\": 503}}\\n\\n"}\n\n',
    "text in a list": b'[{"a":"[{\\"error\\": {\\"code\\": 503}}"}]',
    "the end": b"data:[DONE]\n\n",
    "a tool's argument": b'data: {"choices":[{"args":{"error":{"code":503}}}]}\n\n',
    "an object in an argument": b'data: {"choices":[{"args":{"object":"error"}}]}\n\n',
    "a code and a choice": b'{"code":"x","choices":[{"args":{"error":"no"}}]}',
    "an empty word": b'data: {"choices":[{"delta":{"content":"x"}}],"error":""}\n\n',
    "an empty object": b'data: {"choices":[{"delta":{"content":"x"}}],"error":{}}\n\n',
    "a name in a text": b'data: {"a":"\\nevent: error\\ndata: x"}\n\n',
    "another name": b'event: errors\ndata: {"a":1}\n\n',
    "zeros": b'data: {"choices":[{"delta":{}}],"error":{"code":0,"message":"","type":""}}\n\n',
    "nothing": b"",
}


def of_minimax(code: int, message: str, choices: object = None) -> bytes:
    base = {"status_code": code, "status_msg": message}
    return json.dumps({"id": "1", "choices": choices, "base_resp": base}).encode()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (1002, UpstreamThrottled),
        (2056, UpstreamThrottled),
        (1004, UpstreamUnauthorized),
        (1008, UpstreamUnpaid),
        (1026, UpstreamRejected),
        (2013, UpstreamRejected),
        (1000, UpstreamUnavailable),
        (9999, UpstreamUnavailable),
    ],
)
def test_minimax_reports_errors_within_a_success(code: int, kind: type[UpstreamError]) -> None:
    answer = of_minimax(code, "no")
    value = refusals.error_without_output(answer)
    assert value is not None
    prelude = refusals.Prelude()
    assert not prelude.holds(b"data: " + answer + b"\n\n", at_end=True)
    assert prelude.error == value
    error = refusals.stream_error(value, [], secret="", dialect="openai")
    assert type(error) is kind
    assert f"no ({code})" in error.message
    body = refusals.error_body(value)
    assert refusals.error_of_refusal_in(json.dumps(body).encode())["message"] == f"no ({code})"


@pytest.mark.parametrize("end", [b"", b"data: [DONE]\n\n"])
def test_an_error_of_minimax_at_the_end_of_a_stream_is_seen(end: bytes) -> None:
    delta = b'data: {"choices":[{"index":0,"delta":{"content":"so"}}]}\n\n'
    for choices in (None, [{"finish_reason": "stop", "delta": {"content": "\\"}}]):
        last = b"data: " + of_minimax(1002, "rate limit {x}", choices) + b"\n\n" + end
        value = refusals.error_at_end([delta] * 300 + [last[:40], last[40:]])
        assert value is not None
        error = refusals.stream_error(value, [], secret="", dialect="openai")
        assert type(error) is UpstreamThrottled
    said = of_minimax(0, "success", [{"delta": {"content": '"base_resp":{"status_code":1002}'}}])
    assert refusals.error_at_end([delta, b"data: " + said + b"\n\n" + end]) is None


def test_a_success_of_minimax_is_one() -> None:
    said = [{"index": 0, "message": {"role": "assistant", "content": "so"}}]
    for fine in (of_minimax(0, "success", said), of_minimax(0, ""), b'{"base_resp":null}'):
        assert refusals.error_of_choice(fine) is None
        assert refusals.error_without_output(fine) is None
    partial = of_minimax(1027, "output new_sensitive", said)
    assert refusals.error_of_choice(partial) is not None
    assert refusals.error_without_output(partial) is None


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_seen_at_the_start_and_at_the_end(name: str) -> None:
    assert refusals.may_begin_with_error(ERRORS[name])
    assert refusals.error_event_in(ERRORS[name]) is not None
    if ERRORS[name].lstrip()[:1] not in (b"[", b"{"):
        before = b'data: {"choices":[]}\n\n' * 1_000
        assert refusals.error_event_in(before + ERRORS[name]) is not None
        assert refusals.error_event_in(before + ERRORS[name] + b"data: [DONE]\n\n") is not None


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_an_error_is_seen_that_is_no_event_of_its_stream(end: bytes) -> None:
    written = json.dumps(json.loads(GEMINI), indent=2).encode()
    before = (b'data: {"candidates":[]}' + end) * 1_000
    for error in (GEMINI, written, written.replace(b"\n", b"\r\n"), written + end):
        found = refusals.error_event_in(refusals.tail_of([before, error]))
        assert found == json.loads(GEMINI)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"code":"InternalError","message":"no luck","request_id":"r"}', "no luck"),
        (b"upstream closed", "upstream closed"),
        (b'"closed"', "closed"),
        (b"{}", "the answer ended with an error without details"),
        (ANTHROPIC, "Overloaded"),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("named", [b"event: error", b"event:error"])
def test_an_event_with_the_name_error_is_one_whatever_its_data_is(
    named: bytes, end: bytes, data: bytes, message: str
) -> None:
    event = named + end + b"id: 7" + end + b"data: " + data + end + end
    before = b'data: {"choices":[{"delta":{"content":"a"}}]}' + end + end
    for stream in (event, before + event, before + event + b"data: [DONE]" + end + end):
        found = refusals.error_event_in(stream)
        assert found is not None
        error = refusals.error_object(found)
        assert error is not None
        assert error["message"] == message
    prelude = refusals.Prelude()
    assert not prelude.holds(event, at_end=False)
    assert prelude.error is not None
    later = refusals.Prelude()
    assert later.holds(named + end + end, at_end=False)  # the name of an event without data
    assert not later.holds(before, at_end=False)
    assert later.error is None


def test_an_error_of_the_only_choice_is_seen() -> None:
    error = {"code": 502, "message": "The model is down"}
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error", "error": error}
    chunk = {"id": "gen-1", "object": "chat.completion.chunk", "choices": [choice]}
    data = b"data: " + json.dumps(chunk).encode() + b"\n\ndata: [DONE]\n\n"
    assert refusals.error_event_in(b'data: {"choices":[]}\n\n' * 9 + data) == chunk
    assert refusals.error_body(chunk) == {"error": error}
    assert refusals.status_of(refusals.error_object(chunk) or {}) == 502
    ends = dict(choice, finish_reason="stop")
    for other in (dict(ends, error={}), dict(ends, error=None), {"delta": {"error": error}}):
        assert refusals.error_object({"choices": [other]}) is None
    assert refusals.error_object({"choices": [choice, {"delta": {"content": "x"}}]}) is None


def test_a_whole_answer_with_nothing_but_an_error_in_its_choice_is_one() -> None:
    def whole(**message: object) -> bytes:
        choice = {"error": {"code": 502, "message": "no"}, "message": {"role": "a", **message}}
        return json.dumps({"id": "gen-1", "choices": [choice]}).encode()

    for empty in (whole(), whole(content=""), whole(content=None, tool_calls=[])):
        assert refusals.error_without_output(empty) == json.loads(empty)
    for other in (whole(content="so"), whole(tool_calls=[{}]), whole()[:-1], b'{"error":{}}'):
        assert refusals.error_without_output(other) is None
    some = whole(content="so")
    assert refusals.error_of_choice(some) == json.loads(some)


def test_a_reason_that_is_an_error_is_one_without_more_words() -> None:
    ended = b'{"choices":[{"message":{"content":"so"},"finish_reason":"error"}]}'
    assert refusals.error_of_choice(ended) == json.loads(ended)
    assert refusals.error_without_output(ended) is None
    assert refusals.error_without_output(ended.replace(b'"so"', b"null")) is not None
    assert (
        refusals.error_without_output(ended.replace(b'{"content":"so"}', b'{},"text":"a"')) is None
    )
    assert refusals.status_of(refusals.error_object(json.loads(ended)) or {}) == 502
    for fine in (b'"stop"', b"null", b'"errors"'):
        assert refusals.error_of_choice(ended.replace(b'"error"', fine)) is None
    event = b'data: {"choices":[{"delta":{},"finish_reason":"error"}]}\n\ndata: [DONE]\n\n'
    assert refusals.error_at_end([b'data: {"choices":[]}\n\n', event]) is not None


def test_comments_alone_are_no_answer() -> None:
    comment = b": OPENROUTER PROCESSING\n\n"
    assert refusals.error_at_end([comment, comment]) is not None
    assert refusals.error_at_end([comment, b"data: [DONE]\n\n"]) is None
    prelude = refusals.Prelude()
    assert prelude.holds(comment, at_end=False)
    assert prelude.error is None
    prelude.holds(b"", at_end=True)
    assert prelude.error is not None


def test_an_error_that_ends_a_list_is_seen() -> None:
    item = b'{"candidates":[{"content":{"parts":[{"text":"x"}]}}]}'
    assert refusals.error_event_in(b"[" + item + b"\n,\r\n" + GEMINI + b"\n]") == json.loads(GEMINI)
    assert refusals.error_event_in(b'"}]}}]}\n,' + GEMINI + b"\n]") == json.loads(GEMINI)


@pytest.mark.parametrize("name", NO_ERRORS)
def test_nothing_else_is_taken_for_one(name: str) -> None:
    assert refusals.error_event_in(NO_ERRORS[name]) is None
    assert not refusals.may_begin_with_error(NO_ERRORS[name])


@pytest.mark.parametrize("blanks", [b"\n", b"\r\n", b" ", b": keep-alive\n\n", b"event: x\n"])
@pytest.mark.parametrize("count", [24, 4_000])
def test_no_number_of_blank_lines_before_an_answer_takes_long(blanks: bytes, count: int) -> None:
    """Providers send them while a call waits there. With 30 of them an event loop stood still for
    minutes."""
    whole = b'{"object": "response", "error": null, "output": []}'
    began = time.thread_time()
    for answer in (whole, b"data: " + whole, b"<"):
        assert not refusals.may_begin_with_error(blanks * min(count, 40) + answer)
        assert refusals._BEGINS.match(blanks * count + answer) is None
        assert not interactions.is_interaction(blanks * count + answer)
    assert time.thread_time() - began < 1
    error = b'{"error": {"message": "no"}}'
    assert refusals._BEGINS.match(blanks * count + error) is not None
    assert refusals._BEGINS.match(blanks * count + b"data: " + error) is not None


@pytest.mark.parametrize(
    ("value", "status", "kind"),
    [
        (json.loads(GEMINI), 503, UpstreamUnavailable),
        (json.loads(ANTHROPIC), 529, UpstreamUnavailable),
        (json.loads(RESPONSES), 429, UpstreamThrottled),
        ({"error": {"type": "rate_limit_error"}}, 429, UpstreamThrottled),
        ({"error": {"type": "tokens", "code": "rate_limit_exceeded"}}, 429, UpstreamThrottled),
        ({"error": {"type": "invalid_request_error"}}, 400, UpstreamRejected),
        ({"error": {"type": "authentication_error"}}, 401, UpstreamUnauthorized),
        ({"type": "error", "code": "server_error", "message": "no"}, 500, UpstreamUnavailable),
        ({"error": {"code": 429}}, 429, UpstreamThrottled),
        ({"error": {"code": 200}}, 500, UpstreamUnavailable),
        ({"error": "no"}, 500, UpstreamUnavailable),
        ({"object": "error", "message": "busy", "code": 503}, 503, UpstreamUnavailable),
    ],
)
def test_what_the_error_would_have_been_as_a_status(
    value: dict[str, object], status: int, kind: type[UpstreamError]
) -> None:
    assert refusals.status_of(refusals.error_object(value) or {}) == status
    assert type(refusals.stream_error(value, [], secret="key", dialect="gemini")) is kind


@given(st.sampled_from(list(ERRORS.values())), st.integers(1, 80))
def test_an_error_is_seen_however_its_first_bytes_arrive(event: bytes, size: int) -> None:
    pieces = [event[at : at + size] for at in range(0, len(event), size)]
    first = pieces.pop(0)
    while pieces and refusals.is_too_short(first):
        first += pieces.pop(0)
    comment = event.startswith(b": ") and not refusals.may_begin_with_error(first)
    assert refusals.may_begin_with_error(first) or comment
    assert refusals.error_event_in(refusals.tail_of([first, *pieces])) is not None


@given(st.binary(max_size=200))
def test_no_bytes_break_the_search(data: bytes) -> None:
    refusals.error_event_in(b'data: {"error"' + data)
    refusals.may_begin_with_error(data)


def test_an_error_within_a_stream_is_classified_in_the_words_of_its_dialect_first() -> None:
    message = "This request would exceed your limit of 200,000 input tokens per minute."
    event = {"type": "error", "error": {"type": "rate_limit_error", "message": message}}
    error = refusals.stream_error(event, [], secret="key", dialect="anthropic")
    assert isinstance(error, UpstreamThrottled)
    assert (error.status, error.unit) == (429, "input_tokens")
