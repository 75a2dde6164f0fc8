"""What videos and batches of Gemini ask for, make, and have used."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tidegate.call import Status
from tidegate.dialects import DIALECTS, gemini_work
from tidegate.dialects.spec import Dialect, Endpoint, Operation, RequestFacts
from tidegate.errors import InvalidRequest

GEMINI = DIALECTS["gemini"]
VIDEO = Endpoint(Dialect.GEMINI, Operation.VIDEO, "/v1beta/models/{model}:predictLongRunning", "v")
CREATE = "/v1beta/models/{model}:batchGenerateContent"
BATCH = Endpoint(Dialect.GEMINI, Operation.BATCH, CREATE, "m")


def video(**parameters: Any) -> RequestFacts:
    return GEMINI.request_facts(
        VIDEO, {"instances": [{"prompt": "A wave"}], "parameters": parameters}
    )


@pytest.mark.parametrize(
    ("parameters", "seconds", "tier"),
    [
        ({}, 8, ""),
        ({"durationSeconds": 4, "resolution": "720p"}, 4, ""),
        ({"durationSeconds": "6", "sampleCount": 2, "resolution": "1080p"}, 12, "1080p"),
        ({"duration_seconds": 4.5, "number_of_videos": 3, "resolution": "4K"}, 15, "4k"),
        ({"durationSeconds": "soon", "sampleCount": None}, 8, ""),
    ],
)
def test_a_video_is_measured_by_what_its_request_states(
    parameters: dict[str, Any], seconds: int, tier: str
) -> None:
    facts = video(**parameters)
    assert (facts.video_seconds, facts.tier, facts.runs_in_background) == (seconds, tier, True)


def test_a_length_that_is_stated_twice_counts_by_the_longer_and_the_dearer() -> None:
    raw = b'{"parameters": {"durationSeconds": 8, "durationSeconds": 4, "resolution": "4k",'
    raw += b' "resolution": "720p", "x": "\\"durationSeconds\\": 500"}}'
    assert gemini_work.video_seconds(raw) == 8
    assert gemini_work.resolution(raw) == "4k"
    for wrong in ({"durationSeconds": 10**9}, {"sampleCount": 10**6}):
        with pytest.raises(InvalidRequest, match=r"too (?:long|many)|are too"):
            video(**wrong)


def ended(response: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "models/v/operations/a", "done": True, "response": response, **more}


def test_files_are_those_that_the_provider_has_made_and_no_others() -> None:
    host = "https://generativelanguage.googleapis.com/v1beta"
    samples = [{"video": {"uri": f"{host}/files/{name}:download?alt=media"}} for name in ("a", "b")]
    shown = ended({"generateVideoResponse": {"generatedSamples": samples}})
    assert list(gemini_work.files_of(shown)) == ["a", "b"]
    batch = {
        "name": "batches/1",
        "metadata": {
            "displayName": "files/of-another",
            "inputConfig": {"fileName": "files/of-another"},
            "output": {"responsesFile": "files/batch-1"},
        },
        "response": {
            "responsesFile": "files/batch-1",
            "inlinedResponses": {"inlinedResponses": [{"response": {"uri": "files/said"}}]},
        },
    }
    assert list(gemini_work.files_of(batch)) == ["batch-1"]
    assert gemini_work.results_path(batch) == "/v1beta/files/batch-1:download?alt=media"
    for uri in ("files/../keys", "https://host/files/a/b", 7, None):
        odd = ended({"generateVideoResponse": {"generatedSamples": [{"video": {"uri": uri}}]}})
        assert not list(gemini_work.files_of(odd))


@pytest.mark.parametrize(
    ("shown", "end"),
    [
        ({"name": "models/v/operations/a"}, None),
        ({"done": False, "metadata": {"state": "BATCH_STATE_RUNNING"}}, None),
        ({"metadata": {"state": "BATCH_STATE_SUCCEEDED"}}, Status.SUCCEEDED),
        ({"metadata": {"state": "JOB_STATE_CANCELLED"}, "done": True}, Status.CANCELLED),
        ({"metadata": {"state": "BATCH_STATE_EXPIRED"}}, Status.FAILED),
        ({"done": True, "response": {}}, Status.SUCCEEDED),
        ({"done": True, "error": {"code": 3, "message": "no"}}, Status.FAILED),
        ({"done": True, "error": {"code": 1}}, Status.CANCELLED),
        ({"done": "true"}, None),
    ],
)
def test_the_end_is_what_the_provider_reports(shown: dict[str, Any], end: Status | None) -> None:
    assert gemini_work.end_of(shown) is end


def test_a_video_that_was_not_made_costs_nothing() -> None:
    refused = ended({"generateVideoResponse": {"raiMediaFilteredCount": 1}})
    usage = gemini_work.VideoTally(refused, b"{}").facts().usage
    assert (usage.input_tokens, usage.output_tokens, usage.details) == (0, 0, None)
    one = ended({"generateVideoResponse": {"generatedSamples": [{"video": {"uri": "files/a"}}]}})
    asked = b'{"parameters": {"durationSeconds": 6, "resolution": "1080p"}}'
    details = gemini_work.VideoTally(one, asked).facts().usage.details
    assert details is not None
    assert (details.output_video_seconds, details.tier) == (6, "1080p")


def batch(*requests: dict[str, Any]) -> dict[str, Any]:
    inner = {"requests": [{"request": one, "metadata": {"key": "k"}} for one in requests]}
    return {"batch": {"displayName": "b", "inputConfig": {"requests": inner}}}


def asked(text: str, **settings: Any) -> dict[str, Any]:
    return {"contents": [{"parts": [{"text": text}]}], "generationConfig": settings}


def test_a_batch_counts_all_of_its_requests() -> None:
    both = asked("Say hello", maxOutputTokens=10, candidateCount=2), asked("Bye", maxOutputTokens=5)
    facts = GEMINI.request_facts(BATCH, batch(*both))
    assert (facts.calls, facts.max_output_tokens, facts.tier) == (2, 25, "batch")
    facts = GEMINI.request_facts(BATCH, batch(asked("Hi"), both[1]))
    assert (facts.calls, facts.max_output_tokens) == (2, None), "one has no bound"
    texts = asked("Hi", maxOutputTokens="10", candidateCount="4")
    spelt = asked("Hi", maxOutputTokens=1) | {"generation_config": {"max_output_tokens": 30}}
    assert GEMINI.request_facts(BATCH, batch(texts, spelt)).max_output_tokens == 70
    facts = GEMINI.request_facts(BATCH, {"batch": {"inputConfig": {"fileName": "files/a"}}})
    assert facts.calls == 0
    for wrong in ({}, batch(), {"batch": {"inputConfig": {"requests": {"requests": "x"}}}}):
        with pytest.raises(InvalidRequest, match="no requests"):
            GEMINI.request_facts(BATCH, wrong)


def row(taken: int, given: int, **more: Any) -> dict[str, Any]:
    usage = {"promptTokenCount": taken, "candidatesTokenCount": given, **more}
    usage["totalTokenCount"] = taken + given + usage.get("thoughtsTokenCount", 0)
    return {"response": {"usageMetadata": usage, "modelVersion": "gemini-x-001"}}


def tally(rows: list[dict[str, Any]], **metadata: Any) -> gemini_work.BatchTally:
    output = {"inlinedResponses": {"inlinedResponses": rows}}
    state = {"state": "BATCH_STATE_SUCCEEDED", "output": output}
    shown = {"name": "batches/1", "metadata": state | metadata}
    work = GEMINI.works["batch"].tally
    assert work is not None
    found = work(shown, b"")
    assert isinstance(found, gemini_work.BatchTally)
    return found


def test_a_batch_has_used_what_its_answers_report() -> None:
    refused = {"error": {"code": 3, "message": "no"}}
    sums = tally([row(10, 20, thoughtsTokenCount=7), refused, row(1, 2)])
    sums.add(orjson.loads(orjson.dumps(row(100, 200))))
    facts = sums.facts()
    usage = facts.usage
    assert (usage.input_tokens, usage.output_tokens, usage.thoughts_tokens) == (111, 222, 7)
    assert usage.details is not None
    assert usage.details.tier == "batch"
    assert facts.model_version == "gemini-x-001"
    embedded = tally([{"response": {"embedding": {}, "tokenCount": "12"}}]).facts().usage
    assert (embedded.input_tokens, embedded.output_tokens) == (12, 0)


@pytest.mark.parametrize(
    ("rows", "stats"),
    [
        ([{"response": {"candidates": []}}], {}),
        ([], {"successfulRequestCount": "2"}),
        ([{"response": {"embedding": {}, "tokenCount": "-4"}}], {}),
    ],
)
def test_what_a_batch_does_not_report_is_unknown(
    rows: list[dict[str, Any]], stats: dict[str, str]
) -> None:
    usage = tally(rows, batchStats=stats).facts().usage
    assert (usage.input_tokens, usage.output_tokens) == (None, None)


SILENT: dict[str, Any] = {"response": {"candidates": []}}
NO_INPUT: dict[str, Any] = {"response": {"usageMetadata": {"candidatesTokenCount": 5}}}


@pytest.mark.parametrize(
    ("rows", "used"),
    [
        ([row(10, 2), row(3, 20), SILENT], (10 + 3 + 10, 2 + 20 + 20)),
        ([row(1, 2, thoughtsTokenCount=7), SILENT], (1 + 1, 2 + 9)),
        ([row(10, 2), NO_INPUT], (10 + 10, 2 + 5)),
        ([row(10, 2), NO_INPUT, SILENT], (10 + 10 + 10, 2 + 5 + 5)),
        ([NO_INPUT, SILENT], (None, 5 + 5)),
    ],
)
def test_an_answer_without_usage_is_taken_for_as_large_as_the_largest(
    rows: list[dict[str, Any]], used: tuple[int | None, int]
) -> None:
    facts = tally(rows).facts()
    assert (facts.usage.input_tokens, facts.usage.output_tokens) == used
    assert facts.is_estimate
    assert not tally([row(10, 2)]).facts().is_estimate


def test_a_batch_of_which_nothing_ran_has_used_nothing() -> None:
    usage = tally([], state="BATCH_STATE_CANCELLED").facts().usage
    assert (usage.input_tokens, usage.output_tokens) == (0, 0)
