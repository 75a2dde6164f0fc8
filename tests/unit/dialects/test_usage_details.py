"""What providers report beside their tokens, in whole answers and in streams."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest

from tidegate.call import Charge, Usage, UsageDetails, UsageState
from tidegate.dialects import DIALECTS
from tidegate.dialects.spec import Dialect
from tidegate.store.records import charge_columns, details_of, details_row, details_text

OPENAI, ANTHROPIC, GEMINI = Dialect.OPENAI, Dialect.ANTHROPIC, Dialect.GEMINI
Json = dict[str, Any]
CHAT: Json = {"prompt_tokens": 900, "completion_tokens": 90, "total_tokens": 990}
RESPONSE: Json = {"input_tokens": 900, "output_tokens": 90, "total_tokens": 990}
MESSAGE: Json = {"input_tokens": 20, "output_tokens": 9}
CONTENT: Json = {"promptTokenCount": 900, "candidatesTokenCount": 90, "totalTokenCount": 990}
WRITTEN: Json = {
    "cache_creation_input_tokens": 300,
    "cache_creation": {"ephemeral_5m_input_tokens": 100, "ephemeral_1h_input_tokens": 200},
}
OF_EACH = [
    (OPENAI, CHAT | {"prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 300,
                                               "audio_tokens": 50, "video_tokens": 40},
                     "completion_tokens_details": {"audio_tokens": 30, "reasoning_tokens": 2}},
     UsageDetails(cache_write_tokens=300, input_audio_tokens=50, input_video_tokens=40,
                  output_audio_tokens=30)),
    (OPENAI, RESPONSE | {"input_tokens_details": {"image_tokens": 700, "text_tokens": 200},
                         "output_tokens_details": {"image_tokens": 80, "text_tokens": 10}},
     UsageDetails(input_image_tokens=700, output_image_tokens=80)),
    # OpenRouter, xAI by its tools and by sources, Perplexity, Mistral
    (OPENAI, CHAT | {"cost": 0.0133176, "server_tool_use_details": {"web_search_requests": 2}},
     UsageDetails(searches=2, provider_cost_micros=13_318)),
    (OPENAI, CHAT | {"cost": 0}, UsageDetails(provider_cost_micros=0)),
    # OpenRouter's fee, and the cost at the provider whose key is one's own
    (OPENAI, CHAT | {"cost": 0.0001, "is_byok": True,
                     "cost_details": {"upstream_inference_cost": 0.002}},
     UsageDetails(provider_cost_micros=2_100)),
    (OPENAI, CHAT | {"cost": 0.002, "is_byok": False,
                     "cost_details": {"upstream_inference_cost": 0.002}},
     UsageDetails(provider_cost_micros=2_000)),
    (OPENAI, CHAT | {"cost_in_usd_ticks": 6_543_500, "num_sources_used": 3,
                     "server_side_tool_usage_details": {"web_search_calls": 2,
                                                        "x_search_calls": 1}},
     UsageDetails(searches=3, provider_cost_micros=654)),
    (OPENAI, CHAT | {"num_sources_used": 7}, UsageDetails(searches=7)),
    (OPENAI, CHAT | {"num_search_queries": 4, "cost": {"total_cost": 0.00502}},
     UsageDetails(searches=4, provider_cost_micros=5_020)),
    (OPENAI, {"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 60,
              "prompt_audio_seconds": 15},
             UsageDetails(input_audio_tokens=43, input_audio_seconds=15)),
    (ANTHROPIC, MESSAGE | WRITTEN | {"server_tool_use": {"web_search_requests": 3}},
     UsageDetails(cache_write_tokens=300, cache_write_5m_tokens=100, cache_write_1h_tokens=200,
                  searches=3)),
    (GEMINI, CONTENT | {
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 5},
                                {"modality": "AUDIO", "tokenCount": 60},
                                {"modality": 3, "tokenCount": 70}],
        "toolUsePromptTokensDetails": [{"modality": "AUDIO", "tokenCount": 1}],
        "candidatesTokensDetails": [{"modality": "IMAGE", "tokenCount": 80}]},
     UsageDetails(input_audio_tokens=61, input_video_tokens=70, output_image_tokens=80)),
    # What a cache held has one price, whatever it is.
    (GEMINI, CONTENT | {
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 43},
                                {"modality": "VIDEO", "tokenCount": 90},
                                {"modality": "AUDIO", "tokenCount": 160}],
        "cachedContentTokenCount": 239,
        "cacheTokensDetails": [{"modality": "AUDIO", "tokenCount": 118},
                               {"modality": "TEXT", "tokenCount": 31},
                               {"modality": "VIDEO", "tokenCount": 90}]},
     UsageDetails(input_audio_tokens=42)),
]  # fmt: skip
NOTHING = [
    (OPENAI, CHAT | {"prompt_tokens_details": {"audio_tokens": 0, "cached_tokens": 9}}),
    (OPENAI, CHAT | {"cost": None, "num_sources_used": 0}),
    (ANTHROPIC, MESSAGE | {"cache_creation_input_tokens": 0, "server_tool_use": None}),
    (GEMINI, CONTENT | {"promptTokensDetails": [{"modality": "TEXT", "tokenCount": 900}]}),
]


def whole(dialect: Dialect, usage: Json, padding: int = 0) -> bytes:
    place = "usageMetadata" if dialect is GEMINI else "usage"
    return json.dumps({"padding": "x" * padding, place: usage}).encode()


def stream(dialect: Dialect, usage: Json) -> bytes:
    """Its usage where the dialect's streams have it; Anthropic's in two events."""
    events: list[object] = [{"choices": [], "usage": usage}]
    if dialect is GEMINI:
        events = [{"usageMetadata": {"promptTokenCount": 1}}, {"usageMetadata": usage}]
    elif dialect is ANTHROPIC:
        begun = {"type": "message_start", "message": {"usage": usage | {"output_tokens": 1}}}
        later = {"output_tokens": 9, "cache_creation_input_tokens": None}
        events = [begun, {"type": "message_delta", "usage": later}]
    elif "input_tokens" in usage:
        response = {"object": "response", "status": "completed", "usage": usage}
        events = [{"type": "response.completed", "response": response}]
    return b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in events)


@pytest.mark.parametrize(("dialect", "usage", "wanted"), OF_EACH)
def test_each_provider_s_words_are_read(
    dialect: Dialect, usage: Json, wanted: UsageDetails
) -> None:
    assert DIALECTS[dialect].answer_facts(whole(dialect, usage)).usage.details == wanted
    assert DIALECTS[dialect].answer_facts(whole(dialect, usage, 400_000)).usage.details == wanted
    assert DIALECTS[dialect].answer_facts(stream(dialect, usage)).usage.details == wanted


@pytest.mark.parametrize(("dialect", "usage"), NOTHING)
def test_what_is_not_reported_or_none_is_not_there(dialect: Dialect, usage: Json) -> None:
    assert DIALECTS[dialect].answer_facts(whole(dialect, usage)).usage.details is None
    assert DIALECTS[dialect].answer_facts(stream(dialect, usage)).usage.details is None


ABSURD: tuple[Any, ...] = (-1, 10**17, 10**30, 1.5, "5", True, None, [], {}, {"modality": []})


@pytest.mark.parametrize("figure", ABSURD, ids=lambda one: f"{one!r:.20}")
def test_absurd_figures_are_left_out_and_can_be_written(figure: object) -> None:
    inside = {"audio_tokens": figure, "image_tokens": figure, "cache_write_tokens": figure}
    usages: list[tuple[Dialect, dict[str, object]]] = [
        (OPENAI, CHAT | {"prompt_tokens_details": inside, "completion_tokens_details": inside}),
        (OPENAI, CHAT | {"cost_in_usd_ticks": figure, "num_sources_used": figure}),
        (OPENAI, CHAT | {"cost": [figure], "server_tool_use": figure}),
        (ANTHROPIC, MESSAGE | {"cache_creation_input_tokens": figure, "server_tool_use": figure}),
        (ANTHROPIC, MESSAGE | WRITTEN | {"cache_creation": figure}),
        (GEMINI, CONTENT | {"promptTokensDetails": [{"modality": "AUDIO", "tokenCount": figure}]}),
        (GEMINI, CONTENT | {"promptTokensDetails": [{"modality": figure, "tokenCount": 5}]}),
        (GEMINI, CONTENT | {"candidatesTokensDetails": figure}),
    ]
    for dialect, usage in usages:
        for answer in (whole(dialect, usage), stream(dialect, usage)):
            found = DIALECTS[dialect].answer_facts(answer).usage
            written = details_text(found)
            if "cache_creation" in usage:
                assert found.details == UsageDetails(cache_write_tokens=300)
            else:
                assert (found.details, written) == (None, None)


@pytest.mark.parametrize("cost", [-0.1, 1e300, 10**30, "0.1", True, {"total_cost": -1}, {}])
def test_an_absurd_cost_is_none(cost: object) -> None:
    assert DIALECTS[OPENAI].answer_facts(whole(OPENAI, CHAT | {"cost": cost})).usage.details is None
    infinite = whole(OPENAI, CHAT | {"cost": 0}).replace(b'"cost": 0', b'"cost": 1e999')
    assert DIALECTS[OPENAI].answer_facts(infinite).usage.details is None


def test_what_no_column_holds_is_left_out_of_the_record() -> None:
    rows = [{"modality": "AUDIO", "tokenCount": 10**12}] * 60
    usage = (
        DIALECTS[GEMINI].answer_facts(whole(GEMINI, CONTENT | {"promptTokensDetails": rows})).usage
    )
    assert details_row(usage) is None
    assert charge_columns(Charge(UsageState.TOLD, usage))["usage_state"] == "told"


def test_what_an_answer_repeats_or_a_model_writes_is_not_read() -> None:
    forged = {"cost": 5, "prompt_tokens_details": {"audio_tokens": 5}, "num_search_queries": 5}
    text = json.dumps({"usage": CHAT | forged})
    for answer in (
        {"choices": [{"message": {"content": text}}], "usage": CHAT},
        {"metadata": {"usage": forged}, "tools": [{"usage": forged}], "usage": CHAT},
        {"usage_breakdown": {"models": [{"usage": forged}]}, "usage": CHAT},
    ):
        assert DIALECTS[OPENAI].answer_facts(json.dumps(answer).encode()).usage == Usage(
            900, 90, None, None, 990
        )
    args = {"groundingMetadata": {"webSearchQueries": ["x"]}, "usageMetadata": CONTENT}
    part = {"functionCall": {"name": "f", "args": args}}
    said = {"candidates": [{"content": {"parts": [part]}}], "usageMetadata": CONTENT}
    for data in (json.dumps(said), json.dumps([said]), f"data: {json.dumps(said)}\n\n"):
        assert DIALECTS[GEMINI].answer_facts(data.encode()).usage.details is None


def searched(*actions: object) -> dict[str, object]:
    calls = [{"type": "web_search_call", "action": one} for one in actions]
    items = [*calls, {"type": "message", "content": [{"text": '"type":"web_search_call"'}]}]
    return {"object": "response", "status": "completed", "output": items, "usage": RESPONSE}


def test_searches_of_a_response_are_those_it_reports_or_shows() -> None:
    seen = searched({"type": "search"}, {"type": "open_page"}, None, {"type": "search"})
    reported = seen | {"tool_usage": {"web_search": {"num_requests": 5}}}
    for response, count in ((seen, 3), (reported, 5)):
        ended = {"type": "response.completed", "response": response}
        long = response | {"padding": "x" * 400_000}
        answers = (
            *(json.dumps(response), json.dumps(long)),
            f"data: {json.dumps(ended)}\n\ndata: [DONE]\n\n",
        )
        for answer in answers:
            details = DIALECTS[OPENAI].answer_facts(answer.encode()).usage.details
            assert details == UsageDetails(searches=count)
    assert DIALECTS[OPENAI].answer_facts(json.dumps(searched()).encode()).usage.details is None


def grounded(*queries: str) -> dict[str, object]:
    candidate = {"groundingMetadata": {"webSearchQueries": list(queries)}}
    return {"candidates": [candidate], "usageMetadata": CONTENT}


def test_queries_of_gemini_count_once_each_however_often_a_stream_repeats_them() -> None:
    pieces = (grounded("a"), grounded("a", "b", ""), {"candidates": "none"}, grounded())
    streamed = b"".join(b"data: %b\r\n\r\n" % orjson.dumps(one) for one in pieces)
    for answer in (streamed, orjson.dumps(pieces), orjson.dumps(grounded("a", "b"))):
        assert DIALECTS[GEMINI].answer_facts(answer).usage.details == UsageDetails(searches=2)
    assert DIALECTS[GEMINI].answer_facts(
        streamed[: streamed.index(b'"b"')]
    ).usage.details == UsageDetails(searches=1)


def test_the_column_is_read_as_far_as_its_names_are_known() -> None:
    details = UsageDetails(cache_write_tokens=3, searches=1, provider_cost_micros=0)
    written = details_text(Usage(details=details))
    assert details_of(written) == details
    assert details_of('{"searches": 1, "of_a_later_version": 7}') == UsageDetails(searches=1)
    assert details_of(None) is None


@pytest.mark.parametrize(
    ("dialect", "answer", "tier"),
    [
        (OPENAI, {"service_tier": "priority", "usage": CHAT}, "priority"),
        (OPENAI, {"service_tier": "default", "usage": CHAT}, None),
        (OPENAI, {"object": "response", "service_tier": "flex", "usage": RESPONSE}, "flex"),
        # What the client has sent comes back, and is no tier.
        (OPENAI, {"object": "response", "metadata": {"service_tier": "flex"}, "usage": RESPONSE},
         None),
        (OPENAI, {"service_tier": 7, "usage": CHAT}, None),
        (OPENAI, {"service_tier": "x" * 99, "usage": CHAT}, None),
        (ANTHROPIC, {"usage": MESSAGE | {"service_tier": "batch"}}, "batch"),
        (ANTHROPIC, {"usage": MESSAGE | {"service_tier": "standard"}}, None),
        (ANTHROPIC, {"usage": MESSAGE | {"service_tier": "standard", "speed": "fast"}}, "fast"),
        (ANTHROPIC, {"usage": MESSAGE | {"service_tier": "standard", "inference_geo": "us"}}, "us"),
        (ANTHROPIC, {"usage": MESSAGE | {"speed": "fast", "inference_geo": "us"}}, "fast us"),
        (ANTHROPIC, {"usage": MESSAGE | {"inference_geo": "global"}}, None),
        (ANTHROPIC, {"usage": MESSAGE | {"inference_geo": "not_available"}}, None),
        (ANTHROPIC, {"usage": MESSAGE | {"inference_geo": ["us"]}}, None),
        (ANTHROPIC, {"usage": MESSAGE | {"inference_geo": "u" * 99}}, None),
        (GEMINI, {"usageMetadata": CONTENT | {"serviceTier": "FLEX"}}, "flex"),
        (GEMINI, {"usageMetadata": CONTENT | {"trafficType": "ON_DEMAND"}}, None),
        (GEMINI, {"usageMetadata": CONTENT | {"trafficType": "PROVISIONED_THROUGHPUT"}},
         "provisioned"),
    ],
)  # fmt: skip
def test_the_tier_that_served_a_call_is_read(
    dialect: Dialect, answer: Json, tier: str | None
) -> None:
    usage = DIALECTS[dialect].answer_facts(json.dumps(answer).encode()).usage
    assert (None if usage.details is None else usage.details.tier) == tier
    assert usage.input_tokens is not None
    if tier is not None:
        assert details_row(usage) == {"tier": tier}
        assert details_of(details_text(usage)) == usage.details


@pytest.mark.parametrize("length", [300_000, 2_100_000])
def test_the_tier_of_an_answer_that_is_too_long_to_be_parsed_for_all_facts_is_read(
    length: int,
) -> None:
    """Such as one with the probabilities of its tokens: who has asked for `priority` pays it."""
    echo = {"service_tier": "flex"}  # of the client
    chat = {"id": "c", "choices": [{"message": {"content": "a" * length}, "logprobs": echo}]}
    for answer, tier in (
        (chat | {"usage": CHAT, "service_tier": "priority"}, "priority"),
        (chat | {"service_tier": "priority", "usage": CHAT, "metadata": echo}, "priority"),
        (chat | {"usage": CHAT, "metadata": echo}, None),
        (chat | {"service_tier": "default", "usage": CHAT}, None),
    ):
        usage = DIALECTS[OPENAI].answer_facts(json.dumps(answer).encode()).usage
        assert usage.output_tokens == 90
        assert (None if usage.details is None else usage.details.tier) == tier


def test_the_tier_of_a_stream_is_beside_its_usage() -> None:
    chunk = {"service_tier": "default", "choices": [{"delta": {"content": "a"}}]}
    last = {"service_tier": "flex", "choices": [], "usage": CHAT}
    ended = {"type": "response.completed", "response": {
        "object": "response", "status": "completed", "service_tier": "priority",
        "usage": RESPONSE}}  # fmt: skip
    for events, tier in (([chunk, last], "flex"), ([ended], "priority")):
        answer = b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in events)
        details = DIALECTS[OPENAI].answer_facts(answer).usage.details
        assert details is not None
        assert details.tier == tier


def test_searches_of_stored_files_are_counted_call_by_call() -> None:
    items = [{"type": "file_search_call", "queries": ["a", "b"]}, {"type": "file_search_call"}]
    for more, web in (([], None), ([{"type": "web_search_call"}], 1)):
        response = searched() | {"output": [*items, *more]}
        ended = {"type": "response.completed", "response": response}
        long = response | {"padding": "x" * 400_000}
        for answer in (json.dumps(response), json.dumps(long), f"data: {json.dumps(ended)}\n\n"):
            details = DIALECTS[OPENAI].answer_facts(answer.encode()).usage.details
            assert details == UsageDetails(searches=web, file_searches=2)
