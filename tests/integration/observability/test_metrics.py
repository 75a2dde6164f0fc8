"""`GET /metrics`: what it tells of calls, of this process and of all, and to whom."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from tests.gateway import Gateway, Opener
from tests.integration.accounting.test_budgets import with_budgets
from tests.waiting import wait_until
from tidegate.app import _watch_blobs
from tidegate.metrics.instruments import ALL
from tidegate.prices.budgets import Budget
from tidegate.store.blobs import Blobs
from tidegate.telemetry.logging import Log, _remember

MODEL = "gemini-2.5-flash"
LEARNED = ("learned_bound", "drift", "others_ratio")
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def chat(text: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}]} | more


def complaints_of_promtool(text: str) -> list[str]:
    lint = ["promtool", "check", "metrics"]
    done = subprocess.run(lint, input=text, capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if line]


async def scraped(gateway: Gateway, path: str = "/metrics") -> Values:
    async with gateway.http.get(gateway.url + path) as response:
        assert response.status == 200, await response.text()
        assert response.headers["content-type"].startswith("text/plain; version=")
        return values_in(await response.text())


def values_in(text: str) -> Values:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(values: Values, name: str, **labels: str) -> float:
    """The sum over all whose labels are among these."""
    wanted = frozenset(labels.items())
    return sum(value for (called, has), value in values.items() if called == name and wanted <= has)


async def test_a_scrape_tells_of_calls_of_the_process_and_of_all(
    open_gateway: Opener, tmp_path: Path
) -> None:
    path = tmp_path / "tidegate.toml"
    path.write_text('[upstreams.gemini.prices]\n"*" = { input = 0.30, output = 2.50 }\n')
    gateway = await open_gateway(tidegate_policy=path, worker=False)
    await with_budgets(gateway, Budget("all", "tokens", 10**9, "day", doubt="estimate"))
    queued = [await gateway.submit(data=f"Explain {n}") for n in range(3)]
    spent = 0
    for n in range(4):
        async with gateway.http.post(
            f"{gateway.url}/v1/chat/completions", json=chat(f"Say {n}", stream=n == 3)
        ) as response:
            assert response.status == 200
            if n < 3:
                spent += (await response.json())["usage"]["completion_tokens"]
            await response.read()
    async with gateway.http.post(f"{gateway.url}/v1/made/up/by/a/client", json={}) as response:
        assert response.status == 404

    async def counted() -> Values | None:
        values = await scraped(gateway)
        return values if of(values, "tidegate_calls_total", source="relay") == 5 else None

    values: Values = await wait_until(counted, 20, "all calls are counted")
    told = {name for name, _ in values}
    labels = {"source": "relay", "pool": "gemini"}
    assert of(values, "tidegate_calls_total", status="succeeded", model=MODEL, **labels) == 4
    assert of(values, "tidegate_failures_total", source="relay", code="not_found") == 1
    assert of(values, "tidegate_attempts_total", **labels) == 4
    assert of(values, "tidegate_queue_seconds_count", **labels) == 4
    assert of(values, "tidegate_first_byte_seconds_count", **labels) == 4
    said = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "openai"}
    asked = said | {"gen_ai_request_model": MODEL}
    assert of(values, "gen_ai_client_operation_duration_seconds_count", **asked) == 4
    assert of(values, "gen_ai_client_operation_time_to_first_chunk_seconds_count", **asked) == 1
    output = of(values, "tidegate_tokens_total", type="output", model=MODEL)
    assert output >= spent > 0
    assert of(values, "tidegate_tenant_tokens_total", type="output", tenant="default") == output
    assert of(values, "gen_ai_client_token_usage_sum", gen_ai_token_type="output") == output
    assert of(values, "tidegate_cost_total", pool="gemini", model=MODEL) > 0
    assert of(values, "tidegate_http_requests_total", route="native", status="200") == 4
    assert of(values, "tidegate_http_requests_total", route="submit", status="202") == 3
    assert of(values, "tidegate_queue_jobs", lane="text_only", tenant="default") == 3
    assert of(values, "tidegate_limit_bound", pool="gemini", limit="kind:text_only") == 5
    assert of(values, "tidegate_limit_used", limit="kind:text_only") == 0
    assert of(values, "tidegate_valkey_up", pool="gemini") == 1
    assert of(values, "tidegate_postgres_up") == 1
    assert of(values, "tidegate_sessions", pool="gemini") == 1
    assert of(values, "tidegate_process_resident_memory_bytes", process="api") > 1e7
    assert of(values, "tidegate_event_loop_lag_seconds_count", process="api") > 0
    assert of(values, "tidegate_limiter_processes", state="up") == 1
    assert of(values, "tidegate_limiter_sync_seconds_count", pool="gemini") > 0
    assert not [name for name in told if not name.startswith(tuple(one.name for one in ALL))]
    assert not any(request_id in repr(values) for request_id in queued)
    async with gateway.http.get(f"{gateway.url}/metrics") as response:
        text = await response.text()
    # What the alerts, the dashboard and docs/metrics.md speak of is really there.
    here = set(re.findall(r"^# HELP (\w+)", text, re.MULTILINE))
    while_some_wait = {"tidegate_tenant_waiting"}  # see test_state.py
    # Of an upstream whose answers report limits: see integration/policy/test_learning.py.
    while_some_wait |= {f"tidegate_limit_{one}" for one in LEARNED}
    # Of a server of one's own: see integration/native/test_self_hosted.py.
    while_some_wait |= {one.name for one in ALL if one.name.startswith("tidegate_server_")}
    assert {one.name for one in ALL} - here == while_some_wait
    assert await asyncio.to_thread(complaints_of_promtool, text) == []


async def test_an_upstream_is_out_by_its_faults_and_not_by_an_operator(
    open_gateway: Opener,
) -> None:
    gateway = await open_gateway(worker=False)
    gate = gateway.services.spine.health["gemini"]

    async def call() -> int:
        url = f"{gateway.url}/v1/chat/completions"
        async with gateway.http.post(url, json=chat("Say hello")) as response:
            return response.status

    async def told() -> Values | None:
        """A scrape after the last call was counted, and so with the gauges of that time."""
        values = await scraped(gateway)
        ended = of(values, "tidegate_calls_total", source="relay")
        return values if ended == calls else None

    calls = 1
    gate.drain(True)
    assert await call() == 503
    values: Values = await wait_until(told, 20, "a scrape of the drained upstream")
    assert of(values, "tidegate_upstream_out", upstream="gemini") == 0
    gate.drain(False)
    await gateway.upstream.set_fault("unauthorized")
    calls = 2
    assert await call() == 502
    values = await wait_until(told, 20, "a scrape of the upstream that is out")
    assert of(values, "tidegate_upstream_out", upstream="gemini") == 1
    # The alerts on limits leave these out: TidegateUpstreamOut and TidegateKeyRefused tell of them.
    assert of(values, "tidegate_limit_paused_seconds", limit="upstream:gemini") > 0


async def test_a_scrape_tells_of_the_bucket_and_of_work_that_fails(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False)
    blobs = gateway.services.blobs
    values = await scraped(gateway)
    assert of(values, "tidegate_blobs_away") == 0
    before = of(values, "tidegate_problems_total", event="credentials_failed")
    _remember(None, "", {"level": "error", "event": Log.CREDENTIALS_FAILED.value})
    blobs.unavailable = True

    async def told() -> bool:
        values = await scraped(gateway)
        logged = of(values, "tidegate_problems_total", event="credentials_failed")
        return (of(values, "tidegate_blobs_away"), logged) == (1, before + 1)

    await wait_until(told, 20, "both in a scrape")
    await blobs.ping()
    assert (blobs.unavailable, blobs.is_silent) == (False, False)


async def test_an_outage_of_the_bucket_is_logged_once_until_it_answers(tmp_path: Path) -> None:
    blobs, folder = Blobs.from_url("", tmp_path), tmp_path / "blobs"
    with capture_logs() as logs:
        looking = asyncio.create_task(_watch_blobs(blobs, 0))
        for _ in range(2):
            shutil.rmtree(folder)
            blobs.unavailable = True  # as a write that fails has it
            await wait_until(lambda: blobs.is_silent, 10, "a ping that fails")
            folder.mkdir()
            await wait_until(
                lambda: not (blobs.unavailable or blobs.is_silent), 10, "one that works"
            )
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    assert [line["event"] for line in logs] == ["blobs_away"] * 2


async def test_a_scrape_needs_what_admin_needs(open_gateway: Opener) -> None:
    gateway = await open_gateway(worker=False, admin_token="of-the-operator-alone")
    for token, status in ((None, 401), ("another", 401), ("of-the-operator-alone", 200)):
        headers = {"Accept": "text/plain; version=1.x"}  # no number, as is the first one below
        headers |= {} if token is None else {"Authorization": f"Bearer {token}"}
        async with gateway.http.get(f"{gateway.url}/metrics", headers=headers) as response:
            assert response.status == status
            if status == 401:
                assert (await response.json())["code"] == "unauthenticated"
    for version in ("one", "1.0.0"):
        headers["Accept"] = f"application/openmetrics-text; version={version},text/plain;q=0.5"
        async with gateway.http.get(f"{gateway.url}/metrics", headers=headers) as response:
            assert response.status == 200
            assert (await response.text()).endswith("# EOF\n")
