"""A call that nobody follows is read at its end, and comes to the same as one that is followed."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.contract.gemini_upstream import (
    PATIENT,
    STREAM_HEAD,
    Collected,
    Connection,
    Received,
    call,
    chunk,
    gemini,
    raw_upstream,
)
from tests.waiting import wait_turns, wait_until
from tidegate.call import Answer, Kind
from tidegate.emulator.server import run_emulator
from tidegate.errors import UpstreamError, UpstreamThrottled, UpstreamTimeout
from tidegate.upstream.gemini import GeminiProcessor
from tidegate.upstream.transport import Timeouts

STOP = chunk("end", finish="STOP", tokens=3)
THROTTLED = {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Please retry in 53.0s."}
THOUGHT = {"text": "hm", "thought": True, "thoughtSignature": "aGVsbG8="}
SHORT = 150


async def outcome(
    events: list[object], end: str, sink: Collected | None
) -> tuple[Answer, str, type[UpstreamError] | None]:
    """The answer to `events`, and what `run` raised."""

    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        for event in events:
            await to.event(event)
        if end == "half an event":
            await to.send(b"7\r\ndata: {\r\n")
        if end == "end":
            await to.end()
        else:
            to.cut()

    answer, raised = Answer(), None
    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:
        try:
            await ours.run(call(), answer, sink)
        except UpstreamError as failed:
            raised = failed
        assert ours.open_calls == 0
    return answer, str(raised), type(raised) if raised is not None else None


@pytest.mark.parametrize("followed", [False, True])
async def test_an_error_that_is_no_event_is_the_provider_s(followed: bool) -> None:
    """As Google's SDK expects it: written over several lines, without `data:`."""
    said = (
        f"data: {json.dumps(chunk('So far'))}\r\n\r\n{json.dumps({'error': THROTTLED}, indent=2)}"
    )

    async def script(_: Received, to: Connection) -> None:
        await to.whole(200, said.encode(), content_type="text/event-stream")

    answer = Answer()
    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:
        with pytest.raises(UpstreamThrottled) as raised:
            await ours.run(call(), answer, Collected() if followed else None)
    assert (raised.value.retry_after_ms, answer.whole_text) == (53_000, "So far")


@pytest.mark.parametrize("end", ["end", "cut", "half an event"])
@pytest.mark.parametrize(
    "events",
    [
        [],
        [STOP],
        [chunk("one "), chunk("two ", tokens=1), STOP],
        [chunk("one "), chunk("two ")],
        [chunk("one "), STOP, {"usageMetadata": {"promptTokenCount": 9}, "modelVersion": "x"}],
        [chunk("one "), {"promptFeedback": {"blockReason": "SAFETY"}}],
        [{"promptFeedback": {"blockReason": "SAFETY"}}, {"modelVersion": "x"}],
        [chunk("one "), {"error": THROTTLED}],
        [chunk("one "), [{"error": THROTTLED}]],
        [chunk("one "), {"candidates": [], "error": THROTTLED}],
        [chunk("one "), {"candidates": [7]}, STOP],
        [chunk("one "), {"candidates": [{"content": {"parts": [{"text": {"deep": 1}}]}}]}, STOP],
        [{"candidates": [{}]}, {"candidates": [{}]}],
        [{"candidates": [{"content": {"parts": [THOUGHT]}}]}, chunk("one ", tokens=1), STOP],
        [{"usageMetadata": {"totalTokenCount": 9, "promptTokensDetails": [{"x": 1}]}}, STOP],
        [{"usageMetadata": {"cachedContentTokenCount": 1, "thoughtsTokenCount": 2}}, STOP],
        [{}, {}],
        [None, [1, 2]],
        [{"unknown": True}, STOP],
        [chunk("one "), chunk(finish="MODEL_ON_STRIKE")],
        [chunk(finish="SAFETY"), {"modelVersion": "x"}],
    ],
)
async def test_it_comes_to_the_same_as_a_call_that_is_followed(
    events: list[object], end: str
) -> None:
    followed = await outcome(events, end, Collected())
    alone = await outcome(events, end, None)
    assert alone[1:] == followed[1:]
    assert alone[0].whole_text == followed[0].whole_text
    for name in ("usage", "finish_reason", "model_version", "response_id", "pictures"):
        assert getattr(alone[0], name) == getattr(followed[0], name)


def reported(**usage: str) -> dict[str, object]:
    return {"usageMetadata": {"promptTokenCount": 7, **usage}}


@pytest.mark.parametrize(
    ("header", "events", "tier"),
    [
        (
            "",
            [chunk("a") | reported(serviceTier="FLEX"), STOP | reported(serviceTier="flex")],
            "flex",
        ),
        ("", [chunk("x" * 70_000, finish="STOP") | reported(serviceTier="flex")], "flex"),
        ("", [STOP | reported(trafficType="ON_DEMAND_PRIORITY")], "priority"),
        ("", [STOP | reported(serviceTier="standard", trafficType="ON_DEMAND")], None),
        ("", [chunk('"serviceTier": "flex"'), STOP], None),
        ("priority", [STOP | reported(serviceTier="flex")], "priority"),
        ("standard", [STOP | reported(serviceTier="priority")], "priority"),
    ],
)
async def test_the_tier_is_found_wherever_the_answer_reports_it(
    header: str, events: list[dict[str, object]], tier: str | None
) -> None:
    said = b"".join(b"data: %b\r\n\r\n" % json.dumps(one).encode() for one in events)
    head = {"content_type": "text/event-stream", "x_gemini_service_tier": header}

    async def script(_: Received, to: Connection) -> None:
        await to.whole(200, said, **head)

    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:
        for sink in (None, Collected()):
            answer = Answer()
            await ours.run(call(), answer, sink)
            details = answer.usage.details
            assert (details.tier if details is not None else None) == tier


async def test_it_reads_a_picture_and_a_long_answer() -> None:
    async with run_emulator() as emulator, gemini(emulator.url) as ours:
        picture, long = Answer(), Answer()
        await ours.run(call(Kind.IMAGE_GENERATION), picture, None)
        assert picture.pictures

        async def script(_: Received, to: Connection) -> None:
            await to.send(STREAM_HEAD)
            for _number in range(15):
                await to.event(chunk("x" * 100_000))
            await to.event(STOP)
            await to.end()

        async with raw_upstream(script) as upstream, gemini(upstream.url) as theirs:
            await theirs.run(call(), long, None)
        assert long.whole_text == "x" * 1_500_000 + "end"


async def hanging(_: Received, to: Connection) -> None:
    await to.send(STREAM_HEAD)
    await to.event(chunk("So ", tokens=2))
    await to.event(chunk("far", tokens=3))
    await to.send(b"7\r\ndata: {\r\n")
    await to.hang()


@pytest.mark.parametrize(
    ("phase", "limits"),
    [
        ("idle", Timeouts(5_000, 5_000, SHORT, 9_000)),
        ("total", Timeouts(5_000, 5_000, 5_000, 4 * SHORT)),
    ],
)
async def test_what_came_before_a_timeout_is_kept(phase: str, limits: Timeouts) -> None:
    answer = Answer()
    async with raw_upstream(hanging) as upstream, gemini(upstream.url, limits) as ours:
        with pytest.raises(UpstreamTimeout) as raised:
            await ours.run(call(), answer, None)
        assert ours.open_calls == 0
        await wait_until(lambda: upstream.closed_at, 20)
    assert raised.value.phase == phase
    assert (answer.whole_text, answer.usage.output_tokens) == ("So far", 3)


def has_come(ours: GeminiProcessor) -> bool:
    sdk = ours._sdk
    assert sdk is not None
    return any(
        b"".join(exchange.tail).endswith(b"\n\r\n") for exchange in sdk.connections.open_exchanges
    )


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("odd", [False, True])
async def test_what_came_before_a_cancellation_is_kept(odd: bool, times: int) -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.event(chunk("So far", tokens=3))
        if odd:  # the SDK fails on it, and the cancellation must not be lost with it
            await to.event({"candidates": [{"content": {"parts": [{"thought": "maybe not"}]}}]})
        sent.set()
        await to.hang()

    answer, sent = Answer(), asyncio.Event()
    async with raw_upstream(script) as upstream, gemini(upstream.url, PATIENT) as ours:
        task = asyncio.create_task(ours.run(call(), answer, None))
        await sent.wait()
        await wait_until(lambda: has_come(ours), 20)
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ours.open_calls == 0
        await wait_turns(lambda: upstream.closed_at, what="the server sees the connection close")
    if not odd:
        assert (answer.whole_text, answer.usage.output_tokens) == ("So far", 3)
