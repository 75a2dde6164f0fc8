"""From chunks to events and the meaning of an end, on the SDK's own response type."""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest
from google.genai.types import GenerateContentResponse

from tidegate.call import Answer, Delta, Kind, Media, Picture, Usage, UsageReport
from tidegate.dialects.gemini import usage_of
from tidegate.errors import EmptyAnswer, PromptBlocked, UpstreamGarbled, UpstreamUnavailable
from tidegate.record import CallRecord
from tidegate.spine import batched
from tidegate.upstream.gemini import AnswerReader


def response(*parts: dict[str, Any], **more: Any) -> GenerateContentResponse:
    """A chunk with one candidate; `finish` is its finish reason, `usage` its usage metadata."""
    candidate: dict[str, Any] = {"content": {"parts": list(parts)}}
    if "finish" in more:
        candidate["finish_reason"] = more.pop("finish")
    return GenerateContentResponse.model_validate({"candidates": [candidate], **more})


def picture(data: bytes = b"png", mime_type: str = "image/png", **more: Any) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"inline_data": {"mime_type": mime_type, "data": encoded}, **more}


def test_a_piece_is_in_the_answer_before_its_event_is_given_out() -> None:
    answer = Answer()
    events = AnswerReader(Kind.IMAGE_GENERATION, answer).take(response({"text": "See:"}, picture()))
    assert events == [Delta("See:"), Picture(Media("image/png", b"png"))]
    assert answer.text == ["See:"]
    assert answer.pictures == [Media("image/png", b"png")]


def test_what_is_no_text_or_picture_is_passed_over() -> None:
    parts = (
        {"text": "hm", "thought": True},
        picture(thought=True),
        picture(mime_type="audio/wav"),
        picture(data=b""),
        {"text": ""},
        {"function_call": {"name": "f", "args": {}}},
    )
    assert AnswerReader(Kind.TEXT_ONLY, Answer()).take(response(*parts)) == []


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("image/webp", "image/webp"),
        ("image/JPEG; q=1", "image/jpeg"),
        ("image/svg+xml", "image/svg+xml"),
        ("image/png\r\nset-cookie: a=b", "image/png"),
        ("image/\u65e5\u672c", "image/png"),
        (f"image/{'x' * 5000}", "image/png"),
    ],
)
def test_the_type_of_a_picture_can_be_that_of_a_download(said: str, kind: str) -> None:
    """An upstream states it, and it becomes a header of ours."""
    answer = Answer()
    AnswerReader(Kind.IMAGE_GENERATION, answer).take(response(picture(PNG, said)))
    assert answer.pictures == [Media(kind, PNG)]
    part = {"inlineData": {"mimeType": said, "data": base64.b64encode(PNG).decode()}}
    raw = orjson.dumps({"candidates": [{"content": {"parts": [part]}, "finishReason": "STOP"}]})
    record = CallRecord("job", "default", datetime.now(UTC))
    batched._read_prompt(record, raw, Kind.IMAGE_GENERATION)
    assert record.answer.pictures == answer.pictures


def test_usage_is_reported_when_it_changes_and_unknown_stays_unknown() -> None:
    answer = Answer()
    reading = AnswerReader(Kind.TEXT_ONLY, answer)
    first = response(usage_metadata={"prompt_token_count": 7})
    assert reading.take(first) == [UsageReport(Usage(input_tokens=7))]
    assert reading.take(first) == []
    reading.take(response(usage_metadata={"candidates_token_count": 3}))
    assert answer.usage == Usage(input_tokens=7, output_tokens=3)
    reading.take(response(usage_metadata={"candidates_token_count": -1}))
    assert answer.usage.output_tokens == 3


@pytest.mark.filterwarnings("ignore:NEW")
@pytest.mark.parametrize(
    ("raw", "tokens"),
    [
        (
            {"promptTokenCount": 15, "toolUsePromptTokenCount": 90, "candidatesTokenCount": 3},
            (105, 3),
        ),
        ({"promptTokenCount": 15, "toolUsePromptTokenCount": 90, "totalTokenCount": 108}, (105, 3)),
        ({"promptTokenCount": 5, "thoughtsTokenCount": 20, "totalTokenCount": 25}, (5, 0)),
        ({"promptTokenCount": 10**13, "candidatesTokenCount": 3}, (None, 3)),
        ({"promptTokensDetails": [{"modality": "NEW", "tokenCount": 5}]}, (None, None)),
        ({"promptTokenCount": 5, "trafficType": "ON_DEMAND_PRIORITY"}, (5, None)),
        ({"promptTokenCount": 5, "trafficType": "NEW"}, (5, None)),
    ],
)
def test_usage_is_read_as_the_relay_reads_it(
    raw: dict[str, Any], tokens: tuple[int | None, int | None]
) -> None:
    answer = Answer()
    AnswerReader(Kind.TEXT_ONLY, answer).take(response({"text": "a"}, usageMetadata=raw))
    assert answer.usage == usage_of(raw)
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == tokens


@pytest.mark.parametrize(
    ("kind", "chunks", "error"),
    [
        (Kind.TEXT_ONLY, [response({"text": "a"}, finish="STOP")], None),
        (Kind.TEXT_ONLY, [response({"text": "a"}), response(finish="STOP")], None),
        (Kind.TEXT_ONLY, [response({"text": "a"}, finish="SAFETY")], None),
        (Kind.IMAGE_GENERATION, [response(picture(), finish="STOP")], None),
        (Kind.TEXT_ONLY, [], UpstreamUnavailable),
        (Kind.TEXT_ONLY, [response({"text": "a"})], UpstreamUnavailable),
        (Kind.TEXT_ONLY, [response()], UpstreamUnavailable),
        (Kind.TEXT_ONLY, [response(finish="SAFETY")], EmptyAnswer),
        (Kind.IMAGE_GENERATION, [response({"text": "a"}, finish="NO_IMAGE")], EmptyAnswer),
        (Kind.TEXT_ONLY, [GenerateContentResponse(candidates=[])], EmptyAnswer),
        (Kind.TEXT_ONLY, [GenerateContentResponse()], UpstreamGarbled),
        (Kind.TEXT_ONLY, [GenerateContentResponse(), response({"text": "a"}, finish="STOP")], None),
    ],
)
def test_what_the_end_of_an_answer_means(
    kind: Kind, chunks: list[GenerateContentResponse], error: type[Exception] | None
) -> None:
    reading = AnswerReader(kind, Answer())
    for chunk in chunks:
        reading.take(chunk)
    if error is None:
        reading.finish()
    else:
        with pytest.raises(error):
            reading.finish()


@pytest.mark.filterwarnings("ignore:NEW_RULE")
def test_a_block_reason_counts_only_without_content() -> None:
    blocked = GenerateContentResponse.model_validate(
        {"prompt_feedback": {"block_reason": "NEW_RULE"}}
    )
    answer = Answer()
    reading = AnswerReader(Kind.TEXT_ONLY, answer)
    reading.take(blocked)
    with pytest.raises(PromptBlocked) as raised:
        reading.finish()
    assert raised.value.reason == answer.finish_reason == "NEW_RULE"
    reading.take(response({"text": "after all"}, finish="STOP"))
    reading.finish()
