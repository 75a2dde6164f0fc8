"""Every way in which Gemini fails us, through the real SDK."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.contract.gemini_upstream import (
    KEY,
    STREAM_HEAD,
    Collected,
    Connection,
    Received,
    call,
    chunk,
    gemini,
    raw_upstream,
    run_against,
)
from tidegate.call import Answer, Delta, Kind
from tidegate.emulator.server import Emulator, run_emulator
from tidegate.errors import (
    EmptyAnswer,
    PromptBlocked,
    UpstreamError,
    UpstreamGarbled,
    UpstreamRejected,
    UpstreamThrottled,
    UpstreamUnauthorized,
    UpstreamUnavailable,
)


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    async with run_emulator() as running:
        yield running


async def fail_with(fault: str, kind: Kind = Kind.TEXT_ONLY, **order: Any) -> UpstreamError:
    """What one call raises when the emulator gives it `fault`."""
    async with run_emulator() as emulator, gemini(emulator.url) as ours:
        await emulator.control.set_fault(fault, **order)
        with pytest.raises(UpstreamError) as raised:
            await ours.run(call(kind), Answer(), Collected())
        assert ours.open_calls == 0
        assert len(await emulator.control.calls()) == 1, "one attempt, no retry"
        return raised.value


async def answer_status(status: int, body: object, **headers: str) -> UpstreamError:
    """What one call raises when the provider answers `status` with `body`."""

    async def script(_: Received, to: Connection) -> None:
        await to.whole(status, body, **headers)

    with pytest.raises(UpstreamError) as raised:
        await run_against(script)
    return raised.value


async def answer_events(*events: object, end: bool = True) -> tuple[UpstreamError, Answer]:
    """What one call raises when the stream holds `events`, and the answer it kept."""

    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        for event in events:
            await to.event(event)
        await to.end() if end else to.cut()

    answer = Answer()
    async with raw_upstream(script) as upstream, gemini(upstream.url) as ours:
        with pytest.raises(UpstreamError) as raised:
            await ours.run(call(), answer, Collected())
    return raised.value, answer


async def test_a_429_says_how_long_to_wait() -> None:
    error = await fail_with("throttled", retry_after_s=47)
    assert isinstance(error, UpstreamThrottled)
    assert (error.retry_after_ms, error.day_quota, error.status) == (47_000, False, 429)


async def test_a_429_without_details_has_no_delay() -> None:
    error = await fail_with("throttled_bare")
    assert isinstance(error, UpstreamThrottled)
    assert (error.retry_after_ms, error.day_quota) == (None, False)


async def test_a_429_for_a_day_quota_is_marked() -> None:
    error = await fail_with("day_quota")
    assert isinstance(error, UpstreamThrottled)
    assert error.day_quota


async def test_a_429_as_a_list_of_one_is_understood() -> None:
    error = await fail_with("error_list", retry_after_s=3)
    assert isinstance(error, UpstreamThrottled)
    assert error.retry_after_ms == 3_000


@pytest.mark.parametrize("fault", ["unavailable", "internal"])
async def test_a_5xx_is_unavailable(fault: str) -> None:
    assert type(await fail_with(fault)) is UpstreamUnavailable


@pytest.mark.parametrize("fault", ["unauthorized", "forbidden"])
async def test_a_dead_key_is_unauthorized(fault: str) -> None:
    assert type(await fail_with(fault)) is UpstreamUnauthorized


async def test_an_invalid_key_in_a_400_is_unauthorized() -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}]
    body = {"error": {"code": 400, "message": "Bad key.", "details": details}}
    assert type(await answer_status(400, body)) is UpstreamUnauthorized


async def test_another_4xx_is_rejected_with_the_providers_message() -> None:
    body = {"error": {"code": 400, "status": "INVALID_ARGUMENT", "message": "Too many\n images."}}
    error = await answer_status(400, body)
    assert type(error) is UpstreamRejected
    assert "Too many images." in error.message
    assert error.status == 400


async def test_no_message_holds_the_key() -> None:
    said = f"key {KEY} at https://x/upload?key={KEY}&upload_id=abc is wrong. " + "x" * 9_000
    error = await answer_status(404, {"error": {"code": 404, "message": said}})
    assert KEY not in str(error)
    assert "upload_id=abc" not in str(error)
    assert len(str(error)) < 700
    assert error.__cause__ is None
    assert error.__suppress_context__


@pytest.mark.parametrize(
    "body", [b"", b"<html>Bad gateway</html>", b"[]", b'"no"', b"\xff{", b"[" * 99_999]
)
async def test_a_502_with_any_body_is_unavailable(body: bytes) -> None:
    error = await answer_status(502, body)
    assert type(error) is UpstreamUnavailable
    assert "html" not in str(error)


async def test_the_retry_after_header_is_used_when_the_body_says_nothing() -> None:
    error = await answer_status(503, b"busy", retry_after="7")
    assert error.retry_after_ms == 7_000


@pytest.mark.parametrize(("code", "wait_ms"), [(429, 7_000), (503, None)])
async def test_a_good_answer_s_wait_is_for_its_limit_alone(code: int, wait_ms: int | None) -> None:
    event = b'data: {"error": {"code": %d, "message": "no"}}\r\n\r\n' % code
    head = {"content_type": "text/event-stream", "retry_after": "7"}
    error = await answer_status(200, event, **head)
    assert (error.status, error.retry_after_ms) == (code, wait_ms)


async def test_a_redirect_is_not_followed() -> None:
    error = await answer_status(302, b"", location="http://127.0.0.1:1/elsewhere")
    assert type(error) is UpstreamGarbled


async def test_a_refused_connection_is_unavailable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with gemini(f"http://127.0.0.1:{taken.getsockname()[1]}") as ours:
            with pytest.raises(UpstreamUnavailable):
                await ours.run(call(), Answer(), Collected())


@pytest.mark.parametrize("reset", [False, True])
async def test_a_connection_closed_before_the_headers_is_unavailable(reset: bool) -> None:
    async def script(_: Received, to: Connection) -> None:
        to.cut(reset=reset)

    with pytest.raises(UpstreamUnavailable):
        await run_against(script)


async def test_a_stream_cut_in_the_middle_is_unavailable_and_keeps_what_came() -> None:
    async with run_emulator() as emulator, gemini(emulator.url) as ours:
        await emulator.control.set_fault("cut_mid_stream", after_chunks=2)
        answer, sink = Answer(), Collected()
        with pytest.raises(UpstreamUnavailable):
            await ours.run(call(), answer, sink)
        assert answer.whole_text.startswith("You asked")
        assert answer.whole_text == "".join(e.text for e in sink.events if isinstance(e, Delta))
        assert answer.usage.output_tokens is not None
        assert answer.finish_reason is None


async def test_a_stream_that_ends_without_a_finish_reason_is_a_cut_one() -> None:
    error, answer = await answer_events(chunk("Half an ans", tokens=3))
    assert type(error) is UpstreamUnavailable
    assert answer.whole_text == "Half an ans"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (7, 3)


async def test_a_stream_with_nothing_in_it_is_a_cut_one() -> None:
    error, _ = await answer_events()
    assert type(error) is UpstreamUnavailable


async def test_broken_json_in_a_stream_is_garbled() -> None:
    assert type(await fail_with("garbage")) is UpstreamGarbled


@pytest.mark.parametrize(
    "event",
    [
        {"candidates": [7]},
        {"candidates": [{"content": {"parts": "text"}}]},
        {"candidates": [{"content": {"parts": [{"text": {"deep": 1}}]}}]},
        {"candidates": [{"content": {"parts": [{"inlineData": {"data": "?", "mimeType": 1}}]}}]},
        {"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": 5}]},
        {"candidates": [{}], "usageMetadata": {"promptTokenCount": "many"}},
    ],
)
async def test_json_of_a_wrong_shape_is_garbled(event: object) -> None:
    error, _ = await answer_events(event, chunk("x", finish="STOP"))
    assert type(error) is UpstreamGarbled


@pytest.mark.parametrize("event", [[1, 2], "text", None, {}, {"unknown": True}])
async def test_json_that_is_no_answer_at_all_is_garbled(event: object) -> None:
    error, _ = await answer_events(event)
    assert type(error) is UpstreamGarbled


async def test_bytes_that_are_not_http_are_garbled() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(b"\x16\x03\x01 this is not HTTP\r\n\r\n")
        to.cut()

    with pytest.raises(UpstreamGarbled):
        await run_against(script)


async def test_a_page_in_place_of_a_stream_is_garbled() -> None:
    error = await answer_status(200, b"<html>Sign in to the hotel's network</html>")
    assert type(error) is UpstreamGarbled
    assert "hotel" not in str(error)


async def test_an_answer_over_the_bound_is_garbled_and_closed() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        line = b"x" * 65_536
        while True:
            await to.send(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    with pytest.raises(UpstreamGarbled, match="larger than 1000000 bytes"):
        await run_against(script, max_answer_bytes=1_000_000)


async def test_a_compressed_answer_is_refused_as_it_can_not_be_bounded() -> None:
    error = await answer_status(200, b"\x1f\x8b", content_encoding="gzip")
    assert type(error) is UpstreamGarbled


@pytest.mark.parametrize("code", [429, 503])
async def test_an_error_inside_a_stream_is_mapped_by_its_code(code: int) -> None:
    error = await fail_with("error_in_stream", code=code)
    assert type(error) is (UpstreamThrottled if code == 429 else UpstreamUnavailable)


THROTTLED = {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "Please retry in 53.0s."}


@pytest.mark.parametrize(
    "event",
    [
        {"error": THROTTLED},
        [{"error": THROTTLED}],
        {"candidates": [], "error": THROTTLED},
        {"error": {**THROTTLED, "code": "429"}},
        {"error": {"status": "RESOURCE_EXHAUSTED", "message": "Please retry in 53s."}},
    ],
)
async def test_an_error_object_of_any_shape_in_a_stream_is_mapped(event: object) -> None:
    error, answer = await answer_events(chunk("So far"), event)
    assert type(error) is UpstreamThrottled
    assert error.retry_after_ms == 53_000
    assert answer.whole_text == "So far"


@pytest.mark.parametrize("body", [b'{"error": %s}', b'[{\n"error": %s\n}\n]', b'[{"error": %s}]'])
async def test_an_error_as_plain_json_in_a_200_is_mapped(body: bytes) -> None:
    said = b'{"code": 429, "message": "Please retry in 1.5s."}'
    error = await answer_status(200, body % said, content_type="application/json")
    assert type(error) is UpstreamThrottled
    assert error.retry_after_ms == 1_500


async def test_a_blocked_prompt_gives_its_reason() -> None:
    error = await fail_with("blocked_prompt", reason="PROHIBITED_CONTENT")
    assert isinstance(error, PromptBlocked)
    assert error.reason == "PROHIBITED_CONTENT"


async def test_no_candidates_is_an_empty_answer() -> None:
    error = await fail_with("no_candidates")
    assert isinstance(error, EmptyAnswer)
    assert error.finish_reason is None


@pytest.mark.parametrize(
    ("fault", "kind"), [("safety", Kind.TEXT_ONLY), ("no_image", Kind.IMAGE_GENERATION)]
)
async def test_a_finish_without_content_is_an_empty_answer(fault: str, kind: Kind) -> None:
    error = await fail_with(fault, kind)
    assert isinstance(error, EmptyAnswer)
    assert error.finish_reason == fault.upper()


async def test_an_unknown_finish_without_content_is_an_empty_answer_with_its_word() -> None:
    error, _ = await answer_events(chunk(finish="MODEL_ON_STRIKE"))
    assert isinstance(error, EmptyAnswer)
    assert error.finish_reason == "MODEL_ON_STRIKE"


async def test_an_image_request_answered_in_words_is_an_empty_answer() -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.event(chunk("I would rather not.", finish="STOP"))
        await to.end()

    with pytest.raises(EmptyAnswer, match="no picture"):
        await run_against(script, call(Kind.IMAGE_GENERATION))


@pytest.mark.parametrize("finish", ["MAX_TOKENS", "MODEL_ON_STRIKE", "SAFETY"])
async def test_content_with_any_finish_reason_is_an_answer(
    finish: str, recwarn: pytest.WarningsRecorder
) -> None:
    async def script(_: Received, to: Connection) -> None:
        await to.send(STREAM_HEAD)
        await to.event(chunk("Some words", finish=finish))
        await to.end()

    answer = await run_against(script)
    assert (answer.whole_text, answer.finish_reason) == ("Some words", finish)
    assert not [item for item in recwarn.list if finish in str(item.message)]


@pytest.mark.parametrize(
    "model", ["../files/x", "a?b", "a#b", "a b", "", "m:embedContent", "a%2fb"]
)
async def test_a_model_name_that_would_change_the_url_is_rejected_unsent(
    model: str, emulator: Emulator
) -> None:
    made = call()
    made = type(made)(made.request_id, made.prompt, made.kind, model)
    async with gemini(emulator.url) as ours:
        with pytest.raises(UpstreamRejected):
            await ours.run(made, Answer(), Collected())
    assert await emulator.control.calls() == []
