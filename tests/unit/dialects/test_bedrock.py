"""Bedrock's bodies, answers, framing and refusals."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import orjson
import pytest

from tests.gateway import PNG
from tidegate.call import Kind
from tidegate.dialects import DIALECTS, dialect_of, endpoint_in, native_path
from tidegate.dialects.refusals import (
    error_event_in,
    error_of_refusal_in,
    status_of,
    upstream_error,
)
from tidegate.dialects.spec import Endpoint, Operation
from tidegate.errors import (
    QuotaExceeded,
    UpstreamError,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
    UpstreamUnpaid,
)
from tidegate.record import FRAMED, PieceDecoder, decoded, frame, framed_in, whole_frames

BEDROCK = DIALECTS["bedrock"]
SAY: Any = [{"role": "user", "content": [{"text": "Say hello, all of you"}]}]


def endpoint(path: str) -> Endpoint:
    found, dialect = endpoint_in("POST", path, [(b"anthropic-version", b"2023-06-01")], b"")
    assert found is not None
    assert dialect == "bedrock"
    return found


@pytest.mark.parametrize(
    ("path", "model", "streams"),
    [
        ("/model/amazon.nova-lite-v1:0/converse", "amazon.nova-lite-v1:0", False),
        ("/model/us.meta.llama3-1-8b/converse-stream", "us.meta.llama3-1-8b", True),
        ("/model/m/invoke", "m", False),
        ("/model/m/invoke-with-response-stream", "m", True),
        (
            "/model/arn:aws:bedrock:us-east-1:1:inference-profile/us.m/converse",
            "arn:aws:bedrock:us-east-1:1:inference-profile/us.m",
            False,
        ),
    ],
)
def test_the_model_is_in_the_path(path: str, model: str, streams: bool) -> None:
    found = endpoint(path)
    assert native_path(path) == path
    assert (found.model, found.streams, found.operation) == (model, streams, Operation.INFER)
    assert found.path_for(model) == path.replace(model, model.replace("/", "%2F"))


@pytest.mark.parametrize(
    "path", ["/model/m/async-invoke", "/model//converse", "/model/../x/converse", "/model/m"]
)
def test_what_is_no_call_is_not_relayed(path: str) -> None:
    assert endpoint_in("POST", path, [], b"")[0] is None
    assert dialect_of(path, set(), b"") == "bedrock", "and refused in its words"


def test_converses_files_tools_and_bounds_are_those_of_other_dialects() -> None:
    picture = {"format": "png", "source": {"bytes": b64encode(PNG).decode()}}
    result = {"toolUseId": "1", "content": [{"image": picture}, {"text": "seen"}]}
    body: Any = {
        "messages": [*SAY, {"role": "user", "content": [{"toolResult": result}]}],
        "inferenceConfig": {"maxTokens": 70},
        "additionalModelRequestFields": {"max_tokens": 90},
        "toolConfig": {"tools": [{"toolSpec": {"name": "a", "inputSchema": {"json": {}}}}]},
        "serviceTier": {"type": "priority"},
    }
    asked = BEDROCK.request_facts(endpoint("/model/us.anthropic.claude-x/converse"), body)
    assert (asked.kind, asked.max_output_tokens, asked.tier) == (Kind.MULTI_MODAL, 90, "priority")
    assert asked.pieces.tools
    assert asked.prompt_head == "Say hello, all of you"
    text = BEDROCK.request_facts(endpoint("/model/m/converse"), {"messages": SAY})
    assert (text.kind, text.max_output_tokens) == (Kind.TEXT_ONLY, None)


def test_latency_that_is_optimized_is_a_tier_with_a_price_of_its_own() -> None:
    asked = {"messages": SAY, "performanceConfig": {"latency": "optimized"}}
    where = endpoint("/model/m/converse")
    assert BEDROCK.request_facts(where, asked).tier == "optimized"
    usual = {"messages": SAY, "performanceConfig": {"latency": "standard"}}
    assert BEDROCK.request_facts(where, usual).tier == ""
    counts = {"inputTokens": 3, "outputTokens": 2, "totalTokens": 5}
    for latency, tier in (("optimized", "optimized"), ("standard", None), (7, None)):
        served = {"usage": counts, "performanceConfig": {"latency": latency}}
        for answer in (
            orjson.dumps({"output": {}, "stopReason": "end_turn", **served}),
            b"data: " + orjson.dumps({"metadata": served}) + b"\n\n",
        ):
            details = BEDROCK.answer_facts(answer).usage.details
            assert (details and details.tier) == tier


@pytest.mark.parametrize(
    ("body", "bound"),
    [
        ({"anthropic_version": "x", "max_tokens": 5, "messages": []}, 5),
        ({"prompt": "a", "max_gen_len": 6}, 6),
        ({"inputText": "a", "textGenerationConfig": {"maxTokenCount": 7}}, 7),
        ({"messages": SAY, "inferenceConfig": {"max_new_tokens": 8}}, 8),
        ({"prompt": "a", "max_tokens_to_sample": 9}, 9),
        ({"prompt": "a", "max_tokens": "many"}, None),
    ],
)
def test_a_bound_is_read_where_a_models_maker_has_it(body: Any, bound: int | None) -> None:
    assert BEDROCK.request_facts(endpoint("/model/m/invoke"), body).max_output_tokens == bound


@pytest.mark.parametrize(
    ("answer", "counts", "finish"),
    [
        (
            {
                "output": {"message": {"role": "assistant", "content": [{"text": "a"}]}},
                "stopReason": "end_turn",
                "usage": {
                    "inputTokens": 5,
                    "outputTokens": 7,
                    "cacheReadInputTokens": 100,
                    "cacheWriteInputTokens": 20,
                    "cacheDetails": [{"ttl": "1h", "inputTokens": 20}],
                },
            },
            (125, 7, 100, 20),
            "end_turn",
        ),
        (
            {
                "id": "msg_1",
                "model": "claude-x",
                "stop_reason": "max_tokens",
                "usage": {"input_tokens": 5, "output_tokens": 0},
            },
            (5, 0, None, None),
            "max_tokens",
        ),
        (
            {"generation": "a", "prompt_token_count": 3, "generation_token_count": 4},
            (3, 4, None, None),
            None,
        ),
        (
            {
                "inputTextTokenCount": 3,
                "results": [{"tokenCount": 4, "completionReason": "FINISH"}],
            },
            (3, 4, None, None),
            "FINISH",
        ),
        (
            {
                "choices": [{"finish_reason": "stop"}],
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": 4,
                    "prompt_tokens_details": {"cached_tokens": 6},
                },
            },
            (9, 4, 6, None),
            "stop",
        ),
    ],
)
def test_usage_is_read_in_the_form_of_each_maker(
    answer: Any, counts: tuple[int | None, ...], finish: str | None
) -> None:
    facts = BEDROCK.answer_facts(orjson.dumps(answer))
    used = facts.usage
    written = used.details.cache_write_tokens if used.details else None
    assert (used.input_tokens, used.output_tokens, used.cached_tokens, written) == counts
    assert facts.finish_reason == finish


CLAUDES_USAGE = {
    "input_tokens": 5,
    "cache_creation_input_tokens": 1_000,
    "cache_read_input_tokens": 0,
    "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 1_000},
    "output_tokens": 2,
}


@pytest.mark.parametrize(
    "objects",
    [
        [{"type": "message", "usage": CLAUDES_USAGE}],
        [
            {"type": "message_start", "message": {"usage": CLAUDES_USAGE}},
            {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 2}},
            {
                "type": "message_stop",
                "amazon-bedrock-invocationMetrics": {
                    "inputTokenCount": 5,
                    "outputTokenCount": 2,
                    "cacheWriteInputTokenCount": 1_000,
                },
            },
        ],
    ],
    ids=["whole", "stream"],
)
def test_what_claude_writes_to_a_cache_for_an_hour_is_read_of_invoke_model(objects: Any) -> None:
    answer = b"".join(b"data: %s\n\n" % orjson.dumps(one) for one in objects)
    answer = orjson.dumps(objects[0]) if len(objects) == 1 else answer
    details = BEDROCK.answer_facts(answer).usage.details
    assert details is not None
    assert (details.cache_write_tokens, details.cache_write_1h_tokens) == (1_000, 1_000)


def test_a_time_to_live_that_is_no_text_is_no_fault() -> None:
    usage = {"inputTokens": 5, "cacheWriteInputTokens": 9, "cacheDetails": [{"ttl": [None]}]}
    used = BEDROCK.answer_facts(orjson.dumps({"usage": usage})).usage
    assert used.details is not None
    assert used.details.cache_write_tokens == 9


def test_the_headers_of_an_answer_count_where_it_tells_nothing() -> None:
    assert BEDROCK.usage_in is not None
    told = [
        (b"X-Amzn-Bedrock-Input-Token-Count", b"12"),
        (b"x-amzn-bedrock-output-token-count", b"3"),
    ]
    used = BEDROCK.usage_in(told)
    assert (used.input_tokens, used.output_tokens) == (12, 3)
    assert BEDROCK.usage_in([(b"x-amzn-bedrock-input-token-count", b"many")]).input_tokens is None


def chunk(event: Any) -> bytes:
    data = {"bytes": b64encode(orjson.dumps(event)).decode(), "p": "abc"}
    return frame({":event-type": "chunk", ":message-type": "event"}, orjson.dumps(data))


STREAM = [
    chunk(
        {
            "type": "message_start",
            "message": {"id": "m1", "model": "x", "usage": {"input_tokens": 4}},
        }
    ),
    chunk({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "hello"}}),
    chunk(
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn"},
            "usage": {"output_tokens": 6},
        }
    ),
]


def test_a_stream_is_read_through_its_framing_and_its_checksums() -> None:
    whole = b"".join(STREAM)
    facts = BEDROCK.answer_facts(decoded(whole, FRAMED))
    assert (facts.usage.input_tokens, facts.usage.output_tokens) == (4, 6)
    assert (facts.finish_reason, facts.response_id, facts.model_version) == ("end_turn", "m1", "x")
    in_pieces = PieceDecoder(FRAMED)
    pieces = [whole[place : place + 7] for place in range(0, len(whole), 7)]
    assert b"".join(map(in_pieces.take, pieces)) == decoded(whole, FRAMED)
    assert in_pieces.reads
    # A bit that has flipped in the last message's payload: it is not read, and charged by estimate.
    broken = whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:]
    assert BEDROCK.answer_facts(decoded(broken, FRAMED)).usage.output_tokens is None
    # What was left out in the middle, and half a message, hide nothing of what follows.
    gap = STREAM[0] + STREAM[1][30:] + STREAM[2]
    assert BEDROCK.answer_facts(decoded(gap, FRAMED)).usage.output_tokens == 6
    assert whole_frames(whole) == len(whole)
    assert [BEDROCK.ends_whole(one) for one in (b"", whole, whole[:-1], b"<html>")] == [
        *(True, True, False, False),
    ]
    page = PieceDecoder(FRAMED)
    assert (page.take(b"<html>no framing at all</html>"), page.reads) == (b"", False)


def test_botocore_reads_what_is_framed_here() -> None:
    from botocore.eventstream import EventStreamBuffer

    buffer = EventStreamBuffer()
    buffer.add_data(b"".join([*STREAM, BEDROCK.keep_alive]))
    named = [one.headers[":event-type"] for one in buffer]
    assert named == ["chunk", "chunk", "chunk", "waiting"]
    assert BEDROCK.error_frame is not None
    body = BEDROCK.problem(QuotaExceeded("too many", limit="requests", allowed="1"), 429, None)
    ((headers, payload),) = framed_in(BEDROCK.error_frame(body))
    assert (headers[":exception-type"], headers[":message-type"]) == (
        *("throttlingException", "exception"),
    )
    assert orjson.loads(payload) == {"message": body["message"]}


def test_an_exception_in_a_stream_is_the_refusal_it_would_have_been() -> None:
    data = frame(
        {":exception-type": "throttlingException", ":message-type": "exception"},
        b'{"message": "Too many tokens, please wait"}',
    )
    error = error_event_in(decoded(STREAM[0] + data, FRAMED))
    assert error is not None
    assert (status_of(error), error["__type"]) == (429, "ThrottlingException")


@pytest.mark.parametrize(
    ("status", "name", "message", "kind"),
    [
        (429, "ThrottlingException", "Too many tokens, please wait", UpstreamThrottled),
        (400, "ServiceQuotaExceededException", "Too many requests", UpstreamThrottled),
        (408, "ModelTimeoutException", "it timed out", UpstreamUnavailable),
        (424, "ModelErrorException", "the model failed", UpstreamUnavailable),
        (400, "ValidationException", "malformed", UpstreamRejected),
        (403, "AccessDeniedException", "INVALID_PAYMENT_INSTRUMENT", UpstreamUnpaid),
        (403, "ExpiredTokenException", "it is expired", UpstreamUnauthorized),
        (503, "ServiceUnavailableException", "", UpstreamUnavailable),
    ],
)
def test_refusals_are_classified(
    status: int, name: str, message: str, kind: type[UpstreamError]
) -> None:
    headers = {"x-amzn-errortype": f"{name}:http://internal.amazon.com/coral/"}
    error = error_of_refusal_in(orjson.dumps({"message": message}))
    found = upstream_error(status, error, headers, secret="", dialect="bedrock")
    assert type(found) is kind


@pytest.mark.parametrize(
    ("message", "of_key"),
    [
        ("You don't have access to the model with the specified model ID.", False),
        ("User: arn:aws:iam::1:user/a is not authorized to perform: b on resource: c", False),
        ("Authentication failed: Please make sure your API Key is valid.", True),
    ],
)
def test_a_denied_model_is_not_a_dead_key(message: str, of_key: bool) -> None:
    headers = {"x-amzn-errortype": "AccessDeniedException"}
    error = error_of_refusal_in(orjson.dumps({"Message": message}))
    found = upstream_error(403, error, headers, secret="", dialect="bedrock")
    assert getattr(found, "of_key", False) is of_key


@pytest.mark.parametrize("dialect", ["anthropic", "openai", "bedrock"])
@pytest.mark.parametrize("unit", ["tokens", "requests"])
@pytest.mark.parametrize("per_day", [False, True])
def test_its_words_name_the_unit_in_the_dialects_of_others(
    dialect: str, unit: str, per_day: bool
) -> None:
    day = " per day" if per_day else ""
    said = f"Too many {unit}{day}, please wait before trying again."
    error = {"type": "rate_limit_error", "message": said}
    found = upstream_error(429, error, {}, secret="", dialect=dialect)
    assert isinstance(found, UpstreamThrottled)
    assert (found.unit, found.per_day) == (unit, per_day)


def test_a_day_is_told_from_a_minute() -> None:
    found = upstream_error(
        429,
        {"message": "Too many tokens per day, please wait before trying again."},
        {"x-amzn-errortype": "ThrottlingException"},
        secret="",
        dialect="bedrock",
    )
    assert isinstance(found, UpstreamThrottled)
    assert (found.per_day, found.unit) == (True, "tokens")
