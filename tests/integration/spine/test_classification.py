"""Who decides what a request is, what that costs, and what the record says of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.gateway import Gateway, Opener, Streamed
from tests.outages import all_is_well
from tests.waiting import wait_until
from tidegate.classify import by_keywords, by_rules

UNSURE = "Nice!"
PICTURE_LIKE = "a lighthouse in fog"


def test_these_prompts_are_unsure() -> None:
    for prompt in (UNSURE, PICTURE_LIKE, *(f"Nice {number}!" for number in range(8))):
        assert by_rules(prompt, ()).kind is None, prompt
    assert by_keywords(PICTURE_LIKE, ()).kind == "image_generation"


@pytest.mark.parametrize("chosen", ["text_only", "image_generation"])
async def test_an_unsure_prompt_is_decided_by_the_llm_then_goes_under_its_kind(
    chosen: str, open_gateway: Opener
) -> None:
    gateway = await open_gateway(worker=False)
    answer = {"kind": chosen, "reason": "because the test says so"}
    await gateway.upstream.set_behaviour(classifier_answer=answer)
    request_id = await gateway.submit(data=UNSURE)
    queued = await gateway.status(request_id)
    assert "type" not in queued
    assert "classified_by" not in queued
    gateway.start_worker()
    record = await gateway.end_of(request_id)
    assert (record["status"], record["type"]) == ("succeeded", chosen)
    assert (record["classified_by"], record["classified_why"]) == ("llm", answer["reason"])
    assert [call.kind for call in await gateway.upstream.calls()] == ["classifier", chosen]
    audit = await gateway.audit(request_id)
    assert (audit["classified_by"], audit["classified_reason"]) == ("llm", answer["reason"])
    streamed = await gateway.stream(text=UNSURE)
    assert streamed.events[-1][1]["classified_by"] == "llm"


@pytest.mark.parametrize(
    ("mode", "prompt", "by", "questions"),
    [
        ("auto", "Explain the tide", "rules", 0),
        ("auto", UNSURE, "llm", 1),
        ("llm", "Explain the tide", "llm", 1),
        ("keywords", UNSURE, "keywords", 0),
        ("keywords", "Explain the tide", "rules", 0),
    ],
)
async def test_the_mode_says_who_is_asked(
    mode: str, prompt: str, by: str, questions: int, open_gateway: Opener
) -> None:
    gateway = await open_gateway(classifier=mode)
    record = await gateway.end_of(await gateway.submit(data=prompt))
    assert (record["status"], record["classified_by"]) == ("succeeded", by)
    assert record["classified_why"]
    assert (await gateway.upstream.stats())["classifier"].arrived == questions


async def test_the_caller_decides_where_it_names_a_type(open_gateway: Opener) -> None:
    gateway = await open_gateway(classifier="llm")
    record = await gateway.end_of(await gateway.submit(data=UNSURE, type="image_generation"))
    assert (record["type"], record["classified_by"]) == ("image_generation", "caller")
    assert (await gateway.upstream.stats())["classifier"].arrived == 0


FAULTS = {
    "unavailable": "failed: upstream_unavailable",
    "throttled": "failed: upstream_throttled",
    "blocked_prompt": "failed: prompt_blocked",
    "garbage": "failed: upstream_garbled",
    "hang": "gave no answer in time",
}


@pytest.mark.parametrize(
    ("timeout_ms", "faults"),
    # A question that fails has all the time that a busy machine takes: out of time, it would be
    # one that hangs. One that hangs has still to reach the upstream before its time is over.
    [(15_000, [*FAULTS][:-1]), (1_500, ["hang"])],
    ids=["fails", "is slow"],
)
async def test_keywords_decide_when_the_llm_fails_or_is_slow_and_the_record_says_so(
    timeout_ms: int, faults: list[str], open_gateway: Opener
) -> None:
    gateway = await open_gateway(classifier_timeout_ms=timeout_ms, worker=False)
    for fault in faults:
        why = FAULTS[fault]
        await gateway.upstream.reset()
        await gateway.upstream.set_fault(fault, kind="classifier")
        record = await gateway.recorded((await gateway.stream(text=PICTURE_LIKE)).request_id)
        assert (record["status"], record["type"]) == ("succeeded", "image_generation")
        assert record["classified_by"] == "keywords"
        assert record["classified_why"].endswith(f"(the LLM {why})"), fault
        # A 429 has paused it, for the next ones' good.
        await all_is_well(gateway)
        stats = (await gateway.upstream.stats())["classifier"]
        assert (stats.arrived, stats.in_flight) == (1, 0)
    # A guess is not remembered: the next one asks again.
    await gateway.upstream.clear_faults()
    again = await gateway.recorded((await gateway.stream(text=PICTURE_LIKE)).request_id)
    assert again["classified_by"] == "llm"


async def test_keywords_decide_when_the_llm_is_over_its_limit(open_gateway: Opener) -> None:
    gateway = await open_gateway(classifier_timeout_ms=500, classifier_limit=1, worker=False)
    await gateway.upstream.set_fault("hang", kind="classifier")
    streams = [gateway.stream(text=f"Nice {number}!") for number in range(3)]
    ends = [(await _why(gateway, streamed)) for streamed in await asyncio.gather(*streams)]
    assert (await gateway.upstream.stats())["classifier"].max_in_flight == 1
    assert sum(why.endswith("(the LLM is over its limit)") for why in ends) >= 1
    assert sum(why.endswith("(the LLM gave no answer in time)") for why in ends) >= 1


async def test_a_question_given_up_holds_its_permit_until_its_server_is_done(
    open_gateway: Opener, tmp_path: Path
) -> None:
    """It was closed, and the next one let in, while such a server still computed."""
    policy = tmp_path / "policy.toml"
    policy.write_text('[upstreams.gemini]\nabandoned = "wait"\n')
    gateway = await open_gateway(
        tidegate_policy=policy,
        classifier_timeout_ms=1_500,
        classifier_limit=1,
        first_byte_timeout_ms=30_000,
        worker=False,
    )
    await gateway.upstream.set_behaviour(first_byte_ms={"classifier": 3_000})
    given_up = await _why(gateway, await gateway.stream(text="Nice 1!"))
    assert given_up.endswith("(the LLM gave no answer in time)")
    await gateway.in_flight(0)
    await wait_until(lambda: gateway.held == 0, 20)
    assert (await gateway.upstream.stats())["classifier"].client_gone == 0
    await gateway.upstream.set_fault("hang", kind="classifier")
    reasons = [await _why(gateway, await gateway.stream(text=f"Nice {n}!")) for n in (2, 3)]
    assert [why.rpartition("(")[2] for why in reasons] == [
        *("the LLM gave no answer in time)", "the LLM is over its limit)"),
    ]
    assert (await gateway.upstream.stats())["classifier"].in_flight == gateway.held == 1
    # And the stop of this process, which comes now, closes what goes on.


async def test_the_question_leaves_a_request_half_of_its_time(open_gateway: Opener) -> None:
    """It would have had all of it: the request's deadline passed before it asked for a permit."""
    gateway = await open_gateway(classifier_timeout_ms=30_000)
    await gateway.upstream.set_fault("hang", kind="classifier")
    streamed = await gateway.stream(text=UNSURE, deadline_ms=3_000)
    assert "(the LLM gave no answer in time)" in await _why(gateway, streamed)
    job = await gateway.end_of(await gateway.submit(data=UNSURE, deadline_ms=4_000))
    assert (job["status"], job["classified_by"]) == ("succeeded", "keywords")


async def _why(gateway: Gateway, streamed: Streamed) -> str:
    assert streamed.events[-1][1]["classified_by"] == "keywords"
    return str((await gateway.recorded(streamed.request_id))["classified_why"])


async def test_the_same_prompt_is_asked_about_once_however_many_come_at_once(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(classifier_timeout_ms=15_000)  # a busy machine's answer counts
    await gateway.upstream.set_behaviour(first_byte_ms={"classifier": 100})
    ids = [await gateway.submit(data=UNSURE) for _ in range(12)]
    for request_id in ids:
        record = await gateway.end_of(request_id)
        assert (record["status"], record["classified_by"]) == ("succeeded", "llm")
    assert (await gateway.upstream.stats())["classifier"].arrived == 1


async def test_at_most_two_questions_run_at_once_and_they_use_no_other_limit(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(classifier_timeout_ms=5_000, shutdown_grace_ms=100)
    await gateway.upstream.set_fault("hang", match="forever")
    for number in range(5):
        await gateway.submit(data=f"Explain forever {number}")
    await gateway.in_flight(5)
    await gateway.upstream.set_behaviour(first_byte_ms={"classifier": 80})
    answer = {"kind": "image_generation", "reason": "a test"}
    await gateway.upstream.set_behaviour(classifier_answer=answer)
    ids = [await gateway.submit(data=f"Nice {number}!") for number in range(8)]
    for request_id in ids:
        assert (await gateway.end_of(request_id))["classified_by"] == "llm"
    stats = await gateway.upstream.stats()
    assert (stats["classifier"].max_in_flight, stats["classifier"].arrived) == (2, 8)
    assert stats["text_only"].in_flight == 5
