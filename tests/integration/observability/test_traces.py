"""Traces from a client through queue and worker to the upstream, as a collector receives them."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.gateway import Gateway, Opener
from tests.integration.observability.collector import attributes_of, collecting
from tests.integration.observability.test_metrics import MODEL, chat
from tests.waiting import wait_until
from tidegate.call import Answer, Charge, Usage, UsageDetails
from tidegate.embedded.servers import free_port
from tidegate.metrics import otel
from tidegate.metrics.otel import Collector, _answered
from tidegate.record import CallRecord
from tidegate.telemetry.tracing import Tracing

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


async def posted(gateway: Gateway, path: str, body: Any, **headers: str) -> tuple[int, str]:
    """Status and the request's id."""
    async with gateway.http.post(gateway.url + path, json=body, headers=headers) as response:
        await response.read()
        return response.status, response.headers["x-tidegate-request-id"]


def write_dotenv(variables: dict[str, str]) -> None:
    Path(".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))


def traces_of(sent: list[str]) -> set[str]:
    return {one.split("-")[1] for one in sent}


async def test_one_trace_leads_from_client_through_queue_and_worker_to_the_upstream(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    async with collecting() as collector:
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            "OTEL_METRIC_EXPORT_INTERVAL": "300",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "0.5",
        }
        write_dotenv(variables)
        for name in variables:  # so that what the gateway sets is gone after the test
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        gateway = await open_gateway()
        await gateway.upstream.set_fault("throttled", retry_after_s=0.01, count=1)
        status, job = await posted(
            gateway, "/submit", {"data": "Explain tides"}, traceparent=PARENT
        )
        assert status == 202
        await gateway.end_of(job)
        await posted(gateway, "/stream", {"data": "Explain ebb"}, traceparent=PARENT)
        await gateway.upstream.set_fault("throttled", retry_after_s=0.01, count=1)
        body = chat("Explain flood", stream=True)
        status, native = await posted(gateway, "/v1/chat/completions", body, traceparent=PARENT)
        assert status == 200
        calls = await gateway.calls()
        sent = [call.traceparent for call in calls]
        assert len(sent) == 5, "three calls, of which two were tried again"
        assert traces_of(sent) == {TRACE}
        assert len({one.split("-")[2] for one in sent} | {SPAN}) == 6, "each try has its own span"

        await wait_until(lambda: len(collector.spans) >= 12, 20, "all spans are there")
        assert {span.trace_id.hex() for span in collector.spans} == {TRACE}
        by_id = {span.span_id.hex(): span for span in collector.spans}
        for one in sent:
            tried = by_id[one.split("-")[2]]
            logical = by_id[tried.parent_span_id.hex()]
            assert logical.parent_span_id.hex() == SPAN, "whose parent is the client"
            assert logical.start_time_unix_nano <= tried.start_time_unix_nano
            assert tried.end_time_unix_nano <= logical.end_time_unix_nano
            assert attributes_of(tried)["tidegate.upstream"] == "gemini"
            assert attributes_of(tried)["server.address"] == "127.0.0.1"
        own = next(
            span
            for span in collector.spans
            if attributes_of(span).get("tidegate.request_id") == native
        )
        said = attributes_of(own)
        assert (own.name, own.kind) == (f"chat {MODEL}", own.SPAN_KIND_CLIENT)
        assert said["gen_ai.provider.name"] == "openai"
        assert said["gen_ai.request.stream"] is True
        assert said["gen_ai.usage.output_tokens"] > 0
        assert said["gen_ai.response.model"] == MODEL
        assert said["tidegate.tries"] == 2
        tries = [span for span in collector.spans if span.parent_span_id == own.span_id]
        codes = sorted(attributes_of(one).get("error.type", "") for one in tries)
        assert codes == ["", "", "upstream_throttled"], "two tries and the wait"
        assert len(collector.named("tidegate.queue")) == 4, "one for each time that it waited"
        await wait_until(lambda: len(collector.metrics) >= 3, 20, "the metrics")
        duration = collector.metrics["gen_ai.client.operation.duration"]
        assert list(duration.histogram.data_points[0].explicit_bounds)[:2] == [0.01, 0.02]
        assert collector.services == {"tidegate-api", "tidegate-worker"}


def test_a_span_says_which_model_answered_and_what_was_written_to_a_cache() -> None:
    at = datetime(2026, 5, 1, tzinfo=UTC)
    usage = Usage(details=UsageDetails(cache_write_tokens=5))
    answer, charge = Answer(model_version="m-2"), Charge(usage=usage)
    ended = CallRecord("relay", "acme", at, answer=answer, charge=charge)
    said = {"gen_ai.response.model": "m-2", "gen_ai.usage.cache_creation.input_tokens": 5}
    assert _answered(ended) == said


async def test_a_job_that_ends_in_the_queue_after_an_attempt_has_its_own_span(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.5")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        gateway = await open_gateway()
        await gateway.upstream.set_fault("throttled", retry_after_s=20, count=1)
        _, job = await posted(gateway, "/submit", {"data": "Explain tides"}, traceparent=PARENT)
        await wait_until(lambda: len(collector.spans) == 2, 20, "the attempt and its wait")
        async with gateway.http.delete(f"{gateway.url}/requests/{job}") as response:
            assert response.status == 200
        await wait_until(lambda: len(collector.spans) == 3, 20, "the job itself")
        *parts, own = collector.spans
        assert {one.parent_span_id for one in parts} == {own.span_id}
        assert (own.trace_id.hex(), own.parent_span_id.hex()) == (TRACE, SPAN)
        said = attributes_of(own)
        assert (said["tidegate.request_id"], said["error.type"]) == (job, "cancelled")


async def test_without_a_collector_a_clients_traceparent_goes_through_as_it_is(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(log_format="json")
    _, job = await posted(gateway, "/submit", {"data": "Explain tides"}, traceparent=PARENT)
    await gateway.end_of(job)
    await posted(gateway, "/stream", {"data": "Explain ebb"}, traceparent=PARENT)
    await posted(gateway, "/v1/chat/completions", chat("Hi"), traceparent=PARENT)
    await posted(gateway, "/v1/chat/completions", chat("Hi"), traceparent="00-not-a-parent-01")
    await posted(gateway, "/v1/chat/completions", chat("Hi"))
    sent = [call.traceparent for call in await gateway.calls()]
    assert sent == [PARENT, PARENT, PARENT, "00-not-a-parent-01", ""]


async def test_a_collector_that_is_away_costs_nothing_and_is_told_of_once(
    open_gateway: Opener, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    gateway = await open_gateway(worker=False)
    said = ""

    async def told() -> bool:
        nonlocal said
        status, _ = await posted(gateway, "/v1/chat/completions", chat("Hi"))
        assert status == 200
        said += "".join(capsys.readouterr())
        return "collector_away" in said

    await wait_until(told, 20, "it is told of")
    for _ in range(20):
        assert (await posted(gateway, "/v1/chat/completions", chat("Hi")))[0] == 200
    said += "".join(capsys.readouterr())
    assert said.count("collector_away") == 1
    assert "Traceback" not in said


def test_a_collector_that_hangs_holds_up_the_end_of_a_process_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(otel, "_CLOSE_WITHIN_MS", 100)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, answers nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        collector = Collector("tidegate-api", "api-1")
        request_id = uuid4()
        trail = Tracing(collector.samples).trail(request_id, None)
        ended = CallRecord("relay", "acme", datetime.now(UTC), request_id, trail=trail)
        ended.end("succeeded")
        collector.take([ended])
        began = time.monotonic()
        collector.close()
        assert time.monotonic() - began < 5


async def test_the_environment_names_the_service_and_each_process_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with collecting() as received:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", received.url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "my gateway")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=a,service.instance.id=of-all")
        collector = Collector("tidegate-api", "api-1")
        request_id = uuid4()
        trail = Tracing(collector.samples).trail(request_id, None)
        ended = CallRecord("relay", "acme", datetime.now(UTC), request_id, trail=trail)
        ended.end("succeeded")
        collector.take([ended])
        await asyncio.to_thread(collector.close)
    (said,) = received.resources
    assert (said["service.name"], said["team"]) == ("my gateway", "a")
    assert said["service.instance.id"] == "api-1"
