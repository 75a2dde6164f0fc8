"""Prompts as calls of OpenAI's and Anthropic's dialect, and what is read of the answers."""

from __future__ import annotations

import json
from base64 import b64encode
from email import message_from_bytes, policy
from typing import Any
from uuid import UUID

import pytest

from tidegate.call import Answer, Call, Delta, Kind, Media, Picture, Tier
from tidegate.dialects.prompts import (
    CallForm,
    PromptAnswer,
    blocked_by,
    prompt_call,
    question_call,
)
from tidegate.dialects.spec import Dialect
from tidegate.errors import EmptyAnswer, PromptBlocked, UpstreamGarbled, UpstreamUnavailable

OPENAI, ANTHROPIC = Dialect.OPENAI, Dialect.ANTHROPIC
WHOLE, STREAM = CallForm(streams=False), CallForm(streams=True)
PNG, PDF = Media("image/png", b"\x89PNG", "a.png"), Media("application/pdf", b"%PDF-", "b.pdf")
WAV, CSV = Media("audio/wav", b"RIFF", "c.wav"), Media("text/csv", b"1,2", "d.csv")


def call(kind: Kind = Kind.TEXT_ONLY, *media: Media, **more: Any) -> Call:
    return Call(UUID(int=1), "Say hello", kind, more.pop("model", "m"), media, **more)


def body_of(dialect: Dialect, made: Call, form: CallForm = WHOLE) -> Any:
    return json.loads(prompt_call(dialect, made, form).body)


def test_a_text_is_the_plain_message_that_every_server_takes() -> None:
    message = {"role": "user", "content": "Say hello"}
    assert body_of(OPENAI, call()) == {"model": "m", "messages": [message]}
    assert body_of(OPENAI, call(), STREAM)["stream_options"] == {"include_usage": True}
    assert "stream_options" not in body_of(OPENAI, call(), CallForm(True, asks_usage=False))
    assert body_of(OPENAI, call(tier=Tier.FLEX))["service_tier"] == "flex"
    blocks = [{"type": "text", "text": "Say hello"}]
    assert body_of(ANTHROPIC, call(), STREAM) == {
        "model": "m",
        "max_tokens": 16_000,
        "messages": [{"role": "user", "content": blocks}],
        "stream": True,
    }
    small = CallForm(streams=False, most_output_tokens=4_096)
    assert body_of(ANTHROPIC, call(), small)["max_tokens"] == 4_096


def test_files_are_parts_of_the_message_before_the_prompt() -> None:
    files = call(Kind.MULTI_MODAL, PNG, PDF, WAV, CSV)
    png, pdf = b64encode(PNG.data).decode(), b64encode(PDF.data).decode()
    (message,) = body_of(OPENAI, files)["messages"]
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}},
        {
            "type": "file",
            "file": {"filename": "b.pdf", "file_data": f"data:application/pdf;base64,{pdf}"},
        },
        {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}},
        {"type": "text", "text": "d.csv:\n\n1,2"},
        {"type": "text", "text": "Say hello"},
    ]
    (message,) = body_of(ANTHROPIC, call(Kind.MULTI_MODAL, PNG, PDF, CSV))["messages"]
    assert message["content"] == [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": png}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": pdf},
            "title": "b.pdf",
        },
        {
            "type": "document",
            "source": {"type": "text", "media_type": "text/plain", "data": "1,2"},
            "title": "d.csv",
        },
        {"type": "text", "text": "Say hello"},
    ]


def test_an_image_is_an_images_call_and_with_files_a_change_of_them() -> None:
    drawn = prompt_call(OPENAI, call(Kind.IMAGE_GENERATION, model="gpt-image-2"), STREAM)
    assert drawn.endpoint.path == "/images/generations"
    assert json.loads(drawn.body) == {"model": "gpt-image-2", "prompt": "Say hello"}
    other = body_of(OPENAI, call(Kind.IMAGE_GENERATION, model="flux"))
    assert other["response_format"] == "b64_json"

    edited = prompt_call(OPENAI, call(Kind.IMAGE_GENERATION, PNG, PNG, model="gpt-image-2"), STREAM)
    assert edited.endpoint.path == "/images/edits"
    head = b"content-type: " + edited.content_type + b"\r\n\r\n"
    form = message_from_bytes(head + edited.body, policy=policy.HTTP)
    parts = [
        (part.get_param("name", header="content-disposition"), part.get_content())
        for part in form.iter_parts()
    ]
    assert parts == [
        ("model", "gpt-image-2"),
        ("prompt", "Say hello"),
        ("image[]", PNG.data),
        ("image[]", PNG.data),
    ]
    assert edited.facts is not None
    assert (edited.facts.kind, edited.facts.images) == (Kind.IMAGE_GENERATION, 1)
    assert sum(edited.facts.pieces.values()) > 100  # the files are in the estimate


@pytest.mark.parametrize("count", [1, 2])
def test_a_change_of_images_is_json_where_a_server_takes_no_form(count: int) -> None:
    asked = call(Kind.IMAGE_GENERATION, *[PNG] * count, model="grok-imagine-image")
    form = CallForm(streams=True, provider="xai")
    made, usual = prompt_call(OPENAI, asked, form), prompt_call(OPENAI, asked, STREAM)
    url = f"data:image/png;base64,{b64encode(PNG.data).decode()}"
    image = {"type": "image_url", "url": url}
    assert json.loads(made.body) == {
        "model": "grok-imagine-image",
        "prompt": "Say hello",
        "response_format": "b64_json",
        **({"image": image} if count == 1 else {"images": [image, image]}),
    }
    assert (made.endpoint, made.content_type) == (usual.endpoint, b"application/json")
    assert made.facts == usual.facts


def test_files_at_mistral_are_parts_of_its_own() -> None:
    form = CallForm(streams=False, provider="mistral")
    (message,) = body_of(OPENAI, call(Kind.MULTI_MODAL, PNG, PDF, WAV, CSV), form)["messages"]
    pdf = f"data:application/pdf;base64,{b64encode(PDF.data).decode()}"
    assert message["content"][1:3] == [
        {"type": "document_url", "document_url": pdf, "document_name": "b.pdf"},
        {"type": "input_audio", "input_audio": "UklGRg=="},
    ]
    (usual,) = body_of(OPENAI, call(Kind.MULTI_MODAL, PNG, CSV))["messages"]
    assert [message["content"][0], *message["content"][3:]] == usual["content"]


def test_images_are_requested_as_their_provider_has_it() -> None:
    drawn = call(Kind.IMAGE_GENERATION, model="flux")
    together = CallForm(streams=False, provider="together")
    assert body_of(OPENAI, drawn, together)["response_format"] == "base64"
    form = CallForm(streams=True, provider="openrouter")
    made = prompt_call(OPENAI, drawn, form)
    assert made.endpoint.path == "/images"
    assert json.loads(made.body) == {"model": "flux", "prompt": "Say hello"}
    changed = body_of(OPENAI, call(Kind.IMAGE_GENERATION, PNG, model="flux"), form)
    url = f"data:image/png;base64,{b64encode(PNG.data).decode()}"
    assert changed["input_references"] == [{"type": "image_url", "image_url": {"url": url}}]


def test_a_prompt_can_neither_end_its_part_of_a_form_nor_write_another() -> None:
    text = '"\r\n--x\r\nContent-Disposition: form-data; name="n"\r\n\r\n9'
    sly = Call(UUID(int=1), text, Kind.IMAGE_GENERATION, "gpt-image-2", (PNG,))
    made = prompt_call(OPENAI, sly, WHOLE)
    head = b"content-type: " + made.content_type + b"\r\n\r\n"
    form = message_from_bytes(head + made.body, policy=policy.HTTP)
    names = [part.get_param("name", header="content-disposition") for part in form.iter_parts()]
    assert names == ["model", "prompt", "image"]


def test_the_classifiers_question_has_the_schema_of_its_dialect() -> None:
    asked = json.loads(question_call(OPENAI, call(), ["image/png"], WHOLE).body)
    schema = asked["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["kind"]["enum"] == ["multi_modal", "image_generation"]
    assert "max_tokens" in asked
    own = json.loads(question_call(OPENAI, call(), [], CallForm(streams=False, own=True)).body)
    assert own["max_completion_tokens"] == 2_048
    asked = json.loads(question_call(ANTHROPIC, call(), [], WHOLE).body)
    assert asked["output_config"]["format"]["schema"] == {
        **schema,
        "properties": {
            **schema["properties"],
            "kind": {"type": "string", "enum": ["text_only", "image_generation"]},
        },
    }
    assert json.loads(asked["messages"][0]["content"][1]["text"]) == {"request": "Say hello"}


def events(*values: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % json.dumps(value).encode() for value in values)


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


CHAT = events(chunk(content="Hel"), chunk(content="lo"), chunk("stop"), {"choices": []})
CLAUDE = b"event: x\n" + events(
    {"type": "message_start", "message": {"content": []}},
    {"type": "content_block_start", "content_block": {"type": "thinking", "thinking": "hm"}},
    {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm"}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello"}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}},
    {"type": "message_stop"},
)


def read(
    dialect: Dialect, data: bytes, kind: Kind = Kind.TEXT_ONLY, *, streams: bool, step: int = 7
) -> tuple[Answer, list[Any]]:
    answer = Answer()
    reading = PromptAnswer(dialect, kind, answer, streams=streams)
    found: list[Any] = []
    for place in range(0, len(data), step):
        found += reading.take(data[place : place + step])
    return answer, found + reading.finish()


@pytest.mark.parametrize("step", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("dialect", "data", "finish"), [(OPENAI, CHAT, "stop"), (ANTHROPIC, CLAUDE, "end_turn")]
)
def test_a_stream_is_read_as_it_comes(
    dialect: Dialect, data: bytes, finish: str, step: int
) -> None:
    answer, found = read(dialect, data, streams=True, step=step)
    assert "".join(one.text for one in found if isinstance(one, Delta)) == "Hello"
    assert (answer.whole_text, answer.finish_reason) == ("Hello", finish)


def test_a_whole_answer_is_read_at_its_end() -> None:
    said = {"message": {"content": "Hello"}, "finish_reason": "stop"}
    answer, found = read(OPENAI, json.dumps({"choices": [said]}).encode(), streams=False)
    assert (found, answer.finish_reason) == ([Delta("Hello")], "stop")
    _, unstreamed = read(OPENAI, json.dumps({"choices": [said]}).encode(), streams=True)
    assert unstreamed == found  # of a server that knows no streams
    message = {
        "type": "message",
        "content": [{"type": "thinking", "thinking": "no"}, {"type": "text", "text": "Hello"}],
        "stop_reason": "end_turn",
    }
    answer, found = read(ANTHROPIC, json.dumps(message).encode(), streams=False)
    assert (found, answer.finish_reason) == ([Delta("Hello")], "end_turn")
    drawn, kind = b64encode(b"\xff\xd8\xffjpeg").decode(), Kind.IMAGE_GENERATION
    for text in (drawn, f"data:image/jpeg;base64,{drawn}"):
        given = json.dumps({"data": [{"b64_json": text}]}).encode()
        _, found = read(OPENAI, given, kind, streams=False)
        assert found == [Picture(Media("image/jpeg", b"\xff\xd8\xffjpeg"))]


@pytest.mark.parametrize("streams", [True, False])
def test_an_answer_that_has_both_a_message_and_a_delta_is_read_once(streams: bool) -> None:
    """As Perplexity's: in a stream the message is all that has come so far."""

    def both(text: str, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        said = {"role": "assistant", "content": text}
        return {"choices": [{"message": said, "delta": delta, "finish_reason": finish}]}

    whole = both("Hello", {"role": "assistant", "content": ""}, "stop")
    streamed = both("Hel", {"content": "Hel"}), both("Hello", {"content": "lo"}), both("Hello", {})
    data = events(*streamed, whole) if streams else json.dumps(whole).encode()
    answer, _ = read(OPENAI, data, streams=streams)
    assert (answer.whole_text, answer.finish_reason) == ("Hello", "stop")


@pytest.mark.parametrize("cut", [CHAT[:60], CLAUDE[: CLAUDE.index(b"message_delta")], b""])
def test_a_stream_without_its_end_is_no_answer(cut: bytes) -> None:
    dialect = OPENAI if CHAT.startswith(cut) else ANTHROPIC
    with pytest.raises(UpstreamUnavailable, match="cut off"):
        read(dialect, cut, streams=True)


@pytest.mark.parametrize(
    ("dialect", "data", "reason"),
    [
        (OPENAI, events(chunk(refusal="I can't"), chunk("stop")), "refusal"),
        (OPENAI, events(chunk("content_filter")), "content_filter"),
        (
            ANTHROPIC,
            events({"type": "message_delta", "delta": {"stop_reason": "refusal"}}),
            "refusal",
        ),
    ],
)
def test_a_refusal_instead_of_an_answer_blocks_the_prompt(
    dialect: Dialect, data: bytes, reason: str
) -> None:
    with pytest.raises(PromptBlocked) as blocked:
        read(dialect, data, streams=True)
    assert blocked.value.reason == reason


def test_what_is_no_answer_is_told_apart() -> None:
    with pytest.raises(EmptyAnswer, match="no content"):
        read(OPENAI, events(chunk("length")), streams=True)
    with pytest.raises(EmptyAnswer, match="no picture"):
        read(OPENAI, b'{"data": [{"url": "https://x"}]}', Kind.IMAGE_GENERATION, streams=False)
    for garbage in (b"<html>", b'{"ok": true}', b"[1]"):
        with pytest.raises(UpstreamGarbled):
            read(OPENAI, garbage, streams=False)


GUIDELINES = "Content violates usage guidelines."
FAILED_CHECK = f"{GUIDELINES} Team: t, API key ID: k, Failed check: SAFETY_CHECK_TYPE_BIO"


@pytest.mark.parametrize(
    ("status", "error", "reason"),
    [
        (400, {"code": "moderation_blocked"}, "moderation_blocked"),
        (400, {"code": "content_filter"}, "content_filter"),
        (400, {"code": "invalid_prompt", "type": "invalid_request_error"}, "invalid_prompt"),
        (
            *(400, {"message": "Output blocked by content filtering policy"}),
            "content filtering policy",
        ),
        (403, {"message": FAILED_CHECK}, "SAFETY_CHECK_TYPE_BIO"),
        (400, {"message": GUIDELINES}, "usage guidelines"),
        (403, {"code": 403, "metadata": {"flagged_input": "x", "reasons": ["y"]}}, "moderation"),
        (400, {"code": "invalid_value"}, None),
        (400, {"message": f"unknown role: {FAILED_CHECK}"}, None),
        (403, {"code": 403, "message": "no", "metadata": {}}, None),
        (500, {"code": "content_filter"}, None),
        (400, {}, None),
    ],
)
def test_a_refusal_by_a_filter_is_of_the_prompt(
    status: int, error: dict[str, Any], reason: str | None
) -> None:
    found = blocked_by(status, error)
    assert (None if found is None else found.reason) == reason
