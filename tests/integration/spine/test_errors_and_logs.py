"""What goes wrong inside stays inside: plain problems for clients, one log line, no secret."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.gateway import KEY, Opener
from tests.loglines import Lines, lines
from tests.outages import all_is_well
from tests.waiting import wait_until
from tidegate.http.views import UsageView
from tidegate.spine.prompt import PromptCalls
from tidegate.store.blobs import Blobs
from tidegate.store.jobs import Jobs
from tidegate.store.requests import Requests

__all__ = ["lines"]


def _named(lines: list[dict[str, Any]], *events: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] in events]


async def _boom(*_given: Any, **_named: Any) -> Any:
    raise ZeroDivisionError("sensitive words")


@pytest.mark.parametrize(
    ("prefix", "path"),
    [("/llm", "/submit"), ("", "/stream"), ("", "/status"), ("/llm", "/files")],
)
async def test_an_error_that_nobody_foresaw_is_a_plain_500_and_one_line(
    prefix: str, path: str, open_gateway: Opener, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    monkeypatch.setattr(Jobs, "submit", _boom)
    monkeypatch.setattr(Requests, "get", _boom)
    monkeypatch.setattr(Requests, "file", _boom)
    monkeypatch.setattr(PromptCalls, "decide", _boom)
    a_file = "/019abf3e-7c1e-7b52-9f0e-0e1f5a3c2d4b"
    posted = path in ("/submit", "/stream")
    async with gateway.http.request(
        "POST" if posted else "GET",
        f"{gateway.url}{prefix}{path}{'' if posted else a_file}",
        json={"data": "Explain the tide"} if posted else None,
    ) as response:
        body = orjson.loads(await response.read())
        assert (response.status, response.content_type) == (500, "application/problem+json")
        assert (body["code"], body["status"]) == ("internal", 500)
        assert "sensitive" not in str(body)
        assert "Traceback" not in str(body)
    await wait_until(lambda: _named(lines(), "request_done"), 20)
    found = _named(lines(), "internal_error")
    assert len(found) == 1, found
    assert "ZeroDivisionError: sensitive words" in found[0]["exception"]
    errors = [line for line in lines() if line["level"] in ("error", "critical")]
    assert errors == found
    (done,) = _named(lines(), "request_done")
    assert (done["status"], done["path"].startswith(f"{prefix}{path}")) == (500, True)


async def test_an_error_in_mid_answer_cuts_the_connection_and_is_one_line(
    open_gateway: Opener, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway(worker=False)
    monkeypatch.setattr(UsageView, "model_dump", lambda *_given, **_named: 1 / 0)
    streamed = await gateway.stream(text="Explain the tide")
    assert (streamed.status, streamed.ended) == (200, False)
    assert "done" not in streamed.names
    await wait_until(lambda: _named(lines(), "request_done"), 20)
    errors = [line for line in lines() if line["level"] in ("error", "critical")]
    assert [line["event"] for line in errors] == ["internal_error"], errors


async def test_a_request_is_one_line_with_its_id(open_gateway: Opener, lines: Lines) -> None:
    gateway = await open_gateway()
    request_id = await gateway.submit(data="Explain the tide")
    streamed = await gateway.stream(text="Explain the tide")
    refused = await gateway.stream(text="Explain the tide", deadline_ms=1, type="poem")
    await gateway.end_of(request_id)
    await wait_until(lambda: len(_named(lines(), "job_done")) == 1, 20)
    done = {line["path"]: line for line in _named(lines(), "request_done") if "request_id" in line}
    assert done["/submit"]["request_id"] == request_id
    assert done["/stream"]["request_id"] == streamed.request_id
    assert refused.status == 400
    posts = [line for line in _named(lines(), "request_done") if line["method"] == "POST"]
    assert [line["status"] for line in posts] == [202, 200, 400]
    (job,) = _named(lines(), "job_done")
    assert (job["request_id"], job["type"]) == (request_id, "text_only")


@pytest.mark.slow
async def test_no_secret_is_logged_or_shown_when_a_call_fails(
    open_gateway: Opener, lines: Lines
) -> None:
    gateway = await open_gateway(max_attempts=1)
    shown = ""
    for fault in ("cut", "garbage", "internal", "unauthorized", "forbidden", "throttled"):
        await gateway.upstream.reset()
        await gateway.upstream.set_fault(fault)
        is_bounded = fault in ("unauthorized", "forbidden", "throttled")  # else it waits for hours
        bound: dict[str, Any] = {"deadline_ms": 500} if is_bounded else {}
        record = await gateway.end_of(await gateway.submit(data="Explain the tide", **bound))
        assert record["status"] == ("expired" if is_bounded else "failed")
        await all_is_well(gateway)
        streamed = await gateway.stream(text="Explain the tide")
        assert streamed.names[-1] == "error"
        await all_is_well(gateway)
        shown += str(record) + streamed.raw.decode()
    logged = orjson.dumps(lines()).decode()
    # One whose deadline comes may be with a worker just then, or in the queue.
    ends = [line["code"] for line in lines() if line["event"] == "job_done"]
    assert len([code for code in ends if code != "deadline_exceeded"]) == 3
    assert logged.count("job_retry") >= 1
    assert KEY not in logged + shown
    assert "Explain the tide" not in logged, "nor what people ask"


async def test_stalled_and_cut_streams_are_no_errors_of_ours(
    open_gateway: Opener, lines: Lines
) -> None:
    gateway = await open_gateway(worker=False)
    await gateway.upstream.set_fault("hang_mid_stream", count=1)
    async with gateway.open_stream(text="Explain the tide"):
        await gateway.in_flight(1)
    await gateway.in_flight(0)
    await gateway.upstream.set_fault("error_in_stream", count=1)
    cut = await gateway.stream(text="Explain the tide", accept="text/plain")
    assert not cut.ended
    await wait_until(lambda: len(_named(lines(), "request_done")) == 2, 20)
    assert [line for line in lines() if line["level"] in ("error", "critical")] == []


async def test_a_file_that_breaks_off_is_one_line(
    open_gateway: Opener, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await open_gateway()
    record = await gateway.end_of(await gateway.submit(data="Generate an image of a fox"))
    stream = Blobs.stream

    async def broken(self: Blobs, key: str) -> Any:
        async for piece in stream(self, key):
            yield piece[:100]
            _ = 1 / 0

    monkeypatch.setattr(Blobs, "stream", broken)
    async with gateway.http.get(gateway.url + record["images"][0]["url"]) as response:
        assert response.status == 200
        with pytest.raises(Exception, match=r"payload|closed"):
            await response.read()
    await wait_until(lambda: _named(lines(), "internal_error"), 20)
    assert len(_named(lines(), "internal_error")) == 1
