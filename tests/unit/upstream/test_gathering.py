"""Many events as one, and what is left as it came."""

from __future__ import annotations

import json
from typing import Any

import pytest
from google.genai.types import GenerateContentResponse

from tidegate.call import Answer, Kind, Usage, UsageDetails
from tidegate.upstream.gemini import AnswerReader
from tidegate.upstream.gemini_transport import gathered, whole_events


def stream(*events: Any, end: str = "\n\n") -> bytes:
    return "".join(f"data: {json.dumps(event)}{end}" for event in events).encode()


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"candidates": [{"content": {"role": "model", "parts": [{"text": text}]}, **more}]}


@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_plain_events_become_one_that_says_what_all_have_said(end: str) -> None:
    thought = {"text": "hm", "thought": True}
    came = gathered(
        stream(
            said("Hel", index=0) | {"usageMetadata": {"promptTokenCount": 7}},
            said("lo") | {"modelVersion": "old", "responseId": "one"},
            {"candidates": [{"content": {"role": "model", "parts": [thought]}}]},
            said("!", finishReason="STOP") | {"modelVersion": "new"},
            said("") | {"createTime": "2026-11-24T10:00:00Z"},
            {"usageMetadata": {"candidatesTokenCount": 3, "serviceTier": "standard"}},
            {"usageMetadata": {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": 7}]}},
            end=end,
        )
    )
    assert came is not None
    assert came.startswith(b"data: ")
    assert came.endswith(b"\n\n")
    assert json.loads(came[6:]) == {
        "candidates": [
            {
                "content": {"parts": [{"text": "Hello"}, thought, {"text": "!"}]},
                "finishReason": "STOP",
            }
        ],
        "usageMetadata": {"promptTokenCount": 7, "candidatesTokenCount": 3},
        "modelVersion": "new",
        "responseId": "one",
    }


AUDIO = [{"modality": "TEXT", "tokenCount": 7}, {"modality": "AUDIO", "tokenCount": 93}]
TEXT = [{"modality": "TEXT", "tokenCount": 100}]
IMAGE = [{"modality": "IMAGE", "tokenCount": 1290}]


@pytest.mark.parametrize(
    ("usages", "sum_of_them"),
    [
        (
            [
                {"promptTokensDetails": TEXT},
                {"promptTokensDetails": AUDIO, "candidatesTokensDetails": IMAGE},
            ],
            Usage(details=UsageDetails(input_audio_tokens=93, output_image_tokens=1290)),
        ),
        ([{"promptTokensDetails": AUDIO}, {"promptTokensDetails": TEXT}], Usage()),
        ([{"promptTokensDetails": AUDIO, "cacheTokensDetails": AUDIO}], Usage()),
        (
            [{"promptTokenCount": 7}, {"toolUsePromptTokenCount": 90, "totalTokenCount": 100}],
            Usage(input_tokens=97, output_tokens=3, total_tokens=100),
        ),
    ],
)
def test_it_counts_what_the_events_count(usages: list[dict[str, Any]], sum_of_them: Usage) -> None:
    events = [said("a") | {"usageMetadata": one} for one in usages]
    whole = gathered(stream(*events))
    assert whole is not None
    for chunks in (events, [json.loads(whole[6:])]):
        answer = Answer()
        reading = AnswerReader(Kind.TEXT_ONLY, answer)
        for one in chunks:
            reading.take(GenerateContentResponse.model_validate(one))
        assert answer.usage == sum_of_them


@pytest.mark.parametrize(
    "odd",
    [
        {"error": {"code": 429}},
        {"promptFeedback": {"blockReason": "SAFETY"}},
        {"candidates": []},
        {"candidates": [{}, {}]},
        {"candidates": [7]},
        {"candidates": [{"safetyRatings": []}]},
        {"candidates": [{"finishReason": 5}]},
        {"candidates": [{"finishReason": ""}]},
        {"candidates": [{"index": "0"}]},
        {"candidates": [{"content": {"parts": "text"}}]},
        {"candidates": [{"content": {"parts": ["text"]}}]},
        {"candidates": [{"content": {"role": 1}}]},
        {"candidates": [{"content": {"parts": [{"text": {"deep": 1}}]}}]},
        {"candidates": [{"content": {"parts": [{"text": "x", "thought": "maybe"}]}}]},
        {"candidates": [{"content": {"parts": [{"inlineData": {"data": ""}}]}}]},
        {"candidates": [{"content": None}]},
        {"usageMetadata": {"promptTokenCount": "many"}},
        {"usageMetadata": {"promptTokenCount": True}},
        {"usageMetadata": {"promptTokenCount": -1}},
        {"usageMetadata": {"promptTokenCount": None}},
        {"usageMetadata": 7},
        {"usageMetadata": {"promptTokensDetails": "text"}},
        {"usageMetadata": {"promptTokensDetails": [{"modality": "AUDIO", "deep": 1}]}},
        {"usageMetadata": {"promptTokensDetails": [{"modality": ["AUDIO"]}]}},
        {"usageMetadata": {"promptTokensDetails": [{"tokenCount": "7"}]}},
        {"createTime": 7},
        {"modelVersion": 7},
        {"modelVersion": ""},
        {},
        [],
        None,
        "text",
    ],
)
def test_one_odd_event_leaves_all_as_they_came(odd: object) -> None:
    for events in ((said("a"), odd), (odd, said("a"))):
        assert gathered(stream(*events)) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"data: {}",
        stream(said("one"), said("two"))[:-1],
        stream(said("one"), said("two")) + b"data: {",
        stream(said("one")) + b": a comment\n\n",
        stream(said("one")) + b"event: x\ndata: {}\n\n",
        stream(said("one")) + b"data: {\n\n",
        stream(said("one")) + b'data: {"modelVersion":\ndata: "x"}\n\n',
        stream(said("one")) + b'data: {"usageMetadata": {"x": NaN}}\n\n',
        stream(said("one")) + b"data: " + b"[" * 99_999 + b"\n\n",
        b"<html>no stream</html>\n\n<p>\n\n",
    ],
)
def test_what_is_no_stream_of_events_is_left_as_it_came(raw: bytes) -> None:
    assert gathered(raw) is None


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
@pytest.mark.parametrize("rest", [b"", b"data: {", b"data: {}\n"])
def test_a_stream_that_was_cut_ends_with_its_last_whole_event(end: bytes, rest: bytes) -> None:
    whole = b"data: {}" + end + b"data: []" + end
    assert whole_events(whole + rest) == whole
    assert whole_events(rest) == b""
