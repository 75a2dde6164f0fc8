"""Messages of the Responses API over WebSocket, and a turn as an exchange over HTTP."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.errors import InvalidRequest
from tidegate.realtime import responses
from tidegate.realtime.responses import ProcessedNotice, SteerRequest, TurnRequest


def turn(**fields: Any) -> TurnRequest:
    found = TurnRequest.of(orjson.dumps({"type": "response.create", **fields}))
    assert isinstance(found, TurnRequest)
    return found


def test_a_turn_is_the_body_of_a_stream_over_http_and_becomes_an_event_again() -> None:
    found = turn(stream_id="main", model="m", background=False, stream=False, input="hi")
    assert orjson.loads(found.body) == {"stream": True, "model": "m", "input": "hi"}
    assert found.stream_id == "main"
    event = orjson.loads(responses._event_of(found.body, found.stream_id))
    assert event == {"type": "response.create", "stream_id": "main", "model": "m", "input": "hi"}


def test_of_a_name_that_stands_twice_only_the_value_that_is_checked_is_sent() -> None:
    found = TurnRequest.of('{"type":"response.create","model":"a","model":"b"}')
    assert isinstance(found, TurnRequest)
    assert found.body == b'{"stream":true,"model":"b"}'


def test_a_text_that_looks_like_a_field_is_left_as_it_is() -> None:
    text = '"stream":true'
    found = turn(model=text, input=text)
    event = orjson.loads(responses._event_of(found.body, None))
    assert event == {"type": "response.create", "model": text, "input": text}


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ("no json", "message"),
        (b"\xff", "message"),
        ("[]", "message"),
        ('{"model":"m"}', "type"),
        ('{"type":["response.create"]}', "type"),
        ('{"type":"response.create","background":true}', "background"),
        ('{"type":"response.create","stream_id":7}', "stream_id"),
        ('{"type":"response.create","stream_id":""}', "stream_id"),
        ('{"type":"response.create","input":' + "[" * 400 + "]" * 400 + "}", "message"),
    ],
)
def test_what_is_no_event_of_a_client_is_rejected(message: str | bytes, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        TurnRequest.of(message)
    assert refused.value.field == field


def test_other_events_of_clients_are_read() -> None:
    steer = TurnRequest.of('{"type":"response.steer","previous_response_id":"r","input":"x"}')
    assert steer == SteerRequest("x", "r")
    notice = TurnRequest.of('{"type":"response.processed","response_id":"r"}')
    assert notice == ProcessedNotice("r")


@pytest.mark.parametrize(
    ("event", "status", "header"),
    [
        ({"status": 429, "error": {"message": "m", "headers": {"Retry-After": "7"}}}, 429, b"7"),
        ({"status_code": 503, "headers": {"retry-after": 7}, "error": {"message": "m"}}, 503, b"7"),
        ({"error": {"message": "m", "code": "rate_limit_exceeded"}}, 429, None),
        ({"status": 200, "error": {"message": "m"}}, 500, None),
        ({"status": True, "error": "m"}, 500, None),
    ],
)
def test_an_error_is_the_refusal_over_http(
    event: dict[str, Any], status: int, header: bytes | None
) -> None:
    found, headers, body = responses._refusal_in({"type": "error", **event})
    assert (found, dict(headers).get(b"retry-after")) == (status, header)
    assert orjson.loads(body)["error"]["message"] == "m"
    assert "headers" not in orjson.loads(body)["error"]
