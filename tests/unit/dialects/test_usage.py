"""Usage as it is told, in whole answers and at the end of streams."""

from __future__ import annotations

import json

import orjson
import pytest

from tidegate.admission.charges import charge_of
from tidegate.call import Usage, UsageDetails, UsageState
from tidegate.dialects import DIALECTS
from tidegate.dialects.answers import visible_output
from tidegate.dialects.spec import Dialect
from tidegate.prices.rates import Price, Rates
from tidegate.record import TAIL_BYTES

CHAT = {
    "id": "chatcmpl-1",
    "choices": [{"message": {"content": 'he said "usage": {"prompt_tokens": 9}'}}],
    "usage": {
        "prompt_tokens": 12,
        "completion_tokens": 30,
        "total_tokens": 42,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 10},
    },
}


def told(dialect: Dialect, *events: object) -> Usage:
    data = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in events)
    return DIALECTS[dialect].answer_facts(data).usage


def test_chat_completions() -> None:
    found = DIALECTS[Dialect.OPENAI].answer_facts(json.dumps(CHAT).encode())
    assert found.usage == Usage(12, 20, 10, 4, 42)
    assert found.response_id == "chatcmpl-1"


def test_the_last_word_of_a_stream_counts() -> None:
    first = {"usage": None, "choices": [{"delta": {"content": "x"}}]}
    partial = {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 1}}
    whole = {"usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 9}}
    assert told(Dialect.OPENAI, first, CHAT).output_tokens == 20
    assert told(Dialect.GEMINI, partial, whole).output_tokens == 9


def test_the_last_finish_reason_of_a_stream_counts() -> None:
    def chunk(content: str, reason: str | None) -> bytes:
        event = {"choices": [{"delta": {"content": content}, "finish_reason": reason}]}
        return b"data: %b\n\n" % orjson.dumps(event)

    quoted = chunk('he said "finish_reason": "none"', None)
    stream = chunk("a", "length") + quoted + chunk("b", "stop") + chunk("c", None) + quoted
    read = DIALECTS[Dialect.OPENAI].answer_facts
    assert read(stream).finish_reason == "stop"
    assert read(quoted * 3).finish_reason is None
    assert read(stream + b'data: {"finish_reason" : "late"').finish_reason == "late"
    assert read(stream + b"data: " + b"x" * TAIL_BYTES).finish_reason is None


def test_responses_and_embeddings() -> None:
    usage = {"input_tokens": 3, "output_tokens": 5, "total_tokens": 8}
    assert told(Dialect.OPENAI, {"response": {"usage": usage}}) == Usage(3, 5, None, None, 8)
    assert told(Dialect.OPENAI, {"usage": {"prompt_tokens": 7, "total_tokens": 7}}) == Usage(
        7, 0, None, None, 7
    )


def test_gemini_leaves_out_what_is_none() -> None:
    assert told(Dialect.GEMINI, {"usageMetadata": {"promptTokenCount": 5, "totalTokenCount": 5}})
    usage = {"promptTokenCount": 5, "totalTokenCount": 25, "thoughtsTokenCount": 8}
    assert told(Dialect.GEMINI, {"usageMetadata": usage}) == Usage(5, 12, 8, None, 25)


def test_anthropic_tells_input_first_and_output_last() -> None:
    begin = {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 10}}}
    cached = {"usage": {"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 4}}
    assert told(Dialect.ANTHROPIC, begin, {"usage": {"output_tokens": 4}}) == Usage(
        10, 4, None, None, 14
    )
    assert told(Dialect.ANTHROPIC, cached) == Usage(100, 4, None, 90, 104)
    thought = {"usage": {"output_tokens": 4, "output_tokens_details": {"thinking_tokens": 3}}}
    assert told(Dialect.ANTHROPIC, begin, thought) == Usage(10, 1, 3, None, 14)
    nothing = {"usage": {"input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 4}}
    assert told(Dialect.ANTHROPIC, begin, nothing) == Usage(10, 4, None, None, 14)


@pytest.mark.parametrize("dialect", [Dialect.ANTHROPIC, Dialect.BEDROCK])
@pytest.mark.parametrize("last", [{}, {"usage": None}, {"usage": {"output_tokens": None}}])
def test_the_output_with_which_a_message_begins_is_not_that_of_a_whole_one(
    dialect: Dialect, last: dict[str, object]
) -> None:
    usage = {"input_tokens": 10, "output_tokens": 1}
    begin = {"type": "message_start", "message": {"id": "msg_1", "usage": usage}}
    data = b"".join(b"data: %b\n\n" % json.dumps(event).encode() for event in (begin, last))
    read = DIALECTS[dialect].answer_facts
    assert (read(data).usage.input_tokens, read(data).usage.output_tokens) == (10, None)
    assert read(data, cut=True).usage.output_tokens == 1


ROUNDS = [
    {"type": "compaction", "input_tokens": 700, "output_tokens": 50},
    {"type": "message", "input_tokens": 30, "output_tokens": 8},
    {
        "type": "advisor_message",
        "model": "claude-opus-5-5",
        "input_tokens": 40,
        "output_tokens": 6,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 9,
        "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 9},
    },
    {"type": ["odd"], "input_tokens": 1_000},
]


def test_anthropic_s_compactions_and_advisor_count_beside_the_answer() -> None:
    begin = {"type": "message_start", "message": {"id": "msg_1", "usage": {"input_tokens": 30}}}
    counted = {"input_tokens": 30, "output_tokens": 8, "cache_read_input_tokens": 5}
    wanted = Usage(804, 64, None, 25, 868, UsageDetails(9, None, 9))
    end = {"type": "message_delta", "usage": counted | {"iterations": ROUNDS}}
    assert told(Dialect.ANTHROPIC, begin, end) == wanted
    whole = json.dumps({"type": "message", "usage": end["usage"]}).encode()
    assert DIALECTS[Dialect.ANTHROPIC].answer_facts(whole).usage == wanted
    assert DIALECTS["bedrock"].answer_facts(whole).usage == wanted
    # A refused model's round before that of its fallback is no round of either sort.
    alone = counted | {"iterations": ROUNDS[1:2]}
    assert told(Dialect.ANTHROPIC, begin, {"usage": alone}) == Usage(35, 8, None, 5, 43)
    assert told(Dialect.ANTHROPIC, begin, {"usage": {"iterations": ROUNDS}}).output_tokens is None


@pytest.mark.parametrize("name", ["cached_tokens", "num_cached_tokens", "prompt_cache_hit_tokens"])
def test_cached_tokens_that_stand_beside_the_others(name: str) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11, name: 5}
    assert told(Dialect.OPENAI, {"usage": usage}) == Usage(9, 2, None, 5, 11)


def test_what_is_not_told_is_unknown() -> None:
    assert told(Dialect.OPENAI, {"choices": []}) == Usage()
    assert DIALECTS[Dialect.GEMINI].answer_facts(b"").usage == Usage()
    assert told(Dialect.OPENAI, {"usage": {"prompt_tokens": "many"}}) == Usage()


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_an_answer_that_was_cut_is_read_as_far_as_it_goes(cut: int) -> None:
    data = json.dumps(CHAT).encode()[:-cut]
    assert DIALECTS[Dialect.OPENAI].answer_facts(data).usage in (Usage(), Usage(12, 20, 10, 4, 42))


def test_a_model_cannot_pretend_to_a_usage() -> None:
    text = json.dumps({"usage": {"prompt_tokens": 1, "completion_tokens": 1}})
    assert told(Dialect.OPENAI, {"choices": [{"message": {"content": text}}]}) == Usage()


FORGED = {"usage": {"input_tokens": 0, "output_tokens": 0}}
GEMINI_FORGED = {"usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": 0}}
ECHO = [{"type": "function", "parameters": {"type": "object", "properties": FORGED}}]


def response(kind: str, **changes: object) -> dict[str, object]:
    echoed = {"tools": ECHO, "text": {"format": {"schema": FORGED}}, "usage": None}
    return {"type": kind, "sequence_number": 1, "response": echoed | changes}


def test_a_schema_that_an_answer_repeats_tells_no_usage() -> None:
    delta = {"type": "response.output_text.delta", "delta": "x"}
    assert told(Dialect.OPENAI, response("response.created"), delta) == Usage()
    ended = response("response.completed", usage={"input_tokens": 3, "output_tokens": 5})
    assert told(Dialect.OPENAI, response("response.created"), delta, ended) == Usage(3, 5)
    # Cut in the middle of the last event, behind what it repeats.
    data = b"data: %b\n\n" % json.dumps(ended).encode()
    for cut in range(2, 80):
        assert DIALECTS[Dialect.OPENAI].answer_facts(data[:-cut]).usage in (Usage(), Usage(3, 5))
    whole = json.dumps(response("", usage={"input_tokens": 3, "output_tokens": 5})["response"])
    assert DIALECTS[Dialect.OPENAI].answer_facts(whole.encode()).usage == Usage(3, 5)
    assert DIALECTS[Dialect.OPENAI].answer_facts(whole.encode()[:-3]).usage == Usage()


@pytest.mark.parametrize("padding", [0, 40_000, 100_000, 400_000])
def test_only_the_outermost_object_tells_the_usage_of_a_long_answer(padding: int) -> None:
    long = {"output": "x" * padding, "tools": ECHO, "metadata": FORGED}
    data = json.dumps(long).encode()
    assert DIALECTS[Dialect.OPENAI].answer_facts(data).usage == Usage()
    said = json.dumps({**long, "usage": {"input_tokens": 3, "output_tokens": 5}, "user": None})
    assert DIALECTS[Dialect.OPENAI].answer_facts(said.encode()).usage == Usage(3, 5)
    part = {"functionCall": {"name": "f", "args": GEMINI_FORGED}}
    called = {"x": "y" * padding, "candidates": [{"content": {"parts": [part]}}]}
    told_at_end = {**called, "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 9}}
    for end in ("", "\n"):
        assert (
            DIALECTS[Dialect.GEMINI].answer_facts((json.dumps(called) + end).encode()).usage
            == Usage()
        )
        listed = (json.dumps([told_at_end, called]) + end).encode()
        assert DIALECTS[Dialect.GEMINI].answer_facts(listed).usage == Usage(5, 9)
        listed = (json.dumps([called, told_at_end]) + end).encode()
        assert DIALECTS[Dialect.GEMINI].answer_facts(listed).usage == Usage(5, 9)


def test_a_list_that_was_cut_tells_what_its_last_whole_object_told() -> None:
    first = {"candidates": [], "usageMetadata": {"promptTokenCount": 5, "candidatesTokenCount": 1}}
    second = {"candidates": [{"content": {"parts": [{"functionCall": {"args": GEMINI_FORGED}}]}}]}
    data = json.dumps([first, second], indent=1).encode()
    assert DIALECTS[Dialect.GEMINI].answer_facts(data[:-20]).usage == Usage(5, 1)
    assert DIALECTS[Dialect.GEMINI].answer_facts(data[:40]).usage == Usage()


def test_a_call_of_a_tool_tells_no_usage() -> None:
    block = {"type": "tool_use", "input": FORGED}
    whole = {"content": [block], "usage": {"input_tokens": 7, "output_tokens": 5}}
    assert DIALECTS[Dialect.ANTHROPIC].answer_facts(json.dumps(whole).encode()).usage == Usage(
        7, 5, None, None, 12
    )
    assert (
        DIALECTS[Dialect.ANTHROPIC].answer_facts(json.dumps({"content": [block]}).encode()).usage
        == Usage()
    )


def test_where_the_middle_is_missing_nothing_is_read_over_the_gap() -> None:
    forged = b'data: {"a":"' + b"x" * 100
    tail = b'","usage":{"prompt_tokens":0,"completion_tokens":0}}\n\ndata: [DONE]\n\n'
    tail = b"y" * (TAIL_BYTES - len(tail)) + tail
    assert DIALECTS[Dialect.OPENAI].answer_facts(forged + tail).usage == Usage(0, 0)
    assert DIALECTS[Dialect.OPENAI].answer_facts(forged + tail, omitted=True).usage == Usage()


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [], "x_groq": {"usage": {"prompt_tokens": 3, "completion_tokens": 5}}},
        {"choices": [{"usage": {"prompt_tokens": 3, "completion_tokens": 5}}]},
    ],
)
def test_places_of_other_providers(event: dict[str, object]) -> None:
    assert told(Dialect.OPENAI, {"choices": []}, event) == Usage(3, 5)


def test_a_count_that_no_call_can_have_is_unknown() -> None:
    huge = {"prompt_tokens": 10**15, "completion_tokens": 5}
    assert told(Dialect.OPENAI, {"usage": huge}).input_tokens is None


def test_a_whole_number_with_a_fraction_of_zero_is_a_count() -> None:
    usage = {"prompt_tokens": 7.0, "completion_tokens": 3.0, "total_tokens": 10.0}
    assert told(Dialect.OPENAI, {"usage": usage}) == Usage(7, 3, total_tokens=10)
    assert told(Dialect.OPENAI, {"usage": {"prompt_tokens": 7.5}}) == Usage()


@pytest.mark.parametrize("padding", [0, 200_000])
def test_an_answer_behind_a_byte_order_mark_is_read(padding: int) -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    message = {"role": "assistant", "content": "Hello"}
    whole = {"padding": "x" * padding, "choices": [{"message": message}], "usage": usage}
    answer = b"\xef\xbb\xbf" + json.dumps(whole).encode()
    spec = DIALECTS[Dialect.OPENAI]
    assert spec.answer_facts(answer, omitted=False, cut=False).usage == Usage(7, 3, total_tokens=10)
    assert visible_output(spec, answer, len(answer)).tokens < 10


def test_pictures() -> None:
    two = {"data": [{"b64_json": "A"}, {"b64_json": "B"}]}
    assert DIALECTS[Dialect.OPENAI].image_count(json.dumps(two).encode()) == 2
    one = {"candidates": [{"content": {"parts": [{"inlineData": {"data": "A"}}]}}]}
    assert DIALECTS[Dialect.GEMINI].image_count(json.dumps(one).encode()) == 1


ECHOED = (
    b'{"tools": [{"parameters": {"usage": {"input_tokens": 0, "output_tokens": 0}}}], "usage": {}}'
)
CALLING = (
    b'[{"candidates": [{"content": {"parts": [{"functionCall": {"args": {"a": ['
    b'{"usageMetadata": {"promptTokenCount": 0, "candidatesTokenCount": 0}}]}}}]}}]}]'
)


@pytest.mark.parametrize(
    ("dialect", "answer"), [(Dialect.OPENAI, ECHOED), (Dialect.GEMINI, CALLING)]
)
@pytest.mark.parametrize("before", [b"", b" " * 40_000])
def test_an_answer_that_is_cut_behind_an_object_within_it_tells_no_usage(
    dialect: Dialect, answer: bytes, before: bytes
) -> None:
    for end in range(1, len(answer)):
        found = DIALECTS[dialect].answer_facts(answer[:1] + before + answer[1:end], cut=True)
        assert found.usage == Usage(), answer[:end]


@pytest.mark.parametrize(
    ("usage", "wanted"),
    [
        # xAI tells of an output without the thoughts, ...
        (
            {"prompt_tokens": 12, "completion_tokens": 2, "total_tokens": 354,
             "completion_tokens_details": {"reasoning_tokens": 340}},
            Usage(12, 2, 340, None, 354),
        ),
        # ... Gemini in OpenAI's dialect of none but in the total, ...
        ({"prompt_tokens": 35, "completion_tokens": 12, "total_tokens": 109},
         Usage(35, 12, 62, None, 109)),
        # ... and Mistral of no sound but there.
        ({"prompt_tokens": 9, "completion_tokens": 248, "total_tokens": 632,
          "prompt_audio_seconds": 15},
         Usage(384, 248, None, None, 632, UsageDetails(
             input_audio_tokens=375, input_audio_seconds=15))),
        ({"prompt_tokens": 9, "completion_tokens": 8, "total_tokens": 3},
         Usage(9, 8, None, None, 3)),
        ({"prompt_tokens": 9, "total_tokens": 9}, Usage(9, 0, None, None, 9)),
    ],
)  # fmt: skip
def test_a_usage_that_does_not_add_up_is_settled_by_its_total(
    usage: dict[str, object], wanted: Usage
) -> None:
    assert told(Dialect.OPENAI, {"choices": [], "usage": usage}) == wanted
    assert (
        DIALECTS[Dialect.OPENAI].answer_facts(json.dumps({"usage": usage}).encode()).usage == wanted
    )


def test_pictures_that_a_response_made_by_a_tool_count_once_each() -> None:
    def made(number: int, result: str | None) -> dict[str, object]:
        call = {"id": f"ig_{number}", "type": "image_generation_call", "status": "completed"}
        return call | {"result": result}

    whole = {"output": [made(1, "AAAA"), made(2, "BBBB"), made(3, None)]}
    assert DIALECTS[Dialect.OPENAI].image_count(json.dumps(whole).encode()) == 2
    events = [
        {"type": "response.output_item.added", "item": made(1, None)},
        {"type": "response.output_item.done", "item": made(1, "AAAA")},
        {"type": "response.completed", "response": {"output": [made(1, "AAAA")]}},
    ]
    data = b"".join(b"data: %b\n\n" % json.dumps(one).encode() for one in events)
    assert DIALECTS[Dialect.OPENAI].image_count(data) == 1
    text = {"output": [{"text": json.dumps(made(1, "AAAA"))}]}
    assert DIALECTS[Dialect.OPENAI].image_count(json.dumps(text).encode()) == 0


@pytest.mark.parametrize(
    ("answer", "usage"),
    [
        ({"text": "a", "usage": {"type": "duration", "seconds": 7}},
         Usage(details=UsageDetails(input_audio_seconds=7))),
        ({"text": "a", "usage": {"type": "duration", "seconds": 7.2}},
         Usage(details=UsageDetails(input_audio_seconds=8))),
        ({"text": "a", "duration": 2.5, "segments": []},
         Usage(details=UsageDetails(input_audio_seconds=3))),
        ({"text": "a", "usage": {"type": "tokens", "input_tokens": 30, "output_tokens": 5,
          "total_tokens": 35, "input_token_details": {"text_tokens": 10, "audio_tokens": 20}}},
         Usage(30, 5, None, None, 35, UsageDetails(input_audio_tokens=20))),
        ({"text": "a", "usage": {"prompt_audio_seconds": 36, "prompt_tokens": 13,
          "completion_tokens": 151, "total_tokens": 164}},
         Usage(13, 151, None, None, 164, UsageDetails(input_audio_seconds=36))),
        # ranks: all is input; Cohere's searches
        ({"results": [], "usage": {"total_tokens": 17}}, Usage(17, 0, total_tokens=17)),
        ({"results": [], "usage": {"prompt_tokens": 17}}, Usage(17, 0)),
        ({"results": [], "meta": {"billed_units": {"search_units": 2}}},
         Usage(details=UsageDetails(searches=2))),
        # what is none
        ({"text": "a", "usage": {"type": "duration", "seconds": "7"}}, Usage()),
        ({"text": "a", "usage": {"type": "duration", "seconds": -1}}, Usage()),
        ({"text": "a", "usage": {"type": "duration", "seconds": 1e300}}, Usage()),
        ({"object": "chat.completion", "text": "a", "duration": 9, "choices": []}, Usage()),
    ],
)  # fmt: skip
def test_seconds_searches_and_ranks(answer: dict[str, object], usage: Usage) -> None:
    assert DIALECTS[Dialect.OPENAI].answer_facts(orjson.dumps(answer)).usage == usage


@pytest.mark.parametrize("vectors", [1, 60_000])
def test_embeddings_that_report_their_total_alone_are_input(vectors: int) -> None:
    made = {"object": "embedding", "index": 0, "embedding": [0.25, -0.5] * vectors}
    answer = {"object": "list", "data": [made], "model": "m", "usage": {"total_tokens": 33}}
    facts = DIALECTS[Dialect.OPENAI].answer_facts(orjson.dumps(answer))
    assert facts.usage == Usage(33, 0, total_tokens=33)
    charge = charge_of(Rates.of(Price(1, 0)), facts.usage, None, whole=True)
    assert (charge.state, charge.cost_micros) == (UsageState.TOLD, 33)


@pytest.mark.parametrize("vectors", [1, 9_000])
def test_an_embedding_of_gemini_s_that_reports_its_input_alone_is_charged(vectors: int) -> None:
    """As recorded of gemini-embedding-2; that it has no output is not said."""
    pictures = [{"modality": "IMAGE", "tokenCount": 258}, {"modality": "TEXT", "tokenCount": 742}]
    for name, told, details in (
        ("embeddings", [{"modality": "TEXT", "tokenCount": 1000}], None),
        ("embedding", pictures, UsageDetails(input_image_tokens=258)),
    ):
        usage = {"promptTokenCount": 1000, "promptTokenDetails": told}
        made = {"values": [0.25, -0.5] * vectors * 5}
        answer = {name: [made] if name == "embeddings" else made, "usageMetadata": usage}
        found = DIALECTS[Dialect.GEMINI].answer_facts(json.dumps(answer, indent=2).encode()).usage
        assert found == Usage(1000, 0, details=details)
        charge = charge_of(Rates.of(Price(0.2, 0)), found, None, whole=True)
        assert (charge.state, charge.cost_micros) == (UsageState.TOLD, 200)
    cut = {"promptTokenCount": 1000}  # of anything else it is not known
    begun = json.dumps({"candidates": [], "usageMetadata": cut}).encode()
    assert DIALECTS[Dialect.GEMINI].answer_facts(begun).usage.output_tokens is None


def test_a_stream_of_a_transcription_tells_its_usage_and_shows_its_text() -> None:
    usage = {"type": "tokens", "input_tokens": 70, "output_tokens": 4, "total_tokens": 74}
    events = [
        {"type": "transcript.text.delta", "delta": "The sun rises in the east."},
        {"type": "transcript.text.done", "text": "The sun rises in the east.", "usage": usage},
    ]
    stream = b"".join(b"data: %s\n\n" % orjson.dumps(event) for event in events)
    spec = DIALECTS[Dialect.OPENAI]
    assert spec.answer_facts(stream).usage == Usage(70, 4, None, None, 74)
    assert visible_output(spec, stream, len(stream)).tokens == 7
