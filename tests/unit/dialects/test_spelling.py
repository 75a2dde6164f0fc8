"""Fields that admission goes by: said once, in their own case, and never for work that goes on."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.dialects import DIALECTS, endpoint_of
from tidegate.dialects.requests import check_named_once
from tidegate.dialects.resources import has_escaped_key, may_name
from tidegate.dialects.spec import Dialect, Endpoint
from tidegate.errors import InvalidRequest
from tidegate.spine.detached import wrapped_facts

CHAT = endpoint_of("POST", "/v1/chat/completions", Dialect.OPENAI)
RESPONSES = endpoint_of("POST", "/v1/responses", Dialect.OPENAI)
MESSAGES = endpoint_of("POST", "/v1/messages", Dialect.OPENAI)
GEMINI = "/v1beta/models/m:generateContent"


def wrong(endpoint: Endpoint | None, raw: str) -> InvalidRequest:
    assert endpoint is not None
    with pytest.raises(InvalidRequest) as refused:
        checked(endpoint, raw)
    return refused.value


def checked(endpoint: Endpoint, raw: str) -> None:
    body = orjson.loads(raw)
    DIALECTS[endpoint.dialect].request_facts(endpoint, body)
    check_named_once(raw.encode(), body)


@pytest.mark.parametrize(
    ("field", "twice"),
    [
        ("model", '"model":"x"'),
        ("model", '"Model":"x"'),
        ("model", '"mod\\u0065l":"x"'),
        ("stream", '"stream":false,"stream":true'),
        ("stream", '"stream":true,"str\\u0065am":false'),
        ("stream", '"Stream":true'),
        ("stream", '"\u017ftream":true'),
        ("stream", '"stream":true,"STREAM":false'),
        ("max_tokens", '"max_tokens":5,"max_tokens":50000'),
        ("max_tokens", '"max_tokens":5,"max_to\u212aens":50000'),
        ("max_completion_tokens", '"Max_Completion_Tokens":50000'),
        ("n", '"n":1,"N":100'),
        ("background", '"background":false,"background":false'),
        ("generationConfig", '"generationConfig":{},"generation_config":{}'),
        ("serviceTier", '"service_tier":"priority","serviceTier":"flex"'),
        ("serviceTier", '"serviceTier":"priority","ServiceTier":"flex"'),
        ("speed", '"speed":"fast","speed":"standard"'),
        ("inference_geo", '"inference_geo":"us","Inference_Geo":"global"'),
    ],
)
def test_a_field_that_is_named_twice_or_in_another_case_is_refused(field: str, twice: str) -> None:
    error = wrong(CHAT, f'{{"model":"m","messages":[],{twice}}}')
    assert error.field == field
    assert error.allowed


def test_the_same_names_within_other_fields_are_nobodys_business() -> None:
    raw = (
        '{"model":"m","stream":true,"max_tokens":5,"messages":[{"content":"\\u0073tream\\":"}'
        '],"tools":[{"function":{"parameters":{"properties":{"model":{},"Model":{},"stream":{},'
        '"max_tokens":{"type":"integer"},"n":{},"str\\u0065am":{}}}}}],"metadata":{"n":"1"}}'
    )
    assert CHAT is not None
    checked(CHAT, raw)


@pytest.mark.parametrize("value", ["true", "1", '"true"', '"false"', "{}"])
@pytest.mark.parametrize("name", ["background", "deferred"])
def test_work_that_goes_on_after_its_answer_is_refused_in_every_dialect(
    name: str, value: str
) -> None:
    gemini = endpoint_of("POST", GEMINI, Dialect.GEMINI)
    for endpoint in (CHAT, RESPONSES, MESSAGES, gemini):
        works = {"background": RESPONSES, "deferred": CHAT}
        if endpoint is works[name] and value == "true":
            continue  # a worker sees to it
        error = wrong(endpoint, f'{{"model":"m","input":"x","{name}":{value}}}')
        may_go_on = endpoint is RESPONSES and name == "background"
        assert (error.field, error.allowed) == (name, "true or false" if may_go_on else "false")
        assert ("limit" in error.message) is not may_go_on


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
def test_the_background_of_a_picture_is_no_work(path: str) -> None:
    endpoint = endpoint_of("POST", path, Dialect.OPENAI)
    assert endpoint is not None
    body = {"model": "gpt-image-1", "prompt": "a cat", "background": "transparent"}
    assert not DIALECTS[Dialect.OPENAI].request_facts(endpoint, body).runs_in_background
    assert not wrapped_facts(endpoint, body).runs_in_background
    for wrong_one in ({"background": True}, {"background": "yes"}, {"deferred": "auto"}):
        with pytest.raises(InvalidRequest, match="continues after its answer"):
            DIALECTS[Dialect.OPENAI].request_facts(endpoint, body | wrong_one)


def test_a_deferred_completion_has_no_stream() -> None:
    assert wrong(CHAT, '{"model":"m","deferred":true,"stream":true}').field == "stream"
    assert wrong(CHAT, '{"model":"m","deferred":true,"background":true}').field == "background"


def test_no_job_is_made_in_the_background() -> None:
    assert RESPONSES is not None
    assert CHAT is not None
    with pytest.raises(InvalidRequest, match="continues after its answer"):
        wrapped_facts(CHAT, {"model": "m", "messages": [], "deferred": True})
    with pytest.raises(InvalidRequest, match="continues after its answer"):
        wrapped_facts(RESPONSES, {"model": "m", "input": "x", "background": True})


@pytest.mark.parametrize("value", [False, None])
def test_what_says_that_it_does_not_go_on_is_taken(value: Any) -> None:
    assert RESPONSES is not None
    assert (
        DIALECTS[RESPONSES.dialect]
        .request_facts(RESPONSES, {"model": "m", "input": "x", "background": value})
        .model
        == "m"
    )


@pytest.mark.parametrize(
    ("raw", "has_one"),
    [
        (rb'{"\u006dodel":1}', True),
        (rb'{"x":"\u006d","\\\"a\u0041" :1}', True),
        (rb'{"x":["\u0041:","y"],"z\u0011\u0041":1}', True),
        (rb'{"x":"a\u0041"}', False),
        (rb'{"x":["\u0041:","y"],"z\u0011":1}', False),
        (rb'{"x":"\\u0041","y":2}', False),
        (rb'{"\\u0041":2}', False),
        (rb'{"x":"\u00e4"}', False),
    ],
)
def test_a_name_with_an_escape_is_found_among_texts(raw: bytes, has_one: bool) -> None:
    assert has_escaped_key(raw) is has_one


@pytest.mark.timeout(10)
@pytest.mark.parametrize("text", [rb"\u0041", rb"\u0066ile_id", rb"\u0041\"", rb"\\\u0041"])
def test_a_text_of_escapes_is_read_once(text: bytes) -> None:
    """Each escape was looked at to the end of its text: 48 KB took 3.4 s of the event loop."""
    long = text * (240_000 // len(text))
    for raw in (
        b'{"model":"m","x":"%b"}' % long,
        b'{"model":"m","x":[%b]}' % (b'"%b",' % text * 9),
    ):
        check_named_once(raw, {"model": "m", "x": ""})
        assert not may_name(raw, b"nothing")
