"""A large body read without its files says all that the whole says, and refuses what it refuses."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import orjson
import pytest

from tidegate.dialects import DIALECTS, endpoint_of, parsing, requests
from tidegate.dialects.answers import asking_for_usage
from tidegate.dialects.parsing import LARGE_BYTES, parsed, skimmed
from tidegate.dialects.requests import check_named_once, conversation_of, opening_of
from tidegate.dialects.spec import Dialect, RequestFacts
from tidegate.errors import TidegateError

CHAT = endpoint_of("POST", "/v1/chat/completions", Dialect.OPENAI)
GEMINI = endpoint_of("POST", "/v1beta/models/m:generateContent", Dialect.GEMINI)
MESSAGES = endpoint_of("POST", "/v1/messages", Dialect.ANTHROPIC)
PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (640).to_bytes(4) + (480).to_bytes(4)
DATA = b64encode(PNG + b"x" * LARGE_BYTES).decode()
URL = f"data:image/png;base64,{DATA}"
LONG = "word " * (LARGE_BYTES // 4)


def chat(*content: Any, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": list(content)}], **more}


def of_url(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def gemini(**inline: str) -> dict[str, Any]:
    return {"contents": [{"parts": [{"text": "What?"}, {"inlineData": inline}]}]}


def anthropic(**source: str) -> dict[str, Any]:
    return chat({"type": "image", "source": source}, max_tokens=5)


TEXT = {"type": "text", "text": 'What is "it"?\\'}
WITH_FILES = {
    "a picture": (CHAT, chat(TEXT, of_url(URL), of_url(URL, detail="low"))),
    "a file": (CHAT, chat({"type": "file", "file": {"file_data": URL, "filename": "a.png"}})),
    "inline": (GEMINI, gemini(mimeType="image/png", data=DATA)),
    "a source": (MESSAGES, anthropic(type="base64", media_type="image/png", data=DATA)),
    "no type, so a text": (GEMINI, gemini(data=DATA)),
    "no base64, so a text": (CHAT, chat(of_url("data:" + "x" * 500 + "," + DATA))),
    "a link": (CHAT, chat(of_url("https://example.com/" + DATA))),
    "beside another": (CHAT, chat({"type": "x", "url": URL, "data": DATA})),
}
AS_A_WHOLE = {
    "a text": chat({"type": "text", "text": LONG}),
    "an escape": chat(of_url(URL + '"')),
    "beyond ASCII": chat(of_url(URL + "ä")),
    "a long type": chat(of_url("data:" + "x" * 2000 + ";base64," + DATA)),
    "in a list": chat({"data": [DATA]}),
    "a name": chat({URL: "data"}),
    "small": chat(of_url(URL[:1000])),
}


def asked(endpoint: Any, raw: bytes) -> RequestFacts:
    read = skimmed(raw)
    assert endpoint is not None
    return DIALECTS[endpoint.dialect].request_facts(endpoint, read.body, read.whole)


@pytest.mark.parametrize("name", WITH_FILES)
@pytest.mark.parametrize("indent", [0, orjson.OPT_INDENT_2])
def test_what_is_asked_is_what_the_whole_asks(name: str, indent: int) -> None:
    endpoint, body = WITH_FILES[name]
    raw = orjson.dumps(body, option=indent)
    assert endpoint is not None
    assert len(skimmed(raw).raw) < len(raw)
    assert asked(endpoint, raw) == DIALECTS[endpoint.dialect].request_facts(endpoint, parsed(raw))


@pytest.mark.parametrize("name", AS_A_WHOLE)
def test_a_body_that_does_not_fit_is_read_as_a_whole(name: str) -> None:
    raw = orjson.dumps(AS_A_WHOLE[name])
    read = skimmed(raw)
    assert (read.body, read.whole) == (orjson.loads(raw), {})


def large(text: str) -> bytes:
    return text.replace("@", URL).encode()


HOSTILE = {
    "model twice": '{"model":"a","x":{"url":"@"},"model":"b"}',
    "model twice behind files": '{"x":{"url":"@"},"model":"a","y":{"url":"@"},"model":"b"}',
    "model in another case": '{"model":"a","x":{"url":"@"},"Model":"b"}',
    "model escaped": '{"model":"a","x":{"url":"@"},"mod\\u0065l":"b"}',
    "a quote that is escaped": '{"model":"a","x":{"url":"@"},"t":"\\\\\\"","model":"b"}',
    "names within a text": '{"model":"a","t":"\\"url\\":","x":{"url":"@"},"model":"b"}',
    "work that goes on": '{"model":"a","x":{"url":"@"},"background":true}',
    "no end": '{"model":"a","x":{"url":"@',
    "no comma": '{"model":"a","x":{"url":"@" "y":1}}',
    "no object": '["url":"@"]',
    "a list": '[{"url":"@"}]',
    "NUL": '{"model":"a","x":{"url":"@\0"}}',
    "an end of a line": '{"model":"a","x":{"url":"@\n"}}',
    "no model": '{"x":{"url":"@"}}',
}


def refusal(raw: bytes, *, whole: bool) -> tuple[type[TidegateError], str | None] | None:
    try:
        read = skimmed(raw)
        body, shown = (parsed(raw), raw) if whole else (read.body, read.raw)
        assert CHAT is not None
        DIALECTS[CHAT.dialect].request_facts(CHAT, body, {} if whole else read.whole)
        check_named_once(shown, body)
    except TidegateError as error:
        return type(error), getattr(error, "field", None)
    return None


@pytest.mark.parametrize("name", HOSTILE)
def test_what_the_whole_is_refused_for_is_refused(name: str) -> None:
    raw = large(HOSTILE[name])
    why = refusal(raw, whole=True)
    assert why is not None
    assert refusal(raw, whole=False) == why


def test_nobody_can_write_what_stands_for_a_file() -> None:
    raw = orjson.dumps(chat(of_url(URL)))
    (mark,) = skimmed(raw).whole
    assert len(mark) < len(URL)
    kept = mark.rpartition("~")[0]
    again = orjson.dumps(chat(of_url(URL), {"type": "text", "text": kept}, {"text": f"{kept}~0"}))
    assert CHAT is not None
    assert asked(CHAT, again) == DIALECTS[CHAT.dialect].request_facts(CHAT, parsed(again))


def test_what_goes_on_holds_the_file() -> None:
    raw = orjson.dumps(chat(of_url(URL), stream=True, stream_options={"other": 1}))
    sent = asking_for_usage(raw, skimmed(raw).body)
    assert parsed(sent) == chat(
        of_url(URL), stream=True, stream_options={"other": 1, "include_usage": True}
    )


def test_a_large_file_begins_a_conversation_alike_in_all_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = f"data:image/png;base64,{b64encode(bytes(LARGE_BYTES)).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": picture}}]
    raw = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": parts}]})
    here = skimmed(raw)
    assert here.raw is not raw, "its file is left out"
    opening = opening_of(here.body)
    monkeypatch.setattr(parsing, "_MARK", "f" * 32)
    monkeypatch.setattr(requests, "MARK", b"f" * 32)
    assert skimmed(raw).body != here.body
    assert opening_of(skimmed(raw).body) == opening


@pytest.mark.parametrize("name", ["messages", "input", "contents"])
def test_what_is_nested_too_deeply_begins_no_conversation(name: str) -> None:
    deep = f'{{"{name}":[{"[" * 300}{"]" * 300}]}}'.encode()
    body = orjson.loads(deep)
    assert opening_of(body) == b""
    assert conversation_of(body) is None
    body = {"tools": body[name], "input": "Say hello"}
    assert opening_of(body) == b""
